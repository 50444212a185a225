"""What a run exports when it has ended, and with `dreal.hub.push_to` sends to the Hugging Face Hub with its card"""
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from dreal_timm.errors import WeightsError, one_line
from dreal_timm.hub import export_run, push
from dreal_timm.hub.folder import SUMS, read_checksums
from dreal_timm.hub.upload import CARD
from dreal_timm.train.loop import Run

__all__ = ['export_anew', 'publish']

_logger = logging.getLogger(__name__)
_STREAMS = ('wds', 'tfds', 'hfids')  # which the processes of a run share out among them


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files of a folder, and what is empty after it."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for path in (*sorted((path for path in folder.rglob('*') if path.is_dir()), reverse=True), folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _exported(folder: Path) -> list[str]:
    """Files of a folder that an export wrote, as its own list tells; a card that was written later is none of them."""
    try:
        listed = [*read_checksums(folder), SUMS]
    except WeightsError:
        return []
    card = folder / CARD
    edited = card.is_file() and card.stat().st_mtime > (folder / SUMS).stat().st_mtime + 1
    return listed if edited else [*listed, CARD]


def _keep(source: Path, target: Path) -> None:
    """Move what no export wrote into another folder; an edited card, and a name that is taken, get `.old` in it."""
    own = set(_exported(source))
    for path in sorted(path for path in source.rglob('*') if not path.is_dir() or path.is_symlink()):
        name = path.relative_to(source).as_posix()
        if name in own:
            continue
        place = target / ('README.old.md' if name == CARD else name)
        while os.path.lexists(place):
            place = place.with_name(f'{place.stem}.old{place.suffix}')
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


def export_anew(folder: Path, export: Callable[[Path], object]) -> None:
    """Export into a folder of a run, where an earlier export may lie: that stays until the new one stands.

    Files that no export wrote stay in the folder. A kill at any moment leaves one of the two, and all files.

    Args:
        folder: The folder.
        export: Makes a new folder of the name that it is given.
    """
    folder = folder.resolve()  # which may be a link
    new, old = (folder.with_name(f'{folder.name}.{word}') for word in ('new', 'old'))
    if new.exists():  # of a run that was killed here
        if folder.exists():
            _keep(new, folder)
            _remove(new, _exported(new))
        else:
            os.replace(new, folder)
    export(new)
    for earlier in (folder, old):
        if earlier.exists():
            _keep(earlier, new)
    if folder.exists():
        if old.exists():
            _remove(old, _exported(old))
        os.replace(folder, old)
    os.replace(new, folder)
    if old.exists():
        _remove(old, _exported(old))


def publish(run: Run) -> str:
    """Validate and export the best epoch to `hub/` in the run's folder, and push it; nothing of it can harm the run.

    The first process alone calls this.

    Args:
        run: A run that has ended.

    Returns:
        Address of the commit; empty after an error, which is logged with what to do.
    """
    config, folder, repo = run.config, run.directory / 'hub', run.config.dreal.hub.push_to
    averaged = config.model_ema and not config.model_ema_force_cpu
    shared = run.accelerator.num_processes > 1 and config.dataset.partition('/')[0].lower() in _STREAMS
    measure = None if run.validate is None or shared else run.domain.measure
    todo = f'dreal-timm export {run.directory} {folder}, then dreal-timm push {folder} {repo}'
    try:
        export_anew(folder, lambda new: export_run(
            run.directory, new, 'ema' if averaged else 'raw', measure=measure))
        todo = f'dreal-timm push {folder} {repo}'
        return push(folder, repo, private=config.dreal.hub.private).url
    except Exception as error:  # whatever it is, the training is done and on the disk
        _logger.error(f'dreal.hub.push_to: {one_line(error)} The run is whole; to try again: {todo}')
        return ''
