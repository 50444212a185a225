"""Small image sets in memory, and a training run on them that is the same for every kind of task but for the task

Fashion-MNIST (60,000 images, 10 classes), and letters: 100 of them in six fonts with turns, blur, noise and things that
stand before them (`dreal_timm.data.glyphs`), a set of many classes that anyone can draw without a download.
"""
import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask
from torch import nn
from torchvision.datasets import FashionMNIST

from dreal_timm.data.fashion_mnist import DEBIAN_FILES
from dreal_timm.data.glyphs import draw_letters

MEAN, STD = 0.2860, 0.3530
SIZE = (1, 32, 32)

Data = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class ImageSet:
    """A data set: splits, number of classes, and whether a mirror image is of the same class."""
    splits: dict[str, Data]
    classes: int
    mirrored: bool


def files(folder: Path) -> dict[str, Path]:
    """Return the files of Fashion-MNIST by their names in it, packed or not; raise a FileNotFoundError for one missing.

    Args:
        folder: Folder that `dreal-timm data fashion-mnist` or torchvision wrote, or one with the four gz files, such as
            that of Debian's package dataset-fashion-mnist.
    """
    raw = folder / 'FashionMNIST' / 'raw'
    found = {}
    for packed, _ in FashionMNIST.resources:
        name = packed.removesuffix('.gz')
        paths = [path for path in (raw / name, raw / packed, folder / packed) if path.is_file()]
        if not paths:
            raise FileNotFoundError(
                f"No '{packed}' in '{folder}': `dreal-timm data fashion-mnist DIR` gets it, and --data DIR reads it.")
        found[name] = paths[0]
    return found


def load(folder: Path = DEBIAN_FILES) -> dict[str, Data]:
    """Read images (N, 1, 32, 32), normalised, and labels (N,), of the training and the test split; see `files`."""
    found = files(folder)

    def read(name: str, offset: int) -> torch.Tensor:
        path = found[name]
        content = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
        return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=offset).copy())

    splits = {}
    for split, prefix in (('train', 'train'), ('test', 't10k')):
        pixels = read(f'{prefix}-images-idx3-ubyte', 16).view(-1, 1, 28, 28)
        images = (pixels.float() / 255 - MEAN) / STD
        images = nn.functional.pad(images, (2, 2, 2, 2), value=-MEAN / STD)
        splits[split] = images, read(f'{prefix}-labels-idx1-ubyte', 8).long()
    return splits


def letters() -> dict[str, Data]:
    """Draw images (N, 1, 32, 32), normalised, and labels (N,): 7,200 to train on, 21,600 to test, 100 classes."""
    splits = {}
    for split, (pixels, labels) in draw_letters(classes=100, views={'train': 12, 'test': 36}).items():
        splits[split] = (torch.from_numpy(pixels).float()[:, None] / 255 - 0.5) / 0.25, torch.from_numpy(labels)
    return splits


def open_set(name: str, folder: Path = DEBIAN_FILES) -> ImageSet:
    """Open 'fashion' or 'letters'."""
    return ImageSet(load(folder), 10, True) if name == 'fashion' else ImageSet(letters(), 100, False)


def batches(data: Data, batch_size: int, epoch: int, seed: int, mirrored: bool = True) -> Iterator[Data]:
    """Yield shuffled, shifted (by up to 2 pixels) and mirrored batches, the same for a seed and an epoch."""
    generator = torch.Generator().manual_seed(1_000_003 * (epoch + 1) + seed)
    images, labels = data
    order = torch.randperm(len(images), generator=generator)
    for start in range(0, len(order) - batch_size + 1, batch_size):
        index = order[start:start + batch_size]
        batch = images[index]
        flipped = torch.rand(batch_size, generator=generator) < 0.5
        if mirrored:
            batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
        down, right = (int(torch.randint(-2, 3, (), generator=generator)) for _ in range(2))
        yield batch.roll((down, right), (2, 3)), labels[index]


def network(attention: str, width: float, seed: int, depth: int = 18, classes: int = 10) -> nn.Module:
    """An attention ResNet for images of 32 x 32 pixels, its stages scaled to a share of their width."""
    torch.manual_seed(seed)
    channels = tuple(int(width * c) for c in (64, 128, 256, 512))
    return timm.create_model(
        f'dreal_{attention}_resnet{depth}', num_classes=classes, in_chans=1, zero_init_last=False, channels=channels)


def subset(data: Data, images: int, seed: int) -> Data:
    """Draw so many images, without replacement."""
    index = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))[:images]
    return data[0][index], data[1][index]


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, device: torch.device) -> float:
    """Return top-1 accuracy, percent."""
    model.eval()
    right = sum(
        int((model(images.to(device)).argmax(1).cpu() == labels).sum())
        for images, labels in zip(data[0].split(500), data[1].split(500), strict=True)
    )
    return 100 * right / len(data[1])


def train(
        task: TrainingTask,
        data: Data,
        epochs: float,
        batch_size: int,
        lr: float,
        seed: int,
        device: torch.device,
        after_epoch: Callable[[int], None],
        mirrored: bool = True,
) -> None:
    """Train with SGD, a linear warm-up over a twentieth of the steps and a cosine to zero.

    Args:
        task: The task.
        data: Images and labels.
        epochs: Number of epochs; the last one of a broken number is cut short.
        batch_size: Images a step.
        lr: Highest learning rate.
        seed: Seed of order and augmentation.
        device: Device of the network.
        after_epoch: Called with the number of an epoch when it ends.
        mirrored: Whether half of the images are mirrored.
    """
    module = task.get_trainable_module()
    optimizer = create_optimizer_v2(module, 'momentum', lr=lr, momentum=0.9, weight_decay=5e-4)
    steps = round(epochs * (len(data[0]) // batch_size))
    warm = max(steps // 20, 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + float(np.cos(np.pi * step / steps)))))
    epoch = done = 0
    while done < steps:
        torch.manual_seed(1_000_003 * seed + epoch)
        module.train()
        for images, labels in batches(data, batch_size, epoch, seed, mirrored):
            task(images.to(device), labels.to(device))['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            done += 1
            if done == steps:
                break
        after_epoch(epoch)
        epoch += 1
