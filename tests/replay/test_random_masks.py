import copy

import pytest
import torch
import torch.nn.functional as F
from networks import correct_targets, make_batch
from oracle import slow_rewards
from timm.layers import DropBlock2d, DropPath
from timm.layers.squeeze_excite import SEModule
from torch import nn

from dreal_timm import DrealTask
from dreal_timm.probes.counterfactual import PROBES
from dreal_timm.replay.random_masks import Draws, Rows, is_masking, record_draws, replay_draws, rng_state

CPU = torch.device('cpu')
ROWS = torch.tensor([5, 0, 3])


class Functional(nn.Module):
    """Functional dropout."""

    def __init__(self, p, inplace=False):
        super().__init__()
        self.p = p
        self.inplace = inplace

    def forward(self, x):
        return F.dropout(x, self.p, self.training, self.inplace)


# layers that draw nothing but a mask, and the shape that they are given
MASKING = {
    'dropout': (lambda: nn.Dropout(0.4), (8, 6)),
    'dropout_of_maps': (lambda: nn.Dropout(0.3), (8, 4, 6, 6)),
    'dropout_in_place': (lambda: nn.Dropout(0.4, inplace=True), (8, 6)),
    'dropout1d': (lambda: nn.Dropout1d(0.4), (8, 4, 6)),
    'dropout2d': (lambda: nn.Dropout2d(0.4), (8, 4, 6, 6)),
    'dropout3d': (lambda: nn.Dropout3d(0.4), (8, 4, 3, 3, 3)),
    'drop_path': (lambda: DropPath(0.4), (8, 4, 6, 6)),
    'drop_path_of_tokens': (lambda: DropPath(0.4), (8, 6, 4)),
    'drop_path_unscaled': (lambda: DropPath(0.4, scale_by_keep=False), (8, 4, 6, 6)),
    'drop_block': (lambda: DropBlock2d(0.3, block_size=3), (8, 4, 10, 10)),
    'drop_block_of_channels': (lambda: DropBlock2d(0.3, block_size=3, couple_channels=False), (8, 4, 10, 10)),
    'drop_block_even': (lambda: DropBlock2d(0.3, block_size=2), (8, 4, 10, 10)),
    'drop_block_in_place': (lambda: DropBlock2d(0.3, block_size=3, inplace=True), (8, 4, 10, 10)),
    'functional': (lambda: Functional(0.4), (8, 4, 6, 6)),
    'functional_in_place': (lambda: Functional(0.4, inplace=True), (8, 4, 6, 6)),
}
# how the memory of what a layer is given is laid out
LAYOUTS = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    'batch_last': lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    'every_second': lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


def positive(shape, seed=0, dtype=torch.float64):
    """Numbers from 1 to 2, by which an output can be divided."""
    return 1 + torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def record(model, x, seed=3):
    """The judged pass of a model, with its draws."""
    torch.manual_seed(seed)
    with record_draws(model, CPU, functional=True) as draws:
        output = model(x.clone(memory_format=torch.preserve_format))
    return output, draws


def replay(model, draws, x, rows=None):
    with replay_draws(model, draws, Rows(rows)):
        return model(x.clone(memory_format=torch.preserve_format))


@pytest.mark.parametrize('layout', list(LAYOUTS))
@pytest.mark.parametrize('layer', list(MASKING))
def test_the_mask_is_repeated(layer, layout):
    """A layer applies the mask of the judged pass to another input, and to some rows of it those rows of the mask."""
    build, shape = MASKING[layer]
    model = nn.Sequential(build()).train()
    x, other = LAYOUTS[layout](positive(shape)), LAYOUTS[layout](positive(shape, seed=1))
    output, draws = record(model, x)
    mask = output / x
    assert draws.complete and not draws.none
    assert 0 < (mask == 0).double().mean() < 1
    assert any(not torch.equal(mask[0], row) for row in mask[1:])  # rows that are not chosen would show
    torch.manual_seed(99)  # what the generator is at later does not matter
    torch.testing.assert_close(replay(model, draws, other), other * mask, rtol=0, atol=1e-12)
    torch.testing.assert_close(replay(model, draws, other[ROWS], ROWS), (other * mask)[ROWS], rtol=0, atol=1e-12)
    torch.testing.assert_close(replay(model, draws, x), output, rtol=0, atol=1e-12)


@pytest.mark.parametrize('layer', list(MASKING))
def test_the_mask_is_that_of_the_generator(layer):
    """What a layer repeats equals its own forward from the state that the generator was in at the judged pass."""
    build, shape = MASKING[layer]
    layers = nn.Sequential(build(), nn.Identity(), build()).train()
    _, draws = record(layers, positive(shape))
    other = positive(shape, seed=1)
    torch.manual_seed(3)
    expected = layers(other.clone())
    torch.testing.assert_close(replay(layers, draws, other), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(replay(layers, draws, other[ROWS], ROWS), expected[ROWS], rtol=0, atol=1e-12)
    states = [draws.before, *(state for call in draws.calls for state in (call.before, call.after)), draws.after]
    assert len(states) == 6 and len({tuple(state['cpu'].tolist()) for state in states}) == 3


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_mask_of_another_precision(dtype):
    """A mask drawn in one precision is applied in another, and what it is applied to keeps its type."""
    model = nn.Sequential(nn.Dropout(0.5), DropPath(0.5)).train()
    output, draws = record(model, positive((8, 6), dtype=dtype))
    other = positive((8, 6), seed=1)
    repeated = replay(model, draws, other)
    assert repeated.dtype == torch.float64 and output.dtype == dtype
    torch.testing.assert_close(repeated, other * (output != 0) * 4, rtol=0, atol=1e-12)


def test_a_mask_that_leaves_nothing():
    """A layer that drops everything is repeated as such."""
    for layer in (nn.Dropout(1.0), DropPath(1.0)):
        model = nn.Sequential(layer).train()
        output, draws = record(model, positive((8, 6)))
        assert draws.complete and not output.any()
        assert not replay(model, draws, positive((8, 6), seed=1)).any()


def test_several_rows_that_change():
    """Masks follow the samples that travel at the moment, several layers and functions of the network alike."""

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Dropout(0.3), DropPath(0.3), nn.Dropout2d(0.3)

        def forward(self, x):
            x = self.second(F.dropout(self.first(x), 0.3))
            return self.third(F.dropout(x, 0.2))

    model = Several().train()
    x, other = positive((8, 4, 6, 6)), positive((8, 4, 6, 6), seed=1)
    output, draws = record(model, x)
    assert len(draws.calls) == 5 and len(draws.functions) == 2 and set(draws.modules) == {'first', 'second', 'third'}
    mask = output / x
    torch.testing.assert_close(replay(model, draws, other), other * mask, rtol=0, atol=1e-12)
    rows = Rows()
    for chosen in (ROWS, None, torch.tensor([7])):
        rows.now = chosen
        with replay_draws(model, draws, rows):
            chosen = torch.arange(8) if chosen is None else chosen
            torch.testing.assert_close(model(other[chosen]), (other * mask)[chosen], rtol=0, atol=1e-12)


def test_a_module_and_a_function():
    """The mask of a layer is not taken for that of a function that is called later."""
    model = nn.Sequential(nn.Dropout(0.4), Functional(0.4)).train()
    x = positive((8, 6))
    output, draws = record(model, x)
    assert draws.complete and len(draws.functions) == 1
    torch.testing.assert_close(replay(model, draws, x), output, rtol=0, atol=1e-12)


@pytest.mark.parametrize('layer', list(MASKING))
def test_no_trace(layer):
    """Recording changes no number and leaves no hook; replaying leaves the generator and the forward as they were."""
    build, shape = MASKING[layer]
    model = nn.Sequential(build()).train()
    x = positive(shape)
    output, draws = record(model, x)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(model(x.clone()), output)
    assert torch.equal(torch.get_rng_state(), after) and torch.equal(draws.after['cpu'], after)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    replay(model, draws, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks and 'forward' not in model[0].__dict__


def test_an_exception_leaves_no_hook():
    """An exception in a pass that is recorded or repeated leaves no hook and no replaced forward."""
    model = nn.Sequential(nn.Dropout(0.4), nn.Linear(6, 2)).train()
    with pytest.raises(RuntimeError), record_draws(model, CPU):
        model(torch.ones(8, 5))
    _, draws = record(model, torch.ones(8, 6))
    with pytest.raises(RuntimeError), replay_draws(model, draws, Rows()):
        model(torch.ones(8, 5))
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks and 'forward' not in model[0].__dict__


@pytest.mark.parametrize('build', [
    lambda: nn.Sequential(nn.Linear(6, 6)).train(),
    lambda: nn.Sequential(nn.Dropout(0.4), DropPath(0.4), nn.AlphaDropout(0.4), Functional(0.4)).eval(),
    lambda: nn.Sequential(nn.Dropout(0.0), DropPath(0.0), Functional(0.0)).train(),
])
def test_a_pass_that_draws_nothing(build):
    """A pass that leaves the generator where it was drew nothing, and nothing is all that has to be repeated."""
    model, x = build(), positive((8, 6)).float()
    output, draws = record(model, x)
    assert draws.none and draws.complete and not draws.calls
    torch.testing.assert_close(replay(model, draws, x[ROWS], ROWS), output[ROWS])


def test_a_pass_that_is_not_known():
    """Without the state after the pass nothing is known; with another one, and no call, something was drawn."""
    before = rng_state(CPU)
    draws = Draws(before)
    assert not draws.none and not draws.complete
    torch.rand(1)
    draws.after = rng_state(CPU)
    assert not draws.none and not draws.complete
    assert Draws(before, before).none and Draws(before, before).complete


class Noise(nn.Module):
    """Noise that no mask makes, from the generator of the CPU."""

    def forward(self, x):
        return x * (1 + 0.3 * torch.rand(len(x), *[1] * (x.ndim - 1)).to(x)) if self.training else x


class Twice(nn.Module):
    """A dropout layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.drop(x) + x)


class Named(nn.Module):
    """A dropout layer that is given its argument by name."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(input=x)


class OwnDropout(nn.Dropout):
    """A class of its own, which may do anything."""

    def forward(self, x):
        return super().forward(x) + 0.1 * torch.rand_like(x) if self.training else x


class Feature(nn.Module):
    """Another random function."""

    def forward(self, x):
        return F.feature_alpha_dropout(x, 0.3, self.training)


# layers whose numbers cannot be drawn again by themselves
OTHERS = {
    'alpha_dropout': lambda: nn.AlphaDropout(0.3),
    'feature_alpha_dropout': lambda: nn.FeatureAlphaDropout(0.3),
    'rrelu': lambda: nn.RReLU(),
    'noisy_drop_block': lambda: DropBlock2d(0.3, block_size=3, with_noise=True),
    'rand': Noise,
    'twice': Twice,
    'subclass': lambda: OwnDropout(0.3),
    'function': Feature,
    'before': lambda: nn.Sequential(Noise(), nn.Dropout(0.3)),
    'after': lambda: nn.Sequential(nn.Dropout(0.3), Noise()),
    'between': lambda: nn.Sequential(nn.Dropout(0.3), Noise(), nn.Dropout(0.3)),
}


@pytest.mark.parametrize('layer', list(OTHERS))
def test_numbers_that_cannot_be_drawn_again(layer):
    """A pass that draws anything but the masks of layers called once is not complete; in evaluation mode it is."""
    model = nn.Sequential(OTHERS[layer]()).train()
    x = positive((8, 4, 10, 10)) - 1.5
    _, draws = record(model, x)
    assert not draws.none and not draws.complete
    _, draws = record(model.eval(), x)
    assert draws.none and draws.complete


def test_functions_are_recorded_where_they_are_watched():
    """Functional dropout is recorded if asked for, and only outside of the layers that are recorded themselves."""
    model = nn.Sequential(nn.Dropout(0.4), Functional(0.4)).train()
    for functional in (True, False):
        with record_draws(model, CPU, functional) as draws:
            model(positive((8, 6)))
        assert len(draws.functions) == functional and draws.complete == functional
        assert len(draws.modules['0']) == 1 and len(draws.calls) == 1 + functional


def test_layers_that_draw_masks():
    """Dropout, drop path and drop block without noise draw masks alone; nothing is known of other classes."""
    assert all(is_masking(build()) for name, (build, _) in MASKING.items() if not name.startswith('functional'))
    assert not any(is_masking(module) for build in OTHERS.values() for module in [build()])
    assert not is_masking(nn.Identity()) and not is_masking(nn.ReLU())


# passes of a network


class Block(nn.Module):
    """A residual block with a squeeze-and-excitation whose maps are far from flat."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.se = SEModule(8, rd_channels=4)
        nn.init.normal_(self.se.fc1.weight, std=2)
        nn.init.normal_(self.se.fc2.weight, std=2)
        self.drop = DropPath(0.2)

    def forward(self, x):
        return x + self.drop(self.se(self.norm(self.conv(x))))


class Net(nn.Module):
    """A network with random layers before its attention sites, between them, and behind them."""

    def __init__(self, **layers):
        super().__init__()
        self.num_classes = 7
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.first, self.last = Block(), Block()
        self.layers = nn.ModuleDict({name: layers.get(name, nn.Identity()) for name in ('stem', 'stage', 'head')})
        self.fc = nn.Linear(8, 7)

    def forward(self, x):
        x = self.layers['stage'](self.first(self.layers['stem'](self.stem(x))))
        return self.fc(self.layers['head'](self.last(x)).mean((2, 3)))


class Tokens(nn.Module):
    """Dropout of tokens, with one row a position and sample or a position alone."""

    def __init__(self, dims, functional=False):
        super().__init__()
        self.dims = dims
        self.drop = Functional(0.3) if functional else nn.Dropout(0.3)

    def forward(self, x):
        tokens = x.flatten(2).permute(2, 0, 1)  # N, B, C
        shape = tokens.shape
        tokens = self.drop(tokens.flatten(0, 1) if self.dims == 2 else tokens)
        return tokens.view(shape).permute(1, 2, 0).view_as(x)


def make_net(where, build):
    torch.manual_seed(0)
    return Net(**{where: build()}).double().train()


# what cannot be drawn again for a part of the batch or of the network
WHOLE = {
    'alpha_dropout_in_the_head': ('head', OTHERS['alpha_dropout']),
    'alpha_dropout_between': ('stage', OTHERS['alpha_dropout']),
    'rand_between': ('stage', Noise),
    'rand_in_the_head': ('head', Noise),
    'dropout_twice': ('stage', Twice),
    'keyword': ('stage', Named),
    'function_in_the_stem': ('stem', lambda: Functional(0.3)),
    'function_between': ('stage', lambda: Functional(0.3)),
    'positions_between': ('stage', lambda: Tokens(3)),
    'positions_in_the_head': ('head', lambda: Tokens(3)),
    'samples_and_positions': ('stage', lambda: Tokens(2)),
}
# what can
PARTS = {
    'dropout_in_the_stem': ('stem', lambda: nn.Dropout(0.3)),
    'dropout_between': ('stage', lambda: nn.Dropout2d(0.3)),
    'drop_block_between': ('stage', lambda: DropBlock2d(0.2, block_size=3)),
    'function_in_the_head': ('head', lambda: Functional(0.3)),
    'layer_and_function': ('head', lambda: nn.Sequential(nn.Dropout(0.3), Functional(0.3))),
}


def assert_rewards(model, probe, caplog):
    """Rewards of two steps equal those of slow passes under the same seed; return what the log said."""
    input, _ = make_batch(6, 16, dtype=torch.float64)
    target = correct_targets(model, input, wrong=2, seed=11)
    task = DrealTask(model, verbose=False, input_size=(3, 16, 16), probe=probe)
    with caplog.at_level('INFO'):
        for _ in range(2):
            twin = copy.deepcopy(model)
            torch.manual_seed(11)
            result = task(input, target)
            expected = slow_rewards(twin, input, target, result['probed'], seed=11)
            measured = ~result['reward'].isnan()
            assert result['probed'] == ['first.se', 'last.se']
            assert measured.sum(1).eq(1 if probe == 'split' else 2).all()
            assert (expected[:-2].abs() > 1e-3).any() and (expected[-2:] == -1).all()
            torch.testing.assert_close(result['reward'].double()[measured], expected[measured], rtol=0, atol=1e-6)
    return [record.message for record in caplog.records if 'through the whole network' in record.message]


@pytest.mark.parametrize('probe', list(PROBES))
@pytest.mark.parametrize('layer', list(WHOLE))
def test_steps_of_whole_passes(layer, probe, caplog):
    """What cannot be drawn again for a part is drawn again by whole passes: rewards are right, the log says so once."""
    said = assert_rewards(make_net(*WHOLE[layer]), probe, caplog)
    assert len(said) == 1 and 'random numbers were drawn' in said[0]


@pytest.mark.parametrize('probe', list(PROBES))
@pytest.mark.parametrize('layer', list(PARTS))
def test_steps_of_passes_from_the_sites(layer, probe, caplog):
    """Rewards are right, and nothing is said, where masks are repeated for a part of the batch and of the network."""
    assert not assert_rewards(make_net(*PARTS[layer]), probe, caplog)


@pytest.mark.parametrize('probe', list(PROBES))
@pytest.mark.parametrize('dims', [2, 3])
def test_steps_with_a_function_whose_mask_has_no_row_a_sample(dims, probe, caplog):
    """Functional dropout of something other than samples, behind the last site, leaves the rewards right."""
    assert_rewards(make_net('head', lambda: Tokens(dims, functional=True)), probe, caplog)
