"""Files that are there whole or not at all"""
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ['replacing', 'sync', 'write_text']


def sync(path: Path) -> None:
    """Have the disk hold a file (or the entries of a folder) before anything is built on it."""
    if path.is_dir() and os.name == 'nt':
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path, scratch: Path | None = None, synced: bool = False) -> Iterator[Path]:
    """Yield a file beside `path` to write, which takes its place in one step at the end, or is removed after an error.

    Args:
        path: The file.
        scratch: The file beside it; None is one of this process's own.
        synced: Whether the disk holds it, and its name, at the end.

    Raises:
        OSError: It cannot take the place; what was there is what it was.
    """
    scratch = scratch or path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield scratch
        if synced:
            sync(scratch)
        os.replace(scratch, path)
        if synced:
            sync(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step; where that fails, on a full disk, the file is what it was.

    Raises:
        OSError: It cannot be written.
    """
    with replacing(path) as scratch:
        scratch.write_text(text, encoding='utf-8', newline='')
