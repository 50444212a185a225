"""Validation of any timm model, by name or from an exported folder"""
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator

from dreal_timm.errors import UNREADABLE
from dreal_timm.train import datasets, loaders
from dreal_timm.train.build import check_model_name
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
    name = model
    if Path(model).is_dir():
        if not (Path(model) / 'config.json').is_file():
            raise FileNotFoundError(f"'{model}' has no config.json: it is not an exported model.")
        name = f'local-dir:{model}'
    elif '/' in model and ':' not in model:
        raise FileNotFoundError(f"No folder '{model}' (models of the Hub are written hf-hub:USER/NAME).")
    check_model_name(name)
    if checkpoint and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"No checkpoint '{checkpoint}'.")
    source, _ = timm.models.parse_model_name(name)
    if source is None and not checkpoint and not timm.models.is_model_pretrained(name):
        raise ValueError(f"'{model}' has no published weights: name a folder, or pass a checkpoint.")
    try:
        network = timm.create_model(name, pretrained=not checkpoint, checkpoint_path=str(checkpoint) or None)
    except UNREADABLE as error:
        what = f"'{checkpoint}' as weights of '{model}'" if checkpoint else f"'{model}'"
        hint = ' (a run exports its best epoch to the folder model/)' if checkpoint else ''
        raise ValueError(f'Cannot load {what}{hint}: {" ".join(str(error).split())[:200]}') from error

    settings = dict(
        data_dir=str(data_dir), dataset=dataset, val_split=split, batch_size=batch_size, workers=workers)
    config = load_config(settings)
    target = Accelerator(cpu=device == 'cpu').device if device in (None, 'cpu') else torch.device(device)
    data = datasets.data_config(config, network)
    val_set = datasets.build_dataset(config, split, data['input_size'][0], False, network.num_classes)
    loader = loaders.build_loader(config, val_set, data, target, is_training=False)
    metrics = evaluate(network.to(target), loader, target)
    return {'model': model, 'data': str(data_dir), 'split': split, 'samples': len(val_set), **metrics}
