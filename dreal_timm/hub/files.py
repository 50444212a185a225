"""Files of strangers: plain ones alone, read up to a size, and nothing that grows while it is read"""
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dreal_timm.errors import WeightsError, reason

__all__ = ['check_front_matter', 'check_place', 'check_plain', 'read_bytes', 'read_json', 'read_yaml', 'walk']

_KINDS = {'p': 'a pipe', 'c': 'a device', 'b': 'a device', 'd': 'a folder', 's': 'a socket'}
_DEEPEST = 32
_FRONT = 2 ** 14  # characters of YAML at the head of a card
_NODES = 10 ** 5  # of YAML, with what it refers to counted each time


def check_plain(path: str | Path, limit: int | None = None) -> int:
    """Return the size of a file in bytes, without opening it.

    Args:
        path: The file; a link counts as what it leads to.
        limit: Largest size that is read.

    Raises:
        OSError: No such file, or a link that leads nowhere.
        ValueError: It is a pipe, a device or a folder, or it is larger.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f'it is {_KINDS.get(stat.filemode(status.st_mode)[0], "something else")}, and no plain file')
    if limit is not None and status.st_size > limit:
        raise ValueError(f'it has {status.st_size:,} bytes, where {limit:,} are the most')
    return status.st_size


def check_place(directory: Path, name: str) -> None:
    """Raise a WeightsError if a file of a folder is none or a link out of it; the Hub's cache links to its blobs."""
    what = f"'{directory}', {name}"
    try:
        check_plain(directory / name)
        target, folder = (directory / name).resolve(), directory.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f'{what}: {reason(error)}.') from error
    blobs = [folder.parent.parent / 'blobs'] if folder.parent.name == 'snapshots' else []
    if not any(target.is_relative_to(place) for place in (folder, *blobs)):
        raise WeightsError(f'{what}: it is not what was exported, but a link to what lies outside of the folder.')


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Return what a plain file of at most so many bytes holds.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no plain file, or it is larger.
    """
    check_plain(path, limit)
    with open(path, 'rb') as file:
        content = file.read(limit + 1)
    if len(content) > limit:  # it has grown meanwhile
        raise ValueError(f'it has more than {limit:,} bytes')
    return content


def walk(value: Any, most: int) -> list[Any]:
    """Return all texts, numbers and other leaves of a nested value, and the keys of its tables.

    Args:
        value: Of lists, tables and leaves.
        most: Number of leaves, lists and tables that it may have.

    Raises:
        ValueError: It is deeper than 32, or has more.
    """
    leaves: list[Any] = []
    waiting, count = [(value, 0)], 0
    while waiting:
        part, depth = waiting.pop()
        count += 1
        if depth > _DEEPEST or count > most:
            raise ValueError(f'it is nested more than {_DEEPEST} deep, or has more than {most:,} values')
        if isinstance(part, Mapping):
            leaves += part.keys()
            waiting += [(inner, depth + 1) for inner in part.values()]
        elif isinstance(part, (list, tuple)):
            waiting += [(inner, depth + 1) for inner in part]
        else:
            leaves.append(part)
        if len(waiting) > most:
            raise ValueError(f'it has more than {most:,} values')
    return leaves


def read_json(path: str | Path, limit: int, finite: bool = False) -> Any:
    """Return the value of a JSON file.

    Args:
        path: The file.
        limit: Its largest size in bytes.
        finite: Whether NaN and infinite numbers are errors.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no plain file, larger, or no JSON.
    """
    def number(text: str) -> float:
        if finite and not math.isfinite(float(text)):
            raise ValueError(f'it holds {text[:20]}, which is no number')
        return float(text)

    content = read_bytes(path, limit).decode('utf-8')
    try:
        return json.loads(content, parse_constant=number, parse_float=number)
    except RecursionError as error:
        raise ValueError('it is nested too deep') from error


class _Loader(yaml.SafeLoader):
    """YAML without merge keys, which double with each line."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave `<<` what it is, which nothing constructs."""


def _parse_yaml(content: bytes) -> Any:
    try:
        value = yaml.load(content, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(reason(error)) from error
    except RecursionError as error:
        raise ValueError('it is nested too deep') from error
    walk(value, _NODES)
    return value


def read_yaml(path: str | Path, limit: int = 2 ** 16) -> Any:
    """Return the value of a YAML file; the arguments and errors are those of `read_json`."""
    return _parse_yaml(read_bytes(path, limit))


def check_front_matter(card: str) -> None:
    """Raise a ValueError if the YAML at the head of a card cannot be read, or grows while it is."""
    match = re.match(r'\s*---\s*?\n(.*?)\n---', card.replace('\r\n', '\n'), re.DOTALL)
    if match and len(match[1]) > _FRONT:
        raise ValueError(f'it has {len(match[1]):,} characters, where {_FRONT:,} are the most')
    if match:
        _parse_yaml(match[1].encode())
