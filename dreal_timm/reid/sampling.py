"""P x K batches: K images of each of P identities

Sampling: `In Defense of the Triplet Loss for Person Re-Identification` (2017) - https://arxiv.org/abs/1703.07737
"""
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

__all__ = ['PKSampler']


class PKSampler(Sampler[list[int]]):
    """Batches of exactly K images of each of P different identities, the same for a seed and an epoch.

    In an epoch an identity gives as many groups of K images as it has, each image once; one with fewer than K images
    gives one group, and repeats some. The number of batches is the same in every epoch: groups that fill no batch,
    fewer than P, are left out, those of other identities in each epoch, and so are groups of an identity that would
    stand in a batch twice. Several processes share the batches of one process out among them, each of them whole.

    Args:
        labels: Identity of each image, by the image's number.
        identities: P.
        images: K.
        seed: Seed of the draw.
        process: Number of this process.
        processes: Number of processes.

    Raises:
        ValueError: There are fewer than P identities, or fewer batches than processes.
    """

    def __init__(
            self,
            labels: Sequence[int] | torch.Tensor,
            identities: int = 16,
            images: int = 8,
            seed: int = 0,
            process: int = 0,
            processes: int = 1,
    ):
        if identities < 2 or images < 1:
            raise ValueError(f'A batch needs 2 identities or more, and an image of each; got {identities} x {images}.')
        values = torch.as_tensor(labels, dtype=torch.int64)
        self.labels, counts = values.unique(return_inverse=True, return_counts=True)[1:]
        if len(counts) < identities:
            raise ValueError(f'A batch has {identities} identities, and the training split has {len(counts)}.')
        self.identities, self.images, self.seed, self.epoch = identities, images, seed, 0
        self.process, self.processes = process, processes
        self.groups = (counts // images).clamp(min=1)
        batches = int(self.groups.sum()) // identities
        while True:  # an identity stands in a batch once
            fewer = int(self.groups.clamp(max=batches).sum()) // identities
            if fewer == batches:
                break
            batches = fewer
        self.groups = self.groups.clamp(max=batches)
        self.counts, self.batches = counts, batches
        if batches < processes:
            raise ValueError(f'An epoch has {batches} batches of {identities} x {images}, fewer than processes.')

    def __len__(self) -> int:
        """Number of batches of this process."""
        return self.batches // self.processes

    def set_epoch(self, epoch: int) -> None:
        """Draw the batches of another epoch."""
        self.epoch = epoch

    def draw(self) -> torch.Tensor:
        """Return the batches of all processes, (batches, P * K), K images of an identity one after the other."""
        generator = torch.Generator().manual_seed((self.seed + 1_000_003 * (self.epoch + 1)) % 2**63)
        # images by identity, in random order within it
        shuffled = torch.randperm(len(self.labels), generator=generator)
        order = shuffled[self.labels[shuffled].sort(stable=True).indices]
        first = self.counts.cumsum(0) - self.counts
        # identities in random order, each with its groups one after the other
        ids = torch.randperm(len(self.counts), generator=generator)
        ids = torch.repeat_interleave(ids, self.groups[ids])
        start = torch.cat([torch.ones(1, dtype=torch.bool), ids[1:] != ids[:-1]]).nonzero()[:, 0]
        length = torch.diff(start, append=torch.tensor([len(ids)]))
        number = torch.arange(len(ids)) - torch.repeat_interleave(start, length)
        ids, number = ids[:self.batches * self.identities], number[:self.batches * self.identities]
        place = number[:, None] * self.images + torch.arange(self.images)
        again = (torch.rand(place.shape, generator=generator, dtype=torch.float64) * self.counts[ids][:, None]).long()
        place = torch.where(place < self.counts[ids][:, None], place, again)
        groups = order[first[ids][:, None] + place]
        # the n-th group goes to the batch n modulo their number: those of an identity go to different ones
        batches = groups.view(self.identities, self.batches, self.images).transpose(0, 1)
        return batches[torch.randperm(self.batches, generator=generator)].flatten(1)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.draw()[self.process::self.processes][:len(self)]
        for batch in batches:
            yield batch.tolist()
