"""right.float32: rewards, gradients and their absence, masks and traces in float32 without TF32

Rewards are held against float64 by hand: errors are those of float32, far below what a map is worth.
"""
import copy
from contextlib import suppress
from functools import partial
from typing import Any
from unittest import mock

import torch
from oracle import quality_by_hand, site_inputs
from timm.task import ClassificationTask
from torch import nn

from dreal_timm.attention.sites import attention_parameters
from dreal_timm.probes.passes import Entry, RecordedPass, class_log_probability, counterfactual, travel
from dreal_timm.replay.random_masks import rng_state
from gpu_parts.case import SEED, Case, gradients_of, largest, length
from gpu_parts.record import Record
from gpu_parts.table import ATTENTION

__all__ = ['main']

REWARD = 1e-4  # of a probability; rewards have a standard deviation of a hundredth and more
KINKS = 1e-3  # rms, of a probability
GRADIENT = 1e-3  # of a gradient's length; kernels may add in any order
NULL = 1e-4  # log-probability (nats)


def check_reward(record: Record, case: Case, name: str, probe: str, dtype: torch.dtype = torch.float64) -> None:
    """Hold the rewards of 'exact' or 'split' against those by hand."""
    result = case.step(case.task(probe))
    expected, found = case.rewards(result['probed'], dtype), result['reward'].double().cpu()
    asked = ~found.isnan()
    per_sample = asked.sum(1)
    if not bool((per_sample == (len(result['probed']) if probe == 'exact' else 1)).all()):
        raise AssertionError(f'rewards a sample: {sorted(set(per_sample.tolist()))}')
    right = result['right'].cpu()[:, None]
    spread = expected[(asked & right)].std().item()
    if not spread > 50 * REWARD:
        raise AssertionError(f'the maps hardly matter: rewards spread by {spread:.2g}')
    record.near(name, largest(found[asked], expected[asked]), REWARD, spread=spread, rewards=int(asked.sum()))


def check_taylor(record: Record, case: Case, name: str) -> None:
    """Hold the rewards of 'taylor', which come one step late, against autograd in float64.

    A network in float64 must repeat them. In float32 some activations lie on the other side of a kink, which moves a
    gradient in jumps: there the rms error counts.
    """
    for double in (True, False):
        task = case.task('taylor', double=double)
        case.step(task, double)['loss'].backward()
        result = case.step(task, double)
        expected = case.first_order_rewards(result['probed'])
        error = result['reward'].double().cpu() - expected
        if double:
            record.near(f'{name}.float64', error.abs().max().item(), REWARD, rewards=expected.numel())
        else:
            spread = expected[result['right'].cpu()].std().item()
            record.near(name, error.square().mean().sqrt().item(), KINKS, spread=spread, rewards=expected.numel())


def _relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest error of a parameter's gradient, relative to its length (or to a small part of all's)."""
    total = length(expected.values())
    if not total > 0:
        raise AssertionError('there is no gradient')
    return max(
        ((found[name] - value).norm() / (value.norm() + 1e-4 * total)).item() for name, value in expected.items())


def check_gradients(record: Record, case: Case, attention: str) -> None:
    """Who learns from what (Algorithm 1): backbone from L_c, attention from L_c and L_q, the critic from L_r."""
    plain = ClassificationTask(copy.deepcopy(case.model), device=case.device, verbose=False)
    case.step(plain)['loss'].backward()
    task = case.task('exact')
    result = case.step(task)
    result['loss'].backward()
    module = task.get_trainable_module()
    found, expected = gradients_of(module), gradients_of(plain.get_trainable_module())
    by_hand = copy.deepcopy(case.model)
    critic = copy.deepcopy(module.critic)
    sites = [site for group in task.groups for site in group.sites]
    inputs = site_inputs(by_hand, case.input, case.sites, SEED)
    quality = torch.cat(quality_by_hand(by_hand, critic, task.groups, inputs), dim=1)
    by_hand.zero_grad(), critic.zero_grad()
    probed = [case.sites.index(name) for name in result['probed']]
    (quality[:, probed] - result['reward']).square().mean(0).sum().backward(
        inputs=list(critic.parameters()), retain_graph=True)
    (-quality.sum(1).mean()).backward(inputs=list(by_hand.parameters()))
    actor = {name: gradient for name, gradient in gradients_of(by_hand).items()
             if name in attention_parameters(case.model, sites)}
    record.near(
        f'{attention}.gradient.backbone',
        _relative(found, {name: value for name, value in expected.items() if name not in actor}), GRADIENT)
    pushed = {name: expected[name] + value for name, value in actor.items()}
    share = length(actor.values()) / length(pushed.values())
    record.near(f'{attention}.gradient.attention', _relative(found, pushed), GRADIENT, share_of_the_actor=share)
    ours = {f'critic.{name}': value for name, value in gradients_of(critic).items()}
    record.near(f'{attention}.gradient.critic', _relative(found, ours), GRADIENT)


def null_errors(case: Case, task: Any) -> torch.Tensor:
    """Return what passes that bypass nothing change in the log-probability of the class: from the images, from the
    drawn sites, and through all of them, (passes, B).
    """
    errors = []

    def on_rewards(
            trainable: Any, recorded: RecordedPass, output: torch.Tensor, target: torch.Tensor, sites: list) -> None:
        model, probe = trainable.model, task.probe
        expected = class_log_probability(output, target)
        restarts = [probe.restart(recorded, site) for site in sites]
        logits = [counterfactual(model, recorded, [])]
        logits += [travel(model, recorded, [Entry(restart, None)], null=True) for restart in restarts]
        errors.append(torch.stack([class_log_probability(each, target) - expected for each in logits]))
        raise StopIteration

    with mock.patch.object(task.probe, 'rewards', on_rewards), suppress(StopIteration):
        case.step(task)
    return errors[0]


def check_null(record: Record, case: Case, name: str) -> None:
    """A counterfactual pass that bypasses nothing is the judged pass again."""
    errors = null_errors(case, case.task('exact'))
    record.near(name, errors.abs().max().item(), NULL, passes=len(errors))


def check_trace(record: Record, case: Case, name: str) -> None:
    """A step leaves what a plain one leaves: running statistics, generators, flags, and neither hook nor override."""
    def state(model: nn.Module) -> list:
        return [
            (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), 'forward' in vars(module))
            for module in model.modules()]

    plain = ClassificationTask(copy.deepcopy(case.model), device=case.device, verbose=False)
    case.step(plain)
    drawn, left = rng_state(case.device), list[str]()
    torch.manual_seed(SEED)
    if all(torch.equal(state, drawn[key]) for key, state in rng_state(case.device).items()):
        raise AssertionError('the network draws nothing')
    expected = dict(plain.get_trainable_module().named_buffers())
    for probe in ('exact', 'split', 'taylor'):
        task = case.task(probe)
        model = task.get_trainable_module().model
        before = state(model)
        case.step(task)
        now = rng_state(case.device)
        left += [f'{probe}: {key}' for key in drawn if not torch.equal(now[key], drawn[key])]
        left += [f'{probe}: hooks, flags or overrides'] * (state(model) != before)
        # a batch's statistics are summed in the same order in both
        left += [f'{probe}: {key}' for key, value in model.named_buffers() if largest(value, expected[key]) > 1e-6]
    record.add(name, value=len(left), limit=0, ok=not left, left=left[:3])


def main(record: Record, device: torch.device, small: bool) -> None:
    for attention in ATTENTION:
        case = Case(attention, device, small)
        for probe in ('exact', 'split'):
            name = f'{attention}.reward.{probe}'
            record.run(name, partial(check_reward, record, case, name, probe))
        name = f'{attention}.reward.taylor'
        record.run([name, f'{name}.float64'], partial(check_taylor, record, case, name))
        names = [f'{attention}.gradient.{what}' for what in ('backbone', 'attention', 'critic')]
        record.run(names, partial(check_gradients, record, case, attention))
        record.run(f'{attention}.null', partial(check_null, record, case, f'{attention}.null'))
        # masks depend on the dtype that they are drawn in: by hand in float32 too
        case = Case(attention, device, small, drop_rate=0.3, drop_path_rate=0.2)
        for probe in ('exact', 'split'):
            name = f'{attention}.dropout.{probe}'
            record.run(name, partial(check_reward, record, case, name, probe, torch.float32))
        record.run(f'{attention}.trace', partial(check_trace, record, case, f'{attention}.trace'))
