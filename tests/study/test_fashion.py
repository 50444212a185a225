"""The study's image sets"""
import gzip
import struct

import pytest
import torch
from study import fashion
from torchvision.datasets import FashionMNIST


def test_files_of_fashion_mnist(tmp_path):
    """Read where our command or torchvision writes them, and packed as Debian has them; one missing is an error."""
    generator = torch.Generator().manual_seed(0)
    folders = {'raw': tmp_path / 'written' / 'FashionMNIST' / 'raw', 'packed': tmp_path / 'packed'}
    for folder in folders.values():
        folder.mkdir(parents=True)
    for prefix, n in (('train', 6), ('t10k', 4)):
        pixels = torch.randint(256, (n, 28, 28), dtype=torch.uint8, generator=generator).numpy().tobytes()
        for name, content in (
            ('images-idx3', struct.pack('>4i', 2051, n, 28, 28) + pixels),
            ('labels-idx1', struct.pack('>2i', 2049, n) + bytes(range(n))),
        ):
            (folders['raw'] / f'{prefix}-{name}-ubyte').write_bytes(content)
            (folders['packed'] / f'{prefix}-{name}-ubyte.gz').write_bytes(gzip.compress(content))
    written, packed = fashion.load(tmp_path / 'written'), fashion.load(tmp_path / 'packed')
    known = FashionMNIST(str(tmp_path / 'written'), train=False)
    for split, n in (('train', 6), ('test', 4)):
        assert torch.equal(written[split][0], packed[split][0]) and written[split][1].tolist() == list(range(n))
    inner = written['test'][0][:, 0, 2:-2, 2:-2] * fashion.STD + fashion.MEAN
    torch.testing.assert_close(inner * 255, known.data.float())
    (folders['packed'] / 't10k-labels-idx1-ubyte.gz').unlink()
    with pytest.raises(FileNotFoundError, match=r"No 't10k-labels-idx1-ubyte\.gz' in '.*dreal-timm data fashion-mnist"):
        fashion.load(tmp_path / 'packed')
