import copy
from functools import partial

import pytest
import torch
from networks import ATTENTION, correct_targets, make_batch, make_model
from oracle import slow_rewards
from timm.layers import EvoNorm2dB0, convert_splitbn_model
from torch import nn

from dreal_timm import DrealTask
from dreal_timm.attention.capture import keep_inputs
from dreal_timm.attention.sites import find_sites, group_sites
from dreal_timm.layers import SrmModule
from dreal_timm.probes.counterfactual import PROBES
from dreal_timm.probes.entry_points import trace_flow
from dreal_timm.probes.passes import Judged, log_probabilities
from dreal_timm.probes.passes import counterfactual as counterfactual_logits
from dreal_timm.replay.batch_norms import _join_stats, check_probeable, record_norms
from dreal_timm.replay.random_masks import Draws, record_draws, rng_state

MODES = ('batch_norm', 'frozen_batch_norm', 'group_norm')
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


def prepare(attention, mode='batch_norm', dtype=torch.float32, **kwargs):
    """A model in the mode of training, with batch norms frozen or absent if so asked."""
    model = make_model(attention, group_norm=mode == 'group_norm', **kwargs).to(dtype)
    model.train()
    if mode == 'frozen_batch_norm':
        generator = torch.Generator().manual_seed(5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.eval()
    return model


def judge(model, input, seed=11, kept=(), graph=False):
    """Run the judged pass as the task does."""
    torch.manual_seed(seed)
    with record_norms(model) as norms, record_draws(model, input.device, functional=True) as draws, \
            keep_inputs(model, kept) as inputs:
        logits = model(input)
    judged, log_probs = Judged(input, norms, draws, inputs), log_probabilities(logits.detach())
    return (judged, log_probs, logits) if graph else (judged, log_probs)


def counterfactual(model, judged, sites):
    return log_probabilities(counterfactual_logits(model, judged, sites))


def everything(model):
    """All that a pass could change."""
    return {
        'flags': [m.training for m in model.modules()],
        'buffers': {name: (b.data_ptr(), b._version, b.clone()) for name, b in model.named_buffers()},
        'hooks': [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        'overrides': ['forward' in m.__dict__ for m in model.modules()],
        'grads': {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        'rng': torch.get_rng_state(),
    }


def assert_unchanged(before, after):
    for name in ('flags', 'hooks', 'overrides'):
        assert before[name] == after[name]
    assert torch.equal(before['rng'], after['rng'])
    for name, (pointer, version, value) in before['buffers'].items():
        assert after['buffers'][name][:2] == (pointer, version)
        assert torch.equal(after['buffers'][name][2], value)
    for name, value in before['grads'].items():
        same = after['grads'][name]
        assert value is same is None or torch.equal(value, same)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('attention', ATTENTION)
def test_rewards_equal_the_slow_oracle(attention, mode, dtype):
    """Rewards of the task equal Eq. 1 with one map swapped by hand in a full pass, dropout and drop path on."""
    model = prepare(attention, mode, dtype, drop_rate=0.2, drop_path_rate=0.3)
    input, _ = make_batch(dtype=dtype)
    target = correct_targets(model, input, seed=11)
    task = DrealTask(model, verbose=False, probe='exact', input_size=(3, 64, 64))
    twin = copy.deepcopy(model)
    torch.manual_seed(11)
    result = task(input, target)
    expected = slow_rewards(twin, input, target, result['probed'], seed=11)
    torch.testing.assert_close(result['reward'].double(), expected, rtol=0, atol=TOLERANCE[dtype])
    assert (expected[:-2].abs() > 1e-3).any()
    assert (expected[-2:] == -1).all()
    kinds = {'se': 1, 'cbam': 2, 'srm': 1}[attention]
    assert len(result['probed']) == 4 * kinds


@pytest.mark.parametrize('attention', ATTENTION)
def test_every_site_of_a_group_is_probed_right(attention):
    """Over the epochs every block is probed, and each reward is right (two blocks a stage)."""
    torch.manual_seed(0)
    import timm
    model = timm.create_model(f'dreal_{attention}_resnet18', num_classes=7, zero_init_last=False).double().train()
    for module in model.modules():
        if isinstance(module, SrmModule):
            nn.init.normal_(module.cfc, std=0.5)
    input, _ = make_batch(batch_size=6, size=48, dtype=torch.float64)
    task = DrealTask(model, verbose=False, probe='exact', input_size=(3, 48, 48))
    target = correct_targets(model, input, seed=11)
    probed = set()
    for epoch in range(2):
        task.set_epoch(epoch)
        twin = copy.deepcopy(model)
        result = task(input, target)
        expected = slow_rewards(twin, input, target, result['probed'], seed=11)
        torch.testing.assert_close(result['reward'].double(), expected, rtol=0, atol=1e-6)
        probed.update(result['probed'])
    assert probed == {site.name for group in task.groups for site in group.sites}


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_null_probe(attention, mode, dtype, tolerance):
    """A pass that bypasses nothing returns the log-probabilities of the judged pass."""
    model = prepare(attention, mode, dtype, drop_rate=0.2, drop_path_rate=0.3)
    judged, log_probs = judge(model, make_batch(dtype=dtype)[0])
    torch.manual_seed(99)
    torch.testing.assert_close(counterfactual(model, judged, []), log_probs, rtol=0, atol=tolerance)


def test_null_probe_needs_the_replay():
    """The null probe fails without the batch statistics or the generator of the judged pass: the test can fail."""
    model = prepare('se', drop_rate=0.2, drop_path_rate=0.3)
    judged, log_probs = judge(model, make_batch()[0])
    torch.manual_seed(99)
    # statistics of other images, as a pass with a shifted batch would have
    moved = {name: [(mean + 0.1, var) for mean, var in pairs] for name, pairs in judged.norms.items()}
    now = rng_state(torch.device('cpu'))
    for other in (Judged(judged.input, moved, judged.draws), Judged(judged.input, judged.norms, Draws(now))):
        assert (counterfactual(model, other, []) - log_probs).abs().max() > 1e-3


def test_null_probe_with_dropout_modules_and_dropblock():
    """Dropout modules and DropBlock draw the same masks again."""
    model = prepare('se', drop_block_rate=0.3)
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    judged, log_probs = judge(model, make_batch()[0])
    torch.testing.assert_close(counterfactual(model, judged, []), log_probs, rtol=0, atol=1e-4)


def test_null_probe_of_a_batch_norm_without_running_statistics():
    """A batch norm that tracks nothing uses the batch's statistics in either mode: they are replayed too."""
    model = prepare('se', norm_layer=partial(nn.BatchNorm2d, track_running_stats=False))
    for mode in (True, False):
        model.train(mode)
        judged, log_probs = judge(model, make_batch()[0])
        site = find_sites(model, (3, 64, 64))[0]
        torch.testing.assert_close(counterfactual(model, judged, []), log_probs, rtol=0, atol=1e-4)
        assert (counterfactual(model, judged, [site]) - log_probs).abs().max() > 1e-4
        assert all(m.running_mean is None for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_batch_norm_that_is_called_twice():
    """Each call of a shared batch norm has its own statistics."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(self.norm(3 * self.norm(x) + x.square()).mean((2, 3)))

    model = Twice().train()
    judged, log_probs = judge(model, make_batch(size=8)[0])
    assert len(judged.norms['norm']) == 2
    torch.testing.assert_close(counterfactual(model, judged, []), log_probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize('probe', list(PROBES))
@pytest.mark.parametrize('mode', MODES)
def test_a_probe_leaves_no_trace(attention, mode, probe):
    """Buffers, versions, flags, hooks, gradients and generator are as before, and the backward still works."""
    model = prepare(attention, mode, drop_rate=0.2, drop_path_rate=0.3)
    input, target = make_batch()
    sites = find_sites(model, (3, 64, 64))
    groups = group_sites(sites)
    probe = PROBES[probe](groups, trace_flow(model, sites, (3, 64, 64)))
    sites = probe.sites([0] * len(groups))
    judged, _, logits = judge(model, input, kept=probe.kept(sites), graph=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = everything(model)
    right = torch.arange(8) % 2 == 0
    probe(model, judged, target, right, sites, 0)
    assert_unchanged(before, everything(model))
    logits.sum().backward()


class _Boom(RuntimeError):
    pass


def test_an_exception_in_a_pass_leaves_no_trace(attention):
    """An exception in the middle of a counterfactual pass leaves no hook and no changed flag, buffer or generator."""
    model = prepare(attention, drop_path_rate=0.3)
    judged, _ = judge(model, make_batch()[0])
    sites = find_sites(model, (3, 64, 64))

    def boom(module, args):
        raise _Boom

    handle = model.layer3.register_forward_pre_hook(boom)
    before = everything(model)
    with pytest.raises(_Boom):
        counterfactual(model, judged, [sites[0]])
    assert_unchanged(before, everything(model))
    handle.remove()


def test_an_exception_in_the_judged_pass_leaves_no_hook():
    """An exception inside the task's own pass leaves no hook."""
    model = prepare('cbam')
    task = DrealTask(model, verbose=False, probe='exact', input_size=(3, 64, 64))
    task.get_trainable_module().train()
    hooks = everything(model)['hooks']
    with pytest.raises(RuntimeError):
        task(torch.randn(4, 5, 64, 64), torch.zeros(4, dtype=torch.long))
    assert everything(model)['hooks'] == hooks


def test_recorded_statistics():
    """Statistics are mean and biased variance of the input, for batch norms in training mode alone."""
    norm, frozen = nn.BatchNorm2d(3).train(), nn.BatchNorm2d(3).eval()
    x = make_batch(dtype=torch.float64)[0]
    model = nn.Sequential(norm, frozen).double()
    with record_norms(model) as norms:
        model(x)
    assert set(norms) == {'0'}
    mean, variance = norms['0'][0]
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), unbiased=False))


def test_statistics_of_a_batch_norm_of_another_kind():
    """What autograd keeps for an earlier batch norm is not taken for that of one whose own node is not known."""

    class Normalize(torch.autograd.Function):  # a node of its own, as a synchronised batch norm has
        @staticmethod
        def forward(ctx, x):
            return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Other(nn.BatchNorm2d):
        def forward(self, x):
            return Normalize.apply(x)

    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), Other(3)).train()
    seen = []
    model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with record_norms(model) as norms:
        model(make_batch()[0])
    torch.testing.assert_close(norms['3'][0][0], seen[0].mean((0, 2, 3)))
    torch.testing.assert_close(norms['3'][0][1], seen[0].var((0, 2, 3), unbiased=False))


def test_statistics_of_all_processes(monkeypatch):
    """Statistics of parts, joined, are those of the whole (what a synchronised batch norm uses)."""
    torch.manual_seed(0)
    parts = [torch.randn(5, 3, dtype=torch.float64), 2 + torch.randn(9, 3, dtype=torch.float64)]
    sums = []

    def fake_all_reduce(tensor, group=None):
        sums.append(tensor.clone())
        if len(sums) == 2:
            tensor.copy_(sums[0] + sums[1])

    monkeypatch.setattr('torch.distributed.all_reduce', fake_all_reduce)
    for part in parts:
        mean, variance = _join_stats(part.mean(0), part.var(0, unbiased=False), len(part), None)
    whole = torch.cat(parts)
    torch.testing.assert_close(mean, whole.mean(0))
    torch.testing.assert_close(variance, whole.var(0, unbiased=False))


def test_layers_that_cannot_be_probed_are_refused():
    """A layer whose batch statistics cannot be replayed is refused by name, not probed wrongly."""
    model = nn.Sequential(nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, track_running_stats=True))
    check_probeable(model)
    with pytest.raises(ValueError, match=r'3.*EvoNorm2dB0'):
        check_probeable(nn.Sequential(*model, EvoNorm2dB0(8)))
    with pytest.raises(ValueError, match='SplitBatchNorm2d'):
        check_probeable(convert_splitbn_model(make_model(), 2))


def test_float32_under_autocast():
    """Under bf16 autocast a probe in float32 has the rewards of a run without autocast."""
    model = prepare('se', 'frozen_batch_norm')
    input, _ = make_batch()
    target = correct_targets(model, input)
    plain = DrealTask(copy.deepcopy(model), verbose=False, probe='exact', input_size=(3, 64, 64))(input, target)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        careful = DrealTask(
            copy.deepcopy(model), verbose=False, probe='exact', input_size=(3, 64, 64), probe_dtype='float32')
        exact = careful(input, target)
        rough = DrealTask(copy.deepcopy(model), verbose=False, probe='exact', input_size=(3, 64, 64))(input, target)
    torch.testing.assert_close(exact['reward'], plain['reward'], rtol=0, atol=1e-4)
    assert (rough['reward'] - plain['reward']).abs().max() > 1e-4


def test_noise_of_low_precision_is_logged_once(caplog):
    """Under autocast the rms of the null probe is logged once, beside the spread of the rewards."""
    task = DrealTask(prepare('se'), verbose=False, probe='exact', input_size=(3, 64, 64))
    input, target = make_batch()
    with caplog.at_level('INFO'), torch.autocast('cpu', dtype=torch.bfloat16):
        task(input, target)
        task(input, target)
    assert len([r for r in caplog.records if 'rms' in r.message and 'standard deviation' in r.message]) == 1
