"""Starting a network with attention from the weights of a plain one"""
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from networks import ATTENTION, make_batch, make_model
from safetensors.torch import save_file
from small_run import recipe, write_images

from dreal_timm.hub import describe_network, export, load_backbone, open_gates, read_network
from dreal_timm.layers import BamModule
from dreal_timm.train import load_config
from dreal_timm.train.build import build_model


@pytest.fixture(scope='module')
def plain():
    """A plain ResNet-18 with norms that are not as they were made."""
    torch.manual_seed(0)
    model = timm.create_model('resnet18', num_classes=7)
    for name, tensor in model.state_dict().items():
        if 'running_var' in name:
            tensor.uniform_(0.5, 1.5)
        elif 'running_mean' in name or ('bn' in name and 'num' not in name):
            tensor.normal_(1.0, 0.2)
    return model.eval()


@pytest.fixture(scope='module')
def files(plain, tmp_path_factory):
    """The same weights as a file of PyTorch, a checkpoint, safetensors, and an exported folder."""
    folder = tmp_path_factory.mktemp('plain')
    torch.save(plain.state_dict(), folder / 'weights.pth')
    wrapped = {f'module.{name}': tensor for name, tensor in plain.state_dict().items()}
    torch.save({'state_dict': wrapped, 'epoch': 3}, folder / 'checkpoint.pth.tar')
    save_file(plain.state_dict(), folder / 'weights.safetensors')
    save_file(wrapped, folder / 'wrapped.safetensors')
    save_file({f'_orig_mod.{name}': tensor for name, tensor in wrapped.items()}, folder / 'compiled.safetensors')
    export(plain, folder / 'exported')
    return folder


def attentive(attention='se', **kwargs):
    torch.manual_seed(1)
    return timm.create_model(f'dreal_{attention}_resnet18', **{'num_classes': 7, **kwargs}).eval()


@pytest.mark.parametrize('source', [
    'weights.pth', 'checkpoint.pth.tar', 'weights.safetensors', 'wrapped.safetensors', 'compiled.safetensors',
    'exported'])
@pytest.mark.parametrize('attention', ATTENTION)
def test_backbone_is_copied_and_attention_is_fresh(plain, files, attention, source):
    """Every tensor of the plain network but its classifier is there, and every other one is as it was made."""
    model, twin = attentive(attention), attentive(attention)
    found = load_backbone(model, files / source)
    weights, before = plain.state_dict(), twin.state_dict()
    for name, tensor in model.state_dict().items():
        expected = before[name] if '.se.' in name or name.startswith('fc.') else weights[name]
        assert torch.equal(tensor, expected), name
    assert set(found.loaded) == {name for name in weights if not name.startswith('fc.')}
    assert set(found.fresh) == set(before) - set(found.loaded)
    assert (found.missing, found.unused) == ((), ())


def test_the_head_by_choice(plain, files):
    """head=True copies the classifier; one of other classes is an error, and changes nothing."""
    model = attentive()
    assert 'fc.weight' in load_backbone(model, files / 'weights.pth', head=True).loaded
    assert torch.equal(model.fc.weight, plain.fc.weight)
    other, twin = attentive(num_classes=5), attentive(num_classes=5)
    with pytest.raises(ValueError, match=r'does not fit .*fc\.weight is \(7, 512\) there and \(5, 512\) here'):
        load_backbone(other, files / 'weights.pth', head=True, gates='open')
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in other.state_dict().items())
    assert load_backbone(other, files / 'weights.pth').missing == ()


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.module.'])
def test_names_of_wrapped_networks(prefix, tmp_path):
    """A checkpoint of a run is read whatever its network was wrapped in; a critic inside is refused as ever."""
    model = make_model(num_classes=3)
    (tmp_path / 'network.json').write_text(json.dumps(describe_network(model)))
    weights = {f'{prefix}{name}': tensor for name, tensor in model.state_dict().items()}
    path = tmp_path / 'last.pth.tar'
    torch.save({'state_dict': weights}, path)
    state = read_network(path).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    torch.save({'state_dict': {**weights, f'{prefix}critic.weight': torch.ones(1)}}, path)
    with pytest.raises(ValueError, match='training-only'):
        read_network(path)


@pytest.mark.parametrize('kind', ['weights.pth', 'weights.safetensors', 'exported'])
@pytest.mark.parametrize(('there', 'here'), [(3, 1), (1, 3), (1, 2), (2, 1), (3, 2), (3, 5), (4, 3), (2, 5)])
def test_channels(there, here, kind, tmp_path):
    """The first layer is fitted to the channels as timm fits its pretrained weights, whichever there are on each side.

    Summed to one, else repeated and cut off, and scaled by how many there are for each.
    """
    source = make_model(in_chans=there)
    path = tmp_path / kind
    if kind == 'exported':
        export(source, path)
    elif kind == 'weights.pth':
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    model = make_model(seed=1, in_chans=here)
    found = load_backbone(model, path)
    assert 'conv1.0.weight' in found.loaded
    first = source.conv1[0].weight.detach().numpy()
    expected = first.sum(1, keepdims=True) if here == 1 else np.tile(first, (1, 5, 1, 1))[:, :here] * (there / here)
    np.testing.assert_allclose(model.conv1[0].weight.detach().numpy(), expected, rtol=1e-6, atol=1e-7)
    torch.save(source.state_dict(), tmp_path / 'of_timm.pth')
    fitted = timm.create_model(
        'test_resnet', pretrained=True, in_chans=here, num_classes=7, block_args={'attn_layer': 'se'},
        pretrained_cfg_overlay={
            'file': str(tmp_path / 'of_timm.pth'), 'num_classes': 7, 'input_size': (there, 64, 64)})
    assert torch.equal(model.conv1[0].weight, fitted.conv1[0].weight)


@pytest.mark.parametrize('kind', ['weights.pth', 'exported'])
def test_channels_that_cannot_be_fitted(kind, tmp_path):
    """A stem that takes several pixels at once is summed to one channel; to others it is an error that names both."""
    source = timm.create_model('tresnet_m', layers=[1, 1, 1, 1])
    path = tmp_path / kind
    if kind == 'exported':
        export(source, path, data_config={'input_size': (3, 64, 64)})
    else:
        torch.save(source.state_dict(), path)
    model = timm.create_model('tresnet_m', layers=[1, 1, 1, 1], in_chans=5)
    before = model.body.conv1.conv.weight.clone()
    with pytest.raises(ValueError, match=r'images of 3 channels, and its body\.conv1\S+ cannot be fitted to the 5 of'):
        load_backbone(model, path)
    assert torch.equal(model.body.conv1.conv.weight, before)
    grey = timm.create_model('tresnet_m', layers=[1, 1, 1, 1], in_chans=1)
    load_backbone(grey, path)
    expected = source.body.conv1.conv.weight.unflatten(1, (16, 3)).sum(2)
    torch.testing.assert_close(grey.body.conv1.conv.weight, expected)


def test_missing_and_unused_are_named(plain, files, tmp_path):
    """Tensors that the weights lack, and those without a place, are listed, in words as well."""
    weights = {name: tensor for name, tensor in plain.state_dict().items() if not name.startswith('layer4.1.conv2')}
    torch.save({**weights, 'extra.weight': torch.ones(2)}, tmp_path / 'other.pth')
    found = load_backbone(attentive(), tmp_path / 'other.pth')
    assert found.missing == ('layer4.1.conv2.weight',)
    assert found.unused == ('extra.weight',)
    assert '1 missing: layer4.1.conv2.weight' in str(found)
    assert '1 unused: extra.weight' in str(found)


@pytest.mark.parametrize('attention', ATTENTION)
def test_open_gates_pass_the_features(plain, files, attention):
    """With open gates the network says nearly what the plain one does, and with fresh ones it does not."""
    images, _ = make_batch(4, 64)
    with torch.no_grad():
        expected = plain(images)
        errors = {}
        for gates in ('fresh', 'open'):
            model = attentive(attention)
            load_backbone(model, files / 'weights.pth', head=True, gates=gates)
            errors[gates] = ((model(images) - expected).norm() / expected.norm()).item()
    assert errors['open'] < 0.2
    assert errors['open'] < 0.3 * errors['fresh']


def test_open_gates_say_what_they_cannot(files):
    """A class that is not known, or one without a bias, is an error."""
    bam = timm.create_model('test_resnet', block_args=dict(attn_layer=BamModule))
    with pytest.raises(ValueError, match='BamModule, whose gate cannot be opened'):
        open_gates(bam)
    with pytest.raises(ValueError, match='mlp_bias=True'):
        open_gates(timm.create_model('test_resnet', block_args=dict(attn_layer='cbam')))
    assert open_gates(timm.create_model('test_resnet', block_args=dict(attn_layer='se'))) == 4
    assert open_gates(timm.create_model('mobilenetv3_small_050')) == 9
    with pytest.raises(ValueError, match="'fresh' or 'open'"):
        load_backbone(attentive(), files / 'weights.pth', gates='shut')


def test_what_is_no_backbone(files, tmp_path):
    """A missing, foreign, broken or unsafe file is an error in a line that names it; nothing is loaded."""
    model = attentive()
    with pytest.raises(FileNotFoundError, match=r"no file 'gone\.pth'"):
        load_backbone(model, 'gone.pth')
    with pytest.raises(ValueError, match="Unknown model 'resnet18000'"):
        load_backbone(model, 'resnet18000')
    torch.save(timm.create_model('test_vit').state_dict(), tmp_path / 'vit.pth')
    with pytest.raises(ValueError, match=r'does not fit ResNet dreal_se_resnet18: no tensor has a name of it'):
        load_backbone(model, tmp_path / 'vit.pth')
    torch.save(timm.create_model('resnet50').state_dict(), tmp_path / 'deep.pth')
    with pytest.raises(ValueError, match='does not fit ResNet dreal_se_resnet18: layer'):
        load_backbone(model, tmp_path / 'deep.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(ValueError, match='holds no weights'):
        load_backbone(model, tmp_path / 'list.pth')
    for name in ('weights.pth', 'weights.safetensors'):
        (tmp_path / name).write_bytes((files / name).read_bytes()[:1000])
        with pytest.raises(ValueError, match=f'{name}.*is broken'):
            load_backbone(model, tmp_path / name)


def test_recipe_keys(plain, files, tmp_path, caplog):
    """dreal.start.backbone and dreal.start.gates start a run's network; other weights beside them are an error."""
    images = write_images(tmp_path / 'images')
    values = recipe(
        images, tmp_path, model='dreal_cbam_resnet18', input_size=[3, 32, 32], model_kwargs={},
        mean=[0.4] * 3, std=[0.3] * 3, dreal={'start': {'backbone': str(files / 'weights.pth'), 'gates': 'open'}})
    with caplog.at_level('INFO'):
        model = build_model(load_config(values))
    assert torch.equal(model.layer3[0].conv1.weight, plain.layer3[0].conv1.weight)
    assert model.layer3[0].se.channel.fc2.bias.unique().tolist() == [2.0]
    assert 'tensors loaded' in caplog.text
    for other in ({'pretrained': True}, {'initial_checkpoint': str(files / 'weights.pth')}):
        with pytest.raises(ValueError, match=r'dreal\.start\.backbone, dreal\.start\.gates'):
            build_model(load_config({**values, **other}))
    del values['dreal']['start']['backbone']
    assert build_model(load_config(values)).layer3[0].se.channel.fc2.bias.unique().tolist() == [2.0]


def test_a_run_from_a_backbone(files, tmp_path):
    """A run that starts from a backbone trains, exports, and says nothing of where its weights came from."""
    from dreal_timm.train import run
    images = write_images(tmp_path / 'images')
    results = run(recipe(
        images, tmp_path, model='dreal_se_resnet18', model_kwargs={}, epochs=1,
        dreal={'start': {'backbone': str(files / 'exported'), 'gates': 'open'}}))
    model = timm.create_model(f"local-dir:{results['model']}", pretrained=True)
    assert model.num_classes == 3
    shutil.rmtree(results['directory'])


def test_the_exported_config_is_not_that_of_timms_weights(tmp_path):
    """What is exported from a network whose default weights are timm's does not claim to be those."""
    model = timm.create_model('dreal_se_resnet50', num_classes=3)
    export(model, tmp_path / 'out')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    told = json.dumps(config)
    assert 'not reinforced' not in told
    assert 'ra2_in1k' not in told
    assert config['architecture'] == 'seresnet50'
    loaded = timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True)
    assert loaded.pretrained_cfg.get('description') is None
