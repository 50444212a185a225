"""`dreal-timm export`: the network of a run for others, and what of a checkpoint is refused"""
import hashlib
import json
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from networks import make_model
from safetensors.torch import load_file
from small_run import recipe, write_images

from dreal_timm import DrealTask
from dreal_timm.cli import main
from dreal_timm.hub import export, export_run


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('exported') / 'images')


@pytest.fixture(scope='module')
def finished(images, tmp_path_factory):
    """A reinforced run of two epochs with a moving average."""
    from dreal_timm.train import run
    output = tmp_path_factory.mktemp('exported-run')
    run(recipe(images, output, model_ema=True, model_ema_decay=0.5))
    return output / 'run'


def weights_of(folder):
    return load_file(folder / 'model.safetensors')


@pytest.mark.parametrize(
    ('weights', 'key'), [('auto', 'state_dict_ema'), ('ema', 'state_dict_ema'), ('raw', 'state_dict')])
def test_weights_by_choice(finished, tmp_path, weights, key, capsys):
    """The command exports the best epoch's moving average or raw weights, bit for bit, with what the training was."""
    assert main(['export', str(finished), str(tmp_path / 'out'), '--weights', weights]) == 0
    assert "timm.create_model('local-dir:" in capsys.readouterr().out
    checkpoint = torch.load(finished / 'model_best.pth.tar', weights_only=True)
    exported = weights_of(tmp_path / 'out')
    assert exported.keys() == checkpoint[key].keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in checkpoint[key].items())
    told = json.loads((tmp_path / 'out' / 'training' / 'checkpoint.json').read_text())
    assert (told['epoch'], told['seed']) == (checkpoint['epoch'], 42)
    assert told['weights'] == ('raw' if weights == 'raw' else 'ema')
    assert told['exported_with']['timm'] == timm.__version__
    training = tmp_path / 'out' / 'training'
    assert (training / 'run.json').read_bytes() == (finished / 'run.json').read_bytes()
    assert (training / 'summary.csv').read_bytes() == (finished / 'summary.csv').read_bytes()
    settings, shared = (yaml.safe_load((folder / 'args.yaml').read_text()) for folder in (finished, training))
    assert settings.items() >= shared.items()
    assert settings.keys() - shared.keys() >= {'data_dir', 'output', 'log_kwargs'}  # of the machine


def test_it_is_the_runs_own_export(finished, tmp_path):
    """Config and weights are those of the folder that the run itself wrote."""
    export_run(finished, tmp_path / 'out')
    own, exported = (json.loads((f / 'config.json').read_text()) for f in (finished / 'model', tmp_path / 'out'))
    assert exported == own
    assert all(torch.equal(t, weights_of(finished / 'model')[n]) for n, t in weights_of(tmp_path / 'out').items())


def test_a_run_that_has_not_ended(finished, tmp_path):
    """A folder that a run has not exported its network to yet gives the same network, and the settings of the run."""
    for name in ('network.json', 'args.yaml', 'run.json', 'summary.csv', 'model_best.pth.tar'):
        (tmp_path / 'run').mkdir(exist_ok=True)
        (tmp_path / 'run' / name).write_bytes((finished / name).read_bytes())
    for source, name in ((tmp_path / 'run', 'first'), (finished, 'second')):
        export_run(source, tmp_path / name)
    files = {p.relative_to(tmp_path / 'first') for p in (tmp_path / 'first').rglob('*') if p.is_file()}
    assert len(files) >= 9
    for file in files:
        assert (tmp_path / 'first' / file).read_bytes() == (tmp_path / 'second' / file).read_bytes(), file


def test_a_checkpoint_of_a_run(finished, tmp_path):
    """Any checkpoint in the folder can be exported, the worse epoch too."""
    best = torch.load(finished / 'model_best.pth.tar', weights_only=True)['epoch']
    path = finished / f'checkpoint-{1 - best}.pth.tar'
    export_run(path, tmp_path / 'out', weights='raw')
    expected = torch.load(path, weights_only=True)['state_dict']
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(tmp_path / 'out').items())


def test_half(finished, tmp_path):
    """Float16 weights are the rounded ones, take half the bytes, and load as float32 with the logits beside them."""
    export_run(finished, tmp_path / 'full')
    export_run(finished, tmp_path / 'half', half=True)
    full, half = weights_of(tmp_path / 'full'), weights_of(tmp_path / 'half')
    for name, tensor in full.items():
        assert torch.equal(half[name], tensor.half() if tensor.is_floating_point() else tensor)
    sizes = [(tmp_path / name / 'model.safetensors').stat().st_size for name in ('half', 'full')]
    assert sizes[0] < 0.6 * sizes[1]
    model = timm.create_model(f'local-dir:{tmp_path}/half', pretrained=True).eval()
    assert model.conv1[0].weight.dtype == torch.float32
    test = load_file(tmp_path / 'half' / 'test' / 'rand_tensors.safetensors')
    with torch.no_grad():
        torch.testing.assert_close(model(test['input']), test['output'])


def test_half_that_overflows(tmp_path):
    """A weight that float16 cannot hold is named, and nothing is left behind."""
    model = make_model('se')
    with torch.no_grad():
        model.fc.bias[0] = 1e6
    with pytest.raises(ValueError, match=r'fc\.bias holds numbers that float16 cannot hold'):
        export(model, tmp_path / 'out', half=True)
    assert not list(tmp_path.iterdir())


def test_checksums(finished, tmp_path):
    """SHA256SUMS names every other file of the folder, in the format of sha256sum."""
    export_run(finished, tmp_path / 'out')
    lines = (tmp_path / 'out' / 'SHA256SUMS').read_text().splitlines()
    files = {line[66:]: line[:64] for line in lines}
    present = {p.relative_to(tmp_path / 'out').as_posix() for p in (tmp_path / 'out').rglob('*') if p.is_file()}
    assert set(files) == present - {'SHA256SUMS', 'README.md'}  # a card may be edited
    assert all(hashlib.sha256((tmp_path / 'out' / n).read_bytes()).hexdigest() == digest for n, digest in files.items())


def test_channels_last_and_tied_weights(tmp_path):
    """Weights in channels-last layout, and two names of one tensor, are written and come back."""
    model = make_model('se').to(memory_format=torch.channels_last)
    model.layer2[0].se.fc1.bias = model.layer1[0].se.fc1.bias
    export(model, tmp_path / 'out', {'input_size': (3, 64, 64)})
    loaded = timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_a_critic_is_refused(finished, tmp_path):
    """A trainable module, or a checkpoint with a critic among the weights, is an error."""
    task = DrealTask(make_model('se'), verbose=False, input_size=(3, 64, 64))
    module = task.get_trainable_module()
    module.pretrained_cfg = task.get_eval_model().pretrained_cfg
    with pytest.raises(ValueError, match='holds a critic'):
        export(module, tmp_path / 'out')
    checkpoint = torch.load(finished / 'model_best.pth.tar', weights_only=True)
    checkpoint['state_dict']['critic.layer1_channel.rnn.weight_ih_l0'] = torch.ones(4, 2)
    torch.save(checkpoint, finished / 'with-critic.pth.tar')
    with pytest.raises(ValueError, match='training-only weights'):
        export_run(finished / 'with-critic.pth.tar', tmp_path / 'out', weights='raw')
    assert not list(tmp_path.iterdir())


def test_a_folder_that_fails_is_removed(finished, tmp_path, monkeypatch):
    """Where a fresh process comes to other logits, no folder appears."""
    real = sys.modules['dreal_timm.hub.export']

    def wrong(model, input_size, *args):
        tensors = tensors_of(model, input_size)
        return {**tensors, 'output': tensors['output'] + 1}

    tensors_of = real._test_tensors
    monkeypatch.setattr(real, '_test_tensors', wrong)
    with pytest.raises(RuntimeError, match='fresh process'):
        export_run(finished, tmp_path / 'out')
    assert not list(tmp_path.iterdir())


def test_needs_no_package_of_ours(finished, tmp_path):
    """An SE network out of a run loads where only timm is imported."""
    export_run(finished, tmp_path / 'out')
    code = (
        'import sys, timm\n'
        'timm.create_model("local-dir:" + sys.argv[1], pretrained=True)\n'
        'assert "dreal_timm" not in sys.modules\n'
    )
    subprocess.run([sys.executable, '-c', code, str(tmp_path / 'out')], check=True, cwd=tmp_path)


@pytest.mark.parametrize(('change', 'message'), [
    ('nowhere', "No checkpoint 'nowhere'"),
    ('exists', 'exists: choose another folder'),
    ('no run', 'it is no folder of one'),
    ('broken network', 'describes no network'),
    ('broken', 'broken or no checkpoint'),
    ('no ema', r'holds no moving average'),
    ('foreign', 'does not fit the network'),
])
def test_errors(finished, tmp_path, capsys, change, message):
    """What can be wrong with a run is told in a line."""
    best = torch.load(finished / 'model_best.pth.tar', weights_only=True)
    source, out = finished / f'{change}.pth.tar', tmp_path / 'out'
    if change == 'nowhere':
        source = 'nowhere'
    elif change == 'exists':
        source = finished
        out.mkdir()
    elif change in ('no run', 'broken network'):
        source = tmp_path / 'model_best.pth.tar'
        torch.save(best, source)
        if change == 'broken network':
            (tmp_path / 'network.json').write_text('{"architecture": "resnet18", "model_args": {"depth": 3}}')
    elif change == 'broken':
        source.write_bytes(b'PK broken')
    else:
        del best['state_dict_ema']
        if change == 'foreign':
            best['state_dict']['layer9.weight'] = torch.ones(1)
        torch.save(best, source)
    weights = 'ema' if change == 'no ema' else 'auto'
    assert main(['export', str(source), str(out), '--weights', weights]) == 2
    assert message in capsys.readouterr().err
    assert change == 'exists' or not out.exists()
