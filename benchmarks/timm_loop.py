"""A stand-in for timm's train.py, which its wheel does not ship: the same calls in the same order

It knows nothing of DREAL: whatever trains a ClassificationTask here trains a DrealTask. Benchmarks measure our loop
against it, and tests train with it.
"""
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, NativeScaler, dispatch_clip_grad, random_seed

Batch = tuple[torch.Tensor, torch.Tensor]


def train_one_epoch(
        task: TrainingTask,
        batches: Any,
        optimizer: torch.optim.Optimizer,
        loss_scaler: NativeScaler | None = None,
        accum_steps: int = 1,
        clip_grad: float | None = None,
        amp_dtype: torch.dtype | None = None,
) -> list[float]:
    """Train on all batches of a list or of a loader; return their losses."""
    trainable_module: Any = task.get_trainable_module()
    trainable_module.train()
    has_no_sync = hasattr(trainable_module, 'no_sync')
    device = next(trainable_module.parameters()).device.type
    autocast = torch.autocast(device, dtype=amp_dtype) if amp_dtype else nullcontext()
    optimizer.zero_grad()
    losses, updates = [], 0
    for index, (input, target) in enumerate(batches):
        need_update = index + 1 == len(batches) or (index + 1) % accum_steps == 0
        with task.no_sync() if has_no_sync and not need_update else nullcontext():
            with autocast:
                result = task(input, target)
                _loss = result['loss']
            if accum_steps > 1:
                _loss /= accum_steps
            parameters = task.get_clip_parameters() if clip_grad is not None else None
            if loss_scaler is not None:
                loss_scaler(
                    _loss, optimizer, clip_grad=clip_grad, parameters=parameters, need_update=need_update)
            else:
                _loss.backward()
                if need_update:
                    if clip_grad is not None:
                        dispatch_clip_grad(parameters, value=clip_grad)
                    optimizer.step()
        losses.append(_loss.item() * accum_steps)
        if need_update:
            updates += 1
            optimizer.zero_grad()
            task.update_ema(step=updates)
    return losses


def train(
        task: TrainingTask,
        make_batches: Callable[[int], Sequence[Batch]],
        epochs: int,
        directory: Path,
        resume: str = '',
        ema: bool = True,
        scaler: bool = True,
        lr: float = 0.02,
        sched_epochs: int = 4,
        **kwargs: Any,
) -> tuple[list[float], torch.optim.Optimizer]:
    """Train as timm's main() does; return the losses of all steps and the objects that hold the state."""
    optimizer = create_optimizer_v2(task.get_trainable_module(), 'sgd', lr=lr, weight_decay=1e-4)
    loss_scaler = NativeScaler(device='cpu') if scaler else None
    start = 0
    if resume:
        start = resume_task_checkpoint(task, resume, optimizer=optimizer, loss_scaler=loss_scaler, log_info=False)
    if ema:
        task.setup_ema(decay=0.9)
        if resume:
            load_task_ema_checkpoint(task, resume)
    directory.mkdir(exist_ok=True)
    saver = CheckpointSaver(
        model=task.get_trainable_module(), optimizer=optimizer, amp_scaler=loss_scaler, task=task,
        checkpoint_dir=str(directory), recovery_dir=str(directory), max_history=1,
    )
    scheduler, _ = create_scheduler_v2(optimizer, sched='cosine', num_epochs=sched_epochs, warmup_epochs=0)
    if start:
        scheduler.step(start)
    losses = []
    for epoch in range(start, epochs):
        random_seed(100 + epoch)
        losses += train_one_epoch(task, make_batches(epoch), optimizer, loss_scaler, **kwargs)
        eval_model = task.get_eval_model()
        eval_model.eval()
        with torch.inference_mode():
            metric = eval_model(make_batches(99)[0][0]).mean().item()
        saver.save_checkpoint(epoch, metric=metric)
        scheduler.step(epoch + 1, metric)
    return losses, optimizer
