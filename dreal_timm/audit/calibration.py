"""Calibration of a critic: does its judgement Q foretell the reward R?

Shape letters: N images, L sites.
"""
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from timm.models import clean_state_dict
from torch import nn

from dreal_timm.attention.sites import Group
from dreal_timm.audit.result import Audit
from dreal_timm.critic import CELLS, Critic
from dreal_timm.hub.loading import read_checkpoint
from dreal_timm.provenance import weights_digest

__all__ = ['calibrate', 'load_critic', 'reliability']

_logger = logging.getLogger(__name__)
_TASKS = {'state_dict_ema': 'task_state_ema', 'state_dict': 'task_state'}  # of the same weights


def _weights_of(content: Mapping[str, Any], model: nn.Module) -> str | None:
    """Return the key of a checkpoint's weights that a network has, as they are or in float16; None where it has none.

    An embedding network may have been exported without its classifier.
    """
    own = model.state_dict()
    digest = weights_digest(own)
    for key in _TASKS:
        state = clean_state_dict(content.get(key) or {})
        if own.keys() <= state.keys():
            named = {name: state[name] for name in own}
            halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in named.items()}
            if digest in (weights_digest(named), weights_digest(halved)):
                return key
    return None


def load_critic(checkpoint: str | Path, groups: Sequence[Group], model: nn.Module | None = None) -> Critic | None:
    """Return the critic of a checkpoint of a run, None where it holds none.

    A run with a moving average has two: one learned beside the weights, one is the average, of the averaged network.

    Args:
        checkpoint: File that timm's CheckpointSaver, or a run of this package, wrote of a `DrealTask`.
        groups: Groups of attention sites of its network.
        model: The network, whose weights tell which critic is its own; where they are neither of the checkpoint's
            there is none, which is said in a warning. None takes the one that is not averaged.

    Raises:
        ValueError: The file is no checkpoint, or the critic is of another network, or of images of another size.
    """
    content = read_checkpoint(checkpoint)
    tasks = {key: (content.get(key) or {}) if isinstance(content, dict) else {} for key in _TASKS.values()}
    if not any(task.get('critic') for task in tasks.values()):
        return None
    weights = 'state_dict' if model is None else _weights_of(content, model)
    state: dict[str, Any] = {} if weights is None else tasks[_TASKS[weights]].get('critic') or {}
    if not state:
        if model is not None:
            reason = 'the network has none of its weights' if weights is None else f'it has none of {weights}'
            _logger.warning(f"No critic is taken from '{checkpoint}': {reason}.")
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
