"""Statistics of attention maps over a data set: mean, spread, and how much of them depends on the input"""
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

__all__ = ['MapStatistics', 'MapSums']


@dataclass(frozen=True)
class MapStatistics:
    """What the maps of a site are over a data set.

    Attributes:
        mean: Mean over samples, in the shape that the gate gives a map, with a first dimension of 1; float64.
        variance: Variance over samples, of the same shape.
        spread: Standard deviation of a sample's map over its positions, averaged over the samples.
        input_share: Share of the variance, over samples and positions, that is variance over samples; 0 is a map that
            is the same for all of them. NaN where nothing varies.
    """
    mean: torch.Tensor
    variance: torch.Tensor
    spread: float
    input_share: float


@dataclass
class MapSums:
    """Sums over samples, in float64, from which the statistics come; sums of parts of a data set can be added.

    Attributes:
        count: Number of samples.
        total: Sum of the maps of each site, by its name.
        squares: Sum of their squares.
        spreads: Sum of the standard deviations over the positions of a map.
    """
    count: int = 0
    total: dict[str, torch.Tensor] = field(default_factory=dict)
    squares: dict[str, torch.Tensor] = field(default_factory=dict)
    spreads: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, maps: Mapping[str, torch.Tensor]) -> None:
        """Add the maps of a batch, by the names of their sites, with the samples first."""
        batch = 0
        for name, attention in maps.items():
            attention = (attention.cpu() if attention.device.type == 'mps' else attention).double()
            self._add(
                name,
                attention.sum(0, keepdim=True).cpu(),
                attention.square().sum(0, keepdim=True).cpu(),
                attention.flatten(1).std(1, unbiased=False).sum().cpu(),
            )
            batch = len(attention)
        self.count += batch

    def merge(self, other: 'MapSums') -> None:
        """Add the sums over other samples."""
        for name in other.total:
            self._add(name, other.total[name], other.squares[name], other.spreads[name])
        self.count += other.count

    def _add(self, name: str, total: torch.Tensor, squares: torch.Tensor, spreads: torch.Tensor) -> None:
        for sums, value in ((self.total, total), (self.squares, squares), (self.spreads, spreads)):
            sums[name] = sums[name] + value if name in sums else value

    def means(self) -> dict[str, torch.Tensor]:
        """Return the mean map of each site, by its name."""
        return {name: total / self.count for name, total in self.total.items()}

    def statistics(self, name: str) -> MapStatistics:
        """Return the statistics of a site."""
        mean, square = self.total[name] / self.count, self.squares[name] / self.count
        variance = (square - mean.square()).clamp(min=0)
        whole = square.mean() - mean.mean().square()
        share = variance.mean() / whole if whole > 1e-12 * square.mean() else torch.tensor(float('nan'))
        return MapStatistics(mean, variance, (self.spreads[name] / self.count).item(), share.item())
