"""Where a step's time goes, plain and reinforced: FLOPs (the floor), and operations by the profiler

FLOPs of matrix products and convolutions are counted over a round of steps that visits every site, with all samples
right; their ratio to plain training's is what a probe would cost if nothing but arithmetic took time. Time is that of
the operations themselves, without their children, a step. Page faults are memory that the C library's allocator gave
back to the system at the end of a step, and gets again.
"""
import argparse
import copy
import resource
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import report
import step_time
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dreal_timm import DrealTask


def flops(stepper: step_time.Stepper, batch: tuple[torch.Tensor, torch.Tensor], steps: int) -> float:
    """Return the FLOPs of forward and backward, a step."""
    counter = FlopCounterMode(display=False)
    with counter:
        for _ in range(steps):
            stepper.step(batch)
    return counter.get_total_flops() / steps


def faults(stepper: step_time.Stepper, batch: tuple[torch.Tensor, torch.Tensor], steps: int) -> float:
    """Return the pages of memory that the system had to give the process, a step."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        stepper.step(batch)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps


def times(stepper: step_time.Stepper, batch: tuple[torch.Tensor, torch.Tensor], steps: int) -> dict[str, tuple]:
    """Return milliseconds and calls of each operation, a step."""
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if batch[0].is_cuda else [])
    with profile(activities=kinds) as recorded:
        for _ in range(steps):
            stepper.step(batch)
    # operations alone: on a GPU the kernels that they launch are events too, of the same time
    return {
        event.key: ((event.self_device_time_total if batch[0].is_cuda else event.self_cpu_time_total) / 1e3 / steps,
                    event.count / steps)
        for event in recorded.key_averages() if event.device_type == DeviceType.CPU
    }


def kernels(stepper: step_time.Stepper, batch: tuple[torch.Tensor, torch.Tensor], steps: int) -> dict[str, float]:
    """Return the milliseconds in which a GPU computes or copies, and its launches, a step."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            stepper.step(batch)
    ranges = [(event.time_range.start, event.time_range.end)
              for event in recorded.events() if event.device_type == DeviceType.CUDA]
    return {'kernel_ms': covered(ranges) / 1e3 / steps, 'launches': len(ranges) / steps}


def covered(ranges: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, float('-inf')
    for begin, finish in sorted(ranges):
        total += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return total


def extra(found: Mapping[str, tuple], plain: Mapping[str, tuple], top: int) -> list[tuple[float, str]]:
    """Return the operations that take most milliseconds more than in plain training, the most first."""
    more = ((found[key][0] - plain.get(key, (0.0, 0.0))[0], key) for key in found)
    return sorted(more, reverse=True)[:top]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='dreal_se_resnet50')
    parser.add_argument('--probes', nargs='+', choices=step_time.PROBES, default=list(step_time.PROBES))
    parser.add_argument('--size', type=int, default=96, help='side of the images, pixels')
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--top', type=int, default=12, help='operations to print')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path)
    args = parser.parse_args()
    vars(args).update(amp='none', channels_last=False, compile=False, probe_every=1)
    device = torch.device(args.device)
    header = report.begin(args, device)
    step_time.count_as_right(1.0)
    model = step_time.make_model(args.model)
    batch = step_time.make_batch(args, device)
    rows: list[dict[str, Any]] = []
    steps = 0
    measured: dict[str, tuple[float, float, dict]] = {}
    for probe in ('plain', *args.probes):
        stepper = step_time.Stepper(probe, copy.deepcopy(model), args, device)
        if isinstance(stepper.task, DrealTask):
            steps = step_time.round_length(stepper.task)
            step_time.visit_every_site(stepper.task, steps)
        for _ in range(max(steps, 2)):  # where a pass begins is found out when a site is met first
            stepper.step(batch)
        measured[probe] = flops(stepper, batch, max(steps, 1)), faults(stepper, batch, 4), times(stepper, batch, 4)
    base, _, plain = measured['plain']
    for probe, (count, pages, found) in measured.items():
        total = sum(value for value, _ in found.values())
        before = sum(value for value, _ in plain.values())
        floor = f'{count / 1e9:.1f} GFLOP a step, floor {count / base:.3f}'
        print(f'{probe:6} {floor}; {total:.0f} ms, {total / before:.3f}; {pages:.0f} page faults')
        zero = (0.0, 0.0)
        most = extra(found, plain, args.top)
        for milliseconds, key in most if probe != 'plain' else []:
            calls = f'{plain.get(key, zero)[1]:6.0f} calls, {found[key][1]:6.0f} now'
            print(f'    {milliseconds:+8.1f} ms  {key:45} {calls}')
        rows.append({
            'probe': probe, 'gflop': count / 1e9, 'floor': count / base, 'milliseconds': total,
            'ratio': total / before, 'page_faults': pages, 'operations': {key: found[key] for _, key in most},
        })
    report.write(args.output or report.RESULTS / f'profile-{device.type}.json', header, rows)


if __name__ == '__main__':
    main()
