"""What is read of an image: 16 bits, floats, and files that are none"""
import os

import numpy as np
import pytest
import torch
from PIL import Image
from reid.pictures import PEOPLE, market, save
from torchvision.transforms.functional import pil_to_tensor

from dreal_timm.cli import main
from dreal_timm.reid import check_reid, open_reid
from dreal_timm.reid.images import ReidSet, check_images, why_broken
from dreal_timm.reid.layouts import ReidImage
from dreal_timm.reid.pictures import Ranking, draw_rankings


def ramp(path, mode):
    """A grey ramp of 16 x 32 pixels, and its values of 8 bits."""
    values = np.arange(512, dtype=np.uint16).reshape(32, 16) // 2
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == 'L':
        Image.fromarray(values.astype(np.uint8)).save(path)
    else:
        Image.fromarray((values * 257).astype(np.uint16 if mode == 'I;16' else np.int32)).save(path)
    assert Image.open(path).mode in (mode, 'I;16')
    return torch.from_numpy(values.astype(np.uint8))


@pytest.mark.parametrize('mode', ['L', 'I;16', 'I'])
@pytest.mark.parametrize('channels', [1, 3])
def test_grey_of_16_bits(tmp_path, mode, channels):
    """Grey of 16 bits is that of 8 bits, and not white."""
    path = tmp_path / ('ramp.png' if mode != 'I' else 'ramp.tif')
    expected = ramp(path, mode)
    image, _ = ReidSet([ReidImage(path, 1, 1)], channels=channels)[0]
    found = pil_to_tensor(image)
    assert torch.equal(found, expected.expand(channels, -1, -1))
    assert not why_broken(path)
    draw_rankings([Ranking(path, [path], [0.0])], tmp_path / 'lists.png')
    drawn = Image.open(tmp_path / 'lists.png').convert('L').crop((12, 12, 70, 132))
    assert abs(np.asarray(drawn).mean() - expected.float().mean()) < 5


def test_floats_are_refused(tmp_path):
    """Pixels of floats have no white: the file is named, by the check and by the loader."""
    path = tmp_path / 'float.tif'
    Image.fromarray(np.linspace(0, 1, 512, dtype=np.float32).reshape(32, 16)).save(path)
    assert 'mode F' in why_broken(path)
    for read in (lambda: ReidSet([ReidImage(path, 1, 1)])[0], lambda: check_images([ReidImage(path, 1, 1)], True)):
        with pytest.raises(ValueError, match=r"float\.tif'.*mode F"):
            read()


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='a system without pipes')
@pytest.mark.parametrize('whole', [False, True])
def test_a_pipe_is_no_image(tmp_path, whole):
    """A pipe by the name of an image is named, and nobody waits for it; it is not left out without a word."""
    root = market(tmp_path)
    pipe = root / 'bounding_box_test' / '0003_c1s1_000077_01.jpg'
    os.mkfifo(pipe)
    assert 'not a regular file' in why_broken(pipe, whole)
    images = open_reid(root).gallery
    assert len(images) == 1 + sum(count for pid, _, count in PEOPLE['bounding_box_test'] if pid >= 0)
    with pytest.raises(ValueError, match='not a regular file') as caught:
        check_images(images, whole)
    assert str(pipe) in str(caught.value)
    assert check_reid(open_reid(root)).details['broken'] == [f'{pipe} (cannot be read: not a regular file)']
    assert main(['reid', 'check', str(root)]) == 1


def test_too_many_pixels(tmp_path, monkeypatch):
    """An image of more pixels than PIL unpacks is refused by its name, from its header on."""
    save(tmp_path / 'large.png', 1, 1, 1)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    for whole in (False, True):
        with pytest.raises(ValueError, match=r"large\.png' cannot be read.*exceeds limit"):
            check_images([ReidImage(tmp_path / 'large.png', 1, 1)], whole)
