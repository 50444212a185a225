"""What a reader is: how the attention map of a class of modules is found, and computed again

Shape letters: B batch, C channels, P branches.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ['KINDS', 'Description', 'MapReader', 'map_size']

Description = tuple[torch.Tensor, tuple[torch.Tensor, ...]]

KINDS = {
    'channel': 'a weight for each channel',
    'spatial': 'a weight for each position, the same for all channels',
    'height': 'a weight for each channel and row',
    'width': 'a weight for each channel and column',
    'full': 'a weight for each channel and position',
    'branch': 'a weight for each channel of each branch',
}


def map_size(kind: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the size of a map of this kind, without the batch, from the shape of the tensor that holds it.

    (C,) for channel; (H, W) for spatial; (C, H), (C, W) and (C, H, W) for height, width and full; (P * C,) for branch.
    """
    if kind == 'spatial':
        return tuple(shape[2:])
    if kind == 'height':
        return tuple(shape[1:3])
    if kind == 'width':
        return shape[1], shape[3]
    if kind == 'full':
        return tuple(shape[1:])
    return (torch.Size(shape[1:]).numel(),)


@dataclass(frozen=True)
class MapReader:
    """How to read the attention map of one class of modules, or one of its maps.

    `MapReader(kind)` alone is enough for a module that calls a submodule `gate` once, whose output is the map, and that
    changes its input not in place: the map is then computed again by a second call of the module.

    Attributes:
        kind: What the map has a weight for, one of `KINDS`.
        describe: (module, features, *pooled) -> (state, descriptors). The state is the gated features averaged down to
            the map's own shape (the F~ of Eq. 2), and further to the channels for height, width and full. Descriptors
            are the tensors that the map is computed from. All tensors come detached; a descriptor must be a tensor that
            nothing changes in place later. None: the features are averaged, and are the descriptor.
        evaluate: (module, *descriptors) -> map. Must equal the map that the module's forward uses, but for rounding;
            the gradients of its parameters are those of this function. None: the module is called again.
        gate: Name of the submodule whose output is the map; '' where the module returns the map.
        source: Names of the submodules that are called with what the module pooled from its input: `pooled` are the
            first arguments of their calls, so that the features need not be read again. None: nothing is pooled yet,
            and `describe` is called with module and features alone.
        part: What tells the site from others of the same module; its name ends in it.
        call: Which call of the gate makes the map, where a module calls it several times.
        calls: How many times a module calls its gate.
        activation: What the module itself does with the gate's output to make the map. It must then return its input
            times the map.
        features: Name of the submodule whose output is gated, or names of those whose outputs are, one after the other
            along the channels. None: the module's input, its first argument.
        parameters: Names of the submodules that hold the attention parameters. None: all of the module's.
    """
    kind: str
    describe: Callable[..., Description] | None = None
    evaluate: Callable[..., torch.Tensor] | None = None
    gate: str = 'gate'
    source: str | tuple[str, ...] | None = None
    part: str = ''
    call: int = 0
    calls: int = 1
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None
    features: str | tuple[str, ...] | None = None
    parameters: tuple[str, ...] | None = None

    def describes(self, module: nn.Module, features: torch.Tensor, *pooled: torch.Tensor) -> Description:
        """Return state and descriptors, by `describe` or by averaging."""
        if self.describe is not None:
            return self.describe(module, features, *pooled)
        if self.kind == 'spatial':
            return features.mean(1, keepdim=True), (features,)
        return features.mean((-2, -1)), (features,)
