"""Style-based Recalibration Module (SRM)

Paper: `SRM: A Style-based Recalibration Module for Convolutional Neural Networks` - https://arxiv.org/abs/1903.10829
"""
from typing import Any

import torch
from timm.layers import create_act_layer
from torch import nn

__all__ = ['SrmModule']


class SrmModule(nn.Module):
    """Channel attention from the style (mean and standard deviation) of each channel.

    Style pooling takes the mean and the standard deviation of every channel over its positions, style integration
    turns the two numbers of a channel into one weight by a channel-wise fully connected layer (CFC), batch norm and a
    sigmoid (Eq. 7 of the DREAL paper; Eq. 1 to 5 of the SRM paper). Parameters: 2 a channel for the CFC and 2 for the
    batch norm. The batch norm needs more than one image a batch while it trains.

    The standard deviation is sqrt(unbiased variance + eps). The variance of a single position is 0.

    Args:
        channels: Number of channels C of the input.
        gate_layer: Activation that turns the integrated style into the map.
        norm_layer: Norm layer after the CFC, called with the number of channels.
        eps: Added to the variance before its square root.
    """

    def __init__(
            self,
            channels: int,
            gate_layer: str | type[nn.Module] = 'sigmoid',
            norm_layer: type[nn.Module] = nn.BatchNorm2d,
            eps: float = 1e-5,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.eps = eps
        # zero, as in the authors' code: every map starts as the constant gate(0)
        self.cfc = nn.Parameter(torch.zeros(channels, 2, **dd))
        self.bn = norm_layer(channels, **dd)
        self.gate = create_act_layer(gate_layer)
        self.style = nn.Identity()  # where the style can be read from outside

    def style_pool(self, x: torch.Tensor) -> torch.Tensor:
        """Return mean and standard deviation of each channel, (B, C, 2), of a feature map x (B, C, H, W)."""
        x = x.flatten(2)
        mean = x.mean(2, keepdim=True)
        positions = x.shape[2]
        # a mean first: the sum of squares would overflow in float16
        variance = (x - mean).square().mean(2, keepdim=True) * (positions / max(positions - 1, 1))
        return torch.cat([mean, (variance + self.eps).sqrt()], dim=2)

    def style_integrate(self, style: torch.Tensor) -> torch.Tensor:
        """Return the map (B, C, 1, 1) of a style (B, C, 2)."""
        x = (style * self.cfc).sum(2)
        attention: torch.Tensor = self.gate(self.bn(x[:, :, None, None]))
        return attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attention = self.style_integrate(self.style(self.style_pool(x)))
        # under autocast the CFC is float32 and so is its map; the features keep their type
        return x * attention.to(x.dtype)
