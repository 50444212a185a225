"""The train loop: Accelerate launches and places, timm builds, the task learns"""
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad, distribute_bn, random_seed, unwrap_model
from torch import nn

from dreal_timm.task import DrealTask
from dreal_timm.train.checkpoint import Checkpoints, write_summary
from dreal_timm.train.config import to_dict
from dreal_timm.train.domains import Domain
from dreal_timm.train.finite import FiniteWatch
from dreal_timm.train.loaders import set_epoch
from dreal_timm.train.lock import FolderLock
from dreal_timm.train.progress import Meter, Progress
from dreal_timm.train.record import Record
from dreal_timm.train.resume import scheduler_state
from dreal_timm.train.settings import TrainConfig
from dreal_timm.train.trackers import track

__all__ = ['Run', 'fit', 'train_one_epoch']

_logger = logging.getLogger(__name__)


@dataclass
class Run:
    """All that a run is made of.

    Attributes:
        config: The configuration, with the learning rate that is used.
        accelerator: Accelerate's accelerator.
        domain: What it trains on.
        model: The plain network.
        data: Preprocessing of the images.
        task: The task that trains the network.
        optimizer: timm's optimizer, prepared by Accelerate.
        scheduler: timm's scheduler, or None.
        epochs: Number of epochs, warm-up and cool-down included.
        train_loader: Loader of the training split.
        validate: Measures a network on the validation split, by name of the metric; None where nothing is validated.
        class_names: Names of the classes in the order of the outputs, where the data set knows them; identities.
        directory: Folder of the run.
        checkpoints: Its checkpoints.
        record: What it was made with, and the time of its epochs.
        lock: Its lock, which the first process takes.
        resumed: Whether it goes on from a checkpoint.
        mixup: timm's mixup, or None.
        frozen_norms: Batch norms that stay in evaluation mode.
        start_epoch: Number of the first epoch, from 0.
        batch: Images and targets of the last step of an epoch.
        history: For each epoch so far 'epoch', 'lr', 'train', 'validation' and 'validation_ema'.
    """
    config: TrainConfig
    accelerator: Accelerator
    domain: Domain
    model: Any
    data: dict[str, Any]
    task: TrainingTask
    optimizer: Any
    scheduler: Any
    epochs: int
    train_loader: Any
    validate: Callable[[nn.Module], dict[str, float]] | None
    class_names: list[str] | None
    directory: Path
    checkpoints: Checkpoints
    record: Record
    lock: FolderLock
    resumed: bool = False
    mixup: Any = None
    frozen_norms: Sequence[nn.Module] = ()
    start_epoch: int = 0
    batch: tuple[torch.Tensor, torch.Tensor] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def updates_per_epoch(self) -> int:
        """Number of updates in an epoch."""
        return math.ceil(len(self.train_loader) / self.config.grad_accum_steps)

    @property
    def eval_metric(self) -> str:
        """Name of the metric that epochs are ranked by."""
        ranked = self.validate is not None or self.config.eval_metric == 'epoch'
        return self.config.eval_metric if ranked else 'loss'

    @property
    def lr(self) -> float:
        """Learning rate, the mean over the parameter groups as timm reports it."""
        rates: list[float] = [group['lr'] for group in self.optimizer.param_groups]
        return sum(rates) / len(rates)


def _step(run: Run, input: torch.Tensor, target: torch.Tensor, accum_steps: int, update: bool) -> dict[str, Any]:
    """Forward and backward pass; with `update`, the optimizer's step."""
    accelerator, task, config = run.accelerator, run.task, run.config
    second_order = getattr(run.optimizer.optimizer, 'is_second_order', False)
    with nullcontext() if update else accelerator.no_sync(task.get_trainable_module()):
        with accelerator.autocast():
            result = {**task(input, target), **getattr(task.criterion, 'parts', {})}
        loss = result['loss'] / accum_steps if accum_steps > 1 else result['loss']
        accelerator.backward(loss, create_graph=second_order)
    if update:
        if config.clip_grad is not None:
            accelerator.unscale_gradients(run.optimizer)
            parameters = task.get_clip_parameters(exclude_head='agc' in config.clip_mode)
            dispatch_clip_grad(parameters, value=config.clip_grad, mode=config.clip_mode)
        run.optimizer.step()
    return result


def _begin(run: Run, epoch: int) -> dict[str, str]:
    """Put the network into training mode; return the group of each attention site by its name."""
    task = run.task
    task.get_trainable_module().train()
    for norm in run.frozen_norms:
        norm.eval()
    if not isinstance(task, DrealTask):
        return {}
    task.set_epoch(epoch)
    return {site.name: group.name for group in task.groups for site in group.sites}


def _batches(run: Run) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of the training split on the device, mixed where the loader does not, in the layout of the run."""
    config, device = run.config, run.accelerator.device
    for input, target in run.train_loader:
        input, target = input.to(device), target.to(device)
        if run.mixup is not None and config.no_prefetcher:
            input, target = run.mixup(input, target)
        if config.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        yield input, target


def train_one_epoch(run: Run, epoch: int) -> dict[str, float]:
    """Train for one epoch and return the means over it, those of all processes.

    Args:
        run: The run.
        epoch: Number of the epoch, from 0.

    Raises:
        FloatingPointError: A loss was not finite.
    """
    accelerator, config = run.accelerator, run.config
    # a step that the loss scaler of float16 skips halves its scale: 20 in a row are more than the scale has halves
    meter, watch = Meter(_begin(run, epoch)), FiniteWatch(patience=1 if accelerator.scaler is None else 20)
    means, done = dict[str, float](), 0
    steps, accum = len(run.train_loader), config.grad_accum_steps
    updates, last_group = epoch * run.updates_per_epoch, steps - steps % accum
    progress = Progress(epoch, run.epochs, steps, config.log_interval, enabled=accelerator.is_main_process)
    try:
        for index, (input, target) in enumerate(_batches(run)):
            update = (index + 1) % accum == 0 or index + 1 == steps
            if index % accum == 0:  # not after the update: timm's Lookahead looks for gradients when the epoch ends
                run.optimizer.zero_grad()
            # the last update of an epoch may join fewer steps
            result = _step(run, input, target, accum if index < last_group else steps - last_group, update)
            done, run.batch = index + 1, (input, target)
            meter.update(result, target)
            watch.update(index, result)
            if update:
                updates += 1
                run.task.update_ema(step=updates)
                if run.scheduler is not None:
                    run.scheduler.step_update(num_updates=updates)
            if not progress.due(index):
                progress.step(index)
                continue
            watch.check(accelerator, epoch, steps)
            joint = meter.reduced(accelerator)
            means = joint.means()
            progress.step(index, means, joint.samples, run.lr)
            track(accelerator, 'train', {**means, 'lr': run.lr}, updates)
    finally:
        progress.close()
    if done < steps:
        raise ValueError(
            f'epoch {epoch + 1}: the training data ended after {done} of {steps} batches. A stream yields less than it '
            'tells: check train_num_samples, input_key and target_key, and the warnings of its reader.'
        )
    if hasattr(run.optimizer.optimizer, 'sync_lookahead'):
        run.optimizer.optimizer.sync_lookahead()
    run.optimizer.zero_grad()
    return means


def _join_norms(run: Run, ema: bool = False) -> None:
    """Let all processes have the same running statistics."""
    config, processes = run.config, run.accelerator.num_processes
    if processes > 1 and config.dist_bn and not config.sync_bn:
        distribute_bn(run.task.get_trainable_module(ema=ema), processes, reduce=config.dist_bn == 'reduce')


@torch.no_grad()
def _check_weights(run: Run, epoch: int, model: nn.Module) -> None:
    """Have a network that is to be saved look at the epoch's last batch: a step may have broken it after its own loss.

    Raises:
        FloatingPointError: A logit, or the loss, is not finite, in any process.
    """
    assert run.batch is not None
    input, target = run.batch
    model = unwrap_model(model)  # no collectives of a wrapper
    model.eval()
    with run.accelerator.autocast():
        output = model(input).float()
    finite = output.isfinite().all() & F.cross_entropy(output, target).isfinite()
    if not run.accelerator.gather(finite[None]).all():
        raise FloatingPointError(
            f'epoch {epoch + 1}: with the weights after its last step the loss is not finite, and nothing of it is '
            'saved. Training has diverged: try a smaller lr, or clip_grad.')


def _evaluate(run: Run, epoch: int) -> dict[str, dict[str, float]]:
    """Validate the network, and its moving average where there is one on the device."""
    config, task = run.config, run.task
    averaged = task.has_ema() and not config.model_ema_force_cpu
    if averaged:
        _join_norms(run, ema=True)
    metrics: dict[str, dict[str, float]] = {}
    for name, ema in [('validation', False)] + ([('validation_ema', True)] if averaged else []):
        if run.validate is None:
            _check_weights(run, epoch, task.get_eval_model(ema=ema))
            continue
        metrics[name] = run.validate(task.get_eval_model(ema=ema))
        if not math.isfinite(metrics[name].get('loss', 0.0)):
            raise FloatingPointError(
                f"epoch {epoch + 1}: the loss of the {name} is {metrics[name]['loss']}. Training has diverged: try a "
                'smaller lr, or clip_grad.'
            )
    return metrics


def _save(run: Run, epoch: int, metric: float) -> None:
    """Write the checkpoint, and with it the summary; the first process alone calls this."""
    task, scaler = run.task, run.accelerator.scaler
    state = {
        'arch': run.config.model,
        'args': to_dict(run.config),
        'optimizer': run.optimizer.state_dict(),
        **({} if scaler is None else {'amp_scaler': scaler.state_dict()}),
        **task.get_checkpoint_state(),
        **task.get_checkpoint_state(ema=True),
        'scheduler': scheduler_state(run.scheduler),
        'history': run.history,
        'processes': run.accelerator.num_processes,
        'class_names': run.class_names,
        'changes': run.record.changes,
    }
    run.checkpoints.save(state, epoch, metric, milestone=epoch + 1 in (run.config.save_epochs or ()))
    write_summary(run.directory / 'summary.csv', run.history)
    run.record.write(run.directory)


def _tell(run: Run, epoch: int, metrics: dict[str, dict[str, float]], train: dict[str, float]) -> None:
    text = f'epoch {epoch + 1}/{run.epochs}  loss {train["loss"]:.3f}'
    for name, suffix in (('validation', ''), ('validation_ema', ' of the average')):
        if name in metrics:
            shown = [key for key in ('top1', 'mAP', 'rank1') if key in metrics[name]]
            text += ''.join(f'  {key} {metrics[name][key]:.2f}%' for key in shown) + suffix
    best = run.checkpoints
    _logger.info(f'{text}  best {run.eval_metric} {best.best_metric:.4g} (epoch {(best.best_epoch or 0) + 1})')


def fit(run: Run) -> None:
    """Train from `start_epoch` to the end, or to `stop_epoch`; the history and the folder of the run grow with it.

    Raises:
        FloatingPointError: A loss was not finite.
        OSError: A checkpoint cannot be written.
    """
    config, accelerator = run.config, run.accelerator
    last = min(run.epochs, config.stop_epoch or run.epochs)
    for epoch in range(run.start_epoch, last):
        # data order, augmentation and dropout depend on seed and epoch alone: with or without a critic, resumed or not
        random_seed((config.seed + 1_000_003 * (epoch + 1)) % 2**31, accelerator.process_index)
        set_epoch(config, run.train_loader, run.mixup, epoch)
        lr = run.lr
        started = time.perf_counter()
        train = train_one_epoch(run, epoch)
        run.record.add(epoch, time.perf_counter() - started)
        _join_norms(run)
        entry: dict[str, Any] = {'epoch': epoch, 'lr': lr, 'train': train}
        run.history.append(entry)
        if (epoch + 1) % config.val_interval and epoch + 1 < last:
            if run.scheduler is not None:
                run.scheduler.step(epoch + 1, None)
            continue
        metrics = _evaluate(run, epoch)
        run.batch = None
        entry.update(metrics)
        ranked = metrics.get('validation_ema') or metrics.get('validation') or train
        metric = epoch + 1.0 if run.eval_metric == 'epoch' else ranked[run.eval_metric]
        if run.scheduler is not None:  # before the checkpoint, which holds the learning rate of the next epoch
            run.scheduler.step(epoch + 1, metric)
        updates = (epoch + 1) * run.updates_per_epoch
        for name, values in metrics.items():
            track(accelerator, name, values, updates)
        if accelerator.is_main_process:
            _save(run, epoch, metric)
            _tell(run, epoch, metrics, train)
