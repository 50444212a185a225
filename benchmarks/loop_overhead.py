"""Images a second of our train loop and of timm's, on the same plain run, measured in alternation

`dreal-timm train ... dreal.enabled=false` against timm_loop.py, which makes the calls of timm's train.py in its order
(timm's package does not ship that script). Both train epochs of the same network, from the same weights and through the
same loader, by turns; the ratio is the median over pairs of neighbouring epochs.
"""
import argparse
import copy
import logging
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import timm
import timm_loop
import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

import dreal_timm
from dreal_timm.data import prepare_digits
from dreal_timm.train import load_config
from dreal_timm.train.loop import train_one_epoch
from dreal_timm.train.runner import set_up


def seconds(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='dreal_se_resnet18')
    parser.add_argument('--size', type=int, default=32, help='side of the images, pixels')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--pairs', type=int, default=12, help='epochs of each loop')
    parser.add_argument('--workers', type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    print(f'command: {shlex.join(["python", *sys.argv])}')
    with tempfile.TemporaryDirectory() as folder:
        prepare_digits(f'{folder}/digits')
        state = set_up(load_config('quickstart', [
            f'data_dir={folder}/digits', f'output={folder}', 'dreal.enabled=false', f'model={args.model}',
            f'input_size=[1,{args.size},{args.size}]', f'batch_size={args.batch_size}', f'workers={args.workers}',
            'smoothing=0', 'sched=none',
        ]))
        device = state.accelerator.device
        where = torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'
        print(f'machine: {platform.machine()}, {where}')
        print(f'versions: torch {torch.__version__}, timm {timm.__version__}, dreal_timm {dreal_timm.__version__}')
        task = ClassificationTask(copy.deepcopy(state.model), device=device, verbose=False)
        optimizer = create_optimizer_v2(
            task.get_trainable_module(), 'sgd', lr=state.lr, weight_decay=state.config.weight_decay)
        loops: dict[str, Callable[[], object]] = {
            'timm': lambda: timm_loop.train_one_epoch(task, state.train_loader, optimizer),
            'dreal_timm': lambda: train_one_epoch(state, 0),
        }
        for loop in loops.values():  # warm-up
            seconds(loop)
        images = len(state.train_loader) * args.batch_size
        rates: dict[str, list[float]] = {name: [] for name in loops}
        for pair in range(args.pairs):
            for name in sorted(loops, reverse=bool(pair % 2)):  # the first of a pair takes turns
                rates[name].append(images / seconds(loops[name]))
    for name, values in rates.items():
        print(f'{name:10} {statistics.median(values):8.1f} images/s (median of {args.pairs} epochs, '
              f'{min(values):.1f} to {max(values):.1f})')
    ratios = [ours / theirs for ours, theirs in zip(rates['dreal_timm'], rates['timm'], strict=True)]
    spread = statistics.quantiles(ratios, n=4)
    print(f'ratio      {statistics.median(ratios):.3f} (quartiles {spread[0]:.3f} to {spread[2]:.3f})')


if __name__ == '__main__':
    main()
