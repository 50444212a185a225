"""Opening a data set: timm's, of all kinds, with what could go wrong looked at first"""
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data import create_dataset

from dreal_timm.data.unreadable import name_unreadable
from dreal_timm.errors import nearest

__all__ = ['class_names', 'open_dataset']

_KINDS = ('torch', 'hfds', 'hfids', 'wds', 'tfds')
_PACKAGES = {'hfds': 'datasets', 'hfids': 'datasets', 'wds': 'webdataset', 'tfds': 'tensorflow_datasets'}


def _kind(name: str, root: str, class_map: Any, download: bool) -> str:
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
    if kind == 'wds' and class_map:
        raise ValueError('class_map: the labels of webdataset shards are numbers already, without names to map.')
    if not root and kind in ('', 'torch', 'wds'):
        raise ValueError('data_dir: the recipe names no place of images; add data_dir=DIR.')
    local = kind in ('', 'torch') or (kind == 'wds' and ':' not in root)
    if local and not download and not Path(root).exists():
        raise FileNotFoundError(f"data_dir: no folder '{root}'.")
    return kind


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


def _check_folders(dataset: Any, data_dir: str, split: str, class_map: Any) -> None:
    """Raise an error about a split without a folder, or a class without an image: its labels would be others."""
    root = Path(getattr(dataset.reader, 'root', data_dir))
    if not root.is_dir():
        return
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    if root == Path(data_dir) and split:
        raise FileNotFoundError(
            f"data_dir '{data_dir}' has no folder '{split}': it holds {', '.join(folders) or 'no folders'}.")
    if class_map:
        return
    filled = {Path(name).parts[0] for name in dataset.filenames()}
    empty = [name for name in folders if name not in filled and not name.startswith('.')]
    if empty:
        raise ValueError(
            f'{root}: no image of {", ".join(empty)}. An empty class shifts the labels of the others: '
            'remove its folder, or name all classes in a class_map.'
        )


def open_dataset(
        name: str,
        root: str,
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
        root: Its folder.
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
    try:
        dataset = create_dataset(
            name,
            root=root,
            split=split,
            class_map=class_map or None,
            download=download,
            input_img_mode=image_mode or ('RGB' if channels == 3 else 'L'),
            # timm's webdataset reader looks for the image under the same names again once it is decoded, as 'jpg'
            input_key=f'{image_key};jpg' if kind == 'wds' and image_key else image_key,
            target_key=target_key,
            **options,
        )
        if kind == 'hfds':
            dataset.reader[0][0].close()  # a field that is not there shows with the first image
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
    if kind == '':
        _check_folders(dataset, root, split, class_map)
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
