"""Checkpoints in timm's layout, written so that neither a kill nor a full disk harms one that was good

`last.pth.tar` is the truth of a run: it is replaced in one step by a file that is whole on the disk. All other files
are made after it, from a copy, so that damage to one file is not damage to all: a run that is killed between them makes
them when it goes on. Nothing is removed but what the last checkpoint itself lists.
"""
import csv
import io
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dreal_timm.errors import reason, was_interrupted
from dreal_timm.hub.damage import damaged_record
from dreal_timm.utils.files import replacing, sync, write_text

__all__ = ['BEST', 'LAST', 'Checkpoints', 'kept_checkpoints', 'write_summary']

_logger = logging.getLogger(__name__)
LAST = 'last.pth.tar'
BEST = 'model_best.pth.tar'


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


def _name(epoch: int) -> str:
    return f'checkpoint-{epoch}.pth.tar'


def _milestone(epoch: int) -> str:
    return f'milestone-{epoch + 1}.pth.tar'


def _epoch(name: str) -> int:
    return int(name.removeprefix('checkpoint-').removesuffix('.pth.tar'))


def _is_whole(path: Path) -> bool:
    return zipfile.is_zipfile(path) and not damaged_record(path)


def _epoch_of(path: Path) -> int | None:
    """Number of the epoch of a checkpoint of ours that is whole, from 0."""
    if not _is_whole(path):
        return None
    try:
        return int(torch.load(path, map_location='cpu', weights_only=True, mmap=True)['epoch'])
    except Exception:  # of another program
        return None


def kept_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints of a folder beside the last one, the newest epoch first."""
    found = []
    best = _epoch_of(directory / BEST)
    if best is not None:
        found.append((best, BEST, directory / BEST))
    for path in directory.iterdir():
        match = re.fullmatch(r'(checkpoint|milestone)-(\d{1,9})\.pth\.tar', path.name)
        if match is not None:
            found.append((int(match[2]) - (match[1] == 'milestone'), path.name, path))
    return [path for *_, path in sorted(found, reverse=True)]


class Checkpoints:
    """The checkpoints of a run: the last, the best, a number of good ones, and those of `save_epochs`.

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
        self._dropped: list[str] = []  # what the checkpoint that is gone on with wanted to remove
        self._later: list[str] = []  # epochs that are trained again
        self._rewound = False
        self._source: tuple[Path, int] | None = None  # that, and its epoch

    def _better(self, metric: float) -> bool:
        if self.best_metric is None:
            return True
        return metric < self.best_metric if self.decreasing else metric > self.best_metric

    def load_state_dict(self, state: Mapping[str, Any], epochs: int, source: Path, epoch: int) -> None:
        """Go on from what a checkpoint of the folder knows of the first `epochs` epochs; nothing is written.

        Args:
            state: Its `saver`.
            epochs: Number of epochs that are done.
            source: The file.
            epoch: Number of its epoch, from 0.
        """
        own = _name(epoch)
        self._rewound = epoch >= epochs
        self._source = None if self._rewound else (source, epoch)
        self._dropped = list(state.get('dropped', ()))
        self._later = [name for name, _ in state['checkpoint_files'] if _epoch(name) >= epochs]
        self.files = [
            (name, metric) for name, metric in state['checkpoint_files']
            if _epoch(name) < epochs and (name == own or (self.directory / name).exists())]
        self.best_epoch, self.best_metric = state['best_epoch'], state['best_metric']
        gone = self.best_epoch is not None and self.best_epoch != epoch and not (
            (self.directory / _name(self.best_epoch)).exists() or _epoch_of(self.directory / BEST) == self.best_epoch)
        if gone or (self.best_epoch is not None and self.best_epoch >= epochs):
            self.best_epoch, self.best_metric = None, None
            if self.files:
                self.best_epoch, self.best_metric = _epoch(self.files[0][0]), self.files[0][1]

    def clean(self, milestones: Sequence[int] = ()) -> None:
        """Finish the save that a kill interrupted; the folder must be held.

        Args:
            milestones: Numbers of epochs after which a checkpoint is kept for good.
        """
        known = {name for name, _ in self.files}
        for name in self._dropped:
            (self.directory / name).unlink(missing_ok=True)
        for path in self.directory.iterdir():
            if re.fullmatch(r'(last|model_best|checkpoint-\d+|milestone-\d+)\.pth\.tar\.tmp', path.name):
                path.unlink()
        if self._source is not None:
            source, epoch = self._source
            missing = [
                name for name, wanted in (
                    (_name(epoch), _name(epoch) in known), (_milestone(epoch), epoch + 1 in milestones))
                if wanted and not _is_whole(self.directory / name)]
            if epoch == self.best_epoch and _name(epoch) not in known:
                missing.append(BEST)
            self._copy(source, missing)
        if not self._rewound:
            self._match_best()

    def _match_best(self) -> None:
        """Let the best file be the best epoch's; whichever of the two is damaged or missing is made of the other."""
        name = _name(self.best_epoch or 0)
        path, best = self.directory / name, self.directory / BEST
        if self.best_epoch is None or name not in {known for known, _ in self.files}:
            return
        if _is_whole(path):
            if not (best.exists() and os.path.samefile(path, best)):
                self._link(path, BEST)
        elif _epoch_of(best) == self.best_epoch:
            self._link(best, name)
        else:
            _logger.warning(f'{name}, the best epoch, is damaged: without a better one nothing can be exported.')

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
        name = _name(epoch)
        ranked = sorted(
            [*((n, m) for n, m in self.files if n != name), (name, metric)],
            key=lambda file: file[1], reverse=not self.decreasing,
        )
        kept = ranked[:self.keep]
        dropped = [n for n in (*(n for n, _ in ranked[self.keep:]), *self._later) if n not in {k for k, _ in kept}]
        best_epoch, best_metric = (epoch, metric) if is_best else (self.best_epoch, self.best_metric)
        saver = {
            'checkpoint_files': kept, 'best_epoch': best_epoch, 'best_metric': best_metric, 'pending': (None, None),
            'dropped': dropped}
        wanted = [
            n for n, asked in (
                (name, (name, metric) in kept), (BEST, is_best), (_milestone(epoch), milestone)) if asked]

        last = self.directory / LAST
        whole = 'The checkpoint before is whole' if last.exists() else 'There is none before'
        try:
            with replacing(last, self._scratch(LAST), synced=True) as scratch, scratch.open('wb') as file:
                torch.save({**state, 'epoch': epoch, 'metric': metric, 'version': 2, 'saver': saver}, file)
            whole = f'{LAST} is whole'
            self._copy(last, wanted)
            sync(self.directory)
        except (OSError, RuntimeError) as error:  # torch's writer tells of a full disk by a RuntimeError
            if was_interrupted(error):
                raise KeyboardInterrupt from None
            raise OSError(
                f'epoch {epoch + 1}: cannot write a checkpoint to {self.directory} ({reason(error)}). {whole}; '
                'resume=auto goes on from it once there is room.'
            ) from error
        self.files, self.best_epoch, self.best_metric = kept, best_epoch, best_metric
        if self._rewound:  # not before this epoch stands
            self._match_best()
        self._later, self._rewound = [], False
        for old in dropped:
            (self.directory / old).unlink(missing_ok=True)
        return is_best

    def _scratch(self, name: str) -> Path:
        """The file beside a checkpoint, which `clean` removes after a kill."""
        return self.directory / f'{name}.tmp'

    def _copy(self, source: Path, names: Sequence[str]) -> None:
        """Give a checkpoint a second body under the first of these names, and link the others to that."""
        for index, name in enumerate(names):
            self._link(source if index == 0 else self.directory / names[0], name, copy=index == 0)

    def _link(self, source: Path, name: str, copy: bool = False) -> None:
        with replacing(self.directory / name, self._scratch(name)) as scratch:
            scratch.unlink(missing_ok=True)
            try:
                if copy:
                    raise OSError
                os.link(source, scratch)
            except OSError:  # also a file system without hard links
                shutil.copyfile(source, scratch)
                sync(scratch)
