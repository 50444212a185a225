"""`config.json` of a folder or of the Hub, bounded before a network is built of it"""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm

from dreal_timm.errors import WeightsError, printable, reason
from dreal_timm.hub.files import check_place, read_json, walk
from dreal_timm.models.sources import check_arguments

__all__ = ['CONFIG', 'check_config']

CONFIG = 'config.json'
# bytes, values, and the largest numbers, which timm's own configs stay far below
_BYTES, _VALUES, _NUMBER = 2 ** 22, 2 ** 18, 2 ** 24
_ARGUMENT, _ARGUMENTS = 2 ** 14, 1000  # the largest number among model_args, and how many there are
_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_SIZES, _CROPS = (1, 4096), (0.1, 4.0)  # of images in pixels, of the part that is cut out


def _number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _check_preprocessing(config: Mapping[str, Any]) -> None:
    """Raise a ValueError where images would become giant, or numbers infinite."""
    for key in ('input_size', 'test_input_size', 'min_input_size'):
        size = config.get(key)
        if size is not None and not (isinstance(size, list) and len(size) == 3 and all(
                type(number) is int and _number(number, *_SIZES) for number in size)):
            raise ValueError(f'its {key} is {str(size)[:40]}, and not channels, height and width up to {_SIZES[1]}')
    for key in ('crop_pct', 'test_crop_pct'):
        if config.get(key) is not None and not _number(config[key], *_CROPS):
            raise ValueError(f'its {key} is {str(config[key])[:40]}, and not between {_CROPS[0]} and {_CROPS[1]:g}')
    for key, least in (('mean', -_NUMBER), ('std', 1e-6)):
        numbers = config.get(key)
        if numbers is not None and not (
                isinstance(numbers, list) and all(_number(number, least, _NUMBER) for number in numbers)):
            raise ValueError(f'its {key} is {str(numbers)[:40]}, and not a number for each channel')
    if config.get('interpolation') not in (None, '', *_INTERPOLATIONS):
        raise ValueError(
            f"its interpolation is {str(config['interpolation'])[:40]}, and none of {', '.join(_INTERPOLATIONS)}")
    if config.get('hf_hub_filename') is not None:
        raise ValueError('it names another file of weights (hf_hub_filename): a config may not fetch or open anything')


def _check_labels(config: Mapping[str, Any]) -> None:
    """Raise a ValueError if names of classes are neither texts in their order nor texts under texts."""
    for key in ('label_names', 'labels', 'label_descriptions'):
        names = config.get(key)
        texts = names if isinstance(names, list) else names.values() if isinstance(names, Mapping) else None
        if names is not None and (texts is None or not all(isinstance(name, str) for name in texts)):
            raise ValueError(f'its {key} are not names of classes')


def _check_values(config: Any) -> None:
    """Raise a ValueError if a config is none of a network, or asks for what nobody could build."""
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise ValueError('it names no architecture: it is not of a network that timm exported')
    for value in walk(config, _VALUES):
        if isinstance(value, (int, float)) and not abs(value) <= _NUMBER:
            raise ValueError(f'it has the number {str(value)[:40]}, which is too large')
    for value in walk(config.get('model_args'), _ARGUMENTS):
        if isinstance(value, str) and len(value) > _ARGUMENTS:
            raise ValueError('its model_args have a giant text')
    arguments = config.get('model_args', {})
    pretrained = config.get('pretrained_cfg', config)  # timm's older form has one table
    if not isinstance(arguments, dict) or not isinstance(pretrained, dict):
        raise ValueError('its model_args and pretrained_cfg are no tables')
    for value in walk({key: given for key, given in arguments.items() if key != 'num_classes'}, _ARGUMENTS):
        if isinstance(value, (int, float)) and abs(value) > _ARGUMENT:
            raise ValueError(f'its model_args have the number {str(value)[:40]}, which is too large')
    for number in (config.get('num_classes'), pretrained.get('num_classes'), arguments.get('num_classes')):
        if number is not None and not (type(number) is int and number >= 0):
            raise ValueError(f'its num_classes is {str(number)[:40]}')
    classes = config.get('num_classes', pretrained.get('num_classes', 1000))  # timm's own where there is none
    if arguments.get('num_classes', classes) != classes:  # timm would build one and drop the classifier for the other
        raise ValueError(
            f"it names {arguments['num_classes']} classes in model_args and {classes} beside them: the classifier "
            'would start at random')
    check_arguments(arguments)
    _check_preprocessing(pretrained)
    _check_labels(config)
    _check_labels(pretrained)


def check_config(directory: str | Path) -> dict[str, Any]:
    """Return the `config.json` of an exported folder, of which a network can be built: it fetches and opens nothing.

    Raises:
        WeightsError: It is missing, broken, giant, of no architecture that timm has, or asks for more than a network.
    """
    directory = Path(directory)
    check_place(directory, CONFIG)
    what = f"'{directory}', {CONFIG}"
    try:
        config: dict[str, Any] = read_json(directory / CONFIG, _BYTES, finite=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f'{what}: it cannot be read ({reason(error)}).') from error
    try:
        _check_values(config)
    except ValueError as error:
        raise WeightsError(f"{what}: {reason(error).rstrip('.')}.") from error
    if not timm.is_model(config['architecture']):
        name = printable(config['architecture'][:60])
        raise WeightsError(f"{what}: timm has no architecture '{name}': import the package that registers it, "
                           'or update timm.')
    return config
