"""Readers of the decoupled attention of GhostNet v2 and v3

A map over channels and positions of half the resolution, repeated to the whole: sigmoid of a strip of convolutions over
the pooled input, for what the module's two branches make of that input.
"""
import torch
from timm.models.ghostnet import GhostModuleV2, GhostModuleV3

from .reader import Description, MapReader

__all__ = ['ghost', 'ghost_reparameterised']


def _describe(module: GhostModuleV2 | GhostModuleV3, x: torch.Tensor, pooled: torch.Tensor) -> Description:
    return x[:, :module.out_chs].mean((2, 3)), (pooled,)


def _evaluate(module: GhostModuleV2 | GhostModuleV3, pooled: torch.Tensor) -> torch.Tensor:
    return module.gate_fn(module.short_conv(pooled))


def _reader(*branches: str) -> MapReader:
    return MapReader(
        'full', _describe, _evaluate, gate='gate_fn', source='short_conv', features=branches,
        parameters=('short_conv',))


def ghost(module: GhostModuleV2) -> tuple[MapReader, ...]:
    return (_reader('primary_conv', 'cheap_operation'),)


def ghost_reparameterised(module: GhostModuleV3) -> tuple[MapReader, ...]:
    """Most modules of this class have no attention; branches have other names once they are merged for inference."""
    if module.mode != 'shortcut':
        return ()
    if module.infer_mode:
        return (_reader('primary_conv', 'cheap_operation'),)
    return (_reader('primary_activation', 'cheap_activation'),)
