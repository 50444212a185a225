"""Folders of exported networks, looked at before anything of them is believed"""
import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

import timm
import torch
from safetensors import safe_open

from dreal_timm.errors import UNREADABLE, WeightsError
from dreal_timm.hub.fetch import digest

__all__ = ['SUMS', 'UNLISTED', 'check_folder', 'checksums', 'read_checksums']

SUMS = 'SHA256SUMS'
UNLISTED = ('README.md', '.gitattributes', SUMS)  # a card may be edited


def checksums(directory: Path) -> str:
    """Return lines of `sha256sum` for the files of a folder, but for its card."""
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob('*') if path.is_file())
    return ''.join(f'{digest(directory / name)}  {name}\n' for name in names if name not in UNLISTED)


def read_checksums(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that the folder's list names.

    Raises:
        WeightsError: The list cannot be read, or names a file outside of the folder.
    """
    what = f"'{directory}', {SUMS}"
    try:
        lines = (directory / SUMS).read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f'{what}: it cannot be read ({error}): export the network again.') from error
    found: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch('([0-9a-f]{64})  ([A-Za-z0-9._][A-Za-z0-9._/ -]*)', line)
        if match is None or '..' in PurePosixPath(match[2]).parts or match[2] in found:
            raise WeightsError(f'{what}: it has a line that is none of a list of files: export the network again.')
        found[match[2]] = match[1]
    return found


def _compare(directory: Path, name: str, expected: dict[str, str]) -> None:
    what = f"'{directory}', {name}"
    if name not in expected:
        raise WeightsError(f'{what}: {SUMS} does not name it: export the network again.')
    try:
        inside = (directory / name).resolve().is_relative_to(directory.resolve())
        if inside and digest(directory / name) == expected[name]:
            return
    except OSError as error:
        raise WeightsError(f'{what}: {error.strerror or error}: export the network again.') from error
    raise WeightsError(f'{what}: it is not what was exported (wrong SHA-256): export the network again.')


def _config(directory: Path) -> dict[str, Any]:
    what = f"'{directory}', config.json"
    try:
        config = json.loads((directory / 'config.json').read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f'{what}: it cannot be read ({" ".join(str(error).split())[:100]}).') from error
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise WeightsError(f'{what}: it names no architecture: it is not of a network that timm exported.')
    if not timm.is_model(config['architecture']):
        name = config['architecture'][:60]
        raise WeightsError(f"{what}: timm has no architecture '{name}': import the package that registers it, "
                           'or update timm.')
    return config


def _check_shapes(directory: Path) -> None:
    """Compare names and shapes of the weights with those of the network, before any of it takes memory."""
    try:
        with torch.device('meta'):
            expected = timm.create_model(f'local-dir:{directory}', pretrained=False).state_dict()
    except (NotImplementedError, RuntimeError):
        return  # one that computes while it is built
    with safe_open(directory / 'model.safetensors', 'pt') as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    what = f"'{directory}', model.safetensors"
    for word, names in (
        ('has no', expected.keys() - shapes.keys()), ('has a foreign', shapes.keys() - expected.keys()),
    ):
        if names:
            raise WeightsError(f'{what}: it {word} {min(names)[:60]}: it is of another architecture than config.json.')
    for name, shape in shapes.items():
        if shape != list(expected[name].shape):
            raise WeightsError(
                f'{what}: {name} is {shape} and not {list(expected[name].shape)}: '
                'it is of another architecture than config.json.')


def check_folder(directory: str | Path, everything: bool = False) -> dict[str, Any]:
    """Return the config of an exported folder, whose files are what was exported.

    Files are compared with the list `SHA256SUMS` where the folder has one; weights in safetensors are compared with
    the network by names and shapes.

    Args:
        directory: The folder.
        everything: Look at all files, and require the list; else at those that are loaded.

    Raises:
        WeightsError: A file is missing, broken, not the one that was exported, or of another architecture.
    """
    directory = Path(directory)
    try:
        if everything or (directory / SUMS).exists():
            listed = read_checksums(directory)
            for name in dict.fromkeys(['config.json', 'model.safetensors', *(listed if everything else ())]):
                _compare(directory, name, listed)
        config = _config(directory)
        if (directory / 'model.safetensors').is_file():
            _check_shapes(directory)
    except WeightsError:
        raise
    except (*UNREADABLE, AssertionError, TypeError, ValueError, AttributeError, MemoryError, OverflowError) as error:
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(f"'{directory}': it holds no network that can be loaded ({reason}).") from error
    return config
