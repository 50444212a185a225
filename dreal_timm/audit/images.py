"""The images of an audit: by their number in the data set, without those that cannot be read"""
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dreal_timm.data.classes import Match, class_names
from dreal_timm.data.images import NO_LABEL

__all__ = ['NumberedImages', 'batches', 'draw_numbers']


class NumberedImages(Dataset[tuple[torch.Tensor, int, bool]]):
    """Images, labels, and whether the image could be read, by number.

    Args:
        dataset: One of timm's data sets, not a stream.
        data_config: Preprocessing, from `timm.data.resolve_data_config`.
        match: Which outputs of the network the classes are.

    Raises:
        ValueError: It is a stream, whose images have no numbers.
    """

    def __init__(self, dataset: Any, data_config: dict[str, Any], match: Match | None = None):
        if isinstance(dataset, IterableDataset):
            raise ValueError('An audit reads some images twice, by number: a stream (hfids, wds, tfds) has no numbers.')
        self.dataset = dataset
        self.data_config = data_config
        self.match = match or Match('order')
        dataset.transform = create_transform(**data_config, is_training=False)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int, bool]:
        image, target = self.dataset[number][:2]
        return image, int(target), int(target) != NO_LABEL

    def class_names(self) -> dict[str, str] | None:
        """Return the name that the data set has for the class of each output, by the output; None without names."""
        names = class_names(self.dataset)
        if names is None:
            return None
        by_output: dict[str, str] = {}
        for name, output in zip(names, self.match.outputs or range(len(names)), strict=True):
            key = str(output)  # as JSON has it
            by_output[key] = f'{by_output[key]}, {name}' if key in by_output else name
        return by_output

    def filename(self, number: int) -> str:
        """Return the path of an image in the data set's folder, or its number where it has none."""
        named = getattr(self.dataset, 'filename', None)
        return str(named(number)) if named is not None else f'image {number}'


def draw_numbers(count: int, wanted: int | None, seed: int) -> list[int]:
    """Return the numbers of the images to look at: all of them, or so many drawn at random, in ascending order."""
    if wanted is None or wanted >= count:
        return list(range(count))
    if wanted < 1:
        raise ValueError(f'num_samples must be 1 or more, got {wanted}.')
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted]
    return sorted(drawn.tolist())


def batches(
        images: NumberedImages,
        parts: Sequence[Sequence[int]],
        batch_size: int,
        workers: int,
        device: torch.device,
) -> Iterator[Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Yield, for each part, the batches of its images: images, class indices and numbers of those that can be read.

    Args:
        images: The images.
        parts: Numbers of the images of each part. A batch lies in one part.
        batch_size: Images a batch.
        workers: Loader processes.
        device: Device of the batches.
    """
    numbers = [[part[i:i + batch_size] for i in range(0, len(part), batch_size)] for part in parts]
    loader = DataLoader(
        images,
        batch_sampler=[list(batch) for part in numbers for batch in part],
        num_workers=workers,
        pin_memory=device.type == 'cuda',
    )
    loaded = iter(loader)

    def of_part(part: Sequence[Sequence[int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for batch in part:
            pixels, target, read = next(loaded)
            yield pixels[read].to(device), target[read].to(device), torch.tensor(batch)[read]

    for part in numbers:
        yield of_part(part)
