import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import correct_targets, make_batch, make_model
from timm.layers.cbam import CbamModule
from timm.layers.squeeze_excite import SEModule
from timm.models.cspnet import CspStagesCfg, CspStemCfg
from torch import nn

from dreal_timm import DrealTask
from dreal_timm.attention.capture import keep_inputs
from dreal_timm.attention.readers import READERS
from dreal_timm.attention.sites import Group, Site, find_sites, group_sites
from dreal_timm.probes.counterfactual import PROBES, SplitProbe
from dreal_timm.probes.entry_points import Flow, trace_flow
from dreal_timm.probes.passes import Entry, Judged, class_log_probability, counterfactual, travel
from dreal_timm.probes.restart import select
from dreal_timm.replay.batch_norms import record_norms
from dreal_timm.replay.random_masks import Draws, record_draws, rng_state
from dreal_timm.reward import reward

TOLERANCE = dict(rtol=0, atol=1e-9)
TARGET = torch.tensor([4, 0, 6, 2, 3, 1, 5, 0, 3])

_NARROW = dict(channels=(16, 32, 48, 64), stem_width=16)
_CSP = dict(
    stem=CspStemCfg(out_chs=(16, 24), kernel_size=3, stride=2),
    stages=CspStagesCfg(
        depth=(1, 1, 2, 1), out_chs=(24, 32, 48, 64), stride=2, bottle_ratio=0.5, block_ratio=0.5,
        block_type='dark', stage_type='cs3', attn_layer='se',
    ),
)

# (arguments, sites where a pass begins in front of a module around the site, whether functional dropout follows them)
NETWORKS = {
    'dreal_se_resnet18': (_NARROW, 0, True),
    'dreal_cbam_resnet18': (_NARROW, 0, True),
    'dreal_srm_resnet18': (_NARROW, 0, True),
    'seresnet18': (dict(avg_down=True, **_NARROW), 0, True),
    'seresnext26d_32x4d': (dict(cardinality=8, **_NARROW), 0, True),
    'regnety_002': ({}, 0, False),
    'rexnet_100': (dict(width_mult=0.5, depth_mult=0.5), 0, False),
    'tinynet_e': ({}, 0, True),
    'mobilenetv3_small_050': ({}, 0, True),
    'tf_efficientnetv2_b0': ({}, 0, True),
    'test_byobnet': ({}, 0, False),
    'nf_seresnet26': (dict(channels=(32, 64, 96, 128)), 8, False),  # where the shortcut is computed first
    'cs3sedarknet_l': (_CSP, 5, False),  # the other half of the channels is computed first
}


def randomise(model):
    """Let every map have an effect: no norm, layer scale or classifier that begins as zero."""
    for name, parameter in model.named_parameters():
        if name.endswith('cfc'):
            nn.init.normal_(parameter, std=0.5)
        elif not name.endswith('bias') and (parameter.ndim <= 1 or not parameter.any()):
            nn.init.uniform_(parameter, 0.5, 1.5)
    nn.init.normal_(model.get_classifier().weight, std=0.05)
    return model


def make_network(name):
    """A timm network with random layers and stages of two blocks, in float64."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, drop_rate=0.2, drop_path_rate=0.3, **NETWORKS[name][0])
    stages = [m for n, m in model.named_children() if n in ('s1', 's2', 's3', 's4')] or getattr(model, 'blocks', [])
    for stage in stages:
        for block in [block for block, _ in stage.named_children()][2:]:
            delattr(stage, block)
    return randomise(model).double().train()


@dataclass
class Case:
    """A network, its judged pass and, for each site, the logits of a whole counterfactual pass."""
    model: nn.Module
    input: torch.Tensor
    sites: list[Site]
    groups: list[Group]
    flow: Flow
    judged: Judged
    logits: torch.Tensor
    full: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def restarts(self):
        return [self.flow.restarts[site.name] for site in self.sites if self.flow.restarts[site.name] is not None]


def study(model, batch=4, size=32, graph=False, whole=True):
    """Run the judged pass as the task does, and a whole counterfactual pass for each site."""
    input, _ = make_batch(batch, size, dtype=next(model.parameters()).dtype)
    sites = find_sites(model, (3, size, size))
    flow = trace_flow(model, sites, (3, size, size))
    kept = sorted({name for restart in flow.restarts.values() if restart is not None for name in restart.inputs})
    torch.manual_seed(11)
    watched = nullcontext(Draws(rng_state(input.device)))
    if flow.per_sample:
        watched = record_draws(model, input.device, flow.functional)
    with record_norms(model) as norms, watched as draws, keep_inputs(model, kept) as inputs, \
            torch.set_grad_enabled(graph):
        logits = model(input)
    draws.after = rng_state(input.device)
    case = Case(model, input, sites, group_sites(sites), flow, Judged(input, norms, draws, inputs), logits)
    if whole:
        case.full = {site.name: counterfactual(model, case.judged, [site]) for site in sites}
    return case


def some(batch, index):
    """Rows that differ with the index, one or two of a batch, not in their order."""
    return torch.tensor(sorted({index % batch, (2 * index + 1) % batch}, reverse=True))


def enter(case, restarts, rows):
    """Logits of rows that enter at one site after another, and what whole passes say of them."""
    entries = [Entry(restart, part) for restart, part in zip(restarts, rows, strict=True)]
    expected = [case.full[entry.restart.site.name][entry.rows] for entry in entries]
    return travel(case.model, case.judged, entries), torch.cat(expected)


def ask(case, probe, right, step=0, index=-1):
    """Answers of a probe for one site of each group, with NaN where there is none, and those of whole passes."""
    probe = PROBES[probe](case.groups, case.flow, seed=3)
    sites = probe.sites([index % len(group.sites) for group in case.groups])
    target = TARGET[:len(right)]
    answer = probe(case.model, case.judged, target, right, sites, step)
    expected = torch.stack([class_log_probability(case.full[site.name], target) for site in sites], dim=1)
    if isinstance(probe, SplitProbe):
        own = probe.assignment(len(right), step)[:, None] == torch.arange(len(sites))
        expected = expected.masked_fill(~own, math.nan)
    return answer, expected


def assert_answers(answer, expected, right):
    """Answers are exact where a sample is right, and there are as many as there should be."""
    assert answer.shape == expected.shape
    assert torch.equal(answer.isnan(), expected.isnan())
    torch.testing.assert_close(answer[right].to(expected.dtype), expected[right], equal_nan=True, **TOLERANCE)


def which(kind, batch):
    """Samples that are right."""
    one = torch.arange(batch) == batch // 2
    return {'none': torch.zeros_like(one), 'one': one, 'some': torch.arange(batch) % 3 != 1, 'all': one | ~one}[kind]


@pytest.fixture(scope='module', params=list(NETWORKS))
def name(request):
    return request.param


@pytest.fixture(scope='module')
def case(name):
    return study(make_network(name))


def test_where_passes_of_a_network_can_begin(name, case):
    """A pass can begin at every site of a network, or in front of its stage where that keeps something back."""
    _, in_front, functional = NETWORKS[name]
    assert len(case.restarts) == len(case.sites)
    assert sum(restart.inputs[-1] != restart.site.name for restart in case.restarts) == in_front
    assert case.flow.functional == functional and case.flow.per_sample
    assert not case.judged.whole and not case.judged.draws.none
    for restart in case.restarts:
        assert restart.join == restart.inputs[0]
        assert all(f'{restart.site.name}.'.startswith(f'{name}.') for name in restart.inputs)
        assert not {*restart.inside, *restart.outside} & {*restart.inputs}


def test_every_map_of_a_network_has_an_effect(case):
    """Each whole counterfactual pass differs from the judged pass: the tests of this file can fail."""
    for logits in case.full.values():
        assert (logits - case.logits).abs().max() > 1e-4
    for first, second in pairwise(case.full.values()):
        assert (first - second).abs().max() > 1e-4


def test_a_pass_from_the_site_is_the_whole_pass(case):
    """A pass that begins at a site has the logits of the whole counterfactual pass."""
    for restart in case.restarts:
        logits = travel(case.model, case.judged, [Entry(restart, None)])
        torch.testing.assert_close(logits, case.full[restart.site.name], **TOLERANCE)


def test_a_pass_of_some_rows(case):
    """A pass from the site, or from the image, of some samples has the rows that the whole batch has."""
    for index, restart in enumerate(case.restarts):
        logits, expected = enter(case, [restart], [some(4, index)])
        torch.testing.assert_close(logits, expected, **TOLERANCE)
    site, rows = case.sites[len(case.sites) // 2], torch.tensor([3, 0])
    logits = counterfactual(case.model, case.judged, [site], rows=rows)
    torch.testing.assert_close(logits, case.full[site.name][rows], **TOLERANCE)


def test_a_pass_from_the_block_is_the_whole_pass(case):
    """A pass that begins at the outermost module whose input is needed has the same logits, for some rows too."""
    for index, restart in enumerate(case.restarts):
        within = restart.within()
        assert within.inputs == (restart.join,) and within.inside == ()
        if len(restart.inputs) > 1:
            logits, expected = enter(case, [within], [some(4, index)])
            torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_the_null_pass_from_the_site_is_the_judged_pass(case):
    """A pass that begins at a site and bypasses nothing has the logits of the judged pass."""
    torch.testing.assert_close(counterfactual(case.model, case.judged, []), case.logits, **TOLERANCE)
    rows = [some(4, index) for index in range(len(case.restarts))]
    for restart, part in list(zip(case.restarts, rows, strict=True))[::3]:
        for begin in (restart, restart.within()):
            logits = travel(case.model, case.judged, [Entry(begin, part)], null=True)
            torch.testing.assert_close(logits, case.logits[part], **TOLERANCE)
    entries = [Entry(restart, part) for restart, part in zip(case.restarts, rows, strict=True)]
    logits = travel(case.model, case.judged, entries, null=True)
    torch.testing.assert_close(logits, case.logits[torch.cat(rows)], **TOLERANCE)


def test_a_growing_batch(case):
    """Samples that enter at all sites, and travel on together, have the logits of their own whole passes."""
    rows = [some(4, index) for index in range(len(case.restarts))]
    for restarts in (case.restarts, [restart.within() for restart in case.restarts]):
        logits, expected = enter(case, restarts, rows)
        torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.mark.parametrize('kind', ['none', 'one', 'some', 'all'])
def test_probes_of_a_network(case, kind):
    """Both probes answer as whole passes do, however few samples are right, and with more groups than samples."""
    right = which(kind, 4)
    assert_answers(*ask(case, 'exact', right, index=0 if kind == 'one' else -1), right)
    for step in range(4 if kind == 'some' else 1):
        assert_answers(*ask(case, 'split', right, step=step, index=step), right)


@pytest.mark.parametrize(('attention', 'batch'), [('se', 1), ('se', 3), ('cbam', 2)])
def test_probes_of_small_batches(attention, batch):
    """Batches smaller than the number of groups, or not a multiple of it, have the answers of whole passes."""
    case = study(make_model(attention, drop_rate=0.2, drop_path_rate=0.3).double().train(), batch, size=64)
    assert len(case.groups) == {'se': 4, 'cbam': 8}[attention]
    for kind in ('none', 'one', 'all'):
        right = which(kind, batch)
        for probe in PROBES:
            assert_answers(*ask(case, probe, right, step=batch), right)


@pytest.mark.parametrize('attention', ['se', 'srm'])
def test_a_pass_from_the_site_runs_nothing_before_it(attention, monkeypatch):
    """What lies before the site is not run, in the block nor before the block; what follows it is run."""
    case = study(make_model(attention).double().train(), size=64)
    site = next(site for site in case.sites if site.name.startswith('layer3'))
    block = '.'.join(site.name.split('.')[:2])
    names = {module: name for name, module in case.model.named_modules()}
    ran = []
    own = nn.Conv2d._conv_forward

    def counted(module, *args):
        ran.append(names[module])
        return own(module, *args)

    monkeypatch.setattr(nn.Conv2d, '_conv_forward', counted)
    restart = case.flow.restarts[site.name]
    seen = {}
    for begin in ('site', 'block', 'image'):
        ran.clear()
        if begin == 'image':
            counterfactual(case.model, case.judged, [site])
        else:
            travel(case.model, case.judged, [Entry(restart if begin == 'site' else restart.within(), None)])
        seen[begin] = set(ran)
    before = {name for name in seen['image'] if name < block}
    assert 'layer2.0.conv1' in before
    assert seen['block'] == seen['image'] - before
    assert seen['site'] == seen['block'] - {f'{block}.conv{index}' for index in (1, 2, 3)}
    assert 'layer4.0.conv1' in seen['site']


@pytest.mark.parametrize('probe', list(PROBES))
def test_no_pass_without_a_right_sample(probe):
    """On the CPU a probe of a batch in which no sample is right runs no pass, and one for which one is, few."""
    case = study(make_model('se').double().train(), size=64)
    calls = []
    case.model.register_forward_pre_hook(lambda module, args: calls.append(args))
    answer, _ = ask(case, probe, which('none', 4))
    assert answer.shape == (4, 4) and not calls
    ask(case, probe, which('one', 4))
    assert len(calls) == {'exact': 4, 'split': 1}[probe]


# Networks by hand: a stem, a residual block in which a pass can always begin, and a body that makes the difference.


def attend(channels=8):
    """An attention module whose maps are far from flat."""
    module = SEModule(channels, rd_channels=4)
    nn.init.normal_(module.fc1.weight, std=2)
    nn.init.normal_(module.fc2.weight, std=2)
    return module


class Residual(nn.Module):
    """A shortcut around convolution, norm, attention, another convolution and dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.se = attend()
        self.out = nn.Conv2d(8, 8, 1)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return F.silu(self.drop(self.out(self.se(self.norm(self.conv(x))))) + x)


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.first = Residual()
        self.body = body
        self.fc = nn.Linear(8, 7)

    def forward(self, x):
        return self.fc(self.body(self.first(self.stem(x))).mean((2, 3)))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.se = attend()
        self.out = nn.Conv2d(8, 8, 1)


class Around(nn.Module):
    """A block in a block, with or without a shortcut of its own."""

    def __init__(self, inner, shortcut=True):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.inner = inner
        self.out = nn.Conv2d(8, 8, 1)
        self.shortcut = shortcut

    def forward(self, x):
        y = self.out(self.inner(self.conv(x)))
        return y + x if self.shortcut else y


# where a pass can begin


class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), attend(), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))


class AroundSite(Body):
    """The input of the attention module itself is needed after it."""

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.se = attend()

        def forward(self, x):
            return self.se(x) + 0.5 * x

    def __init__(self):
        super().__init__()
        self.se = self.Half()

    def forward(self, x):
        return self.out(self.se(self.conv(x)))


class Cbam(nn.Module):
    """A channel and a spatial map in one block."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.attn = CbamModule(8, rd_channels=4)
        self.drop = nn.Dropout2d(0.3)
        self.out = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.out(self.drop(self.attn(self.conv(x)))) + x


class TwoSites(Body):
    """Two sites of one group, one after the other in a block."""

    def __init__(self):
        super().__init__()
        self.again = attend()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.again(self.out(self.se(self.conv(x))))) + x


class Nested(Body):
    """A pass of one group begins at the block, for its shortcut, and that of another in the middle of it."""

    class Add(nn.Module):
        def forward(self, x, y):
            return x + y

    def __init__(self):
        super().__init__()
        self.add = self.Add()
        self.wide = nn.Conv2d(8, 16, 1)
        self.again = attend(16)
        self.narrow = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        return self.narrow(self.again(self.wide(self.add(self.out(self.se(self.conv(x))), x))))


class InPlaceElsewhere(Body):
    """What is overwritten in place is not what is kept."""

    def forward(self, x):
        y = self.out(self.se(self.conv(x)).mul_(3))
        y += x
        return y


# where it can begin in front of a module around the site, or not at all


class ComputedBefore(Body):
    """Something computed in the block before the site is used after it."""

    def forward(self, x):
        x = self.conv(x)
        return self.out(self.se(x)) + x


class SecondArgument(Body):
    """A module takes what was computed before the site as its second argument."""

    class Inner(Body):
        def forward(self, x, y):
            return self.out(self.se(self.conv(x))) + y

    def __init__(self):
        super().__init__()
        self.se = self.Inner()

    def forward(self, x):
        return self.se(x, self.conv(x))


class ConvTwice(Body):
    """A module is called before the site and after it."""

    def forward(self, x):
        return self.conv(self.se(self.conv(x)))


class OverwrittenBefore(Body):
    """What a module in front of the site returned is overwritten; skipped, it would return what it was given."""

    def forward(self, x):
        y = self.conv(x)
        y.mul_(2)
        return self.out(self.se(y)) + x


class Overwritten(Body):
    """The block's input is overwritten after the site."""

    def forward(self, x):
        x += self.out(self.se(self.conv(x)))
        return x


class OverwrittenLater(Body):
    """The block's input is overwritten after the block."""

    def __init__(self):
        super().__init__()
        self.se = Residual()

    def forward(self, x):
        y = self.se(x)
        x.mul_(0.5)
        return self.out(y) + x


class LeavesTensor(SEModule):
    def forward(self, x):
        self.squeezed = x.mean((2, 3), keepdim=True)
        return super().forward(x)


class LeftTensor(Body):
    """The attention module leaves another tensor on itself, which is used after it."""

    def __init__(self):
        super().__init__()
        self.se = LeavesTensor(8, rd_channels=4)

    def forward(self, x):
        return self.out(self.se(self.conv(x))) + self.se.squeezed


class ReturnsPair(SEModule):
    def forward(self, x):
        return super().forward(x), x.mean((2, 3), keepdim=True)


class ReturnedPair(Body):
    """The attention module returns two tensors."""

    def __init__(self):
        super().__init__()
        self.se = ReturnsPair(8, rd_channels=4)

    def forward(self, x):
        x, squeezed = self.se(self.conv(x))
        return self.out(x) + squeezed


class CalledTwice(Body):
    """The module of the site lies in a module that is called twice."""

    class Inner(Body):
        def forward(self, x, attended):
            x = self.conv(x)
            return self.out(self.se(x)) if attended else x

    def __init__(self):
        super().__init__()
        self.se = self.Inner()

    def forward(self, x):
        return self.se(self.se(x, False), True)


class PairBefore(Body):
    """A module before the site returns two tensors."""

    class Pair(nn.Module):
        def forward(self, x):
            return x, x.square()

    def __init__(self):
        super().__init__()
        self.pair = self.Pair()

    def forward(self, x):
        x, y = self.pair(x)
        return self.out(self.se(self.conv(x) + y))


class Keyword(Body):
    """What is needed after the site is a keyword argument of the block."""

    class Inner(Body):
        def forward(self, x):
            return self.out(self.se(self.conv(x))) + x

    def __init__(self):
        super().__init__()
        self.se = self.Inner()

    def forward(self, x):
        return self.se(x=self.conv(x))


class Branches(Body):
    """Two branches beside one another: the output of the first one is needed after the site of the second one."""

    def __init__(self):
        super().__init__()
        self.again = attend()

    def forward(self, x):
        return self.out(self.se(self.conv(x)) + self.again(x))


class SharedNorm(Body):
    """A norm is called in a module before the site, and after the site."""

    class Before(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)
            self.norm = [norm]  # the body's own

        def forward(self, x):
            return 3 * self.norm[0](self.conv(x)) + 1

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.before = self.Before(self.norm)

    def forward(self, x):
        return self.norm(self.out(self.se(self.before(x))))


class NormTwice(Body):
    """A norm is called twice after the site, in the block that samples enter and others travel through."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.out(self.norm(3 * self.se(x)))) + x


class FunctionalDropout(Body):
    """Functional dropout follows the last site, in the block that samples enter and others travel through."""

    def forward(self, x):
        return F.dropout(self.out(self.se(x)), 0.3, self.training) + x


class DoubledFirst(Body):
    """The block's input is overwritten before the site, by no module, and needed after it."""

    def forward(self, x):
        x.mul_(2)
        return self.out(self.se(self.conv(x))) + x


class ActivatedFirst(Body):
    """The block's input is overwritten by its first module."""

    def __init__(self):
        super().__init__()
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        return self.out(self.se(self.conv(self.act(x)))) + x


class Twin(nn.Module):
    """The block's input is also its second argument."""

    class Inner(Body):
        def forward(self, x, y):
            return self.out(self.se(self.conv(x))) + y

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.inner = self.Inner()

    def forward(self, x):
        x = self.conv(x)
        return self.inner(x, x)


class SizeBefore(Body):
    """The size of a feature map before the site is used after it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.conv(x)
        size = [2 * length for length in x.shape[2:]]
        return self.last(F.interpolate(self.out(self.se(x)), size=size, mode='nearest'))


class Strided(Body):
    """The size of a feature map before the site is used after it; with a stride of 1 it is that of the input."""

    def __init__(self, stride):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, stride=stride, padding=1)
        self.stride = stride

    def forward(self, x):
        y = self.conv(x)
        size = [self.stride * length for length in y.shape[2:]]
        return F.interpolate(self.out(self.se(y)), size=size, mode='nearest') + x


class RootShortcut(Net):
    """The shortcut goes around the body, in the network itself."""

    def forward(self, x):
        x = self.first(self.stem(x))
        return self.fc((self.body(x) + x).mean((2, 3)))


class RootImage(Net):
    """The images are used at the end."""

    def forward(self, x):
        return super().forward(x) + x.mean((1, 2, 3))[:, None]


class Shuffled(nn.Module):
    """The number of channels before the site is used after it; blocks differ in that number alone."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(8, channels, 1)
        self.se = attend(channels)
        self.out = nn.Conv2d(channels, 8, 1)

    def forward(self, x):
        y = self.conv(x)
        channels = y.shape[1]
        return self.out(self.se(y).unflatten(1, (2, channels // 2)).transpose(1, 2).flatten(1, 2)) + x


class SizeBetween(nn.Module):
    """The size of what is between two blocks is used after the second one."""

    def __init__(self):
        super().__init__()
        self.left, self.right = Residual(), Residual()
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.left(x)
        size = x.shape[2:]
        return self.last(F.interpolate(self.right(x), size=size))


class OverwrittenByName(Body):
    """The block's input is overwritten after the site, as an argument that is given by name."""

    def forward(self, x):
        y = self.out(self.se(self.conv(x)))
        torch.mul(x, 0.5, out=x)
        return y + x


class RootOverwritten(Net):
    """What the stem returned is overwritten, by no module; skipped, it returns the images."""

    def forward(self, x):
        x = self.stem(x)
        x.mul_(2)
        return self.fc(self.body(self.first(x)).mean((2, 3)))


class EarlyBatch(Net):
    """The number of images is read at the beginning and used at the end."""

    def forward(self, x):
        batch = len(x)
        x = self.body(self.first(self.stem(x)))
        return self.fc(x.reshape(batch, 8, -1).mean(2))


class Position(Net):
    """A map of fixed size is added between two modules that are skipped."""

    def __init__(self, body):
        super().__init__(body)
        self.position = nn.Parameter(torch.randn(1, 8, 8, 8))

    def forward(self, x):
        return self.fc(self.body(self.first(self.stem(x) + self.position)).mean((2, 3)))


_FIRST = {'first.se': ('first', 'first.se')}

# the network, and the inputs that a pass needs to begin at each site, or in front of it; None where it cannot
BODIES = {
    'plain': (lambda: Net(Plain()), {'body.2': ('body.2',)}),
    'residual': (lambda: Net(Residual()), {'body.se': ('body', 'body.se')}),
    'site': (lambda: Net(attend()), {'body': ('body',)}),
    'around_site': (lambda: Net(AroundSite()), {'body.se.se': ('body.se', 'body.se.se')}),
    'around_plain': (lambda: Net(Around(Plain())), {'body.inner.2': ('body', 'body.inner.2')}),
    'around_residual': (
        lambda: Net(Around(Residual())), {'body.inner.se': ('body', 'body.inner', 'body.inner.se')}),
    'around_without_shortcut': (
        lambda: Net(Around(Residual(), shortcut=False)), {'body.inner.se': ('body.inner', 'body.inner.se')}),
    'around_around': (
        lambda: Net(Around(Around(Residual(), shortcut=False))),
        {'body.inner.inner.se': ('body', 'body.inner.inner', 'body.inner.inner.se')}),
    'cbam': (lambda: Net(Cbam()), {
        'body.attn.channel': ('body', 'body.attn.channel'), 'body.attn.spatial': ('body', 'body.attn.spatial')}),
    'two_sites': (lambda: Net(TwoSites()), {
        'body.se': ('body', 'body.se'), 'body.again': ('body', 'body.again')}),
    'nested': (lambda: Net(Nested()), {'body.se': ('body', 'body.se'), 'body.again': ('body.again',)}),
    'in_place_elsewhere': (lambda: Net(InPlaceElsewhere()), {'body.se': ('body', 'body.se')}),
    'computed_before': (lambda: Net(ComputedBefore()), {'body.se': ('body',)}),
    'second_argument': (lambda: Net(SecondArgument()), {'body.se.se': ('body',)}),
    'twin': (lambda: Net(Twin()), {'body.inner.se': ('body',)}),
    'conv_twice': (lambda: Net(ConvTwice()), {'body.se': ('body',)}),
    'doubled_first': (lambda: Net(Around(DoubledFirst(), shortcut=False)), {'body.inner.se': ('body',)}),
    'activated_first': (lambda: Net(Around(ActivatedFirst(), shortcut=False)), {'body.inner.se': ('body',)}),
    'overwritten_before': (lambda: Net(OverwrittenBefore()), {'body.se': ('body',)}),
    'overwritten': (lambda: Net(Overwritten()), {'body.se': None}),
    'overwritten_later': (lambda: Net(OverwrittenLater()), {'body.se.se': None}),
    'left_tensor': (lambda: Net(LeftTensor()), {'body.se': ('body',)}),
    'returned_pair': (lambda: Net(ReturnedPair()), {'body.se': ('body',)}),
    'called_twice': (lambda: Net(CalledTwice()), {'body.se.se': ('body',)}),
    'pair_before': (lambda: Net(PairBefore()), {'body.se': ('body',)}),
    'keyword': (lambda: Net(Keyword()), {'body.se.se': ('body',)}),
    'branches': (lambda: Net(Branches()), {'body.se': ('body', 'body.se'), 'body.again': ('body',)}),
    'functional_dropout': (lambda: Net(FunctionalDropout()), {'body.se': ('body', 'body.se')}),
    'shared_norm': (lambda: Net(SharedNorm()), {'first.se': None, 'body.se': None}),
    'norm_twice': (lambda: Net(NormTwice()), {'first.se': None, 'body.se': None}),
    'root_shortcut': (lambda: RootShortcut(Residual()), {'body.se': None}),
    'root_image': (lambda: RootImage(Residual()), {'first.se': None, 'body.se': None}),
    'root_overwritten': (lambda: RootOverwritten(Residual()), {'first.se': None, 'body.se': None}),
    'early_batch': (lambda: EarlyBatch(Residual()), {'first.se': None, 'body.se': None}),
    'position': (lambda: Position(Residual()), {'first.se': None, 'body.se': None}),
    # the size of what would be skipped is used after it
    'size_before': (lambda: Net(SizeBefore()), {}),
    'strides_1_2': (lambda: Net(nn.Sequential(Strided(1), Strided(2))), {}),
    'strides_2_1': (lambda: Net(nn.Sequential(Strided(2), Strided(1))), {}),
    'channels_8_16': (lambda: Net(nn.Sequential(Shuffled(8), Shuffled(16))), {}),
    'channels_16_8': (lambda: Net(nn.Sequential(Shuffled(16), Shuffled(8))), {}),
    'size_between': (lambda: Net(SizeBetween()), {}),
    'overwritten_by_name': (lambda: Net(OverwrittenByName()), {'body.se': None}),
}


def make_net(build):
    torch.manual_seed(0)
    return build().double().train()


def assert_probes(case):
    """Both probes answer as whole passes do, for every site, and many assignments of the samples to the groups."""
    for logits in case.full.values():
        assert (logits - case.logits).abs().max() > 1e-4
    for index in range(max(len(group.sites) for group in case.groups)):
        for kind in ('some', 'all'):
            right = which(kind, len(case.input))
            assert_answers(*ask(case, 'exact', right, index=index), right)
            for step in range(3):
                assert_answers(*ask(case, 'split', right, step=step, index=index), right)


@pytest.mark.parametrize('body', list(BODIES))
def test_networks_by_hand(body, monkeypatch):
    """A pass begins where all that it needs is the input of modules that contain the site, and answers are right."""
    for kind in (LeavesTensor, ReturnsPair):
        monkeypatch.setitem(READERS, kind, READERS[SEModule])
    build, expected = BODIES[body]
    graph = body not in ('overwritten', 'overwritten_later', 'overwritten_by_name')  # autograd minds what these do
    case = study(make_net(build), batch=5, size=16, graph=graph)
    begins = {name: restart and restart.inputs for name, restart in case.flow.restarts.items()}
    assert begins == begins | {'first.se': ('first', 'first.se')} | expected
    torch.testing.assert_close(counterfactual(case.model, case.judged, []), case.logits.detach(), **TOLERANCE)
    assert_probes(case)
    if not case.judged.whole:
        for restart in case.restarts:
            for rows in (None, torch.tensor([4, 1]), None):
                logits = travel(case.model, case.judged, [Entry(restart.within(), rows)])
                torch.testing.assert_close(logits, select(case.full[restart.site.name], rows), **TOLERANCE)
    if graph:
        case.logits.sum().backward()  # nothing that it needs has been overwritten


@pytest.mark.parametrize('probe', list(PROBES))
@pytest.mark.parametrize(('body', 'reason'), [
    ('root_shortcut', 'what follows body.se needs more'), ('nested', 'lie in one another'), ('residual', '')])
def test_passes_through_the_whole_network_are_told_once(probe, body, reason, caplog):
    """The log says once why passes run through the whole network, and nothing where they do not."""
    case = study(make_net(BODIES[body][0]), batch=5, size=16, whole=False)
    probe_ = PROBES[probe](case.groups, case.flow)
    sites = probe_.sites([0] * len(case.groups))
    with caplog.at_level('INFO'):
        for step in range(4):
            probe_(case.model, case.judged, TARGET[:5], which('all', 5), sites, step)
    said = [record.message for record in caplog.records if 'through the whole network' in record.message]
    told = reason and (body, probe) != ('nested', 'exact')  # which enters one site at a time
    assert len(said) == bool(told)
    assert all(reason in message for message in said)


# the assignment of samples to groups


def split_probe(groups=4, seed=0):
    sites = [Group(str(index), str(index), 'channel', (8,), ()) for index in range(groups)]
    return SplitProbe(sites, Flow({}, False, True), seed=seed)


@pytest.mark.parametrize(('batch', 'groups'), [(8, 4), (7, 4), (10, 3), (2, 5), (1, 3), (6, 1)])
def test_every_sample_is_as_likely_to_answer_for_every_group(batch, groups):
    """Over many steps each sample answers for each group as often, also where the groups do not divide the batch."""
    steps = 4000
    probe = split_probe(groups)
    assigned = torch.stack([probe.assignment(batch, step) for step in range(steps)])
    counts = F.one_hot(assigned, groups).sum(0)
    assert counts.shape == (batch, groups)
    error = math.sqrt(steps * (1 / groups) * (1 - 1 / groups))
    assert (counts - steps / groups).abs().max() <= 4.5 * error
    # no bias that the largest error alone would not show
    if groups > 1:
        chi2 = ((counts - steps / groups).square() / (steps / groups)).sum().item()
        freedom = batch * (groups - 1)
        assert chi2 < freedom + 4.5 * math.sqrt(2 * freedom) + 5


@pytest.mark.parametrize(('batch', 'groups'), [(8, 4), (7, 4), (10, 3), (2, 5), (1, 3), (6, 1), (256, 7)])
def test_groups_are_balanced_in_every_step(batch, groups):
    """In each step the numbers of samples that answer for the groups differ by at most one."""
    for step in range(50):
        assigned = split_probe(groups).assignment(batch, step)
        assert assigned.shape == (batch,) and assigned.dtype == torch.int64 and assigned.device.type == 'cpu'
        counts = torch.bincount(assigned, minlength=groups)
        assert len(counts) == groups and counts.max() - counts.min() <= 1


def test_two_samples_answer_together_as_often_as_any_other_two():
    """Whether two samples answer for the same group does not depend on where they stand in the batch."""
    steps, batch, groups = 4000, 6, 3
    probe = split_probe(groups, seed=1)
    assigned = torch.stack([probe.assignment(batch, step) for step in range(steps)])
    together = (assigned[:, :, None] == assigned[:, None, :]).sum(0).double()
    pairs = together[torch.triu_indices(batch, batch, 1).unbind()]
    chance = 1 / 5  # one of the five others has the same group
    assert (pairs - steps * chance).abs().max() < 4.5 * math.sqrt(steps * chance * (1 - chance))


def test_the_assignment_is_a_function_of_seed_and_step():
    """The same seed and step give the same assignment whatever else is drawn; others give others."""
    first = [split_probe(seed=1).assignment(16, step) for step in range(20)]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    probe = split_probe(seed=1)
    again = [probe.assignment(16, step) for step in reversed(range(20))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(before, torch.get_rng_state())
    assert len({tuple(a.tolist()) for a in first}) == 20
    other = [split_probe(seed=2).assignment(16, step) for step in range(20)]
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    shift = {tuple(((a - first[0]) % 4).tolist()) for a in first[1:]}
    assert not any(len(set(difference)) == 1 for difference in shift)  # not the same one, shifted


@pytest.mark.parametrize('body', ['cbam', 'nested'])
def test_the_split_reward_is_unbiased(body):
    """The split reward is the exact reward of the group that a sample answers for, and so is its mean over steps."""
    case = study(make_net(BODIES[body][0]), batch=5, size=16)
    right = which('all', 5)
    log_p = class_log_probability(case.logits, TARGET[:5])[:, None]
    exact = reward(ask(case, 'exact', right)[0] - log_p, right)
    split = []
    while len(split) < 3 or torch.stack(split).isnan().all(0).any():
        split.append(reward(ask(case, 'split', right, step=len(split))[0] - log_p, right))
        assert len(split) < 60
    split = torch.stack(split)
    assert (~split.isnan()).sum(2).eq(1).all()  # each sample answers for one group in each step
    torch.testing.assert_close(split.nanmean(0), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(split, exact.where(~split.isnan(), split), rtol=0, atol=1e-6, equal_nan=True)
    assert exact.unique().numel() == exact.numel()


@pytest.mark.parametrize('body', ['cbam', 'nested'])
@pytest.mark.parametrize('dropout', [False, True])
def test_float32_under_autocast_of_the_split_probe(body, dropout):
    """Under bf16 autocast a split probe in float32 has the rewards of a run without autocast, from the sites."""
    model = make_net(BODIES[body][0]).float()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # whose statistics would be those of bf16 features
            module.eval()
        if not dropout and isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0
    input, _ = make_batch(16, size=16)
    model.num_classes = 7
    target = correct_targets(model, input, seed=11)
    options = dict(verbose=False, input_size=(3, 16, 16), probe='split')
    results = []
    for dtype, low in ((None, False), ('float32', True), (None, True)):
        task = DrealTask(copy.deepcopy(model), probe_dtype=dtype, **options)
        assert None not in task.measure.probe.flow.restarts.values()
        torch.manual_seed(11)
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=low):
            results.append(task(input, target))
    plain, exact, rough = (result['reward'] for result in results)
    assert plain.isnan().logical_not().sum(1).eq(1).all()
    torch.testing.assert_close(exact, plain, rtol=0, atol=1e-4, equal_nan=True)
    assert (rough - plain).abs().nan_to_num().max() > 1e-4


# the trace


def snapshot(model):
    """All of a model, and of the generator, that a trace could change."""
    return {
        'flags': [m.training for m in model.modules()],
        'tensors': {n: (t.device, t.data_ptr(), t._version) for n, t in model.state_dict(keep_vars=True).items()},
        'grads': [p.grad for p in model.parameters()],
        'hooks': [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        'overrides': ['forward' in m.__dict__ for m in model.modules()],
        'rng': torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize(('attention', 'training'), [('se', True), ('cbam', False), ('srm', True)])
def test_a_trace_leaves_no_trace(attention, training):
    """Weights, buffers, gradients, flags, hooks and generator are as before, in either mode of the model."""
    model = make_model(attention, drop_rate=0.2, drop_path_rate=0.3, drop_block_rate=0.1).train(training)
    model.layer2.train(not training)
    sites = find_sites(model, (3, 64, 64))
    values = copy.deepcopy(model.state_dict())
    before = snapshot(model)
    flow = trace_flow(model, sites, (3, 64, 64))
    assert None not in flow.restarts.values() and flow.functional
    assert snapshot(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_an_exception_in_the_trace_leaves_no_trace():
    """An exception in the middle of the trace leaves no hook, and no changed flag, weight or generator."""
    model = make_model('se').eval()
    sites = find_sites(model, (3, 64, 64))
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        trace_flow(model, sites, (5, 64, 64))
    assert snapshot(model) == before


def test_a_trace_of_a_shared_module_leaves_no_trace():
    """A module that is registered under two names keeps its weights."""
    net = make_net(lambda: Net(nn.Sequential(Residual(), Residual())))
    net.body[1].out = net.body[0].out
    before = snapshot(net)
    sites = find_sites(net, (3, 16, 16))
    assert snapshot(net) == before
    trace_flow(net, sites, (3, 16, 16))
    assert snapshot(net) == before


def test_a_trace_of_a_network_that_draws_on_the_cpu():
    """The generator of the CPU is as before, where a network draws from it whatever its device."""

    class Scaled(nn.Module):
        def forward(self, x):
            return x * (1 + torch.rand(len(x), 1, 1, 1).to(x))

    net = make_net(lambda: Net(nn.Sequential(Residual(), Scaled())))
    before = snapshot(net)
    sites = find_sites(net, (3, 16, 16))
    flow = trace_flow(net, sites, (3, 16, 16))
    assert flow.functional
    assert snapshot(net) == before


def test_a_trace_of_a_module_that_makes_its_buffer_when_called():
    """What a module makes of its first input is made again after the trace, not left on the meta device."""

    class Grid(nn.Module):
        def forward(self, x):
            if 'grid' not in self._buffers:
                self.register_buffer('grid', torch.ones_like(x[:1]), persistent=False)
            return x * self.grid

    net = make_net(lambda: Net(nn.Sequential(Residual(), Grid())))
    sites = find_sites(net, (3, 16, 16))
    trace_flow(net, sites, (3, 16, 16))
    assert net.body[1]._buffers == {}
    case = study(net, batch=5, size=16)
    assert net.body[1].grid.device.type == 'cpu'
    assert_probes(case)


@pytest.mark.parametrize('kind', PROBES)
def test_later_hooks_see_real_images_alone(kind):
    """A user's hooks are not called on the meta device; those of before, which the network may need, are, and stay."""
    model = make_model('se')
    devices = {'before': [], 'after': []}

    def watch(when):
        for module in model.modules():
            module.register_forward_hook(lambda module, args, output: devices[when].append(output.device.type))
            module.register_forward_pre_hook(lambda module, args: devices[when].append(args[0].device.type))

    watch('before')
    task = DrealTask(model, probe=kind, input_size=(3, 48, 48), verbose=False)
    watch('after')
    hooks = [(list(m._forward_hooks.items()), list(m._forward_pre_hooks.items())) for m in model.modules()]
    input, _ = make_batch(size=48)
    task(input, correct_targets(model, input))
    assert set(devices['before']) == {'meta', 'cpu'}
    assert set(devices['after']) == {'cpu'}
    assert hooks == [(list(m._forward_hooks.items()), list(m._forward_pre_hooks.items())) for m in model.modules()]
