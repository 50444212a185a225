"""The lock of a run's folder: two runs in one would leave the last epoch of one and the best of the other"""
import errno
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

__all__ = ['LOCK', 'FolderLock']

LOCK = '.lock'
_logger = logging.getLogger(__name__)


def _lock(file: IO[str]) -> None:
    """Lock an open file for this process; not for its children, which may live on for seconds after a kill."""
    if os.name == 'nt':
        import msvcrt
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class FolderLock:
    """Holds a folder, until it is released or the process ends in whatever way."""

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def take(self, directory: Path) -> None:
        """Hold the folder, which exists; once more is nothing.

        On a file system without locks that is said, and the run goes on.

        Raises:
            BlockingIOError: Another process holds it; its host, number and begin are named.
        """
        if self._file is not None:
            return
        file = (directory / LOCK).open('a+', encoding='utf-8')
        try:
            _lock(file)
        except OSError as error:
            file.seek(0)
            owner = ' '.join(file.read(300).split())
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise BlockingIOError(
                    f'{directory}: another run writes here ({owner or "just begun"}). Wait for it, or choose another '
                    'experiment=NAME.') from None
            _logger.warning(f'{directory}: no locks here ({error.strerror}): let no second run write to it.')
            return
        file.truncate(0)
        file.write(json.dumps({
            'host': socket.gethostname(), 'pid': os.getpid(), 'since': time.strftime('%Y-%m-%d %H:%M:%S')}) + '\n')
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let go of the folder."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None
