"""Every class of attention that can be read, against its map and its output written out by hand"""
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import ghost_net, make_batch
from timm.layers import create_attn
from timm.layers.cbam import LightChannelAttn, LightSpatialAttn
from timm.layers.coord_attn import StripAttn
from timm.layers.gather_excite import GatherExcite
from timm.layers.global_context import GlobalContext
from timm.layers.mlp import ConvMlp
from timm.layers.non_local_attn import NonLocalAttn
from timm.layers.selective_kernel import SelectiveKernel
from timm.layers.split_attn import SplitAttn
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule, SqueezeExciteCl
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.ghostnet import GhostModuleV2, GhostModuleV3
from timm.models.hgnet import EseModule as HgnetEseModule
from timm.models.senet import SEModule as SenetSEModule
from torch import nn

from dreal_timm import DrealTask
from dreal_timm.attention.capture import bypass, read_map, record, tap
from dreal_timm.attention.readers import KINDS, READERS, WITHOUT_MAP, MapReader, readers_of, register_attention, unread
from dreal_timm.attention.sites import attention_parameters, find_sites, group_sites, site_reader
from dreal_timm.layers import BamModule, SrmModule

C = 16
DOUBLE = dict(rtol=1e-10, atol=1e-12)


def mean(x: torch.Tensor, *dims: int) -> torch.Tensor:
    return x.mean(dims, keepdim=True)


def half(x: torch.Tensor, *dims: int) -> torch.Tensor:
    return 0.5 * x.mean(dims, keepdim=True) + 0.5 * x.amax(dims, keepdim=True)


def times(module: nn.Module, x: torch.Tensor, *maps: torch.Tensor) -> torch.Tensor:
    for attention in maps:
        x = x * attention
    return x


def se(module, x):
    return [torch.sigmoid(module.fc2(F.relu(module.bn(module.fc1(mean(x, 2, 3))))))]


def se_max(module, x):
    return [torch.sigmoid(module.fc2(F.relu(module.fc1(half(x, 2, 3)))))]


def ese(module, x):
    return [F.hardsigmoid(module.fc(mean(x, 2, 3)))]


def se_last(module, x):
    return [torch.sigmoid(module.fc2(F.relu(module.fc1(mean(x, 1, 2)))))]


def squeeze_excite(module, x):
    return [torch.sigmoid(module.conv_expand(F.silu(module.conv_reduce(mean(x, 2, 3)))))]


def senet(module, x):
    return [torch.sigmoid(module.fc2(F.relu(module.fc1(mean(x, 2, 3)))))]


def eca(module, x):
    return [torch.sigmoid(F.conv1d(x.mean((2, 3))[:, None], module.conv.weight, padding=1)).transpose(1, 2)[..., None]]


def ecam(module, x):
    hidden = F.relu(F.conv1d(x.mean((2, 3))[:, None], module.conv.weight, module.conv.bias))
    logits = F.conv1d(hidden, module.conv2.weight, module.conv2.bias, padding=1)
    return [torch.sigmoid(logits).transpose(1, 2)[..., None]]


def ceca(module, x):
    pooled = x.mean((2, 3))[:, None]
    around = torch.cat([pooled[:, :, -1:], pooled, pooled[:, :, :1]], dim=2)
    return [torch.sigmoid(F.conv1d(around, module.conv.weight)).transpose(1, 2)[..., None]]


def srm(module, x):
    style = module.cfc[:, 0] * x.mean((2, 3)) + module.cfc[:, 1] * (x.var((2, 3)) + 1e-5).sqrt()
    return [torch.sigmoid(module.bn(style[:, :, None, None]))]


def context(module, x):
    weights = module.conv_attn(x).flatten(2).softmax(dim=2)
    return torch.einsum('bcn,bn->bc', x.flatten(2), weights[:, 0])[:, :, None, None]


def gc(module, x):
    return [torch.sigmoid(module.mlp_scale(context(module, x)))]


def gc_both(module, x, attention):
    return x * attention + module.mlp_add(context(module, x))


def gca(module, x):
    return [module.mlp_add(context(module, x))]


def ge(module, x):
    return [torch.sigmoid(module.mlp(mean(x, 2, 3)))]


def ge_extent(module, x):
    gathered = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
    return [torch.sigmoid(F.interpolate(module.mlp(gathered), size=x.shape[2:]))]


def light_channel(module, x):
    return [torch.sigmoid(module.fc2(F.relu(module.fc1(half(x, 2, 3)))))]


def light_spatial(module, x):
    return [torch.sigmoid(module.conv(half(x, 1)))]


def coord(module, x):
    y = torch.cat([mean(x, 3), mean(x, 2).transpose(2, 3)], dim=2)
    y = F.hardswish(module.bn1(module.conv1(y)))
    rows, columns = y[:, :, :x.shape[2]], y[:, :, x.shape[2]:].transpose(2, 3)
    return [torch.sigmoid(module.conv_h(rows)), torch.sigmoid(module.conv_w(columns))]


def coord_output(module, x, height, width):
    return x * height * width + (x if module.has_skip else 0)


def scoord(module, x):
    rows, columns = F.silu(module.fc1(x.mean(3).transpose(1, 2))), F.silu(module.fc1(x.mean(2).transpose(1, 2)))
    height, width = module.fc_h(rows).transpose(1, 2), module.fc_w(columns).transpose(1, 2)
    return [torch.sigmoid(height[:, :, :, None] + width[:, :, None])]


def ela(module, x):
    return [
        torch.sigmoid(F.silu(module.norm_h(module.conv_h(mean(x, 3))))),
        torch.sigmoid(F.silu(module.norm_w(module.conv_w(mean(x, 2))))),
    ]


def strip(module, x):
    return [torch.sigmoid(module.conv_h(mean(x, 3)) + module.conv_w(mean(x, 2)))]


def bam(module, x):
    return [torch.sigmoid(module.channel(mean(x, 2, 3)) + module.spatial(x))]


def paths(module, x):
    return torch.stack([path(part) for path, part in zip(module.paths, x.chunk(2, dim=1), strict=True)], dim=1)


def kernels(module, x):
    hidden = F.relu(module.attn.bn(module.attn.fc_reduce(mean(paths(module, x).sum(1), 2, 3))))
    return [module.attn.fc_select(hidden).unflatten(1, (2, C)).softmax(dim=1)]


def kernels_output(module, x, attention):
    return (paths(module, x) * attention).sum(1)


def split(module, x):
    features = module.act0(module.bn0(module.conv(x))).unflatten(1, (module.radix, C))
    logits = module.fc2(F.relu(module.bn1(module.fc1(mean(features.sum(1), 2, 3)))))
    if module.radix == 1:
        return [torch.sigmoid(logits)]
    return [logits.unflatten(1, (module.radix, C)).softmax(dim=1).flatten(1)]


def split_output(module, x, attention):
    features = module.act0(module.bn0(module.conv(x))).unflatten(1, (module.radix, C))
    return (features * attention.view(len(x), module.radix, C, 1, 1)).sum(1)


def hgnet(module, x):
    return [torch.sigmoid(module.conv(mean(x, 2, 3)))]


def ghost(module, x):
    return [torch.sigmoid(module.short_conv(F.avg_pool2d(x, 2)))]


def ghost_features(module, x):
    if isinstance(module, GhostModuleV2):
        first = module.primary_conv(x)
        second = module.cheap_operation(first)
    else:
        first = F.relu(sum(conv(x) for conv in module.primary_rpr_conv))
        cheap = [module.cheap_rpr_scale, module.cheap_rpr_skip, *module.cheap_rpr_conv]
        second = F.relu(sum(branch(first) for branch in cheap))
    return torch.cat([first, second], dim=1)[:, :module.out_chs]


def ghost_output(module, x, attention):
    rows, columns = (torch.arange(n) * m // n for n, m in zip(x.shape[2:], attention.shape[2:], strict=True))
    return ghost_features(module, x) * attention[:, :, rows][:, :, :, columns]


def gather_excite(extent: int) -> GatherExcite:
    """As timm would build it if its factory passed options on by their names."""
    module = GatherExcite(C, extent=extent, use_mlp=False)
    module.mlp = ConvMlp(C, 4, norm_layer=None)
    return module


@dataclass
class Case:
    """How to build a module, its maps by hand, its output by hand from input and maps, and what to expect.

    `features` are what the module gates, where that is not its input; `size` is that of a map that is not as large.
    """
    make: Callable[[], nn.Module]
    maps: Callable
    kinds: tuple[str, ...] = ('channel',)
    output: Callable = times
    theta: tuple[str, ...] = ('',)
    channels_last: bool = False
    site: str = ''
    features: Callable | None = None
    size: tuple[int, ...] | None = None


CASES = {
    'se': Case(lambda: SEModule(C, rd_channels=4), se),
    'se_norm': Case(lambda: SEModule(C, rd_channels=4, norm_layer=nn.BatchNorm2d), se),
    'se_max': Case(lambda: SEModule(C, rd_channels=4, add_maxpool=True), se_max),
    'ese': Case(lambda: EffectiveSEModule(C), ese),
    'se_last': Case(lambda: SqueezeExciteCl(C, rd_channels=4), se_last, channels_last=True),
    'squeeze_excite': Case(lambda: SqueezeExcite(C, rd_channels=4, act_layer=nn.SiLU), squeeze_excite),
    'hgnet': Case(lambda: HgnetEseModule(C), hgnet),
    'ghost': Case(
        lambda: GhostModuleV2(C, C), ghost, ('full',), ghost_output, ('short_conv',), features=ghost_features,
        size=(C, 3, 2)),
    'ghost_odd': Case(
        lambda: GhostModuleV2(C, C - 1), ghost, ('full',), ghost_output, ('short_conv',), features=ghost_features,
        size=(C - 1, 3, 2)),
    'ghost_3': Case(
        lambda: GhostModuleV3(C, C, mode='shortcut'), ghost, ('full',), ghost_output, ('short_conv',),
        features=ghost_features, size=(C, 3, 2)),
    'senet': Case(lambda: SenetSEModule(C, 4), senet),
    'eca': Case(lambda: create_attn('eca', C), eca),
    'ecam': Case(lambda: create_attn('ecam', C), ecam),
    'ceca': Case(lambda: create_attn('ceca', C), ceca),
    'srm': Case(lambda: SrmModule(C), srm),
    'gc': Case(lambda: create_attn('gc', C), gc),
    'gc_both': Case(
        lambda: GlobalContext(C, fuse_add=True), gc, output=gc_both, theta=('conv_attn', 'mlp_scale')),
    'gca': Case(lambda: create_attn('gca', C), gca, output=lambda module, x, attention: x + attention),
    'ge': Case(lambda: gather_excite(0), ge),
    'ge_extent': Case(lambda: gather_excite(2), ge_extent, ('full',)),
    'light_channel': Case(lambda: LightChannelAttn(C, rd_channels=4), light_channel),
    'light_spatial': Case(LightSpatialAttn, light_spatial, ('spatial',)),
    'coord': Case(lambda: create_attn('coord', C), coord, ('height', 'width'), coord_output),
    'coord_skip': Case(lambda: create_attn('coord', C, has_skip=True), coord, ('height', 'width'), coord_output),
    'scoord': Case(lambda: create_attn('scoord', C), scoord, ('full',)),
    'ela': Case(lambda: create_attn('ela', C), ela, ('height', 'width')),
    'strip': Case(lambda: create_attn('strip', C), strip, ('full',)),
    'bam': Case(lambda: BamModule(C), bam, ('full',), lambda module, x, attention: x + x * attention),
    'sk': Case(
        lambda: SelectiveKernel(C), kernels, ('branch',), kernels_output, ('attn',), site='attn',
        features=paths),
    'splat': Case(
        lambda: SplitAttn(C, norm_layer=nn.BatchNorm2d), split, ('branch',), split_output, ('fc1', 'bn1', 'fc2'),
        features=lambda module, x: module.act0(module.bn0(module.conv(x)))),
    'splat_1': Case(
        lambda: SplitAttn(C, radix=1, norm_layer=nn.BatchNorm2d), split, ('channel',), split_output,
        ('fc1', 'bn1', 'fc2'), features=lambda module, x: module.act0(module.bn0(module.conv(x)))),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def build(case: Case, dtype=torch.float64) -> tuple[nn.Module, torch.Tensor, list]:
    """A module with random weights and norms in training mode, an input of 6 x 5 positions, and its sites."""
    torch.manual_seed(0)
    module = case.make().to(dtype).train()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(3, 6, 5, C) if case.channels_last else torch.randn(3, C, 6, 5)
    sites = find_sites(nn.Sequential(module), (6, 5, C) if case.channels_last else (C, 6, 5))
    return module, x.to(dtype), sites


def test_every_class_is_tried_here_or_with_the_networks():
    """No reader is without a test: those of CBAM's own halves are tried in test_sites.py."""
    tried = {type(part) for case in CASES.values() for part in case.make().modules()} & set(READERS)
    assert {cls.__name__ for cls in set(READERS) - tried} == {'ChannelAttn', 'SpatialAttn'}


def test_sites_by_hand(case):
    """Kind, name and size of each site; theta is what lies between the gated features and the map."""
    module, _, sites = build(case)
    sizes = {
        'channel': (C,), 'spatial': (6, 5), 'height': (C, 6), 'width': (C, 5), 'full': (C, 6, 5), 'branch': (2 * C,)}
    assert [(site.kind, site.size) for site in sites] == [(kind, case.size or sizes[kind]) for kind in case.kinds]
    name = '0' + f'.{case.site}' * bool(case.site)
    assert [site.name for site in sites] == ([name] if len(sites) == 1 else [f'{name}:height', f'{name}:width'])
    assert all(site.module == name for site in sites)
    theta = attention_parameters(nn.Sequential(module), sites)
    expected = {f'0.{n}' for n, _ in module.named_parameters() if n.startswith(case.theta)}
    assert set(theta) == expected and expected


def test_output_by_hand(case):
    """What the tests below compare with is what the module computes."""
    module, x, _ = build(case)
    expected = module(x)
    torch.testing.assert_close(case.output(module, x, *case.maps(module, x)), expected, **DOUBLE)


def test_map_and_state_by_hand(case):
    """The map that is read is the map by hand; the state is the gated features, averaged to the map's shape or to C."""
    module, x, sites = build(case)
    model = nn.Sequential(module)
    with record(model, sites) as readings:
        model(x)
    features = x if case.features is None else case.features(module, x)
    for site, expected in zip(sites, case.maps(module, x), strict=True):
        reading = readings[site.name]
        torch.testing.assert_close(reading.attention.flatten(), expected.flatten(), **DOUBLE)
        dims = {'spatial': (1,)}.get(site.kind, (1, 2) if case.channels_last else (-2, -1))
        torch.testing.assert_close(reading.state.flatten(), features.mean(dims).flatten(), **DOUBLE)
        assert not reading.attention.requires_grad and not reading.state.requires_grad


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_maps_read_are_the_maps_used(case, dtype):
    """Bit for bit, in the precision of the network; reading twice changes nothing, buffers included."""
    module, x, sites = build(case, dtype)
    model = nn.Sequential(module)
    twin = copy.deepcopy(module)
    used: list[torch.Tensor] = []
    owner, reader = site_reader(nn.Sequential(twin), sites[0])
    owner.get_submodule(reader.gate).register_forward_hook(lambda m, a, out: used.append(out))
    expected = twin(x)
    with record(model, sites) as readings:
        assert torch.equal(model(x), expected)
    assert len(used) == len(sites)
    for site, seen in zip(sites, used, strict=True):
        assert torch.equal(readings[site.name].attention, reader.activation(seen) if reader.activation else seen)
    state = copy.deepcopy(module.state_dict())
    for site in sites:
        assert torch.equal(read_map(model, site, readings[site.name]), readings[site.name].attention)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_gradient_of_a_map_by_hand(case):
    """A map that was read has the gradient of the map by hand, at every attention parameter and nowhere else."""
    module, x, sites = build(case)
    model = nn.Sequential(module)
    theta = attention_parameters(model, sites)
    with record(model, sites) as readings:
        model(x)
    for index, site in enumerate(sites):
        weights = torch.randn_like(readings[site.name].attention)
        read = (read_map(model, site, readings[site.name]) * weights).sum()
        by_hand = (case.maps(module, x)[index].flatten() * weights.flatten()).sum()
        got = torch.autograd.grad(read, list(theta.values()), allow_unused=True)
        expected = torch.autograd.grad(by_hand, list(theta.values()), allow_unused=True)
        for name, one, other in zip(theta, got, expected, strict=True):
            assert (one is None) == (other is None), name
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
        read = read_map(model, site, readings[site.name]).sum()
        foreign = [p for name, p in model.named_parameters() if name not in theta]
        assert not foreign or set(torch.autograd.grad(read, foreign, allow_unused=True)) == {None}


def test_bypass_by_hand(case):
    """A bypassed map is its own mean, per sample; the others are as they were; for some samples too."""
    module, x, sites = build(case)
    model = nn.Sequential(module)
    maps = case.maps(module, x)
    chosen = torch.tensor([True, False, True])
    for index, site in enumerate(sites):
        flat = maps[index].flatten(1).mean(1).view(-1, *[1] * (maps[index].ndim - 1)).expand_as(maps[index])
        expected = case.output(module, x, *maps[:index], flat, *maps[index + 1:])
        with bypass(model, [site]):
            torch.testing.assert_close(model(x), expected, **DOUBLE)
        with bypass(model, [site], [chosen]):
            output = model(x)
        torch.testing.assert_close(output[chosen], expected[chosen], **DOUBLE)
        torch.testing.assert_close(output[~chosen], module(x)[~chosen], **DOUBLE)


def test_gradient_of_a_tap_by_hand(case):
    """A zero tensor that is added to a map changes no bit of the output and has the map's gradient."""
    module, x, sites = build(case)
    model = nn.Sequential(module)
    plain = model(x)
    weights = torch.randn_like(plain)
    taps = [torch.zeros(len(x), *site.size, dtype=x.dtype, requires_grad=True) for site in sites]
    with tap(model, sites, taps):
        output = model(x)
    assert torch.equal(output, plain)
    (output * weights).sum().backward()
    maps = [attention.detach().requires_grad_() for attention in case.maps(module, x)]
    (case.output(module, x, *maps) * weights).sum().backward()
    for one, other in zip(taps, maps, strict=True):
        torch.testing.assert_close(one.grad.flatten(), other.grad.flatten(), rtol=1e-8, atol=1e-10)


NETWORKS = {
    **{name: ('test_resnet', dict(block_args=dict(attn_layer=name))) for name in (
        'ese', 'eca', 'ecam', 'ceca', 'gc', 'gca', 'lcbam', 'coord', 'scoord', 'ela', 'strip')},
    'bam': ('test_resnet', dict(block_args=dict(attn_layer=BamModule))),
    'ge': ('test_resnet', dict(block_args=dict(attn_layer=lambda channels, **_: gather_excite_of(channels)))),
    'sk': ('skresnet18', {}),
    'splat': ('resnest14d', {}),
    'hgnet': ('hgnet_tiny', {}),
    'ghost': (ghost_net, dict(version='v2')),
    'ghost_3': (ghost_net, dict(version='v3')),
}


def gather_excite_of(channels: int) -> GatherExcite:
    module = GatherExcite(channels, use_mlp=False)
    module.mlp = ConvMlp(channels, 4, norm_layer=None)
    return module


@pytest.mark.parametrize('probe', ['exact', 'split', 'taylor'])
@pytest.mark.parametrize('network', NETWORKS)
def test_one_reinforced_step(network, probe):
    """Backbone from L_c, theta from L_c and L_q, critic from L_r, in a network with each kind of attention."""
    build, options = NETWORKS[network]
    torch.manual_seed(0)
    if isinstance(build, str):
        options = options | ({'zero_init_last': False} if 'res' in build else {})
        build = partial(timm.create_model, build)
    model = build(num_classes=5, **options)
    for module in model.modules():
        if isinstance(module, GlobalContext) and module.mlp_add is not None:
            nn.init.normal_(module.mlp_add.fc2.weight, std=0.1)  # zero at first: its map is the same for all images
    keys = set(model.state_dict())
    input, target = make_batch(4, 64, num_classes=5)
    task = DrealTask(model, verbose=False, probe=probe, rotate='step', input_size=(3, 64, 64))
    theta = attention_parameters(model, [site for group in task.groups for site in group.sites])
    task.get_trainable_module().train()
    for _ in range(2):
        result = task(input, target)
        result['loss'].backward()
    assert not result['reward'].isnan().all()
    assert {group.kind for group in task.groups} <= set(KINDS)
    assert set(model.state_dict()) == keys
    assert all(p.grad is not None for p in task._trainable.critic.parameters())
    model.zero_grad()
    task.actor_weight = 0.0
    torch.manual_seed(0)
    task(input, target)['loss'].backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    task.actor_weight = 1.0
    torch.manual_seed(0)
    task(input, target)['loss'].backward()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p.grad, plain[n])}
    assert changed and changed <= set(theta)


def test_height_and_width_have_critics_of_their_own():
    """A coordinate attention's two maps go to two critics, which see them averaged to the channels."""
    model = timm.create_model('test_resnet', block_args=dict(attn_layer='coord'))
    groups = group_sites(find_sites(model, (3, 64, 96)))
    assert [group.name for group in groups[:2]] == ['layer1_height', 'layer1_width']
    assert (groups[0].size, groups[0].judged_size) == ((32, 16), (32,))
    assert (groups[1].size, groups[1].judged_size) == ((32, 24), (32,))


def test_a_reader_by_kind_alone():
    """A module with a gate needs no more than a kind: its map is computed again by a second call."""
    class Doubt(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(C, C, 1)
            self.gate = nn.Sigmoid()

        def forward(self, x):
            return x * self.gate(self.fc(x.mean((2, 3), keepdim=True)))

    model = nn.Sequential(nn.Conv2d(3, C, 3), Doubt()).double()
    assert 'unknown' in unread(model)['Doubt']
    try:
        register_attention(Doubt, MapReader('channel'))
        sites = find_sites(model, (3, 16, 16))
        with record(model, sites) as readings:
            model(make_batch(2, 16, dtype=torch.float64)[0])
        read_map(model, sites[0], readings['1']).sum().backward()
        assert model[1].fc.weight.grad.abs().sum() > 0 and model[0].weight.grad is None
        with pytest.raises(ValueError, match='already'):
            register_attention(Doubt, MapReader('channel'))
    finally:
        READERS.pop(Doubt)
    with pytest.raises(ValueError, match='needs a reader'):
        register_attention(Doubt)
    with pytest.raises(ValueError, match='part'):
        register_attention(Doubt, MapReader('height'), MapReader('width'))
    assert Doubt not in READERS


def test_what_has_no_map_says_why():
    """Attention without a map, and a subclass of a known class, are named in the error."""
    class Mine(SEModule):
        pass

    model = nn.Sequential(nn.Conv2d(3, C, 3), NonLocalAttn(C), Mine(C))
    assert set(unread(model)) == {'NonLocalAttn', 'Mine'}
    with pytest.raises(ValueError, match='NonLocalAttn is none: its weights relate positions'):
        DrealTask(model, verbose=False, input_size=(3, 16, 16))
    assert all(not readers_of(cls(C)) for cls in (NonLocalAttn, Mine))
    assert not set(WITHOUT_MAP) & set(READERS)


def test_attention_without_parameters_cannot_be_trained():
    """Strip attention without its convolutions has maps, and nothing that L_q could train."""
    layer = partial(StripAttn, use_conv=False)
    model = timm.create_model('test_resnet', block_args=dict(attn_layer=layer), num_classes=5)
    assert find_sites(model, (3, 64, 64))
    with pytest.raises(ValueError, match='have no parameters'):
        DrealTask(model, verbose=False, input_size=(3, 64, 64))
