"""Probe 'split': one counterfactual pass a step, each sample with the map of one group bypassed"""
import math
from collections.abc import Sequence

import torch
from torch import nn

from dreal_timm.attention.sites import Site
from dreal_timm.probes.counterfactual import CounterfactualProbe
from dreal_timm.probes.passes import Entry, RecordedPass, class_log_probability, counterfactual, travel
from dreal_timm.probes.restart import Restart
from dreal_timm.utils.transfer import to_device

__all__ = ['SplitProbe']


def _nested(restarts: Sequence[Restart]) -> bool:
    """Whether one pass enters a module that another is in the middle of."""
    joins = {restart.join for restart in restarts}
    return any(a.startswith(f'{b}.') for a in joins for b in joins)


class SplitProbe(CounterfactualProbe):
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

    def bypassed_log_probability(
            self,
            model: nn.Module,
            recorded: RecordedPass,
            target: torch.Tensor,
            right: torch.Tensor,
            sites: Sequence[Site],
            step: int,
    ) -> torch.Tensor:
        device = target.device
        group = self.assignment(len(target), step)
        # the number of samples that travel is known without a look at the device, except on the CPU
        measured = right if device.type == 'cpu' else torch.ones_like(group, dtype=torch.bool)
        depth = {name: index for index, name in enumerate(self.flow.restarts)}
        columns = sorted(range(len(sites)), key=lambda column: depth[sites[column].name])
        rows = {
            column: to_device((measured & (group == column)).nonzero().squeeze(1), device) for column in columns}
        columns = [column for column in columns if len(rows[column])]
        restarts = [self.restart(recorded, sites[column]) for column in columns]
        usable = [restart for restart in restarts if restart is not None]
        on_device = to_device(group, device)
        answer = torch.zeros(len(target), device=device)
        if columns and (len(usable) < len(restarts) or _nested(usable)):
            self._log_fallback(recorded, sites)
            logits = counterfactual(model, recorded, sites, [on_device == column for column in range(len(sites))])
            answer = class_log_probability(logits, target)
        elif columns:
            entries = [Entry(restart, rows[column]) for restart, column in zip(usable, columns, strict=True)]
            travelled = torch.cat([rows[column] for column in columns])
            log_p = class_log_probability(travel(model, recorded, entries), target[travelled])
            answer = log_p.new_zeros(len(target)).index_copy(0, travelled, log_p)
        own = torch.arange(len(sites), device=device) == on_device[:, None]
        return answer[:, None].where(own, torch.full((), math.nan, device=device, dtype=answer.dtype))
