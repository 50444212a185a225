"""Readers: how to read the attention map of each class of modules that is recognised

Modules are recognised by their class alone, through the table `READERS`; a subclass may compute its map another way.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.cbam import ChannelAttn, SpatialAttn
from timm.layers.squeeze_excite import SEModule
from torch import nn

from dreal_timm.layers import SrmModule

__all__ = ['READERS', 'Reader', 'register_attention']


@dataclass(frozen=True)
class Reader:
    """How to read the attention map of one class of modules.

    Attributes:
        kind: 'channel' (a map over C, (B, C, 1, 1)) or 'spatial' (a map over H x W, (B, 1, H, W)).
        describe: (module, input (B, C, H, W)) -> (state, descriptors). The state is the input averaged down to the
            map's own shape (the F~ of Eq. 2), the descriptors are the tensors that the map is computed from. The input
            comes detached; a descriptor must be a tensor that nothing changes in place later.
        evaluate: (module, *descriptors) -> map. Must equal, bit for bit, the map that the module's forward uses.
        gate: Name of the submodule whose output is the map.
    """
    kind: str
    describe: Callable[[Any, torch.Tensor], tuple[torch.Tensor, tuple[torch.Tensor, ...]]]
    evaluate: Callable[..., torch.Tensor]
    gate: str = 'gate'


def _describe_se(module: SEModule, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    state = x.mean((2, 3), keepdim=True)
    pooled = 0.5 * state + 0.5 * x.amax((2, 3), keepdim=True) if module.add_maxpool else state
    return state, (pooled,)


def _describe_cbam_channel(module: ChannelAttn, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    state = x.mean((2, 3), keepdim=True)
    return state, (state, x.amax((2, 3), keepdim=True))


def _evaluate_cbam_channel(module: ChannelAttn, avg: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    return module.gate(module.fc2(module.act(module.fc1(avg))) + module.fc2(module.act(module.fc1(peak))))


def _describe_cbam_spatial(module: SpatialAttn, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    state = x.mean(1, keepdim=True)
    return state, (torch.cat([state, x.amax(1, keepdim=True)], dim=1),)


def _describe_srm(module: SrmModule, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    style = module.style_pool(x)
    return style[:, :, :1, None], (style,)


READERS: dict[type[nn.Module], Reader] = {
    SEModule: Reader('channel', _describe_se, lambda m, x: m.gate(m.fc2(m.act(m.bn(m.fc1(x)))))),
    ChannelAttn: Reader('channel', _describe_cbam_channel, _evaluate_cbam_channel),
    SpatialAttn: Reader('spatial', _describe_cbam_spatial, lambda m, x: m.gate(m.conv(x))),
    SrmModule: Reader('channel', _describe_srm, lambda m, style: m.style_integrate(style)),
}


def register_attention(cls: type[nn.Module], reader: Reader) -> None:
    """Make `find_sites` recognise a class of attention modules (that class itself, not its subclasses).

    Raises:
        ValueError: The class has a reader already, or the reader's kind is unknown.
    """
    if cls in READERS:
        raise ValueError(f'{cls.__name__} has a reader already.')
    if reader.kind not in ('channel', 'spatial'):
        raise ValueError(f"Unknown kind '{reader.kind}' of attention map, expected 'channel' or 'spatial'.")
    READERS[cls] = reader
