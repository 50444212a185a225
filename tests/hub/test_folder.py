"""Folders and repositories of strangers: their config fetches and opens nothing, and no classifier starts at random"""
import json
import shutil

import pytest
import timm
import torch
from fake_hub import Repository
from networks import make_model
from safetensors.torch import load_file

from dreal_timm.errors import WeightsError
from dreal_timm.hub import export, load, prepare
from dreal_timm.hub.loading import timm_name

NAME = 'user/network'
DATA = {'input_size': (3, 64, 32)}


@pytest.fixture(scope='module')
def embedding(tmp_path_factory):
    """A small exported embedding network."""
    torch.manual_seed(0)
    model = timm.create_model('dreal_reid', backbone='test_resnet')
    return export(model, tmp_path_factory.mktemp('exported') / 'net', data_config=DATA)


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """A small exported classifier of 7 classes."""
    return export(make_model(), tmp_path_factory.mktemp('exported') / 'net', data_config=DATA)


def changed(source, target, **values):
    """A copy of a folder whose config has other values, without its list of checksums; None takes a key away."""
    shutil.copytree(source, target)
    (target / 'SHA256SUMS').unlink()
    config = json.loads((target / 'config.json').read_text())
    for key, value in values.items():
        table, _, name = key.rpartition('__')
        inner = config[table] if table else config
        inner[name] = value
        if value is None:
            del inner[name]
    (target / 'config.json').write_text(json.dumps(config))
    return target


def weights_of(model, path):
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.mark.parametrize('values', [
    {'backbone_args': {'pretrained': True, 'pretrained_cfg': {'url': 'URL/a.pth', 'num_classes': 1000}}},
    {'backbone_args': {'pretrained': True, 'pretrained_cfg_overlay': {'url': 'URL/a.pth'}}},
    {'backbone_args': {'pretrained': True, 'pretrained_cfg': {'file': 'FILE', 'num_classes': 1000}}},
    {'backbone_args': {'pretrained': 1, 'cache_dir': 'FOLDER'}},
    {'backbone_args': {'checkpoint_path': 'FILE'}},
    {'backbone_args': {'cache_dir': 'FOLDER'}},
    {'backbone': 'hf-hub:user/other'}, {'backbone': 'local-dir:FOLDER'}, {'backbone': 'user/other'},
    {'backbone': 'dreal_reid', 'backbone_args': {'backbone_args': {'checkpoint_path': 'FILE'}}},
    {'backbone': 'dreal_reid', 'backbone_args': {'backbone': 'hf-hub:user/other'}},
])
def test_a_config_fetches_and_opens_nothing(hub, embedding, tmp_path, values):
    """By load, push, inspect and timm alone: an error before any request; a file that is named is not opened."""
    file = weights_of(timm.create_model('test_resnet'), tmp_path / 'a.pth')
    text = json.dumps(values).replace('URL', hub.url).replace('FILE', file).replace('FOLDER', str(tmp_path / 'made'))
    folder = changed(
        embedding, tmp_path / 'net', **{f'model_args__{key}': value for key, value in json.loads(text).items()})
    before = (tmp_path / 'a.pth').stat().st_atime_ns
    for attempt in (load, timm_name):
        with pytest.raises(WeightsError):
            attempt(str(folder))
    for pretrained in (True, False):
        with pytest.raises(ValueError, match='may not fetch or open'):
            timm.create_model(f'local-dir:{folder}', pretrained=pretrained)
    with pytest.raises(WeightsError):
        prepare(folder, NAME)
    assert not hub.requests and not (tmp_path / 'made').exists()
    assert (tmp_path / 'a.pth').stat().st_atime_ns == before
    repo = hub.repositories[NAME] = Repository()
    repo.commit({name: (folder / name).read_bytes() for name in ('config.json', 'model.safetensors')})
    with pytest.raises(WeightsError):
        load(f'hf-hub:{NAME}')
    with pytest.raises(ValueError, match='may not fetch or open'):
        timm.create_model(f'hf-hub:{NAME}', pretrained=True)
    assert not [path for _, _, path, _ in hub.requests if 'other' in path or 'a.pth' in path]


def test_python_may_fetch(embedding, tmp_path):
    """In Python a backbone starts from a file, of a folder's network too, and its export loads without the file."""
    plain = timm.create_model('test_resnet')
    told = {'checkpoint_path': weights_of(timm.create_model('test_resnet', num_classes=0), tmp_path / 'a.pth')}
    given = {'pretrained': True, 'pretrained_cfg': {
        'file': weights_of(plain, tmp_path / 'b.pth'), 'num_classes': 1000, 'classifier': 'fc'}}
    first = plain.conv1[0].weight
    for name in ('dreal_reid', f'local-dir:{embedding}'):
        model = timm.create_model(name, backbone='test_resnet', backbone_args=given)
        assert torch.equal(model.backbone.conv1[0].weight, first)
    opened = timm.create_model('dreal_reid', backbone='test_resnet', backbone_args=told)
    assert torch.equal(opened.backbone.conv1[0].weight, torch.load(tmp_path / 'a.pth')['conv1.0.weight'])
    folder = export(model, tmp_path / 'net', data_config=DATA)
    (tmp_path / 'b.pth').unlink()
    assert json.loads((folder / 'config.json').read_text())['model_args']['backbone_args'] == {}
    assert torch.equal(load(str(folder)).backbone.conv1[0].weight, first)


def test_a_backbone_from_a_folder_is_exported_by_its_architecture(classifier, tmp_path):
    """What a folder's config told of the backbone stands in the new config, which does not need the old one."""
    source = shutil.copytree(classifier, tmp_path / 'source')
    model = timm.create_model('dreal_reid', backbone=f'local-dir:{source}', backbone_args={'pretrained': True})
    folder = export(model, tmp_path / 'net', data_config=DATA)
    shutil.rmtree(source)
    loaded = load(str(folder))
    expected = {f'backbone.{name}': tensor for name, tensor in load_file(classifier / 'model.safetensors').items()}
    assert any('.se.' in name for name in expected)
    for name, tensor in loaded.backbone.state_dict(prefix='backbone.').items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize(('source', 'values'), [
    ('classifier', {'num_classes': 9}), ('classifier', {'model_args__num_classes': 9}),
    ('classifier', {'num_classes': 9, 'model_args__num_classes': 9}), ('classifier', {'num_classes': -1}),
    ('classifier', {'num_classes': None, 'pretrained_cfg__num_classes': 9}),
    ('classifier', {'num_classes': None, 'pretrained_cfg__num_classes': None}),
    ('embedding', {'num_classes': 9}), ('embedding', {'num_classes': 9, 'model_args__num_classes': 9}),
    ('classifier', {'model_args__pretrained_strict': False}),
])
def test_no_classifier_starts_at_random(hub, request, tmp_path, source, values):
    """A config that tells of other classes than its weights have is an error, of a folder and of a repository."""
    folder = changed(request.getfixturevalue(source), tmp_path / 'net', **values)
    with pytest.raises(WeightsError):
        load(str(folder))
    if source == 'embedding':
        with pytest.raises((ValueError, RuntimeError)):
            timm.create_model(f'local-dir:{folder}', pretrained=True)
    repo = hub.repositories[NAME] = Repository()
    repo.commit({name: (folder / name).read_bytes() for name in ('config.json', 'model.safetensors')})
    with pytest.raises(WeightsError):
        load(f'hf-hub:{NAME}')


def test_classes_by_one_key(classifier, tmp_path):
    """A config names its classes in one place or in both; another number is for Python, where it is asked for."""
    expected = load_file(classifier / 'model.safetensors')['fc.weight']
    for number, values in enumerate(({}, {'model_args__num_classes': None}, {'pretrained_cfg__num_classes': None})):
        folder = changed(classifier, tmp_path / str(number), **values)
        assert torch.equal(load(str(folder)).fc.weight, expected)
    assert load(str(folder), num_classes=3).fc.weight.shape == (3, expected.shape[1])
