"""Weights in PyTorch's own format, looked at before they are loaded: tensors under names, in a file that holds them all

What `torch.load(weights_only=True)` allows can still ask for any memory and time. A state dict needs little of it.
"""
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict

__all__ = ['pickled_tensors']

_DIRECTORY = 2 ** 22  # bytes of the zip's list of contents
_PICKLE = 2 ** 21  # bytes
_OPCODES = frozenset((
    'PROTO', 'STOP', 'MARK', 'EMPTY_DICT', 'EMPTY_LIST', 'EMPTY_TUPLE', 'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3',
    'SETITEM', 'SETITEMS', 'APPEND', 'APPENDS', 'BINPUT', 'LONG_BINPUT', 'BINGET', 'LONG_BINGET', 'BINUNICODE',
    'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'NONE', 'NEWTRUE', 'NEWFALSE', 'GLOBAL', 'REDUCE', 'BUILD',
    'BINPERSID'))
_GLOBALS = frozenset((
    'collections OrderedDict', 'torch._utils _rebuild_tensor_v2', 'torch._utils _rebuild_parameter',
    *(f'torch {kind}Storage' for kind in (
        'Float', 'Double', 'Half', 'BFloat16', 'Long', 'Int', 'Short', 'Char', 'Byte', 'Bool'))))
_STATES = ('state_dict_ema', 'model_ema', 'state_dict', 'model')  # timm's order


def _check_directory(path: Path) -> None:
    """Bound the zip's list of contents, which is read as a whole."""
    with open(path, 'rb') as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 98))
        tail = file.read(98).rjust(98, b'\0')
        sizes = [int.from_bytes(tail[-10:-6], 'little')]
        if tail[-42:-38] == b'PK\6\7':  # the larger fields of zip64: one reader finds them by address, one by place
            file.seek(min(int.from_bytes(tail[-34:-26], 'little'), size))
            sizes = [
                *(found for found in sizes if found != 2 ** 32 - 1),
                int.from_bytes(tail[40:48], 'little'), int.from_bytes(file.read(56)[40:48], 'little')]
    if tail[-22:-18] != b'PK\5\6' or max(sizes) > _DIRECTORY:
        raise ValueError('it is not what torch.save writes today, or has too many parts')


def _pickle(path: Path) -> bytes:
    """The description of the tensors, once all parts of the file are known to be in it, uncompressed."""
    _check_directory(path)
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size for part in parts):
            raise ValueError('it is compressed')
        if sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError('its parts are larger than the file')
        if len({part.filename for part in parts}) < len(parts):
            raise ValueError('it has two parts of one name')
        named = [part for part in parts if part.filename.partition('/')[2] == 'data.pkl']
        if len(named) != 1 or named[0].file_size > _PICKLE:
            raise ValueError('it has no data.pkl, or a giant one')
        return archive.read(named[0])


def _check_opcodes(content: bytes) -> None:
    """Allow what describes tensors alone; no tuple is taken twice, since one of many layers takes for ever to hash."""
    last, tuples = '', set()
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in _OPCODES or (opcode.name == 'GLOBAL' and argument not in _GLOBALS):
            raise ValueError(f'it holds more than weights ({str(argument)[:60] if argument else opcode.name})')
        if opcode.name in ('BINPUT', 'LONG_BINPUT') and last.startswith('TUPLE'):
            tuples.add(argument)
        if opcode.name in ('BINGET', 'LONG_BINGET') and argument in tuples:
            raise ValueError('it takes a part of it twice')
        last = opcode.name


def pickled_tensors(path: Path) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a state dict that `torch.save` wrote, mapped and not read.

    Args:
        path: A plain file.

    Raises:
        OSError, RuntimeError, ValueError: It is broken, or holds more than a state dict.
    """
    try:
        _check_opcodes(_pickle(path))
    except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:
        raise ValueError(f'it is broken, or not what torch.save writes today ({error})') from error
    content: Any = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    for key in _STATES:
        if isinstance(content, dict) and content.get(key) is not None:
            content = content[key]
            break
    if not (isinstance(content, dict) and all(isinstance(name, str) for name in content)):
        raise ValueError('it holds no weights')
    state: Mapping[str, torch.Tensor] = clean_state_dict(content)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.numel() * tensor.element_size() > (
                tensor.untyped_storage().nbytes()):
            raise ValueError(f'{name[:60]} is no tensor that the file holds')
    return state
