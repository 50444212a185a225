"""The data sets of a run"""
from types import SimpleNamespace
from typing import Any

from timm.data import resolve_data_config
from timm.models import get_model_input_config

from dreal_timm.data.opening import class_names, open_dataset

__all__ = ['build_dataset', 'check_labels', 'class_names', 'data_config']


def data_config(config: SimpleNamespace, model: Any) -> dict[str, Any]:
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


def build_dataset(
        config: SimpleNamespace,
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
        config.dataset,
        config.data_dir,
        split,
        channels=channels,
        num_classes=num_classes,
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


def check_labels(train_set: Any, val_set: Any | None, num_classes: int, given: bool = True) -> None:
    """Raise a ValueError if the splits have other classes than each other, or the network has not as many.

    Args:
        train_set: The training split.
        val_set: The validation split, or None.
        num_classes: Classes of the network.
        given: Whether the recipe asks for that number, so that it may be more than the data has.
    """
    names, val_names = class_names(train_set), class_names(val_set)
    if names is not None and val_names is not None and names != val_names:
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
