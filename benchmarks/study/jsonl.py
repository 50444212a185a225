"""The runs of a study in one file, a line of JSON each, to which several processes may add"""
import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a file in its order; none where there is no file, and none of a line without an end."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding='utf-8').split('\n')  # what follows the last end of a line is half a run
    return [json.loads(line) for line in lines]


def append(path: Path, run: Mapping[str, Any]) -> None:
    """Add a run to a file. Half a line, which a process left that was killed as it wrote, is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('a+b') as file:  # O_APPEND: what is written stands at the end, whoever wrote before
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b'\n') + 1)
        file.write(json.dumps(run).encode() + b'\n')
