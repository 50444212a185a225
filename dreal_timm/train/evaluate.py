"""Evaluation of a network on a validation set, with timm's evaluator"""
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dreal_timm.data.images import NO_LABEL

__all__ = ['evaluate']


def _loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy of a batch, in which images without a label count nothing."""
    return F.cross_entropy(output, target, ignore_index=NO_LABEL, reduction='sum') / len(target)


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: Any,
        device: torch.device,
        distributed: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        channels_last: bool = False,
) -> dict[str, Any]:
    """Return loss, top1 and top5 (percent) over every sample of the loader once, and their number as 'samples'.

    Images that could not be read (label -1) count in none of them. The model is put into evaluation mode and stays
    there.

    Args:
        model: The model.
        loader: Loader of (images, class indices).
        device: Device of the model.
        distributed: Whether the metrics are those of all processes.
        autocast: Makes the context of a forward pass.
        channels_last: Whether the images are in channels-last layout.

    Raises:
        ValueError: No image could be read.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module  # its wrapper synchronises in every forward pass, and processes may differ in their number
    model.eval()
    limit = evaluation_sample_limit(loader)
    evaluator = ClassificationEvaluator(device=device, max_samples=limit, criterion=_loss)
    seen, counts = 0, torch.zeros(2, dtype=torch.int64, device=device)  # images, and those without a label
    for input, target in loader:
        input, target = input.to(device), target.to(device)
        if channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        with autocast():
            output = model(input)
        evaluator.update(output, target)
        own = target if limit is None else target[:max(0, limit - seen)]  # less what the sampler repeats
        seen += len(target)
        counts[0] += len(own)
        counts[1] += (own == NO_LABEL).sum()
    metrics = evaluator.compute(distributed=distributed)
    if distributed:
        torch.distributed.all_reduce(counts)
    images, unread = counts.tolist()
    if images == unread:
        raise ValueError('None of the images could be read.' if unread else 'There is no image to validate on.')
    share = images / (images - unread)  # timm's means are over all images
    return {**{name: value * share for name, value in metrics.items()}, 'samples': images - unread}
