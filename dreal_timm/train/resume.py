"""Going on from a checkpoint: which one, whether it fits, and what is put back"""
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask

from dreal_timm.errors import WeightsError, reason
from dreal_timm.hub.damage import check_damage
from dreal_timm.hub.loading import read_checkpoint
from dreal_timm.task import DrealTask
from dreal_timm.train.checkpoint import LAST, kept_checkpoints
from dreal_timm.train.settings import TrainConfig

__all__ = [
    'check_folder', 'is_last_of', 'load_checkpoint', 'restore', 'restore_scheduler', 'resume_path', 'scheduler_state',
]


_logger = logging.getLogger(__name__)


def _problem(path: Path) -> str:
    """Return why a checkpoint of a run cannot be gone on from, or nothing."""
    if not zipfile.is_zipfile(path):
        return f"'{path}' is broken or no checkpoint of PyTorch."
    try:
        check_damage(path)
    except WeightsError as error:
        return str(error)
    return ''


def resume_path(config: TrainConfig, directory: Path) -> Path | None:
    """Return the checkpoint that the recipe resumes from, or None to start anew; the first process alone calls this.

    'auto' is the last checkpoint of the folder; where there is none, the newest one that is whole.

    Raises:
        FileNotFoundError: No such file.
        WeightsError: The last checkpoint is damaged, or there is none and no other is whole.
    """
    if not config.resume:
        return None
    if config.resume != 'auto':
        if not Path(config.resume).is_file():
            raise FileNotFoundError(f"resume: no file '{config.resume}'.")
        check_damage(config.resume)
        return Path(config.resume)
    last = directory / LAST
    kept = kept_checkpoints(directory) if directory.is_dir() else []
    if last.is_file():
        problem = _problem(last)
        if problem:
            newest = next((path for path in kept if not _problem(path)), None)
            todo = 'No other checkpoint of the run is whole.' if newest is None else (
                f"The newest that is whole is {newest.name}. To go on from it: mv '{last}' '{last}.damaged', and the "
                'same command again with resume=auto.')
            raise WeightsError(f'resume: {problem} {todo}')
        return last
    for path in kept:
        if not _problem(path):
            _logger.warning(f'{directory} has no {LAST}: going on from {path.name}, the newest that is whole.')
            return path
    if kept:
        raise WeightsError(
            f'resume: {directory} has no {LAST}, and none of its {len(kept)} other checkpoints is whole. To start '
            'anew, choose another experiment=NAME.')
    return None


def is_last_of(path: Path, directory: Path) -> bool:
    """Return whether a file is the last checkpoint of a folder."""
    return path.name == LAST and path.resolve().parent == directory.resolve()


def load_checkpoint(path: Path, config: TrainConfig) -> dict[str, Any]:
    """Load a training checkpoint, of this package or of timm's train.py.

    Raises:
        ValueError: The file is broken, is no training checkpoint, or is of another model.
    """
    try:
        checkpoint: dict[str, Any] = read_checkpoint(path, checked=True)
    except ValueError as error:
        raise ValueError(f'resume: {error}') from error
    keys = checkpoint if isinstance(checkpoint, dict) else {}
    needed = ('state_dict', 'epoch') if config.no_resume_opt else ('state_dict', 'optimizer', 'epoch')
    missing = [key for key in needed if key not in keys]
    if missing:
        raise ValueError(
            f"resume: '{path}' is no training checkpoint: it has no {', '.join(missing)}. To start from weights alone, "
            'use initial_checkpoint.'
        )
    if checkpoint.get('arch', config.model) != config.model:
        raise ValueError(f"resume: '{path}' is of {checkpoint['arch']}, the recipe trains {config.model}.")
    args = checkpoint.get('args')
    opt = args.get('opt') if isinstance(args, dict) else getattr(args, 'opt', None)
    if opt not in (None, config.opt) and not config.no_resume_opt:  # PyTorch lets the state of another one pass
        raise ValueError(f"resume: '{path}' has the state of {opt}, but opt is {config.opt}; add no_resume_opt=true.")
    return checkpoint


def check_folder(config: TrainConfig, path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Raise a ValueError if the files beside a checkpoint are not ranked as this run ranks its own."""
    problem = ''
    if 'history' not in checkpoint:
        problem = 'is not of this package'
    elif any(checkpoint['args'][key] != getattr(config, key) for key in ('eval_metric', 'val_split')):
        problem = 'ranked its epochs otherwise (eval_metric, val_split)'
    if problem:
        raise ValueError(f"resume: '{path}' {problem}: add experiment=NAME and resume={path} to go on in a new folder.")


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state; the options of the groups stay those of the recipe, the learning rate is the schedule's."""
    options: list[dict[str, Any]] = [
        {name: group[name] for name in ('weight_decay', 'momentum', 'betas', 'eps') if name in group}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, given in zip(optimizer.param_groups, options, strict=True):
        group.update(given)


def restore(
        checkpoint: Mapping[str, Any],
        path: Path,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer | None,
        scaler: Any = None,
) -> int:
    """Put model, critic, moving average, optimizer and loss scaler back, and return the number of the next epoch.

    Args:
        checkpoint: What `load_checkpoint` returned.
        path: Where it is from, for messages.
        task: The task, before it is compiled or wrapped, with its moving average if it has one.
        optimizer: Its optimizer, or None to leave it as it is.
        scaler: The loss scaler of float16, where there is one.

    Raises:
        ValueError: It does not fit.
    """
    has_critic = 'task_state' in checkpoint
    if has_critic != isinstance(task, DrealTask):
        trained, asked = ('reinforced', 'false') if has_critic else ('plain', 'true')
        raise ValueError(f"resume: '{path}' is of {trained} training, but dreal.enabled is {asked}.")
    try:
        task.load_checkpoint_state(checkpoint['state_dict'], checkpoint.get('task_state'))
        if task.has_ema():
            kind = '_ema' if 'state_dict_ema' in checkpoint else ''
            task.load_checkpoint_state(checkpoint[f'state_dict{kind}'], checkpoint.get(f'task_state{kind}'), ema=True)
        if optimizer is not None:
            _restore_optimizer(optimizer, checkpoint['optimizer'])
        if scaler is not None and optimizer is not None and 'amp_scaler' in checkpoint:
            scaler.load_state_dict(checkpoint['amp_scaler'])
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"resume: '{path}' does not fit the recipe: {reason(error)}") from error
    return int(checkpoint['epoch']) + (1 if checkpoint.get('version', 1) > 1 else 0)


def scheduler_state(scheduler: Any) -> dict[str, Any] | None:
    """Return what a schedule remembers: nothing, but for the plateau (timm computes the others from the epoch)."""
    plateau = getattr(scheduler, 'lr_scheduler', None)
    if plateau is None:
        return None
    return {'plateau': dict(plateau.state_dict()), 'restore_lr': scheduler.restore_lr}


def restore_scheduler(scheduler: Any, state: Mapping[str, Any] | None, epoch: int, updates: int) -> None:
    """Take a schedule to the beginning of an epoch.

    Args:
        scheduler: timm's scheduler.
        state: What `scheduler_state` returned, where it is known.
        epoch: Number of the epoch, from 0.
        updates: Number of updates before it.
    """
    is_plateau = hasattr(scheduler, 'lr_scheduler')
    if is_plateau and state is not None:
        scheduler.lr_scheduler.load_state_dict(dict(state['plateau']))
        scheduler.restore_lr = state['restore_lr']
    elif is_plateau and epoch == 0:
        scheduler.update_groups(scheduler.base_values)
    elif scheduler.t_in_epochs:
        scheduler.step(epoch)
    else:
        scheduler.step_update(updates)
