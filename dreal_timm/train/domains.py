"""The domains, what a run trains on and is measured by: by the name of the task, and by the network"""
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from timm.data import create_transform
from torch import nn
from torch.utils.data import IterableDataset

from dreal_timm.data.images import NO_LABEL
from dreal_timm.models.reid import backbone_of
from dreal_timm.train import datasets
from dreal_timm.train.classification import Classification
from dreal_timm.train.config import load_config
from dreal_timm.train.reid import Reidentification

__all__ = ['DOMAINS', 'Domain', 'domain_of', 'measure_export', 'sample_images']

Domain: TypeAlias = Classification | Reidentification
DOMAINS: dict[str, type[Domain]] = {'classification': Classification, 'reid': Reidentification}  # by `dreal.task`


def domain_of(network: nn.Module) -> type[Domain]:
    """Return the domain that a network is measured in: embedding networks are of re-identification."""
    return DOMAINS['classification' if backbone_of(network) is network else 'reid']


def measure_export(network: nn.Module, source: str, **options: Any) -> dict[str, Any]:
    """Validate a classifier, or evaluate an embedding network as the training of `source` did.

    Args:
        network: The network that is exported.
        source: The run, or the checkpoint, that it is from.
        **options: data_dir, dataset, split, class_map and by_order, as of `dreal_timm.train.validate.measure`.

    Raises:
        ValueError: Classes of an embedding network are named.
    """
    return domain_of(network).measure_export(network, source, **options)


def sample_images(
        network: nn.Module,
        data_dir: str | Path,
        dataset: str = '',
        split: str = 'validation',
        count: int = 64,
) -> torch.Tensor:
    """Return images of a split, spread over it evenly, or its first where it is a stream, as the network takes them.

    Args:
        network: A timm model, whose configuration names the preprocessing.
        data_dir: Folder of the data set.
        dataset: Kind and name of the data set as in a recipe; empty is an image folder.
        split: The split; of an embedding network the queries are taken.
        count: Number of the images; all where there are fewer.

    Returns:
        Images, (N, C, H, W).

    Raises:
        FileNotFoundError: The data is missing.
    """
    config = load_config(dict(data_dir=str(data_dir), dataset=dataset, val_split=split, workers=0))
    preprocessing = datasets.data_config(config, network)
    images = domain_of(network).sample_set(config, preprocessing['input_size'][0])
    images.transform = create_transform(is_training=False, **preprocessing)
    if hasattr(images, '__getitem__') and not isinstance(images, IterableDataset):
        count = min(count, len(images))
        rows = [images[i * len(images) // count] for i in range(count)]
    else:
        rows = list(islice(images, count))
    return torch.stack([image for image, label, *_ in rows if label != NO_LABEL])
