"""Letters seen through fonts: a small retrieval set in Market-1501's layout, drawn from fonts that are on the machine

An identity is a letter, a camera is a font with its own paper and ink, and an image is one view of it: turned, scaled,
shifted, blurred and with noise. Letters that are tested are not trained on. The fonts are DejaVu's, which come with
matplotlib (licence of Bitstream Vera, changes in the public domain), or those of a folder.
"""
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from dreal_timm.utils.scratch import new_folder

__all__ = ['FONTS', 'draw_letters', 'prepare_glyphs']

FONTS = (
    'DejaVuSans', 'DejaVuSans-Bold', 'DejaVuSans-Oblique', 'DejaVuSansMono', 'DejaVuSerif', 'DejaVuSerif-Italic')
_CANVAS = 64
_SEED = 2020
_TRAIN, _TEST, _DISTRACTORS = 300, 300, 60


def _fonts(source: str | Path | None) -> list[Path]:
    if source is not None:
        fonts = sorted(path for path in Path(source).rglob('*') if path.suffix.lower() in ('.ttf', '.otf'))
        if len(fonts) < 2:
            raise FileNotFoundError(f"'{source}' has {len(fonts)} fonts (*.ttf, *.otf), expected 2 or more.")
        return fonts
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError('The fonts come with matplotlib: pip install "dreal_timm[reid]"') from None
    return [Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / f'{name}.ttf' for name in FONTS]


def _drawn(letter: str, font: Any) -> Image.Image:
    """A letter in white on black, in the middle of its canvas."""
    left, top, right, bottom = font.getbbox(letter)
    image = Image.new('L', (_CANVAS, _CANVAS))
    at = ((_CANVAS - right - left) / 2, (_CANVAS - bottom - top) / 2)
    ImageDraw.Draw(image).text(at, letter, fill=255, font=font)
    return image


def _letters(paths: Sequence[Path], fonts: Sequence[Any]) -> list[str]:
    """Letters that all fonts have, less those that look like an earlier one in one of them, such as Cyrillic A."""
    from matplotlib.ft2font import FT2Font
    shared: set[int] = set.intersection(*(set(FT2Font(str(path)).get_charmap()) for path in paths))
    letters, seen = [], [set[bytes]() for _ in fonts]
    for letter in (chr(code) for code in sorted(shared)):
        if unicodedata.category(letter) not in ('Lu', 'Ll', 'Lo', 'Lt') or unicodedata.decomposition(letter)[:1] == '<':
            continue
        pictures = [_drawn(letter, font).tobytes() for font in fonts]
        if any(picture in known for picture, known in zip(pictures, seen, strict=True)) or not any(pictures[0]):
            continue
        for picture, known in zip(pictures, seen, strict=True):
            known.add(picture)
        letters.append(letter)
    return letters


def _view(picture: Image.Image, camera: int, draw: np.random.Generator, size: int) -> Image.Image:
    """One view of a letter: geometry, then the camera's paper and ink, blur and noise."""
    turn, scale = np.deg2rad(draw.normal(0, 8)), draw.uniform(0.8, 1.25)
    shift, slant = draw.uniform(-5, 5, 2), draw.normal(0, 0.1)
    cos, sin = np.cos(turn) / scale, np.sin(turn) / scale
    matrix = np.array([[cos, sin + slant], [-sin, cos]])
    middle = np.full(2, _CANVAS / 2)
    offset = middle - matrix @ (middle + shift)
    data = (*matrix[0], offset[0], *matrix[1], offset[1])
    picture = picture.transform((_CANVAS, _CANVAS), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    if draw.random() < 0.3:  # something stands before it
        x, y = draw.integers(8, 44, 2).tolist()
        picture.paste(int(draw.integers(0, 256)), (x, y, x + 12, y + 12))
    picture = picture.filter(ImageFilter.GaussianBlur(draw.uniform(0.3, 1.8)))
    picture = picture.resize((size, size), Image.Resampling.BOX)
    style = np.random.default_rng([_SEED, camera])
    paper, ink = style.uniform(0.55, 0.95), style.uniform(0.05, 0.4)
    if camera % 3 == 2:  # a negative
        paper, ink = ink, paper
    slope = style.normal(0, 0.12, 2)  # light from one side
    paper, ink = paper + draw.normal(0, 0.06), ink + draw.normal(0, 0.06)
    across = np.linspace(-1, 1, size)
    light = slope[0] * across[None, :] + slope[1] * across[:, None]
    values = paper + (ink - paper) * np.asarray(picture) / 255 + light + draw.normal(0, 0.06, (size, size))
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def _write(directory: Path, letters: Sequence[str], fonts: Sequence[Any], views: int, size: int) -> dict[str, int]:
    counts = {'train': 0, 'query': 0, 'gallery': 0}
    folders = {'train': 'bounding_box_train', 'query': 'query', 'gallery': 'bounding_box_test'}
    for folder in folders.values():
        (directory / folder).mkdir(parents=True)
    for number, letter in enumerate(letters, 1):
        pid = 0 if number > _TRAIN + _TEST else number
        for camera, font in enumerate(fonts, 1):
            picture = _drawn(letter, font)
            for view in range(views):
                split = 'train' if 0 < pid <= _TRAIN else 'query' if pid and view == 0 else 'gallery'
                image = _view(picture, camera, np.random.default_rng([_SEED, number, camera, view]), size)
                image.save(directory / folders[split] / f'{pid:04}_c{camera}s1_{ord(letter):06}_{view:02}.png')
                counts[split] += 1
    return counts


def _chosen(source: str | Path | None, count: int, more: int = 0) -> tuple[list[Any], list[str]]:
    """The fonts, and so many of the letters that they share, in an order of their own, with up to so many more."""
    paths = _fonts(source)
    try:
        fonts = [ImageFont.truetype(str(path), 44) for path in paths]
    except OSError as error:
        raise ValueError(f"'{source or paths[0].parent}': one of its files is no font ({error}).") from error
    letters = _letters(paths, fonts)
    if len(letters) < count:
        raise ValueError(f'The fonts share {len(letters)} letters that look different, expected {count}.')
    order = np.random.default_rng(_SEED).permutation(len(letters))[:count + more]
    return fonts, [letters[i] for i in order]


def draw_letters(
        classes: int = 300,
        views: dict[str, int] | None = None,
        size: int = 32,
        source: str | Path | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Draw a classification set of letters, the same for the same fonts and versions of Pillow.

    Args:
        classes: Number of letters.
        views: Images of a letter in a font, of each split; None draws 6 to train on and 6 to test.
        size: Side of the images, pixels.
        source: Folder of fonts (*.ttf, *.otf); None takes six of DejaVu's out of matplotlib.

    Returns:
        Of each split grey images, (N, size, size) uint8, and labels, (N,) int64.

    Raises:
        FileNotFoundError: No fonts.
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: The fonts share too few letters, or one of them is none.
    """
    fonts, letters = _chosen(source, classes)
    first, splits = 0, {}
    for split, count in (views or {'train': 6, 'test': 6}).items():
        images, labels = [], []
        for number, letter in enumerate(letters):
            for camera, font in enumerate(fonts, 1):
                picture = _drawn(letter, font)
                for view in range(first, first + count):
                    draw = np.random.default_rng([_SEED, number + 1, camera, view])
                    images.append(np.asarray(_view(picture, camera, draw, size)))
                    labels.append(number)
        splits[split] = np.stack(images), np.array(labels, dtype=np.int64)
        first += count
    return splits


def prepare_glyphs(
        directory: str | Path,
        source: str | Path | None = None,
        views: int = 4,
        size: int = 32,
) -> dict[str, int]:
    """Write letters as grey PNG files in Market-1501's layout, the same for the same fonts and versions of Pillow.

    300 letters are trained on, 300 others are queries (one view of each font) and gallery (the rest), and up to 60 more
    are distractors, identity 0.

    Args:
        directory: Folder to write, which must not exist.
        source: Folder of fonts (*.ttf, *.otf), each a camera; None takes six of DejaVu's out of matplotlib.
        views: Images of a letter in a font.
        size: Side of the images, pixels.

    Returns:
        Number of images of 'train', 'query' and 'gallery'.

    Raises:
        FileExistsError: The folder exists.
        FileNotFoundError: No fonts.
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: The fonts share too few letters, or one of them is none.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f'{directory} exists: choose another folder, or remove it.')
    fonts, letters = _chosen(source, _TRAIN + _TEST, _DISTRACTORS)
    with new_folder(directory) as folder:
        return _write(folder, letters, fonts, views, size)
