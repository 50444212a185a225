"""Weights and the network that a config describes, compared by names and shapes before any of it takes memory"""
import json
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from dreal_timm.errors import WeightsError, printable
from dreal_timm.hub.config import CONFIG
from dreal_timm.hub.files import check_plain
from dreal_timm.hub.pickles import pickled_tensors

__all__ = ['bounded', 'build', 'check_weights', 'read_shapes']

_TABLE, _TENSORS = 2 ** 21, 10 ** 4  # bytes of the table of a file, and tensors
_Shapes = Mapping[str, tuple[str, list[int]]]


def read_shapes(path: Path) -> _Shapes:
    """Return kind ('float' or 'int') and shape of each tensor of a file of weights, without reading the tensors.

    Raises:
        Exception: It is broken, or has a giant table; of any kind, since the table comes from a file.
    """
    if path.suffix != '.safetensors':
        return {
            name: ('float' if tensor.is_floating_point() else 'int', list(tensor.shape))
            for name, tensor in pickled_tensors(path).items()}
    size = check_plain(path)
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        if length > _TABLE:
            raise ValueError(f'its table has {length:,} bytes, where {_TABLE:,} are the most')
        table = json.loads(file.read(length))
    rows = {name: row for name, row in table.items() if name != '__metadata__'}
    if size != 8 + length + max((row['data_offsets'][1] for row in rows.values()), default=0):
        raise ValueError('it is cut off, or has more than its table tells')
    if len(rows) > _TENSORS:
        raise ValueError(f'it has {len(rows):,} tensors, where {_TENSORS:,} are the most')
    for name, row in rows.items():
        if row['dtype'].startswith('C'):
            raise ValueError(f'{name[:60]} has complex numbers')
    return {
        name: ('float' if row['dtype'].startswith(('F', 'BF')) else 'int', list(row['shape']))
        for name, row in rows.items()}


@contextmanager
def bounded(tensors: int = _TENSORS, numbers: int = 2 ** 33) -> Iterator[None]:
    """Stop the build of a network that is far larger than its weights, or than any network, with a ValueError.

    Args:
        tensors: Number of the tensors of the weights.
        numbers: Number of the numbers in them.
    """
    left = {'modules': 16 * tensors + 2000, 'tensors': 2 * tensors + 1000, 'numbers': 4 * numbers + 10 ** 7}
    thread = threading.get_ident()

    def count(kind: str, size: int = 0) -> None:
        if threading.get_ident() != thread:
            return
        left[kind] -= 1
        left['numbers'] -= size
        if min(left.values()) < 0:
            raise ValueError('config.json describes a network that is far larger than the weights')

    def look(module: Any, name: str, tensor: Any) -> None:
        if tensor is not None:
            count('tensors', tensor.numel())

    handles = [
        register_module_parameter_registration_hook(look), register_module_buffer_registration_hook(look),
        register_module_module_registration_hook(lambda *_: count('modules'))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def build(name: str, **options: Any) -> Any:
    """Return a network of timm without weights, and without memory where it can be built so."""
    try:
        with torch.device('meta'):
            return timm.create_model(name, **options)
    except (NotImplementedError, RuntimeError):  # one that computes while it is built
        return timm.create_model(name, **options)


def check_weights(directory: Path, name: str, exported: bool) -> None:
    """Compare names, kinds and shapes of the weights with those of the network, before any of it takes memory.

    Args:
        directory: The folder.
        name: Name of the file of weights in it.
        exported: Whether an export wrote it, whose names are the network's. timm renames those of others as it loads
            them, and is strict itself.
    """
    what = f"'{directory}', {name}"
    tensors = read_shapes(directory / name)
    with bounded(len(tensors), sum(math.prod(shape) for _, shape in tensors.values())):
        network = build(f'local-dir:{directory}')
    expected = {
        name: ('float' if tensor.is_floating_point() else 'int', list(tensor.shape))
        for name, tensor in network.state_dict().items()}
    for word, names in (
        ('has no', expected.keys() - tensors.keys()), ('has a foreign', tensors.keys() - expected.keys()),
    ):
        if names and exported:
            raise WeightsError(
                f'{what}: it {word} {printable(min(names)[:60])}: it is of another architecture than {CONFIG}.')
    for key, (kind, shape) in tensors.items():
        if (kind, shape) != expected.get(key, (kind, shape)):
            raise WeightsError(
                f'{what}: {printable(key[:60])} is {kind} {shape} and not {expected[key][0]} {expected[key][1]}: '
                f'it is of another architecture than {CONFIG}.')
    named = network.pretrained_cfg.get('num_classes')
    classes = getattr(network, 'num_classes', named)
    if named != classes:  # timm would leave the classifier out
        raise WeightsError(
            f"'{directory}', {CONFIG}: it tells of {named} classes, and the network has {classes}: the classifier "
            'would start at random.')
