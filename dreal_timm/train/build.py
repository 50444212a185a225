"""What a run is made of, from its configuration: timm's factories do the work"""
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import get_model_input_config, resolve_model_input_args
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.task import ClassificationTask
from torch import nn

from dreal_timm.task import DrealTask
from dreal_timm.train.config import nearest

__all__ = [
    'build_dataset', 'build_loader', 'build_model', 'build_optimizer', 'build_task', 'check_labels',
    'check_model_name', 'class_names', 'data_config', 'import_device_modules',
]


def import_device_modules(config: SimpleNamespace) -> None:
    """Import the modules that the recipe names, as timm's train.py does."""
    for name in config.device_modules or ():
        importlib.import_module(name)


def check_model_name(name: str) -> None:
    """Raise a ValueError that names the nearest model if timm knows none of this name."""
    source, model = timm.models.parse_model_name(name)
    if source is None and (not model or not timm.is_model(model)):
        base = model.split('.')[0]
        raise ValueError(f"Unknown model '{name}'{nearest(base, timm.list_models())}.")


def build_model(config: SimpleNamespace) -> nn.Module:
    """Create the network of a run.

    Raises:
        ValueError: No such model.
        FileNotFoundError: No such initial checkpoint.
    """
    check_model_name(config.model)
    if config.initial_checkpoint and not Path(config.initial_checkpoint).is_file():
        raise FileNotFoundError(f"initial_checkpoint: no file '{config.initial_checkpoint}'.")
    kwargs = resolve_model_input_args(
        config.model,
        dict(in_chans=config.in_chans, input_size=config.input_size, img_size=config.img_size),
        num_classes=config.num_classes,
        drop_rate=config.drop or None,
        drop_path_rate=config.drop_path,
        **config.model_kwargs,
    )
    return timm.create_model(
        pretrained=config.pretrained, checkpoint_path=config.initial_checkpoint or None, **kwargs)


def data_config(config: SimpleNamespace, model: Any) -> dict[str, Any]:
    """Return the preprocessing of a run: the recipe's values, else the model's.

    Raises:
        ValueError: mean or std has another length than the images have channels.
    """
    channels = get_model_input_config(model)['input_size'][0]
    args = dict(vars(config), in_chans=channels)
    if config.input_size is None and config.img_size is None:
        args['input_size'] = get_model_input_config(model)['input_size']
    for key in ('mean', 'std'):
        given = args[key] or model.pretrained_cfg[key]
        if len(given) not in (1, channels):
            raise ValueError(f'{key}: {len(given)} values for images of {channels} channels: {list(given)}.')
        args[key] = given
    return resolve_data_config(args, model=model)


def build_dataset(config: SimpleNamespace, split: str, channels: int, is_training: bool) -> Any:
    """Open a split of the data set.

    Raises:
        FileNotFoundError: Its folder, or an image in it, is missing.
        ValueError: No folder is given, or the data set is unknown.
    """
    if not config.data_dir:
        raise ValueError('data_dir: the recipe names no folder of images; add data_dir=DIR.')
    if config.dataset and '/' not in config.dataset:
        raise ValueError(f"dataset: expected kind/name such as torch/fashion_mnist, got '{config.dataset}'.")
    if not config.dataset_download and '/' not in config.dataset and not Path(config.data_dir).exists():
        raise FileNotFoundError(f"data_dir: no folder '{config.data_dir}'.")
    try:
        dataset = create_dataset(
            config.dataset,
            root=config.data_dir,
            split=split,
            is_training=is_training,
            class_map=config.class_map or None,
            download=config.dataset_download,
            batch_size=config.batch_size,
            seed=config.seed,
            input_img_mode=config.input_img_mode or ('RGB' if channels == 3 else 'L'),
        )
    except (AssertionError, RuntimeError) as error:
        reason = str(error) or 'not found'
        raise FileNotFoundError(f"data_dir '{config.data_dir}', split '{split}': {reason}") from error
    reader = getattr(dataset, 'reader', None)
    searched = Path(getattr(reader, 'root', config.data_dir))
    if not config.dataset and searched == Path(config.data_dir) and searched.is_dir() and split:
        names = sorted(path.name for path in searched.iterdir() if path.is_dir())
        raise FileNotFoundError(
            f"data_dir '{config.data_dir}' has no folder '{split}': it holds {', '.join(names) or 'no folders'}.")
    return dataset


def class_names(dataset: Any) -> list[str] | None:
    """Return the names of a data set's classes in the order of their indices, where it knows them."""
    known = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or getattr(dataset, 'class_to_idx', None)
    if not isinstance(known, Mapping) or sorted(known.values()) != list(range(len(known))):
        return None
    return sorted(known, key=lambda name: known[name])


def check_labels(train_set: Any, val_set: Any, num_classes: int) -> None:
    """Raise a ValueError if the splits have other classes than each other, or more than the network."""
    names, val_names = class_names(train_set), class_names(val_set)
    if names is not None and val_names is not None and names != val_names:
        differing = sorted(set(names) ^ set(val_names))
        raise ValueError(
            f'The splits have different classes, so that labels would not agree: {", ".join(differing)} '
            'without an image in one of them. A class_map names the classes of both.'
        )
    if names is not None and len(names) > num_classes:
        raise ValueError(f'num_classes: {num_classes}, but the data set has {len(names)} classes.')


def build_loader(
        config: SimpleNamespace,
        dataset: Any,
        data: Mapping[str, Any],
        device: torch.device,
        is_training: bool,
        distributed: bool = False,
) -> Any:
    """Create timm's loader, with augmentation for training."""
    kwargs: dict[str, Any] = dict(
        input_size=data['input_size'],
        interpolation=data['interpolation'],
        mean=data['mean'],
        std=data['std'],
        num_workers=config.workers,
        pin_memory=config.pin_mem,
        use_prefetcher=not config.no_prefetcher,
        device=device,
        distributed=distributed,
        persistent_workers=False,
    )
    if not is_training:
        batch_size = config.validation_batch_size or config.batch_size
        crop = dict(crop_pct=data['crop_pct'], crop_mode=data['crop_mode'])
        return create_loader(dataset, batch_size=batch_size, **crop, **kwargs)
    if len(dataset) < config.batch_size:
        raise ValueError(f'batch_size: {config.batch_size} images a batch, but the training split has {len(dataset)}.')
    if not config.no_aug and config.train_interpolation:
        kwargs['interpolation'] = config.train_interpolation
    return create_loader(
        dataset,
        batch_size=config.batch_size,
        is_training=True,
        no_aug=config.no_aug,
        train_crop_mode=config.train_crop_mode,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter,
        auto_augment=config.aa,
        re_prob=config.reprob,
        re_mode=config.remode,
        re_count=config.recount,
        **kwargs,
    )


def build_task(
        config: SimpleNamespace,
        model: nn.Module,
        device: torch.device,
        input_size: tuple[int, ...],
        verbose: bool = True,
) -> ClassificationTask:
    """Create the task: reinforced, or timm's plain one with `dreal.enabled: false`."""
    dreal = dict(vars(config.dreal))
    common: dict[str, Any] = dict(criterion_kwargs=dict(smoothing=config.smoothing), device=device, verbose=verbose)
    if not dreal.pop('enabled'):
        return ClassificationTask(model, **common)
    dreal['seed'] = config.seed if dreal['seed'] is None else dreal['seed']
    return DrealTask(model, input_size=input_size, **common, **dreal)


def build_optimizer(config: SimpleNamespace, module: nn.Module, global_batch_size: int) -> torch.optim.Optimizer:
    """Create the optimizer; the learning rate scales with the batch size as in timm's train.py.

    Raises:
        ValueError: timm has no such optimizer.
    """
    if not config.opt or config.opt.lower() not in list_optimizers():
        raise ValueError(f"Unknown optimizer '{config.opt}'{nearest(config.opt, list_optimizers())}.")
    if config.lr is None:
        ratio = global_batch_size / config.lr_base_size
        adaptive = any(name in config.opt.lower() for name in ('ada', 'lamb'))
        scale = config.lr_base_scale or ('sqrt' if adaptive else 'linear')
        config.lr = config.lr_base * (math.sqrt(ratio) if scale == 'sqrt' else ratio)
    return create_optimizer_v2(module, **optimizer_kwargs(cfg=config), **config.opt_kwargs)
