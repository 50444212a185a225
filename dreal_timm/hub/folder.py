"""Folders of exported networks, looked at before anything of them is believed

Files are plain ones of bounded size before they are opened, the config is bounded before a network is built of it, and
the network is built without memory, with no more tensors than the file of weights has.
"""
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from dreal_timm.errors import WeightsError, reason
from dreal_timm.hub.config import CONFIG, check_config
from dreal_timm.hub.fetch import WEIGHTS_FILES, digest
from dreal_timm.hub.files import check_place, read_bytes
from dreal_timm.hub.shapes import check_weights

__all__ = ['SUMS', 'UNLISTED', 'check_folder', 'checksums', 'find_weights', 'read_checksums']

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
        lines = read_bytes(directory / SUMS, 2 ** 20).decode('utf-8').splitlines()
    except (OSError, ValueError) as error:
        raise WeightsError(f'{what}: it cannot be read ({reason(error)}): export the network again.') from error
    sums: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch('([0-9a-f]{64})  ([A-Za-z0-9._][A-Za-z0-9._/ -]*)', line)
        if match is None or '..' in PurePosixPath(match[2]).parts or match[2] in sums:
            raise WeightsError(f'{what}: it has a line that is none of a list of files: export the network again.')
        sums[match[2]] = match[1]
    return sums


def _compare(directory: Path, name: str, expected: dict[str, str]) -> None:
    what = f"'{directory}', {name}"
    if name not in expected:
        raise WeightsError(f'{what}: {SUMS} does not name it: export the network again.')
    check_place(directory, name)
    if digest(directory / name) != expected[name]:
        raise WeightsError(f'{what}: it is not what was exported (wrong SHA-256): export the network again.')


def find_weights(directory: Path) -> str:
    """Return the name of the file of weights that timm loads of a folder.

    Raises:
        WeightsError: There is none.
    """
    for name in WEIGHTS_FILES:
        if os.path.lexists(directory / name):
            return name
    raise WeightsError(f"'{directory}': it has no {' or '.join(WEIGHTS_FILES)}.")


def check_folder(directory: str | Path, everything: bool = False) -> dict[str, Any]:
    """Return the config of an exported folder, whose files are what was exported.

    Files are compared with the list `SHA256SUMS` where the folder has one; names and shapes of the weights are compared
    with the network's. What is no plain file, or giant, is refused before it is read.

    Args:
        directory: The folder; one of the Hub's cache may link to its blobs.
        everything: Look at all files, and require the list; else at those that are loaded.

    Raises:
        WeightsError: A file is missing, broken, not the one that was exported, or of another architecture; or the
            config fetches or opens something.
    """
    directory = Path(directory)
    try:
        weights = find_weights(directory)
        listed = read_checksums(directory) if everything or os.path.lexists(directory / SUMS) else None
        for name in (CONFIG, weights):
            check_place(directory, name)
        config = check_config(directory)
        check_weights(directory, weights, exported=listed is not None)
        if listed is not None:
            for name in dict.fromkeys([CONFIG, weights, *(listed if everything else ())]):
                _compare(directory, name, listed)
    except WeightsError:
        raise
    except Exception as error:  # of any kind, since arguments and tensors come from files
        raise WeightsError(f"'{directory}': it holds no network that can be loaded ({reason(error)}).") from error
    return config
