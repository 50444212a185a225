"""What a command writes to a terminal: names of files cannot steer it"""
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from dreal_timm.errors import printable

__all__ = ['set_up_log', 'text_table', 'visible_output']

_LINES = '\n\t'
_LOUD = ('timm', 'accelerate', 'httpx', 'httpx2', 'huggingface_hub', 'onnx_ir', 'onnxscript')


class _Formatter(logging.Formatter):
    """Messages whose control characters, of names of files for one, are visible."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a message."""
        return printable(super().format(record), keep=_LINES)


class _Output:
    """The same for what is printed."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, with its lines."""
        return int(self._stream.write(printable(text, keep=_LINES)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def text_table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a table, so many of its first columns aligned to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        '  '.join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows]


def set_up_log() -> None:
    """Let the log of a command be its messages, and of the libraries the warnings alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter('%(message)s'))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def visible_output() -> Iterator[None]:
    """Have control characters of what is printed be visible."""
    with redirect_stdout(_Output(sys.stdout)):
        yield
