"""What a run exports when it has ended, and where `dreal.push_to` asks for it, to the Hugging Face Hub with its card"""
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dreal_timm.errors import one_line
from dreal_timm.hub import export_run, push
from dreal_timm.hub.folder import UNLISTED, read_checksums
from dreal_timm.train.loop import Run
from dreal_timm.train.reid import is_reid, measure_identities
from dreal_timm.train.validate import measure_split

__all__ = ['export_anew', 'publish']

_logger = logging.getLogger(__name__)
_STREAMS = ('wds', 'tfds', 'hfids')  # which the processes of a run share out among them


def _remove_export(folder: Path) -> None:
    """Remove what an export wrote into a folder, and what is empty after it."""
    for name in (*read_checksums(folder), *UNLISTED):
        (folder / name).unlink(missing_ok=True)
    for path in sorted((path for path in folder.rglob('*') if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()


def _move(source: Path, target: Path) -> None:
    """Move the files of a folder into another, which keeps what it has."""
    for path in sorted(path for path in source.rglob('*') if not path.is_dir() or path.is_symlink()):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            os.replace(path, place)
    for path in (*sorted((path for path in source.rglob('*') if path.is_dir()), reverse=True), source):
        if not any(path.iterdir()):
            path.rmdir()


def export_anew(folder: Path, export: Callable[[], object]) -> None:
    """Export into a folder of a run, where an earlier export may lie; files that it did not write stay.

    Args:
        folder: The folder.
        export: Makes it.

    Raises:
        WeightsError: The folder is there without a list of what an export wrote.
    """
    kept = folder.with_name(f'{folder.name}.kept')  # also of a run that was killed here
    if folder.exists():
        _remove_export(folder)
        _move(folder, kept)
    export()
    if kept.exists():
        _move(kept, folder)


def publish(run: Run) -> str:
    """Validate and export the best epoch to `hub/` in the run's folder, and push it; nothing of it can harm the run.

    The first process alone calls this.

    Args:
        run: A run that has ended.

    Returns:
        Address of the commit; empty after an error, which is logged with what to do.
    """
    config, folder, repo = run.config, run.directory / 'hub', run.config.dreal.push_to
    averaged = config.model_ema and not config.model_ema_force_cpu
    shared = run.accelerator.num_processes > 1 and config.dataset.partition('/')[0].lower() in _STREAMS
    measured = None
    if run.validate is not None and not shared:
        measure = measure_identities if is_reid(config) else measure_split
        measured = partial(measure, config=config, device=run.accelerator.device)
    todo = f'dreal-timm export {run.directory} {folder}, then dreal-timm push {folder} {repo}'
    try:
        export_anew(folder, lambda: export_run(
            run.directory, folder, 'ema' if averaged else 'raw', measure=measured))
        todo = f'dreal-timm push {folder} {repo}'
        return push(folder, repo, private=config.dreal.push_private).url
    except Exception as error:  # whatever it is, the training is done and on the disk
        _logger.error(f'dreal.push_to: {one_line(error)} The run is whole; to try again: {todo}')
        return ''
