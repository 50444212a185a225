"""What is audited: a network, with its critic where it has one, and the images it is evaluated on"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config
from timm.models import get_model_input_config

from dreal_timm.attention.sites import find_sites, group_sites
from dreal_timm.audit.auditor import check_network
from dreal_timm.audit.calibration import load_critic
from dreal_timm.audit.images import NumberedImages
from dreal_timm.critic import Critic
from dreal_timm.data.opening import open_for
from dreal_timm.hub.run import open_network
from dreal_timm.provenance import weights_digest

__all__ = ['Subject', 'load_subject', 'open_images']

_BEST = 'model_best.pth.tar'
_WEIGHTS_ALONE = ('.safetensors', '.npz', '.npy')


@dataclass(frozen=True)
class Subject:
    """A network to audit.

    Attributes:
        model: The network.
        critic: Its critic, or None.
        name: What the user called it.
        checkpoint: File that its critic, or its weights, came from.
        weights: SHA-256 of its weights, see `dreal_timm.hub.weights_digest`.
    """
    model: Any
    critic: Critic | None
    name: str
    checkpoint: str
    weights: str


def load_subject(
        model: str,
        checkpoint: str = '',
        input_size: Sequence[int] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
) -> Subject:
    """Load a network, and the critic that it was trained with where a checkpoint holds it.

    Args:
        model: Name of a timm model, 'hf-hub:USER/NAME', an exported folder, or the folder of a run or of timm's
            train.py, whose network and whose best checkpoint's critic of these weights are taken.
        checkpoint: File with weights to load, in place of the model's published ones.
        input_size: (C, H, W) of the images; None is the model's own.
        model_kwargs: Options of `timm.create_model` that the checkpoint needs.

    Raises:
        FileNotFoundError: The folder or the checkpoint is missing.
        ValueError: No such model, it has no weights, no attention site or no classes, or weights or critic do not fit.
    """
    network: Any = open_network(model, checkpoint, **(model_kwargs or {}))
    best = Path(model) / _BEST
    source = checkpoint or (model if Path(model).is_file() else str(best) if best.is_file() else '')
    sites = find_sites(network, input_size)
    try:
        check_network(network, sites)
    except ValueError as error:
        raise ValueError(f"'{model}': {error}") from error
    critic = None
    if source and Path(source).suffix not in _WEIGHTS_ALONE:
        critic = load_critic(source, group_sites(sites), network)
    if critic is None:
        source = checkpoint
    return Subject(network, critic, model, source, weights_digest(network.state_dict()))


def open_images(
        model: Any,
        data_dir: str,
        dataset: str = '',
        split: str = 'validation',
        class_map: str = '',
        input_size: Sequence[int] | None = None,
        by_order: bool = False,
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
        by_order: Take the classes of the data set in their order.

    Raises:
        FileNotFoundError: The folder, or an image in it, is missing.
        ClassesError: Classes of the data set are not those of the network.
    """
    size = get_model_input_config(model)['input_size'] if input_size is None else input_size
    data = resolve_data_config({'input_size': tuple(size)}, model=model)
    opened, match = open_for(
        model, dataset, data_dir, split, class_map=class_map, by_order=by_order, channels=data['input_size'][0])
    return NumberedImages(opened, data, match)
