"""cost.eager, cost.compiled: steps of each probe against plain ones, by `step_time.py`, at the size of a training"""
import argparse
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import gpu_floors
import profile_step
import step_time
import torch

from dreal_timm import DrealTask
from gpu_parts.record import Record
from gpu_parts.table import PROBES, costs

__all__ = ['main']

# ratios to plain training's time that are to be reached, or 'floor' for that and a tenth of it
TARGETS: dict[tuple[str, float, str], float | str] = {
    ('se', 1.0, 'taylor'): 1.03, ('se', 0.75, 'taylor'): 1.03, ('se', 0.75, 'split'): 1.20, ('se', 0.75, 'exact'): 1.60,
    ('se', 1.0, 'split'): 'floor', ('se', 1.0, 'exact'): 'floor', ('cbam', 1.0, 'taylor'): 1.05,
    ('cbam', 0.75, 'taylor'): 1.05, ('cbam', 0.75, 'split'): 1.30, ('cbam', 1.0, 'split'): 'floor',
    ('cbam', 1.0, 'exact'): 'floor',
}
ABOVE_FLOOR = 1.1
MEMORY = 1.05  # peak, over that of plain training


def settings(device: torch.device, small: bool, compiled: bool = False) -> argparse.Namespace:
    """Return the settings of step_time.py."""
    return argparse.Namespace(
        size=32 if small else 224, batch_size=8 if small else 256,
        amp='bfloat16' if device.type == 'cuda' else 'none', channels_last=True, compile=compiled,
        probes=['taylor', 'split'] if compiled else list(PROBES), reid=False, probe_every=1,
        # a round visits each site once or twice; the first step of a shape is slow, and a round has all shapes
        steps=2 if small else gpu_floors.STEPS, warm_up=1 if small else 2 if compiled else gpu_floors.STEPS,
        rounds=1 if small else 3, seconds=None)


def network(attention: str, small: bool) -> str:
    return f"dreal_{attention}_resnet{18 if small else 50}"


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def no_trials() -> Iterator[None]:
    """Let cuDNN try no algorithms, which takes memory of its own."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@no_trials()
def peaks(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return the most memory, MiB, that a step of each task allocates, alone on the device.

    To be called after the steps were timed: without trials cuDNN keeps what it guesses for a shape, also for later.
    """
    found = {}
    for probe in ('plain', *args.probes):
        free()
        found[probe] = step_time.peak(name, probe, args, device)
    free()
    return found


def kernels(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Return the time of the kernels of a step of each task, and its launches, over a round that visits every site.

    Where launching takes longer than computing, a step's time is that of the host, and this is what is left of the cost
    on a faster one.
    """
    found, batch = {}, step_time.make_batch(args, device)
    for probe in ('plain', *args.probes):
        free()
        stepper = step_time.Stepper(probe, step_time.make_model(name), args, device)
        if isinstance(stepper.task, DrealTask):
            step_time.visit_every_site(stepper.task, args.steps)
        for _ in range(args.steps):
            stepper.step(batch)
        found[probe] = profile_step.kernels(stepper, batch, args.steps)
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
    """Measures, and remembers how long a round takes and how many images fit."""

    def __init__(self, record: Record, device: torch.device, small: bool):
        self.record = record
        self.device = device
        self.small = small
        self.round = 1.0  # seconds
        self.memory: dict[str, dict[str, float]] = {}
        self.kernels: dict[str, dict[str, dict[str, float]]] = {}
        self.batch: dict[str, int] = {}
        self.missed: list[tuple[str, str, argparse.Namespace]] = []

    def measure(self, attention: str, share: float, compiled: bool, remaining: int) -> None:
        """Time one network with a share of right samples, and add its rows."""
        args = settings(self.device, self.small, compiled)
        args.batch_size = self.batch.get(attention, args.batch_size)
        name = network(attention, self.small)
        # one round to warm up, and what memory takes
        args.seconds = self.record.left / remaining - (self.round if remaining > 1 else 0)
        rows = halving(lambda args: step_time.measure_time(name, share, args, self.device), args)
        self.batch[attention] = args.batch_size
        self.round = max(self.round, sum(row['seconds']['median'] for row in rows) * rows[0]['steps_a_round'])
        free()
        if self.device.type == 'cuda' and not compiled and attention not in self.memory:
            self.kernels[attention] = kernels(name, args, self.device)
            self.memory[attention] = peaks(name, args, self.device)  # the last: it turns trials off
        for row in rows:
            self.add(row, attention, share, compiled, args)

    def add(self, row: dict[str, Any], attention: str, share: float, compiled: bool, args: argparse.Namespace) -> None:
        """Add a row, with its floor, its memory and whether it reaches what is to be reached."""
        probe, memory = row['probe'], self.memory.get(attention, {})
        facts: dict[str, Any] = dict(
            images_s=round(args.batch_size / row['seconds']['median'], 1), ratio=row['ratio'],
            least=row['rounds']['min'], most=row['rounds']['max'], rounds=row['rounds']['n'], batch=args.batch_size)
        if share == 1.0 and attention in self.kernels:
            own, plain = self.kernels[attention][probe], self.kernels[attention]['plain']
            facts.update(own, kernel_ratio=own['kernel_ms'] / plain['kernel_ms'])
        if memory:
            facts.update(peak_mib=round(memory[probe]), memory_ratio=memory[probe] / memory['plain'])
            facts['memory_reached'] = facts['memory_ratio'] <= MEMORY
        if not self.small:
            facts['floor'] = floor = gpu_floors.read(attention, probe, share)
            target = None if compiled else TARGETS.get((attention, share, probe))
            if target is not None:
                facts['target'] = limit = floor * ABOVE_FLOOR if isinstance(target, str) else target
                facts['reached'] = row['ratio'] <= limit
                if not facts['reached']:
                    self.missed.append((attention, probe, args))
        self.record.add(f'{attention}.{share:.0%}.{probe}', ok=None, **facts)

    def explain(self) -> None:
        """Profile what is missed, once a probe of a network."""
        done = set()
        for attention, probe, args in self.missed:
            if (attention, probe) not in done and self.record.left > 10:
                done.add((attention, probe))
                found = profile(network(attention, self.small), probe, args, self.device)
                self.record.add(f'{attention}.{probe}.profile', ok=None, milliseconds=found)
                free()


def main(record: Record, device: torch.device, small: bool, compiled: bool) -> None:
    if device.type == 'cuda':  # as timm's train.py
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    costing = Costs(record, device, small)
    if compiled:
        names = [f'se.100%.{probe}' for probe in ('plain', 'taylor', 'split')]
        record.run(names, partial(costing.measure, 'se', 1.0, True, 1))
        return
    order = costs(small)
    for index, (attention, share) in enumerate(order):
        names = [f'{attention}.{share:.0%}.{probe}' for probe in ('plain', *PROBES)]
        seconds = 1.0 if small else 2.5 * costing.round  # to warm up, and one
        record.run(names, partial(costing.measure, attention, share, False, len(order) - index), seconds=seconds)
    record.run([], costing.explain)
