"""Errors as users see them"""
import difflib
import pickle
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import SafetensorError

__all__ = [
    'UNREADABLE', 'WeightsError', 'nearest', 'one_line', 'printable', 'reason', 'was_interrupted', 'why_unreadable']

# what the readers of weight files raise for one that is broken or foreign
UNREADABLE = (RuntimeError, KeyError, EOFError, OSError, struct.error, pickle.UnpicklingError, SafetensorError)


class WeightsError(OSError, ValueError):
    """Weights cannot be had: one line that names repository or folder, file, cause and what to do.

    What was caught first is its `__cause__`.
    """


def printable(text: str, keep: str = '') -> str:
    """Return a text whose control characters, and others that a terminal does not show, are escapes: `\\x1b`.

    Args:
        text: What comes from a file, such as its name.
        keep: Characters to leave, such as line ends.
    """
    return ''.join(
        sign if sign.isprintable() or sign in keep else sign.encode('unicode_escape').decode() for sign in text)


def reason(error: BaseException, most: int | None = 200) -> str:
    """Return why something failed as a line of visible characters, for the middle of another message.

    Args:
        error: What was raised; of the system's own errors, what they say without number and file.
        most: Characters of it; None are all.
    """
    text = (error.strerror if isinstance(error, OSError) else '') or str(error)
    return printable(' '.join(text.split())[:most]) or type(error).__name__


def one_line(error: BaseException) -> str:
    """Return what a user needs to know of an error, without a traceback; of an error in a loader process, its own."""
    text = str(error)
    if 'Original Traceback' in text:
        text = text.strip().splitlines()[-1].partition(': ')[2] or text
    text = printable(' '.join(text.split()))
    if isinstance(error, (ValueError, OSError, ModuleNotFoundError, FloatingPointError)) and text:
        return text
    return f'{type(error).__name__}: {text[:300]}'


def was_interrupted(error: BaseException | None) -> bool:
    """Return whether an error is Ctrl-C, or came of it: PyTorch's writer makes a RuntimeError of one."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def why_unreadable(error: BaseException) -> str:
    """Return why a file of weights could not be read; PyTorch's own reasons are a page with colours."""
    text = ' '.join(re.sub(r'\x1b\[[0-9;]*m', '', str(error)).split())
    found = re.search(r'(?:Unsupported globals:|GLOBAL) ([\w.]*\w)', text)
    if found is not None:
        return f'it holds {found[1]}, which is no tensor, and might run code'
    return text[:200] or type(error).__name__


def nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """Return a hint at the most similar known name, for the middle of a message, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ''
