"""Damaged checkpoints: PyTorch writes a checksum of every record of a file, and does not compare it when it reads"""
import logging
import os
import zipfile
from pathlib import Path

from dreal_timm.errors import WeightsError, reason

__all__ = ['check_damage', 'damaged_record']

_logger = logging.getLogger(__name__)


def damaged_record(path: str | Path) -> str:
    """Return the first record of a checkpoint that is not what was written, or nothing; it takes 0.35 s a GB.

    Files of another format have no checksums, and nothing is found in them.
    """
    if not zipfile.is_zipfile(path):
        return ''
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() or ''
    except Exception as error:  # a damaged directory raises all kinds of errors
        return reason(error)


def _is_ours(path: str | Path) -> bool:
    """Return whether a run of this package wrote a checkpoint, as far as that can be read."""
    try:
        with zipfile.ZipFile(path) as file:
            names = [name for name in file.namelist() if name.endswith('/data.pkl')]
            content = file.read(names[0]) if names else b''
    except Exception:
        return True  # its own list of contents is damaged
    return b'history' in content and b'saver' in content


def check_damage(path: str | Path) -> None:
    """Compare a checkpoint with its checksums; of several processes the first does.

    A file of another program is warned about alone, since some write no checksums.

    Raises:
        WeightsError: A run of this package wrote it, and it is not what was written.
    """
    record = '' if int(os.environ.get('RANK', 0)) else damaged_record(path)
    if not record:
        return
    if _is_ours(path):
        raise WeightsError(
            f"'{path}' is damaged: {record} is not what was written (wrong CRC-32). Take another checkpoint, and look "
            'after the disk.')
    _logger.warning(f"'{path}': {record} does not have the CRC-32 that the file tells: it may be damaged.")
