"""What reinforcement costs: time and peak memory of a training step with each probe, against plain training

Tasks train networks of their own from the same weights, on the same images, and take turns step by step. A round visits
every site of a group once (where the groups' lengths allow it). The time of a round is the sum of its steps' medians
over all rounds, and a ratio is that to plain training's; beside it stand the least and the most of single rounds. On a
CPU the C library is told to keep the memory that it has: it would hand pages back and get them again, in one task and
not in the next, as the history of the process has it (`--no-keep-memory` lets it). Which samples count as right is set
by hand: all of them, the most expensive case, and a share of them. Memory is measured in processes of their own: on a
GPU the most that was allocated after warm-up, on a CPU the most resident memory less what was resident before the
network was built.
"""
import argparse
import copy
import ctypes
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import report
import timm
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, TrainingTask

import dreal_timm.probes.base
import dreal_timm.probes.counterfactual
import dreal_timm.probes.taylor
from dreal_timm import DrealTask
from dreal_timm.attention.sites import Site
from dreal_timm.models.reid import ReidNetwork
from dreal_timm.probes.counterfactual import CounterfactualProbe
from dreal_timm.probes.passes import RecordedPass
from dreal_timm.probes.restart import Restart
from dreal_timm.reid import IdentityLoss

PROBES = ('exact', 'split', 'taylor')
DTYPES = {'none': None, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def count_as_right(share: float) -> None:
    """Let so many of a batch's samples count as right, whatever the network says of them."""
    def is_correct(log_probs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(target), device=target.device) < round(share * len(target))

    dreal_timm.probes.base.is_correct = is_correct
    dreal_timm.probes.counterfactual.is_correct = is_correct
    dreal_timm.probes.taylor.is_correct = is_correct


def keep_memory() -> None:
    """Let the C library (glibc) neither map blocks of their own nor hand memory back to the system."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)


def begin_at(place: str) -> None:
    """Let counterfactual passes begin at the sites ('site'), at the blocks around them, or with the images."""
    restart = CounterfactualProbe.restart

    def changed(self: CounterfactualProbe, recorded: RecordedPass, site: Site) -> Restart | None:
        found = restart(self, recorded, site)
        return None if found is None or place == 'image' else found.within() if place == 'block' else found

    setattr(CounterfactualProbe, 'restart', changed)  # noqa: B010 (mypy allows no assignment to a method)


def visit_every_site(task: DrealTask, steps: int) -> None:
    """Let the draws of a round visit the sites of each group equally often, or as nearly as can be."""
    rotation = task._trainable.rotation
    lengths = [length for _, length in rotation.groups]

    def draw() -> list[int]:
        return [(rotation.step % steps) * length // steps for length in lengths]

    setattr(rotation, 'draw', draw)  # noqa: B010 (mypy allows no assignment to a method)


def round_length(task: DrealTask) -> int:
    """Steps that visit every site equally often, or those of the longest group where that is too many."""
    lengths = [len(group.sites) for group in task.groups]
    common = math.lcm(*lengths)
    return common if common <= 24 else max(lengths)


class Stepper:
    """A task and all that one of its steps needs."""

    def __init__(self, name: str, model: torch.nn.Module, args: argparse.Namespace, device: torch.device):
        model = model.to(device)
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        loss = IdentityLoss(model).to(device) if isinstance(model, ReidNetwork) else None
        if name == 'plain':
            self.task: TrainingTask = ClassificationTask(model, loss, device=device, verbose=False)
        else:
            self.task = DrealTask(
                model, loss, device=device, verbose=False, input_size=image_size(args), probe=name, rotate='step',
                probe_every=args.probe_every,
            )
        if args.compile:
            self.task.compile(backend='inductor')
        if dist.is_initialized():
            self.task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None)
        module = self.task.get_trainable_module()
        self.optimizer = create_optimizer_v2(module, 'sgd', lr=0.01, momentum=0.9)
        module.train()
        self.device = device
        dtype = DTYPES[args.amp]
        self.autocast: Callable[[], Any] = (
            nullcontext if dtype is None else lambda: torch.autocast(device.type, dtype=dtype))
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Run one step and return its seconds."""
        start = time.perf_counter()
        with self.autocast():
            loss = self.task(*batch)['loss']
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter() - start


def make_batch(args: argparse.Namespace, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(args.batch_size, *image_size(args), device=device)
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    if getattr(args, 'reid', False):  # P x K
        return images, torch.arange(args.batch_size, device=device) // min(8, args.batch_size // 2)
    return images, torch.randint(100, (args.batch_size,), device=device)


def image_size(args: argparse.Namespace) -> tuple[int, int, int]:
    return 3, args.size, args.size // 3 if getattr(args, 'reid', False) else args.size


def make_model(name: str, reid: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {'zero_init_last': False}
    if reid:
        return timm.create_model('dreal_reid', backbone=name, num_classes=751, backbone_args=options)
    return timm.create_model(name, num_classes=100, **options)


def measure_time(name: str, share: float, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time rounds of all tasks, in alternation."""
    count_as_right(share)
    model = make_model(name, args.reid)
    steppers = {probe: Stepper(probe, copy.deepcopy(model), args, device) for probe in ('plain', *args.probes)}
    reinforced = [s.task for s in steppers.values() if isinstance(s.task, DrealTask)]
    steps = args.steps or round_length(reinforced[0])
    for task in reinforced:
        visit_every_site(task, steps)
    batch = make_batch(args, device)
    for _ in range(args.warm_up):
        for stepper in steppers.values():
            stepper.step(batch)
    for task in reinforced:
        task._trainable.rotation.step = 0
    seconds: dict[str, list[list[float]]] = {probe: [] for probe in steppers}  # of rounds, of steps
    started = time.perf_counter()
    for done in range(args.rounds):
        spent = time.perf_counter() - started
        if args.seconds and done and spent * (done + 1) / done > args.seconds:  # another one would not end in time
            break
        for times in seconds.values():
            times.append([])
        for index in range(steps):
            order = list(steppers)
            for probe in order[index % len(order):] + order[:index % len(order)]:
                seconds[probe][-1].append(steppers[probe].step(batch))
    rows = []
    for probe, times in seconds.items():
        ratios = [sum(mine) / sum(plain) for mine, plain in zip(times, seconds['plain'], strict=True)]
        rows.append({
            'model': name, 'probe': probe, 'right': share, 'steps_a_round': steps,
            'seconds': report.spread([value for row in times for value in row]),
            'ratio': typical_round(times) / typical_round(seconds['plain']), 'rounds': report.spread(ratios),
        })
    return rows


def typical_round(times: list[list[float]]) -> float:
    """Sum up the medians, over the rounds, of the steps at one place of a round."""
    return sum(statistics.median(step) for step in zip(*times, strict=True))


def resident() -> float:
    """Resident memory of this process now, MiB."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def peak(name: str, probe: str, args: argparse.Namespace, device: torch.device) -> float:
    """Return the peak memory, MiB, of a few steps in this process."""
    count_as_right(1.0)
    before = resident()
    stepper = Stepper(probe, make_model(name, args.reid), args, device)
    batch = make_batch(args, device)
    for index in range(4):
        if device.type == 'cuda' and index == 2:
            torch.cuda.reset_peak_memory_stats()
        stepper.step(batch)
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def measure_memory(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory, MiB, of each task in a process of its own, the median of three."""
    peaks = {}
    for probe in ('plain', *args.probes):
        command = [sys.executable, *sys.argv, '--only', name, probe]
        values = [
            float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
            for _ in range(args.memory)
        ]
        peaks[probe] = statistics.median(values)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=['dreal_se_resnet50'])
    parser.add_argument('--probes', nargs='+', choices=PROBES, default=list(PROBES))
    parser.add_argument('--size', type=int, default=96, help='side of the images, pixels')
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--right', nargs='+', type=float, default=[1.0, 0.75], help='shares of right samples')
    parser.add_argument('--reid', action='store_true', help='re-identification: size x size / 3 pixels, triplets')
    parser.add_argument('--probe-every', type=int, default=1)
    parser.add_argument('--begin', choices=('site', 'block', 'image'), default='site', help='of counterfactual passes')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--seconds', type=float, help='no further round that would end later')
    parser.add_argument('--steps', type=int, help='steps of a round; as many as visit every site')
    parser.add_argument('--warm-up', type=int, default=2)
    parser.add_argument('--memory', type=int, default=3, help='processes whose peak is taken; 0 measures none')
    parser.add_argument('--amp', choices=DTYPES, default='none')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--keep-memory', action=argparse.BooleanOptionalAction, default=True, help='of the C library')
    parser.add_argument('--threads', type=int, help='CPU threads')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path)
    parser.add_argument('--only', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    begin_at(args.begin)
    if args.only:
        print(peak(args.only[0], args.only[1], args, device))
        return
    if args.keep_memory and device.type == 'cpu':  # not where the peak is measured
        keep_memory()
    header = report.begin(args, device)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        memory = measure_memory(name, args) if args.memory else {}
        for share in args.right:
            for row in measure_time(name, share, args, device):
                if memory:
                    row['peak_mib'] = memory[row['probe']]
                    row['memory_ratio'] = memory[row['probe']] / memory['plain']
                rows.append(row)
                text = f"{name} {row['probe']:6} right {share:.0%}  {report.tell(row['seconds'])} s"
                text += f"  ratio {row['ratio']:.3f} ({row['rounds']['min']:.3f} to {row['rounds']['max']:.3f})"
                if memory:
                    text += f"  {row['peak_mib']:.0f} MiB, {row['memory_ratio']:.3f}"
                print(text, flush=True)
    kind = f'{device.type}-{args.amp}' + '-compiled' * args.compile + '-reid' * args.reid
    report.write(args.output or report.RESULTS / f'step_time-{kind}.json', header, rows)


if __name__ == '__main__':
    main()
