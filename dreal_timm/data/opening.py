"""Opening a data set: timm's, of all kinds, with what could go wrong looked at first"""
import importlib.util
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from timm.data import ImageDataset, create_dataset

from dreal_timm.data.classes import Match, class_names, match_classes, network_names, relabel
from dreal_timm.data.folders import check_tar, empty_classes, every_extension, read_class_map, tidy
from dreal_timm.data.images import ImageSet, read_image
from dreal_timm.errors import nearest

__all__ = ['open_dataset', 'open_for']

_logger = logging.getLogger(__name__)

_KINDS = ('torch', 'hfds', 'hfids', 'wds', 'tfds')
_PACKAGES = {'hfds': 'datasets', 'hfids': 'datasets', 'wds': 'webdataset', 'tfds': 'tensorflow_datasets'}


def _kind(name: str, root: str | None, class_map: Any, download: bool) -> str:
    """Return the kind of the data set, '' for an image folder, after a look at what can be seen without opening it."""
    kind, slash, _ = name.partition('/')
    kind = kind.lower()
    if name and not (slash and kind in _KINDS):
        raise ValueError(
            f"dataset: expected kind/name such as torch/fashion_mnist, got '{name}'{nearest(kind, _KINDS)}. "
            f'Kinds are {", ".join(_KINDS)}; an image folder has none.'
        )
    package = _PACKAGES.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        command = 'pip install tensorflow-datasets' if kind == 'tfds' else 'pip install "dreal_timm[streaming]"'
        raise ModuleNotFoundError(f"dataset '{name}' needs the package {package}: {command}.")
    if kind == 'torch' and class_map:
        raise ValueError('class_map: a data set of torchvision has numbers for its classes already.')
    if kind == 'wds' and class_map:
        raise ValueError('class_map: the labels of webdataset shards are numbers already, without names to map.')
    if not root and kind in ('', 'torch', 'wds'):
        raise ValueError('data_dir: the recipe names no place of images; add data_dir=DIR.')
    local = kind in ('', 'torch') or (kind == 'wds' and ':' not in (root or ''))
    if local and not download and not Path(root or '').exists():
        raise FileNotFoundError(f"data_dir: no folder '{root}'.")
    return kind


def _open_folder(name: str, root: str, split: str, extensions: str | None, class_map: Any, **options: Any) -> Any:
    """Open an image folder, or a tar of images."""
    if Path(root).is_file():
        dataset = create_dataset(name, root=root, split=split, class_map=class_map or None, **options)
        check_tar(dataset.reader)
        return dataset
    dataset = create_dataset(name, root=root, split=split, input_key=every_extension(), **options)
    folder = str(dataset.reader.root)
    if Path(folder) == Path(root) and split:
        folders = sorted(path.name for path in Path(root).iterdir() if path.is_dir())
        raise FileNotFoundError(
            f"data_dir '{root}' has no folder '{split}': it holds {', '.join(folders) or 'no folders'}.")
    tidy(dataset.reader, extensions, read_class_map(class_map, folder) if class_map else None)
    empty = [] if class_map else empty_classes(dataset.reader)
    if empty:
        raise ValueError(
            f'{folder}: no image of {", ".join(empty)}. An empty class shifts the labels of the others: '
            'remove its folder, or name all classes in a class_map.')
    return dataset


def _open(
        kind: str,
        name: str,
        root: str,
        split: str,
        class_map: str | Mapping[str, int] | None,
        image_key: str | None,
        **options: Any,
) -> Any:
    if kind == '':
        return _open_folder(name, root, split, image_key, class_map, **options)
    # timm's webdataset reader looks for the image under the same names again once it is decoded, as 'jpg'
    key = f'{image_key};jpg' if kind == 'wds' and image_key else image_key
    dataset = create_dataset(name, root=root, split=split, class_map=class_map or None, input_key=key, **options)
    if kind == 'hfds':
        dataset.reader[0][0].close()  # a field that is not there shows with the first image
    return dataset


def open_dataset(
        name: str,
        root: str | None,
        split: str,
        *,
        channels: int = 3,
        num_classes: int | None = None,
        class_map: str | Mapping[str, int] | None = None,
        download: bool = False,
        image_mode: str | None = None,
        image_key: str | None = None,
        target_key: str | None = None,
        **options: Any,
) -> Any:
    """Open a split of a data set.

    Args:
        name: Kind and name as timm has them (`torch/fashion_mnist`, `hfds/user/name`); empty is an image folder.
        root: Its folder; None where the kind needs none.
        split: Name of the split.
        channels: Channels of the images.
        num_classes: Classes of the network, which labels are checked against.
        class_map: File, or dictionary, of the names of the classes and their indices.
        download: Whether to download it where that is possible.
        image_mode: Mode of PIL that images are converted to. None is colour or grey, by the channels.
        image_key: Field of the image, of data sets that have several.
        target_key: Field of the label.
        **options: Further options of `timm.data.create_dataset`.

    Raises:
        FileNotFoundError: Its folder, or an image in it, is missing.
        ModuleNotFoundError: Its kind needs a package that is not installed.
        ValueError: No folder is given, the data set is unknown, or a class has no image.
    """
    kind = _kind(name, root, class_map, download)
    options.update(download=download, input_img_mode=image_mode or ('RGB' if channels == 3 else 'L'))
    options.update({} if target_key is None else {'target_key': target_key})
    if kind == 'torch' and name.partition('/')[2].lower() in ('folder', 'image_folder'):
        options['loader'] = partial(read_image, mode=options['input_img_mode'])
    try:
        dataset = _open(kind, name, root or '', split, class_map, image_key, **options)
    except (AssertionError, RuntimeError, TypeError, KeyError, ValueError) as error:
        reason = str(error) or 'not found'
        if kind in _PACKAGES:
            hint = ' They are train_num_samples and val_num_samples.' if 'num_samples' in reason else ''
            raise ValueError(
                f"dataset '{name}', split '{split}', input_key {image_key}, target_key {target_key}: "
                f'{" ".join(reason.split())}{hint}'
            ) from error
        if not isinstance(error, (AssertionError, RuntimeError)):
            raise
        raise FileNotFoundError(f"data_dir '{root}', split '{split}': {reason}") from error
    if isinstance(dataset, ImageDataset):
        dataset = ImageSet(dataset.reader, options['input_img_mode'], measuring=not options.get('is_training', False))
    if num_classes is not None:
        relabel(dataset, num_classes)
    return dataset


def open_for(
        network: Any,
        name: str,
        root: str | None,
        split: str,
        *,
        class_map: str | Mapping[str, int] | None = None,
        by_order: bool = False,
        **options: Any,
) -> tuple[Any, Match]:
    """Open a split to measure a network on, with labels that are its outputs (see `match_classes`).

    Args:
        network: A timm model.
        name: Kind and name, see `open_dataset`.
        root: Its folder.
        split: Name of the split.
        class_map: File, or dictionary, of the names of the classes and their outputs.
        by_order: Take the classes of the data set in their order.
        **options: Further options of `open_dataset`.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: As of `open_dataset`.
        ClassesError: Names of the classes do not tell which outputs they are.
    """
    if class_map and by_order:
        raise ValueError('classes are named by a class map, or taken in their order: not both.')
    outputs = read_class_map(class_map) if class_map and name.partition('/')[0].lower() == 'torch' else None
    dataset = open_dataset(name, root, split, class_map=None if outputs else class_map, **options)
    names = class_names(dataset)
    if class_map and outputs is None:
        samples = getattr(dataset.reader, 'samples', None)
        named = read_class_map(class_map, getattr(dataset.reader, 'root', None) or '')
        used = set(named.values()) if samples is None else {int(sample[-1]) for sample in samples}
        match = Match('map', None, network.num_classes - len(used))
    else:
        match = match_classes(names, network_names(network), network.num_classes, outputs, by_order)
    relabel(dataset, network.num_classes, match)
    if match.by == 'order':
        side = 'as asked for' if by_order else f"the {'data set' if names is None else 'network'} has no names"
        _logger.warning(f'Classes are taken in their order: {side}.')
    elif match.absent:
        _logger.info(f"{match.absent} of the network's {network.num_classes} classes are not in the data set.")
    return dataset, match
