"""Where a run happens: the processes and devices that the launcher gives, and the folder"""
import logging
import os
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)
from timm.models import safe_model_name

from dreal_timm.train.checkpoint import LAST
from dreal_timm.train.lock import LOCK
from dreal_timm.train.resume import is_last_of
from dreal_timm.train.settings import TrainConfig

__all__ = ['decide', 'fast_kernels', 'launch', 'run_directory']

_logger = logging.getLogger(__name__)


def launch(config: TrainConfig) -> Accelerator:
    """Return Accelerate's accelerator: the launcher gives processes and devices, the recipe decides all else.

    Flags of torch.backends (TF32, `cudnn.benchmark`, deterministic algorithms) stay as the caller has set them.

    Raises:
        ValueError: The launcher, or the device it gives, is not what the recipe needs.
    """
    for name in ('DEEPSPEED', 'FSDP', 'MEGATRON_LM', 'TPU'):
        if os.environ.get(f'ACCELERATE_USE_{name}', 'false').lower() == 'true':
            raise ValueError(
                f'The launcher is set to {name}; DDP is all that is supported. Run `accelerate config` again, or '
                'launch with --multi_gpu.'
            )
    precision = {'float16': 'fp16', 'bfloat16': 'bf16'}[config.amp_dtype] if config.amp else 'no'
    for name, key, same in (
        ('ACCELERATE_MIXED_PRECISION', 'amp and amp_dtype', (precision, 'no')),
        ('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', 'grad_accum_steps', (str(config.grad_accum_steps), '1')),
    ):
        if os.environ.get(name, same[0]) not in same:
            _logger.warning(f'{name}={os.environ[name]} of the launcher is not used: a recipe has {key}.')
    if is_initialized() and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # a second run in one process; Accelerate offers no public way
    accelerator = Accelerator(
        cpu=config.device == 'cpu',
        mixed_precision=precision,
        # steps are joined here, so that the last update of an epoch may join fewer, as in timm's train.py
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[] if config.ddp_timeout is None else [
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.ddp_timeout))],
        log_with=config.log_with,
        project_config=ProjectConfiguration(logging_dir=config.output or 'output/train'),
    )
    started = int(os.environ.get('WORLD_SIZE', '1'))
    if started != accelerator.num_processes:
        raise ValueError(
            f'The launcher started {started} processes, which would train {started} networks into one folder: without '
            'a GPU for each of them, add device=cpu.')
    accelerator.wait_for_everyone()  # or one that stops at a setting resets the connection of one that still connects
    device = accelerator.device
    if config.device not in (None, 'cpu', device.type):
        hint = ' (CUDA_VISIBLE_DEVICES chooses one of several)' if ':' in config.device else ''
        raise ValueError(f"device: '{config.device}' is not there; the launcher gives {device}{hint}.")
    if precision == 'fp16' and device.type == 'cpu':
        raise ValueError('amp_dtype: float16 needs a GPU; on a CPU use amp_dtype=bfloat16.')
    if config.sync_bn and accelerator.num_processes > 1 and device.type == 'cpu':
        raise ValueError('sync_bn: synchronised batch norm needs GPUs.')
    return accelerator


def fast_kernels() -> None:
    """Let CUDA multiply float32 matrices in TF32 and cuDNN time its algorithms, as timm's train.py does.

    For a command, which has a process of its own: `launch` leaves what the caller has set.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def decide(is_main: bool, decision: Callable[[], Any]) -> Any:
    """Return what the first process decides, or raise what it raises, in every process."""
    outcome: list[Any] = [None, None]
    if is_main:
        try:
            outcome = [decision(), None]
        except (OSError, ValueError) as error:
            outcome = [None, error]
    result, problem = broadcast_object_list(outcome)
    if problem is not None:
        raise problem
    return result


def run_directory(config: TrainConfig, input_size: tuple[int, ...], is_main: bool) -> Path:
    """Return the folder of the run, as the first process names it; only that one looks whether it is free.

    Args:
        config: The configuration.
        input_size: (C, H, W) of the images, for the name of a run without one.
        is_main: Whether this is the first process.

    Raises:
        FileExistsError: The folder holds something that is not gone on with.
        FileNotFoundError: `resume` names no file.
        ValueError: `resume` does not say which folder.
    """
    if config.resume not in ('', 'auto') and not Path(config.resume).is_file():
        raise FileNotFoundError(f"resume: no file '{config.resume}'.")
    if config.resume == 'auto' and not config.experiment:
        raise ValueError("resume: 'auto' looks into the run's folder, so that it needs a name: add experiment=NAME.")
    if config.resume not in ('', 'auto') and not config.experiment:
        directory = Path(config.resume).parent
        if Path(config.resume).name != LAST:
            raise ValueError(
                f"resume: '{config.resume}' is not the last checkpoint of its run, whose folder would be overwritten: "
                'add experiment=NAME to go on from it in a new folder.'
            )
    else:
        name = config.experiment or '-'.join([
            datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(config.model), str(input_size[-1]),
        ])
        directory = Path(config.output or 'output/train') / name
    problem = ''
    if is_main and directory.exists():
        if not directory.is_dir():
            problem = f'{directory} is not a folder'
        elif all(path.name == LOCK or path.suffix == '.tmp' for path in directory.iterdir()):
            pass  # of a run that was killed before it wrote anything
        elif not (directory / 'args.yaml').is_file():
            problem = f'{directory} exists, is not empty, and is not the folder of a run'
        elif not config.resume:
            problem = f'{directory} exists and is not empty; resume=auto goes on with a run that was stopped'
        elif config.resume != 'auto' and not is_last_of(Path(config.resume), directory):
            problem = f'{directory} goes on from its {LAST} alone, not from {config.resume}'
    directory, problem = broadcast_object_list([directory, problem])
    if problem:
        raise FileExistsError(
            f'{problem}. Choose another experiment=NAME, or remove the folder.')
    return Path(directory)
