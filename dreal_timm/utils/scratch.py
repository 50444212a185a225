"""Folders that appear under their name when they are whole, and what a killed process leaves of one"""
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ['new_folder']

_LOCK = 'lock'
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def _hold(scratch: Path) -> IO[str] | None:
    """Hold a scratch folder while the file is open; None where another process does, or has removed it.

    Raises:
        OSError: The system has no such locks.
    """
    if sys.platform == 'win32':
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    import fcntl
    try:
        file = (scratch / _LOCK).open('a', encoding='utf-8')
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), (scratch / _LOCK).stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        file.close()
        raise
    file.close()
    return None


def _remove_left(directory: Path, prefix: str) -> None:
    """Remove scratch folders of this directory that no living process holds."""
    for scratch in directory.parent.iterdir():
        if not scratch.name.startswith(prefix) or scratch.is_symlink() or not scratch.is_dir():
            continue
        try:
            if {path.name for path in scratch.iterdir()} - {_LOCK, directory.name}:
                continue
            file = _hold(scratch)
        except OSError:
            continue
        if file is not None:
            with file:
                shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `directory` at the end, or is removed if anything is raised.

    It lies beside its place, in `.NAME.writing-...`, which is locked. Those of processes that were killed are removed
    by the next one that writes to the same place.

    Args:
        directory: Folder that does not exist. Its parents are made.

    Raises:
        OSError: There is no room for it; or another reason why it cannot be written.
    """
    prefix = f'.{directory.name}.writing-'
    scratch, held = None, None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(directory, prefix)
        while held is None:
            scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=prefix))
            try:
                held = _hold(scratch)
            except OSError:  # no locks here: nobody removes it then
                break
        assert scratch is not None
        folder = scratch / directory.name
        folder.mkdir()
        yield folder
        for path in folder.rglob('*'):
            path.chmod(0o755 if path.is_dir() else 0o644)
        folder.chmod(0o755)
        os.replace(folder, directory)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        reason = f"{error.strerror}: '{directory}' was not written; make room, or choose another place."
        raise OSError(error.errno, reason) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if held is not None:
            held.close()
