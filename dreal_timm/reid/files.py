"""Image files in folders, with links to folders"""
import logging
import os
from collections import Counter, deque
from collections.abc import Hashable
from pathlib import Path

from dreal_timm.data.folders import every_extension

__all__ = ['file_key', 'folders_in', 'image_files', 'is_image']

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.ppm')
_logger = logging.getLogger(__name__)


def file_key(path: Path) -> Hashable:
    """Return what all paths of a file have in common, through links of either kind; a missing file is its own path."""
    try:
        status = os.stat(path)
    except OSError:
        return path
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _leads_back(real: str, *places: str) -> bool:
    """Whether a folder holds one of these places, so that a link to it is a loop."""
    return any(Path(place).is_relative_to(real) for place in places)


def folders_in(folder: Path) -> list[Path]:
    """Return the folders in a folder and the links to folders, sorted, less hidden ones and links that lead back to it.

    Raises:
        FileNotFoundError: A link leads nowhere.
    """
    own, folders = os.path.realpath(folder), []
    for path in sorted(folder.iterdir()):
        if path.name.startswith('.'):
            continue
        if path.is_symlink() and not os.path.exists(path):
            raise FileNotFoundError(f"'{path}' is a link that leads nowhere.")
        if os.path.isdir(path) and not _leads_back(os.path.realpath(path), own):
            folders.append(path)
    return folders


def is_image(path: Path) -> bool:
    """Return whether a path has the name of an image; it may be broken, or a link that leads nowhere."""
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith('.') and not os.path.isdir(path)


def image_files(folder: Path, deep: bool = False) -> list[Path]:
    """Return the images of a folder, see `is_image`, sorted; a warning tells what else there are.

    Args:
        folder: The folder.
        deep: Whether folders inside of it are looked into, and those that links lead to, each of them once. Links that
            lead nowhere are returned whatever their name is, since they may be folders.

    Raises:
        FileNotFoundError: It is missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"'{folder}' is missing.")
    start, kinds = os.path.realpath(folder), tuple(every_extension().split(';'))
    images: list[Path] = []
    others: Counter[str] = Counter()
    seen: set[str] = set()
    waiting = deque([(folder, '')])
    while waiting and (deep or not seen):
        here, parent = waiting.popleft()
        real = os.path.realpath(here)
        if real in seen or (parent and _leads_back(real, start, parent)):
            continue
        seen.add(real)
        for path in here.iterdir():
            if path.name.startswith('.'):
                continue
            if os.path.isdir(path):
                # folders before links, so that an image has its path without a link where there is one
                (waiting.append if path.is_symlink() else waiting.appendleft)((path, real))
            elif is_image(path) or (deep and not os.path.exists(path)):
                images.append(path)
            elif path.suffix.lower() in kinds:
                others[path.suffix.lower()] += 1
    if others:
        kinds_found = ', '.join(f'{count:,} {suffix}' for suffix, count in sorted(others.items()))
        _logger.warning(f'{folder}: {others.total():,} image files of other kinds are left out ({kinds_found}).')
    for path, real in waiting:
        if not _leads_back(os.path.realpath(path), real) and any(map(is_image, path.iterdir())):
            _logger.warning(f"{folder}: folders are not looked into here, and '{path.name}' has images.")
            break
    return sorted(images)
