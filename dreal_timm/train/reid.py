"""Re-identification in a run (`dreal.task: reid`): its data, its loaders and its validation"""
import os
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from timm.utils import unwrap_model
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dreal_timm.errors import nearest
from dreal_timm.models.reid import ReidNetwork
from dreal_timm.reid import PKSampler, ReidData, ReidImage, open_reid
from dreal_timm.reid.evaluation import (
    check_answers,
    evaluate_features,
    evaluate_network,
    extract_features,
    feature_loader,
    open_checked,
)
from dreal_timm.reid.images import ReidSet, check_images
from dreal_timm.reid.layouts import LAYOUTS
from dreal_timm.train.loaders import augmentation, mixes
from dreal_timm.train.settings import TrainConfig

__all__ = [
    'METRICS', 'build_train_loader', 'build_validation', 'check_model', 'is_reid', 'measure_identities', 'open_data',
    'read_all',
]

METRICS = ('mAP', 'rank1', 'epoch')  # that epochs can be ranked by
_PAD = 10 / 384  # of the height, on each side: 10 pixels of 384 x 128
_ENLARGE = 1.125


def is_reid(config: TrainConfig) -> bool:
    """Return whether a recipe trains re-identification."""
    return config.dreal.task == 'reid'


def _check_settings(config: TrainConfig) -> None:
    """Raise a ValueError about a key that means nothing here."""
    for name, on in (
        ('mixup, cutmix', mixes(config)), ('bce_loss', config.bce_loss), ('aug_repeats', bool(config.aug_repeats)),
        ('dataset_download', config.dataset_download), ('class_map', bool(config.class_map)),
    ):
        if on:
            raise ValueError(f'{name}: means nothing with dreal.task=reid.')
    images = config.dreal.reid.num_instances
    if config.batch_size % images:
        raise ValueError(
            f'batch_size: {config.batch_size} is no number of identities times dreal.reid.num_instances={images}.')


def _layout(name: str) -> str:
    kind, _, layout = name.partition('/')
    if name and (kind != 'reid' or layout not in LAYOUTS):
        known = [f'reid/{known}' for known in LAYOUTS]
        raise ValueError(
            f"dataset: with dreal.task=reid one of {', '.join(known)}, or empty, got '{name}'{nearest(name, known)}.")
    return layout


def open_data(config: TrainConfig) -> ReidData:
    """Open the data set of a run, and let `num_classes` be the number of its identities.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: A setting means nothing here, the data set is broken, or nothing in it could be validated.
    """
    _check_settings(config)
    if not config.data_dir:
        raise ValueError('data_dir: the recipe names no place of images; add data_dir=DIR.')
    data = open_reid(config.data_dir, _layout(config.dataset))
    if config.val_split:
        check_answers(data, config.dreal.reid.camera_rule)
    check_images(_used(config, data))
    identities = len(data.identities())
    if config.num_classes not in (None, identities):
        raise ValueError(f'num_classes: {config.num_classes}, but there are {identities} identities to train on.')
    config.num_classes = identities
    config.dataset = f'reid/{data.layout}'
    return data


def _used(config: TrainConfig, data: ReidData) -> list[ReidImage]:
    return [*data.train, *(data.query + data.gallery if config.val_split else ())]


def read_all(config: TrainConfig, data: ReidData, processes: int = 1) -> None:
    """Read every image once, and raise a ValueError if one is broken: a run would find it after hours.

    Args:
        config: The configuration.
        data: The data set.
        processes: Number of the processes that do so on this machine.
    """
    check_images(_used(config, data), whole=True, workers=max(1, (os.cpu_count() or 1) // processes))


def check_model(model: nn.Module, name: str) -> None:
    """Raise a ValueError if a network is no embedding network."""
    if not isinstance(model, ReidNetwork):
        raise ValueError(
            f"model: dreal.task=reid trains dreal_reid, got '{name}': set model=dreal_reid "
            f'model_kwargs.backbone={name}.')


def _crop(kind: str, size: tuple[int, int], interpolation: str) -> list[Any]:
    modes = {mode.value: mode for mode in InterpolationMode}
    # as timm's 'random': bilinear or bicubic
    chosen = [modes.get(interpolation, modes['bilinear'])]
    if interpolation == 'random':
        chosen = [modes['bilinear'], modes['bicubic']]
    target = size if kind == 'pad' else tuple(round(side * _ENLARGE) for side in size)
    pad = [transforms.Pad(max(1, round(_PAD * size[0])))] if kind == 'pad' else []
    return [_Resize(target, chosen), *pad, transforms.RandomCrop(size)]


class _Resize:
    """Resize to a size, without a look at the proportions, by one of several interpolations."""

    def __init__(self, size: tuple[int, ...], interpolations: list[InterpolationMode]):
        self.resizes = [transforms.Resize(size, interpolation) for interpolation in interpolations]

    def __call__(self, image: Any) -> Any:
        return random.choice(self.resizes)(image)

    def __repr__(self) -> str:
        return ' | '.join(map(repr, self.resizes))


def _transform(config: TrainConfig, data: Mapping[str, Any]) -> Any:
    """timm's augmentation, with the crop of re-identification in place of its own."""
    interpolation = config.train_interpolation or data['interpolation']
    kwargs: dict[str, Any] = dict(
        input_size=data['input_size'], is_training=True, interpolation=interpolation, mean=data['mean'],
        std=data['std'], use_prefetcher=not config.no_prefetcher, **augmentation(config))
    if config.no_aug:
        return create_transform(**kwargs)
    stages = create_transform(**kwargs, separate=True)
    primary, *others = [list(stage.transforms) for stage in stages]
    if config.dreal.reid.crop != 'timm':
        primary[:1] = _crop(config.dreal.reid.crop, tuple(data['input_size'][-2:]), interpolation)
    return transforms.Compose([*primary, *(step for stage in others for step in stage)])


def build_train_loader(
        config: TrainConfig,
        images: ReidData,
        data: Mapping[str, Any],
        device: torch.device,
        process: int = 0,
        processes: int = 1,
) -> Any:
    """Return the loader of P x K batches; timm's own takes no batch sampler.

    Args:
        config: The configuration.
        images: The data set.
        data: Preprocessing, from `data_config`.
        device: Device of the batches.
        process: Number of this process.
        processes: Number of processes.

    Raises:
        ValueError: There are too few identities.
    """
    options, labels = config.dreal.reid, {pid: label for label, pid in enumerate(images.identities())}
    dataset = ReidSet(images.train, labels, data['input_size'][0])
    dataset.transform = _transform(config, data)
    sampler = PKSampler(
        dataset.labels, config.batch_size // options.num_instances, options.num_instances, config.seed, process,
        processes)
    loader: Any = DataLoader(
        dataset, batch_sampler=sampler, num_workers=config.workers, pin_memory=config.pin_mem,
        collate_fn=None if config.no_prefetcher else fast_collate)
    if config.no_prefetcher:
        return loader
    return PrefetchLoader(
        loader, mean=data['mean'], std=data['std'], channels=data['input_size'][0], device=device,
        re_prob=config.reprob, re_mode=config.remode, re_count=config.recount,
        re_num_splits=2 if config.resplit else 0)


def build_validation(
        config: TrainConfig,
        images: ReidData,
        data: Mapping[str, Any],
        accelerator: Accelerator,
) -> Callable[[nn.Module], dict[str, float]]:
    """Return what measures a network on queries and gallery; processes share the images out."""
    known = [*images.query, *images.gallery]
    rank, processes = accelerator.process_index, accelerator.num_processes
    share = -(-len(known) // processes)
    own = [known[min(i * processes + rank, len(known) - 1)] for i in range(share)]
    loader = feature_loader(
        own, data, accelerator.device, config.validation_batch_size or config.batch_size, config.workers,
        pin_memory=config.pin_mem, use_prefetcher=not config.no_prefetcher)
    return partial(_validate, config, images, accelerator, loader)


def _validate(
        config: TrainConfig,
        images: ReidData,
        accelerator: Accelerator,
        loader: Any,
        model: nn.Module,
) -> dict[str, float]:
    features = extract_features(
        unwrap_model(model), loader, accelerator.device, config.dreal.reid.flip_test, accelerator.autocast,
        config.channels_last)
    if accelerator.num_processes > 1:
        gathered = accelerator.gather(features).view(accelerator.num_processes, len(features), -1)
        features = gathered.transpose(0, 1).flatten(0, 1)[:len(images.query) + len(images.gallery)]
    query, gallery = features.split([len(images.query), len(images.gallery)])
    return evaluate_features(query, gallery, images, config.dreal.reid.dist_metric, config.dreal.reid.camera_rule)


def measure_identities(network: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Evaluate a network on the data of a configuration, by this process alone, for the card of an export."""
    options = config.dreal.reid
    data = open_checked(config.data_dir or '', _layout(config.dataset), options.camera_rule)
    return evaluate_network(
        network, data, options.dist_metric, options.camera_rule, options.flip_test, batch_size=config.batch_size,
        workers=config.workers, device=device)[0]
