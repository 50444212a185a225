"""Evaluation of a network on a validation set, with timm's evaluator"""
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ['METRICS', 'evaluate']

METRICS = ('top1', 'top5', 'loss', 'epoch')  # that epochs can be ranked by


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: Any,
        device: torch.device,
        distributed: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        channels_last: bool = False,
) -> dict[str, float]:
    """Return loss, top1 and top5 (percent) over every sample of the loader once.

    The model is put into evaluation mode and stays there.

    Args:
        model: The model.
        loader: Loader of (images, class indices).
        device: Device of the model.
        distributed: Whether the metrics are those of all processes.
        autocast: Makes the context of a forward pass.
        channels_last: Whether the images are in channels-last layout.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module  # its wrapper synchronises in every forward pass, and processes may differ in their number
    model.eval()
    evaluator = ClassificationEvaluator(device=device, max_samples=evaluation_sample_limit(loader))
    for input, target in loader:
        input = input.to(device)
        if channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        with autocast():
            output = model(input)
        evaluator.update(output, target.to(device))
    return dict(evaluator.compute(distributed=distributed))
