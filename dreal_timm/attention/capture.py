"""Capture: what attention maps are computed from, and how to switch one off

Context managers that put hooks on a network and take them away again, whatever happens.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dreal_timm.attention.gates import on_map, second_map
from dreal_timm.attention.readers import MapReader
from dreal_timm.attention.sites import Group, Site, site_reader
from dreal_timm.replay.overrides import scratch_buffers

__all__ = ['Reading', 'bypass', 'keep_inputs', 'map_again', 'nudge', 'read_map', 'record', 'replace', 'tap']


@dataclass(frozen=True)
class Reading:
    """What `record` saw at a site: the map, the state in the map's shape, and the descriptors; none has a graph."""
    attention: torch.Tensor
    state: torch.Tensor
    descriptors: tuple[torch.Tensor, ...]


class _Recorder:
    """Hooks of one site, and what they have seen in a pass."""

    def __init__(self, module: nn.Module, reader: MapReader, stack: ExitStack, done: Callable[[Reading], None]):
        self.reader = reader
        self.done = done
        self.maps: list[torch.Tensor] = []
        self.pooled: list[torch.Tensor] = []
        self.features: list[torch.Tensor] = []
        stack.enter_context(on_map(module, reader, self.on_map))
        sources = (reader.source,) if isinstance(reader.source, str) else reader.source or ()
        for source in sources:
            stack.callback(module.get_submodule(source).register_forward_pre_hook(self.on_source).remove)
        gated = (reader.features,) if isinstance(reader.features, str) else reader.features or ()
        for name in gated:
            stack.callback(module.get_submodule(name).register_forward_hook(self.on_features).remove)
        stack.callback(module.register_forward_hook(self.on_output).remove)

    def on_map(self, attention: torch.Tensor) -> None:
        self.maps.append(attention.detach())

    def on_source(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.pooled.append(args[0].detach())

    def on_features(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.features.append(output.detach())

    def on_output(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        with torch.no_grad():
            features = _joined(self.features) if self.features else args[0].detach()
            self.done(Reading(self.maps[-1], *self.reader.describes(module, features, *self.pooled)))
        for seen in (self.maps, self.pooled, self.features):
            seen.clear()


def _joined(features: Sequence[torch.Tensor]) -> torch.Tensor:
    return features[0] if len(features) == 1 else torch.cat(list(features), dim=1)


@contextmanager
def record(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, Reading]]:
    """Record state and descriptors of the sites in the forward passes inside the context.

    Yields:
        A dict from the name of a site to its `Reading`, filled as the model runs.
    """
    readings: dict[str, Reading] = {}

    def keep(name: str) -> Callable[[Reading], None]:
        def done(reading: Reading) -> None:
            readings[name] = reading
        return done

    with ExitStack() as stack:
        for site in sites:
            _Recorder(*site_reader(model, site), stack, keep(site.name))
        yield readings


def map_again(model: nn.Module, site: Site, descriptors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the map of a site from its descriptors, in the shape that its gate gives it, with a graph to its
    parameters alone. Buffers (of a batch norm in the gate) are left as they are.
    """
    module, reader = site_reader(model, site)
    with scratch_buffers([m for m in module.modules() if m.training]):
        return second_map(module, reader, *descriptors)


def read_map(model: nn.Module, site: Site, reading: Reading) -> torch.Tensor:
    """Return the map of a site from its reading, in the shape that its gate gave it, with a graph to its parameters.

    The values are those of the recorded forward pass, the graph reaches the attention parameters and nothing upstream
    of them. Buffers (of a batch norm in the gate) are left as they are.
    """
    return _Graph.apply(reading.attention, map_again(model, site, reading.descriptors))


class _Graph(torch.autograd.Function):
    """The value of one tensor with the graph of another: `value + (graph - graph.detach())`, without arithmetic."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, graph: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, gradients[0]


@contextmanager
def bypass(
        model: nn.Module,
        sites: Sequence[Site],
        rows: Sequence[torch.Tensor] | None = None,
) -> Iterator[None]:
    """Replace the map of each site by its own mean, per sample (A-bar in Eq. 1), in the passes inside the context.

    Args:
        model: The model.
        sites: Sites to bypass.
        rows: For each site, the samples for which it is bypassed, (B,) bool; None bypasses it for all of them.
    """

    def flatten(chosen: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(attention: torch.Tensor) -> torch.Tensor:
            dims = tuple(range(1, attention.ndim))
            flat = attention.mean(dims, keepdim=True).expand_as(attention).contiguous()
            return flat if chosen is None else flat.where(chosen.view(-1, *[1] * len(dims)), attention)
        return change

    with ExitStack() as stack:
        for index, site in enumerate(sites):
            change = flatten(None if rows is None else rows[index])
            stack.enter_context(on_map(*site_reader(model, site), change))
        yield


@contextmanager
def replace(model: nn.Module, site: Site, attention: torch.Tensor) -> Iterator[None]:
    """Replace the map of a site by a given one, for every sample, in the passes inside the context.

    Args:
        model: The model.
        site: The site.
        attention: A map in the shape that its gate gives it, with a first dimension of 1.
    """

    def change(own: torch.Tensor) -> torch.Tensor:
        return attention.to(own).expand_as(own).contiguous()

    with on_map(*site_reader(model, site), change):
        yield


@contextmanager
def nudge(model: nn.Module, site: Site) -> Iterator[None]:
    """Replace the map of a site by itself with its last digit raised, in the passes inside the context.

    To the precision of its numbers nothing changes. What does change is how all that follows is rounded, as with any
    other map: the map itself would repeat the pass to the bit, and tell nothing of that.
    """

    def change(own: torch.Tensor) -> torch.Tensor:
        return own * (1 + torch.finfo(own.dtype).eps)

    with on_map(*site_reader(model, site), change):
        yield


@contextmanager
def tap(model: nn.Module, groups: Sequence[Group], taps: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Add a tensor to the map of each site, in the map's dtype, in the passes inside the context.

    Where it is zero nothing changes, but its gradient is the map's: a hook on a map that a compiled module returned
    would see nothing.

    Args:
        model: The model.
        groups: Groups of attention sites.
        taps: Tensor of each group, (B, L, *size).
    """
    cast: dict[tuple[str, torch.dtype], tuple[torch.Tensor, ...]] = {}  # once a group: a GPU waits for each launch

    def adding(name: str, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(attention: torch.Tensor) -> torch.Tensor:
            key = name, attention.dtype
            if key not in cast:
                cast[key] = taps[name].to(attention.dtype).unbind(1)
            return attention + cast[key][index].view_as(attention)
        return change

    with ExitStack() as stack:
        for group in groups:
            for index, site in enumerate(group.sites):
                stack.enter_context(on_map(*site_reader(model, site), adding(group.name, index)))
        yield


@contextmanager
def keep_inputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Keep the inputs of some modules in the forward pass inside the context, without a graph and without a copy."""
    kept: dict[str, torch.Tensor] = {}

    def on_input(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            kept[name] = args[0].detach()
        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(on_input(name)).remove)
        yield kept
