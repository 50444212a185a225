"""The train loop: Accelerate launches and places, timm builds, the task learns"""
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.models import safe_model_name
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import distribute_bn, random_seed, update_summary

from dreal_timm.hub import export
from dreal_timm.task import DrealTask
from dreal_timm.train import build
from dreal_timm.train.checkpoint import BEST, save_checkpoint
from dreal_timm.train.config import load_config, to_dict
from dreal_timm.train.evaluate import evaluate
from dreal_timm.train.progress import Meter, Progress

__all__ = ['run']

_logger = logging.getLogger(__name__)


def _run_directory(config: SimpleNamespace, input_size: tuple[int, ...], is_main: bool) -> Path:
    """Return the folder of a run, as the first process names it; only that one looks whether it is free."""
    name = config.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(config.model), str(input_size[-1]),
    ])
    directory = Path(broadcast_object_list([str(Path(config.output or 'output/train') / name)])[0])
    if is_main and directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} exists and is not empty: choose another experiment=NAME, or remove it.")
    return directory


def train_one_epoch(
        epoch: int,
        epochs: int,
        task: TrainingTask,
        loader: Any,
        optimizer: Any,
        accelerator: Accelerator,
        scheduler: Any = None,
        log_interval: int = 50,
) -> dict[str, float]:
    """Train for one epoch and return the means over it.

    Args:
        epoch: Number of the epoch, from 0.
        epochs: Number of epochs, for display.
        task: The task.
        loader: Loader of (images, targets).
        optimizer: The prepared optimizer.
        accelerator: Accelerate's accelerator.
        scheduler: timm's scheduler, told of every update.
        log_interval: Steps between lines of the log.
    """
    module = task.get_trainable_module()
    module.train()
    if isinstance(task, DrealTask):
        task.set_epoch(epoch)
    meter = Meter()
    progress = Progress(epoch, epochs, len(loader), log_interval, enabled=accelerator.is_main_process)
    try:
        for index, (input, target) in enumerate(loader):
            input, target = input.to(accelerator.device), target.to(accelerator.device)
            with accelerator.accumulate(module):
                with accelerator.autocast():
                    result = task(input, target)
                accelerator.backward(result['loss'])
                optimizer.step()
                optimizer.zero_grad()
            meter.update(result, target)
            if scheduler is not None:
                scheduler.step_update(num_updates=epoch * len(loader) + index + 1)
            progress.step(index, meter)
    finally:
        progress.close()
    if accelerator.num_processes > 1:
        meter.reduce(accelerator)
    return meter.means()


@dataclass
class Run:
    """All that a run is made of.

    Attributes:
        config: The configuration, with the learning rate that is used.
        accelerator: Accelerate's accelerator.
        model: The network.
        data: Preprocessing of the images.
        task: The task that trains the network.
        optimizer: timm's optimizer.
        scheduler: timm's scheduler, or None.
        epochs: Number of epochs, warm-up and cool-down included.
        train_loader: Loader of the training split.
        val_loader: Loader of the validation split.
        class_names: Names of the classes, where the data set knows them.
        directory: Folder of the run.
    """
    config: SimpleNamespace
    accelerator: Accelerator
    model: Any
    data: dict[str, Any]
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scheduler: Any
    epochs: int
    train_loader: Any
    val_loader: Any
    class_names: list[str] | None
    directory: Path


def _set_up(config: SimpleNamespace) -> Run:
    """Check and build everything; nothing is written."""
    build.import_device_modules(config)
    accelerator = Accelerator(cpu=config.device == 'cpu')
    if config.device not in (None, 'cpu', accelerator.device.type):
        raise ValueError(f"device: '{config.device}' is not there; the launcher gives {accelerator.device}.")
    device, is_main, processes = accelerator.device, accelerator.is_main_process, accelerator.num_processes
    random_seed(config.seed, accelerator.process_index)

    model: Any = build.build_model(config)
    data = build.data_config(config, model)
    channels = data['input_size'][0]
    train_set = build.build_dataset(config, config.train_split, channels, is_training=True)
    val_set = build.build_dataset(config, config.val_split, channels, is_training=False)
    build.check_labels(train_set, val_set, model.num_classes)
    task = build.build_task(config, model.to(device), device, data['input_size'], verbose=is_main)
    optimizer = build.build_optimizer(config, task.get_trainable_module(), config.batch_size * processes)
    train_loader = build.build_loader(config, train_set, data, device, True, distributed=processes > 1)
    val_loader = build.build_loader(config, val_set, data, device, False, distributed=processes > 1)
    if processes > 1:
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        **scheduler_kwargs(config, decreasing_metric=config.eval_metric == 'loss'),
        updates_per_epoch=len(train_loader),
    )
    directory = _run_directory(config, data['input_size'], is_main)
    if is_main:
        _logger.info(
            f'{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(train_set):,} images to '
            f'train on, {len(val_set):,} to validate on, {processes} x {device.type}, {directory}'
        )
    return Run(
        config, accelerator, model, data, task, optimizer, scheduler, epochs, train_loader, val_loader,
        build.class_names(train_set), directory,
    )


def _fit(run_state: Run) -> tuple[list[dict[str, Any]], int]:
    """Train all epochs; return the metrics of each, and the number of the best."""
    config, accelerator, directory = run_state.config, run_state.accelerator, run_state.directory
    distributed = accelerator.num_processes > 1
    sign = -1 if config.eval_metric == 'loss' else 1
    optimizer = accelerator.prepare(run_state.optimizer)
    history: list[dict[str, Any]] = []
    best_epoch, best_metric = 0, math.nan
    for epoch in range(run_state.epochs):
        # data order and augmentation depend on seed and epoch alone, with or without a critic
        random_seed((config.seed + 1_000_003 * (epoch + 1)) % 2**31, accelerator.process_index)
        if hasattr(run_state.train_loader.sampler, 'set_epoch'):
            run_state.train_loader.sampler.set_epoch(epoch)
        lr = optimizer.param_groups[0]['lr']
        train_metrics = train_one_epoch(
            epoch, run_state.epochs, run_state.task, run_state.train_loader, optimizer, accelerator,
            run_state.scheduler, config.log_interval,
        )
        if not math.isfinite(train_metrics['loss']):
            raise RuntimeError(
                f"epoch {epoch + 1}: the loss is {train_metrics['loss']}, training has diverged. Try a smaller lr; "
                f'the checkpoints of the epochs before are in {directory}.'
            )
        if distributed:
            distribute_bn(run_state.task.get_trainable_module(), accelerator.num_processes, reduce=True)
        metrics = evaluate(run_state.task.get_eval_model(), run_state.val_loader, accelerator.device, distributed)
        metric = metrics[config.eval_metric]
        is_best = epoch == 0 or sign * metric > best_metric
        if is_best:
            best_epoch, best_metric = epoch, sign * metric
        history.append({'epoch': epoch, 'train': train_metrics, 'validation': metrics})
        if accelerator.is_main_process:
            update_summary(epoch, train_metrics, metrics, str(directory / 'summary.csv'), lr=lr)
            save_checkpoint(directory, run_state.task, run_state.optimizer, epoch, to_dict(config), metric, is_best)
            _logger.info(
                f'epoch {epoch + 1}/{run_state.epochs}  loss {train_metrics["loss"]:.3f}  top1 {metrics["top1"]:.2f}%  '
                f'best {config.eval_metric} {sign * best_metric:.4g} (epoch {best_epoch + 1})'
            )
        if run_state.scheduler is not None:
            run_state.scheduler.step(epoch + 1, metric)
    return history, best_epoch


def run(
        config: SimpleNamespace | Mapping[str, Any] | str | Path,
        overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a network as a recipe says, and export the best epoch without its critic.

    The run's folder holds `args.yaml`, `summary.csv`, `last.pth.tar`, `model_best.pth.tar` and `model/`, which
    `timm.create_model('local-dir:.../model', pretrained=True)` loads.

    Args:
        config: A configuration from `load_config`, or what it takes: a recipe's file, name, or keys and values.
        overrides: Further 'key=value' settings.

    Returns:
        Dictionary containing:
            - 'directory': Folder of the run
            - 'model': Folder of the exported model
            - 'best_epoch', 'metrics': Number of the best epoch, from 0, and its validation metrics
            - 'epochs': For each epoch its 'train' and 'validation' metrics

    Raises:
        FileNotFoundError: The recipe or the data is missing.
        FileExistsError: The run's folder exists and is not empty.
        ValueError: A setting is wrong.
    """
    if isinstance(config, SimpleNamespace):
        config = to_dict(config)
    run_state = _set_up(load_config(config, overrides))
    is_main, directory = run_state.accelerator.is_main_process, run_state.directory
    if is_main:
        directory.mkdir(parents=True, exist_ok=True)
        args = yaml.safe_dump(to_dict(run_state.config), sort_keys=False)
        (directory / 'args.yaml').write_text(args, encoding='utf-8')
    history, best_epoch = _fit(run_state)
    if is_main:
        best = torch.load(directory / BEST, map_location='cpu', weights_only=True)
        run_state.model.load_state_dict(best['state_dict'])
        export(run_state.model, directory / 'model', data_config=run_state.data, label_names=run_state.class_names)
    run_state.accelerator.wait_for_everyone()
    return {
        'directory': str(directory),
        'model': str(directory / 'model'),
        'best_epoch': best_epoch,
        'metrics': history[best_epoch]['validation'],
        'epochs': history,
    }
