"""The output folder of timm's train.py as a network: the model that its arguments name, with a checkpoint's weights"""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import yaml
from timm.data import resolve_data_config
from timm.models import resolve_model_input_args
from torch import nn

from dreal_timm.data.classes import index_names
from dreal_timm.data.folders import read_class_map
from dreal_timm.errors import WeightsError, reason
from dreal_timm.hub.loading import check_model_name, read_checkpoint, weights_of
from dreal_timm.hub.shapes import bounded
from dreal_timm.models.sources import check_arguments
from dreal_timm.provenance import preprocessing_of

__all__ = ['is_timm_run', 'load_timm_run']

_ARGUMENTS, _BEST = 'args.yaml', 'model_best.pth.tar'


def is_timm_run(path: str | Path) -> bool:
    """Return whether a path is an output folder of timm's train.py, or a checkpoint in one."""
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    if not (folder / _ARGUMENTS).is_file() or (folder / 'network.json').exists() or (folder / 'config.json').exists():
        return False
    return Path(path).is_file() or (folder / _BEST).is_file()


def _arguments(folder: Path, model_kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What train.py was called with, and the options of the model with a user's own; the folder may be anybody's."""
    file = folder / _ARGUMENTS
    try:
        args = yaml.safe_load(file.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' cannot be read ({reason(error)}).") from error
    if not isinstance(args, dict) or not isinstance(args.get('model'), str):
        raise ValueError(f"'{file}' names no model: it is not what timm's train.py writes.")
    kwargs = {**(args.get('model_kwargs') or {}), **model_kwargs}
    try:
        check_arguments(kwargs)
    except ValueError as error:
        raise WeightsError(f"'{file}': {error}") from error
    if any(sign in args['model'] for sign in ':/'):
        raise WeightsError(
            f"'{file}': its model '{args['model'][:60]}' is an address: arguments may not fetch or open anything.")
    check_model_name(args['model'])
    return args, kwargs


def _names(args: dict[str, Any], folder: Path) -> list[str]:
    """Names of the classes in the order of the outputs, out of the class map that a network was trained with."""
    roots = [str(folder), *(str(args[key]) for key in ('data_dir', 'data') if args.get(key))]
    for root in roots:
        try:
            return index_names(read_class_map(args['class_map'], root))
        except FileNotFoundError:
            continue
    raise ValueError(
        f"'{folder / _ARGUMENTS}': its class_map '{args['class_map']}' is not there, and without it nobody knows which "
        'class is which output: copy it into the folder.')


def load_timm_run(
        path: str | Path,
        weights: str = 'auto',
        checkpoint: str | Path = '',
        **model_kwargs: Any,
) -> tuple[nn.Module, dict[str, Any], str]:
    """Return the network that timm's train.py trained, what its checkpoint holds, and which weights were taken.

    Its config has the preprocessing that it was validated with.

    Args:
        path: The output folder, whose best checkpoint is taken, or a checkpoint in it.
        weights: 'raw', 'ema' (the moving average), or 'auto': those that the best epoch was chosen by.
        checkpoint: File to take in its place.
        **model_kwargs: Options of `timm.create_model` beside those of the arguments.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The arguments name no model.
        WeightsError: The checkpoint is broken, or its weights are of another network.
    """
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    file = Path(checkpoint or (path if Path(path).is_file() else folder / _BEST))
    if not file.is_file():
        raise FileNotFoundError(f"No checkpoint '{file}'.")
    args, kwargs = _arguments(folder, model_kwargs)
    content = read_checkpoint(file)
    if not isinstance(content, Mapping):
        raise WeightsError(f"'{file}' is no checkpoint of timm's train.py.")
    if weights == 'auto' and args.get('model_ema_force_cpu'):  # the epoch was chosen by the weights themselves
        weights = 'raw'
    state, taken = weights_of(content, file, weights)
    built = resolve_model_input_args(
        args['model'],
        {name: args.get(name) for name in ('in_chans', 'input_size', 'img_size')},
        **{
            'num_classes': args.get('num_classes'), 'global_pool': args.get('gp'), 'bn_eps': args.get('bn_eps'),
            'bn_momentum': args.get('bn_momentum'), **kwargs},
    )
    with bounded():
        model: Any = timm.create_model(pretrained=False, **built)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(
            f"'{file}' does not fit {args['model']} as '{_ARGUMENTS}' has it: {reason(error)}. --model-kwargs names "
            'what the arguments do not.') from error
    data = resolve_data_config({**args, 'in_chans': built.get('in_chans')}, model=model)
    model.pretrained_cfg = {**model.pretrained_cfg, **preprocessing_of(data)}
    if args.get('class_map'):
        model.pretrained_cfg['label_names'] = _names(args, folder)
    return model, {**content, 'args': args}, taken
