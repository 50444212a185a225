"""Probes: what would the network have predicted with an attention map replaced by its mean? (Eq. 1, Algorithm 1 l. 8)

A probe answers with the log-probability of the true class, by counterfactual passes that serve only the samples whose
reward depends on it.

Shape letters: B batch, K classes, G groups, P probed sites.
"""
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dreal_timm.attention.capture import keep_inputs
from dreal_timm.attention.sites import Group, Site
from dreal_timm.probes.entry_points import Flow
from dreal_timm.probes.passes import Entry, Judged, class_log_probability, counterfactual, log_probabilities, travel
from dreal_timm.probes.restart import Restart, select
from dreal_timm.utils.transfer import to_device

__all__ = ['PROBES', 'ExactProbe', 'Probe', 'SplitProbe']

_logger = logging.getLogger(__name__)


def _nested(restarts: Sequence[Restart]) -> bool:
    """Whether one pass enters a module that another is in the middle of."""
    joins = {restart.join for restart in restarts}
    return any(a.startswith(f'{b}.') for a in joins for b in joins)


class Probe(ABC):
    """What every probe does: say which sites it judges in a step, and what the true class would have been given.

    Args:
        groups: Groups of attention sites.
        flow: Where passes can begin, from `trace_flow`.
        dtype: torch.float32 measures in float32, reference included, with autocast off. None keeps the autocast.
        seed: Seed of what the probe itself draws.
    """

    def __init__(self, groups: Sequence[Group], flow: Flow, dtype: torch.dtype | None = None, seed: int = 0):
        self.groups = list(groups)
        self.flow = flow
        self.dtype = dtype
        self.seed = seed
        self._told = False

    def sites(self, drawn: Sequence[int]) -> list[Site]:
        """Return the drawn site of each group, one a column of the answer.

        Args:
            drawn: Index, in its group, of the site that was drawn, for each group.
        """
        return [group.sites[index] for group, index in zip(self.groups, drawn, strict=True)]

    def kept(self, sites: Sequence[Site], every: bool = False) -> list[str]:
        """Return the names of the modules whose inputs the judged pass must keep to probe these sites.

        Args:
            sites: Sites that were drawn.
            every: Keep the inputs of the blocks of all sites, whichever are drawn, and nothing from inside of a block:
                a compiled pass would be compiled anew for others, and keeps these for its backward pass anyway.
        """
        if self.dtype is not None:
            return []
        if every:
            return sorted({restart.join for restart in self.flow.restarts.values() if restart is not None})
        return sorted({name for site in sites for name in self._inputs(site)})

    def _inputs(self, site: Site) -> tuple[str, ...]:
        restart = self.flow.restarts[site.name]
        return () if restart is None else restart.inputs

    def restart(self, judged: Judged, site: Site) -> Restart | None:
        """Return how passes begin at a site, or as near to it as inputs were kept; None: with the images."""
        restart = self.flow.restarts[site.name]
        if restart is None or judged.whole or restart.join not in judged.kept:
            return None
        return restart if all(name in judged.kept for name in restart.inputs) else restart.within()

    def reference(self, model: nn.Module, judged: Judged, sites: Sequence[Site]) -> tuple[torch.Tensor, Judged]:
        """Repeat the judged pass in the probe's own precision, inside of `precision`.

        Returns:
            Log-probabilities (B, K), and what counterfactual passes in that precision begin from.
        """
        judged = replace(judged, input=judged.input.to(self.dtype))
        names = {name for site in sites for name in self._inputs(site)}
        with keep_inputs(model, sorted(names)) as kept:
            logits = counterfactual(model, judged, [])
        return log_probabilities(logits), replace(judged, kept=kept)

    def precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context that the probe runs in."""
        return nullcontext() if self.dtype is None else torch.autocast(device.type, enabled=False)

    def _tell(self, judged: Judged, sites: Sequence[Site]) -> None:
        """Say once that passes cannot begin at the sites."""
        if self._told:
            return
        self._told = True
        stuck = [site.name for site in sites if self.restart(judged, site) is None]
        if judged.whole:
            reason = 'random numbers were drawn that cannot be drawn again for a part of the batch or of the network'
        elif stuck:
            reason = f'what follows {stuck[0]} needs more than a block computed before it'
        else:
            reason = 'the blocks of the probed sites lie in one another'
        _logger.info(f'Probe: counterfactual passes run through the whole network, since {reason}.')

    @abstractmethod
    def __call__(
            self,
            model: nn.Module,
            judged: Judged,
            target: torch.Tensor,
            right: torch.Tensor,
            sites: Sequence[Site],
            step: int,
    ) -> torch.Tensor:
        """Return the log-probability of each sample's class with one map bypassed, (B, P), NaN where not probed.

        The entries of samples that are not right are meaningless: their reward does not depend on it.

        Args:
            model: The model itself, with no wrapper around it.
            judged: What the judged pass left.
            target: Class indices, (B,).
            right: Samples whose class wins or ties, (B,) bool.
            sites: Sites to probe, one a column.
            step: Number of the step.
        """


class ExactProbe(Probe):
    """One counterfactual pass for the drawn site of each group."""

    def _rows(self, right: torch.Tensor) -> torch.Tensor | None:
        """Samples to send through the network; None are all of them.

        On an accelerator their number is a multiple of an eighth of the batch, so that kernels see few shapes; this
        is the one place of a step that waits for the device.
        """
        batch, count = len(right), int(right.sum())
        if right.device.type != 'cpu':
            eighth = max(batch // 8, 1)
            count = -(-count // eighth) * eighth
        return None if count >= batch else right.to(torch.int8).argsort(descending=True, stable=True)[:count]

    def __call__(
            self,
            model: nn.Module,
            judged: Judged,
            target: torch.Tensor,
            right: torch.Tensor,
            sites: Sequence[Site],
            step: int,
    ) -> torch.Tensor:
        rows = None if judged.whole else self._rows(right)
        if rows is not None and not len(rows):
            return torch.zeros(len(target), len(sites), device=target.device)
        columns = []
        for site in sites:
            restart = self.restart(judged, site)
            if restart is None:
                self._tell(judged, sites)
                logits = counterfactual(model, judged, [site], rows=rows)
            else:
                logits = travel(model, judged, [Entry(restart, rows)])
            log_p = class_log_probability(logits, select(target, rows))
            columns.append(log_p if rows is None else log_p.new_zeros(len(target)).index_copy(0, rows, log_p))
        return torch.stack(columns, dim=1)


class SplitProbe(Probe):
    """Each sample answers for one group, drawn anew every step; all samples travel as one growing batch.

    Every sample is as likely to answer for one group as for another, and its answer is the exact one.
    """

    def assignment(self, batch: int, step: int) -> torch.Tensor:
        """Return the index of the group that each sample answers for, (B,), on the CPU.

        Groups get equally many samples, give or take one.
        """
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        order = torch.randperm(batch, generator=generator)
        groups = len(self.groups)
        return (order + torch.randint(groups, (), generator=generator)) % groups

    def __call__(
            self,
            model: nn.Module,
            judged: Judged,
            target: torch.Tensor,
            right: torch.Tensor,
            sites: Sequence[Site],
            step: int,
    ) -> torch.Tensor:
        device = target.device
        group = self.assignment(len(target), step)
        # the number of samples that travel is known without a look at the device, except on the CPU
        asked = right if device.type == 'cpu' else torch.ones_like(group, dtype=torch.bool)
        depth = {name: index for index, name in enumerate(self.flow.restarts)}
        columns = sorted(range(len(sites)), key=lambda column: depth[sites[column].name])
        rows = {
            column: to_device((asked & (group == column)).nonzero().squeeze(1), device) for column in columns}
        columns = [column for column in columns if len(rows[column])]
        restarts = [self.restart(judged, sites[column]) for column in columns]
        found = [restart for restart in restarts if restart is not None]
        on_device = to_device(group, device)
        answer = torch.zeros(len(target), device=device)
        if columns and (len(found) < len(restarts) or _nested(found)):
            self._tell(judged, sites)
            logits = counterfactual(model, judged, sites, [on_device == column for column in range(len(sites))])
            answer = class_log_probability(logits, target)
        elif columns:
            entries = [Entry(restart, rows[column]) for restart, column in zip(found, columns, strict=True)]
            travelled = torch.cat([rows[column] for column in columns])
            log_p = class_log_probability(travel(model, judged, entries), target[travelled])
            answer = log_p.new_zeros(len(target)).index_copy(0, travelled, log_p)
        own = torch.arange(len(sites), device=device) == on_device[:, None]
        return answer[:, None].where(own, torch.full((), math.nan, device=device, dtype=answer.dtype))


PROBES: dict[str, type[Probe]] = {'exact': ExactProbe, 'split': SplitProbe}
