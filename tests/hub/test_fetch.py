"""What training and inspection ask the Hub for: once, before timm does, and in one line where it cannot be had"""
import pytest
import timm
import torch
import yaml
from fake_hub import Repository
from networks import make_model
from safetensors.torch import save
from small_run import recipe

from dreal_timm.cli import main
from dreal_timm.errors import WeightsError
from dreal_timm.hub import export
from dreal_timm.train import load_config
from dreal_timm.train.build import build_model

NAME = 'user/network'


@pytest.fixture
def published(hub, tmp_path):
    """An exported network, and weights by the name that timm has for them."""
    folder = export(make_model(), tmp_path / 'net', data_config={'input_size': (3, 64, 64)})
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit(files)
    torch.manual_seed(0)
    weights = timm.create_model('resnet10t', num_classes=1000).state_dict()
    hub.repositories['timm/resnet10t.c3_in1k'] = Repository()
    hub.repositories['timm/resnet10t.c3_in1k'].commit({'model.safetensors': save(weights)})
    return weights


def values(tmp_path, model, **others):
    return recipe(
        tmp_path, tmp_path, model=model, input_size=[3, 64, 64], mean=[0.4] * 3, std=[0.3] * 3,
        **{'model_kwargs': {}, 'pretrained': True, **others})


def asked(hub):
    """Requests for models or their files."""
    return [(method, path) for _, method, path, _ in hub.requests if 'timm/' in path or NAME in path]


def test_training_starts_from_the_hub(hub, published, tmp_path):
    """A run's network has the published weights but the classifier; without pretrained the Hub is not asked."""
    state = build_model(load_config(values(tmp_path, 'resnet10t'))).state_dict()
    assert state['fc.weight'].shape == (3, 512)
    assert all(torch.equal(tensor, published[name]) for name, tensor in state.items() if not name.startswith('fc.'))
    hub.requests.clear()
    build_model(load_config(values(tmp_path, 'resnet10t', pretrained=False)))
    assert not hub.requests


@pytest.mark.parametrize(('model', 'others', 'named'), [
    ('resnet10t', {}, ('resnet10t', 'timm/resnet10t.c3_in1k', 'model.safetensors')),
    ('dreal_se_resnet50', {}, ('dreal_se_resnet50', 'timm/seresnet50.ra2_in1k', 'model.safetensors')),
    (f'hf-hub:{NAME}', {}, (NAME, 'config.json')),
    (f'hf-hub:{NAME}', {'pretrained': False}, (NAME, 'config.json')),
    ('dreal_cbam_resnet50', {'pretrained': False, 'dreal': {'start': {'backbone': 'resnet10t'}}},
     ('timm/resnet10t.c3_in1k',)),
])
def test_one_request_decides(hub, published, tmp_path, model, others, named):
    """A Hub that does not answer is asked once, and not by each retry of the client; the error names what it wanted."""
    hub.faults['GET', '/api/models'] = hub.faults['HEAD', '/resolve/'] = [503] * 50
    with pytest.raises(WeightsError) as caught:
        build_model(load_config(values(tmp_path, model, **others)))
    assert len(asked(hub)) == 1
    assert all(word in str(caught.value) for word in named) and '\n' not in str(caught.value)


def test_training_without_a_network(hub, published, tmp_path, capsys):
    """With nothing in the cache the command ends with the code 2 and one line."""
    hub.close()
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(values(tmp_path, 'resnet10t')))
    assert main(['train', str(tmp_path / 'recipe.yaml')]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if 'rror' in line or 'etry' in line]
    assert len(lines) == 1
    assert all(word in lines[0] for word in ('resnet10t', 'timm/resnet10t.c3_in1k', 'cannot be reached'))


def test_weights_at_an_address(tmp_path):
    """Weights that timm has an address for, and no repository, are named by their model."""
    overlay = {'url': 'http://127.0.0.1:9/weights.pth', 'hf_hub_id': ''}
    with pytest.raises(WeightsError, match='weights of resnet10t cannot be had'):
        build_model(load_config(values(tmp_path, 'resnet10t', model_kwargs={'pretrained_cfg_overlay': overlay})))


def test_inspection_wants_the_config_alone(hub, published, capsys):
    """It lists the sites without the weights; a Hub that does not answer is asked once."""
    assert main(['inspect', f'hf-hub:{NAME}']) == 0
    assert 'layer1.0' in capsys.readouterr().out
    assert asked(hub) and not [path for _, path in asked(hub) if 'safetensors' in path]
    hub.requests.clear()
    hub.faults['GET', '/api/models'] = hub.faults['HEAD', '/resolve/'] = [503] * 50
    assert main(['inspect', 'hf-hub:user/other']) == 2
    assert len(hub.requests) == 1
