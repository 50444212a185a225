"""The train loop: Accelerate launches and places, timm builds, the task learns"""
import copy
import logging
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
from timm.utils import random_seed, update_summary

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


def _check_labels(dataset: Any, num_classes: int) -> None:
    names = build.class_names(dataset)
    if names is not None and len(names) > num_classes:
        raise ValueError(f'num_classes: {num_classes}, but the data set has {len(names)} classes.')


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
    return meter.means()


def run(config: SimpleNamespace | dict[str, Any] | str | Path, overrides: tuple[str, ...] | list[str] = ()) -> dict:
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
    if not isinstance(config, SimpleNamespace):
        config = load_config(config, overrides)
    config = copy.deepcopy(config)
    if config.eval_metric not in ('top1', 'top5', 'loss'):
        raise ValueError(f"eval_metric: expected 'top1', 'top5' or 'loss', got '{config.eval_metric}'.")
    build.import_device_modules(config)
    accelerator = Accelerator(cpu=config.device == 'cpu')
    device, is_main, processes = accelerator.device, accelerator.is_main_process, accelerator.num_processes
    random_seed(config.seed, accelerator.process_index)

    build.check_model_name(config.model)
    model: Any = build.build_model(config)
    data = build.data_config(config, model)
    channels = data['input_size'][0]
    train_set = build.build_dataset(config, config.train_split, channels, is_training=True)
    val_set = build.build_dataset(config, config.val_split, channels, is_training=False)
    for dataset in (train_set, val_set):
        _check_labels(dataset, model.num_classes)
    model.to(device)
    task = build.build_task(config, model, device, data['input_size'], verbose=is_main)
    optimizer = build.build_optimizer(config, task.get_trainable_module(), config.batch_size * processes)
    train_loader = build.build_loader(config, train_set, data, device, True, distributed=processes > 1)
    val_loader = build.build_loader(config, val_set, data, device, False, distributed=processes > 1)
    if processes > 1:
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None)
    decreasing = config.eval_metric == 'loss'
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(config, decreasing_metric=decreasing), updates_per_epoch=len(train_loader))
    prepared = accelerator.prepare(optimizer)

    directory = _run_directory(config, data['input_size'], is_main)
    args = to_dict(config)
    if is_main:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / 'args.yaml').write_text(yaml.safe_dump(args, sort_keys=False), encoding='utf-8')
        _logger.info(
            f'{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(train_set):,} images to '
            f'train on, {len(val_set):,} to validate on, device {device}, {directory}'
        )

    history: list[dict[str, Any]] = []
    best_epoch, best_metric = 0, float('inf') if decreasing else -float('inf')
    for epoch in range(epochs):
        # data order and augmentation depend on seed and epoch alone, with or without a critic
        random_seed(config.seed + 1_000_003 * (epoch + 1), accelerator.process_index)
        if hasattr(train_loader.sampler, 'set_epoch'):
            train_loader.sampler.set_epoch(epoch)
        lr = optimizer.param_groups[0]['lr']
        train_metrics = train_one_epoch(
            epoch, epochs, task, train_loader, prepared, accelerator, scheduler, config.log_interval)
        metrics = evaluate(task.get_eval_model(), val_loader, device, distributed=processes > 1)
        metric = metrics[config.eval_metric]
        is_best = metric < best_metric if decreasing else metric > best_metric
        if is_best:
            best_epoch, best_metric = epoch, metric
        history.append({'epoch': epoch, 'train': train_metrics, 'validation': metrics})
        if is_main:
            update_summary(epoch, train_metrics, metrics, str(directory / 'summary.csv'), lr=lr)
            save_checkpoint(directory, task, optimizer, epoch, args, metric, is_best)
            _logger.info(
                f'epoch {epoch + 1}/{epochs}  loss {train_metrics["loss"]:.3f}  top1 {metrics["top1"]:.2f}%  '
                f'best {config.eval_metric} {best_metric:.4g} (epoch {best_epoch + 1})'
            )
        if scheduler is not None:
            scheduler.step(epoch + 1, metric)

    exported = directory / 'model'
    if is_main:
        best = torch.load(directory / BEST, map_location='cpu', weights_only=True)
        model.load_state_dict(best['state_dict'])
        export(model, exported, data_config=data, label_names=build.class_names(train_set))
    accelerator.wait_for_everyone()
    return {
        'directory': str(directory),
        'model': str(exported),
        'best_epoch': best_epoch,
        'metrics': history[best_epoch]['validation'] if history else {},
        'epochs': history,
    }
