"""Re-identification in a run (`dreal.task: reid`): its data, its loaders and its validation"""
import os
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from timm.data import create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from timm.utils import unwrap_model
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dreal_timm.errors import nearest
from dreal_timm.models.reid import backbone_of, drop_identities
from dreal_timm.reid import IdentityLoss, PKSampler, ReidData, ReidImage, open_reid
from dreal_timm.reid.evaluation import (
    check_answers,
    evaluate_features,
    evaluate_network,
    extract_features,
    feature_loader,
    open_checked,
    settings_of,
)
from dreal_timm.reid.images import ReidSet, check_images
from dreal_timm.reid.layouts import LAYOUTS
from dreal_timm.train.datasets import check_same_classes
from dreal_timm.train.loaders import augmentation, mixes
from dreal_timm.train.settings import TrainConfig

__all__ = ['Reidentification']

_PAD = 10 / 384  # of the height, on each side: 10 pixels of 384 x 128
_ENLARGE = 1.125


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


def _open_data(config: TrainConfig) -> ReidData:
    """Open the data set of a run, and let `num_classes` be the number of its identities."""
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


def _read_all(config: TrainConfig, data: ReidData, processes: int) -> None:
    """Raise a ValueError if an image is broken, which a run would meet after hours."""
    check_images(_used(config, data), whole=True, workers=max(1, (os.cpu_count() or 1) // processes))


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


def _transform(config: TrainConfig, preprocessing: Mapping[str, Any]) -> Any:
    """timm's augmentation, with the crop of re-identification in place of its own."""
    interpolation = config.train_interpolation or preprocessing['interpolation']
    kwargs: dict[str, Any] = dict(
        {key: preprocessing[key] for key in ('input_size', 'mean', 'std')}, is_training=True,
        interpolation=interpolation, use_prefetcher=not config.no_prefetcher, **augmentation(config))
    if config.no_aug:
        return create_transform(**kwargs)
    stages = create_transform(**kwargs, separate=True)
    primary, *others = [list(stage.transforms) for stage in stages]
    if config.dreal.reid.crop != 'timm':
        primary[:1] = _crop(config.dreal.reid.crop, tuple(preprocessing['input_size'][-2:]), interpolation)
    return transforms.Compose([*primary, *(step for stage in others for step in stage)])


class Reidentification:
    """Identities, by images of several cameras; methods as of `Classification`.

    Args:
        config: The configuration; `num_classes` becomes the number of identities.
        accelerator: Accelerate's accelerator.

    Raises:
        FileNotFoundError: The data set is missing.
        ValueError: A setting means nothing here, the data set is broken, or nothing in it could be validated.
    """
    metrics = ('mAP', 'rank1', 'epoch')  # that epochs can be ranked by

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.config = config
        self.accelerator = accelerator
        self.data = _open_data(config)  # before the network, which has as many outputs as there are identities

    def check_model(self, model: Any, preprocessing: Mapping[str, Any]) -> None:
        """Raise a ValueError if the network is no embedding network."""
        if backbone_of(model) is model:
            raise ValueError(
                f"model: dreal.task=reid trains dreal_reid, got '{self.config.model}': set model=dreal_reid "
                f'model_kwargs.backbone={self.config.model}.')

    def settle_classes(
            self, model: Any, checkpoint: Mapping[str, Any] | None, path: Path | None) -> list[str] | None:
        """Return the names of the identities; a new run reads every image once."""
        names = self.data.identity_names()
        if checkpoint is None or path is None:
            _read_all(self.config, self.data, self.accelerator.num_processes)
        else:
            check_same_classes(names, checkpoint, path)
        return names

    def count_images(self) -> tuple[int, int]:
        """Return the numbers of images to train on, and of queries and gallery together."""
        return len(self.data.train), len(self.data.query) + len(self.data.gallery) if self.config.val_split else 0

    def criterion(self, model: Any) -> dict[str, Any]:
        """Return the loss of identities."""
        options = self.config.dreal.reid
        loss = IdentityLoss(model, self.config.smoothing, options.margin, options.triplet_weight)
        return {'criterion': loss.to(self.accelerator.device)}

    def train_loader(self, preprocessing: Mapping[str, Any], mixup: Any) -> Any:
        """Return the loader of P x K batches, which timm's own, without a batch sampler, does not make."""
        config, images = self.config, self.config.dreal.reid.num_instances
        labels = {pid: label for label, pid in enumerate(self.data.identities())}
        dataset = ReidSet(self.data.train, labels, preprocessing['input_size'][0])
        dataset.transform = _transform(config, preprocessing)
        sampler = PKSampler(
            dataset.labels, config.batch_size // images, images, config.seed, self.accelerator.process_index,
            self.accelerator.num_processes)
        loader: Any = DataLoader(
            dataset, batch_sampler=sampler, num_workers=config.workers, pin_memory=config.pin_mem,
            collate_fn=None if config.no_prefetcher else fast_collate)
        if config.no_prefetcher:
            return loader
        return PrefetchLoader(
            loader, mean=preprocessing['mean'], std=preprocessing['std'], channels=preprocessing['input_size'][0],
            device=self.accelerator.device, re_prob=config.reprob, re_mode=config.remode, re_count=config.recount,
            re_num_splits=2 if config.resplit else 0)

    def validation(self, preprocessing: Mapping[str, Any]) -> Callable[[nn.Module], dict[str, float]] | None:
        """Return what measures a network on queries and gallery; processes share the images out."""
        config, accelerator = self.config, self.accelerator
        if not config.val_split:
            return None
        known = [*self.data.query, *self.data.gallery]
        rank, processes = accelerator.process_index, accelerator.num_processes
        share = -(-len(known) // processes)
        own = [known[min(i * processes + rank, len(known) - 1)] for i in range(share)]
        loader = feature_loader(
            own, preprocessing, accelerator.device, config.validation_batch_size or config.batch_size, config.workers,
            pin_memory=config.pin_mem, use_prefetcher=not config.no_prefetcher)
        return partial(self._validate, loader)

    def _validate(self, loader: Any, model: nn.Module) -> dict[str, float]:
        options, accelerator = self.config.dreal.reid, self.accelerator
        queries, images = len(self.data.query), len(self.data.query) + len(self.data.gallery)
        features = extract_features(
            unwrap_model(model), loader, accelerator.device, options.flip_test, accelerator.autocast,
            self.config.channels_last)
        if accelerator.num_processes > 1:
            gathered = accelerator.gather(features).view(accelerator.num_processes, len(features), -1)
            features = gathered.transpose(0, 1).flatten(0, 1)[:images]
        return evaluate_features(
            features[:queries], features[queries:], self.data, options.dist_metric, options.camera_rule)

    def measure(self, network: nn.Module) -> dict[str, Any]:
        """Evaluate a network on queries and gallery."""
        config, options = self.config, self.config.dreal.reid
        data = open_checked(config.data_dir or '', _layout(config.dataset), options.camera_rule)
        return evaluate_network(
            network, data, options.dist_metric, options.camera_rule, options.flip_test, batch_size=config.batch_size,
            workers=config.workers, device=self.accelerator.device)[0]

    def label_names(self, names: list[str] | None) -> list[str] | None:
        """Return none: nobody else has these identities."""
        return None

    def drop_head(self, model: Any) -> None:
        """Remove the classifier of identities."""
        drop_identities(model)

    @staticmethod
    def sample_set(config: TrainConfig, channels: int) -> Any:
        """Return the queries."""
        return ReidSet(open_reid(config.data_dir or '', config.dataset.removeprefix('reid/')).query, channels=channels)

    @staticmethod
    def measure_export(network: nn.Module, source: str, **options: Any) -> dict[str, Any]:
        """Evaluate a network by the settings of its run."""
        if options['class_map'] or options['by_order']:
            raise ValueError('An embedding network has no classes to name.')
        settings = settings_of(source)
        data = open_checked(
            options['data_dir'], options['dataset'].removeprefix('reid/'), settings.get('camera_rule', 'exclude'))
        return evaluate_network(network, data, **settings)[0]
