"""Validation of any timm model, by name or from an exported folder"""
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dreal_timm.hub.loading import load
from dreal_timm.train import datasets, loaders
from dreal_timm.train.config import load_config
from dreal_timm.train.evaluate import evaluate

__all__ = ['validate']


def validate(
        model: str,
        data_dir: str | Path,
        dataset: str = '',
        split: str = 'validation',
        checkpoint: str | Path = '',
        batch_size: int = 128,
        workers: int = 2,
        device: str | None = None,
) -> dict[str, Any]:
    """Measure loss, top1 and top5 of a network, with the preprocessing that its configuration names.

    Args:
        model: Name of a timm model, 'hf-hub:USER/NAME', or an exported folder.
        data_dir: Folder of the data set.
        dataset: Kind and name of the data set as in a recipe; empty is an image folder.
        split: Split to validate on.
        checkpoint: File with weights to load, in place of the model's published ones.
        batch_size: Images a step.
        workers: Loader processes.
        device: Device; None takes an accelerator where there is one.

    Returns:
        Dictionary with 'model', 'data', 'split', 'samples', 'loss', 'top1' and 'top5' (percent).

    Raises:
        FileNotFoundError: The folder, the data or the checkpoint is missing.
        ValueError: No such model, or it has no weights, or they do not fit.
    """
    network: Any = load(model, checkpoint)
    settings = dict(
        data_dir=str(data_dir), dataset=dataset, val_split=split, batch_size=batch_size, workers=workers)
    config = load_config(settings)
    target = Accelerator(cpu=device == 'cpu').device if device in (None, 'cpu') else torch.device(device)
    data = datasets.data_config(config, network)
    val_set = datasets.build_dataset(config, split, data['input_size'][0], False, network.num_classes)
    loader = loaders.build_loader(config, val_set, data, target, is_training=False)
    metrics = evaluate(network.to(target), loader, target)
    return {'model': model, 'data': str(data_dir), 'split': split, 'samples': len(val_set), **metrics}
