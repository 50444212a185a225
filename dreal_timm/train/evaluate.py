"""Evaluation of a network on a validation set, with timm's evaluator"""
from typing import Any

import torch
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import nn

__all__ = ['evaluate']


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Any, device: torch.device, distributed: bool = False) -> dict[str, float]:
    """Return loss, top1 and top5 (percent) over every sample of the loader once.

    The model is put into evaluation mode and stays there.

    Raises:
        ValueError: A label is outside of the model's classes.
    """
    model.eval()
    evaluator = ClassificationEvaluator(device=device, max_samples=evaluation_sample_limit(loader))
    for input, target in loader:
        output = model(input.to(device))
        target = target.to(device)
        if target.max() >= output.shape[1] or target.min() < 0:
            raise ValueError(f'Label {int(target.max())} is outside of the {output.shape[1]} classes of the model.')
        evaluator.update(output, target)
    return dict(evaluator.compute(distributed=distributed))
