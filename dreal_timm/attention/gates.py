"""Gates: see, and change, an attention map where its module makes it"""
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from dreal_timm.attention.readers import MapReader

__all__ = ['on_map', 'second_map']


@contextmanager
def on_map(
        module: nn.Module,
        reader: MapReader,
        change: Callable[[torch.Tensor], torch.Tensor | None],
) -> Iterator[None]:
    """Call a function with the map in the forward passes inside the context.

    Args:
        module: The attention module.
        reader: Its reader.
        change: map -> None, or what the module shall use in its place.
    """
    seen: list[torch.Tensor] = []

    def on_input(module: nn.Module, args: Any) -> None:
        seen.clear()

    def on_gate(gate: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return change(output)

    def on_call(gate: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        seen.append(output)
        return change(output) if len(seen) == reader.call + 1 else None

    def on_raw(gate: nn.Module, args: Any, output: torch.Tensor) -> None:
        assert reader.activation is not None
        seen.append(reader.activation(output))

    def on_output(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        changed = change(seen[-1])
        return None if changed is None else args[0] * changed

    gate = module.get_submodule(reader.gate)
    with ExitStack() as stack:
        if reader.activation is None and reader.calls == 1:
            stack.callback(gate.register_forward_hook(on_gate).remove)
        else:
            stack.callback(module.register_forward_pre_hook(on_input).remove)
            if reader.activation is None:
                stack.callback(gate.register_forward_hook(on_call).remove)
            else:
                stack.callback(gate.register_forward_hook(on_raw).remove)
                stack.callback(module.register_forward_hook(on_output).remove)
        yield


def second_map(module: nn.Module, reader: MapReader, *descriptors: torch.Tensor) -> torch.Tensor:
    """Compute the map again from its descriptors, with a graph to the module's parameters."""
    if reader.evaluate is not None:
        return reader.evaluate(module, *descriptors)
    if not reader.gate:
        return module.forward(*descriptors)
    maps: list[torch.Tensor] = []

    def keep(attention: torch.Tensor) -> None:
        maps.append(attention)

    with on_map(module, reader, keep):
        module(*descriptors)
    return maps[-1]
