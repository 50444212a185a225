"""Calibration of a critic: does its judgement Q foretell the reward R?

Shape letters: N images, L sites.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from dreal_timm.attention import Group
from dreal_timm.audit.result import Audit
from dreal_timm.critic import CELLS, Critic
from dreal_timm.hub.loading import read_checkpoint

__all__ = ['calibrate', 'load_critic', 'reliability']


def load_critic(checkpoint: str | Path, groups: Sequence[Group]) -> Critic | None:
    """Return the critic of a checkpoint of a run, None where it holds none.

    Args:
        checkpoint: File that timm's CheckpointSaver, or a run of this package, wrote of a `DrealTask`.
        groups: Groups of attention sites of its network.

    Raises:
        ValueError: The file is no checkpoint, or the critic is of another network, or of images of another size.
    """
    content = read_checkpoint(checkpoint)
    task = content.get('task_state') if isinstance(content, dict) else None
    state: dict[str, Any] = (task or {}).get('critic') or {}
    if not state:
        return None
    names = list(dict.fromkeys(key.split('.')[0] for key in state))
    rnn = {key: tensor for key, tensor in state.items() if key.startswith(f'{names[0]}.rnn.')}
    hidden = rnn[f'{names[0]}.rnn.weight_hh_l0'].shape[1]
    gates = rnn[f'{names[0]}.rnn.weight_hh_l0'].shape[0] // hidden
    try:
        critic = Critic(
            {group.name: group.judged_size for group in groups},
            cell=next(cell for cell in CELLS if {'lstm': 4, 'gru': 3}[cell] == gates),
            hidden_size=hidden,
            depth=sum('weight_hh' in key for key in rnn),
            standardized=f'{names[0]}.standardized' in state,
        )
        critic.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"The critic in '{checkpoint}' judges {', '.join(names)}, but the network's groups are "
            f"{', '.join(group.name for group in groups)}, or their maps have other sizes."
        ) from error
    return critic


def _spearman(x: torch.Tensor, y: torch.Tensor) -> float:
    if len(x) < 3 or x.min() == x.max() or y.min() == y.max():
        return float('nan')
    return float(spearmanr(x.numpy(), y.numpy()).statistic)


def calibrate(audit: Audit, name: str) -> dict[str, float]:
    """Return how a critic's judgement of a site goes with its reward.

    Args:
        audit: The audit, of a network with its critic.
        name: Name of the site.

    Returns:
        Dictionary containing:
            - 'quality': Mean judgement
            - 'rank_correlation': Spearman's, of Q and R over the images that the network gets right
            - 'rank_correlation_all': Spearman's over all images, where a wrong one has the reward -1
    """
    assert audit.quality is not None
    column = audit.column(name)
    quality, rewards = audit.quality[:, column], audit.rewards()[:, column]
    return {
        'quality': quality.double().mean().item(),
        'rank_correlation': _spearman(quality[audit.right], rewards[audit.right]),
        'rank_correlation_all': _spearman(quality, rewards),
    }


def reliability(audit: Audit, name: str, bins: int = 10) -> list[tuple[float, float, float, float]]:
    """Return, for each tenth of the images by Q, the mean of Q, the mean of R, and its 95% interval.

    A critic that is right on average lies on the diagonal. Intervals are normal ones, mean +- 1.96 standard errors.

    Args:
        audit: The audit, of a network with its critic.
        name: Name of the site.
        bins: Number of bins; with fewer than two images a bin there are fewer.

    Raises:
        ValueError: There is a single image.
    """
    assert audit.quality is not None
    if len(audit.number) < 2:
        raise ValueError('A reliability diagram needs two images or more.')
    column = audit.column(name)
    quality, rewards = audit.quality[:, column].double(), audit.rewards()[:, column].double()
    points = []
    for chosen in quality.argsort().chunk(max(1, min(bins, len(quality) // 2))):
        mean = rewards[chosen].mean().item()
        error = 1.96 * rewards[chosen].std().item() / len(chosen) ** 0.5
        points.append((quality[chosen].mean().item(), mean, mean - error, mean + error))
    return points
