"""Probes by counterfactual passes: what would the network have predicted with a map replaced by its mean? (Eq. 1)

The passes serve only the samples whose reward depends on them.

Shape letters: B batch, K classes, G groups, P probed sites.
"""
import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dreal_timm.attention.capture import keep_inputs
from dreal_timm.attention.sites import Group, Site, group_sites
from dreal_timm.probes.base import Probe, ProbeSetup, Rewards
from dreal_timm.probes.entry_points import Flow, trace_flow
from dreal_timm.probes.passes import RecordedPass, counterfactual, log_probabilities, null_noise
from dreal_timm.probes.restart import Restart
from dreal_timm.replay.random_masks import Draws, record_draws, rng_state
from dreal_timm.reward import RewardRule, is_correct
from dreal_timm.trainable import DrealTrainableModule, Judgement

__all__ = ['CounterfactualProbe']

_logger = logging.getLogger(__name__)


class CounterfactualProbe(Probe):
    """Measure rewards by running the network again with maps bypassed.

    Args:
        groups: Groups of attention sites.
        rule: How a reward is made of a change of log-probability.
        flow: Where passes can begin, from `trace_flow`.
        dtype: torch.float32 measures in float32, reference included, with autocast off. None keeps the autocast.
        seed: Seed of what the probe itself draws.
        ignored: Label of samples that have no class.
    """

    def __init__(
            self,
            groups: Sequence[Group],
            rule: RewardRule,
            flow: Flow,
            dtype: torch.dtype | None = None,
            seed: int = 0,
            ignored: int | None = None,
    ):
        super().__init__(groups, rule, ignored)
        self.flow = flow
        self.dtype = dtype
        self.seed = seed
        self._fallback_logged = False
        self._noise_logged = False

    @classmethod
    def build(cls, setup: ProbeSetup) -> 'CounterfactualProbe':
        dtype = None if setup.config.probe_dtype is None else torch.float32
        flow = trace_flow(setup.model, setup.sites, setup.input_size)
        return cls(group_sites(setup.sites), setup.rule, flow, dtype, setup.config.seed or 0, setup.ignored)

    def __call__(
            self,
            call: nn.Module,
            trainable: DrealTrainableModule,
            input: torch.Tensor,
            target: torch.Tensor,
    ) -> tuple[Judgement, Rewards]:
        sites = self.sites(trainable.rotation.draw())
        if not trainable.rotation.due:
            judged = call(input)
            return judged, self.unmeasured(judged.output.detach(), target, sites)
        saved = tuple(self.inputs_to_save(sites, all_blocks=self.compiled))
        with self._recorded_draws(trainable.model, input.device) as draws:
            judged = call(input, replay=True, saved=saved)
        draws.after = rng_state(input.device)
        recorded = RecordedPass(input, judged.norms, draws, judged.inputs)
        return judged, self.rewards(trainable, recorded, judged.output.detach(), target, sites)

    def _recorded_draws(self, model: nn.Module, device: torch.device) -> AbstractContextManager[Draws]:
        # hooks that are set outside of a compiled module are not seen there: all that is known is whether it drew
        if self.compiled or not self.flow.per_sample:
            return nullcontext(Draws(rng_state(device)))
        return record_draws(model, device, self.flow.functional)

    @torch.no_grad()
    def rewards(
            self,
            trainable: DrealTrainableModule,
            recorded: RecordedPass,
            output: torch.Tensor,
            target: torch.Tensor,
            sites: Sequence[Site],
    ) -> Rewards:
        """Measure the rewards of a judged pass.

        Args:
            trainable: The trainable module without its wrappers.
            recorded: What the judged pass left.
            output: Its logits, (B, K).
            target: Class indices (B,), or soft targets (B, K).
            sites: Sites to probe, one a column.
        """
        model = trainable.model
        classes, known = self.classes(output, target)
        log_probs = log_probabilities(output)
        noise = None
        if not self._noise_logged and self.dtype is None and output.dtype in (torch.float16, torch.bfloat16):
            noise = null_noise(model, recorded, log_probs, classes, [self.restart(recorded, site) for site in sites])
        with self.precision(recorded.input.device):
            if self.dtype is not None:
                log_probs, recorded = self.reference(model, recorded, sites)
            right = is_correct(log_probs, classes)
            bypassed = self.bypassed_log_probability(
                model, recorded, classes, self.rule.measured(right), sites, trainable.rotation.step)
        change = (bypassed - log_probs.gather(1, classes[:, None])).masked_fill(~known[:, None], math.nan)
        rewards = self.rule(change, right, range(len(sites)))
        if noise is not None:
            self._log_noise(noise, rewards[known & right])
        return Rewards(sites, rewards, right)

    def _log_noise(self, noise: float, rewards: torch.Tensor) -> None:
        self._noise_logged = True
        rewards = rewards[~rewards.isnan()]
        spread = rewards.std().item() if rewards.numel() > 1 else math.nan
        _logger.info(
            f'Low precision: a pass that changes nothing moves log p by {noise:.2g} (rms); the rewards of correctly '
            f"classified samples have a standard deviation of {spread:.2g}. probe_dtype='float32' removes the noise."
        )

    def sites(self, drawn: Sequence[int]) -> list[Site]:
        """Return the drawn site of each group, one a column of the answer.

        Args:
            drawn: Index, in its group, of the site that was drawn, for each group.
        """
        return [group.sites[index] for group, index in zip(self.groups, drawn, strict=True)]

    def inputs_to_save(self, sites: Sequence[Site], all_blocks: bool = False) -> list[str]:
        """Return the names of the modules whose inputs the judged pass must save to probe these sites.

        Args:
            sites: Sites that were drawn.
            all_blocks: Save the inputs of the blocks of all sites, whichever are drawn, and nothing from inside of a
                block: a compiled pass would be compiled anew for others, and saves these for its backward pass anyway.
        """
        if self.dtype is not None:
            return []
        if all_blocks:
            return sorted({restart.join for restart in self.flow.restarts.values() if restart is not None})
        return sorted({name for site in sites for name in self._inputs(site)})

    def _inputs(self, site: Site) -> tuple[str, ...]:
        restart = self.flow.restarts[site.name]
        return () if restart is None else restart.inputs

    def restart(self, recorded: RecordedPass, site: Site) -> Restart | None:
        """Return how passes begin at a site, or as near to it as inputs were saved; None: with the images."""
        restart = self.flow.restarts[site.name]
        if restart is None or recorded.whole or restart.join not in recorded.inputs:
            return None
        return restart if all(name in recorded.inputs for name in restart.inputs) else restart.within()

    def reference(
            self,
            model: nn.Module,
            recorded: RecordedPass,
            sites: Sequence[Site],
    ) -> tuple[torch.Tensor, RecordedPass]:
        """Repeat the judged pass in the probe's own precision, inside of `precision`.

        Returns:
            Log-probabilities (B, K), and what counterfactual passes in that precision begin from.
        """
        recorded = replace(recorded, input=recorded.input.to(self.dtype))
        names = {name for site in sites for name in self._inputs(site)}
        with keep_inputs(model, sorted(names)) as inputs:
            logits = counterfactual(model, recorded, [])
        return log_probabilities(logits), replace(recorded, inputs=inputs)

    def precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context that the probe runs in."""
        return nullcontext() if self.dtype is None else torch.autocast(device.type, enabled=False)

    def _log_fallback(self, recorded: RecordedPass, sites: Sequence[Site]) -> None:
        """Log once that passes cannot begin at the sites."""
        if self._fallback_logged:
            return
        self._fallback_logged = True
        stuck = [site.name for site in sites if self.restart(recorded, site) is None]
        if recorded.whole:
            reason = 'random numbers were drawn that cannot be drawn again for a part of the batch or of the network'
        elif stuck:
            reason = f'what follows {stuck[0]} needs more than a block computed before it'
        else:
            reason = 'the blocks of the probed sites lie in one another'
        _logger.info(f'Probe: counterfactual passes run through the whole network, since {reason}.')

    @abstractmethod
    def bypassed_log_probability(
            self,
            model: nn.Module,
            recorded: RecordedPass,
            target: torch.Tensor,
            right: torch.Tensor,
            sites: Sequence[Site],
            step: int,
    ) -> torch.Tensor:
        """Return the log-probability of each sample's class with one map bypassed, (B, P), NaN where not probed.

        The entries of samples that are not right are meaningless: their reward does not depend on it.

        Args:
            model: The model itself, with no wrapper around it.
            recorded: What the judged pass left.
            target: Class indices, (B,).
            right: Samples whose class wins or ties, (B,) bool.
            sites: Sites to probe, one a column.
            step: Number of the step.
        """
