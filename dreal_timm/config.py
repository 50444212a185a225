"""The options of DREAL: every one once, with its default, the values that it accepts and what it means"""
import math
from dataclasses import dataclass

import torch

from dreal_timm.options import check_options, option

__all__ = ['DrealConfig']


@dataclass(frozen=True, kw_only=True)
class DrealConfig:
    """Options of `DrealTask`, and of a recipe's block `dreal:`.

    Attributes:
        gamma: Penalty of a wrongly classified sample (Eq. 1), in (0, reward_clip].
        actor_weight: Weight of L_q (Eq. 8). The paper's 1 drives most gates to 0 or 1, see docs/training.md. With 0
            the model learns exactly as it does without a critic.
        probe: How the rewards of Eq. 1 are measured. 'exact': a counterfactual pass for each group, with the map of
            the drawn site replaced by its mean. 'split': one pass, each sample with one of these maps. 'taylor':
            first-order estimate from the backward pass's own gradients, of every site, one step late.
        probe_every: Rewards are measured every N steps. Between measurements L_q still trains the attention; the
            critic is not updated.
        taylor_target: 'loss' lets 'taylor' measure by each sample's own class loss l, R = 1 - exp(-(l' - l)), which
            losses other than plain cross-entropy need.
        rotate: When another site of each group is drawn: 'epoch' (Sec. 4.1), 'step', or every N steps. An epoch begins
            at `train()` of the trainable module after at least one step, or at `set_epoch()`.
        reward_clip: Rewards are clamped to +-reward_clip; None is the literal equation.
        probe_dtype: 'float32' measures rewards in float32 under autocast, by one more pass. None keeps the precision of
            the judged pass.
        seed: Seed of the critic's weights and of the draw of sites. None is 0, in a recipe the run's seed.
        critic_cell: 'lstm' (Sec. 3.2) or 'gru'.
        critic_hidden_size: Hidden units of a critic. Other than 1 (the paper's), a linear read-out follows.
        critic_depth: Cells of a critic on top of each other.

    Raises:
        ValueError: An option has a value that it does not accept, or options contradict each other.
    """
    gamma: float = option(1.0, 'penalty of a wrongly classified sample, at most reward_clip', minimum=0)
    actor_weight: float = option(0.1, 'weight of L_q; the paper has 1', minimum=0)
    probe: str = option('split', 'how rewards are measured', choices=('exact', 'split', 'taylor'))
    probe_every: int = option(1, 'rewards are measured every N steps', minimum=1)
    taylor_target: str | None = option(None, "'loss' lets taylor measure by each sample's own loss", choices=('loss',))
    rotate: str | int = option('epoch', "when another site is drawn: 'epoch', 'step' or every N steps", minimum=1)
    reward_clip: float | None = option(1.0, 'bound of the rewards; null is the literal equation')
    probe_dtype: str | None = option(
        None, "'float32' measures rewards in float32 under autocast", choices=('float32',))
    seed: int | None = option(None, "seed of critic and draw; null is the run's seed", minimum=0)
    critic_cell: str = option('lstm', 'recurrent cell of a critic', choices=('lstm', 'gru'))
    critic_hidden_size: int = option(1, 'hidden units of a critic', minimum=1)
    critic_depth: int = option(1, 'cells of a critic on top of each other', minimum=1)

    def __post_init__(self) -> None:
        if self.probe_dtype is torch.float32:
            object.__setattr__(self, 'probe_dtype', 'float32')
        check_options(self)
        if not self.actor_weight < math.inf:
            raise ValueError(f'actor_weight: must be finite, got {self.actor_weight}.')
        if not 0 < self.gamma <= (math.inf if self.reward_clip is None else self.reward_clip):
            raise ValueError(
                f'gamma must lie in (0, reward_clip], got gamma={self.gamma} and reward_clip={self.reward_clip}.')
        if self.probe == 'taylor' and self.probe_dtype is not None:
            raise ValueError("probe_dtype is for counterfactual passes; probe='taylor' makes none.")
        if self.probe != 'taylor' and self.taylor_target is not None:
            raise ValueError(f"taylor_target is for probe='taylor', not for probe='{self.probe}'.")
