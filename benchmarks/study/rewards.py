"""What a reward is made of, and what the critic reads, beside the paper's

Shape letters: B batch, P probed sites, L sites of a group, N positions of a map.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dreal_timm.critic import Critic, RecurrentCritic
from dreal_timm.reward import RewardRule

_SPREAD = 0.5  # standard deviation of standardized rewards: two of them fit into the critic's range
_EPS = 1e-8


def standardize(rewards: torch.Tensor, chosen: torch.Tensor, groups: Sequence[int]) -> torch.Tensor:
    """Return rewards with mean 0 and standard deviation 1/2 over the chosen samples of each group, (B, P).

    Rewards that are all alike become 0. What is NaN, or of a sample that is not chosen, is left as it is.

    Args:
        rewards: Rewards, NaN where not probed, (B, P).
        chosen: Samples to standardize over, (B,) bool.
        groups: Index of the group of each column.
    """
    meant = chosen[:, None] & ~rewards.isnan()
    result = rewards.clone()
    for group in set(groups):
        columns = [i for i, g in enumerate(groups) if g == group]
        mask = meant[:, columns]
        values = rewards[:, columns].where(mask, torch.zeros_like(rewards[:, columns]))
        count = mask.sum().clamp(min=1)
        mean = values.sum() / count
        centred = (values - mean) * mask
        spread = (centred.square().sum() / count).sqrt()
        scaled = centred * (_SPREAD / spread.clamp(min=1e-12))
        result[:, columns] = scaled.where(mask, rewards[:, columns])
    return result


@dataclass(frozen=True)
class StudyRule(RewardRule):
    """Rewards that depart from the paper's.

    Attributes:
        form: 'ratio' is Eq. 1; 'log': log p_c - log p_c(bypassed), the gain of log-likelihood (nats).
        wrong: 'penalty' gives a wrong sample -gamma; 'exclude' no reward (NaN); 'measure' that of a right one.
        standardized: Whether rewards of right samples (with 'measure', of all) are standardized within each group of
            the batch, see `standardize`, before they are clamped.
    """
    form: str = 'ratio'
    wrong: str = 'penalty'
    standardized: bool = False

    def __call__(self, change: torch.Tensor, right: torch.Tensor, groups: Sequence[int]) -> torch.Tensor:
        gain = -change if self.form == 'log' else -torch.expm1(change)
        judged = self.measured(right)
        if self.standardized:
            gain = standardize(gain, judged, groups)
        if self.clip is not None:
            gain = gain.clamp(-self.clip, self.clip)
        value = -self.gamma if self.wrong == 'penalty' else math.nan
        fallback = torch.full_like(gain, value).where(~change.isnan(), change)
        return gain.where(judged[:, None], fallback).float()

    def measured(self, right: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(right) if self.wrong == 'measure' else right


class StandardizedRecurrentCritic(RecurrentCritic):
    """A critic that reads each number standardized over the batch, for each site by itself.

    It sees how a sample differs from others, and its judgement of a batch has no gradient that moves a gate for all of
    its samples alike. A batch of one is all zeros.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # a buffer, so that its weights are loaded into no critic that reads otherwise
        self.register_buffer('standardized', torch.ones((), dtype=torch.bool))

    def inputs(self, state: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        x = super().inputs(state, attention)
        return (x - x.mean(0)) / (x.var(0, correction=0) + _EPS).sqrt()


class StandardizedCritic(Critic):
    """The critics of all groups, each reading standardized inputs."""
    critic_class: Any = StandardizedRecurrentCritic
