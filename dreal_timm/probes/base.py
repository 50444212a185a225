"""Measuring a step: the judged pass and the rewards of its maps, by counterfactual passes or one step later

Shape letters: B batch, K classes, P probed sites.
"""
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dreal_timm.attention.sites import Site
from dreal_timm.probes.counterfactual import Probe
from dreal_timm.probes.passes import Judged, log_probabilities, null_noise
from dreal_timm.replay.random_masks import Draws, record_draws, rng_state
from dreal_timm.reward import RewardRule, is_correct, target_class
from dreal_timm.trainable import DrealTrainableModule

__all__ = ['Measure', 'Measured', 'PassMeasure']

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """Rewards of some samples.

    Attributes:
        sites: The P probed sites.
        reward: (B, P) float32, NaN where not measured.
        right: Whether a sample's class wins or ties, (B,) bool.
    """
    sites: Sequence[Site]
    reward: torch.Tensor
    right: torch.Tensor


class Measure(ABC):
    """Run the judged pass of a step and give rewards to its maps, or to those of the step before.

    Args:
        rule: Eq. 1, or what is taken in its place.
        ignored: Label of samples that have no class; negative labels, and those beyond the classes, have none either.
    """

    def __init__(self, rule: RewardRule, ignored: int | None = None):
        self.rule = rule
        self.ignored = ignored
        self.compiled = False

    @abstractmethod
    def __call__(
            self,
            call: nn.Module,
            trainable: DrealTrainableModule,
            input: torch.Tensor,
            target: torch.Tensor,
    ) -> tuple[dict[str, Any], Measured]:
        """Return what the trainable module returned for the judged pass, and the rewards.

        Args:
            call: The trainable module as it is called, with its wrappers (DDP, torch.compile).
            trainable: The same without them.
            input: Images, (B, C, H, W).
            target: Class indices (B,), or soft targets (B, K).
        """

    def watch(self, loss: torch.Tensor) -> None:  # noqa: B027 (most need nothing)
        """See the loss that `backward()` will be called on."""

    def forget(self) -> None:  # noqa: B027 (most keep nothing)
        """Drop what is kept from the step before."""

    def classes(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the class of each sample (B,), 0 where it has none, and whether it has one (B,)."""
        target = target_class(target)
        known = (target >= 0) & (target < output.shape[1])
        if self.ignored is not None:
            known &= target != self.ignored
        return target.where(known, torch.zeros_like(target)), known

    def unmeasured(self, output: torch.Tensor, target: torch.Tensor, sites: Sequence[Site]) -> Measured:
        """Return no rewards for a batch."""
        right = is_correct(output, self.classes(output, target)[0])
        return Measured(sites, torch.full((len(output), len(sites)), math.nan, device=output.device), right)


class PassMeasure(Measure):
    """Rewards from counterfactual passes.

    Args:
        probe: The probe.
        **kwargs: Passed to `Measure`.
    """

    def __init__(self, probe: Probe, **kwargs: Any):
        super().__init__(**kwargs)
        self.probe = probe
        self._noise_logged = False

    def _watched(self, model: nn.Module, device: torch.device) -> AbstractContextManager[Draws]:
        # hooks that are set outside of a compiled module are not seen there: all that is known is whether it drew
        if self.compiled or not self.probe.flow.per_sample:
            return nullcontext(Draws(rng_state(device)))
        return record_draws(model, device, self.probe.flow.functional)

    def __call__(
            self,
            call: nn.Module,
            trainable: DrealTrainableModule,
            input: torch.Tensor,
            target: torch.Tensor,
    ) -> tuple[dict[str, Any], Measured]:
        sites = self.probe.sites(trainable.rotation.draw())
        if not trainable.rotation.due:
            judged = call(input)
            return judged, self.unmeasured(judged['output'].detach(), target, sites)
        kept = tuple(self.probe.kept(sites, every=self.compiled))
        with self._watched(trainable.model, input.device) as draws:
            judged = call(input, probed=True, kept=kept)
        draws.after = rng_state(input.device)
        passed = Judged(input, judged['norms'], draws, judged['kept'])
        return judged, self._rewards(trainable, passed, judged['output'].detach(), target, sites)

    @torch.no_grad()
    def _rewards(
            self,
            trainable: DrealTrainableModule,
            judged: Judged,
            output: torch.Tensor,
            target: torch.Tensor,
            sites: Sequence[Site],
    ) -> Measured:
        model, probe = trainable.model, self.probe
        classes, known = self.classes(output, target)
        log_probs = log_probabilities(output)
        noise = None
        if not self._noise_logged and probe.dtype is None and output.dtype in (torch.float16, torch.bfloat16):
            noise = null_noise(model, judged, log_probs, classes, [probe.restart(judged, site) for site in sites])
        with probe.precision(judged.input.device):
            if probe.dtype is not None:
                log_probs, judged = probe.reference(model, judged, sites)
            right = is_correct(log_probs, classes)
            bypassed = probe(model, judged, classes, self.rule.asked(right), sites, trainable.rotation.step)
        change = (bypassed - log_probs.gather(1, classes[:, None])).masked_fill(~known[:, None], math.nan)
        rewards = self.rule(change, right, range(len(sites)))
        if noise is not None:
            self._log_noise(noise, rewards[known & right])
        return Measured(sites, rewards, right)

    def _log_noise(self, noise: float, rewards: torch.Tensor) -> None:
        self._noise_logged = True
        rewards = rewards[~rewards.isnan()]
        spread = rewards.std().item() if rewards.numel() > 1 else math.nan
        _logger.info(
            f'Low precision: a pass that changes nothing moves log p by {noise:.2g} (rms); the rewards of correctly '
            f"classified samples have a standard deviation of {spread:.2g}. probe_dtype='float32' removes the noise."
        )
