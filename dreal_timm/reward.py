"""The reward (Eq. 1), as pure functions of log-probabilities

Shape letters: B batch, K classes, P probed sites.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ['RewardRule', 'is_correct', 'reward', 'target_class']


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


def reward(
        change: torch.Tensor,
        right: torch.Tensor,
        gamma: float = 1.0,
        clip: float | None = 1.0,
) -> torch.Tensor:
    """Return the reward R of each sample and probed site, (B, P), float32.

    R = 1 - p_c(bypassed) / p_c for a sample whose class wins or ties, -gamma for any other (Eq. 1).

    Args:
        change: log p_c(bypassed) - log p_c, of class c with the map of a probed site replaced by its mean and as it is,
            (B, P). A NaN (not probed) stays NaN.
        right: Whether the class wins or ties, from `is_correct`, (B,).
        gamma: Penalty of a sample that is not classified as its class.
        clip: R is clamped to [-clip, clip], since the critic's output lies in (-1, 1); None is the literal equation.
    """
    gain = -torch.expm1(change)
    if clip is not None:
        gain = gain.clamp(-clip, clip)
    penalty = torch.full_like(gain, -gamma).where(~change.isnan(), change)
    return gain.where(right[:, None], penalty).float()


@dataclass(frozen=True)
class RewardRule:
    """Eq. 1 with its options."""
    gamma: float = 1.0
    clip: float | None = 1.0

    def __call__(self, change: torch.Tensor, right: torch.Tensor, groups: Sequence[int]) -> torch.Tensor:
        """Return the rewards, (B, P).

        Args:
            change: See `reward`.
            right: See `reward`.
            groups: Index of the group of each column.
        """
        return reward(change, right, self.gamma, self.clip)

    def measured(self, right: torch.Tensor) -> torch.Tensor:
        """Return the samples whose reward depends on a counterfactual, (B,) bool."""
        return right
