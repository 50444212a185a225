"""The keys of a recipe: those of timm's args.yaml, with timm's meanings and defaults, and DREAL's own under `dreal:`

A key is one row of a table. What a row's value is passed to stands in `build.py`.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dreal_timm.critic import CELLS

__all__ = ['DREAL_KEYS', 'KEYS', 'Key', 'convert']


def _bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ('true', 'false', 'yes', 'no', 'on', 'off'):
        return value.lower() in ('true', 'yes', 'on')
    if not isinstance(value, bool):
        raise ValueError
    return value


def _int(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _str(value: Any) -> str:
    if isinstance(value, (bool, dict, list)):
        raise ValueError
    return str(value)


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return dict(value)


def _rotate(value: Any) -> str | int:
    return value if value in ('epoch', 'step') else _int(value)


def _list(of: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    def convert_list(value: Any) -> list[Any]:
        return [of(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    return convert_list


_TYPES: dict[str, tuple[Callable[[Any], Any], str]] = {
    'bool': (_bool, 'true or false'),
    'int': (_int, 'a whole number'),
    'float': (_float, 'a number'),
    'str': (_str, 'a text'),
    'dict': (_dict, 'a mapping'),
    'ints': (_list(_int), 'a list of whole numbers'),
    'floats': (_list(_float), 'a list of numbers'),
    'strs': (_list(_str), 'a list of texts'),
    'rotate': (_rotate, "'epoch', 'step' or a whole number"),
}


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        name: The key.
        type: Its type, a name in the table of types.
        default: Its value where the recipe has none; None is allowed as a value where it is the default.
        help: What it means.
        nullable: Whether null is a value of its own, and not the default.
        minimum: Smallest number that is accepted.
        maximum: Largest number that is accepted.
        length: Number of values of a list.
        choices: The texts that are accepted, where not every one is.
    """
    name: str
    type: str
    default: Any
    help: str
    nullable: bool = False
    minimum: float | None = None
    maximum: float | None = None
    length: int | None = None
    choices: tuple[str, ...] = ()


_INTERPOLATIONS = ('', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'none')

KEYS = [
    # data
    Key('data_dir', 'str', None, 'folder of the data set'),
    Key('dataset', 'str', '', 'kind/name of the data set; empty is an image folder'),
    Key('train_split', 'str', 'train', 'split to train on'),
    Key('val_split', 'str', 'validation', 'split to validate on'),
    Key('dataset_download', 'bool', False, 'let torchvision download the data set'),
    Key('class_map', 'str', '', 'file that maps classes to indices'),
    Key('input_img_mode', 'str', None, "mode of the images, 'RGB' or 'L'; by the number of channels"),
    # model
    Key('model', 'str', 'dreal_se_resnet50', 'name of the model'),
    Key('pretrained', 'bool', False, 'start from pretrained weights'),
    Key('initial_checkpoint', 'str', '', 'file with weights to start from'),
    Key('num_classes', 'int', None, 'number of classes; None is the default of the model', minimum=1),
    Key('in_chans', 'int', None, 'image channels; None is 3, or those of input_size', minimum=1),
    Key('model_kwargs', 'dict', {}, 'further arguments of the model'),
    Key('drop', 'float', 0.0, 'dropout rate before the classifier', minimum=0, maximum=1),
    Key('drop_path', 'float', None, 'stochastic depth rate', minimum=0, maximum=0.999),
    # input
    Key('img_size', 'int', None, 'side of the images, pixels', minimum=1),
    Key('input_size', 'ints', None, 'channels, height and width of the images', minimum=1, length=3),
    Key('crop_pct', 'float', None, 'share of the image that the validation keeps', minimum=0.001, maximum=1),
    Key('mean', 'floats', None, 'mean of each channel, pixels in [0, 1]'),
    Key('std', 'floats', None, 'standard deviation of each channel', minimum=1e-12),
    Key('interpolation', 'str', '', 'interpolation of the resize', choices=_INTERPOLATIONS),
    Key('batch_size', 'int', 128, 'images a step and process', minimum=1),
    Key('validation_batch_size', 'int', None, 'images a validation step; None is batch_size', minimum=1),
    # optimizer
    Key('opt', 'str', 'sgd', 'name of the optimizer'),
    Key('opt_eps', 'float', None, 'epsilon of the optimizer'),
    Key('opt_betas', 'floats', None, 'betas of the optimizer'),
    Key('opt_kwargs', 'dict', {}, 'further arguments of the optimizer'),
    Key('momentum', 'float', 0.9, 'momentum of the optimizer', minimum=0, maximum=1),
    Key('weight_decay', 'float', 2e-5, 'weight decay', minimum=0),
    # schedule
    Key('sched', 'str', 'cosine', 'learning rate schedule', choices=_SCHEDULES),
    Key('sched_on_updates', 'bool', False, 'step the schedule with each update, not each epoch'),
    Key('lr', 'float', None, 'learning rate; None scales lr_base by the global batch size', minimum=0),
    Key('lr_base', 'float', 0.1, 'learning rate for a batch of lr_base_size', minimum=0),
    Key('lr_base_size', 'int', 256, 'batch size that lr_base is meant for', minimum=1),
    Key('lr_base_scale', 'str', '', 'scaling of lr_base; by the optimizer if empty', choices=('', 'linear', 'sqrt')),
    Key('min_lr', 'float', 0.0, 'lowest learning rate', minimum=0),
    Key('epochs', 'int', 300, 'epochs to train', minimum=1),
    Key('decay_milestones', 'ints', [90, 180, 270], 'epochs of decay (multistep)'),
    Key('decay_epochs', 'float', 90, 'epochs between decays (step)', minimum=1e-3),
    Key('decay_rate', 'float', 0.1, 'factor of a decay', minimum=0),
    Key('warmup_lr', 'float', 1e-5, 'learning rate at the start of the warm-up', minimum=0),
    Key('warmup_epochs', 'int', 5, 'epochs of warm-up', minimum=0),
    Key('warmup_prefix', 'bool', False, 'add the warm-up to the epochs'),
    Key('cooldown_epochs', 'int', 0, 'epochs at min_lr after the schedule', minimum=0),
    # augmentation and regularisation
    Key('no_aug', 'bool', False, 'no augmentation at all'),
    Key('train_crop_mode', 'str', None, 'crop mode of training', choices=('rrc', 'rkrc', 'rkrr')),
    Key('scale', 'floats', [0.08, 1.0], 'range of the random crop, share of the area', length=2, minimum=1e-6),
    Key('ratio', 'floats', [3. / 4., 4. / 3.], 'range of aspect ratios', length=2, minimum=1e-6),
    Key('hflip', 'float', 0.5, 'probability of a horizontal flip', minimum=0, maximum=1),
    Key('vflip', 'float', 0.0, 'probability of a vertical flip', minimum=0, maximum=1),
    Key('color_jitter', 'float', 0.4, 'strength of the colour jitter'),
    Key('aa', 'str', None, 'AutoAugment policy'),
    Key('reprob', 'float', 0.0, 'probability of random erasing', minimum=0, maximum=1),
    Key('remode', 'str', 'pixel', 'mode of random erasing', choices=('const', 'rand', 'pixel')),
    Key('recount', 'int', 1, 'number of erased areas', minimum=1),
    Key('train_interpolation', 'str', 'random', 'interpolation of crops', choices=(*_INTERPOLATIONS, 'random')),
    Key('smoothing', 'float', 0.1, 'label smoothing', minimum=0, maximum=1),
    # run
    Key('seed', 'int', 42, 'seed of everything that is random', minimum=0),
    Key('workers', 'int', 4, 'loader processes', minimum=0),
    Key('pin_mem', 'bool', False, 'pin the memory of batches'),
    Key('no_prefetcher', 'bool', False, 'load without the prefetcher'),
    Key('device', 'str', None, "device; None takes an accelerator where there is one, 'cpu' forbids it"),
    Key('device_modules', 'strs', None, 'modules to import first'),
    Key('log_interval', 'int', 50, 'steps between lines of the log', minimum=1),
    Key('eval_metric', 'str', 'top1', 'metric of the best checkpoint', choices=('top1', 'top5', 'loss')),
    Key('output', 'str', '', "folder of the runs; empty is 'output/train'"),
    Key('experiment', 'str', '', "name of the run's folder; empty is date, model and image size"),
]

DREAL_KEYS = [
    Key('enabled', 'bool', True, 'false trains the plain network, with everything else equal'),
    Key('gamma', 'float', 1.0, 'penalty of a wrongly classified sample', minimum=0),
    Key('actor_weight', 'float', 1.0, 'weight of L_q', minimum=0),
    Key('probe', 'str', 'exact', 'how rewards are measured'),
    Key('rotate', 'rotate', 'epoch', "when another site is probed: 'epoch', 'step' or a number of steps"),
    Key('reward_clip', 'float', 1.0, 'bound of the reward; null is the literal equation', nullable=True),
    Key('probe_dtype', 'str', None, "'float32' measures rewards in float32 under autocast", choices=('float32',)),
    Key('seed', 'int', None, "seed of critic and draw; None is the run's seed", minimum=0),
    Key('critic_cell', 'str', 'lstm', "'lstm' or 'gru'", choices=tuple(CELLS)),
    Key('critic_hidden_size', 'int', 1, 'hidden units of a critic', minimum=1),
    Key('critic_depth', 'int', 1, 'cells of a critic', minimum=1),
]



def convert(key: Key, value: Any, where: str = '') -> Any:
    """Return the value in the type of the key; texts that are numbers (YAML reads 1e-4 as text) become numbers.

    Raises:
        ValueError: The value has another type, or is not accepted.
    """
    if value is None and (key.default is None or key.nullable):
        return None
    function, expected = _TYPES[key.type]
    try:
        converted = function(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f'{where}{key.name}: expected {expected}, got {value!r}.') from None
    values = converted if isinstance(converted, list) else [converted]
    problem = ''
    if key.length is not None and len(values) != key.length:
        problem = f'expected {key.length} values'
    elif key.minimum is not None and not all(number >= key.minimum for number in values):
        problem = f'must be {key.minimum} or more'
    elif key.maximum is not None and not all(number <= key.maximum for number in values):
        problem = f'must be {key.maximum} or less'
    elif key.choices and converted not in key.choices:
        problem = f'expected one of {", ".join(repr(choice) for choice in key.choices)}'
    if problem:
        raise ValueError(f'{where}{key.name}: {problem}, got {value!r}.')
    return converted
