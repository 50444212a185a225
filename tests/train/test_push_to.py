"""`dreal.hub.push_to`: checked before the training, sent after it, and no failure of it harms the run"""
import json
import shutil

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from small_run import recipe

from dreal_timm.cli import main
from dreal_timm.errors import WeightsError
from dreal_timm.hub import load
from dreal_timm.train import run
from dreal_timm.train.validate import validate

NAME = 'user/trained'
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')


def with_push(images, output, **values):
    return recipe(images, output, epochs=1, dreal={'hub': {'push_to': NAME, 'private': True}}, **values)


def test_a_run_sends_its_network(hub, images, tmp_path):
    """The repository holds the best epoch's moving average, and a card with the accuracy that validate measures."""
    values = with_push(images, tmp_path, model_ema=True, model_ema_decay=0.5)
    results = run(values)
    assert results['pushed'].startswith(f'{hub.url}/{NAME}/commit/')
    assert hub.repositories[NAME].private
    model = load(f'hf-hub:{NAME}')
    best = torch.load(tmp_path / 'run' / 'model_best.pth.tar', weights_only=True)['state_dict_ema']
    assert all(torch.equal(tensor, best[name]) for name, tensor in model.state_dict().items())
    sent = hub.repositories[NAME].commits[-1][1]
    told = json.loads(sent['training/results.json'])
    measured = validate(results['model'], images, batch_size=8, workers=0)
    assert all(told[key] == measured[key] for key in ('loss', 'top1', 'top5', 'samples', 'weights_sha256'))
    assert told['top1'] == results['metrics']['top1']
    card = ModelCard(sent['README.md'].decode())
    assert {row.metric_type: row.metric_value for row in card.data.eval_results} == {
        key: told[key] for key in ('top1', 'top5')}
    assert str(tmp_path) not in ''.join(sent[name].decode() for name in sent if name.startswith('training/'))


def test_nothing_is_measured_without_a_validation(hub, images, tmp_path):
    """A run without a validation split sends a card without numbers."""
    assert run(with_push(images, tmp_path, val_split=''))['pushed']
    sent = hub.repositories[NAME].commits[-1][1]
    assert 'training/results.json' not in sent
    assert 'Not measured.' in sent['README.md'].decode()


def test_a_failed_push_keeps_the_run(hub, images, tmp_path, caplog):
    """The run ends as any other, says what failed and how to send it later, and that command works."""
    hub.faults['POST', '/commit'] = [403]
    results = run(with_push(images, tmp_path))
    assert results['pushed'] == ''
    assert NAME not in hub.repositories
    assert timm.create_model(f"local-dir:{results['model']}", pretrained=True)
    message = next(record.message for record in caplog.records if record.levelname == 'ERROR')
    assert 'the token does not allow it' in message
    command = message[message.index('dreal-timm push'):].split()
    assert main(command[1:]) == 0
    sent = hub.repositories[NAME].commits[-1][1]
    expected = load_file(f"{results['model']}/model.safetensors")
    shutil.rmtree(tmp_path / 'run' / 'model')
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(f'hf-hub:{NAME}').state_dict().items())
    assert json.loads(sent['training/checkpoint.json'])['epoch'] == 0


def test_the_command_tells_a_failure_by_its_code(hub, images, tmp_path, capsys):
    """`dreal-timm train` ends with 1 where the network was not sent, with 0 and its address where it was."""
    path = tmp_path / 'recipe.yaml'
    for fault, code, experiment in ((True, 1, 'first'), (False, 0, 'second')):
        if fault:
            hub.faults['POST', '/commit'] = [403]
        path.write_text(json.dumps(with_push(images, tmp_path, experiment=experiment)))
        assert main(['train', str(path)]) == code
        assert ('sent to ' in capsys.readouterr().out) == (not fault)


@pytest.mark.parametrize(('change', 'message'), [
    ('name', 'Name the repository as USER/NAME'),
    ('token', 'there is no token: log in'),
    ('offline', r'the Hub is switched off \(HF_HUB_OFFLINE\)'),
])
def test_checked_before_the_training(hub, images, tmp_path, monkeypatch, change, message):
    """What would make the push fail is told before anything is written or asked."""
    values = with_push(images, tmp_path / 'out')
    if change == 'name':
        values['dreal']['hub']['push_to'] = 'network'
    elif change == 'token':
        monkeypatch.setattr('dreal_timm.hub.upload.get_token', lambda: None)
    else:
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(ValueError if change == 'name' else WeightsError, match=message):
        run(values)
    assert not (tmp_path / 'out').exists()
    assert not hub.requests
