"""cost: a step of each probe against plain training, by `step_time.py`, at the size of a real training"""
import argparse
import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import profile_step
import step_time
import torch

from dreal_timm import DrealTask
from gpu_parts.record import Late, Record
from gpu_parts.table import ATTENTION, PROBES, SHARES

__all__ = ['main']

# ratios to plain training's time that are to be reached, or 'floor' for that and a tenth of it; memory is one of all
TARGETS: dict[tuple[str, float, str], float | str] = {
    ('se', 1.0, 'taylor'): 1.03, ('se', 0.75, 'taylor'): 1.03, ('se', 0.75, 'split'): 1.20, ('se', 0.75, 'exact'): 1.60,
    ('se', 1.0, 'split'): 'floor', ('se', 1.0, 'exact'): 'floor', ('cbam', 1.0, 'taylor'): 1.05,
    ('cbam', 0.75, 'taylor'): 1.05, ('cbam', 0.75, 'split'): 1.30, ('cbam', 1.0, 'split'): 'floor',
    ('cbam', 1.0, 'exact'): 'floor',
}
ABOVE_FLOOR = 1.1
MEMORY = 1.05


def settings(device: torch.device, small: bool, compiled: bool = False) -> argparse.Namespace:
    """Return the settings of step_time.py."""
    return argparse.Namespace(
        size=32 if small else 224, batch_size=8 if small else 256,
        amp='bfloat16' if device.type == 'cuda' else 'none', channels_last=True, compile=compiled,
        probes=['taylor', 'split'] if compiled else list(PROBES), reid=False, probe_every=1,
        # a round visits each site once or twice; the first step of a shape is slow, and a round has all shapes
        steps=2 if small else 6, warm_up=1 if small else 6, rounds=1 if small else 3, seconds=None)


def network(attention: str, small: bool) -> str:
    return f"dreal_{attention}_resnet{18 if small else 50}"


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def no_trials() -> Iterator[None]:
    """Let cuDNN try no algorithms, which takes time and memory of its own."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@no_trials()
def floors(name: str, share: float, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return the FLOPs of each probe over plain training's: they do not depend on the batch, so that 16 images do."""
    args = copy.copy(args)
    # in float32: the first pass in low precision measures its noise as well
    args.batch_size, args.amp, args.compile = min(args.batch_size, 16), 'none', False
    step_time.count_as_right(share)
    model, batch, found = step_time.make_model(name), step_time.make_batch(args, device), {}
    for probe in ('plain', *args.probes):
        stepper = step_time.Stepper(probe, copy.deepcopy(model), args, device)
        steps = 1
        if isinstance(stepper.task, DrealTask):
            steps = args.steps or step_time.round_length(stepper.task)
            step_time.visit_every_site(stepper.task, steps)
        found[probe] = profile_step.flops(stepper, batch, steps)
    return {probe: value / found['plain'] for probe, value in found.items()}


@no_trials()
def peaks(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return the most memory, MiB, that a step of each task allocates, alone on the device."""
    found = {}
    for probe in ('plain', *args.probes):
        free()
        found[probe] = step_time.peak(name, probe, args, device)
    free()
    return found


def profile(name: str, probe: str, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return the operations that take most time beside plain training's, in milliseconds more a step."""
    batch, found = step_time.make_batch(args, device), {}
    for each in ('plain', probe):
        stepper = step_time.Stepper(each, step_time.make_model(name), args, device)
        for _ in range(2):
            stepper.step(batch)
        found[each] = profile_step.times(stepper, batch, 2)
    return {key: milliseconds for milliseconds, key in profile_step.extra(found[probe], found['plain'], 8)}


def halving(function: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """Call a function with these settings, and with half of the batch where the memory does not suffice."""
    while True:
        try:
            return function(args)
        except torch.cuda.OutOfMemoryError:
            if args.batch_size <= 32:
                raise
        free()
        args.batch_size //= 2
        print(f'  out of memory: a batch of {args.batch_size}', flush=True)


class Costs:
    """Measures, and remembers how long things take and how many images fit."""

    def __init__(self, record: Record, device: torch.device, small: bool):
        self.record = record
        self.device = device
        self.small = small
        self.round = 1.0  # seconds of a round of SE
        self.memory: dict[str, dict[str, float]] = {}
        self.batch: dict[str, int] = {}

    def measure(self, attention: str, share: float, compiled: bool, remaining: int) -> None:
        """Time one network with a share of right samples, and add its rows."""
        args = settings(self.device, self.small, compiled)
        args.batch_size = self.batch.get(attention, args.batch_size)
        name = network(attention, self.small)
        if attention not in self.memory and self.device.type == 'cuda':
            self.memory[attention] = halving(lambda args: peaks(name, args, self.device), args)
        floor = {} if compiled else floors(name, share, args, self.device)
        if not self.small and 2 * self.round > self.record.left:  # to warm up, and one
            raise Late
        args.seconds = self.record.left / remaining - self.round
        rows = halving(lambda args: step_time.measure_time(name, share, args, self.device), args)
        self.batch[attention] = args.batch_size
        if not compiled:
            self.round = max(self.round, sum(row['seconds']['median'] for row in rows) * rows[0]['steps_a_round'])
        memory = self.memory.get(attention, {})
        for row in rows:
            probe = row['probe']
            facts: dict[str, Any] = dict(
                images_s=round(args.batch_size / row['seconds']['median'], 1), ratio=row['ratio'],
                least=row['rounds']['min'], most=row['rounds']['max'], rounds=row['rounds']['n'],
                batch=args.batch_size)
            if floor:
                facts['floor'] = floor[probe]
            if memory and not compiled:
                facts.update(peak_mib=round(memory[probe]), memory_ratio=memory[probe] / memory['plain'])
            target = None if compiled else TARGETS.get((attention, share, probe))
            if target is not None and not self.small:
                target = floor[probe] * ABOVE_FLOOR if target == 'floor' else target
                facts.update(target=target, reached=row['ratio'] <= target)
                if not facts['reached'] and self.record.left > 4 * self.round:
                    facts['profile'] = profile(name, probe, args, self.device)
            self.record.add(f"{attention}.{'compiled' if compiled else 'eager'}.{share:.0%}.{probe}", ok=None, **facts)
        free()


def main(record: Record, device: torch.device, small: bool) -> None:
    if device.type == 'cuda':  # as timm's train.py
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    costs = Costs(record, device, small)
    order = [('se', share, False) for share in SHARES] + [(name, 1.0, False) for name in ATTENTION[1:]]
    order += [('se', 1.0, True)] + [(name, 0.75, False) for name in ATTENTION[1:]]
    for index, (attention, share, compiled) in enumerate(order):
        kind = 'compiled' if compiled else 'eager'
        probes = ('plain', 'taylor', 'split') if compiled else ('plain', *PROBES)
        names = [f'{attention}.{kind}.{share:.0%}.{probe}' for probe in probes]
        if small and (compiled or (share < 1 and attention != 'se')):
            continue
        # compilation takes a minute
        seconds = 1.0 if small else 75.0 if compiled else 3 * costs.round
        record.run(names, partial(costs.measure, attention, share, compiled, len(order) - index), seconds=seconds)
        torch._dynamo.reset()
