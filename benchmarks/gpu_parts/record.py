"""What a part found, written to its JSON file after every row"""
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ['Late', 'Record', 'write_json']


class Late(Exception):
    """There is no time for what comes next."""


def write_json(path: Path, value: Any) -> None:
    """Replace a file at once, so that a killed process leaves the old one or the new one."""
    partial = path.with_name(f'.{path.name}.tmp')
    partial.write_text(json.dumps(value, indent=1) + '\n', encoding='utf-8')
    os.replace(partial, path)


class Record:
    """The rows of one part.

    A row has a name and is one of: a check ('value', 'limit', 'ok'), a measurement ('ok' is None), an 'error', or
    'absent' with the reason why it is not there.

    Args:
        path: JSON file of the part.
        ends: When the part should have ended, by `time.monotonic`.
    """

    def __init__(self, path: Path, ends: float):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._ends = ends

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._ends - time.monotonic()

    def add(self, name: str, **row: Any) -> None:
        """Add a row, print it and write the file."""
        self.rows.append({'name': name, **row})
        content = json.loads(self.path.read_text(encoding='utf-8'))
        write_json(self.path, content | {'rows': self.rows})
        words = [f'{key} {value:.4g}' if isinstance(value, float) else f'{key} {value}' for key, value in row.items()
                 if value is not None and key != 'traceback']
        print(f"  {self.path.stem} {name:30} {'  '.join(words)}", flush=True)

    def near(self, name: str, value: float, limit: float, **facts: Any) -> None:
        """Add a check that holds if a value is at most `limit`; NaN is more."""
        value = float(value)
        shown = value if math.isfinite(value) else str(value)  # JSON has no such numbers
        self.add(name, value=shown, limit=limit, ok=bool(value <= limit), **facts)

    def absent(self, names: Iterable[str], reason: str) -> None:
        """Add rows for what is not there, and why."""
        for name in names:
            self.add(name, absent=reason)

    def run(self, names: str | list[str], function: Callable[[], object], seconds: float = 0.0) -> None:
        """Call a function that adds rows of these names: an exception becomes rows, and the next one is called.

        Args:
            names: Names of the rows; those that are missing afterwards are an error.
            function: Adds the rows.
            seconds: Time that it takes; where less is left it is not called.
        """
        names = [names] if isinstance(names, str) else names
        if self.left < seconds:
            self.absent(names, 'no time was left')
            return
        reason, found = 'reported nothing', {}
        try:
            function()
        except Late:
            self.absent(self._missing(names), 'no time was left')
        except Exception as error:
            found = {'traceback': traceback.format_exc()[-3000:]}
            print(found['traceback'], flush=True)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        for name in self._missing(names):
            self.add(name, error=reason, ok=False, **found)

    def _missing(self, names: list[str]) -> list[str]:
        there = {row['name'] for row in self.rows}
        return [name for name in names if name not in there]
