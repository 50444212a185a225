"""What `dreal.push_to` asks for: a run's network, exported with its card, to the Hugging Face Hub when it has ended"""
import logging
import shutil
from functools import partial

from dreal_timm.errors import one_line
from dreal_timm.hub import export_run, push
from dreal_timm.train.loop import Run
from dreal_timm.train.reid import is_reid, measure_identities
from dreal_timm.train.validate import measure_split

__all__ = ['publish']

_logger = logging.getLogger(__name__)
_STREAMS = ('wds', 'tfds', 'hfids')  # which the processes of a run share out among them


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
        shutil.rmtree(folder, ignore_errors=True)  # of the run before it was resumed
        export_run(run.directory, folder, 'ema' if averaged else 'raw', measure=measured)
        todo = f'dreal-timm push {folder} {repo}'
        return push(folder, repo, private=config.dreal.push_private).url
    except Exception as error:  # whatever it is, the training is done and on the disk
        _logger.error(f'dreal.push_to: {one_line(error)} The run is whole; to try again: {todo}')
        return ''
