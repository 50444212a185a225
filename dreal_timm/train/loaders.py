"""The loaders of a run: timm's, with its augmentation and mixup"""
from collections.abc import Mapping
from typing import Any

import torch
from timm.data import FastCollateMixup, Mixup, create_loader

from dreal_timm.train.settings import TrainConfig
from dreal_timm.train.streams import check_shards, count_once, restart

__all__ = ['augmentation', 'build_loader', 'build_mixup', 'count_images', 'mixes', 'set_epoch']


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


def build_loader(
        config: TrainConfig,
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
    kind, processes = config.dataset.partition('/')[0].lower(), torch.distributed.get_world_size() if distributed else 1
    workers = config.workers
    if not is_training and distributed and kind == 'wds':
        count_once(dataset)
    if not is_training and distributed and kind == 'tfds':
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
    if kind == 'wds':
        check_shards(dataset, processes, workers)
    images = count_images(dataset, processes) // processes
    if images < config.batch_size:
        raise ValueError(
            f'batch_size: {config.batch_size} images a batch, but the training split has {images} for each process.')
    if config.aug_repeats and not distributed:
        raise ValueError('aug_repeats: repeats are shared out to several processes; there is one.')
    if not config.no_aug and config.train_interpolation:
        kwargs['interpolation'] = config.train_interpolation
    loader = create_loader(
        dataset,
        batch_size=config.batch_size,
        is_training=True,
        worker_seeding=config.worker_seeding,
        collate_fn=None if config.no_prefetcher else mixup,
        num_aug_repeats=config.aug_repeats,
        re_split=config.resplit,
        **augmentation(config),
        **kwargs,
    )
    if hasattr(loader.sampler, 'seed'):  # of several processes: timm leaves it at 0
        loader.sampler.seed = config.seed
    return loader


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
