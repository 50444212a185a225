import json
import subprocess
import sys

import pytest
import timm
import torch
from networks import make_model
from safetensors.torch import load_file
from torch import nn

from dreal_timm import DrealTask
from dreal_timm.hub import export

DATA = dict(input_size=(1, 32, 32), mean=(0.3,), std=(0.4,), interpolation='bilinear', crop_pct=1.0)



@pytest.mark.parametrize('attention', ['se', 'cbam', 'srm'])
def test_round_trip(tmp_path, attention):
    """A trained network comes back from its folder with bit-equal logits, its preprocessing and its labels."""
    model = timm.create_model(f'dreal_{attention}_resnet18', num_classes=4, in_chans=1, zero_init_last=False)
    task = DrealTask(model, verbose=False, input_size=(1, 32, 32))
    task.get_trainable_module().train()
    task(torch.randn(4, 1, 32, 32), torch.arange(4))['loss'].backward()
    folder = export(task.get_eval_model(), tmp_path / 'a' / 'model', data_config=DATA, label_names=list('abcd'))
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    input = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(input), model.eval()(input))
    assert load_file(folder / 'test' / 'rand_tensors.safetensors')['input'].shape[1:] == (1, 32, 32)
    cfg = loaded.pretrained_cfg
    assert tuple(cfg['input_size']) == (1, 32, 32)
    assert (list(cfg['mean']), list(cfg['std'])) == ([0.3], [0.4])
    assert list(cfg['label_names']) == list('abcd')
    assert not any('critic' in name for name in load_file(folder / 'model.safetensors'))
    assert not list(tmp_path.glob('a/.*'))


def test_se_needs_only_timm(tmp_path):
    """An SE network is exported under timm's name and loads in a process that never imports this package."""
    folder = export(timm.create_model('dreal_se_resnet18', num_classes=4), tmp_path / 'model')
    code = (
        'import sys, timm\n'
        f'model = timm.create_model("local-dir:{folder}", pretrained=True)\n'
        'assert model.num_classes == 4\n'
        'assert "dreal_timm" not in sys.modules\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path)
    assert json.loads((folder / 'config.json').read_text())['architecture'] == 'seresnet18'


def test_cbam_keeps_its_name(tmp_path):
    """timm has no CBAM network with an MLP bias: the export keeps our name."""
    folder = export(timm.create_model('dreal_cbam_resnet18', num_classes=4), tmp_path / 'model')
    assert json.loads((folder / 'config.json').read_text())['architecture'] == 'dreal_cbam_resnet18'


def test_test_tensors(tmp_path):
    """The folder holds an input with features and logits, by the names that timm's own tests read."""
    model = make_model('se')
    folder = export(model, tmp_path / 'model')
    tensors = load_file(folder / 'test' / 'rand_tensors.safetensors')
    assert set(tensors) == {'input', 'output', 'features', 'pre_logits'}
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(model(tensors['input']), tensors['output'], rtol=1e-4, atol=1e-5)
        features = model.forward_features(tensors['input'])
        torch.testing.assert_close(features, tensors['features'], rtol=1e-4, atol=1e-5)


def test_channels_last(tmp_path):
    """Weights in channels-last memory are exported as any other; the model keeps its layout and mode."""
    model = make_model('se').to(memory_format=torch.channels_last).train()
    export(model, tmp_path / 'model')
    assert model.training
    assert model.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_existing_folder_is_refused(tmp_path):
    """Nothing is overwritten."""
    (tmp_path / 'model').mkdir()
    with pytest.raises(FileExistsError, match='exists'):
        export(make_model('se'), tmp_path / 'model')
    assert not list((tmp_path / 'model').iterdir())


def test_foreign_model_is_refused(tmp_path):
    """Only models that timm built have a configuration to export."""
    with pytest.raises(TypeError, match='Sequential'):
        export(nn.Sequential(nn.Linear(3, 3)), tmp_path / 'model')


def test_a_folder_that_fails_its_check_is_removed(tmp_path, monkeypatch):
    """If the reloaded model gives other logits, an error is raised and no folder is left."""
    create = timm.create_model

    def broken(*args, **kwargs):
        model = create(*args, **kwargs)
        with torch.no_grad():
            model.fc.bias.add_(1)
        return model

    model = make_model('se')
    monkeypatch.setattr(timm, 'create_model', broken)
    with pytest.raises(RuntimeError, match='logits'):
        export(model, tmp_path / 'model')
    assert not list(tmp_path.iterdir())
