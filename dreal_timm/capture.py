"""Capture: what attention maps are computed from, and how to switch one off

Context managers that put hooks on a network and take them away again, whatever happens.
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dreal_timm.attention import Site
from dreal_timm.overrides import scratch_buffers
from dreal_timm.readers import READERS, Reader

__all__ = ['Reading', 'bypass', 'read_map', 'record', 'tap']


@dataclass(frozen=True)
class Reading:
    """What `record` saw at a site: the map, the state in the map's shape, and the descriptors; none has a graph."""
    attention: torch.Tensor
    state: torch.Tensor
    descriptors: tuple[torch.Tensor, ...]


def _reader(model: nn.Module, site: Site) -> tuple[nn.Module, Reader]:
    module = model.get_submodule(site.name)
    return module, READERS[type(module)]


@contextmanager
def record(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, Reading]]:
    """Record state and descriptors of the sites in the forward passes inside the context.

    Yields:
        A dict from the name of a site to its `Reading`, filled as the model runs.
    """
    readings: dict[str, Reading] = {}

    def on_input(pooled: list[torch.Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            pooled.append(args[0].detach())
        return hook

    def on_gate(seen: list[torch.Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            seen.append(output.detach())
        return hook

    def on_output(
            name: str,
            reader: Reader,
            pooled: list[torch.Tensor],
            seen: list[torch.Tensor],
    ) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            with torch.no_grad():
                readings[name] = Reading(seen[-1], *reader.describe(module, args[0].detach(), *pooled))
            pooled.clear()
            seen.clear()
        return hook

    with ExitStack() as stack:
        for site in sites:
            module, reader = _reader(model, site)
            pooled: list[torch.Tensor] = []
            seen: list[torch.Tensor] = []
            stack.callback(module.get_submodule(reader.gate).register_forward_hook(on_gate(seen)).remove)
            if reader.source is not None:
                source = module.get_submodule(reader.source)
                stack.callback(source.register_forward_pre_hook(on_input(pooled)).remove)
            stack.callback(module.register_forward_hook(on_output(site.name, reader, pooled, seen)).remove)
        yield readings


def read_map(model: nn.Module, site: Site, reading: Reading) -> torch.Tensor:
    """Return the map of a site from its reading, (B, C, 1, 1) or (B, 1, H, W), with a graph to its parameters.

    The values are those of the recorded forward pass, the graph reaches the attention parameters and nothing upstream
    of them. Buffers (of a batch norm in the gate) are left as they are.
    """
    module, reader = _reader(model, site)
    with scratch_buffers([m for m in module.modules() if m.training and m._buffers]):
        evaluated = reader.evaluate(module, *reading.descriptors)
    return reading.attention + (evaluated - evaluated.detach())


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

    def on_gate(chosen: torch.Tensor | None) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            flat = output.mean(tuple(range(1, output.ndim)), keepdim=True).expand_as(output).contiguous()
            return flat if chosen is None else flat.where(chosen.view(-1, *[1] * (output.ndim - 1)), output)
        return hook

    with ExitStack() as stack:
        for index, site in enumerate(sites):
            module, reader = _reader(model, site)
            hook = on_gate(None if rows is None else rows[index])
            stack.callback(module.get_submodule(reader.gate).register_forward_hook(hook).remove)
        yield


@contextmanager
def tap(model: nn.Module, sites: Sequence[Site], taps: Sequence[torch.Tensor]) -> Iterator[None]:
    """Add to the map of each site a tensor of as many numbers, in the map's dtype, in the passes inside the context.

    Where it is zero nothing changes, but its gradient is the map's: a hook on a map that a compiled module returned
    would see nothing.
    """

    def on_gate(added: torch.Tensor) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output + added.view_as(output).to(output.dtype)
        return hook

    with ExitStack() as stack:
        for site, added in zip(sites, taps, strict=True):
            module, reader = _reader(model, site)
            stack.callback(module.get_submodule(reader.gate).register_forward_hook(on_gate(added)).remove)
        yield
