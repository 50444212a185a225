"""Readers of modules whose map depends on how they were built: global context and gather-excite"""
from timm.layers.gather_excite import GatherExcite
from timm.layers.global_context import GlobalContext

from .reader import MapReader

__all__ = ['gather_excite', 'global_context']


def global_context(module: GlobalContext) -> tuple[MapReader, ...]:
    """The map is what the features are multiplied by, or, where nothing is multiplied, what is added to them."""
    if module.mlp_scale is not None:
        return (MapReader('channel', parameters=('conv_attn', 'mlp_scale')),)
    if module.mlp_add is not None:
        return (MapReader('channel', gate='mlp_add'),)
    return ()


def gather_excite(module: GatherExcite) -> tuple[MapReader, ...]:
    """A weight for each channel where all positions are gathered, else for each position too."""
    return (MapReader('channel' if module.extent == 0 else 'full'),)
