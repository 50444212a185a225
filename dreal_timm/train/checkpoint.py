"""Checkpoints in timm's layout, written so that a broken write never replaces a good file"""
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask

__all__ = ['BEST', 'LAST', 'save_checkpoint']

LAST = 'last.pth.tar'
BEST = 'model_best.pth.tar'


def save_checkpoint(
        directory: Path,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        args: dict[str, Any],
        metric: float | None = None,
        is_best: bool = False,
) -> None:
    """Write `last.pth.tar`, and `model_best.pth.tar` too if this is the best epoch so far.

    `state_dict` holds the plain network; the critic is in `task_state`. All values are tensors or plain values.

    Args:
        directory: Folder of the run.
        task: The task.
        optimizer: Its optimizer.
        epoch: Number of the epoch that ended.
        args: The run's configuration.
        metric: Value of the metric that the best checkpoint is chosen by.
        is_best: Whether this is the best epoch so far.
    """
    state = {
        'epoch': epoch,
        'arch': args['model'],
        'args': args,
        'optimizer': optimizer.state_dict(),
        'version': 2,
        'metric': metric,
        **task.get_checkpoint_state(),
    }
    scratch = directory / f'{LAST}.tmp'
    torch.save(state, scratch)
    if is_best:
        shutil.copyfile(scratch, directory / f'{BEST}.tmp')
        os.replace(directory / f'{BEST}.tmp', directory / BEST)
    os.replace(scratch, directory / LAST)
