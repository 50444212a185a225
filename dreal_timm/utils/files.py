"""Text files that are there whole or not at all"""
import os
from pathlib import Path

__all__ = ['write_text']


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step; where that fails, on a full disk, the file is what it was.

    Raises:
        OSError: It cannot be written.
    """
    scratch = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        scratch.write_text(text, encoding='utf-8', newline='')
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
