"""What is audited: a network, with its critic where it has one, and the images it is asked about"""
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.models import get_model_input_config

from dreal_timm.attention import find_sites, group_sites
from dreal_timm.audit.calibration import load_critic
from dreal_timm.audit.images import NumberedImages
from dreal_timm.critic import Critic
from dreal_timm.data.opening import class_names, open_dataset
from dreal_timm.hub.loading import load

__all__ = ['Subject', 'load_subject', 'open_images']

_RUN, _BEST = 'args.yaml', 'model_best.pth.tar'


@dataclass(frozen=True)
class Subject:
    """A network to audit.

    Attributes:
        model: The network.
        critic: Its critic, or None.
        name: What the user called it.
        checkpoint: File that its critic, or its weights, came from.
        weights: SHA-256 of its weights.
    """
    model: Any
    critic: Critic | None
    name: str
    checkpoint: str
    weights: str


def _digest(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_subject(model: str, checkpoint: str = '', input_size: Sequence[int] | None = None) -> Subject:
    """Load a network, and the critic that it was trained with where a checkpoint holds it.

    Args:
        model: Name of a timm model, 'hf-hub:USER/NAME', an exported folder, or the folder of a run, whose exported
            network and whose best checkpoint's critic are taken.
        checkpoint: File with weights to load, in place of the model's published ones.
        input_size: (C, H, W) of the images; None is the model's own.

    Raises:
        FileNotFoundError: The folder or the checkpoint is missing.
        ValueError: No such model, it has no weights, or they or the critic do not fit.
    """
    folder, source = Path(model), model
    if (folder / _RUN).is_file() and (folder / 'model').is_dir():
        source = str(folder / 'model')
        if not checkpoint and (folder / _BEST).is_file():
            network: Any = load(source)
            checkpoint = str(folder / _BEST)
        else:
            network = load(source, checkpoint)
    else:
        network = load(source, checkpoint)
    critic = None
    if checkpoint and Path(checkpoint).suffix != '.safetensors':
        size = input_size if input_size is not None else get_model_input_config(network)['input_size']
        critic = load_critic(checkpoint, group_sites(find_sites(network, size)))
    return Subject(network, critic, model, checkpoint, _digest(network))


def _label_names(model: Any) -> list[str] | None:
    """Names of the classes as folders have them: those the network was exported with, or the synsets of ImageNet."""
    names = model.pretrained_cfg.get('label_names')
    if names:
        return [str(name) for name in names]
    subset = infer_imagenet_subset(model)
    return None if subset is None else list(ImageNetInfo(subset).label_names())


def _class_map(dataset: Any, model: Any) -> Mapping[str, int] | None:
    """Return the index of each class of an image folder by its name, where the network knows more classes than those.

    Raises:
        ValueError: The numbers of classes differ, and the names do not tell which is which.
    """
    names, known = class_names(dataset), _label_names(model)
    if names is None or names == known:
        return None
    if known is not None and set(names) <= set(known):
        return {name: known.index(name) for name in names}
    if len(names) != model.num_classes:
        raise ValueError(
            f'The data set has {len(names)} classes ({", ".join(names[:3])}, ...), the model {model.num_classes}, and '
            'their names do not tell which is which: name the index of each class in a class map (--class-map FILE).'
        )
    return None


def open_images(
        model: Any,
        data_dir: str,
        dataset: str = '',
        split: str = 'validation',
        class_map: str = '',
        input_size: Sequence[int] | None = None,
) -> NumberedImages:
    """Open a validation set with the preprocessing that the network's configuration names.

    Folders of an image data set are classes by their names where the network knows names (exported networks do, and
    those of ImageNet know synsets), so that it may hold some of them only.

    Args:
        model: A timm model.
        data_dir: Folder of the data set.
        dataset: Kind and name of the data set as in a recipe; empty is an image folder.
        split: Its split.
        class_map: File with the names of all classes.
        input_size: (C, H, W) of the images; None is the model's own.

    Raises:
        FileNotFoundError: The folder, or an image in it, is missing.
        ValueError: Classes of the data set are not those of the network.
    """
    options = {} if input_size is None else {'input_size': tuple(input_size)}
    data = resolve_data_config(options, model=model)
    opened: dict[str, Any] = dict(channels=data['input_size'][0], num_classes=model.num_classes)
    images = open_dataset(dataset, data_dir, split, class_map=class_map or None, **opened)
    found = None if class_map else _class_map(images, model)
    if found is not None:
        images = open_dataset(dataset, data_dir, split, class_map=found, **opened)
    return NumberedImages(images, data)
