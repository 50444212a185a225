"""The reward (Eq. 1) and its variants, as pure functions of log-probabilities

Shape letters: B batch, K classes, P probed sites.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ['FORMS', 'WRONG', 'RewardRule', 'is_correct', 'reward', 'standardize', 'target_class']

FORMS = ('ratio', 'log')
WRONG = ('penalty', 'exclude', 'measure')
_SPREAD = 0.5  # standard deviation of standardized rewards: two of them fit into the critic's range


def target_class(target: torch.Tensor) -> torch.Tensor:
    """Return the ground truth class c of each sample, (B,).

    Args:
        target: Class indices (B,), or soft targets (B, K) from mixup, cutmix or smoothing, whose arg max is c.

    Raises:
        ValueError: The target has neither shape.
    """
    if target.ndim not in (1, 2):
        raise ValueError(f'Expected class indices (B,) or soft targets (B, K), got shape {tuple(target.shape)}.')
    return target if target.ndim == 1 else target.argmax(dim=1)


def is_correct(log_probs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return for each sample whether its class wins or ties (p_c >= p_i for all i, the first case of Eq. 1), (B,).

    Args:
        log_probs: Log-probabilities or logits of the judged pass, (B, K).
        target: Class indices, (B,).
    """
    return log_probs.gather(1, target[:, None]).squeeze(1) >= log_probs.amax(dim=1)


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


def reward(
        change: torch.Tensor,
        right: torch.Tensor,
        gamma: float = 1.0,
        clip: float | None = 1.0,
        form: str = 'ratio',
        wrong: str = 'penalty',
        standardized: bool = False,
        groups: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return the reward R of each sample and probed site, (B, P), float32.

    R = 1 - p_c(bypassed) / p_c for a sample whose class wins or ties, -gamma for any other (Eq. 1). The other options
    depart from the paper.

    Args:
        change: log p_c(bypassed) - log p_c, of class c with the map of a probed site replaced by its mean and as it is,
            (B, P). A NaN (not probed) stays NaN.
        right: Whether the class wins or ties, from `is_correct`, (B,).
        gamma: Penalty of a sample that is not classified as its class.
        clip: R is clamped to [-clip, clip], since the critic's output lies in (-1, 1); None is the literal equation.
        form: 'ratio' as above, or 'log': log p_c - log p_c(bypassed), the gain of log-likelihood (nats).
        wrong: 'penalty' gives a wrong sample -gamma; 'exclude' no reward (NaN); 'measure' that of a right one.
        standardized: Whether rewards of right samples (with 'measure', of all) are standardized within each group of
            the batch, see `standardize`, before they are clamped.
        groups: Index of the group of each column, for `standardized`; None makes each column its own.
    """
    gain = -change if form == 'log' else -torch.expm1(change)
    judged = torch.ones_like(right) if wrong == 'measure' else right
    if standardized:
        gain = standardize(gain, judged, range(gain.shape[1]) if groups is None else groups)
    if clip is not None:
        gain = gain.clamp(-clip, clip)
    fallback = torch.full_like(gain, -gamma if wrong == 'penalty' else math.nan).where(~change.isnan(), change)
    return gain.where(judged[:, None], fallback).float()


@dataclass(frozen=True)
class RewardRule:
    """The options of `reward`, checked.

    Raises:
        ValueError: gamma does not lie in (0, clip], or an option has an unknown value.
    """
    gamma: float = 1.0
    clip: float | None = 1.0
    form: str = 'ratio'
    wrong: str = 'penalty'
    standardized: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= (math.inf if self.clip is None else self.clip):
            raise ValueError(
                f'gamma must lie in (0, reward_clip], got gamma={self.gamma} and reward_clip={self.clip}.')
        for name, value, known in (('reward_form', self.form, FORMS), ('wrong_samples', self.wrong, WRONG)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got '{value}'.")

    def __call__(self, change: torch.Tensor, right: torch.Tensor, groups: Sequence[int]) -> torch.Tensor:
        """Return the rewards, (B, P); the arguments are those of `reward`."""
        return reward(
            change, right, self.gamma, self.clip, self.form, self.wrong, self.standardized, groups)

    def asked(self, right: torch.Tensor) -> torch.Tensor:
        """Return the samples whose reward depends on a counterfactual, (B,) bool."""
        return torch.ones_like(right) if self.wrong == 'measure' else right
