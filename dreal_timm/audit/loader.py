"""The images of a loader of the user's own, which is read twice"""
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_data_config
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dreal_timm.data.images import NO_LABEL

__all__ = ['LoaderImages']


class LoaderImages:
    """Images and class indices of a loader, by their number in its order, without those of the label -1.

    Args:
        data: Batches of images (B, C, H, W) and class indices (B,), in the same order each time that it is iterated
            over; or a data set of torch.
        model: The network; batches are on its device and in its dtype.
        batch_size: Images a batch, of a data set.
        workers: Loader processes, of a data set.

    Raises:
        ValueError: It can be read only once, or its images are no tensors.
    """

    def __init__(self, data: Iterable[Any], model: nn.Module, batch_size: int = 128, workers: int = 0):
        if isinstance(data, Dataset):
            if not isinstance(data, IterableDataset) and isinstance(data[0][0], Image.Image):
                raise ValueError(
                    'The data set gives images of PIL and not tensors: set its transform, '
                    'timm.data.create_transform(**timm.data.resolve_data_config({}, model=model)).')
            data = DataLoader(data, batch_size=batch_size, num_workers=workers)
        if isinstance(data, Iterator):
            raise ValueError('Images are read twice, which a generator or iterator cannot: pass a list or a loader.')
        self.data = data
        self.like = next(model.parameters())
        self.data_config: Mapping[str, Any] = resolve_data_config({}, model=model)
        self.unreadable: list[int] = []
        self.kept: dict[int, torch.Tensor] = {}
        self._begun: tuple[Iterator[Any], Any] | None = None
        self._prints: list[torch.Tensor] = []  # of the images of the first reading

    def size(self) -> tuple[int, ...]:
        """Return (C, H, W) of the first image."""
        reading = iter(self.data)
        first = next(reading, None)
        if first is None:
            raise ValueError('The loader yields nothing.')
        self._begun = reading, first
        return tuple(_parts(first)[0].shape[1:])

    def __getitem__(self, number: int) -> tuple[torch.Tensor]:
        return (self.kept[number],)

    def filename(self, number: int) -> str:
        """Return what an image is called."""
        return f'image {number}'

    def _batches(self) -> Iterator[Any]:
        if self._begun is None:
            yield from self.data
            return
        (reading, first), self._begun = self._begun, None
        yield first
        yield from reading

    def read(self, keep: Collection[int] = ()) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield images, class indices and numbers of each batch.

        Args:
            keep: Numbers of images to keep, which are there by their number afterwards.

        Raises:
            ValueError: A batch is no pair of images and class indices, or the loader does not give what it gave first.
        """
        again, count, index = bool(self._prints), 0, -1
        self.unreadable = []
        for index, batch in enumerate(self._batches()):
            pixels, target = _parts(batch)
            prints = _print(pixels, target)
            if not again:
                self._prints.append(prints)
            elif index >= len(self._prints) or not _same(prints, self._prints[index]):
                raise ValueError(_CHANGED)
            number = torch.arange(count, count + len(target))
            count += len(target)
            labelled = target.cpu() != NO_LABEL
            self.unreadable += number[~labelled].tolist()
            pixels, target = pixels.to(self.like.device, self.like.dtype), target.to(self.like.device)
            self.kept.update({n: pixels[n - int(number[0])].cpu() for n in number.tolist() if n in keep})
            rows = labelled.to(self.like.device)
            yield pixels[rows], target[rows], number[labelled]
        if again and index + 1 != len(self._prints):
            raise ValueError(_CHANGED)


_CHANGED = (
    'The loader gave other images, or another order, the second time: turn off what shuffles or augments at random.')


def _parts(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and class indices of a batch, which may hold more."""
    if not isinstance(batch, list | tuple) or len(batch) < 2:
        raise ValueError(f'Batches must be images and class indices, got {type(batch).__name__}.')
    pixels, target = batch[0], torch.as_tensor(batch[1])
    if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4 or not pixels.is_floating_point():
        given = f'{tuple(pixels.shape)} {pixels.dtype}' if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise ValueError(f'Images must be normalised tensors of floats, (B, C, H, W), got {given}.')
    if target.shape != pixels.shape[:1] or target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f'Class indices must be integers (B,), got {tuple(target.shape)} {target.dtype}.')
    return pixels, target.long()


def _print(pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Two numbers an image that tell whether it is the same, in the same place and of the same class, (B, 2)."""
    flat = pixels.detach().cpu().double().flatten(1)
    places = torch.linspace(1, 2, flat.shape[1], dtype=torch.float64)  # a mirrored image is another
    return torch.stack([flat @ places, target.cpu().double()], dim=1)


def _same(prints: torch.Tensor, before: torch.Tensor) -> bool:
    return prints.shape == before.shape and torch.allclose(prints, before, rtol=1e-9, atol=1e-6, equal_nan=True)
