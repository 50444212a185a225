"""loop: our train loop on tensors that are on the device, against timm's order of calls, and what it waits for"""
import copy
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import step_time
import torch
from profile_step import covered
from small_run import recipe, write_images
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm_loop import train_one_epoch as timm_epoch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dreal_timm.train import load_config
from dreal_timm.train.loop import Run, fit, train_one_epoch
from dreal_timm.train.setup import set_up
from gpu_parts.record import Record

__all__ = ['main']

TASKS = ('plain', 'taylor', 'split', 'exact')
SYNCS = {'plain': 0, 'taylor': 0, 'split': 0, 'exact': 1}  # a step, at most


class Batches:
    """A loader of one batch on the device, again and again."""

    dataset = sampler = batch_sampler = None

    def __init__(self, batch: tuple[torch.Tensor, torch.Tensor], steps: int):
        self.batch = batch
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(self.steps):
            yield self.batch


class Watched(Batches):
    """The same, with torch's watch over host syncs on from the second step to the last but one."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in range(self.steps):
            torch.cuda.set_sync_debug_mode('warn' if 0 < index < self.steps - 1 else 'default')
            yield self.batch


def prepare(folder: str, batch: int) -> None:
    """Write the images of the recipe: it opens them, and a batch must be there, whatever the loader then gives."""
    write_images(Path(folder, 'images'), train=-(-batch // 3))  # of each of three classes


def start(kind: str, folder: str, loader: Batches, small: bool, device: torch.device) -> Run:
    """Return a run of a recipe whose images are those of the loader."""
    size = loader.batch[0].shape[-1]
    model: dict[str, Any] = {} if small else {
        'model': 'dreal_se_resnet50', 'model_kwargs': {'zero_init_last': False}}
    cuda: dict[str, Any] = {'amp': True, 'amp_dtype': 'bfloat16', 'device': None} if device.type == 'cuda' else {}
    run = set_up(load_config(recipe(
        Path(folder, 'images'), Path(folder, kind), **model, **cuda, input_size=[3, size, size], mean=[0.5] * 3,
        std=[0.5] * 3, batch_size=len(loader.batch[0]), channels_last=True, val_split='', epochs=1,
        log_interval=10 ** 6, lr=0.01, sched='none',
        dreal={'enabled': kind != 'plain', **({} if kind == 'plain' else {'probe': kind})})))
    run.directory.mkdir(parents=True, exist_ok=True)
    run.train_loader = loader
    return run


def _caller() -> str:
    frames = [frame for frame in traceback.extract_stack() if '/dreal_timm/' in frame.filename]
    return f'{Path(frames[-1].filename).name}:{frames[-1].lineno}' if frames else 'elsewhere'


def check_syncs(record: Record, run: Run, kind: str, steps: int = 6) -> None:
    """Count what the host waits for in the steps of an epoch but the first, and the last, which prints."""
    found: list[str] = []

    def show(message: Any, *args: Any, **kwargs: Any) -> None:
        if 'called a synchronizing' in str(message):
            found.append(_caller())

    loader = run.train_loader
    run.train_loader = Watched(loader.batch, steps)
    torch.cuda.set_sync_debug_mode('default')  # the first call warns that the watch is a prototype
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('always')
            warnings.showwarning = show
            torch.cuda.set_sync_debug_mode('warn')
            torch.ones(1, device=loader.batch[0].device).item()
            if not found:
                raise AssertionError('the watch does not see a sync')
            found.clear()
            train_one_epoch(run, 0)
    finally:
        torch.cuda.set_sync_debug_mode('default')
        run.train_loader = loader
    record.near(f'{kind}.syncs', len(found) / (steps - 2), SYNCS[kind], where=sorted(set(found)))


def measure_idle(record: Record, run: Run, kind: str) -> None:
    """Share of an epoch's time in which no kernel and no copy runs."""
    loader = run.train_loader
    run.train_loader = Batches(loader.batch, 4)  # a step has thousands of kernels
    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            started = time.perf_counter()
            train_one_epoch(run, 0)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
    finally:
        run.train_loader = loader
    ranges = [(event.time_range.start, event.time_range.end)
              for event in recorded.events() if event.device_type == DeviceType.CUDA]
    if not ranges:
        raise AssertionError('the profiler saw no kernel')
    share = 1 - covered(ranges) / 1e6 / seconds
    record.add(f'{kind}.idle', ok=None, share=share, kernels_a_step=len(ranges) // 4)


def measure_timm(record: Record, run: Run, images: int) -> float:
    """Return images a second of timm's order of calls, on the same network and batches."""
    device = run.accelerator.device
    task = ClassificationTask(copy.deepcopy(run.model), device=device, verbose=False)
    optimizer = create_optimizer_v2(task.get_trainable_module(), 'sgd', lr=0.01, weight_decay=run.config.weight_decay)
    dtype = torch.bfloat16 if run.config.amp else None
    timm_epoch(task, run.train_loader, optimizer, amp_dtype=dtype)
    started = time.perf_counter()
    timm_epoch(task, run.train_loader, optimizer, amp_dtype=dtype)
    rate = images / (time.perf_counter() - started)
    record.add('timm.images', ok=None, images_s=round(rate, 1))
    return rate


def main(record: Record, device: torch.device, small: bool) -> None:
    batch, size, steps = (8, 32, 4) if small else (256, 224, 8)
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    step_time.count_as_right(1.0)  # the most expensive case, and shapes stay while the network learns the batch
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    loader = Batches((images, torch.randint(3, (batch,), device=device)), steps)
    rates: dict[str, float] = {}
    longest = 0.0

    def measure(kind: str, run: Run) -> None:
        """The first epoch, of `fit`, once its kernels are chosen."""
        train_one_epoch(run, 0)
        fit(run)
        rate = batch * steps / run.record.epochs[0]['seconds']
        over = {'over_timm': rate / rates['timm']} if rates else {}  # that of timm may have failed
        record.add(f'{kind}.images', ok=None, images_s=round(rate, 1), batch=batch, **over)

    def one(kind: str, folder: str) -> None:
        run = start(kind, folder, loader, small, device)
        if kind == 'plain':
            rates['timm'] = measure_timm(record, run, batch * steps)
        record.run(f'{kind}.images', partial(measure, kind, run))
        if device.type == 'cuda':
            record.run(f'{kind}.syncs', partial(check_syncs, record, run, kind), seconds=3)
            record.run(f'{kind}.idle', partial(measure_idle, record, run, kind), seconds=5)

    with tempfile.TemporaryDirectory() as folder:
        prepare(folder, batch)
        for kind in TASKS:
            names, left = _names(kind, device), record.left
            record.run(names, partial(one, kind, folder), seconds=max(5.0, longest))
            longest = max(longest, left - record.left)


def _names(kind: str, device: torch.device) -> list[str]:
    names = ['timm.images'] * (kind == 'plain') + [f'{kind}.images']
    return names + [f'{kind}.{what}' for what in ('syncs', 'idle')] * (device.type == 'cuda')
