"""The data sets of a run, and which of their classes is which output of the network"""
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config
from timm.models import get_model_input_config

from dreal_timm.data.classes import class_names, match_classes, names_of_config, network_names, relabel, same_name
from dreal_timm.data.opening import open_dataset
from dreal_timm.hub.run import names_beside, names_of_weights
from dreal_timm.train.settings import TrainConfig

__all__ = ['build_dataset', 'check_labels', 'check_same_classes', 'data_config', 'options', 'settle_classes']

_logger = logging.getLogger(__name__)


def data_config(config: TrainConfig, model: Any) -> dict[str, Any]:
    """Return the preprocessing of a run: the recipe's values, else the model's.

    Raises:
        ValueError: mean or std has another length than the images have channels.
    """
    channels = get_model_input_config(model)['input_size'][0]
    args = dict(vars(config), in_chans=channels)
    if config.input_size is None and config.img_size is None:
        args['input_size'] = get_model_input_config(model)['input_size']
    for key in ('mean', 'std'):
        given = args[key] or model.pretrained_cfg[key]
        if len(given) not in (1, channels):
            raise ValueError(f'{key}: {len(given)} values for images of {channels} channels: {list(given)}.')
        args[key] = given
    return resolve_data_config(args, model=model)


def options(config: TrainConfig, channels: int, is_training: bool) -> dict[str, Any]:
    """Return the options of `dreal_timm.data.opening.open_dataset` that a configuration names."""
    return dict(
        channels=channels,
        class_map=config.class_map,
        download=config.dataset_download,
        image_mode=config.input_img_mode,
        image_key=config.input_key,
        target_key=config.target_key,
        is_training=is_training,
        batch_size=config.batch_size,
        seed=config.seed,
        repeats=config.epoch_repeats if is_training else 0,
        num_samples=config.train_num_samples if is_training else config.val_num_samples,
        trust_remote_code=config.dataset_trust_remote_code,
    )


def build_dataset(
        config: TrainConfig,
        split: str,
        channels: int,
        is_training: bool,
        num_classes: int | None = None,
) -> Any:
    """Open a split of the data set, see `dreal_timm.data.opening.open_dataset`.

    Args:
        config: The configuration.
        split: Name of the split.
        channels: Channels of the images.
        is_training: Whether it is for training, which shuffles a stream.
        num_classes: Classes of the network, which labels are checked against.
    """
    return open_dataset(
        config.dataset, config.data_dir, split, num_classes=num_classes, **options(config, channels, is_training))


def check_labels(train_set: Any, val_set: Any | None, num_classes: int, given: bool = True) -> None:
    """Raise a ValueError if the splits have other classes than each other, or the network has not as many.

    Args:
        train_set: The training split.
        val_set: The validation split, or None.
        num_classes: Classes of the network.
        given: Whether the recipe asks for that number, so that it may be more than the data has.
    """
    names, val_names = class_names(train_set), class_names(val_set)
    if names is not None and val_names is not None and [*map(same_name, names)] != [*map(same_name, val_names)]:
        differing = sorted(set(names) ^ set(val_names))
        raise ValueError(
            f'The splits have different classes, so that labels would not agree: {", ".join(differing)} '
            'without an image in one of them. A class_map names the classes of both.'
        )
    if names is not None and len(names) > num_classes:
        raise ValueError(f'num_classes: {num_classes}, but the data set has {len(names)} classes.')
    if names is not None and len(names) < num_classes and not given:
        raise ValueError(
            f'num_classes: the data set has {len(names)} classes, the model as it comes {num_classes}: '
            f'add num_classes={len(names)}, or num_classes={num_classes} to keep its classifier.'
        )
    if names is not None and len(names) < num_classes:
        _logger.warning(
            f'num_classes: {num_classes} outputs for {len(names)} classes of the data set: the others are never right.')


def _trained_names(config: TrainConfig, model: Any) -> list[list[str]]:
    """Names of the classes of a network that starts with a trained classifier; none where it is made anew."""
    if config.initial_checkpoint:
        names = names_of_weights(config.initial_checkpoint)
        return [] if names is None else [names]
    trained = config.pretrained and not config.pretrained_path
    return network_names(model) if trained and model.num_classes == model.pretrained_cfg.get('num_classes') else []


def check_same_classes(names: Sequence[str] | None, checkpoint: Mapping[str, Any], path: Path) -> list[str] | None:
    """Return the names of the classes that a checkpoint was trained on; a ValueError if the data has others."""
    trained = checkpoint.get('class_names') or names_beside(path)
    if names is None or not trained:
        if names is not None:
            _logger.warning(f"'{path}' does not know the names of its classes: they are taken in their order.")
        return None
    own, known = ({same_name(name) for name in some} for some in (names, trained))
    gone, new = sorted(known - own), sorted(own - known)
    if gone or new:
        what = [f"{', '.join(some[:3])} {word}" for some, word in ((gone, 'is gone'), (new, 'is new')) if some]
        raise ValueError(
            f"resume: '{path}' was trained on other classes than the data set has: {'; '.join(what)}. "
            'initial_checkpoint or pretrained_path start a new run from its weights.')
    return list(trained)


def settle_classes(
        config: TrainConfig,
        model: Any,
        train_set: Any,
        val_set: Any | None,
        checkpoint: Mapping[str, Any] | None,
        path: Path | None,
) -> list[str] | None:
    """Let the labels of both splits be the outputs of a classifier that is trained already, and return their names.

    A run that goes on keeps the order of the classes that its checkpoint was trained with. A network that starts with
    its classifier keeps the order of its own classes, where the recipe has no class map.

    Args:
        config: The configuration.
        model: The network.
        train_set: The training split.
        val_set: The validation split, or None.
        checkpoint: What the run goes on from, or None.
        path: Its file.

    Raises:
        ValueError: The data set has other classes.
    """
    names = class_names(train_set)
    trained: list[list[str]] = []
    if checkpoint is not None and path is not None:
        same = check_same_classes(names, checkpoint, path)
        trained = [] if same is None else [same]
    elif not config.class_map:
        trained = _trained_names(config, model)
        if names is not None and names_of_config(model.pretrained_cfg) is None and not config.initial_checkpoint:
            trained = [scheme for scheme in trained if set(names) <= set(scheme)]  # ImageNet's, or a guess
    if names is None or not trained:
        return names
    match = match_classes(
        names, trained, model.num_classes,
        hint='class_map=FILE names the output of each class, and pretrained_path=FILE makes the classifier anew')
    for dataset in (train_set, val_set):
        if dataset is not None:
            relabel(dataset, model.num_classes, match)
    return trained[0]
