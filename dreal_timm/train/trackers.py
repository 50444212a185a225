"""Experiment trackers, through Accelerate"""
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from dreal_timm.errors import nearest

__all__ = ['check_trackers', 'start_trackers', 'track']

_PROJECT = 'dreal_timm'


def check_trackers(names: Sequence[str], kwargs: Mapping[str, Any]) -> None:
    """Raise an error about a tracker that Accelerate does not know, or that is not installed.

    Raises:
        ValueError: No such tracker, or arguments for another one.
        ModuleNotFoundError: It is not installed.
    """
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    available = {str(getattr(name, 'value', name)) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise ValueError(
                f"log_with: unknown tracker '{name}'{nearest(name, known)}, expected one of {', '.join(known)}.")
        if name not in available:
            raise ModuleNotFoundError(f"log_with: '{name}' is not installed; pip install {name}.")
    for name, arguments in kwargs.items():
        if name not in names or not isinstance(arguments, Mapping):
            raise ValueError(
                f"log_kwargs: expected the arguments of a tracker ({', '.join(names) or 'none is on'}) under its name, "
                f"got '{name}'."
            )


def _keep_id(arguments: dict[str, Any], path: Path, is_main: bool) -> None:
    """Let a resumed run go on with its wandb run, whose number is kept in the run's folder."""
    if 'id' in arguments or not is_main:
        return
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12], encoding='utf-8')
    arguments.update(id=path.read_text(encoding='utf-8'), resume='allow')


def start_trackers(
        accelerator: Accelerator,
        directory: Path,
        config: Mapping[str, Any],
        kwargs: Mapping[str, Any],
        first_step: int,
) -> None:
    """Start the trackers of the accelerator.

    Args:
        accelerator: Accelerate's accelerator, with `log_with`.
        directory: Folder of the run, where trackers that write files do so.
        config: The configuration, which trackers keep.
        kwargs: Arguments of each tracker by its name; `project` in them is that of all, 'dreal_timm' otherwise.
        first_step: Number of updates that a resumed run starts after; TensorBoard drops what it had of later ones.
    """
    if not accelerator.log_with:
        return
    accelerator.project_configuration.logging_dir = str(directory)
    init: dict[str, dict[str, Any]] = {name: dict(arguments) for name, arguments in kwargs.items()}
    if first_step:
        init.setdefault('tensorboard', {}).setdefault('purge_step', first_step + 1)
    for name in ('wandb', 'trackio'):
        init.setdefault(name, {}).setdefault('name', directory.name)
    project = next((arguments.pop('project') for arguments in init.values() if 'project' in arguments), _PROJECT)
    if 'wandb' in map(str, accelerator.log_with):
        _keep_id(init['wandb'], directory / 'wandb_id.txt', accelerator.is_main_process)
    plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in config.items()}
    accelerator.init_trackers(project, config=plain, init_kwargs=init)


def track(accelerator: Accelerator, prefix: str, values: Mapping[str, float], step: int) -> None:
    """Send numbers to the trackers, as 'prefix/name'.

    Args:
        accelerator: Accelerate's accelerator.
        prefix: What the numbers are of: 'train', 'validation' or 'validation_ema'.
        values: The numbers.
        step: Number of updates so far.
    """
    if accelerator.trackers:
        accelerator.log({f'{prefix}/{name}': value for name, value in values.items()}, step=step)
