"""The losses of actor and critic (Eq. 8 and 9), per sample before they are reduced

Shape letters: B batch, L sites of all groups, P probed sites.
"""
from collections.abc import Sequence

import torch

__all__ = ['actor_loss', 'critic_loss', 'reduce_critic_loss']


def actor_loss(quality: torch.Tensor) -> torch.Tensor:
    """Return L_q of each sample, (B,): minus the summed quality of its maps (Eq. 8).

    Args:
        quality: Quality of the maps of all sites, (B, L).
    """
    return -quality.sum(dim=1)


def critic_loss(quality: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """Return the squared error of the critic for each sample and probed site, (B, P) (Eq. 9).

    Args:
        quality: Quality of the maps of the probed sites, (B, P).
        reward: Reward of the probed sites, (B, P), NaN where a sample was not probed; the error there is NaN, with no
            gradient.
    """
    probed = ~reward.isnan()
    error = (quality - reward.where(probed, quality.detach())).square()
    return error.where(probed, torch.full_like(error, float('nan')))


def reduce_critic_loss(error: torch.Tensor, groups: Sequence[int]) -> torch.Tensor:
    """Return L_r: the sum over groups of the mean error over the group's probed sites and the samples probed there.

    A group without a probed sample adds nothing.

    Args:
        error: Squared error of each sample and probed site, (B, P), NaN where a sample was not probed.
        groups: Index of the group of each column.
    """
    probed = ~error.isnan()
    total = error.nan_to_num().sum(dim=0)
    count = probed.sum(dim=0)
    loss = error.new_zeros(())
    for group in sorted(set(groups)):
        columns = [i for i, g in enumerate(groups) if g == group]
        probed_there = torch.stack([count[i] for i in columns]).sum()
        loss = loss + torch.stack([total[i] for i in columns]).sum() / probed_there.clamp(min=1)
    return loss
