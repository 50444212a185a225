"""The data of a run: timm's data sets, augmentation and loaders"""
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader, resolve_data_config
from timm.models import get_model_input_config

from dreal_timm.train.config import nearest
from dreal_timm.train.unreadable import name_unreadable

__all__ = [
    'build_dataset', 'build_loader', 'build_mixup', 'check_labels', 'class_names', 'data_config', 'mixes', 'set_epoch',
]

_KINDS = ('torch', 'hfds', 'hfids', 'wds', 'tfds')
_PACKAGES = {'hfds': 'datasets', 'hfids': 'datasets', 'wds': 'webdataset', 'tfds': 'tensorflow_datasets'}


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


def _kind(config: SimpleNamespace) -> str:
    """Return the kind of the data set, '' for an image folder, after a look at what can be seen without opening it."""
    kind, slash, _ = config.dataset.partition('/')
    kind = kind.lower()
    if config.dataset and not (slash and kind in _KINDS):
        raise ValueError(
            f"dataset: expected kind/name such as torch/fashion_mnist, got '{config.dataset}'{nearest(kind, _KINDS)}. "
            f'Kinds are {", ".join(_KINDS)}; an image folder has none.'
        )
    if not config.data_dir and kind in ('', 'torch', 'wds'):
        raise ValueError('data_dir: the recipe names no place of images; add data_dir=DIR.')
    local = kind in ('', 'torch') or (kind == 'wds' and ':' not in config.data_dir)
    if local and not config.dataset_download and not Path(config.data_dir).exists():
        raise FileNotFoundError(f"data_dir: no folder '{config.data_dir}'.")
    return kind


class _CheckedLabel:
    """Refuses a label that the network has no class for, on the host, before a loss on a GPU dies of it."""

    def __init__(self, num_classes: int, inner: Any = None):
        self.num_classes = num_classes
        self.inner = inner

    def __call__(self, target: Any) -> Any:
        target = target if self.inner is None else self.inner(target)
        if not 0 <= int(target) < self.num_classes:
            raise ValueError(
                f'Label {int(target)} is outside of the {self.num_classes} classes of the model: set num_classes.')
        return target


def _check_folders(dataset: Any, config: SimpleNamespace, split: str) -> None:
    """Raise an error about a split without a folder, or a class without an image: its labels would be others."""
    root = Path(getattr(dataset.reader, 'root', config.data_dir))
    if not root.is_dir():
        return
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    if root == Path(config.data_dir) and split:
        raise FileNotFoundError(
            f"data_dir '{config.data_dir}' has no folder '{split}': it holds {', '.join(folders) or 'no folders'}.")
    if config.class_map:
        return
    filled = {Path(name).parts[0] for name in dataset.filenames()}
    empty = [name for name in folders if name not in filled and not name.startswith('.')]
    if empty:
        raise ValueError(
            f'{root}: no image of {", ".join(empty)}. An empty class shifts the labels of the others: '
            'remove its folder, or name all classes in a class_map.'
        )


def build_dataset(
        config: SimpleNamespace,
        split: str,
        channels: int,
        is_training: bool,
        num_classes: int | None = None,
) -> Any:
    """Open a split of the data set.

    Args:
        config: The configuration.
        split: Name of the split.
        channels: Channels of the images.
        is_training: Whether it is for training, which shuffles a stream.
        num_classes: Classes of the network, which labels are checked against.

    Raises:
        FileNotFoundError: Its folder, or an image in it, is missing.
        ModuleNotFoundError: Its kind needs a package that is not installed.
        ValueError: No folder is given, the data set is unknown, or a class has no image.
    """
    kind = _kind(config)
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
            repeats=config.epoch_repeats if is_training else 0,
            input_img_mode=config.input_img_mode or ('RGB' if channels == 3 else 'L'),
            input_key=config.input_key,
            target_key=config.target_key,
            num_samples=config.train_num_samples if is_training else config.val_num_samples,
            trust_remote_code=config.dataset_trust_remote_code,
        )
    except ImportError as error:
        raise ModuleNotFoundError(
            f"dataset '{config.dataset}' needs the package {_PACKAGES.get(kind, str(error))}: "
            'pip install "dreal_timm[streaming]".'
        ) from error
    except (AssertionError, RuntimeError) as error:
        reason = str(error) or 'not found'
        raise FileNotFoundError(f"data_dir '{config.data_dir}', split '{split}': {reason}") from error
    if kind == '':
        _check_folders(dataset, config, split)
        name_unreadable(dataset)
    if num_classes is not None and hasattr(dataset, 'target_transform'):
        dataset.target_transform = _CheckedLabel(num_classes, dataset.target_transform)
    return dataset


def class_names(dataset: Any) -> list[str] | None:
    """Return the names of a data set's classes in the order of their indices, where it knows them."""
    known = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or getattr(dataset, 'class_to_idx', None)
    if not isinstance(known, Mapping) or sorted(known.values()) != list(range(len(known))):
        return None
    return [str(name) for name in sorted(known, key=lambda name: known[name])]


def check_labels(train_set: Any, val_set: Any | None, num_classes: int, given: bool = True) -> None:
    """Raise a ValueError if the splits have other classes than each other, or the network has not as many.

    Args:
        train_set: The training split.
        val_set: The validation split, or None.
        num_classes: Classes of the network.
        given: Whether the recipe asks for that number, so that it may be more than the data has.
    """
    names, val_names = class_names(train_set), class_names(val_set)
    if names is not None and val_names is not None and names != val_names:
        differing = sorted(set(names) ^ set(val_names))
        raise ValueError(
            f'The splits have different classes, so that labels would not agree: {", ".join(differing)} '
            'without an image in one of them. A class_map names the classes of both.'
        )
    if names is not None and len(names) > num_classes:
        raise ValueError(f'num_classes: {num_classes}, but the data set has {len(names)} classes.')
    if names is not None and len(names) < num_classes and not given:
        raise ValueError(
            f'num_classes: the data set has {len(names)} classes, the model as it comes {num_classes}: '
            f'add num_classes={len(names)}, or num_classes={num_classes} to keep its classifier.'
        )


def mixes(config: SimpleNamespace) -> bool:
    """Return whether mixup or cutmix is on, and with it soft targets."""
    return config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None


def build_mixup(config: SimpleNamespace, num_classes: int) -> Any:
    """Create timm's mixup, for the loader (prefetcher) or for batches on the device; None where it is off.

    Raises:
        ValueError: It pairs the images of a batch, and their number is odd.
    """
    if not mixes(config):
        return None
    if config.batch_size % 2:
        raise ValueError(f'batch_size: mixup and cutmix pair the images of a batch, got an odd {config.batch_size}.')
    if config.no_prefetcher and config.mixup_mode == 'half':
        raise ValueError("mixup_mode: 'half' needs the prefetcher; expected 'batch', 'pair' or 'elem'.")
    return (Mixup if config.no_prefetcher else FastCollateMixup)(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=config.cutmix_minmax,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def build_loader(
        config: SimpleNamespace,
        dataset: Any,
        data: Mapping[str, Any],
        device: torch.device,
        is_training: bool,
        distributed: bool = False,
        mixup: Any = None,
) -> Any:
    """Create timm's loader, with augmentation for training.

    Args:
        config: The configuration.
        dataset: The data set.
        data: Preprocessing, from `data_config`.
        device: Device of the batches.
        is_training: Whether it is for training.
        distributed: Whether processes share the data set.
        mixup: What `build_mixup` returned.

    Raises:
        ValueError: The training split has less than a batch, or a setting needs several processes.
    """
    workers = config.workers
    if not is_training and distributed and config.dataset.partition('/')[0].lower() in ('wds', 'tfds'):
        workers = min(2, workers)  # as timm: a stream is cut evenly over workers, by repeating images
    kwargs: dict[str, Any] = dict(
        input_size=data['input_size'],
        interpolation=data['interpolation'],
        mean=data['mean'],
        std=data['std'],
        num_workers=workers,
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
    images = len(dataset) // (torch.distributed.get_world_size() if distributed else 1)
    if images < config.batch_size:
        raise ValueError(
            f'batch_size: {config.batch_size} images a batch, but the training split has {images} for each process.')
    if config.aug_repeats and not distributed:
        raise ValueError('aug_repeats: repeats are shared out to several processes; there is one.')
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
        color_jitter_prob=config.color_jitter_prob,
        grayscale_prob=config.grayscale_prob or 0.0,
        gaussian_blur_prob=config.gaussian_blur_prob or 0.0,
        auto_augment=config.aa,
        num_aug_repeats=config.aug_repeats,
        re_prob=config.reprob,
        re_mode=config.remode,
        re_count=config.recount,
        re_split=config.resplit,
        worker_seeding=config.worker_seeding,
        collate_fn=None if config.no_prefetcher else mixup,
        **kwargs,
    )


def set_epoch(config: SimpleNamespace, loader: Any, mixup: Any, epoch: int) -> None:
    """Tell the loader of the epoch: its order, and whether it still mixes images."""
    if hasattr(loader.dataset, 'set_epoch'):
        loader.dataset.set_epoch(epoch)
    if hasattr(loader.sampler, 'set_epoch'):
        loader.sampler.set_epoch(epoch)
    if mixup is not None and config.mixup_off_epoch:
        mixup.mixup_enabled = epoch < config.mixup_off_epoch
