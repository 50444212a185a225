"""Readers of CBAM, timm's light variant of it, and BAM"""
import torch
from timm.layers.cbam import ChannelAttn, LightChannelAttn, LightSpatialAttn, SpatialAttn
from torch import nn

from dreal_timm.layers import BamModule

from .reader import Description, MapReader
from .squeeze import pointwise

__all__ = ['CBAM']


def _describe_channel(module: ChannelAttn, x: torch.Tensor, avg: torch.Tensor, peak: torch.Tensor) -> Description:
    return avg, (avg, peak)


def _channel(module: ChannelAttn, avg: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    branches = pointwise(module.fc2, module.act(pointwise(module.fc1, torch.cat([avg, peak]))))
    return module.gate(sum(branches.chunk(2)))


def _describe_spatial(module: SpatialAttn, x: torch.Tensor, pooled: torch.Tensor) -> Description:
    return pooled[:, :1], (pooled,)


def _spatial(module: SpatialAttn | LightSpatialAttn, pooled: torch.Tensor) -> torch.Tensor:
    return module.gate(module.conv(pooled))


def _describe_light_channel(module: LightChannelAttn, x: torch.Tensor, pooled: torch.Tensor) -> Description:
    return x.mean((2, 3), keepdim=True), (pooled,)


def _light_channel(module: LightChannelAttn, pooled: torch.Tensor) -> torch.Tensor:
    return pointwise(module.fc2, module.act(pointwise(module.fc1, pooled))).sigmoid()


def _describe_light_spatial(module: LightSpatialAttn, x: torch.Tensor, pooled: torch.Tensor) -> Description:
    return x.mean(1, keepdim=True), (pooled,)


CBAM: dict[type[nn.Module], MapReader] = {
    ChannelAttn: MapReader('channel', _describe_channel, _channel, source='fc1'),
    SpatialAttn: MapReader('spatial', _describe_spatial, _spatial, source='conv'),
    # timm's light channel attention has a gate and never calls it
    LightChannelAttn: MapReader(
        'channel', _describe_light_channel, _light_channel, gate='fc2', source='fc1', activation=torch.sigmoid),
    LightSpatialAttn: MapReader('spatial', _describe_light_spatial, _spatial, source='conv'),
    BamModule: MapReader('full'),
}
