"""Reading images: what cannot be read keeps its place, and 16-bit grey keeps its grey values"""
import logging
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder

from dreal_timm.errors import reason

__all__ = ['NO_LABEL', 'ImageSet', 'UnreadableImageError', 'read_image']

NO_LABEL = -1  # of an image that could not be read
_TRIES = int(os.environ.get('TIMM_DATASET_MAX_RETRIES') or 10)  # images in a row, as timm has it
_logger = logging.getLogger(__name__)


class UnreadableImageError(OSError):
    """A file is no image, is broken, or is nothing that could be read as one."""


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit grey to 8 bits; PIL would cut it off at 255."""
    if image.mode != 'F' and not image.mode.startswith('I'):
        return image
    values = np.asarray(image)
    if image.mode == 'F' or values.min() < 0 or values.max() > 65_535:
        raise ValueError(
            f"'{name}' has pixels of mode {image.mode} from {values.min():g} to {values.max():g}, and nothing says "
            'what is white: save it with 8 or 16 bits a channel.')
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def read_image(source: str | Path | BinaryIO, mode: str, name: str = '') -> Image.Image:
    """Return an image in a mode of PIL.

    Grey of 16 bits (modes I;16 and I) is divided by 257, so that white stays white; transparency is dropped and the
    orientation of EXIF is not applied, as in timm.

    Args:
        source: A file, or its path.
        mode: The mode, such as 'RGB' or 'L'.
        name: What errors call it; empty is its path.

    Raises:
        UnreadableImageError: The file is missing, broken, no regular file, or has more pixels than PIL unpacks.
        ValueError: Its pixels are floats, or integers beyond 16 bits.
    """
    name = name or str(source)
    try:
        if isinstance(source, str | Path) and not stat.S_ISREG(os.stat(source).st_mode):
            raise OSError('not a regular file')  # opening a pipe would wait for ever
        with Image.open(source) as image:
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # PIL raises of all kinds for a broken file
        why = reason(error, most=None).replace(f" '{source}'", '')
        raise UnreadableImageError(f"'{name}' cannot be read: {why}") from None
    return image.convert(mode) if mode[0] in 'IF' else _eight_bits(image, name).convert(mode)


class ImageSet(ImageDataset):
    """timm's data set of images with `read_image`.

    An image that cannot be read is named in a warning. In training the next one takes its place, as in timm; where
    something is measured it keeps its place, as a black image with the label -1.

    Args:
        reader: A reader of timm.
        image_mode: Mode of PIL.
        measuring: Whether something is measured.
    """

    def __init__(self, reader: Any, image_mode: str, measuring: bool):
        super().__init__('', reader=reader, input_img_mode=image_mode)
        self.measuring = measuring

    def _read(self, index: int) -> tuple[Image.Image, Any]:
        if isinstance(self.reader, ReaderImageFolder):  # it would open a pipe
            source, target = self.reader.samples[index]
            return read_image(source, self.input_img_mode), target
        file, target = self.reader[index][:2]
        return read_image(file, self.input_img_mode, getattr(file, 'name', None) or f'image {index}'), target

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = None, None
        for _ in range(1 if self.measuring else _TRIES):
            try:
                image, target = self._read(index)
                break
            except OSError as error:
                instead = 'it is left out' if self.measuring else 'the next image is taken in its place'
                _logger.warning(f'{error}; {instead}')
                index = (index + 1) % len(self.reader)
        if image is None and not self.measuring:
            raise RuntimeError(f'Failed to load {_TRIES} consecutive samples')
        shown: Any = Image.new(self.input_img_mode, (64, 64)) if image is None else image
        if self.transform is not None:
            shown = self.transform(shown)
        if target is None:
            return shown, NO_LABEL
        return shown, target if self.target_transform is None else self.target_transform(target)
