"""right.distributed: DDP against a single process, and synchronised batch norm against the joined batch

One process over NCCL (over gloo on a CPU); two processes, which share the device, over gloo: NCCL takes a device once.
"""
import faulthandler
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch.multiprocessing import ProcessExitedException

from gpu_parts.case import Case, gradients_of, largest, length
from gpu_parts.record import Late, Record

__all__ = ['main']

REWARD = 1e-4  # of a probability
GRADIENT = {'one': 1e-3, 'two': 1e-3, 'sync_bn': 1e-2}  # of the gradient's length: in batch norms kinks move it
STATISTICS = 1e-4  # of a running mean or variance
NORMS = {'one': False, 'two': True, 'sync_bn': False}  # group norm: a part of a batch is normalised as the whole


def _case(kind: str, device: torch.device, small: bool) -> Case:
    if NORMS[kind] and not small:
        from networks import GROUP_NORM
        return Case('cbam', device, small, depth=18, norm_layer=GROUP_NORM)
    return Case('cbam', device, small, depth=18, **({'group_norm': True} if NORMS[kind] else {}))


def _answer(case: Case, kind: str, rank: int = 0, count: int = 1, wrapped: bool = False) -> dict[str, Any]:
    """Run a step on a share of the batch; return rewards, gradients and running statistics."""
    if kind == 'sync_bn' and wrapped:
        case.model = convert_sync_batchnorm(case.model)
    task = case.task('exact')
    if NORMS[kind]:  # what CBAM has in its spatial gates stays a batch norm: with fixed statistics
        for module in task.get_trainable_module().modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    if wrapped:
        task.prepare_distributed(device_ids=[case.device] if case.device.type == 'cuda' else None)
    share = slice(rank * len(case.input) // count, (rank + 1) * len(case.input) // count)
    case.input, case.target = case.input[share], case.target[share]
    result = case.step(task)
    result['loss'].backward()
    module = task.get_trainable_module()
    buffers = {
        name.removeprefix('module.'): value.double().cpu() for name, value in module.named_buffers()
        if 'running' in name}
    return {'reward': result['reward'].cpu(), 'gradient': gradients_of(module), 'statistics': buffers}


def _worker(
        rank: int,
        kind: str,
        backend: str,
        count: int,
        folder: str,
        device: torch.device,
        small: bool,
        seconds: float,
) -> None:
    faulthandler.dump_traceback_later(seconds, exit=True)
    if device.type == 'cuda':
        torch.cuda.set_device(0)
        device = torch.device('cuda', 0)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    else:
        torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f'file://{folder}/{kind}', rank=rank, world_size=count)
    try:
        if device.type == 'cuda' and backend == 'gloo':
            probe = torch.ones(1, device=device)
            dist.all_reduce(probe)
            if kind == 'sync_bn':
                dist.all_gather([torch.empty_like(probe) for _ in range(count)], probe)
    except RuntimeError as error:
        found: Any = f"gloo does not take CUDA tensors here: {' '.join(str(error).split())[:200]}"
    else:
        found = _answer(_case(kind, device, small), kind, rank, count, wrapped=True)
    torch.save(found, f'{folder}/{kind}-{rank}.pt')
    dist.destroy_process_group()


def check(record: Record, kind: str, device: torch.device, small: bool) -> None:
    """Hold what several processes have of a batch against what one has of it."""
    count = 1 if kind == 'one' else 2
    backend = 'nccl' if kind == 'one' and device.type == 'cuda' else 'gloo'
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(
                _worker, args=(kind, backend, count, folder, device, small, record.left), nprocs=count)
        except ProcessExitedException:
            if record.left < 2:
                raise Late from None
            raise
        parts = [torch.load(Path(folder, f'{kind}-{rank}.pt'), weights_only=True) for rank in range(count)]
    names = [f'{kind}.{what}' for what in ('gradient', 'reward')] + ['sync_bn.statistics'] * (kind == 'sync_bn')
    if isinstance(parts[0], str):
        record.absent(names, parts[0])
        return
    expected = _answer(_case(kind, device, small), kind)
    whole = length(expected['gradient'].values())
    errors = [
        length(part['gradient'][name] - value for name, value in expected['gradient'].items()) / whole
        for part in parts]
    facts = dict(backend=backend, processes=count)
    record.near(f'{kind}.gradient', max(errors), GRADIENT[kind], **facts)
    rewards = torch.cat([part['reward'] for part in parts])
    record.near(
        f'{kind}.reward', largest(rewards, expected['reward']), REWARD, spread=expected['reward'].std().item(), **facts)
    if kind == 'sync_bn':
        record.near('sync_bn.statistics', max(
            ((part['statistics'][name] - value).norm() / (value.norm() + 1e-4)).item()
            for part in parts for name, value in expected['statistics'].items()), STATISTICS, **facts)


def main(record: Record, device: torch.device, small: bool) -> None:
    for kind in NORMS:
        names = [f'{kind}.{what}' for what in ('gradient', 'reward')]
        if kind == 'sync_bn':
            if device.type != 'cuda':
                continue
            names.append('sync_bn.statistics')
        record.run(names, partial(check, record, kind, device, small), seconds=4 if small else 18)
