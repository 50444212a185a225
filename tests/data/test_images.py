"""Images as they are measured: what is white stays white, and what cannot be read counts in nothing"""
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform
from torch.utils.data import DataLoader

from dreal_timm.data.images import NO_LABEL, ImageSet, UnreadableImageError, read_image
from dreal_timm.data.opening import open_dataset
from dreal_timm.train.evaluate import evaluate


@pytest.fixture
def grey():
    """All grey values of 8 bits."""
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(('dtype', 'mode'), [(np.uint16, 'I;16'), (np.int32, 'I'), ('>u2', 'I;16B')])
@pytest.mark.parametrize('wanted', ['L', 'RGB'])
def test_sixteen_bits(tmp_path, grey, dtype, mode, wanted):
    """16 bits of grey give the values that the same image has in 8 bits."""
    Image.fromarray((grey.astype(np.uint16) * 257).astype(dtype)).save(tmp_path / 'a.tif')
    assert Image.open(tmp_path / 'a.tif').mode == mode
    expected = Image.fromarray(grey).convert(wanted)
    assert np.array_equal(np.asarray(read_image(tmp_path / 'a.tif', wanted)), np.asarray(expected))


def test_sixteen_bits_are_rounded(tmp_path):
    """Values between are rounded to the nearest."""
    values = np.array([[0, 128, 129, 32_767, 65_406, 65_407, 65_535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / 'a.png')
    expected = np.floor(values / 65_535 * 255 + 0.5)
    assert np.asarray(read_image(tmp_path / 'a.png', 'L')).tolist() == expected.tolist()


@pytest.mark.parametrize('values', [
    np.array([[0.0, 0.5, 1.0]], dtype=np.float32), np.array([[0, 65_536]], dtype=np.int32),
    np.array([[-1, 200]], dtype=np.int32)])
def test_what_has_no_white_is_refused(tmp_path, values):
    """Floats, and integers beyond 16 bits, stop with the name of the file, and are not taken for unreadable."""
    Image.fromarray(values).save(tmp_path / 'strange.tif')
    with pytest.raises(ValueError, match=r'strange\.tif') as caught:
        read_image(tmp_path / 'strange.tif', 'L')
    assert not isinstance(caught.value, OSError)


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB', 'RGBA', 'LA', 'CMYK'])
@pytest.mark.parametrize('wanted', ['L', 'RGB'])
def test_other_modes_are_as_in_timm(tmp_path, mode, wanted):
    """All else is what PIL's conversion makes of it, transparency and EXIF orientation included."""
    folder = tmp_path / 'validation' / 'a'
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, 'RGBA').convert('RGB').convert(mode) if mode != 'RGBA' else Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(folder / ('a.jpg' if mode == 'CMYK' else 'a.png'), exif=exif)
    theirs = create_dataset('', tmp_path, split='validation', input_img_mode=wanted)[0][0]
    ours = open_dataset('', str(tmp_path), 'validation', image_mode=wanted)[0][0]
    assert ours.size == theirs.size == (6, 8)
    assert ours.tobytes() == theirs.tobytes()


def _bomb(path):
    """A PNG of a few hundred bytes that tells of 20,000 x 20,000 pixels."""
    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    header = struct.pack('>IIBBBBB', 20_000, 20_000, 8, 0, 0, 0, 0)
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b''))


def _cut(path):
    Image.new('L', (64, 64), 200).save(path)
    path.write_bytes(path.read_bytes()[:60])


BROKEN = {
    'empty': lambda path: path.write_bytes(b''),
    'text': lambda path: path.write_text('not an image'),
    'cut off': _cut,
    'pipe': os.mkfifo,
    'folder': os.mkdir,
    'device': lambda path: path.symlink_to('/dev/zero'),
    'nowhere': lambda path: path.symlink_to('nowhere.png'),
    'bomb': _bomb,
}


@pytest.mark.parametrize('kind', BROKEN)
def test_unreadable(tmp_path, kind):
    """Whatever is no image is one error, at once."""
    BROKEN[kind](tmp_path / 'a.png')
    with pytest.raises(UnreadableImageError, match=r'a\.png'):
        read_image(tmp_path / 'a.png', 'L')


@pytest.fixture
def broken(tmp_path):
    """9 images of two classes in an order of their own, of which one of each kind of broken file takes a place."""
    for split in ('train', 'validation'):
        for label in range(2):
            (tmp_path / split / f'class{label}').mkdir(parents=True)
            for i in range(9):
                Image.new('L', (8, 8), 100 * label + 10 * i).save(tmp_path / split / f'class{label}' / f'{i}.png')
    for place, kind in enumerate(['empty', 'text', 'cut off', 'pipe', 'device', 'bomb']):
        path = tmp_path / 'validation' / f'class{place % 2}' / f'{place}.png'
        path.unlink()
        BROKEN[kind](path)
    return tmp_path


class Brightness(torch.nn.Module):
    """Logits of five classes out of the mean of an image, with rounding of its own."""

    def forward(self, images):
        mean = images.mean((1, 2, 3))
        return torch.stack([mean * k - k * k * 0.3 for k in range(5)], 1).half().float()


def _by_hand(folder):
    """Loss, top-1 and top-5 of the images that PIL opens, each alone."""
    transform = create_transform((1, 8, 8), mean=(0.4,), std=(0.3,), crop_pct=1.0)
    rows = []
    for label in range(2):
        for i in range(9):
            if i < 6 and i % 2 == label:
                continue
            image = Image.open(folder / 'validation' / f'class{label}' / f'{i}.png')
            logits = Brightness()(transform(image)[None])[0].double()
            rank = int((logits > logits[label]).sum())
            rows.append((float(logits.logsumexp(0) - logits[label]), rank < 1, rank < 5))
    loss, top1, top5 = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return {'loss': loss, 'top1': 100 * top1, 'top5': 100 * top5, 'samples': len(rows)}


def _loader(folder, workers=0, distributed=False):
    dataset = open_dataset('', str(folder), 'validation', channels=1, num_classes=5)
    return create_loader(
        dataset, (1, 8, 8), 4, mean=(0.4,), std=(0.3,), crop_pct=1.0, num_workers=workers, distributed=distributed,
        device=torch.device('cpu'), persistent_workers=False)


@pytest.mark.parametrize('workers', [0, 2])
def test_an_evaluation_leaves_them_out(broken, workers):
    """Loss, top-1, top-5 and their number are those of the images that can be read."""
    found = evaluate(Brightness(), _loader(broken, workers), torch.device('cpu'))
    assert found == pytest.approx(_by_hand(broken), rel=1e-5)


@pytest.mark.parametrize('processes', [2, 4, 5])
def test_several_processes_leave_them_out(broken, processes, monkeypatch):
    """The sampler's padding is cut off first, and then what cannot be read: each process counts its own."""
    totals = np.zeros(4)
    for rank in range(processes):
        monkeypatch.setattr(torch.distributed, 'is_available', lambda: True)
        monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: processes)
        monkeypatch.setattr(torch.distributed, 'get_rank', lambda rank=rank: rank)
        found = evaluate(Brightness(), _loader(broken, distributed=True), torch.device('cpu'))
        count = found['samples']
        totals += [found['loss'] * count, found['top1'] * count, found['top5'] * count, count]
    expected = _by_hand(broken)
    assert totals[3] == expected['samples']
    assert dict(zip(('loss', 'top1', 'top5'), totals[:3] / totals[3], strict=True)) == pytest.approx(
        {name: expected[name] for name in ('loss', 'top1', 'top5')}, rel=1e-5)


def test_an_evaluation_is_timms_to_the_bit(broken):
    """Where all images can be read, the numbers are those of timm's evaluator with its own loss."""
    from timm.task import ClassificationEvaluator
    for place in range(6):
        path = broken / 'validation' / f'class{place % 2}' / f'{place}.png'
        path.unlink()
        Image.new('L', (8, 8), 7 * place).save(path)
    evaluator = ClassificationEvaluator()
    for images, target in _loader(broken):
        evaluator.update(Brightness()(images), target)
    found = evaluate(Brightness(), _loader(broken), torch.device('cpu'))
    assert {name: found[name] for name in ('loss', 'top1', 'top5')} == dict(evaluator.compute())
    assert found['samples'] == 18


def test_nothing_can_be_read(tmp_path):
    """An evaluation of no image is an error, and not a number."""
    (tmp_path / 'validation' / 'a').mkdir(parents=True)
    (tmp_path / 'validation' / 'a' / '0.png').write_bytes(b'')
    with pytest.raises(ValueError, match='None of the images'):
        evaluate(Brightness(), _loader(tmp_path), torch.device('cpu'))


def test_they_keep_their_place(broken):
    """A set to measure on has a black image without a label in each one's place; one to train on, the next image."""
    expected = [NO_LABEL if i < 6 and i % 2 == label else label for label in range(2) for i in range(9)]
    measured = open_dataset('', str(broken), 'validation', channels=1)
    assert isinstance(measured, ImageSet)
    assert [label for _, label in measured] == expected
    trained = open_dataset('', str(broken), 'validation', channels=1, is_training=True)
    means = [float(np.asarray(image).mean()) for image, _ in trained]
    own = [100 * (i // 9) + 10 * (i % 9) for i in range(18)]
    assert means == [own[i] if label >= 0 else own[i + 1] for i, label in enumerate(expected)]
    assert [label for _, label in trained] == [0] * 9 + [1] * 9


def test_a_float_stops_a_loader(tmp_path):
    """In a loader process too the first image without a white stops, with the file's name."""
    (tmp_path / 'validation' / 'a').mkdir(parents=True)
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / 'validation' / 'a' / 'depth.tif')
    dataset = open_dataset('', str(tmp_path), 'validation', channels=1, image_key='.tif')
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r'depth\.tif'):
            next(iter(DataLoader(dataset, num_workers=workers)))
