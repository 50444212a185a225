"""Probe 'exact': one counterfactual pass for the drawn site of each group (Algorithm 1, l. 8)"""
from collections.abc import Sequence

import torch
from torch import nn

from dreal_timm.attention.sites import Site
from dreal_timm.probes.counterfactual import CounterfactualProbe
from dreal_timm.probes.passes import Entry, RecordedPass, class_log_probability, counterfactual, travel
from dreal_timm.probes.restart import select

__all__ = ['ExactProbe']


class ExactProbe(CounterfactualProbe):
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

    def bypassed_log_probability(
            self,
            model: nn.Module,
            recorded: RecordedPass,
            target: torch.Tensor,
            right: torch.Tensor,
            sites: Sequence[Site],
            step: int,
    ) -> torch.Tensor:
        rows = None if recorded.whole else self._rows(right)
        if rows is not None and not len(rows):
            return torch.zeros(len(target), len(sites), device=target.device)
        columns = []
        for site in sites:
            restart = self.restart(recorded, site)
            if restart is None:
                self._log_fallback(recorded, sites)
                logits = counterfactual(model, recorded, [site], rows=rows)
            else:
                logits = travel(model, recorded, [Entry(restart, rows)])
            log_p = class_log_probability(logits, select(target, rows))
            columns.append(log_p if rows is None else log_p.new_zeros(len(target)).index_copy(0, rows, log_p))
        return torch.stack(columns, dim=1)
