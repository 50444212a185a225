"""Checkpoints in timm's layout, written so that neither a kill nor a full disk harms one that was good

`last.pth.tar` is the truth of a run: it is replaced in one step by a file that is whole on the disk. All other files
are links to it or copies, made before: a run that is killed between them repeats its epoch and makes them again.
"""
import csv
import io
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ['BEST', 'LAST', 'Checkpoints', 'write_summary', 'write_text']

LAST = 'last.pth.tar'
BEST = 'model_best.pth.tar'


def _sync(path: Path) -> None:
    """Have the disk hold the file (or the entries of the folder) before anything is built on it."""
    if path.is_dir() and os.name == 'nt':
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    scratch = path.with_name(f'{path.name}.tmp')
    try:
        scratch.write_text(text, encoding='utf-8', newline='')
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_summary(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write timm's summary.csv of all epochs: 'epoch', 'train_*', 'eval_*', 'eval_ema_*' (moving average) and 'lr'."""
    rows = []
    for entry in history:
        row = {'epoch': entry['epoch']}
        for part, prefix in (('train', 'train_'), ('validation', 'eval_'), ('validation_ema', 'eval_ema_')):
            row.update({f'{prefix}{name}': value for name, value in entry.get(part, {}).items()})
        rows.append({**row, 'lr': entry['lr']})
    names = list(dict.fromkeys(name for row in rows for name in row if name != 'lr'))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*names, 'lr'])
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _epoch(name: str) -> int:
    return int(name.removeprefix('checkpoint-').removesuffix('.pth.tar'))


class Checkpoints:
    """The checkpoints of a run: the last, the best, a number of good ones, and those that were asked for.

    Files are named, ranked and described (`saver`) as by timm's CheckpointSaver.

    Args:
        directory: Folder of the run.
        keep: Number of the best checkpoints to keep as `checkpoint-EPOCH.pth.tar`.
        decreasing: Whether a lower metric is better.
    """

    def __init__(self, directory: Path, keep: int = 10, decreasing: bool = False):
        self.directory = directory
        self.keep = keep
        self.decreasing = decreasing
        self.files: list[tuple[str, float]] = []
        self.best_epoch: int | None = None
        self.best_metric: float | None = None

    def _better(self, metric: float) -> bool:
        if self.best_metric is None:
            return True
        return metric < self.best_metric if self.decreasing else metric > self.best_metric

    def load_state_dict(self, state: Mapping[str, Any], epochs: int) -> None:
        """Go on from what the last checkpoint of the folder knows of the first `epochs` epochs; nothing is written."""
        files = [(name, metric) for name, metric in state['checkpoint_files'] if (self.directory / name).exists()]
        self.files = [(name, metric) for name, metric in files if _epoch(name) < epochs]
        self.best_epoch, self.best_metric = state['best_epoch'], state['best_metric']
        if self.best_epoch is not None and self.best_epoch >= epochs:
            self.best_epoch, self.best_metric = None, None
            if self.files:
                self.best_epoch, self.best_metric = _epoch(self.files[0][0]), self.files[0][1]

    def clean(self) -> None:
        """Remove what an interrupted save left behind, and let the best file be the best epoch's again."""
        known = {name for name, _ in self.files}
        for path in self.directory.iterdir():
            stale = re.fullmatch(r'checkpoint-\d+\.pth\.tar', path.name) and path.name not in known
            if stale or path.name.endswith('.pth.tar.tmp'):
                path.unlink()
        best = f'checkpoint-{self.best_epoch}.pth.tar'
        if best in known:
            self._link(self.directory / best, BEST)

    def save(self, state: Mapping[str, Any], epoch: int, metric: float, milestone: bool = False) -> bool:
        """Save an epoch.

        Args:
            state: Tensors and plain values.
            epoch: Number of the epoch that ended, from 0.
            metric: What epochs are ranked by.
            milestone: Whether to keep it for good, as `milestone-N.pth.tar` after N epochs.

        Returns:
            Whether it is the best so far.

        Raises:
            OSError: It cannot be written; the files that were there are whole.
        """
        is_best = self._better(metric)
        name = f'checkpoint-{epoch}.pth.tar'
        ranked = sorted(
            [*((n, m) for n, m in self.files if n != name), (name, metric)],
            key=lambda file: file[1], reverse=not self.decreasing,
        )
        kept, dropped = ranked[:self.keep], ranked[self.keep:]
        best_epoch, best_metric = (epoch, metric) if is_best else (self.best_epoch, self.best_metric)
        saver = {
            'checkpoint_files': kept, 'best_epoch': best_epoch, 'best_metric': best_metric, 'pending': (None, None)}

        scratch = self.directory / f'{LAST}.tmp'
        try:
            with scratch.open('wb') as file:
                torch.save({**state, 'epoch': epoch, 'metric': metric, 'version': 2, 'saver': saver}, file)
            _sync(scratch)
            if (name, metric) in kept:
                self._link(scratch, name)
            if is_best:
                self._link(scratch, BEST)
            if milestone:
                self._link(scratch, f'milestone-{epoch + 1}.pth.tar')
            os.replace(scratch, self.directory / LAST)
            _sync(self.directory)
        except (OSError, RuntimeError) as error:  # torch's writer tells of a full disk by a RuntimeError
            scratch.unlink(missing_ok=True)
            reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())[:200]
            last = 'The checkpoint before is whole' if (self.directory / LAST).exists() else 'There is none before'
            raise OSError(
                f'epoch {epoch + 1}: cannot write a checkpoint to {self.directory} ({reason}). {last}; '
                'resume=auto goes on from it once there is room.'
            ) from error
        self.files, self.best_epoch, self.best_metric = kept, best_epoch, best_metric
        for old, _ in dropped:
            (self.directory / old).unlink(missing_ok=True)
        return is_best

    def _link(self, source: Path, name: str) -> None:
        scratch = self.directory / f'{name}.tmp'
        scratch.unlink(missing_ok=True)
        try:
            try:
                os.link(source, scratch)
            except OSError:  # a file system without hard links
                shutil.copyfile(source, scratch)
                _sync(scratch)
            os.replace(scratch, self.directory / name)
        finally:
            scratch.unlink(missing_ok=True)
