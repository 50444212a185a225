"""Classification in a run: its splits, its loss, and its validation"""
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from timm.data import create_loader
from torch import nn
from torch.utils.data import IterableDataset

from dreal_timm.data.classes import class_names, match_classes, names_of_config, network_names, relabel, same_name
from dreal_timm.hub.run import names_of_weights
from dreal_timm.train import datasets, loaders
from dreal_timm.train.evaluate import evaluate
from dreal_timm.train.settings import TrainConfig
from dreal_timm.train.streams import check_shards
from dreal_timm.train.validate import measure, measure_split

__all__ = ['Classification']

_logger = logging.getLogger(__name__)


def _validate(model: nn.Module, loader: Any, **options: Any) -> dict[str, float]:
    """Metrics of an epoch; images that cannot be read are named by the loader, and counted here."""
    metrics = evaluate(model, loader, **options)
    samples = metrics.pop('samples')
    if not isinstance(loader.dataset, IterableDataset) and samples < len(loader.dataset):
        _logger.warning(f'validation: {len(loader.dataset) - samples:,} images cannot be read and are left out')
    return metrics


class Classification:
    """One true class an image. Methods are those of every domain, in the order in which a run calls them.

    Args:
        config: The configuration.
        accelerator: Accelerate's accelerator.
    """
    metrics = ('top1', 'top5', 'loss', 'epoch')  # that epochs can be ranked by

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.config = config
        self.accelerator = accelerator

    def check_model(self, model: Any, preprocessing: Mapping[str, Any]) -> None:
        """Open both splits, with as many channels as the network has, and compare classes and outputs."""
        config, channels = self.config, preprocessing['input_size'][0]
        with self.accelerator.local_main_process_first() if config.dataset_download else nullcontext():
            self.train_set = datasets.build_dataset(config, config.train_split, channels, True, model.num_classes)
            self.val_set = None
            if config.val_split:
                self.val_set = datasets.build_dataset(config, config.val_split, channels, False, model.num_classes)
            self._check_labels(model.num_classes)

    def _check_labels(self, num_classes: int) -> None:
        """Raise a ValueError if the splits have other classes than each other, or the network has not as many."""
        names, val_names = class_names(self.train_set), class_names(self.val_set)
        if names is not None and val_names is not None and [*map(same_name, names)] != [*map(same_name, val_names)]:
            differing = sorted(set(names) ^ set(val_names))
            raise ValueError(
                f'The splits have different classes, so that labels would not agree: {", ".join(differing)} '
                'without an image in one of them. A class_map names the classes of both.'
            )
        if names is None or len(names) == num_classes:
            return
        if len(names) > num_classes:
            raise ValueError(f'num_classes: {num_classes}, but the data set has {len(names)} classes.')
        if self.config.num_classes is None:
            raise ValueError(
                f'num_classes: the data set has {len(names)} classes, the model as it comes {num_classes}: '
                f'add num_classes={len(names)}, or num_classes={num_classes} to keep its classifier.'
            )
        _logger.warning(
            f'num_classes: {num_classes} outputs for {len(names)} classes of the data set: the others are never right.')

    def _names_of_start(self, model: Any, names: list[str] | None) -> list[list[str]]:
        """Names of the classes of a network that starts with a trained classifier; none where it is made anew."""
        config = self.config
        if config.class_map:
            return []
        if config.initial_checkpoint:
            trained = names_of_weights(config.initial_checkpoint)
            return [] if trained is None else [trained]
        if not config.pretrained or config.pretrained_path or (
                model.num_classes != model.pretrained_cfg.get('num_classes')):
            return []
        schemes = network_names(model)
        if names is not None and names_of_config(model.pretrained_cfg) is None:
            return [scheme for scheme in schemes if set(names) <= set(scheme)]  # ImageNet's, or a guess
        return schemes

    def settle_classes(
            self, model: Any, checkpoint: Mapping[str, Any] | None, path: Path | None) -> list[str] | None:
        """Let the labels of both splits be the outputs of a classifier that is trained already; return their names.

        A run that goes on keeps the order of the classes that its checkpoint was trained with. A network that starts
        with its classifier keeps the order of its own classes, where the recipe has no class map.

        Args:
            model: The network.
            checkpoint: What the run goes on from, or None.
            path: Its file.

        Raises:
            ValueError: The data set has other classes.
        """
        names = class_names(self.train_set)
        if checkpoint is not None and path is not None:
            same = datasets.check_same_classes(names, checkpoint, path)
            trained = [] if same is None else [same]
        else:
            trained = self._names_of_start(model, names)
        # of the network that it started from: they are not those of this data
        names_of_others = ('label_names', 'label_descriptions')
        model.pretrained_cfg = {
            key: value for key, value in model.pretrained_cfg.items() if key not in names_of_others}
        if names is None or not trained:
            return names
        match = match_classes(
            names, trained, model.num_classes,
            hint='class_map=FILE names the output of each class, and pretrained_path=FILE makes the classifier anew')
        for dataset in (self.train_set, self.val_set):
            if dataset is not None:
                relabel(dataset, model.num_classes, match)
        return trained[0]

    def count_images(self) -> tuple[int, int]:
        """Return the numbers of images of both splits."""
        processes = self.accelerator.num_processes
        return loaders.count_images(self.train_set, processes), loaders.count_images(self.val_set, processes)

    def criterion(self, model: Any) -> dict[str, Any]:
        """Return the arguments of timm's losses."""
        config = self.config
        loss: dict[str, Any] = dict(
            loss_type='bce' if config.bce_loss else None, smoothing=config.smoothing,
            soft_targets=loaders.mixes(config))
        if config.bce_loss:
            loss.update(
                bce_sum=config.bce_sum, bce_target_thresh=config.bce_target_thresh, pos_weight=config.bce_pos_weight)
        return {'criterion_kwargs': loss}

    def train_loader(self, preprocessing: Mapping[str, Any], mixup: Any) -> Any:
        """Return timm's loader of images to train on, with its augmentation.

        Raises:
            ValueError: The training split has less than a batch, or a setting needs several processes.
        """
        config, processes = self.config, self.accelerator.num_processes
        if loaders.kind_of(config) == 'wds':
            check_shards(self.train_set, processes, config.workers)
        images = loaders.count_images(self.train_set, processes) // processes
        if images < config.batch_size:
            raise ValueError(
                f'batch_size: {config.batch_size} images a batch, but the training split has {images} for each '
                'process.')
        if config.aug_repeats and processes == 1:
            raise ValueError('aug_repeats: repeats are shared out to several processes; there is one.')
        kwargs = loaders.shared_arguments(config, preprocessing, self.accelerator.device, processes)
        if not config.no_aug and config.train_interpolation:
            kwargs['interpolation'] = config.train_interpolation
        loader = create_loader(
            self.train_set, batch_size=config.batch_size, is_training=True, worker_seeding=config.worker_seeding,
            collate_fn=None if config.no_prefetcher else mixup, num_aug_repeats=config.aug_repeats,
            re_split=config.resplit, **loaders.augmentation(config), **kwargs)
        if hasattr(loader.sampler, 'seed'):  # of several processes: timm leaves it at 0
            loader.sampler.seed = config.seed
        return loader

    def validation(self, preprocessing: Mapping[str, Any]) -> Callable[[nn.Module], dict[str, float]] | None:
        """Return what measures top1, top5 and loss, over all processes."""
        if self.val_set is None:
            return None
        device, processes = self.accelerator.device, self.accelerator.num_processes
        loader = loaders.build_loader(self.config, self.val_set, preprocessing, device, processes)
        return partial(
            _validate, loader=loader, device=device, distributed=processes > 1, autocast=self.accelerator.autocast,
            channels_last=self.config.channels_last)

    def measure(self, network: nn.Module) -> dict[str, Any]:
        """Measure a network on the validation split."""
        return measure_split(network, self.config, self.accelerator.device)

    def label_names(self, names: list[str] | None) -> list[str] | None:
        """Return the names of the classes that are exported."""
        return names

    def drop_head(self, model: Any) -> None:
        """Remove of a trained network what is not exported: nothing."""

    @staticmethod
    def sample_set(config: TrainConfig, channels: int) -> Any:
        """Return the validation split."""
        return datasets.build_dataset(config, config.val_split, channels, False)

    @staticmethod
    def measure_export(network: nn.Module, source: str, **options: Any) -> dict[str, Any]:
        """Validate the network, see `validate.measure`."""
        return measure(network, **options)
