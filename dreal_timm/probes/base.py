"""What every probe does: run the judged pass of a step, and measure the rewards of its maps

Shape letters: B batch, K classes, P probed sites.
"""
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dreal_timm.attention.sites import Group, Site
from dreal_timm.config import DrealConfig
from dreal_timm.reward import RewardRule, is_correct, target_class
from dreal_timm.trainable import DrealTrainableModule, Judgement

__all__ = ['Probe', 'ProbeSetup', 'Rewards']


@dataclass(frozen=True)
class Rewards:
    """Rewards of a batch.

    Attributes:
        sites: The P probed sites.
        values: (B, P) float32, NaN where not measured.
        right: Whether a sample's class wins or ties, (B,) bool.
    """
    sites: Sequence[Site]
    values: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True)
class ProbeSetup:
    """What a probe is built from.

    Attributes:
        config: Options of the task.
        model: The network.
        sites: Its attention sites, in the order in which they run.
        criterion: The class loss.
        rule: How a reward is made of a change of log-probability.
        input_size: (C, H, W) of an image.
    """
    config: DrealConfig
    model: nn.Module
    sites: Sequence[Site]
    criterion: nn.Module | Callable
    rule: RewardRule
    input_size: Sequence[int]

    @property
    def ignored(self) -> int | None:
        """Label of samples that the loss ignores."""
        return getattr(self.criterion, 'ignore_index', None)


class Probe(ABC):
    """Run the judged pass of a step, and measure the rewards of its maps, or of those of the step before.

    Args:
        groups: Groups of attention sites.
        rule: How a reward is made of a change of log-probability.
        ignored: Label of samples that have no class; negative labels, and those beyond the classes, have none either.

    Attributes:
        compiled: Whether the module that is called is compiled, which hides it from hooks.
    """

    def __init__(self, groups: Sequence[Group], rule: RewardRule, ignored: int | None = None):
        self.groups = list(groups)
        self.rule = rule
        self.ignored = ignored
        self.compiled = False

    @classmethod
    @abstractmethod
    def build(cls, setup: ProbeSetup) -> 'Probe':
        """Make the probe of a task.

        Raises:
            ValueError: The probe does not go with this loss.
        """

    @abstractmethod
    def __call__(
            self,
            call: nn.Module,
            trainable: DrealTrainableModule,
            input: torch.Tensor,
            target: torch.Tensor,
    ) -> tuple[Judgement, Rewards]:
        """Return the judgement of the batch, and the rewards that its critic learns from.

        Args:
            call: The trainable module as it is called, with its wrappers (DDP, torch.compile).
            trainable: The same without them.
            input: Images, (B, C, H, W).
            target: Class indices (B,), or soft targets (B, K).
        """

    def watch(self, loss: torch.Tensor) -> None:  # noqa: B027 (most need nothing)
        """See the loss that `backward()` will be called on."""

    def reset(self) -> None:  # noqa: B027 (most save nothing)
        """Discard the previous batch."""

    def classes(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the class of each sample (B,), 0 where it has none, and whether it has one (B,)."""
        target = target_class(target)
        known = (target >= 0) & (target < output.shape[1])
        if self.ignored is not None:
            known &= target != self.ignored
        return target.where(known, torch.zeros_like(target)), known

    def unmeasured(self, output: torch.Tensor, target: torch.Tensor, sites: Sequence[Site]) -> Rewards:
        """Return no rewards for a batch."""
        right = is_correct(output, self.classes(output, target)[0])
        return Rewards(sites, torch.full((len(output), len(sites)), math.nan, device=output.device), right)
