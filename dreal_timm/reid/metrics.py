"""Retrieval metrics of person re-identification: CMC, mAP and mINP, in blocks of queries

The rules are those of Market-1501 (`Scalable Person Re-identification: A Benchmark`, ICCV 2015): what the gallery has
of a query's identity from the query's own camera is left out for this query, junk (identity -1) is never there, and
distractors (identity 0) are wrong answers. Average precision is the mean of the precision at each right answer, as in
scikit-learn and most Python evaluators; the benchmark's first script integrates by trapezoids, which gives other
numbers in the second decimal. Images at equal distance stand in the order of the gallery, as a stable sort leaves
them. mINP is that of `Deep Learning for Person Re-identification: A Survey and Outlook` (TPAMI 2021).

Shapes: Q queries, G images of the gallery, B queries of a block, M the most images of a query's identity, C features.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

__all__ = [
    'CAMERA_RULES', 'METRICS', 'Retrieval', 'distance_blocks', 'pool_queries', 'rank_matches', 'retrieve', 'score',
]

METRICS = ('cosine', 'euclidean')
CAMERA_RULES = ('exclude', 'ignore')
_BLOCK = 8_000_000  # distances of a block
_MANY = 1_000  # images of one identity, from which on a sort takes no longer than counting between them


@dataclass(frozen=True)
class Retrieval:
    """How each query fared.

    Attributes:
        first: Rank of the first right answer, from 1; 0 for a query without any. (Q,) int64
        average_precision: NaN for a query without a right answer. (Q,) float64
        inverse_penalty: Number of right answers by the rank of the last of them; NaN without any. (Q,) float64
    """
    first: torch.Tensor
    average_precision: torch.Tensor
    inverse_penalty: torch.Tensor

    def summary(self, ranks: Sequence[int] = (1, 5, 10, 20)) -> dict[str, float]:
        """Return 'rank1', ..., 'mAP', 'mINP' (percent, over queries that have an answer), 'queries' and 'skipped'.

        Without any such query the percentages are NaN.
        """
        valid = self.first > 0
        count = int(valid.sum())
        metrics: dict[str, float] = {
            f'rank{rank}': 100 * (valid & (self.first <= rank)).sum().item() / count if count else float('nan')
            for rank in ranks}
        for name, values in (('mAP', self.average_precision), ('mINP', self.inverse_penalty)):
            metrics[name] = 100 * values[valid].mean().item()
        return {**metrics, 'queries': count, 'skipped': len(valid) - count}


def rank_matches(
        distances: torch.Tensor,
        index: torch.Tensor,
        match: torch.Tensor,
        ignored: torch.Tensor,
) -> torch.Tensor:
    """Return the ranks of the right answers, ascending, from 1; 0 where a query has fewer.

    Nothing is sorted but the right answers: distances are counted into the intervals between them. Where there are
    ties, or so many answers that it would take longer, a query's distances are sorted.

    Args:
        distances: Of each query to each image, (B, G); changed in place.
        index: Images of the query's identity, ascending, (B, M).
        match: Which of them are right answers, (B, M).
        ignored: Which of them do not count for this query, (B, M).
    """
    rows = torch.arange(len(distances), device=distances.device)[:, None].expand_as(index)
    distances[rows[ignored], index[ignored]] = torch.inf
    if index.shape[1] <= _MANY:
        ranks, tied = _counted(distances, index, match)
    else:
        ranks, tied = torch.zeros_like(index), match.any(1)
    for row in tied.nonzero()[:, 0].tolist():
        places = index.new_empty(distances.shape[1])
        order = distances[row].sort(stable=True).indices
        places[order] = torch.arange(1, len(order) + 1, device=order.device)
        own = places[index[row][match[row]]].sort().values
        ranks[row, :len(own)] = own
    return ranks


def _counted(
        distances: torch.Tensor,
        index: torch.Tensor,
        match: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks of the right answers, (B, M), and whether a query has ties, (B,), so that they are not known yet."""
    ends = distances.gather(1, index).masked_fill_(~match, torch.inf).sort(dim=1, stable=True).values
    # intervals: below an end, at it, up to the next one
    edges = torch.stack([ends, torch.nextafter(ends, torch.full_like(ends, torch.inf))], dim=2).flatten(1)
    width = edges.shape[1] + 1
    where = torch.searchsorted(edges, distances, right=True, out_int32=True)
    where += torch.arange(len(distances), device=where.device, dtype=where.dtype)[:, None] * width
    counts = torch.bincount(where.flatten(), minlength=len(distances) * width).view(len(distances), width)
    below = counts.cumsum(1)[:, :-1:2]
    present = torch.arange(index.shape[1], device=index.device) < match.sum(1, keepdim=True)
    tied = ((counts[:, 1::2] != 1) & present).any(1)
    tied[(ends[:, 1:] == ends[:, :-1]).logical_and_(present[:, 1:]).any(1)] = True
    return (below + 1).masked_fill_(~present, 0), tied


def score(
        blocks: Iterator[torch.Tensor],
        query_pids: torch.Tensor,
        gallery_pids: torch.Tensor,
        query_camids: torch.Tensor,
        gallery_camids: torch.Tensor,
        camera_rule: str = 'exclude',
) -> Retrieval:
    """Rank the gallery for each query.

    Args:
        blocks: Distances of the queries in their order to the whole gallery, a block of queries after the other, each
            (B, G). They are changed in place.
        query_pids: Identities of the queries, (Q,) int64, without junk (-1); a query of identity 0 has no answer.
        gallery_pids: Identities of the gallery, (G,) int64, without junk.
        query_camids: Cameras of the queries, (Q,) int64.
        gallery_camids: Cameras of the gallery, (G,) int64.
        camera_rule: 'exclude' leaves out what the gallery has of a query's identity from the query's camera; 'ignore'
            does not look at cameras.

    Raises:
        ValueError: Unknown rule; junk; distances that are not finite, or not one for each query and image.
    """
    if camera_rule not in CAMERA_RULES:
        raise ValueError(f"camera_rule must be one of {', '.join(CAMERA_RULES)}, got '{camera_rule}'.")
    if (query_pids < 0).any() or (gallery_pids < 0).any():
        raise ValueError('Images of identity -1 are junk, which is dropped before the ranking.')
    if not len(gallery_pids):
        raise ValueError('The gallery is empty.')
    ordered, order = gallery_pids.sort(stable=True)
    wanted = query_pids.contiguous()
    low = torch.searchsorted(ordered, wanted)
    count = torch.searchsorted(ordered, wanted, right=True) - low
    few = torch.arange(min(int(count.max()), _MANY) if len(count) else 0, device=order.device)
    parts, places, start = [_summed_up(few.new_zeros(0, len(few)))], [few[:0]], 0
    for block in blocks:
        rows = torch.arange(start, start + len(block), device=order.device)
        if start + len(block) > len(query_pids) or block.shape[1] != len(gallery_pids):
            raise ValueError(f'Distances are not those of {len(query_pids)} queries to {len(gallery_pids)} images.')
        if not block.isfinite().all():
            raise ValueError('A distance is not finite: the network gives features that are not numbers.')
        many = count[rows] > _MANY  # each for itself, so that memory does not go with them
        for some in (rows[~many], *rows[many].split(1)):
            most = int(count[some].max()) if len(some) else 0
            steps = few if most <= _MANY else torch.arange(most, device=order.device)
            meant = (steps < count[some][:, None]) & (wanted[some][:, None] != 0)  # a distractor answers nothing
            index = order[(low[some][:, None] + steps).clamp(max=len(order) - 1)]
            ignored = meant & (gallery_camids[index] == query_camids[some][:, None])
            if camera_rule == 'ignore':
                ignored = torch.zeros_like(meant)
            distances = block if len(some) == len(block) else block[some - start]
            parts.append(_summed_up(rank_matches(distances, index, meant & ~ignored, ignored)))
            places.append(some)
        start += len(block)
    if start != len(query_pids):
        raise ValueError(f'Distances are those of {start} queries, and there are {len(query_pids)}.')
    sorting = torch.cat(places).argsort()
    return Retrieval(*(torch.cat(values)[sorting] for values in zip(*(
        (part.first, part.average_precision, part.inverse_penalty) for part in parts), strict=True)))


def _summed_up(ranks: torch.Tensor) -> Retrieval:
    """Metrics of ascending ranks of right answers, (B, M), 0 where there are no more."""
    present = ranks > 0
    count = present.sum(1)
    nth = torch.arange(1, ranks.shape[1] + 1, device=ranks.device, dtype=torch.float64)
    precision = torch.where(present, nth / ranks.clamp(min=1), 0.0)
    nothing = torch.full((len(ranks),), float('nan'), dtype=torch.float64, device=ranks.device)
    if not ranks.shape[1]:
        return Retrieval(count, nothing, nothing.clone())
    last = ranks.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0].clamp(min=1)
    return Retrieval(
        first=ranks[:, 0].clone(),  # a view would keep all ranks
        average_precision=torch.where(count > 0, precision.sum(1) / count.clamp(min=1), nothing),
        inverse_penalty=torch.where(count > 0, count.double() / last, nothing),
    )


def distance_blocks(
        query: torch.Tensor,
        gallery: torch.Tensor,
        metric: str = 'cosine',
        block: int | None = None,
) -> Iterator[torch.Tensor]:
    """Yield distances of the queries to the gallery, (B, G), a block of queries after the other.

    Args:
        query: Features of the queries, (Q, C).
        gallery: Features of the gallery, (G, C).
        metric: 'cosine' (1 - the cosine) or 'euclidean' (squared, which ranks alike).
        block: Queries of a block; None takes as many as make about 32 MB of distances.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got '{metric}'.")
    size = block or max(1, _BLOCK // max(1, len(gallery)))
    if metric == 'cosine':
        gallery = F.normalize(gallery, dim=1)
        for part in query.split(size):
            yield torch.mm(F.normalize(part, dim=1).neg_(), gallery.T).add_(1)
        return
    center = gallery.mean(0)  # distances are small beside norms, which a float32 could not tell apart
    gallery = gallery - center
    norms = gallery.square().sum(1)
    for part in query.split(size):
        part = part - center
        yield torch.addmm(norms, part, gallery.T, alpha=-2).add_(part.square().sum(1, keepdim=True))


def retrieve(
        query: torch.Tensor,
        gallery: torch.Tensor,
        query_pids: torch.Tensor,
        gallery_pids: torch.Tensor,
        query_camids: torch.Tensor,
        gallery_camids: torch.Tensor,
        metric: str = 'cosine',
        camera_rule: str = 'exclude',
) -> Retrieval:
    """Rank the gallery for each query by the distance of features.

    Args:
        query: Features of the queries, (Q, C).
        gallery: Features of the gallery, (G, C), on the same device.
        query_pids: Identities of the queries, (Q,) int64.
        gallery_pids: Identities of the gallery, (G,) int64.
        query_camids: Cameras of the queries, (Q,) int64.
        gallery_camids: Cameras of the gallery, (G,) int64.
        metric: 'cosine' or 'euclidean'.
        camera_rule: See `score`.

    Raises:
        ValueError: Unknown metric or rule; junk among the images; features that are not finite.
    """
    blocks = distance_blocks(query, gallery, metric)
    return score(blocks, query_pids, gallery_pids, query_camids, gallery_camids, camera_rule)


def pool_queries(
        features: torch.Tensor,
        pids: torch.Tensor,
        camids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return one query for each identity and camera (multi query): the mean of their features, and both numbers.

    Args:
        features: Features, (Q, C).
        pids: Identities, (Q,).
        camids: Cameras, (Q,).
    """
    groups, place = torch.stack([pids, camids], dim=1).unique(dim=0, return_inverse=True)
    total = features.new_zeros(len(groups), features.shape[1]).index_add_(0, place, features)
    count = torch.bincount(place, minlength=len(groups))
    return total / count[:, None], groups[:, 0], groups[:, 1]
