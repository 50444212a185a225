"""What comes before the first epoch of a run: everything is checked and built, and put back where it was left"""
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import random_seed
from torch import nn

from dreal_timm.hub.results import flat_settings, shared_settings
from dreal_timm.hub.upload import check_target
from dreal_timm.train import build, datasets, loaders
from dreal_timm.train.checkpoint import Checkpoints
from dreal_timm.train.config import to_dict
from dreal_timm.train.domains import DOMAINS, Domain
from dreal_timm.train.launch import decide, launch, run_directory
from dreal_timm.train.lock import FolderLock
from dreal_timm.train.loop import Run
from dreal_timm.train.record import Record
from dreal_timm.train.resume import check_folder, is_last_of, load_checkpoint, restore, restore_scheduler, resume_path
from dreal_timm.train.settings import TrainConfig
from dreal_timm.train.trackers import check_trackers

__all__ = ['set_up']

_logger = logging.getLogger(__name__)

# settings that do not change what is learnt
_FREE = ('resume', 'stop_epoch', 'output', 'experiment', 'start_epoch', 'log_with', 'log_kwargs', 'log_interval')


def _check_settings(config: TrainConfig) -> None:
    """Raise an error about what can be said before anything is opened."""
    known = DOMAINS[config.dreal.task].metrics
    if config.eval_metric not in known and config.val_split:
        raise ValueError(
            f"eval_metric: with dreal.task={config.dreal.task} one of {', '.join(known)}, got '{config.eval_metric}'.")
    if config.eval_metric == 'epoch' and config.sched == 'plateau':
        raise ValueError("eval_metric: sched=plateau needs a metric that can stop improving, not 'epoch'.")
    check_trackers(config.log_with or (), config.log_kwargs)
    if config.dreal.hub.push_to:
        check_target(config.dreal.hub.push_to)


def _held_path(config: TrainConfig, lock: FolderLock, directory: Path) -> Path | None:
    """Hold a folder that exists, and return what to go on from: nobody else replaces it any more."""
    if directory.is_dir():
        lock.take(directory)
    return resume_path(config, directory)


def _build_learner(
        config: TrainConfig,
        model: Any,
        domain: Domain,
        input_size: tuple[int, ...],
) -> tuple[Any, torch.optim.Optimizer, list[nn.Module]]:
    """Freeze what is to be frozen, and make the task, its moving average and the optimizer."""
    accelerator, frozen = domain.accelerator, list[nn.Module]()
    if config.dreal.start.freeze:
        frozen = build.freeze_backbone(model, input_size)
    task = build.build_task(
        config, model, input_size, device=accelerator.device, verbose=accelerator.is_main_process,
        **domain.criterion(model))
    optimizer = build.build_optimizer(
        config, task.get_trainable_module(), config.batch_size * accelerator.num_processes * config.grad_accum_steps)
    if config.model_ema:
        task.setup_ema(
            decay=config.model_ema_decay,
            use_warmup=config.model_ema_warmup,
            device=torch.device('cpu') if config.model_ema_force_cpu else None,
        )
    return task, optimizer, frozen


def _changes(config: TrainConfig, checkpoint: Mapping[str, Any], processes: int) -> dict[str, list[Any]]:
    """Return the settings that a resumed run changes: [before, after] by their names."""
    trained = checkpoint.get('args')
    if not isinstance(trained, Mapping):
        return {}
    before, after = flat_settings(trained), flat_settings(to_dict(config))
    changed = {
        name: [before[name], value] for name, value in after.items()
        if name not in _FREE and before.get(name, value) != value}
    if checkpoint.get('processes', processes) != processes:
        changed['processes'] = [checkpoint['processes'], processes]
    return changed


def _record_changes(run: Run, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Log from where the run goes on, and record the settings that it changes."""
    _logger.info(f'resumed from {path}: {run.start_epoch} of {run.epochs} epochs are done')
    run.record.changes = [row for row in checkpoint.get('changes', ()) if row['epoch'] < run.start_epoch]
    changed = _changes(run.config, checkpoint, run.accelerator.num_processes)
    if changed:
        text = ', '.join(f'{name} {old} -> {new}' for name, (old, new) in changed.items())
        _logger.info(f'Settings that are not those of the checkpoint: {text}')
        run.record.changes.append({'epoch': run.start_epoch, 'settings': shared_settings(changed)})


def _restore(run: Run, optimizer: torch.optim.Optimizer, path: Path, checkpoint: dict[str, Any]) -> None:
    """Put back what the checkpoint has of the run, but for its schedule."""
    config = run.config
    run.start_epoch = restore(
        checkpoint, path, run.task, None if config.no_resume_opt else optimizer, run.accelerator.scaler)
    if config.start_epoch is not None:
        run.start_epoch = config.start_epoch
    run.history = [entry for entry in checkpoint.get('history', []) if entry['epoch'] < run.start_epoch]
    if run.accelerator.is_main_process and (config.resume == 'auto' or is_last_of(path, run.directory)):
        run.checkpoints.load_state_dict(checkpoint['saver'], run.start_epoch, path, int(checkpoint['epoch']))
        run.record.load(run.directory, run.start_epoch)


def _resume(run: Run, optimizer: torch.optim.Optimizer, path: Path | None, checkpoint: dict[str, Any] | None) -> None:
    """Take the run to where the checkpoint left it, or to `start_epoch`."""
    config = run.config
    run.start_epoch = config.start_epoch or 0
    if checkpoint is not None and path is not None:
        _restore(run, optimizer, path, checkpoint)
    if run.scheduler is None:
        for group in optimizer.param_groups:
            group['lr'] = (config.lr or 0.0) * group.get('lr_scale', 1.0)
    elif checkpoint is not None or run.start_epoch:
        state = None if config.start_epoch is not None else (checkpoint or {}).get('scheduler')
        restore_scheduler(run.scheduler, state, run.start_epoch, run.start_epoch * run.updates_per_epoch)
    if run.accelerator.is_main_process and checkpoint is not None and path is not None:
        _record_changes(run, checkpoint, path)


def _distribute(config: TrainConfig, task: Any, device: torch.device, processes: int) -> None:
    """Compile and distribute, in timm's order: after the moving average, and DDP last."""
    if config.torchcompile:
        task.compile(backend=config.torchcompile, mode=config.torchcompile_mode)
        if task.has_ema():
            task.compile_ema(backend=config.torchcompile, mode=config.torchcompile_mode)
    if processes > 1:
        buffers = dict(broadcast_buffers=False) if config.no_ddp_bb else {}
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None, **buffers)


def set_up(config: TrainConfig) -> Run:
    """Check and build everything of a run; nothing is written, but for the lock of a folder that exists.

    Raises:
        BlockingIOError: Another run holds the folder.
        FileNotFoundError: The data or a checkpoint is missing.
        FileExistsError: The run's folder exists and is not empty.
        ValueError: A setting is wrong.
    """
    lock = FolderLock()
    try:
        return _set_up(config, lock)
    except BaseException:
        lock.release()
        raise


def _set_up(config: TrainConfig, lock: FolderLock) -> Run:
    build.import_device_modules(config)
    _check_settings(config)
    accelerator = launch(config)
    random_seed(config.seed, accelerator.process_index)
    domain = DOMAINS[config.dreal.task](config, accelerator)
    model: Any = build.build_model(config)
    preprocessing = datasets.data_config(config, model)
    domain.check_model(model, preprocessing)
    directory = run_directory(config, preprocessing['input_size'], accelerator.is_main_process)
    # one process decides: a machine that does not see the folder stops, in place of training from the start
    path = decide(accelerator.is_main_process, lambda: _held_path(config, lock, directory))
    checkpoint = None if path is None else load_checkpoint(path, config)
    if checkpoint is not None and path.resolve().parent == directory.resolve():
        check_folder(config, path, checkpoint)
    names = domain.settle_classes(model, checkpoint, path)
    run = _build(domain, model, preprocessing, directory, names, lock)
    optimizer = run.optimizer
    run.resumed = path is not None
    _resume(run, optimizer, path, checkpoint)
    _distribute(config, run.task, accelerator.device, accelerator.num_processes)
    run.optimizer = accelerator.prepare(optimizer)
    return run


def _build(
        domain: Domain,
        model: Any,
        preprocessing: dict[str, Any],
        directory: Path,
        class_names: list[str] | None,
        lock: FolderLock,
) -> Run:
    """Place the network, and make what trains and validates it."""
    config, accelerator = domain.config, domain.accelerator
    device, processes = accelerator.device, accelerator.num_processes
    model.to(device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
    if config.sync_bn and processes > 1:
        model = convert_sync_batchnorm(model)
    task, optimizer, frozen = _build_learner(config, model, domain, preprocessing['input_size'])
    mixup = loaders.build_mixup(config, model.num_classes)
    train_loader, validate = domain.train_loader(preprocessing, mixup), domain.validation(preprocessing)
    decreasing = config.eval_metric == 'loss' or (validate is None and config.eval_metric != 'epoch')
    run = Run(
        config=config, accelerator=accelerator, domain=domain, model=model, data=preprocessing, task=task,
        optimizer=optimizer, scheduler=None, epochs=config.epochs, train_loader=train_loader, validate=validate,
        class_names=class_names, directory=directory,
        checkpoints=Checkpoints(directory, config.checkpoint_hist, decreasing), record=Record(device, processes),
        mixup=mixup, frozen_norms=frozen, lock=lock,
    )
    run.scheduler, run.epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(config, decreasing_metric=decreasing), updates_per_epoch=run.updates_per_epoch)
    if accelerator.is_main_process:
        images = domain.count_images()
        _logger.info(
            f'{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters, '
            f'{images[0]:,} images to train on, {images[1]:,} to validate on, {processes} x {device.type}, {directory}'
        )
    return run
