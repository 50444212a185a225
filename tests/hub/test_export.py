import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from networks import make_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import dreal_timm
from dreal_timm import DrealTask
from dreal_timm.hub import describe_network, export, load
from dreal_timm.hub.folder import checksums

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


@pytest.mark.parametrize('classes', [7, 0])
@pytest.mark.parametrize(('name', 'options'), [
    ('test_resnet', {'block_args': {'attn_layer': 'se'}}),
    ('dreal_reid', {'backbone': 'test_resnet', 'last_stride': 2}),
])
def test_the_number_of_classes_stands_once(tmp_path, name, options, classes):
    """config.json says it at its top and not among the arguments; an export that says it in both loads as well."""
    model = timm.create_model(name, num_classes=classes, **options).eval()
    folder = export(model, tmp_path / 'model', data_config=DATA | {'input_size': (3, 64, 64)})
    config = json.loads((folder / 'config.json').read_text())
    assert config['num_classes'] == classes
    assert 'num_classes' not in config['model_args']
    assert 'num_classes' not in describe_network(model)['model_args']
    former = tmp_path / 'former'
    shutil.copytree(folder, former)
    (former / 'config.json').write_text(json.dumps(
        {**config, 'model_args': {**config['model_args'], 'num_classes': classes}}))
    (former / 'SHA256SUMS').write_text(checksums(former))
    input = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(input)
        for path in (folder, former):
            assert torch.equal(timm.create_model(f'local-dir:{path}', pretrained=True).eval()(input), expected)
            assert torch.equal(load(str(path)).eval()(input), expected)
            assert load(str(path), num_classes=3).num_classes == 3


def test_transformers_loads_it(tmp_path):
    """transformers repeats the network's logits; its pipeline says probabilities by name; SE needs timm alone.

    One process for all three, since importing transformers takes seconds.
    """
    pytest.importorskip('transformers')
    generator = torch.Generator().manual_seed(0)
    picture = Image.fromarray(torch.randint(0, 256, (80, 70, 3), generator=generator).to(torch.uint8).numpy())
    picture.save(tmp_path / 'picture.png')
    data = dict(input_size=(3, 64, 64), mean=(0.3,) * 3, std=(0.4,) * 3, interpolation='bilinear', crop_pct=0.9)
    input, expected = torch.randn(2, 3, 64, 64, generator=generator), {}
    transform = timm.data.create_transform(**data, is_training=False)
    for attention in ('se', 'cbam', 'srm'):
        torch.manual_seed(0)
        model = timm.create_model(f'dreal_{attention}_resnet18', num_classes=4, zero_init_last=False).eval()
        export(model, tmp_path / attention, data_config=data, label_names=list('abcd'))
        with torch.no_grad():
            scores = model(transform(picture)[None]).softmax(1)[0]
            expected |= {f'{attention}.logits': model(input), f'{attention}.scores': scores}
    save_file({'input': input}, tmp_path / 'input.safetensors')
    code = (
        'import sys, timm, torch\n'
        'from safetensors.torch import load_file, save_file\n'
        'from transformers import AutoModelForImageClassification, pipeline\n'
        'input, found = load_file("input.safetensors")["input"], {}\n'
        'for attention in ("se", "cbam", "srm"):\n'
        '    if attention == "cbam":\n'
        '        assert "dreal_timm" not in sys.modules\n'
        '        import dreal_timm\n'
        '    model = AutoModelForImageClassification.from_pretrained(attention, dtype=torch.float32).eval()\n'
        '    with torch.no_grad():\n'
        '        found[f"{attention}.logits"] = model(input).logits\n'
        '    told = pipeline("image-classification", model=attention, dtype=torch.float32)("picture.png")\n'
        '    scores = {row["label"]: row["score"] for row in told}\n'
        '    found[f"{attention}.scores"] = torch.tensor([scores[name] for name in "abcd"])\n'
        'save_file(found, "found.safetensors")\n'
    )
    path = str(Path(dreal_timm.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, '-c', code], check=False, cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': path})
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / 'found.safetensors')
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


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


def transposed(model):
    model.fc.weight = nn.Parameter(model.fc.weight.detach().t().contiguous().t())
    model.conv1[0].weight = nn.Parameter(model.conv1[0].weight.detach().transpose(2, 3))


def expanded(model):
    model.fc.bias = nn.Parameter(torch.tensor([0.3]).expand(7))
    model.bn1.running_mean = torch.tensor(0.1).expand(model.bn1.num_features)
    model.bn1.weight = nn.Parameter(torch.rand(1).expand(model.bn1.num_features))


def overlapping(model):
    count = model.bn1.num_features
    flat = torch.rand(2 * count)
    model.bn1.weight = nn.Parameter(flat[:count])
    model.bn1.bias = nn.Parameter(flat[count // 2:count // 2 + count])
    model.bn1.running_mean = flat[count:]


def shared(model):
    model.layer1[0].bn2 = model.layer1[0].bn1
    model.layer2[0].bn2.weight = model.layer2[0].bn1.weight


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('change', [transposed, expanded, overlapping, shared])
def test_memory_of_any_layout(tmp_path, change, half):
    """Tensors that are transposed, expanded, overlapping or shared come back with their numbers; none is changed."""
    model = make_model('se').eval()
    change(model)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = export(model, tmp_path / 'model', half=half)
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    for name, tensor in loaded.state_dict().items():
        right = expected[name].half().float() if half and expected[name].is_floating_point() else expected[name]
        assert torch.equal(tensor, right), name
        assert torch.equal(model.state_dict()[name], expected[name])
    input, tolerance = torch.randn(2, 3, 64, 64), 1e-2 if half else 1e-5
    with torch.no_grad():
        torch.testing.assert_close(loaded(input), model(input), rtol=tolerance, atol=tolerance)


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
