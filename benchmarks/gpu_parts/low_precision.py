"""right.bfloat16, right.float16: the same under autocast, in float16 with its loss scaler

Limits are those of the precision: a pass in bfloat16 moves a log-probability by some thousandths, where a reward's
standard deviation is some hundredths; one in float16 by an eighth of that.
"""
import copy
from functools import partial

import torch
from timm.task import ClassificationTask

from gpu_parts.case import Case, gradients_of, largest, length
from gpu_parts.float32 import null_errors
from gpu_parts.record import Record
from gpu_parts.table import ATTENTION

__all__ = ['main']

REWARD = {torch.bfloat16: 0.5, torch.float16: 0.1}  # rms error, in standard deviations of the rewards
# the same, to first order: activations near a kink fall on its other side, which moves a gradient in jumps
TAYLOR = {torch.bfloat16: 0.5, torch.float16: 0.2}
FLOAT32 = 0.25  # the same, where rewards are measured in float32 with the statistics of the judged pass
# rms of what a pass that changes nothing does to a log-probability (nats), and the largest error of a quality
NOISE = {torch.bfloat16: 0.05, torch.float16: 0.01}
GRADIENT = 0.02  # of a gradient's length, against plain training under the same autocast


class Autocast:
    """A case under autocast, and the loss scaler that float16 trains with."""

    def __init__(self, attention: str, device: torch.device, small: bool, dtype: torch.dtype):
        self.dtype = dtype
        self.name = attention
        self.case = Case(attention, device, small)

    def step(self, task: object, scaler: torch.amp.GradScaler | None = None) -> dict:
        """Run a step with its backward pass."""
        with torch.autocast(self.case.device.type, dtype=self.dtype):
            result = self.case.step(task)
        loss = result['loss'] if scaler is None else scaler.scale(result['loss'])
        loss.backward()
        return result

    def scaler(self, scale: float = 2.0 ** 10) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(
            self.case.device.type, init_scale=scale, enabled=self.dtype == torch.float16)


def _relative(found: torch.Tensor, expected: torch.Tensor, right: torch.Tensor) -> float:
    """Return the rms error over the standard deviation, of rewards of samples that are right in either precision."""
    chosen = ~found.isnan().cpu() & right.cpu()[:, None] & (expected > -1).any(1, keepdim=True)
    if not chosen.any():
        raise AssertionError('no sample is right')
    error = (found.double().cpu() - expected)[chosen]
    return (error.square().mean().sqrt() / expected[chosen].std()).item()


def check_reward(record: Record, cast: Autocast, probe: str) -> None:
    """Rewards against float64 by hand: as noisy as the precision, and hardly where they are measured in float32."""
    task = cast.case.task('exact', probe_dtype='float32') if probe == 'float32' else cast.case.task(probe)
    result = cast.step(task)
    expected = cast.case.rewards(result['probed'])
    error = _relative(result['reward'], expected, result['right'])
    spread = expected[(expected > -1).any(1)].std().item()
    record.near(
        f'{cast.name}.reward.{probe}', error, FLOAT32 if probe == 'float32' else REWARD[cast.dtype], spread=spread)


def check_taylor(record: Record, cast: Autocast) -> None:
    """Rewards to first order against autograd in float64; the scale of the loss has no part in them."""
    found = []
    for scale in (2.0 ** 6, 2.0 ** 10):
        task = cast.case.task('taylor')
        cast.step(task, cast.scaler(scale))
        result = cast.step(task, cast.scaler(scale))
        found.append(result['reward'])
    expected = cast.case.first_order_rewards(result['probed'])
    errors = [_relative(each, expected, result['right']) for each in found]
    if any(each.isnan().any() for each in found):
        raise AssertionError('rewards are missing')
    record.near(f'{cast.name}.reward.taylor', max(errors), TAYLOR[cast.dtype], scales=[2 ** 6, 2 ** 10])


def check_gradient(record: Record, cast: Autocast) -> None:
    """The backbone learns what it learns in plain training under the same autocast."""
    plain = ClassificationTask(copy.deepcopy(cast.case.model), device=cast.case.device, verbose=False)
    task = cast.case.task('split')
    for each in (plain, task):
        cast.step(each, cast.scaler())
    expected = gradients_of(plain.get_trainable_module())
    found = gradients_of(task.get_trainable_module())
    within = tuple(f'{name}.' for name in cast.case.sites)
    names = [name for name in expected if not name.startswith(within)]
    error = length(found[name] - expected[name] for name in names) / length(expected[name] for name in names)
    record.near(f'{cast.name}.gradient.backbone', error, GRADIENT)


def check_critic(record: Record, cast: Autocast) -> None:
    """The critic reads in float32 what the network computed in less; its weights and gradients are float32."""
    full = cast.case.step(cast.case.task('exact'))['quality']
    task = cast.case.task('exact')
    found = cast.step(task)['quality']
    critic = task.get_trainable_module().critic
    types = {tensor.dtype for p in critic.parameters() for tensor in (p, p.grad)} | {found.dtype}
    if types != {torch.float32}:
        raise AssertionError(f'dtypes {types}')
    record.near(f'{cast.name}.critic', largest(found, full), NOISE[cast.dtype])


def check_null(record: Record, cast: Autocast) -> None:
    """A pass that bypasses nothing repeats the judged one up to the precision."""
    with torch.autocast(cast.case.device.type, dtype=cast.dtype):
        errors = null_errors(cast.case, cast.case.task('exact'))
    record.near(f'{cast.name}.null', errors.square().mean().sqrt().item(), NOISE[cast.dtype], passes=len(errors))


def check_scaler(record: Record, cast: Autocast) -> None:
    """With a loss scaler a step is made, and one that overflows is not made by network and critic alike."""
    for what, scale in (('step', 2.0 ** 6), ('skip', 2.0 ** 40)):
        task, scaler = cast.case.task('split'), cast.scaler(scale)
        module = task.get_trainable_module()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        cast.step(task, scaler)
        scaler.step(optimizer)
        scaler.update()
        after = dict(module.named_parameters())
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        finite = all(p.isfinite().all() for p in after.values())
        if what == 'step':  # a bias of the critic may have a gradient of exactly zero
            value, limit = len(before) - len(moved), len(before) // 10  # that stayed
            ok = finite and value <= limit and any('critic' in name for name in moved)
        else:
            value, limit = len(moved), 0
            ok = finite and not moved and scaler.get_scale() == scale / 2
        record.add(
            f'{cast.name}.scaler.{what}', value=value, limit=limit, ok=ok, finite=finite, scale=scaler.get_scale())


def main(record: Record, device: torch.device, small: bool, dtype: torch.dtype) -> None:
    for attention in ATTENTION[:1] if small else ATTENTION:
        cast = Autocast(attention, device, small, dtype)
        if dtype == torch.float16:
            record.run([f'{attention}.scaler.{what}' for what in ('step', 'skip')], partial(check_scaler, record, cast))
        for probe in ('exact', 'split', 'float32'):
            record.run(f'{attention}.reward.{probe}', partial(check_reward, record, cast, probe))
        for what, check in (
            ('reward.taylor', check_taylor), ('gradient.backbone', check_gradient), ('critic', check_critic),
            ('null', check_null),
        ):
            record.run(f'{attention}.{what}', partial(check, record, cast))
