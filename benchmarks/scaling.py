"""How the cost of reinforcement grows: with depth, image size, batch and number of processes

One of them is varied at a time, around SE-ResNet-50 at 96 pixels and 16 images; each point is the time of a round of
steps that visits every site, as a ratio to plain training's (see step_time.py). Several processes are
started by torchrun, over gloo on a CPU and NCCL on GPUs, each with its own batch.
"""
import argparse
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import report
import step_time
import torch
import torch.distributed as dist

DEPTHS = (18, 34, 50, 101, 152)
SIZES = (32, 64, 96, 128, 160, 224)
BATCHES = (8, 16, 32, 64)


def point(args: argparse.Namespace, device: torch.device, **changed: Any) -> list[dict[str, Any]]:
    """Measure one point."""
    local = copy.copy(args)
    model = f"dreal_{args.attention}_resnet{changed.get('depth', 50)}"
    local.size = changed.get('size', args.size)
    local.batch_size = changed.get('batch_size', args.batch_size)
    rows = step_time.measure_time(model, 1.0, local, device)
    return [{**changed, **row} for row in rows if row['probe'] != 'plain']


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        where = ', '.join(f'{name} {row[name]}' for name in ('depth', 'size', 'batch_size', 'processes') if name in row)
        print(f"{where}: {row['probe']:6} ratio {row['ratio']:.3f}", flush=True)


def several(args: argparse.Namespace, processes: int) -> list[dict[str, Any]]:
    """Start processes that measure with DDP; the first one's numbers come back."""
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}', __file__,
        '--worker', '--rounds', str(args.rounds), '--attention', args.attention, '--size', str(args.size),
        '--batch-size', str(args.batch_size), '--device', args.device, '--steps', str(args.steps or 6),
        '--probes', *args.probes,
    ]
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def worker(args: argparse.Namespace) -> None:
    """Be one of several processes."""
    torch.set_num_threads(1)
    if args.device == 'cpu':
        step_time.keep_memory()
    device = torch.device(args.device)
    if device.type == 'cuda':
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        torch.cuda.set_device(device)
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    rows = point(args, device, processes=dist.get_world_size())
    if dist.get_rank() == 0:
        print(json.dumps(rows), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's teardown may wait for ever in older versions of torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--vary', nargs='+', choices=('depth', 'size', 'batch', 'processes'),
                        default=['depth', 'size', 'batch', 'processes'])
    parser.add_argument('--attention', choices=('se', 'cbam', 'srm'), default='se')
    parser.add_argument('--probes', nargs='+', choices=step_time.PROBES, default=list(step_time.PROBES))
    parser.add_argument('--size', type=int, default=96, help='side of the images, pixels')
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--processes', nargs='+', type=int, default=[1, 2])
    parser.add_argument('--rounds', type=int, default=1)
    parser.add_argument('--steps', type=int, help='steps of a round; as many as visit every site')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path)
    parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    # what step_time.py wants to know beside
    vars(args).update(amp='none', channels_last=False, compile=False, probe_every=1, warm_up=1)
    if args.worker:
        worker(args)
        return
    device = torch.device(args.device)
    if device.type == 'cpu':
        step_time.keep_memory()
    header = report.begin(args, device)
    rows: list[dict[str, Any]] = []
    points = {
        'depth': [dict(depth=depth) for depth in DEPTHS],
        'size': [dict(size=size) for size in SIZES],
        'batch': [dict(batch_size=size) for size in BATCHES],
    }
    for axis in args.vary:
        if axis == 'processes':
            found = [several(args, processes) for processes in args.processes]
        else:
            found = [point(args, device, **changed) for changed in points[axis]]
        for new in found:
            show(new)
            rows += [{'axis': axis, **row} for row in new]
    report.write(args.output or report.RESULTS / f'scaling-{args.attention}-{device.type}.json', header, rows)


if __name__ == '__main__':
    main()
