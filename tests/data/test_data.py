import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_dataset

from dreal_timm.data import fashion_mnist, prepare_digits, prepare_fashion_mnist


def test_digits(tmp_path):
    """All 1,797 digits are there once, in the classes they have, four fifths of each class for training."""
    counts = prepare_digits(tmp_path / 'digits')
    assert counts == {'train': 1442, 'validation': 355}
    digits = load_digits()
    splits = {split: create_dataset('', tmp_path / 'digits', split=split, input_img_mode='L') for split in counts}
    pixels = []
    for split, dataset in splits.items():
        assert len(dataset) == counts[split]
        labels = np.bincount([target for _, target in dataset])
        assert len(labels) == 10
        assert labels.max() - labels.min() <= 10
        pixels += [(np.asarray(image).tobytes(), target) for image, target in dataset]
    expected = [
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), target)
        for image, target in zip(digits.images, digits.target.tolist(), strict=True)
    ]
    assert sorted(pixels) == sorted(expected)


def test_digits_are_fixed(tmp_path):
    """Twice prepared, the files are the same; an existing folder is not written to."""
    for name in 'ab':
        prepare_digits(tmp_path / name)
    first, second = (sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob('*.png')) for n in 'ab')
    assert first == second
    path = tmp_path / 'a' / first[100]
    assert path.read_bytes() == (tmp_path / 'b' / first[100]).read_bytes()
    assert Image.open(path).mode == 'L'
    with pytest.raises(FileExistsError, match='exists'):
        prepare_digits(tmp_path / 'a')


def fake_source(folder: Path, counts: dict[str, int]) -> Path:
    """Four small gz files in the format of the data set, with so many images."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, count in zip(('train', 't10k'), counts.values(), strict=True):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = np.array([0x803, count, 28, 28], dtype='>i4').tobytes()
        labels = np.array([0x801, count], dtype='>i4').tobytes() + bytes(i % 10 for i in range(count))
        for kind, content in (('images-idx3', header + images.tobytes()), ('labels-idx1', labels)):
            (folder / f'{prefix}-{kind}-ubyte.gz').write_bytes(gzip.compress(content))
    return folder


def test_fashion_mnist_from_files(tmp_path, monkeypatch):
    """The files are laid out as timm's torch/fashion_mnist reads them: grey images of 28 x 28 pixels."""
    expected = {'train': 20, 'validation': 10}
    monkeypatch.setattr(fashion_mnist, '_IMAGES', expected)
    source = fake_source(tmp_path / 'source', expected)
    assert prepare_fashion_mnist(tmp_path / 'data', source) == expected
    for split, count in expected.items():
        dataset = create_dataset('torch/fashion_mnist', tmp_path / 'data', split=split)
        assert len(dataset) == count
        image, target = dataset[1]
        assert (image.mode, image.size, target) == ('L', (28, 28), 1)
    with pytest.raises(FileExistsError, match='exists'):
        prepare_fashion_mnist(tmp_path / 'data', source)


def test_fashion_mnist_with_a_wrong_source(tmp_path):
    """A missing file is named, files with other images are refused, and nothing is left behind."""
    source = fake_source(tmp_path / 'source', {'train': 20, 'validation': 10})
    with pytest.raises(ValueError, match='60,000'):
        prepare_fashion_mnist(tmp_path / 'data', source)
    (source / 't10k-labels-idx1-ubyte.gz').unlink()
    with pytest.raises(FileNotFoundError, match='t10k-labels'):
        prepare_fashion_mnist(tmp_path / 'data', source)
    assert not (tmp_path / 'data' / 'FashionMNIST').exists()


@pytest.mark.skipif(not fashion_mnist.DEBIAN_FILES.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_from_debian(tmp_path):
    """The package's files hold the 70,000 images, 7,000 a class."""
    counts = prepare_fashion_mnist(tmp_path)
    assert counts == {'train': 60_000, 'validation': 10_000}
