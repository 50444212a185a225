"""Readers of attention over branches: selective kernels and split attention

Their maps are softmaxes over the branches of each channel: the mean of such a map is the uniform mixture. With one
branch split attention is a sigmoid for each channel.
"""
import torch
from timm.layers.selective_kernel import SelectiveKernelAttn
from timm.layers.split_attn import SplitAttn

from .reader import Description, MapReader

__all__ = ['SELECTIVE_KERNEL', 'split_attention']


def _describe_kernels(module: SelectiveKernelAttn, x: torch.Tensor, pooled: torch.Tensor) -> Description:
    return x.mean((3, 4)), (pooled,)  # (B, P, C)


def _kernels(module: SelectiveKernelAttn, pooled: torch.Tensor) -> torch.Tensor:
    y = module.fc_select(module.act(module.bn(module.fc_reduce(pooled))))
    return y.view(len(y), module.num_paths, -1, 1, 1).softmax(dim=1)


def _describe_split(module: SplitAttn, x: torch.Tensor, pooled: torch.Tensor) -> Description:
    return x.mean((2, 3)), (pooled,)  # (B, P * C)


def _split(module: SplitAttn, pooled: torch.Tensor) -> torch.Tensor:
    return module.rsoftmax(module.fc2(module.act1(module.bn1(module.fc1(pooled)))))


SELECTIVE_KERNEL = MapReader('branch', _describe_kernels, _kernels, gate='', source='fc_reduce')


def split_attention(module: SplitAttn) -> tuple[MapReader, ...]:
    kind = 'branch' if module.radix > 1 else 'channel'
    return (MapReader(
        kind, _describe_split, _split, gate='rsoftmax', source='fc1', features='act0',
        parameters=('fc1', 'bn1', 'act1', 'fc2')),)
