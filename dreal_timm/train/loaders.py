"""The loaders of a run: timm's, with its augmentation and mixup"""
from collections.abc import Mapping
from typing import Any

import torch
from timm.data import FastCollateMixup, Mixup, create_loader

from dreal_timm.train.settings import TrainConfig
from dreal_timm.train.streams import count_once, restart

__all__ = [
    'augmentation', 'build_loader', 'build_mixup', 'count_images', 'kind_of', 'mixes', 'set_epoch', 'shared_arguments',
]


def mixes(config: TrainConfig) -> bool:
    """Return whether mixup or cutmix is on, and with it soft targets."""
    return config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None


def build_mixup(config: TrainConfig, num_classes: int) -> Any:
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


def count_images(dataset: Any, processes: int) -> int:
    """Return the number of images of all processes; a stream of timm tells that of one."""
    if dataset is None:
        return 0
    return len(dataset) * (processes if isinstance(dataset, torch.utils.data.IterableDataset) else 1)


def augmentation(config: TrainConfig) -> dict[str, Any]:
    """Return the arguments of timm's training transform, less size, normalisation and interpolation."""
    return dict(
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
        re_prob=config.reprob,
        re_mode=config.remode,
        re_count=config.recount,
    )


def kind_of(config: TrainConfig) -> str:
    """Return the kind of a data set: 'wds' of 'wds/NAME', '' of an image folder."""
    return config.dataset.partition('/')[0].lower()


def shared_arguments(
        config: TrainConfig, preprocessing: Mapping[str, Any], device: torch.device, processes: int) -> dict[str, Any]:
    """Return the arguments of `timm.data.create_loader` that training and validation share."""
    return dict(
        {key: preprocessing[key] for key in ('input_size', 'interpolation', 'mean', 'std')},
        num_workers=config.workers,
        pin_memory=config.pin_mem,
        use_prefetcher=not config.no_prefetcher,
        device=device,
        distributed=processes > 1,
        persistent_workers=False,
    )


def build_loader(
        config: TrainConfig,
        dataset: Any,
        preprocessing: Mapping[str, Any],
        device: torch.device,
        processes: int = 1,
) -> Any:
    """Create timm's loader of images to validate on.

    Args:
        config: The configuration.
        dataset: The data set.
        preprocessing: What `data_config` returned.
        device: Device of the batches.
        processes: Number of processes that share the data set.
    """
    kwargs = shared_arguments(config, preprocessing, device, processes)
    if processes > 1 and kind_of(config) == 'wds':
        count_once(dataset)
    if processes > 1 and kind_of(config) == 'tfds':
        kwargs['num_workers'] = min(2, config.workers)  # as timm: a stream is cut evenly, by repeating images
    return create_loader(
        dataset, batch_size=config.validation_batch_size or config.batch_size, crop_pct=preprocessing['crop_pct'],
        crop_mode=preprocessing['crop_mode'], **kwargs)


def set_epoch(config: TrainConfig, loader: Any, mixup: Any, epoch: int) -> None:
    """Tell the loader of the epoch: its order, and whether it still mixes images."""
    if config.workers == 0:
        restart(loader.dataset, epoch)
    if hasattr(loader.dataset, 'set_epoch'):
        loader.dataset.set_epoch(epoch)
    for sampler in (loader.sampler, loader.batch_sampler):
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(epoch)
    if mixup is not None and config.mixup_off_epoch:
        mixup.mixup_enabled = epoch < config.mixup_off_epoch
