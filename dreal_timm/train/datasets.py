"""The data sets of a run: timm's, of all kinds, with what could go wrong looked at first"""
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from timm.data import create_dataset, resolve_data_config
from timm.models import get_model_input_config

from dreal_timm.errors import nearest
from dreal_timm.train.unreadable import name_unreadable

__all__ = ['build_dataset', 'check_labels', 'class_names', 'data_config']

_KINDS = ('torch', 'hfds', 'hfids', 'wds', 'tfds')
_PACKAGES = {'hfds': 'datasets', 'hfids': 'datasets', 'wds': 'webdataset', 'tfds': 'tensorflow_datasets'}


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


def _kind(config: SimpleNamespace) -> str:
    """Return the kind of the data set, '' for an image folder, after a look at what can be seen without opening it."""
    kind, slash, _ = config.dataset.partition('/')
    kind = kind.lower()
    if config.dataset and not (slash and kind in _KINDS):
        raise ValueError(
            f"dataset: expected kind/name such as torch/fashion_mnist, got '{config.dataset}'{nearest(kind, _KINDS)}. "
            f'Kinds are {", ".join(_KINDS)}; an image folder has none.'
        )
    package = _PACKAGES.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        command = 'pip install tensorflow-datasets' if kind == 'tfds' else 'pip install "dreal_timm[streaming]"'
        raise ModuleNotFoundError(f"dataset '{config.dataset}' needs the package {package}: {command}.")
    if kind == 'wds' and config.class_map:
        raise ValueError('class_map: the labels of webdataset shards are numbers already, without names to map.')
    if not config.data_dir and kind in ('', 'torch', 'wds'):
        raise ValueError('data_dir: the recipe names no place of images; add data_dir=DIR.')
    local = kind in ('', 'torch') or (kind == 'wds' and ':' not in config.data_dir)
    if local and not config.dataset_download and not Path(config.data_dir).exists():
        raise FileNotFoundError(f"data_dir: no folder '{config.data_dir}'.")
    return kind


def _input_key(config: SimpleNamespace, kind: str) -> str | None:
    # timm's webdataset reader looks for the image under the same names again once it is decoded, and then it is 'jpg'
    return f'{config.input_key};jpg' if kind == 'wds' and config.input_key else config.input_key


class _CheckedLabel:
    """Refuses a label that the network has no class for, on the host, before a loss on a GPU dies of it."""

    def __init__(self, num_classes: int, inner: Any = None):
        self.num_classes = num_classes
        self.inner = inner

    def __call__(self, target: Any) -> Any:
        target = target if self.inner is None else self.inner(target)
        if not 0 <= int(target) < self.num_classes:
            raise ValueError(
                f'Label {int(target)} is outside of the {self.num_classes} classes of the model: set num_classes.')
        return target


def _check_folders(dataset: Any, config: SimpleNamespace, split: str) -> None:
    """Raise an error about a split without a folder, or a class without an image: its labels would be others."""
    root = Path(getattr(dataset.reader, 'root', config.data_dir))
    if not root.is_dir():
        return
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    if root == Path(config.data_dir) and split:
        raise FileNotFoundError(
            f"data_dir '{config.data_dir}' has no folder '{split}': it holds {', '.join(folders) or 'no folders'}.")
    if config.class_map:
        return
    filled = {Path(name).parts[0] for name in dataset.filenames()}
    empty = [name for name in folders if name not in filled and not name.startswith('.')]
    if empty:
        raise ValueError(
            f'{root}: no image of {", ".join(empty)}. An empty class shifts the labels of the others: '
            'remove its folder, or name all classes in a class_map.'
        )


def build_dataset(
        config: SimpleNamespace,
        split: str,
        channels: int,
        is_training: bool,
        num_classes: int | None = None,
) -> Any:
    """Open a split of the data set.

    Args:
        config: The configuration.
        split: Name of the split.
        channels: Channels of the images.
        is_training: Whether it is for training, which shuffles a stream.
        num_classes: Classes of the network, which labels are checked against.

    Raises:
        FileNotFoundError: Its folder, or an image in it, is missing.
        ModuleNotFoundError: Its kind needs a package that is not installed.
        ValueError: No folder is given, the data set is unknown, or a class has no image.
    """
    kind = _kind(config)
    try:
        dataset = create_dataset(
            config.dataset,
            root=config.data_dir,
            split=split,
            is_training=is_training,
            class_map=config.class_map or None,
            download=config.dataset_download,
            batch_size=config.batch_size,
            seed=config.seed,
            repeats=config.epoch_repeats if is_training else 0,
            input_img_mode=config.input_img_mode or ('RGB' if channels == 3 else 'L'),
            input_key=_input_key(config, kind),
            target_key=config.target_key,
            num_samples=config.train_num_samples if is_training else config.val_num_samples,
            trust_remote_code=config.dataset_trust_remote_code,
        )
        if kind == 'hfds':
            dataset.reader[0][0].close()  # a field that is not there shows with the first image
    except (AssertionError, RuntimeError, TypeError, KeyError, ValueError) as error:
        reason = str(error) or 'not found'
        if kind in _PACKAGES:
            hint = ' They are train_num_samples and val_num_samples.' if 'num_samples' in reason else ''
            raise ValueError(
                f"dataset '{config.dataset}', split '{split}', input_key {config.input_key}, target_key "
                f'{config.target_key}: {" ".join(reason.split())}{hint}'
            ) from error
        if not isinstance(error, (AssertionError, RuntimeError)):
            raise
        raise FileNotFoundError(f"data_dir '{config.data_dir}', split '{split}': {reason}") from error
    if kind == '':
        _check_folders(dataset, config, split)
        name_unreadable(dataset)
    if num_classes is not None and hasattr(dataset, 'target_transform'):
        dataset.target_transform = _CheckedLabel(num_classes, dataset.target_transform)
    return dataset


def class_names(dataset: Any) -> list[str] | None:
    """Return the names of a data set's classes in the order of their indices, where it knows them."""
    known = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or getattr(dataset, 'class_to_idx', None)
    if not isinstance(known, Mapping) or sorted(known.values()) != list(range(len(known))):
        return None
    return [str(name) for name in sorted(known, key=lambda name: known[name])]


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
