"""What a run was made with: versions, the commit of a checkout, and how long each epoch took (`run.json`)"""
import json
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import torch

from dreal_timm.provenance import versions
from dreal_timm.utils.files import write_text

__all__ = ['RECORD', 'Record']

RECORD = 'run.json'


@cache
def _commit() -> str | None:
    """Commit of the checkout that the package is imported from, with '-dirty' after changes, where there is one."""
    root = Path(__file__).parents[2]
    if not (root / '.git').exists():
        return None
    try:
        done = subprocess.run(
            ['git', '-C', str(root), 'describe', '--always', '--abbrev=40', '--exclude=*', '--dirty'],
            capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


class Record:
    """The record of a run, which grows with its epochs.

    Attributes:
        changes: Settings that changed when the run was gone on with: for each time 'epoch', the first that was trained
            with them, from 0, and 'settings', [before, after] by their names.

    Args:
        device: Device of the first process.
        processes: Number of processes.
    """

    def __init__(self, device: torch.device, processes: int):
        threads = torch.get_num_threads()
        name = f"cpu, {threads} thread{'s' if threads > 1 else ''}"
        if device.type != 'cpu':
            name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
        self.device = f'{processes} x {name}' if processes > 1 else name
        self.epochs: dict[int, dict[str, Any]] = {}
        self.changes: list[dict[str, Any]] = []

    def load(self, directory: Path, epochs: int) -> None:
        """Go on from what a run's folder tells of its first `epochs` epochs."""
        try:
            known = json.loads((directory / RECORD).read_text(encoding='utf-8'))['epochs']
            self.epochs = {int(row['epoch']): dict(row) for row in known if int(row['epoch']) < epochs}
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or cut off by a full disk
            self.epochs = {}

    def add(self, epoch: int, seconds: float) -> None:
        """Note how long the steps of an epoch took, without its validation."""
        self.epochs[epoch] = {'epoch': epoch, 'seconds': round(seconds, 3), 'device': self.device}

    def state(self) -> Mapping[str, Any]:
        """What is written: 'versions' and 'commit' of the process that wrote it last, 'changes' and 'epochs'."""
        return {
            'versions': versions(python=True, accelerate=accelerate.__version__),
            'commit': _commit(),
            'changes': self.changes,
            'epochs': [self.epochs[epoch] for epoch in sorted(self.epochs)],
        }

    def write(self, directory: Path) -> None:
        """Write `run.json` into the folder of the run."""
        write_text(directory / RECORD, json.dumps(self.state(), indent=2) + '\n')
