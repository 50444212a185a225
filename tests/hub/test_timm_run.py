"""What timm's train.py leaves behind is a network for every command"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from small_run import SE, recipe, write_images
from timm.data import create_transform, resolve_data_config
from timm.utils import CheckpointSaver, ModelEmaV3

from dreal_timm.cli import main
from dreal_timm.hub import export_run, read_network
from dreal_timm.hub.run import open_network
from dreal_timm.hub.timm_run import is_timm_run
from dreal_timm.train import run
from dreal_timm.train.validate import validate

# what timm's script writes, with the settings of its command line
ARGS = {
    'data': 'images', 'data_dir': None, 'model': 'test_resnet', 'num_classes': 3, 'in_chans': 1, 'img_size': None,
    'input_size': [1, 32, 32], 'crop_pct': 1.0, 'mean': [0.4], 'std': [0.3], 'interpolation': 'bilinear',
    'model_kwargs': SE, 'gp': None, 'model_ema': False, 'model_ema_force_cpu': False, 'opt': 'sgd', 'lr': 0.1,
    'epochs': 300, 'seed': 42, 'drop': 0.0, 'crop_mode': None,
}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('timm') / 'data', train=1, validation=6)


def write_run(folder, ema=False, **changes):
    """An output folder as timm's script has it; return the networks of its raw and averaged weights."""
    args = {**ARGS, 'model_ema': ema, **changes}
    folder.mkdir()
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    torch.manual_seed(3)
    model = timm.create_model('test_resnet', num_classes=3, in_chans=1, **SE)
    average = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    saver = CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), lr=0.1), args=argparse.Namespace(**args),
        model_ema=average if ema else None, checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(4, metric=50.0)
    return model.eval(), average.module.eval()


@torch.no_grad()
def by_hand(model, folder, mean=0.4, std=0.3):
    """Top-1 and loss of every image, each alone, with PIL and numpy."""
    rows = []
    for label in range(3):
        for path in sorted((folder / 'validation' / f'class{label}').iterdir()):
            pixels = (np.asarray(Image.open(path), dtype=np.float32) / 255 - mean) / std
            logits = model(torch.from_numpy(pixels)[None, None])[0].double()
            rows.append((int(logits.argmax()) == label, float(logits.logsumexp(0) - logits[label])))
    top1, loss = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return {'top1': 100 * top1, 'loss': loss}


def measured(*arguments, **options):
    found = validate(*map(str, arguments), workers=0, device='cpu', **options)
    return {name: found[name] for name in ('top1', 'loss')}


@pytest.mark.parametrize(('ema', 'changes', 'taken'), [
    (False, {}, 'raw'), (True, {}, 'ema'), (True, {'model_ema_force_cpu': True}, 'raw'),
])
def test_it_is_validated(images, tmp_path, ema, changes, taken):
    """validate takes the weights that the best epoch was chosen by, with the preprocessing of the arguments."""
    raw, average = write_run(tmp_path / 'run', ema, **changes)
    expected = by_hand(average if taken == 'ema' else raw, images)
    for source in ('run', 'run/model_best.pth.tar', 'run/last.pth.tar'):
        assert measured(tmp_path / source, images) == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_of_a_timm_run(images, tmp_path):
    """--checkpoint takes another file; with --model-kwargs beside it any network and its weights are a network."""
    write_run(tmp_path / 'run')
    raw = timm.create_model('test_resnet', num_classes=3, in_chans=1, **SE).eval()
    torch.save({'state_dict': raw.state_dict()}, tmp_path / 'other.pth')
    expected = by_hand(raw, images)
    assert measured(tmp_path / 'run', images, checkpoint=tmp_path / 'other.pth') == pytest.approx(expected, rel=1e-4)
    kwargs = {'num_classes': 3, 'in_chans': 1, **SE}
    model = open_network('test_resnet', tmp_path / 'other.pth', **kwargs)
    assert all(torch.equal(value, raw.state_dict()[name]) for name, value in model.state_dict().items())
    for source in ('test_resnet.r160_in1k', str(tmp_path / 'run')):
        with pytest.raises(ValueError, match=r'checkpoint|does not fit'):
            open_network(source, num_classes=7)
    with pytest.raises(ValueError, match='Cannot load'):
        open_network('test_resnet', tmp_path / 'other.pth')


def test_the_command(images, tmp_path, capsys):
    """The command line prints a line of it, and all of it as JSON; options stand beside the checkpoint."""
    raw, _ = write_run(tmp_path / 'run')
    common = ['--data', str(images), '--workers', '0', '--device', 'cpu']
    assert main(['validate', str(tmp_path / 'run'), *common]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = by_hand(raw, images)
    assert len(lines) == 1 and f"{expected['top1']:.2f} %" in lines[0] and '18 images' in lines[0]
    torch.save(raw.state_dict(), tmp_path / 'weights.pth')
    options = ['num_classes=3', 'in_chans=1', 'zero_init_last=false', 'block_args={attn_layer: se}']
    assert main([
        'validate', 'test_resnet', *common, '--checkpoint', str(tmp_path / 'weights.pth'), '--json', '--model-kwargs',
        *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['samples'] == 18
    assert found['preprocessing']['mean'] == [0.5] and found['preprocessing']['std'] == [0.5]  # timm's, of 3 channels


def test_results_on_a_full_disk(images, tmp_path, monkeypatch, capsys):
    """Results that cannot be written leave no file that would stop the next try."""
    write_run(tmp_path / 'run')
    arguments = [
        'validate', str(tmp_path / 'run'), '--data', str(images), '--workers', '0', '--device', 'cpu', '--results',
        str(tmp_path / 'results.json')]

    def full(path, text, **options):
        path.write_bytes(text.encode()[:7])
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'write_text', full)
        assert main(arguments) == 2
    assert 'No space left' in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ['run']
    assert main(arguments) == 0
    assert json.loads((tmp_path / 'results.json').read_text())['samples'] == 18


def test_it_is_exported_and_inspected(images, tmp_path, capsys):
    """export makes a folder of it that plain timm loads, with its preprocessing; inspect lists its sites."""
    raw, average = write_run(tmp_path / 'run', ema=True)
    for weights, model in (('auto', average), ('ema', average), ('raw', raw)):
        folder = export_run(tmp_path / 'run', tmp_path / weights, weights)
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        transform = create_transform(**resolve_data_config({}, model=loaded))
        image = transform(Image.open(images / 'validation' / 'class1' / '0.png'))[None]
        with torch.no_grad():
            assert torch.allclose(loaded(image), model(image), rtol=1e-4, atol=1e-5)
        assert (list(loaded.pretrained_cfg['mean']), loaded.pretrained_cfg['num_classes']) == ([0.4], 3)
    card = (tmp_path / 'raw' / 'README.md').read_text()
    assert "trained plainly, without reinforcement, with timm's `train.py`" in card and 'were reinforced' not in card
    told = yaml.safe_load((tmp_path / 'raw' / 'training' / 'args.yaml').read_text())
    assert told['lr'] == 0.1 and 'data_dir' not in told and 'data' not in told
    assert all(
        torch.equal(value, average.state_dict()[name])
        for name, value in read_network(tmp_path / 'run').state_dict().items())
    assert main(['inspect', str(tmp_path / 'run'), '--json']) == 0
    assert [row['site'] for row in json.loads(capsys.readouterr().out)] == [
        f'layer{i}.0.se' for i in range(1, 5)]


def test_it_is_audited(images, tmp_path):
    """audit measures it, and by a checkpoint with options, as validate does."""
    audit_model = pytest.importorskip('dreal_timm.audit.command', reason='needs the extra').audit_model
    raw, _ = write_run(tmp_path / 'run')
    torch.save(raw.state_dict(), tmp_path / 'weights.pth')
    options = dict(workers=0, device='cpu', resamples=10)
    _, found = audit_model(str(tmp_path / 'run'), str(images), tmp_path / 'first', **options)
    expected = by_hand(raw, images)
    assert found['network']['top1'] == pytest.approx(expected['top1'])
    assert found['network']['log_likelihood'] == pytest.approx(-expected['loss'], rel=1e-4)
    kwargs = {'num_classes': 3, 'in_chans': 1, **SE}
    _, found = audit_model(
        'test_resnet', str(images), tmp_path / 'second', checkpoint=str(tmp_path / 'weights.pth'), model_kwargs=kwargs,
        **options)
    other = measured('test_resnet', images, checkpoint=tmp_path / 'weights.pth', model_kwargs=kwargs)
    assert found['network']['top1'] == pytest.approx(other['top1'])
    assert found['network']['log_likelihood'] == pytest.approx(-other['loss'], rel=1e-4)


@pytest.mark.parametrize(('name', 'place'), [('fc.bias', 0), ('layer4.0.conv2.weight', 4)])
def test_a_network_of_no_numbers(images, tmp_path, capsys, name, place):
    """A network that gives NaN is measured by no command: an error, and nothing written."""
    raw, _ = write_run(tmp_path / 'run')
    state = raw.state_dict()
    state[name].view(-1)[place] = float('nan')
    torch.save({'state_dict': state}, tmp_path / 'run' / 'model_best.pth.tar')
    common = ['--data', str(images), '--workers', '0', '--device', 'cpu']
    assert main(['validate', str(tmp_path / 'run'), *common, '--results', str(tmp_path / 'r.json')]) == 2
    assert main(['export', str(tmp_path / 'run'), str(tmp_path / 'out'), '--data', str(images)]) == 2
    pytest.importorskip('dreal_timm.audit.command', reason='needs the extra')
    assert main(['audit', str(tmp_path / 'run'), *common, '--output', str(tmp_path / 'audit')]) == 2
    assert 'no numbers' in capsys.readouterr().err
    assert not (tmp_path / 'r.json').exists() and not (tmp_path / 'out').exists()
    assert not (tmp_path / 'audit' / 'audit.json').exists()


@pytest.mark.parametrize('changes', [
    {'model': 'dreal_reid', 'model_kwargs': {'backbone_args': {'pretrained': True, 'pretrained_cfg': {'url': 'URL'}}}},
    {'model_kwargs': {'checkpoint_path': '/nowhere'}}, {'model': 'hf-hub:user/net'}, {'model': 'local-dir:/nowhere'},
    {'model_kwargs': {'layers': [16384] * 4}}, {'model_kwargs': {'device': 'meta'}},
])
def test_a_strangers_arguments(tmp_path, changes):
    """Arguments of a folder of a stranger fetch nothing, open nothing, and build nothing giant."""
    write_run(tmp_path / 'run', **changes)
    begun = time.monotonic()
    with pytest.raises(ValueError):
        open_network(tmp_path / 'run')
    assert time.monotonic() - begun < 10


def test_names_of_a_class_map(images, tmp_path):
    """A class map that timm's run was trained with names its outputs; without it nobody knows them: an error."""
    raw, _ = write_run(tmp_path / 'run', class_map='map.txt')
    with pytest.raises(ValueError, match=r'map\.txt'):
        open_network(tmp_path / 'run')
    (tmp_path / 'run' / 'map.txt').write_text('class2\nclass1\nclass0\n')
    state = raw.state_dict()
    for name in ('fc.weight', 'fc.bias'):
        state[name] = state[name].flip(0)
    torch.save({'state_dict': state}, tmp_path / 'run' / 'model_best.pth.tar')
    assert measured(tmp_path / 'run', images) == pytest.approx(by_hand(raw, images), rel=1e-4)


def test_the_epsilon_of_batch_norms(images, tmp_path):
    """bn_eps is a setting of the network, which its weights do not tell."""
    write_run(tmp_path / 'run', model='test_efficientnet', model_kwargs={}, bn_eps=0.5)
    model = timm.create_model('test_efficientnet', num_classes=3, in_chans=1, bn_eps=0.5).eval()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'run' / 'model_best.pth.tar')
    assert measured(tmp_path / 'run', images) == pytest.approx(by_hand(model, images), rel=1e-4)


@pytest.mark.parametrize(('content', 'message'), [
    ('- 1', 'names no model'), ('a: [', 'cannot be read'), ('model: 3', 'names no model'),
    ('model: no_such_model', 'Unknown model'), ('{model: test_resnet, num_classes: 5, in_chans: 1}', 'does not fit'),
])
def test_broken_arguments(tmp_path, content, message):
    """Arguments that name no network, or another one than the checkpoint's, are an error in a line."""
    write_run(tmp_path / 'run')
    (tmp_path / 'run' / 'args.yaml').write_text(content)
    with pytest.raises(ValueError, match=message):
        open_network(tmp_path / 'run')


def test_runs_of_ours(tmp_path, images, capsys):
    """The folder of a run of ours stands for what it exported, and while it trains for its best checkpoint."""
    data = write_images(tmp_path / 'data')
    results = run(recipe(data, tmp_path))
    folder = tmp_path / 'run'
    assert not is_timm_run(folder)
    expected = {name: results['metrics'][name] for name in ('top1', 'loss')}
    assert measured(folder, data) == pytest.approx(expected, rel=1e-4)
    assert main(['inspect', str(folder)]) == 0
    (folder / 'model').rename(tmp_path / 'moved')
    assert measured(folder, data) == pytest.approx(expected, rel=1e-4)
    assert measured(folder / 'model_best.pth.tar', data) == pytest.approx(expected, rel=1e-4)
    assert main(['inspect', str(folder)]) == 0
    capsys.readouterr()
