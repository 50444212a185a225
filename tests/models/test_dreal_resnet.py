"""The registered models: sizes against the paper's, equality with timm's SE-ResNets, and what a user of timm expects.

timm starts the last norm of each block at zero, which makes every block the identity and every map without effect:
tests of outputs build their models with `zero_init_last=False`, and draw SRM's CFC, which starts at zero as well.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.layers.cbam import CbamModule
from timm.layers.squeeze_excite import SEModule
from torch import nn

import dreal_timm
from dreal_timm.attention.sites import find_sites, group_sites
from dreal_timm.critic import Critic
from dreal_timm.layers import SrmModule

ATTENTION = {'se': SEModule, 'cbam': CbamModule, 'srm': SrmModule}
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
NAMES = [f'dreal_{attention}_resnet{depth}' for attention in ATTENTION for depth in BLOCKS]
ONE_BLOCK = dict(layers=(1, 1, 1, 1))  # a stage, which halves the time that tracing takes
SMALL = [f'dreal_{attention}_resnet18' for attention in ATTENTION]

all_models = pytest.mark.parametrize('name', NAMES)
small_models = pytest.mark.parametrize('name', SMALL)


def _build(name: str, seed: int = 0, **kwargs) -> nn.Module:
    """A model in evaluation mode whose every map matters to its output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, **{'num_classes': 10, 'zero_init_last': False, **kwargs})
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, SrmModule):
                    module.cfc.normal_()
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0., 0.1)
                    module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def _images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 64, 64)), generator=torch.Generator().manual_seed(seed))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _stages(model: nn.Module) -> list[nn.Module]:
    return [model.layer1, model.layer2, model.layer3, model.layer4]


@pytest.fixture(scope='module')
def fresh_import() -> subprocess.CompletedProcess:
    """The import in a fresh interpreter, every warning an error; prints the names and the modules that it adds."""
    code = (
        'import json, timm\n'
        'def registry():\n'
        '    return {n: (timm.model_entrypoint(n), timm.get_pretrained_cfg(n)) for n in timm.list_models()}\n'
        'def modules():\n'
        '    return {m: timm.list_models(module=m) for m in timm.list_modules()}\n'
        'before, modules_before, pretrained = registry(), modules(), timm.list_pretrained()\n'
        'import dreal_timm\n'
        'after, modules_after = registry(), modules()\n'
        'assert {n: after[n] for n in before} == before\n'
        'assert {m: modules_after[m] for m in modules_before} == modules_before\n'
        'added = [name for name in timm.list_pretrained() if name not in pretrained]\n'
        'assert set(pretrained) < set(timm.list_pretrained())\n'
        'assert all(name.startswith("dreal_se_resnet50.") or ".dreal_" in name for name in added)\n'
        'print(json.dumps([n for n in after if n not in before]))\n'
        'print(json.dumps([m for m in modules_after if m not in modules_before]))\n'
    )
    path = [str(Path(dreal_timm.__file__).parents[1]), *filter(None, [os.environ.get('PYTHONPATH')])]
    return subprocess.run(
        [sys.executable, '-W', 'error', '-c', code],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )


# ---- registry ----

def test_import_gives_no_warning(fresh_import):
    """Importing the package in a fresh process warns of nothing."""
    assert (fresh_import.returncode, fresh_import.stderr) == (0, '')


def test_import_adds_its_models_and_changes_none_of_timms(fresh_import):
    """The import adds 16 names; every other name keeps its entry point, its config and its module."""
    assert fresh_import.returncode == 0, fresh_import.stderr
    models, modules = map(json.loads, fresh_import.stdout.splitlines())
    assert sorted(models) == sorted([*NAMES, 'dreal_reid'])
    assert modules == ['dreal_resnet', 'reid']


def test_models_are_listed():
    """timm lists the models by wildcard and by module, and the entry points are importable from dreal_timm.models."""
    listed = timm.list_models('dreal_*_resnet*'), timm.list_models(module='dreal_resnet')
    assert sorted(listed[0]) == sorted(listed[1]) == sorted(NAMES)
    assert all(timm.model_entrypoint(name) is getattr(dreal_timm.models, name) for name in NAMES)


TIMMS = ('ra2_in1k', 'a1_in1k', 'a2_in1k', 'a3_in1k')


@all_models
def test_default_cfg(name):
    """The config is that of an ImageNet classifier, and the layers that it names exist with the sizes that it tells."""
    cfg = timm.get_pretrained_cfg(f'{name}.untrained')
    assert cfg.architecture == name
    assert cfg.input_size == (3, 224, 224)
    assert cfg.pool_size == (7, 7)
    assert cfg.num_classes == 1000
    assert cfg.mean == IMAGENET_DEFAULT_MEAN
    assert cfg.std == IMAGENET_DEFAULT_STD
    assert cfg.interpolation == 'bilinear'
    assert cfg.crop_pct == 0.875
    assert (cfg.first_conv, cfg.classifier) == ('conv1', 'fc')
    assert cfg.license == 'apache-2.0'

    model = timm.create_model(name, device='meta')
    assert model.pretrained_cfg['architecture'] == name
    assert model.get_submodule(cfg.first_conv).in_channels == cfg.input_size[0]
    assert model.get_submodule(cfg.classifier).out_features == cfg.num_classes
    assert model.get_classifier() is model.get_submodule(cfg.classifier)
    assert model.feature_info[-1]['reduction'] * cfg.pool_size[0] == cfg.input_size[1]


def test_weights_that_timm_has():
    """SE-ResNet-50 starts from timm's weights of seresnet50, and says that they are not reinforced."""
    assert timm.get_pretrained_cfg('dreal_se_resnet50').tag == 'ra2_in1k'
    others = [name for name in timm.list_pretrained('dreal_*') if '.dreal_' not in name]
    assert sorted(others) == sorted(f'dreal_se_resnet50.{tag}' for tag in TIMMS)
    for tag in TIMMS:
        own, timms = (timm.get_pretrained_cfg(f'{name}.{tag}') for name in ('dreal_se_resnet50', 'seresnet50'))
        assert own.architecture == 'dreal_se_resnet50'
        assert own.hf_hub_id == timms.hf_hub_id == f'timm/seresnet50.{tag}'
        assert 'not reinforced' in own.description
        same = {key: value for key, value in own.to_dict().items() if key not in ('architecture', 'description')}
        assert same == {key: value for key, value in timms.to_dict().items() if key in same}


def test_timms_weights_load(tmp_path):
    """A file with weights of timm's seresnet50 is loaded in the place of the download, every tensor of it."""
    torch.manual_seed(0)
    timms = timm.create_model('seresnet50')
    torch.save(timms.state_dict(), tmp_path / 'weights.pth')
    own = timm.create_model(
        'dreal_se_resnet50.a1_in1k', pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth'), hf_hub_id=None, url=''))
    assert all(torch.equal(tensor, timms.state_dict()[name]) for name, tensor in own.state_dict().items())


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'dreal_se_resnet50'])
def test_pretrained_raises(name):
    """pretrained=True says so where there are no weights, with and without the tag, and lists those that have some."""
    assert not timm.get_pretrained_cfg(name).has_weights
    assert not timm.is_model_pretrained(name)
    for full_name in (name, f'{name}.untrained'):
        with pytest.raises(RuntimeError, match=r'No pretrained weights exist for .*dreal_se_resnet50\.ra2_in1k'):
            timm.create_model(full_name, pretrained=True, device='meta')


# ---- sizes ----

@pytest.mark.parametrize(('name', 'parameters'), [
    ('dreal_se_resnet50', 28_088_024),
    ('dreal_se_resnet101', 49_326_872),
    ('dreal_cbam_resnet50', 28_089_624),
    ('dreal_cbam_resnet101', 49_330_172),
    ('dreal_srm_resnet50', 25_617_448),
])
def test_parameter_count(name, parameters):
    """The number of parameters is exactly this."""
    assert _count(timm.create_model(name, device='meta')) == parameters


@pytest.mark.parametrize(('name', 'millions'), [
    ('dreal_se_resnet50', 28.088),
    ('dreal_se_resnet101', 49.326),
    ('dreal_cbam_resnet50', 28.089),
    ('dreal_cbam_resnet101', 49.330),
])
def test_parameter_count_is_the_papers(name, millions):
    """The number of parameters is that of the paper's Table 1, which cuts off what follows the third decimal."""
    count = _count(timm.create_model(name, device='meta'))
    assert abs(count / 1e6 - millions) < 1e-3
    assert count // 1000 == round(millions * 1000)


@pytest.mark.parametrize(('name', 'millions'), [('dreal_srm_resnet50', 25.587), ('dreal_srm_resnet101', 44.614)])
def test_the_papers_srm_count_leaves_out_the_batch_norm(name, millions):
    """Without the batch norms inside the SRM modules, half of their parameters, the count is the paper's."""
    model = timm.create_model(name, device='meta')
    modules = [module for module in model.modules() if isinstance(module, SrmModule)]
    norms = sum(_count(module.bn) for module in modules)
    assert sum(_count(module) for module in modules) == 2 * norms
    assert (_count(model) - norms) // 1000 == round(millions * 1000)


@all_models
def test_every_block_has_one_attention_module(name):
    """Each block of each stage has one attention module, CBAM's with biases in its MLP."""
    _, attention, resnet = name.split('_')
    model = timm.create_model(name, device='meta')
    for stage, blocks in zip(_stages(model), BLOCKS[int(resnet.removeprefix('resnet'))], strict=True):
        assert len(stage) == blocks
        for block in stage:
            modules = [module for module in block.modules() if type(module) in ATTENTION.values()]
            assert modules == [block.se]
            assert type(block.se) is ATTENTION[attention]
            if attention == 'cbam':
                assert block.se.channel.fc1.bias is not None and block.se.channel.fc2.bias is not None


@pytest.mark.parametrize('attention', ATTENTION)
@pytest.mark.parametrize('depth', [50, 101])
def test_deep_critic_parameter_count(attention, depth):
    """Deep critics: 30,736 weights and 32 biases for channels, 33,336 and 32 for CBAM's spatial maps, at any depth."""
    model = timm.create_model(f'dreal_{attention}_resnet{depth}', device='meta')
    groups = group_sites(find_sites(model))
    expected = {'channel': (30_736, 32)} | ({'spatial': (33_336, 32)} if attention == 'cbam' else {})
    assert {group.kind for group in groups} == set(expected)
    for kind, count in expected.items():
        critic = Critic({group.name: group.size for group in groups if group.kind == kind})
        assert len(critic) == 4
        biases = sum(parameter.numel() for key, parameter in critic.named_parameters() if 'bias' in key)
        assert (_count(critic) - biases, biases) == count


@pytest.mark.parametrize('attention', ATTENTION)
@pytest.mark.parametrize('depth', [18, 34])
def test_shallow_critic_parameter_count(attention, depth):
    """Shallow critics: 4 (2 C + 1) weights and 8 biases a stage, C = 64, 128, 256, 512."""
    groups = group_sites(find_sites(timm.create_model(f'dreal_{attention}_resnet{depth}', device='meta')))
    critic = Critic({group.name: group.size for group in groups if group.kind == 'channel'})
    assert _count(critic) == 4 * (129 + 257 + 513 + 1025) + 4 * 8


# ---- equality with timm's SE-ResNets ----

@pytest.mark.parametrize('depth', BLOCKS)
def test_se_state_dict_is_timms(depth):
    """The SE models have the state-dict keys and shapes of timm's, in the same order."""
    ours = _shapes(timm.create_model(f'dreal_se_resnet{depth}', device='meta'))
    theirs = _shapes(timm.create_model(f'seresnet{depth}', device='meta'))
    assert list(ours.items()) == list(theirs.items())


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_se_logits_are_timms(training):
    """With timm's weights the logits are timm's, bit for bit."""
    theirs, ours = _build('seresnet18'), _build('dreal_se_resnet18', seed=1)
    x = _images()
    assert not torch.equal(ours(x), theirs(x))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=0, atol=0)


# ---- construction ----

@all_models
def test_meta_device(name):
    """device='meta' reaches every parameter and buffer."""
    model = timm.create_model(name, device='meta')
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {'meta'}


@pytest.mark.parametrize('attention', ATTENTION)
def test_bottlenecks_run_at_224_pixels(attention):
    """A deep model maps images of its config's size to the logits of 1000 classes."""
    model = timm.create_model(f'dreal_{attention}_resnet50', device='meta')
    assert model(torch.empty(2, *model.pretrained_cfg['input_size'], device='meta')).shape == (2, 1000)


@small_models
def test_bfloat16(name):
    """dtype=torch.bfloat16 reaches every floating tensor, and the logits are finite and bfloat16."""
    model = _build(name, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.bfloat16}
    logits = model(_images(2, 3, 32, 32).bfloat16())
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


@small_models
def test_num_classes_and_in_chans(name):
    """num_classes sizes the logits and in_chans the first convolution."""
    model = _build(name, num_classes=7, in_chans=1)
    assert (model.num_classes, model.in_chans) == (7, 1)
    assert model.conv1.in_channels == 1
    assert model(_images(2, 1, 32, 32)).shape == (2, 7)


@small_models
def test_no_classes(name):
    """num_classes=0 gives the pooled features: what the classifier of the full model reads."""
    full, headless = _build(name), _build(name, num_classes=0)
    headless.load_state_dict({key: tensor for key, tensor in full.state_dict().items() if not key.startswith('fc.')})
    x = _images()
    features = headless(x)
    assert features.shape == (2, 512)
    torch.testing.assert_close(features, full.forward_head(full.forward_features(x), pre_logits=True), rtol=0, atol=0)
    torch.testing.assert_close(full.fc(features), full(x), rtol=0, atol=0)


@small_models
def test_forward_head(name):
    """forward is forward_features, then forward_head; pre_logits stops before the classifier."""
    model, x = _build(name), _images()
    features = model.forward_features(x)
    assert features.shape == (2, 512, 2, 2)
    torch.testing.assert_close(model.forward_head(features), model(x), rtol=0, atol=0)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))


@pytest.mark.parametrize(('global_pool', 'pool', 'width'), [
    ('avg', lambda x: x.mean((2, 3)), 512),
    ('max', lambda x: x.amax((2, 3)), 512),
    ('avgmax', lambda x: 0.5 * (x.mean((2, 3)) + x.amax((2, 3))), 512),
    ('catavgmax', lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1), 1024),
])
@small_models
def test_global_pool(name, global_pool, pool, width):
    """global_pool names how positions are pooled before the classifier."""
    model, x = _build(name, global_pool=global_pool), _images()
    assert model.head_hidden_size == model.fc.in_features == width
    torch.testing.assert_close(model(x), model.fc(pool(model.forward_features(x))))


def test_no_global_pool():
    """global_pool='' without classes gives the feature map."""
    model, x = _build('dreal_srm_resnet18', num_classes=0, global_pool=''), _images()
    torch.testing.assert_close(model(x), model.forward_features(x), rtol=0, atol=0)


@small_models
def test_reset_classifier(name):
    """reset_classifier replaces the head and nothing else: another number of classes, another pooling, no head."""
    model, x = _build(name), _images()
    features = model.forward_features(x)
    model.reset_classifier(7)
    assert (model.num_classes, model(x).shape, model.global_pool.pool_type) == (7, (2, 7), 'avg')
    model.reset_classifier(5, 'catavgmax')
    assert (model.num_classes, model(x).shape, model.fc.in_features) == (5, (2, 5), 1024)
    model.reset_classifier(0, 'max')
    torch.testing.assert_close(model(x), features.amax((2, 3)), rtol=0, atol=0)
    torch.testing.assert_close(model.forward_features(x), features, rtol=0, atol=0)


@pytest.mark.parametrize('output_stride', [8, 16])
@small_models
def test_output_stride(name, output_stride):
    """output_stride bounds the reduction, by dilation: the weights are those of the plain model."""
    model = _build(name, output_stride=output_stride)
    assert model.feature_info[-1]['reduction'] == output_stride
    size = 64 // output_stride
    assert model.forward_features(_images()).shape == (2, 512, size, size)
    plain = _build(name)
    assert _shapes(model) == _shapes(plain)
    assert not torch.equal(model(_images()), plain(_images()))


def test_output_stride_sizes_the_spatial_maps():
    """At output stride 8 the maps of the last three stages have one size."""
    model = timm.create_model('dreal_cbam_resnet18', device='meta', output_stride=8)
    sizes = {site.stage: site.size for site in find_sites(model) if site.kind == 'spatial'}
    assert sizes == {'layer1': (56, 56), 'layer2': (28, 28), 'layer3': (28, 28), 'layer4': (28, 28)}


@small_models
def test_drop_path(name):
    """Stochastic depth grows linearly from 0 to drop_path_rate, acts in training and leaves evaluation alone."""
    model, plain = _build(name, drop_path_rate=0.5), _build(name)
    paths = [block.drop_path for stage in _stages(model) for block in stage]
    rates = [path.drop_prob if isinstance(path, DropPath) else 0. for path in paths]
    assert rates == pytest.approx([0.5 * i / 7 for i in range(8)])
    x = _images()
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(model.train()(x), plain.train()(x))


# ---- features ----

@small_models
def test_features_only(name):
    """features_only gives the stem's and the stages' outputs, equal to those of forward_intermediates."""
    model, features = _build(name), _build(name, features_only=True, seed=1)
    assert features.feature_info.channels() == [64, 64, 128, 256, 512]
    assert features.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert features.feature_info.module_name() == ['act1', 'layer1', 'layer2', 'layer3', 'layer4']
    missing, unexpected = features.load_state_dict(model.state_dict(), strict=False)
    assert (missing, unexpected) == ([], ['fc.weight', 'fc.bias'])
    x = _images()
    maps = features(x)
    assert [tuple(m.shape) for m in maps] == [
        (2, 64, 32, 32), (2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4), (2, 512, 2, 2),
    ]
    for actual, expected in zip(maps, model.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize('attention', ATTENTION)
def test_features_only_of_bottlenecks(attention):
    """The stages of deep models are four times as wide; out_indices and output_stride are obeyed."""
    model = timm.create_model(
        f'dreal_{attention}_resnet50', device='meta', features_only=True, out_indices=(1, 4), output_stride=16,
    )
    assert model.feature_info.channels() == [256, 2048]
    assert model.feature_info.reduction() == [4, 16]
    maps = model(torch.empty(2, 3, 64, 64, device='meta'))
    assert [tuple(m.shape) for m in maps] == [(2, 256, 16, 16), (2, 2048, 4, 4)]


@small_models
def test_forward_intermediates(name):
    """The final output is that of forward_features; indices and stop_early choose from the same maps."""
    model, x = _build(name), _images()
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)
    torch.testing.assert_close(maps[-1], final, rtol=0, atol=0)
    last = model.forward_intermediates(x, indices=2, intermediates_only=True)
    early = model.forward_intermediates(x, indices=[1, 2], stop_early=True, intermediates_only=True)
    torch.testing.assert_close([*last, *early], [*maps[3:], *maps[1:3]], rtol=0, atol=0)


# ---- training and export ----

@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@small_models
def test_32_pixels(name, training):
    """At 32 px the last stage has a single position: output and every gradient are finite."""
    model = _build(name).train(training)
    x = _images(2, 3, 32, 32)
    logits = model(x)
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@small_models
def test_attention_changes_the_logits(name):
    """With the fixture's initialisation each attention module matters: taking one out changes the logits."""
    model, x = _build(name), _images()
    logits = model(x)
    for stage in _stages(model):
        module, stage[-1].se = stage[-1].se, nn.Identity()
        assert not torch.equal(model(x), logits)
        stage[-1].se = module
    torch.testing.assert_close(model(x), logits, rtol=0, atol=0)


@small_models
def test_gradient_checkpointing(name):
    """Checkpointing gives the output and the gradients of the plain model, and does compute blocks twice."""
    x = _images()
    results, calls = [], []
    for enable in (False, True):
        model = _build(name).train()
        model.set_grad_checkpointing(enable)
        count = []
        model.layer2[0].register_forward_pre_hook(lambda module, args, count=count: count.append(1))
        logits = model(x)
        logits.square().sum().backward()
        results.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
        calls.append(len(count))
    assert calls == [1, 2]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert all(grad.abs().max() > 0 for grad in results[0])


@pytest.mark.filterwarnings('ignore:.*torch.jit')
@small_models
def test_torchscript(name):
    """A scripted model gives the eager logits, at another size as well."""
    model = _build(name, **ONE_BLOCK)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        for size in (64, 64, 32):  # the second call runs the optimised graph
            x = _images(2, 3, size, size)
            torch.testing.assert_close(scripted(x), model(x))


@small_models
def test_export(name):
    """torch.export with a free batch size gives the eager logits."""
    model = _build(name, **ONE_BLOCK)
    with torch.no_grad():
        program = torch.export.export(model, (_images(),), dynamic_shapes=({0: torch.export.Dim('batch')},))
        exported = program.module()
        for batch in (2, 3):
            x = _images(batch, 3, 64, 64, seed=1)
            torch.testing.assert_close(exported(x), model(x))


@small_models
def test_compile(name):
    """A compiled model, one graph without breaks, gives the eager logits."""
    model, x = _build(name, **ONE_BLOCK), _images()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend='aot_eager', fullgraph=True)(x), model(x))
    torch._dynamo.reset()
