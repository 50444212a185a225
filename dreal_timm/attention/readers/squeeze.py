"""Readers of modules that squeeze each channel to a number and excite: SE and its variants, ECA, SRM"""
import torch
import torch.nn.functional as F
from timm.layers.eca import CecaModule, EcaModule
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule, SqueezeExciteCl
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.hgnet import EseModule as HgnetEseModule
from timm.models.senet import SEModule as SenetSEModule
from torch import nn

from dreal_timm.layers import SrmModule

from .reader import Description, MapReader

__all__ = ['SQUEEZE', 'pointwise']


def pointwise(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A 1 x 1 convolution of maps of one position, (B, C, 1, 1): a matrix product, without a convolution's set-up."""
    if type(conv) is not nn.Conv2d or conv.kernel_size != (1, 1) or conv.groups != 1:
        return conv(x)  # one that somebody has put in the place of timm's
    return F.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)[:, :, None, None]


def _pooled(module: nn.Module, x: torch.Tensor, pooled: torch.Tensor) -> Description:
    return pooled, (pooled,)


def _pooled_by(
        module: SEModule | EffectiveSEModule,
        x: torch.Tensor,
        pooled: torch.Tensor,
) -> Description:
    return x.mean((2, 3), keepdim=True) if module.add_maxpool else pooled, (pooled,)


def _se(module: SEModule, pooled: torch.Tensor) -> torch.Tensor:
    return module.gate(pointwise(module.fc2, module.act(module.bn(pointwise(module.fc1, pooled)))))


def _effective_se(module: EffectiveSEModule, pooled: torch.Tensor) -> torch.Tensor:
    return module.gate(pointwise(module.fc, pooled))


def _hgnet(module: HgnetEseModule, pooled: torch.Tensor) -> torch.Tensor:
    return module.sigmoid(pointwise(module.conv, pooled))


def _se_channels_last(module: SqueezeExciteCl, pooled: torch.Tensor) -> torch.Tensor:
    return module.gate(module.fc2(module.act(module.fc1(pooled))))


def _squeeze_excite(module: SqueezeExcite, pooled: torch.Tensor) -> torch.Tensor:
    return module.gate(pointwise(module.conv_expand, module.act1(pointwise(module.conv_reduce, pooled))))


def _senet(module: SenetSEModule, pooled: torch.Tensor) -> torch.Tensor:
    return module.sigmoid(pointwise(module.fc2, module.relu(pointwise(module.fc1, pooled))))


def _eca(module: EcaModule, pooled: torch.Tensor) -> torch.Tensor:
    y = module.conv(pooled)
    return module.gate(y if module.conv2 is None else module.conv2(module.act(y)))


def _describe_circular(module: CecaModule, x: torch.Tensor, padded: torch.Tensor) -> Description:
    return padded[:, :, module.padding:padded.shape[2] - module.padding], (padded,)


def _circular_eca(module: CecaModule, padded: torch.Tensor) -> torch.Tensor:
    return module.gate(module.conv(padded))


def _describe_style(module: SrmModule, x: torch.Tensor, style: torch.Tensor) -> Description:
    return style[:, :, :1, None], (style,)


def _style(module: SrmModule, style: torch.Tensor) -> torch.Tensor:
    return module.style_integrate(style)


SQUEEZE: dict[type[nn.Module], MapReader] = {
    SEModule: MapReader('channel', _pooled_by, _se, source='fc1'),
    EffectiveSEModule: MapReader('channel', _pooled_by, _effective_se, source='fc'),
    HgnetEseModule: MapReader('channel', _pooled, _hgnet, gate='sigmoid', source='conv'),
    SqueezeExciteCl: MapReader('channel', _pooled, _se_channels_last, source='fc1'),
    SqueezeExcite: MapReader('channel', _pooled, _squeeze_excite, source='conv_reduce'),
    SenetSEModule: MapReader('channel', _pooled, _senet, gate='sigmoid', source='fc1'),
    EcaModule: MapReader('channel', _pooled, _eca, source='conv'),
    CecaModule: MapReader('channel', _describe_circular, _circular_eca, source='conv'),
    SrmModule: MapReader('channel', _describe_style, _style, source='style'),
}
