"""Images of re-identification for a loader of torch or timm"""
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from dreal_timm.data.images import read_image
from dreal_timm.reid.layouts import ReidImage

__all__ = ['SMALLEST', 'ReidSet', 'check_images', 'why_broken']

SMALLEST = 2  # pixels of a side: less is an empty detection


class ReidSet(Dataset[tuple[Any, int]]):
    """Images with labels.

    Args:
        images: The images.
        labels: Label of each identity, by its number; None gives each image its place.
        channels: 3 for colour, 1 for grey.

    Attributes:
        transform: What loaders of timm set: from an image to what is batched.
    """

    def __init__(self, images: Sequence[ReidImage], labels: dict[int, int] | None = None, channels: int = 3):
        self.images = list(images)
        self.labels = [i if labels is None else labels[image.pid] for i, image in enumerate(self.images)]
        self.mode = 'RGB' if channels == 3 else 'L'
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path = self.images[index].path
        try:
            image = read_image(path, self.mode)
        except OSError as error:
            raise ValueError(str(error)) from None
        return image if self.transform is None else self.transform(image), self.labels[index]


def why_broken(path: Path, whole: bool = True) -> str:
    """Return why an image cannot be used, or nothing.

    Args:
        path: The file.
        whole: Whether all of it is read, or its header alone.
    """
    try:
        if whole:
            width, height = read_image(path, 'RGB').size
        elif not stat.S_ISREG(os.stat(path).st_mode):
            return 'cannot be read: not a regular file'  # opening a pipe would wait for ever
        else:
            with Image.open(path) as image:
                width, height = image.size
    except MemoryError:
        raise
    except Exception as error:  # PIL raises of all kinds for a broken file
        reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        reason = reason.removeprefix(f"'{path}' ") if whole else f'cannot be read: {reason}'
        return ' '.join(reason.split()).rstrip('.')
    return f'is {width} x {height} pixels' if min(width, height) < SMALLEST else ''


def check_images(images: Sequence[ReidImage], whole: bool = False, workers: int = 4) -> None:
    """Look at each file: is it an image, and one of more than a pixel?

    Args:
        images: The images.
        whole: Whether all of it is read, or its header alone.
        workers: Threads that read them.

    Raises:
        ValueError: One is not; the first is named, and their number.
    """
    with ThreadPoolExecutor(workers) as pool:
        reasons = pool.map(partial(why_broken, whole=whole), (image.path for image in images))
        problems = [f"'{image.path}' {reason}" for image, reason in zip(images, reasons, strict=True) if reason]
    if problems:
        more = f', and {len(problems) - 1:,} more are broken' if len(problems) > 1 else ''
        raise ValueError(f'{problems[0]}{more}.')
