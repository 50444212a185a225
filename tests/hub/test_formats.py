"""ONNX and torch.export: the files that are read back repeat the network, for any batch size"""
import hashlib
import importlib.util
import json

import pytest
import timm
import torch
from small_run import recipe, write_images
from torch import nn

import dreal_timm.hub.formats as formats
from dreal_timm.cli import main
from dreal_timm.hub import export, export_format, read_network
from dreal_timm.train.domains import sample_images

OLD = tuple(int(part) for part in torch.__version__.split('.')[:2]) < (2, 6)
needs_onnx = pytest.mark.skipif(
    OLD or importlib.util.find_spec('onnxruntime') is None, reason='ONNX needs torch 2.6 and the extra onnx')
each_format = pytest.mark.parametrize('format', [pytest.param('onnx', marks=needs_onnx), 'torch-export'])


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('formats') / 'images')


@pytest.fixture(scope='module')
def finished(images, tmp_path_factory):
    """A reinforced run of an epoch."""
    from dreal_timm.train import run
    output = tmp_path_factory.mktemp('formats-run')
    run(recipe(images, output, epochs=1))
    return output / 'run'


def read(path):
    """What a user of the file would call, with other code than the package's."""
    if path.suffix == '.pt2':
        return torch.export.load(path).module()
    import onnxruntime
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=['CPUExecutionProvider'])
    assert [(node.name, node.shape[1:]) for node in session.get_inputs()] == [('images', [3, 64, 64])]
    assert isinstance(session.get_inputs()[0].shape[0], str)  # a batch size that is free
    assert [node.name for node in session.get_outputs()] == ['logits']
    return lambda batch: torch.from_numpy(session.run(None, {'images': batch.numpy()})[0])


def build(attention):
    torch.manual_seed(0)
    model = timm.create_model(f'dreal_{attention}_resnet18', num_classes=5, zero_init_last=False)
    model.pretrained_cfg = {**model.pretrained_cfg, 'input_size': (3, 64, 64)}
    return model


@each_format
@pytest.mark.parametrize('attention', ['se', 'cbam', 'srm'])
def test_the_file_repeats_the_network(attention, format, tmp_path):
    """Logits of the file are the network's, for batches of other sizes than it was traced and compared with."""
    model = build(attention).train()
    folder = export_format(model, tmp_path / 'out', format, label_names=list('abcde'))
    assert model.training
    program = read(folder / formats.FORMATS[format])
    model.eval()
    with torch.no_grad():
        for size in (1, 2, 7):
            batch = torch.randn(size, 3, 64, 64)
            torch.testing.assert_close(program(batch), model(batch), rtol=0, atol=formats.TOLERANCE)
    told = json.loads((folder / 'preprocessing.json').read_text())
    assert (told['input_size'], told['label_names']) == ([3, 64, 64], list('abcde'))
    assert told['largest_difference']['noise']['logit'] <= formats.TOLERANCE
    sums = (folder / 'SHA256SUMS').read_text().splitlines()
    assert sorted(line[66:] for line in sums) == sorted([formats.FORMATS[format], 'preprocessing.json'])
    assert all(hashlib.sha256((folder / line[66:]).read_bytes()).hexdigest() == line[:64] for line in sums)


@each_format
def test_command(finished, images, tmp_path, capsys, format):
    """The command takes a run, and the run's exported folder, and compares on images of the data."""
    for source, name in ((finished, 'run'), (finished / 'model', 'folder')):
        assert main([
            'export', str(source), str(tmp_path / name), '--format', format, '--data', str(images)]) == 0
        assert 'of noise, ' in capsys.readouterr().out
        told = json.loads((tmp_path / name / 'preprocessing.json').read_text())
        assert told['largest_difference']['images']['count'] == 12
        assert (told['mean'], told['std'], told['crop_pct']) == ([0.4], [0.3], 1.0)
        assert told['label_names'] == ['class0', 'class1', 'class2']


def test_images_are_those_of_the_validation(finished, images):
    """Images are preprocessed as timm's own transform does it, and are spread over all classes."""
    model = timm.create_model(f'local-dir:{finished}/model', pretrained=True)
    found = sample_images(model, images, count=6)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    dataset = timm.data.create_dataset('', root=str(images / 'validation'), input_img_mode='L')
    assert found.shape == (6, 1, 32, 32)
    expected = [transform(dataset[i][0]) for i in (0, 2, 4, 6, 8, 10)]
    assert torch.equal(found, torch.stack(expected))
    assert len(sample_images(model, images)) == 12


def test_a_file_that_differs_is_removed(tmp_path, monkeypatch):
    """A program whose logits are off by more than the tolerance is an error, and leaves nothing."""
    original = formats._write_program
    monkeypatch.setattr(
        formats, '_write_program', lambda *args: lambda batch: original(*args)(batch) + 2 * formats.TOLERANCE)
    with pytest.raises(RuntimeError, match=r'torch-export, noise: logits differ from those .* by up to 0\.000'):
        export_format(build('se'), tmp_path / 'out', 'torch-export')
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_exported(tmp_path):
    """Control flow that depends on numbers is an error in a line, and leaves nothing."""
    class Odd(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    model = build('se')
    model.maxpool = Odd()
    with pytest.raises(RuntimeError, match='torch-export: the network cannot be exported: '):
        export_format(model, tmp_path / 'out', 'torch-export')
    assert not list(tmp_path.iterdir())


def test_errors(finished, tmp_path, monkeypatch, capsys):
    """What cannot be is told before anything is written."""
    out = tmp_path / 'out'
    for options, message in (
        (['--half'], '--half goes with --format timm'),
        (['--control', 'x.json'], '--control goes with --format timm'),
        (['--weights', 'ema'], 'holds no moving average'),
    ):
        assert main(['export', str(finished), str(out), '--format', 'torch-export', *options]) == 2
        assert message in capsys.readouterr().err
    assert main(['export', str(finished / 'model'), str(out), '--format', 'torch-export', '--weights', 'raw']) == 2
    assert 'is no run that could hold others' in capsys.readouterr().err
    with pytest.raises(ValueError, match='format must be one of onnx, torch-export'):
        export_format(build('se'), out, 'tflite')
    with pytest.raises(TypeError, match='Only models that timm built'):
        export_format(nn.Linear(1, 1), out, 'torch-export')
    with pytest.raises(FileExistsError):
        export_format(build('se'), tmp_path, 'torch-export')
    monkeypatch.setattr(formats, 'find_spec', lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "dreal_timm\[onnx\]"'):
        export_format(build('se'), out, 'onnx')
    assert not list(tmp_path.iterdir())


def test_read_network(finished, tmp_path):
    """A run, a checkpoint of it and its exported folder give the same network."""
    export(read_network(finished), tmp_path / 'out')
    states = [
        read_network(source).state_dict()
        for source in (finished, finished / 'model_best.pth.tar', finished / 'model', tmp_path / 'out')]
    assert all(torch.equal(tensor, other[name]) for other in states for name, tensor in states[0].items())
