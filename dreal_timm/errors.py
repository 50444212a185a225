"""Errors as users see them"""
import pickle
import struct

from safetensors import SafetensorError

__all__ = ['UNREADABLE', 'one_line']

# what the readers of weight files raise for one that is broken or foreign
UNREADABLE = (RuntimeError, KeyError, EOFError, OSError, struct.error, pickle.UnpicklingError, SafetensorError)


def one_line(error: BaseException) -> str:
    """Return what a user needs to know of an error, without a traceback; of an error in a loader process, its own."""
    text = str(error)
    if 'Original Traceback' in text:
        text = text.strip().splitlines()[-1].partition(': ')[2] or text
    text = ' '.join(text.split())
    if isinstance(error, (ValueError, OSError, ModuleNotFoundError, FloatingPointError)) and text:
        return text
    return f'{type(error).__name__}: {text[:300]}'
