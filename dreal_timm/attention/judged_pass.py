"""The judged pass: the forward pass whose maps the critics judge, and what of it they read

Shape letters: B batch, K classes, L sites of a group.
"""
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dreal_timm.attention.capture import Reading, keep_inputs, record
from dreal_timm.attention.readers import map_size
from dreal_timm.attention.sites import Group, Site
from dreal_timm.replay.batch_norms import Stats, record_norms

__all__ = ['JudgedPass', 'judged_pass', 'stack_maps', 'stack_readings']


@dataclass(frozen=True)
class JudgedPass:
    """The forward pass whose maps the critics judge.

    Attributes:
        output: Logits, (B, K).
        readings: What was recorded at each site, by its name.
        norms: Mean and biased variance of each batch norm that used the batch's, by its name, one pair a call.
        inputs: Inputs of modules, by their names.
    """
    output: torch.Tensor
    readings: Mapping[str, Reading]
    norms: Mapping[str, Sequence[Stats]]
    inputs: Mapping[str, torch.Tensor]


def judged_pass(
        model: nn.Module,
        sites: Sequence[Site],
        input: torch.Tensor,
        replay: bool = False,
        saved: Sequence[str] = (),
        within: AbstractContextManager[Any] | None = None,
) -> JudgedPass:
    """Run the network, and record what is judged and what counterfactual passes need.

    Args:
        model: The network.
        sites: Sites whose readings are recorded.
        input: Images, (B, C, H, W).
        replay: Whether statistics of batch norms are recorded.
        saved: Names of the modules whose inputs are saved.
        within: A context that the network runs in.
    """
    with ExitStack() as stack:
        readings = stack.enter_context(record(model, sites))
        norms = stack.enter_context(record_norms(model)) if replay else {}
        inputs = stack.enter_context(keep_inputs(model, saved))
        stack.enter_context(within or nullcontext())
        output = model(input)
    return JudgedPass(output, readings, norms, inputs)


def stack_maps(groups: Sequence[Group], maps: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the maps of each group, (B, L, *size), float32.

    Args:
        groups: Groups of attention sites.
        maps: Map of each site, by its name, in the shape that its gate gives it.
    """
    stacked = {}
    for group in groups:
        names = [site.name for site in group.sites]
        shape = (-1, 1, *map_size(group.kind, maps[names[0]].shape))
        stacked[group.name] = torch.cat([maps[name].reshape(shape) for name in names], dim=1).float()
    return stacked


def stack_readings(
        groups: Sequence[Group],
        readings: Mapping[str, Reading],
        maps: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return what the critics read: states (B, L, *judged_size) and maps (B, L, *size) of each group, float32.

    Args:
        groups: Groups of attention sites.
        readings: What was recorded at each site, by its name.
        maps: Map of each site, by its name, in the shape that its gate gives it.
    """
    stacked, states = stack_maps(groups, maps), {}
    for group in groups:
        size = stacked[group.name].shape[2:]
        judged = (-1, 1, *(size if group.kind == 'spatial' else size[:1]))
        states[group.name] = torch.cat(
            [readings[site.name].state.reshape(judged) for site in group.sites], dim=1).float()
    return states, stacked
