"""Fashion-MNIST, laid out as torchvision and timm's `dataset: torch/fashion_mnist` read it

Source: H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST, https://arxiv.org/abs/1708.07747 - licence MIT. 70,000 images
of 28 x 28 pixels, one channel, in ten classes of equal size.
"""
import gzip
import shutil
from pathlib import Path

from torchvision.datasets import FashionMNIST

__all__ = ['DEBIAN_FILES', 'prepare_fashion_mnist']

DEBIAN_FILES = Path('/usr/share/datasets/fashion-mnist')
"""Where Debian's package dataset-fashion-mnist has the four gz files."""

_IMAGES = {'train': 60_000, 'validation': 10_000}


def _check(directory: str | Path) -> dict[str, int]:
    """Debian packs the files anew, so that their checksums say nothing: count what is in them."""
    counts = {}
    for split, images in _IMAGES.items():
        dataset = FashionMNIST(str(directory), train=split == 'train')
        classes = dataset.targets.bincount(minlength=10).tolist()
        if dataset.data.shape != (images, 28, 28) or classes != [images // 10] * 10:
            raise ValueError(
                f'{split}: expected {images:,} images of 28 x 28 pixels, {images // 10:,} a class, got '
                f'{tuple(dataset.data.shape)} and {classes}.'
            )
        counts[split] = len(dataset)
    return counts


def prepare_fashion_mnist(directory: str | Path, source: str | Path | None = None) -> dict[str, int]:
    """Write `FashionMNIST/raw/` below a folder, from files on disk or by torchvision's download.

    Args:
        directory: Folder to write to.
        source: Folder with the four gz files of the data set. None takes those of Debian's package where it is
            installed, and downloads them elsewhere.

    Returns:
        Number of images of each split.

    Raises:
        FileExistsError: The data set is there already.
        FileNotFoundError: A file is missing in the source.
        ValueError: The files hold other numbers of images than the data set has; they are removed again.
    """
    folder = Path(directory) / 'FashionMNIST'
    if folder.exists():
        raise FileExistsError(f'{folder} exists: choose another folder, or remove it.')
    if source is None and DEBIAN_FILES.is_dir():
        source = DEBIAN_FILES
    paths = [] if source is None else [Path(source) / name for name, _ in FashionMNIST.resources]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f'{path} is missing.')
    try:
        if source is None:
            FashionMNIST(str(directory), download=True)
        for path in paths:
            (folder / 'raw').mkdir(parents=True, exist_ok=True)
            with gzip.open(path, 'rb') as packed, (folder / 'raw' / path.stem).open('wb') as unpacked:
                shutil.copyfileobj(packed, unpacked)
        return _check(directory)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
