"""Which images of a data set an audit looks at, and how"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ['AuditSettings']


@dataclass(frozen=True)
class AuditSettings:
    """Settings of an audit of a data set on the disk.

    Attributes:
        dataset: Kind and name of the data set as in a recipe; empty is an image folder.
        split: Its split.
        class_map: File with the names of all classes, where the network does not know those of the data set.
        by_order: Take the classes of the data set in their order.
        sites: Names of the sites to audit, or of modules that contain them; None are all.
        input_size: (C, H, W) of the images; None is the model's own.
        num_samples: Number of images, drawn at random; None are all.
        batch_size: Images a batch.
        workers: Loader processes.
        device: Device; None takes an accelerator where there is one.
        seed: Seed of the draw of images and of the intervals.
        resamples: Bootstrap resamples.

    Raises:
        ValueError: There are no resamples.
    """
    dataset: str = ''
    split: str = 'validation'
    class_map: str = ''
    by_order: bool = False
    sites: Sequence[str] | None = None
    input_size: Sequence[int] | None = None
    num_samples: int | None = None
    batch_size: int = 128
    workers: int = 2
    device: torch.device | str | None = None
    seed: int = 0
    resamples: int = 1000

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f'resamples: must be 1 or more, got {self.resamples}.')
