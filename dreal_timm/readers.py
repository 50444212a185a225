"""Readers: how to read the attention map of each class of modules that is recognised

Modules are recognised by their class alone, through the table `READERS`; a subclass may compute its map another way.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers.cbam import ChannelAttn, SpatialAttn
from timm.layers.squeeze_excite import SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn

from dreal_timm.layers import SrmModule

__all__ = ['READERS', 'Reader', 'register_attention']


@dataclass(frozen=True)
class Reader:
    """How to read the attention map of one class of modules.

    Attributes:
        kind: 'channel' (a map over C, (B, C, 1, 1)) or 'spatial' (a map over H x W, (B, 1, H, W)).
        describe: (module, input (B, C, H, W), *pooled) -> (state, descriptors). The state is the input averaged down
            to the map's own shape (the F~ of Eq. 2), the descriptors are the tensors that the map is computed from.
            All tensors come detached; a descriptor must be a tensor that nothing changes in place later.
        evaluate: (module, *descriptors) -> map. Must equal the map that the module's forward uses, but for rounding;
            the gradients of its parameters are those of this function.
        gate: Name of the submodule whose output is the map.
        source: Name of the submodule that is called with what the module pooled from its input: `pooled` are the first
            arguments of its calls, so that the feature map need not be read again. None: nothing is pooled yet, and
            `describe` is called with module and input alone.
    """
    kind: str
    describe: Callable[..., tuple[torch.Tensor, tuple[torch.Tensor, ...]]]
    evaluate: Callable[..., torch.Tensor]
    gate: str = 'gate'
    source: str | None = None


Description = tuple[torch.Tensor, tuple[torch.Tensor, ...]]


def _pointwise(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A 1 x 1 convolution of maps of one position, (B, C, 1, 1): a matrix product, without a convolution's set-up."""
    if type(conv) is not nn.Conv2d or conv.kernel_size != (1, 1) or conv.groups != 1:
        return conv(x)  # one that somebody has put in the place of timm's
    return F.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)[:, :, None, None]


def _evaluate_se(module: SEModule, pooled: torch.Tensor) -> torch.Tensor:
    return module.gate(_pointwise(module.fc2, module.act(module.bn(_pointwise(module.fc1, pooled)))))


def _evaluate_squeeze_excite(module: SqueezeExcite, pooled: torch.Tensor) -> torch.Tensor:
    return module.gate(_pointwise(module.conv_expand, module.act1(_pointwise(module.conv_reduce, pooled))))


def _describe_se(module: SEModule, x: torch.Tensor, pooled: torch.Tensor) -> Description:
    return x.mean((2, 3), keepdim=True) if module.add_maxpool else pooled, (pooled,)


def _describe_squeeze_excite(module: SqueezeExcite, x: torch.Tensor, pooled: torch.Tensor) -> Description:
    return pooled, (pooled,)


def _describe_cbam_channel(
        module: ChannelAttn,
        x: torch.Tensor,
        avg: torch.Tensor,
        peak: torch.Tensor,
) -> Description:
    return avg, (avg, peak)


def _evaluate_cbam_channel(module: ChannelAttn, avg: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    branches = _pointwise(module.fc2, module.act(_pointwise(module.fc1, torch.cat([avg, peak]))))
    return module.gate(sum(branches.chunk(2)))


def _describe_cbam_spatial(module: SpatialAttn, x: torch.Tensor, pooled: torch.Tensor) -> Description:
    return pooled[:, :1], (pooled,)


def _describe_srm(module: SrmModule, x: torch.Tensor, style: torch.Tensor) -> Description:
    return style[:, :, :1, None], (style,)


READERS: dict[type[nn.Module], Reader] = {
    SEModule: Reader('channel', _describe_se, _evaluate_se, source='fc1'),
    SqueezeExcite: Reader(
        'channel', _describe_squeeze_excite, _evaluate_squeeze_excite, source='conv_reduce'),
    ChannelAttn: Reader('channel', _describe_cbam_channel, _evaluate_cbam_channel, source='fc1'),
    SpatialAttn: Reader('spatial', _describe_cbam_spatial, lambda m, x: m.gate(m.conv(x)), source='conv'),
    SrmModule: Reader('channel', _describe_srm, lambda m, style: m.style_integrate(style), source='style'),
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
