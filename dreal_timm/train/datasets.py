"""What a configuration says of data: preprocessing, splits, and the classes of a checkpoint"""
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config
from timm.models import get_model_input_config

from dreal_timm.data.classes import same_name
from dreal_timm.data.opening import open_dataset
from dreal_timm.hub.run import names_beside
from dreal_timm.train.settings import TrainConfig

__all__ = ['build_dataset', 'check_same_classes', 'data_config', 'options']

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
    preprocessing: dict[str, Any] = resolve_data_config(args, model=model)
    return preprocessing


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
