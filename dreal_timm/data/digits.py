"""The digits of scikit-learn as an image folder: 1,797 handwritten digits of 8 x 8 pixels, shipped with the package

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (its
test set), https://archive.ics.uci.edu/dataset/80 - licence CC BY 4.0.
"""
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreal_timm.utils.scratch import new_folder

__all__ = ['prepare_digits']

_VALIDATION_EVERY = 5


def prepare_digits(directory: str | Path) -> dict[str, int]:
    """Write the digits as grey PNG files, `train/<digit>/` and `validation/<digit>/`.

    Every fifth image of a class is for validation, in the order of the data set: the split is the same everywhere.

    Args:
        directory: Folder to write, which must not exist.

    Returns:
        Number of images of each split.

    Raises:
        FileExistsError: The folder exists.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f'{directory} exists: choose another folder, or remove it.')
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError('The digits come with scikit-learn: pip install scikit-learn') from None
    digits = load_digits()
    with new_folder(directory) as folder:
        return _write(digits, folder)


def _write(digits: Any, directory: Path) -> dict[str, int]:
    counts = {'train': 0, 'validation': 0}
    seen = dict.fromkeys(range(10), 0)
    for image, label in zip(digits.images, digits.target.tolist(), strict=True):
        split = 'validation' if seen[label] % _VALIDATION_EVERY == _VALIDATION_EVERY - 1 else 'train'
        folder = directory / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.round(image * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f'{seen[label]:04d}.png')
        seen[label] += 1
        counts[split] += 1
    return counts
