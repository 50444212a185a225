"""Validation of any timm model, by name or from an exported folder"""
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import IterableDataset

from dreal_timm.data.opening import open_for
from dreal_timm.hub import results
from dreal_timm.hub.run import exported_folder, open_network
from dreal_timm.models.dreal_resnet import timm_architecture
from dreal_timm.provenance import preprocessing_of, versions, weights_digest
from dreal_timm.train import datasets, loaders
from dreal_timm.train.config import load_config
from dreal_timm.train.evaluate import evaluate
from dreal_timm.train.settings import TrainConfig

__all__ = ['describe', 'measure', 'measure_split', 'validate']


def validate(  # noqa: PLR0913 (the flags of the command)
        model: str,
        data_dir: str | Path,
        dataset: str = '',
        split: str = 'validation',
        checkpoint: str | Path = '',
        batch_size: int = 128,
        workers: int = 2,
        device: str | None = None,
        class_map: str = '',
        by_order: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure loss, top1 and top5 of a network, with the preprocessing that its configuration names.

    Args:
        model: Name of a timm model, 'hf-hub:USER/NAME', an exported folder, the folder of a run or of timm's train.py,
            or a checkpoint in one of these two.
        data_dir: Folder of the data set.
        dataset: Kind and name of the data set as in a recipe; empty is an image folder.
        split: Split to validate on.
        checkpoint: File with weights to load, in place of the model's published ones.
        batch_size: Images a step.
        workers: Loader processes.
        device: Device; None takes an accelerator where there is one.
        class_map: File with the names of all classes in the order of the network's outputs.
        by_order: Take the classes of the data set in their order.
        model_kwargs: Options of `timm.create_model` that the checkpoint needs.

    Returns:
        Dictionary with 'model', 'data', 'dataset', 'split', 'samples', 'unreadable' (number of images), 'classes' (how
        they were found, 'by', and the number of the network's that are 'absent'), 'loss', 'top1' and 'top5' (percent),
        'architecture', 'preprocessing', 'versions', 'weights_sha256' (see `dreal_timm.hub.weights_digest`), and
        'training', the settings that the network was trained with, and 'run', with what and how fast, where its folder
        tells them.

    Raises:
        FileNotFoundError: The folder, the data or the checkpoint is missing.
        ValueError: No such model, or it has no weights, or they do not fit; the names of the classes do not tell which
            outputs of the network they are.
    """
    network: Any = open_network(model, checkpoint, **(model_kwargs or {}))
    found = measure(network, data_dir, dataset, split, batch_size, workers, device, class_map, by_order)
    own = None if checkpoint else exported_folder(model)
    return {
        'model': model, **found,
        'training': None if own is None else results.training_settings(own),
        'run': None if own is None else results.training_record(own),
    }


def measure(
        network: nn.Module,
        data_dir: str | Path,
        dataset: str = '',
        split: str = 'validation',
        batch_size: int = 128,
        workers: int = 2,
        device: str | None = None,
        class_map: str = '',
        by_order: bool = False,
) -> dict[str, Any]:
    """The same of a network that is built already; arguments and results are those of `validate`."""
    settings = dict(
        data_dir=str(data_dir), dataset=dataset, val_split=split, batch_size=batch_size, workers=workers,
        class_map=class_map)
    target = Accelerator(cpu=device == 'cpu').device if device in (None, 'cpu') else torch.device(device)
    return measure_split(network, load_config(settings), target, by_order)


def measure_split(
        network: nn.Module,
        config: TrainConfig,
        device: torch.device,
        by_order: bool = False,
) -> dict[str, Any]:
    """The same on the validation split of a configuration, by this process alone.

    Args:
        network: A timm model. Where the configuration names no preprocessing, the model's own holds.
        config: A configuration from `load_config`.
        device: Where to.
        by_order: Take the classes of the data set in their order.
    """
    model: Any = network
    if not model.num_classes:
        raise ValueError('The network has no classes: dreal-timm reid eval measures embedding networks.')
    data = datasets.data_config(config, model)
    val_set, match = open_for(
        model, config.dataset, config.data_dir, config.val_split, by_order=by_order,
        **datasets.options(config, data['input_size'][0], is_training=False))
    loader = loaders.build_loader(config, val_set, data, device)
    digest = weights_digest(model.state_dict())
    metrics = evaluate(model.to(device).eval(), loader, device)
    if not math.isfinite(metrics['loss']):
        raise ValueError(
            f"The loss of the network is {metrics['loss']}: it gives logits that are no numbers, and is not measured.")
    # a stream tells about how many images it has, and leaves those out that it cannot read
    unread = 0 if isinstance(val_set, IterableDataset) else len(val_set) - metrics['samples']
    architecture = model.pretrained_cfg['architecture']
    return {
        'data': str(config.data_dir), 'dataset': config.dataset, 'split': config.val_split,
        'unreadable': unread, 'classes': match.summary(), **metrics,
        'architecture': timm_architecture(architecture) or architecture,
        'weights_sha256': digest,
        'preprocessing': preprocessing_of(data), 'versions': versions(),
    }


def describe(found: Mapping[str, Any]) -> str:
    """Return what `validate` found as a line."""
    unread = f", {found['unreadable']:,} cannot be read" if found['unreadable'] else ''
    absent = f", {found['classes']['absent']} of the classes are absent" if found['classes']['absent'] else ''
    return (
        f"top-1 {found['top1']:.2f} %  top-5 {found['top5']:.2f} %  loss {found['loss']:.4f}  "
        f"({found['samples']:,} images{unread}{absent})")
