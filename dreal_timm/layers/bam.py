"""Bottleneck Attention Module (BAM)

Paper: `BAM: Bottleneck Attention Module` - https://arxiv.org/abs/1807.06514
"""
from typing import Any

import torch
from timm.layers import create_act_layer, make_divisible
from torch import nn

__all__ = ['BamModule']


class BamModule(nn.Module):
    """Attention over channels and positions together, F' = F + F * M(F) with M(F) = sigmoid(M_c(F) + M_s(F)).

    Eq. 1 to 5 of the paper. The channel branch M_c pools each channel to its mean and passes it through a bottleneck of
    two layers and a norm. The spatial branch M_s reduces the channels by a 1 x 1 convolution, looks around by two
    dilated 3 x 3 convolutions, and reduces to one channel by another 1 x 1, with a norm. As in the authors' code, norms
    and ReLUs stand between the layers. The paper puts one module at the end of each stage but the last.

    Args:
        channels: Number of channels C of the input.
        rd_ratio: Reduced share of the channels; the paper's reduction is 16.
        rd_channels: Number of reduced channels; None derives it from `rd_ratio`.
        rd_divisor: Reduced channels are a multiple of it.
        dilation: Dilation of the 3 x 3 convolutions.
        act_layer: Activation between the layers.
        norm_layer: Norm of the spatial branch, called with the number of channels.
        gate_layer: Activation that makes the map.
    """

    def __init__(
            self,
            channels: int,
            rd_ratio: float = 1. / 16,
            rd_channels: int | None = None,
            rd_divisor: int = 1,
            dilation: int = 4,
            act_layer: type[nn.Module] = nn.ReLU,
            norm_layer: type[nn.Module] = nn.BatchNorm2d,
            gate_layer: str | type[nn.Module] = 'sigmoid',
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        reduced = rd_channels or make_divisible(channels * rd_ratio, rd_divisor, round_limit=0.)
        around: dict[str, Any] = dict(kernel_size=3, padding=dilation, dilation=dilation, **dd)
        self.channel = nn.Sequential(
            nn.Conv2d(channels, reduced, 1, **dd),
            norm_layer(reduced, **dd),
            act_layer(),
            nn.Conv2d(reduced, channels, 1, **dd),
            norm_layer(channels, **dd),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(channels, reduced, 1, **dd),
            norm_layer(reduced, **dd),
            act_layer(),
            nn.Conv2d(reduced, reduced, **around),
            norm_layer(reduced, **dd),
            act_layer(),
            nn.Conv2d(reduced, reduced, **around),
            norm_layer(reduced, **dd),
            act_layer(),
            nn.Conv2d(reduced, 1, 1, **dd),
            norm_layer(1, **dd),
        )
        self.gate = create_act_layer(gate_layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attention: torch.Tensor = self.gate(self.channel(x.mean((2, 3), keepdim=True)) + self.spatial(x))
        return x + x * attention
