"""Readers of modules that pool along the height and along the width: coordinate, efficient local and strip attention"""
import torch
from timm.layers.coord_attn import CoordAttn, EfficientLocalAttn, SimpleCoordAttn, StripAttn
from torch import nn

from .reader import Description, MapReader

__all__ = ['AXES']


def _describe_coordinate(module: CoordAttn, x: torch.Tensor, pooled: torch.Tensor) -> Description:
    rows, columns = pooled[:, :, :x.shape[2]], pooled[:, :, x.shape[2]:]
    return rows.mean((2, 3)), (rows, columns)


def _coordinate(module: CoordAttn, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = module.act(module.bn1(module.conv1(torch.cat([rows, columns], dim=2))))
    return y[:, :, :rows.shape[2]], y[:, :, rows.shape[2]:].transpose(2, 3)


def _coordinate_height(module: CoordAttn, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return module.gate(module.conv_h(_coordinate(module, rows, columns)[0]))


def _coordinate_width(module: CoordAttn, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return module.gate(module.conv_w(_coordinate(module, rows, columns)[1]))


def _describe_simple(
        module: SimpleCoordAttn,
        x: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
) -> Description:
    return rows.mean(1), (rows, columns)  # (B, H, C), (B, W, C)


def _simple(module: SimpleCoordAttn, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    height = module.fc_h(module.act(module.fc1(rows))).transpose(1, 2).unsqueeze(-1)
    width = module.fc_w(module.act(module.fc1(columns))).transpose(1, 2).unsqueeze(-2)
    return module.gate(height + width)


def _describe_strip(module: nn.Module, x: torch.Tensor, *strips: torch.Tensor) -> Description:
    return strips[0].mean((2, 3)), strips


def _local_height(module: EfficientLocalAttn, rows: torch.Tensor) -> torch.Tensor:
    return module.gate(module.act(module.norm_h(module.conv_h(rows))))


def _local_width(module: EfficientLocalAttn, columns: torch.Tensor) -> torch.Tensor:
    return module.gate(module.act(module.norm_w(module.conv_w(columns))))


def _strip(module: StripAttn, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return module.gate(module.conv_h(rows) + module.conv_w(columns))


AXES: dict[type[nn.Module], tuple[MapReader, ...]] = {
    CoordAttn: (
        MapReader(
            'height', _describe_coordinate, _coordinate_height, source='conv1', part='height', call=0, calls=2,
            parameters=('conv1', 'bn1', 'act', 'conv_h')),
        MapReader(
            'width', _describe_coordinate, _coordinate_width, source='conv1', part='width', call=1, calls=2,
            parameters=('conv1', 'bn1', 'act', 'conv_w')),
    ),
    EfficientLocalAttn: (
        MapReader(
            'height', _describe_strip, _local_height, source='conv_h', part='height', call=0, calls=2,
            parameters=('conv_h', 'norm_h', 'act')),
        MapReader(
            'width', _describe_strip, _local_width, source='conv_w', part='width', call=1, calls=2,
            parameters=('conv_w', 'norm_w', 'act')),
    ),
    SimpleCoordAttn: (MapReader('full', _describe_simple, _simple, source='fc1'),),
    StripAttn: (MapReader('full', _describe_strip, _strip, source=('conv_h', 'conv_w')),),
}
