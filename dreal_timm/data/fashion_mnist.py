"""Fashion-MNIST, laid out as torchvision and timm's `dataset: torch/fashion_mnist` read it

Source: H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST, https://arxiv.org/abs/1708.07747 - licence MIT. 70,000 images
of 28 x 28 pixels, one channel.
"""
import gzip
import shutil
from pathlib import Path

from torchvision.datasets import FashionMNIST
from torchvision.datasets.utils import check_integrity

__all__ = ['DEBIAN_FILES', 'prepare_fashion_mnist']

DEBIAN_FILES = Path('/usr/share/datasets/fashion-mnist')
"""Where Debian's package dataset-fashion-mnist has the four gz files."""


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
        ValueError: A file has another checksum than torchvision's.
    """
    raw = Path(directory) / 'FashionMNIST' / 'raw'
    if raw.exists():
        raise FileExistsError(f'{raw} exists: choose another folder, or remove it.')
    if source is None and DEBIAN_FILES.is_dir():
        source = DEBIAN_FILES
    if source is None:
        FashionMNIST(str(directory), download=True)
    else:
        files = [(Path(source) / name, md5) for name, md5 in FashionMNIST.resources]
        for path, md5 in files:
            if not path.is_file():
                raise FileNotFoundError(f'{path} is missing.')
            if not check_integrity(str(path), md5):
                raise ValueError(f'{path} is not the file that torchvision knows: its checksum differs.')
        raw.mkdir(parents=True)
        for path, _ in files:
            with gzip.open(path, 'rb') as packed, (raw / path.stem).open('wb') as unpacked:
                shutil.copyfileobj(packed, unpacked)
    return {
        'train': len(FashionMNIST(str(directory), train=True)),
        'validation': len(FashionMNIST(str(directory), train=False)),
    }
