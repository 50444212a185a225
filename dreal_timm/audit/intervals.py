"""Bootstrap intervals of means (B. Efron, Bootstrap methods: another look at the jackknife, 1979)

Shape letters: N samples, L columns.
"""
import torch

__all__ = ['bootstrap']

_AT_ONCE = 2**24  # numbers of a block of resamples


def bootstrap(
        values: torch.Tensor,
        weights: torch.Tensor | None = None,
        resamples: int = 1000,
        level: float = 0.95,
        seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the mean of each column and its percentile interval over resamples of the samples, three times (L,).

    All columns are resampled together. The mean is that of the samples with weight 1; which and how many these are
    differs from one resample to the next.

    Args:
        values: Values, (N, L); those of weight 0 may be anything.
        weights: 1 for samples that count, else 0, (N,). None counts them all.
        resamples: Number of resamples.
        level: Share of the resamples whose means lie in the interval.
        seed: Seed of the resamples.
    """
    count = len(values)
    weights = torch.ones(count, dtype=torch.float64) if weights is None else weights.double()
    weighted = values.double().where(weights[:, None] > 0, torch.zeros((), dtype=torch.float64))
    stacked = torch.cat([weighted, weights[:, None]], dim=1)
    generator = torch.Generator().manual_seed(seed)
    means = []
    block = max(1, _AT_ONCE // max(count, 1))
    for begin in range(0, resamples, block):
        rows = min(block, resamples - begin)
        drawn = torch.randint(count, (rows, count), generator=generator)
        drawn += torch.arange(rows)[:, None] * count
        times = torch.bincount(drawn.flatten(), minlength=rows * count).view(rows, count).double()
        sums = times @ stacked
        means.append(sums[:, :-1] / sums[:, -1:])
    sums = stacked.sum(0)
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(means).nanquantile(tail, dim=0)
    return sums[:-1] / sums[-1], low, high
