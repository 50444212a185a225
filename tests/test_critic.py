import copy

import pytest
import torch
from oracle import gru_by_hand, lstm_by_hand

from dreal_timm.critic import Critic, RecurrentCritic


def make_input(batch=5, length=3, size=(6,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, *size, generator=generator) for _ in range(2)]


def test_lstm_equals_the_equations():
    """Q is the hidden state of an LSTM with one unit that starts at zero (Eq. 2 and 3)."""
    critic = RecurrentCritic((6,))
    state, attention = make_input()
    expected = lstm_by_hand(critic.rnn, list(torch.cat([state, attention], dim=2).unbind(1)))
    torch.testing.assert_close(critic(state, attention), torch.cat(expected, dim=1))


def test_gru_with_readout_equals_the_equations():
    """A GRU with three units and two cells feeds a linear read-out."""
    critic = RecurrentCritic((6,), cell='gru', hidden_size=3, depth=2)
    state, attention = make_input()
    hidden = gru_by_hand(critic.rnn, 0, list(torch.cat([state, attention], dim=2).unbind(1)))
    hidden = gru_by_hand(critic.rnn, 1, hidden)
    expected = torch.stack([h @ critic.readout.weight[0] + critic.readout.bias[0] for h in hidden], dim=1)
    torch.testing.assert_close(critic(state, attention), expected)


def test_one_unit_by_hand():
    """Exact numbers: all weights zero but the cell input's, with a bias of 0, give h = sigmoid(0) tanh(c)."""
    critic = RecurrentCritic((1,))
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.zero_()
        critic.rnn.weight_ih_l0[2] = torch.tensor([1.0, 0.0])  # gates in order i, f, g, o
    quality = critic(torch.tensor([[[0.5], [0.0]]]), torch.zeros(1, 2, 1))
    c1 = 0.5 * torch.tanh(torch.tensor(0.5))
    c2 = 0.5 * c1
    torch.testing.assert_close(quality, torch.stack([0.5 * torch.tanh(c1), 0.5 * torch.tanh(c2)])[None])


def test_parameter_count_is_the_papers():
    """4 x (2N + 1) weights a group (Sec. 3.2), and 8 biases."""
    critic = RecurrentCritic((256,))
    weights = [p for n, p in critic.named_parameters() if 'weight' in n]
    assert sum(p.numel() for p in weights) == 4 * (2 * 256 + 1)
    assert sum(p.numel() for p in critic.parameters()) == 4 * (2 * 256 + 1) + 8


def test_quality_lies_between_minus_one_and_one():
    """The output of the default critic cannot leave (-1, 1)."""
    quality = RecurrentCritic((6,))(*[100 * x for x in make_input(64)])
    assert quality.abs().max() < 1


@pytest.mark.parametrize('channels', [64, 2048])
def test_start_does_not_saturate(channels):
    """Gates start unsaturated whatever the number of inputs: the quality follows the map at once."""
    torch.manual_seed(0)
    critic = RecurrentCritic((channels,))
    state, attention = torch.rand(32, 1, channels), torch.rand(32, 1, channels).requires_grad_()
    x = torch.cat([state, attention], dim=2)[:, 0]
    preactivation = x @ critic.rnn.weight_ih_l0.T
    assert preactivation.abs().max() < 3
    critic(state, attention).sum().backward()
    assert attention.grad.abs().mean() > 1e-5


def test_later_maps_do_not_change_earlier_quality():
    """Q_l depends on maps 1 to l: what comes deeper in the stage cannot change it."""
    critic = RecurrentCritic((6,))
    state, attention = make_input()
    changed = attention.clone()
    changed[:, 2] += 1
    before, after = critic(state, attention), critic(state, changed)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2], after[:, 2])


def test_spatial_maps_of_another_size_are_pooled(caplog):
    """A spatial critic average-pools maps of another size to its own, and says so once."""
    critic = RecurrentCritic((2, 2))
    state, attention = make_input(size=(4, 4))
    pooled = [torch.nn.functional.avg_pool2d(x, 2) for x in (state, attention)]
    with caplog.at_level('INFO'):
        torch.testing.assert_close(critic(state, attention), critic(*pooled))
        critic(state, attention)
    assert len([r for r in caplog.records if 'pooled' in r.message]) == 1


def test_channel_maps_of_another_size_are_refused():
    """A channel critic cannot read maps of another width: no silent reshape."""
    with pytest.raises(ValueError, match=r'\(6,\).*\(8,\)'):
        RecurrentCritic((6,))(*make_input(size=(8,)))


@pytest.mark.parametrize('kwargs', [dict(cell='rnn'), dict(hidden_size=0), dict(depth=0)])
def test_unknown_options_are_refused(kwargs):
    """Unknown cells and sizes below 1 raise, and the message lists what is known."""
    with pytest.raises(ValueError, match=r'lstm|1 or more'):
        RecurrentCritic((6,), **kwargs)


@pytest.mark.parametrize('convert', [torch.nn.Module.half, torch.nn.Module.double,
                                     lambda m: m.to(torch.bfloat16)])
def test_weights_stay_float32(convert):
    """Conversions of the model leave the critic's weights in float32, bit for bit."""
    critic = Critic({'a': (6,), 'b': (2, 2)})
    before = copy.deepcopy(critic.state_dict())
    convert(torch.nn.ModuleList([critic]))
    for name, value in critic.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


def test_building_draws_nothing_from_the_global_generator():
    """The seed decides the weights; the global generator stays where it was."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = Critic({'a': (6,)}, seed=1), Critic({'a': (6,)}, seed=1), Critic({'a': (6,)}, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first['a'].rnn.weight_ih_l0, again['a'].rnn.weight_ih_l0)
    assert not torch.equal(first['a'].rnn.weight_ih_l0, other['a'].rnn.weight_ih_l0)


def test_groups_are_joined_in_order():
    """The columns of the answer are the sites of the first group, then those of the next."""
    critic = Critic({'a': (6,), 'b': (2, 2)})
    states = {'a': make_input()[0], 'b': make_input(length=2, size=(2, 2))[0]}
    maps = {'a': make_input()[1], 'b': make_input(length=2, size=(2, 2))[1]}
    quality = critic(states, maps)
    assert quality.shape == (5, 5)
    assert torch.equal(quality[:, :3], critic['a'](states['a'], maps['a']))
    assert torch.equal(quality[:, 3:], critic['b'](states['b'], maps['b']))


def test_detached_weights_get_no_gradient():
    """Called with detached weights, as the actor's judgement is, no gradient reaches the critic."""
    critic = Critic({'a': (6,)})
    state, attention = make_input()
    attention.requires_grad_()
    frozen = {name: p.detach() for name, p in critic.named_parameters()}
    torch.func.functional_call(critic, frozen, ({'a': state}, {'a': attention})).sum().backward()
    assert attention.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.parameters())


def test_meta_device():
    """A critic builds on the meta device."""
    assert next(Critic({'a': (6,)}, device='meta').parameters()).device.type == 'meta'
