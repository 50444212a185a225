"""right.compiled: a compiled task has the rewards and gradients of an eager one"""
from functools import partial

import torch

from gpu_parts.case import Case, gradients_of, largest, length
from gpu_parts.record import Record
from gpu_parts.table import compiled_pairs

__all__ = ['main']

REWARD = 1e-4  # of a probability
GRADIENT = 1e-2  # of the gradient's length


def check(record: Record, attention: str, probe: str, device: torch.device, small: bool) -> None:
    """Two steps of both: 'taylor' has its rewards in the second."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = 'aot_eager' if small else 'inductor'  # which takes a minute on two CPU cores
    case = Case(attention, device, small=True)  # what is compiled is the same, and takes seconds
    found, rewards = {}, {}
    for kind in ('eager', 'compiled'):
        task = case.task(probe)
        if kind == 'compiled':
            task.compile(backend=backend)
        for _ in range(2):
            task.get_trainable_module().zero_grad()
            result = case.step(task)
            result['loss'].backward()
        found[kind], rewards[kind] = gradients_of(task.get_trainable_module()), result['reward']
    graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
    if not graphs:
        raise AssertionError('nothing was compiled')
    asked = ~rewards['eager'].isnan()
    if not torch.equal(asked, ~rewards['compiled'].isnan()) or not asked.any():
        raise AssertionError('other samples have a reward')
    prefix = f'{attention}.{probe}'
    record.near(
        f'{prefix}.reward', largest(rewards['compiled'][asked], rewards['eager'][asked]), REWARD,
        spread=rewards['eager'][asked].std().item(), backend=backend, graphs=graphs)
    whole = length(found['eager'].values())
    error = length(found['compiled'][name] - value for name, value in found['eager'].items())
    record.near(f'{prefix}.gradient', error / whole, GRADIENT, length=whole)


def main(record: Record, device: torch.device, small: bool) -> None:
    longest = 5.0
    for attention, probe in compiled_pairs(small):
        names, left = [f'{attention}.{probe}.{what}' for what in ('reward', 'gradient')], record.left
        record.run(names, partial(check, record, attention, probe, device, small), seconds=1.2 * longest)
        longest = max(longest, left - record.left)
