"""Image folders: what is an image of which class, and what was left out"""
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions

from dreal_timm.data.classes import same_name
from dreal_timm.errors import reason

__all__ = ['check_tar', 'empty_classes', 'every_extension', 'read_class_map', 'tidy']

_MORE = ('.bmp', '.webp')  # that timm leaves out
_NOT_BY_PIL = ('.heic', '.heif', '.avif', '.jxl')
_logger = logging.getLogger(__name__)


def every_extension() -> str:
    """Return the extensions of all image files, for the `input_key` of timm's reader of folders."""
    known = Image.registered_extensions()
    return ';'.join(sorted({*(ext for ext, name in known.items() if name in Image.OPEN), *_MORE, *_NOT_BY_PIL}))


def read_class_map(class_map: str | Mapping[str, int], root: str = '') -> dict[str, int]:
    """Return the index of each class by its name.

    Args:
        class_map: File as timm has it (.txt with a name a line, or .pkl), or what is returned.
        root: Folder to look for it in as well.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no class map.
    """
    try:
        indices = load_class_map(dict(class_map) if isinstance(class_map, Mapping) else str(class_map), root)
    except AssertionError as error:
        if 'locate' in str(error):
            raise FileNotFoundError(f"class_map: no file '{class_map}'.") from None
        raise ValueError(f'class_map: {error}.') from None
    except Exception as error:  # of pickle or the decoder
        raise ValueError(f"class_map: '{class_map}' cannot be read ({reason(error)}).") from error
    # a mark of Windows' editors is no part of the first name
    names = {same_name(str(name).removeprefix('\ufeff')): index for name, index in indices.items() if name != ''}
    if not names or not all(isinstance(index, int) and 0 <= index < 1_000_000 for index in names.values()):
        raise ValueError(f"class_map: '{class_map}' does not give each class a number from 0 on.")
    return names


def _first(names: Any) -> str:
    shown = sorted(names)
    return ', '.join(shown[:3]) + (f' and {len(shown) - 3:,} more' if len(shown) > 3 else '')


def tidy(reader: Any, extensions: str | None, class_map: Mapping[str, int] | None) -> None:
    """Take out of a reader of a folder what is no image of a class, and say what that was.

    Names that begin with a dot are none, nor are files of other extensions; a class is a folder with images in it.

    Args:
        reader: timm's, of files with `every_extension` and without a class map.
        extensions: Those to read, with a semicolon between them; None are timm's with .bmp and .webp.
        class_map: Index of each class by its name; classes that it does not name are left out.

    Raises:
        FileNotFoundError: No image is left.
        ValueError: Folders of one name would become one class, or an image lies in no class.
    """
    types = tuple((extensions or ';'.join([*get_img_extensions(), *_MORE])).lower().split(';'))
    root = str(reader.root)
    names = {index: name for name, index in reader.class_to_idx.items()}
    samples: list[tuple[str, str]] = []
    other: dict[str, int] = {}
    unnamed: dict[str, int] = {}
    places: dict[str, str] = {}
    for path, index in reader.samples:
        folder, file = os.path.split(os.path.relpath(path, root))
        name = names[index]
        if file.startswith('.') or any(part.startswith('.') for part in folder.split(os.sep)):
            continue
        if not file.lower().endswith(types):
            extension = os.path.splitext(file)[1].lower()
            other[extension] = other.get(extension, 0) + 1
        elif class_map is not None and same_name(name) not in class_map:
            unnamed[name] = unnamed.get(name, 0) + 1
        elif not folder:
            raise ValueError(f"'{path}' lies beside the folders of the classes, and is of none: take it away.")
        elif places.setdefault(name, folder) != folder:
            raise ValueError(
                f"{root}: the folders '{places[name]}' and '{folder}' would be one class, '{name}': a class is the "
                'folder that its images lie in. Give them names of their own.')
        else:
            samples.append((path, name))
    if other:
        _logger.warning(
            f"{root}: {sum(other.values()):,} image files of other kinds are left out "
            f"({', '.join(f'{count:,} {extension}' for extension, count in sorted(other.items()))}).")
    if unnamed:
        _logger.warning(
            f'{root}: {sum(unnamed.values()):,} images of classes that class_map does not name are left out: '
            f'{_first(unnamed)}.')
    if not samples:
        raise FileNotFoundError(f"Found 0 images in the folders of '{root}': extensions are {', '.join(types)}.")
    filled = {name for _, name in samples}
    if class_map is None:
        ordered = [name for name in reader.class_to_idx if name in filled]
        class_map = {same_name(name): index for index, name in enumerate(ordered)}
    reader.class_to_idx = dict(class_map)
    reader.samples = [(path, class_map[same_name(name)]) for path, name in samples]


def empty_classes(reader: Any) -> list[str]:
    """Return the folders of a data set that should be classes and hold no image."""
    root = str(reader.root)
    filled = {os.path.relpath(path, root).split(os.sep, 1)[0] for path, _ in reader.samples}
    folders = sorted(path.name for path in Path(root).iterdir() if path.is_dir() and not path.name.startswith('.'))
    return [name for name in folders if name not in filled]


def check_tar(reader: Any) -> None:
    """Raise a ValueError if folders of a tar would become one class, or an image lies in no class.

    Args:
        reader: timm's, of a tar.
    """
    places: dict[int, str] = {}
    for (info, tar, _), target in zip(reader.samples, reader.targets, strict=True):
        folder = f"{tar or ''}/{os.path.dirname(info.path)}".strip('/.')
        if not folder:
            raise ValueError(f"'{reader.root}': {info.path} lies beside the folders of the classes, and is of none.")
        if places.setdefault(int(target), folder) != folder:
            raise ValueError(
                f"'{reader.root}': the folders '{places[int(target)]}' and '{folder}' would be one class. Give them "
                'names of their own.')
