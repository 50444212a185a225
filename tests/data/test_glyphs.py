"""Letters seen through fonts: what is written, that it repeats, and what is refused"""
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from dreal_timm.cli import main
from dreal_timm.data import glyphs, prepare_glyphs
from dreal_timm.reid import check_reid, open_reid


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp('glyphs') / 'data'
    return prepare_glyphs(directory, views=2, size=24), directory


def test_layout(written):
    """300 letters to train on, 300 others to look for, distractors, six cameras, a query of each letter and camera."""
    counts, directory = written
    data = open_reid(directory)
    assert data.layout == 'market1501'
    assert counts == {split: len(getattr(data, split)) for split in counts}
    assert counts == {'train': 300 * 6 * 2, 'query': 300 * 6, 'gallery': 300 * 6 + 60 * 6 * 2}
    assert (data.identities('train'), data.identities('query')) == (list(range(1, 301)), list(range(301, 601)))
    assert set(Counter((image.pid, image.camid) for image in data.query).values()) == {1}
    assert sum(image.pid == 0 for image in data.gallery) == 720
    found = check_reid(data, images_per_identity=8)
    assert found.problems == ()
    assert {row['cameras'] for row in found.counts.values()} == {6}


def test_images(written):
    """Images are grey, of the size asked for, none is empty, no two are alike, and letters are legible to a machine."""
    _, directory = written
    paths = sorted((directory / 'bounding_box_train').iterdir())[:600]
    pixels = []
    for path in paths:
        with Image.open(path) as image:
            assert (image.mode, image.size) == ('L', (24, 24))
            pixels.append(np.asarray(image).astype(float))
    assert min(image.std() for image in pixels) > 5
    assert len({image.tobytes() for image in pixels}) == len(pixels)
    # within a camera, the other view of a letter is nearer than most others are
    camera = [(path.name[:4], image.ravel()) for path, image in zip(paths, pixels, strict=True) if '_c5' in path.name]
    flat = np.stack([(image - image.mean()) / image.std() for _, image in camera])
    likeness = flat @ flat.T
    np.fill_diagonal(likeness, -np.inf)
    ranks = []
    for i, (letter, _) in enumerate(camera):
        own = [j for j, (other, _) in enumerate(camera) if other == letter and j != i]
        ranks.append((likeness[i] > likeness[i, own].max()).sum())
    assert np.median(ranks) < 0.4 * len(camera)


def test_letters_look_different():
    """No two letters have one picture in any font, and each has ink in all."""
    paths = glyphs._fonts(None)
    fonts = [ImageFont.truetype(str(path), 44) for path in paths]
    letters = glyphs._letters(paths, fonts)
    assert len(letters) == len(set(letters)) > 660
    for font in fonts:
        pictures = {glyphs._drawn(letter, font).tobytes() for letter in letters}
        assert len(pictures) == len(letters)
        assert all(any(picture) for picture in pictures)
    # Cyrillic and Greek twins of Latin letters are left out
    assert {'A', 'B', 'o'} <= set(letters) and not {'А', 'В', 'о', 'Α'} & set(letters)  # noqa: RUF001


def test_views_repeat(written):
    """An image is the same wherever it is made, in whatever order."""
    _, directory = written
    path = directory / 'bounding_box_train' / 'x'
    path = next(path.parent.glob('0017_c4*_01.png'))
    font = ImageFont.truetype(str(glyphs._fonts(None)[3]), 44)
    picture = glyphs._drawn(chr(int(path.name.split('_')[2])), font)
    again = glyphs._view(picture, 4, np.random.default_rng([2020, 17, 4, 1]), 24)
    with Image.open(path) as image:
        assert image.tobytes() == again.tobytes()


def test_errors(written, tmp_path, monkeypatch, capsys):
    """A folder that exists, fonts that are none or too few, and a missing matplotlib: a line each, and no file."""
    assert main(['data', 'glyphs', str(written[1])]) == 2
    assert 'exists' in capsys.readouterr().err
    fonts = tmp_path / 'fonts'
    fonts.mkdir()
    assert main(['data', 'glyphs', str(tmp_path / 'new'), '--source', str(fonts)]) == 2
    assert 'has 0 fonts' in capsys.readouterr().err
    for name in ('a.ttf', 'b.ttf'):
        (fonts / name).write_bytes(b'no font')
    assert main(['data', 'glyphs', str(tmp_path / 'new'), '--source', str(fonts)]) == 2
    assert 'no font' in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert main(['data', 'glyphs', str(tmp_path / 'new')]) == 2
    assert 'pip install "dreal_timm[reid]"' in capsys.readouterr().err
    assert not (tmp_path / 'new').exists()


def test_fonts_of_a_folder(tmp_path, monkeypatch):
    """Each font of a folder is a camera."""
    monkeypatch.setattr(glyphs, '_TRAIN', 3)
    monkeypatch.setattr(glyphs, '_TEST', 4)
    monkeypatch.setattr(glyphs, '_DISTRACTORS', 1)
    (tmp_path / 'fonts').mkdir()
    for path in glyphs._fonts(None)[1:4]:
        (tmp_path / 'fonts' / Path(path).name).write_bytes(Path(path).read_bytes())
    counts = prepare_glyphs(tmp_path / 'data', tmp_path / 'fonts', views=3)
    assert counts == {'train': 27, 'query': 12, 'gallery': 24 + 9}
