"""Re-ranking of retrieved images by the neighbours that they have in common

Paper: `Re-ranking Person Re-identification with k-reciprocal Encoding` (CVPR 2017) - https://arxiv.org/abs/1701.08398

Nothing of the size of all images squared is ever held: neighbours come from blocks of distances, and the encoding of an
image, a vector with an entry for each image, is held by its few entries that are not zero.

Shapes: Q queries, G images of the gallery, N = Q + G images, C features, K neighbours, E entries.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dreal_timm.reid.metrics import distance_blocks

__all__ = ['Reranking', 'rerank']

_PAIRS = 8_000_000  # numbers of a block of what is compared or gathered


def _ragged(starts: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of so many entries from each start on, and which start each belongs to."""
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    first = lengths.cumsum(0) - lengths
    return starts[owner] + torch.arange(len(owner), device=owner.device) - first[owner], owner


def _neighbours(features: torch.Tensor, count: int, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest images of each, itself among them, (N, K), and its largest distance, (N,)."""
    nearest, largest = [], []
    for block in distance_blocks(features, features, metric):
        nearest.append(block.topk(count, dim=1, largest=False).indices)
        largest.append(block.max(1).values)
    return torch.cat(nearest), torch.cat(largest)


def _mutual(near: torch.Tensor) -> torch.Tensor:
    """Which of the neighbours have the image among their own, (N, K)."""
    blocks = []
    size = max(1, _PAIRS // near.shape[1] ** 2)
    for start in range(0, len(near), size):
        rows = torch.arange(start, min(start + size, len(near)), device=near.device)
        blocks.append((near[near[rows]] == rows[:, None, None]).any(2))
    return torch.cat(blocks)


def _expanded(near: torch.Tensor, half: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of each one's set: its mutual neighbours, and those of a neighbour that shares most of them with it.

    Returns:
        Numbers of the image and of the one in its set, (E,) each, sorted.
    """
    mutual, mutual_half, total = _mutual(near), _mutual(half), len(near)
    keys = []
    size = max(1, _PAIRS // (near.shape[1] ** 2 * half.shape[1]))
    for rows in torch.arange(total, device=near.device).split(size):
        own = near[rows].masked_fill(~mutual[rows], -1)  # rows x K
        theirs = half[near[rows]].masked_fill(~mutual_half[near[rows]], -2)  # rows x K x K / 2
        common = (theirs[..., None] == own[:, None, None]).any(3).sum(2)
        taken = mutual[rows] & (3 * common > 2 * mutual_half[near[rows]].sum(2))
        theirs = theirs.masked_fill(~taken[..., None], -1).flatten(1)
        both = torch.cat([own, theirs], dim=1)
        keys.append((rows[:, None] * total + both)[both >= 0].unique())
    joint = torch.cat(keys)
    return joint // total, joint % total


def _pair_distances(features: torch.Tensor, first: torch.Tensor, second: torch.Tensor, metric: str) -> torch.Tensor:
    if metric == 'cosine':
        features = torch.nn.functional.normalize(features, dim=1)
    blocks = []
    size = max(1, _PAIRS // features.shape[1])
    for a, b in zip(first.split(size), second.split(size), strict=True):
        pair = features[a], features[b]
        blocks.append(1 - (pair[0] * pair[1]).sum(1) if metric == 'cosine' else (pair[0] - pair[1]).square().sum(1))
    return torch.cat(blocks)


def _averaged(
        owner: torch.Tensor,
        member: torch.Tensor,
        weight: torch.Tensor,
        near: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encodings averaged over the neighbours, (N, K), of each image: images, entries and values, (E,) each, sorted."""
    total, count = near.shape
    length = torch.bincount(owner, minlength=total)
    start = length.cumsum(0) - length
    keys, sums = [], []
    for rows in torch.arange(total, device=near.device).split(max(1, _PAIRS // (50 * count))):
        chosen = near[rows].flatten()
        place, which = _ragged(start[chosen], length[chosen])
        key, inverse = (rows[which // count] * total + member[place]).unique(return_inverse=True)
        keys.append(key)
        sums.append(weight.new_zeros(len(key)).index_add_(0, inverse, weight[place]) / count)
    joint = torch.cat(keys)
    return joint // total, joint % total, torch.cat(sums)


def _overlaps(
        owner: torch.Tensor,
        member: torch.Tensor,
        weight: torch.Tensor,
        queries: int,
        total: int,
) -> Iterator[torch.Tensor]:
    """Sums of the lesser entries of each query's encoding and of each gallery image's, (B, G), in blocks."""
    gallery = total - queries
    of_gallery = owner >= queries
    by_member = member[of_gallery].sort(stable=True)
    images, values = (owner[of_gallery] - queries)[by_member.indices], weight[of_gallery][by_member.indices]
    length = torch.bincount(by_member.values, minlength=total)
    start = length.cumsum(0) - length
    entries = torch.bincount(owner, minlength=total).cumsum(0)[:queries].tolist()
    size = max(1, _PAIRS // gallery)
    for first in range(0, queries, size):
        last = min(first + size, queries)
        part = slice(entries[first - 1] if first else 0, entries[last - 1])
        sums = weight.new_zeros((last - first) * gallery)
        for some in torch.arange(part.start, part.stop, device=owner.device).split(max(1, _PAIRS // 200)):
            place, which = _ragged(start[member[some]], length[member[some]])
            lesser = torch.minimum(weight[some][which], values[place])
            sums.index_add_(0, (owner[some][which] - first) * gallery + images[place], lesser)
        yield sums.view(last - first, gallery)


@dataclass(frozen=True)
class Reranking:
    """Numbers of a re-ranking, the arguments of `rerank`."""
    k1: int = 20
    k2: int = 6
    weight: float = 0.3

    def settings(self) -> dict[str, float]:
        """Return them by the names that results have."""
        return {'k1': self.k1, 'k2': self.k2, 'lambda': self.weight}

    def check(self, total: int) -> None:
        """Raise a ValueError if so many images, queries and gallery, cannot be re-ranked by these numbers."""
        k1, k2 = self.k1, self.k2
        if k1 < 1 or not 1 <= k2 <= k1 + 1:
            raise ValueError(f'k1 and k2: expected k1 of 1 or more and k2 from 1 to k1 + 1, got {k1} and {k2}.')
        if not 0 <= self.weight <= 1:
            raise ValueError(f'lambda: expected a weight from 0 to 1, got {self.weight}.')
        if k1 >= total:
            raise ValueError(
                f'k1: {k1} neighbours of each of {total} images, queries and gallery, are asked for, who have '
                f'{total - 1}: choose a lower k1.')


def rerank(
        query: torch.Tensor,
        gallery: torch.Tensor,
        k1: int = 20,
        k2: int = 6,
        weight: float = 0.3,
        metric: str = 'cosine',
) -> Iterator[torch.Tensor]:
    """Yield re-ranked distances of the queries to the gallery, (B, G), a block of queries after the other.

    Args:
        query: Features of the queries, (Q, C).
        gallery: Features of the gallery, (G, C), on the same device.
        k1: Neighbours that are compared.
        k2: Neighbours that an encoding is averaged over.
        weight: Weight of the first distance, the paper's lambda; the rest is that of the Jaccard distance.
        metric: 'cosine' or 'euclidean' (squared, as in the paper's code).

    Raises:
        ValueError: A number is out of range, or features are not finite.
    """
    total = len(query) + len(gallery)
    Reranking(k1, k2, weight).check(total)
    features = torch.cat([query, gallery])
    if not features.isfinite().all():
        raise ValueError('A feature is not finite: the network gives features that are not numbers.')
    near, largest = _neighbours(features, k1 + 1, metric)
    owner, member = _expanded(near, near[:, :round(k1 / 2) + 1])
    value = (-_pair_distances(features, owner, member, metric) / largest.clamp(min=1e-12)[owner]).exp_()
    value /= value.new_zeros(total).index_add_(0, owner, value)[owner]
    if k2 > 1:
        owner, member, value = _averaged(owner, member, value, near[:, :k2])
    size = max(1, _PAIRS // len(gallery))
    first = distance_blocks(query, gallery, metric, size)
    start = 0
    for common, block in zip(_overlaps(owner, member, value, len(query), total), first, strict=True):
        scale = largest[start:start + len(block), None].clamp(min=1e-12)
        start += len(block)
        yield (1 - common / (2 - common)) * (1 - weight) + block / scale * weight
