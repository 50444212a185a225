"""The table of the classes whose attention maps can be read

Modules are recognised by their class alone; a subclass may compute its map another way.
"""
from collections.abc import Callable
from typing import Any

from timm.layers.activations import HardSigmoid, Sigmoid
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.gather_excite import GatherExcite
from timm.layers.global_context import GlobalContext
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer
from timm.layers.non_local_attn import BatNonLocalAttn, NonLocalAttn
from timm.layers.selective_kernel import SelectiveKernelAttn
from timm.layers.split_attn import SplitAttn
from timm.models.ghostnet import GhostModuleV2, GhostModuleV3
from timm.models.iformer import SHMA
from torch import nn

from .axes import AXES
from .branches import SELECTIVE_KERNEL, split_attention
from .cbam import CBAM
from .context import gather_excite, global_context
from .ghost import ghost, ghost_reparameterised
from .reader import KINDS, MapReader
from .squeeze import SQUEEZE

__all__ = ['READERS', 'WITHOUT_MAP', 'readers_of', 'register_attention', 'unread', 'without_sites']

READERS: dict[type[nn.Module], tuple[MapReader, ...] | Callable[[Any], tuple[MapReader, ...]]] = {
    **{cls: (reader,) for cls, reader in {**SQUEEZE, **CBAM}.items()},
    **AXES,
    GatherExcite: gather_excite,
    GhostModuleV2: ghost,
    GhostModuleV3: ghost_reparameterised,
    GlobalContext: global_context,
    SelectiveKernelAttn: (SELECTIVE_KERNEL,),
    SplitAttn: split_attention,
}

# what modules of attention, in timm and elsewhere, call what makes their maps
_GATES = ('gate', 'gate_fn', 'gate_act', 'sigmoid')
_SIGMOIDS = (nn.Sigmoid, nn.Hardsigmoid, Sigmoid, HardSigmoid)
_RELATION = 'its weights relate positions to each other: they are no map over the features that it gates'
WITHOUT_MAP: dict[type[nn.Module], str] = {
    NonLocalAttn: _RELATION,
    BatNonLocalAttn: _RELATION,
    BottleneckAttn: _RELATION,
    HaloAttn: _RELATION,
    LambdaLayer: _RELATION,
    SHMA: 'one sigmoid makes its gate and the values of the self-attention that is gated: no output is the map alone',
}


def readers_of(module: nn.Module) -> tuple[MapReader, ...]:
    """Return the readers of a module, one for each of its maps; none where its class is unknown."""
    readers = READERS.get(type(module), ())
    return readers(module) if callable(readers) else readers


def unread(model: nn.Module) -> dict[str, str]:
    """Return why modules of a model that look like attention have no map that is read, by the name of their class."""
    reasons = {}
    for module in model.modules():
        cls = type(module)
        if cls in WITHOUT_MAP:
            reasons[cls.__name__] = WITHOUT_MAP[cls]
        elif cls not in READERS and isinstance(module, tuple(READERS)):
            base = next(base for base in cls.__mro__ if base in READERS)
            reasons[cls.__name__] = f'a subclass of {base.__name__} may compute its map another way; register it'
        elif cls not in READERS and any(isinstance(getattr(module, name, None), _SIGMOIDS) for name in _GATES):
            reasons[cls.__name__] = 'its class is unknown; register it if the output of its gate is a map'
    return reasons


def without_sites(model: nn.Module) -> str:
    """Return why a model has no attention site, as far as that is known, and what can be done."""
    text = (
        f'{type(model).__name__} has no attention site: no module of it makes a map that weighs its features, as SE, '
        'ECA, CBAM and SRM do (self-attention makes none). '
    )
    for name, reason in unread(model).items():
        text += f'{name} is none: {reason}. '
    return text + (
        "Networks such as seresnet50 and those of timm.list_models('dreal_*') have some, a ResNet takes some by "
        "block_args={'attn_layer': 'se'}, dreal_timm.find_sites(model) tells of any, and "
        'dreal_timm.register_attention() adds a class of modules.'
    )


def register_attention(cls: type[nn.Module], *readers: MapReader) -> None:
    """Make `find_sites` recognise a class of attention modules (that class itself, not its subclasses).

    Args:
        cls: The class.
        *readers: One for each of its maps.

    Raises:
        ValueError: The class has readers already, none is given, a kind is unknown, or two parts have one name.
    """
    if cls in READERS:
        raise ValueError(f'{cls.__name__} has a reader already.')
    if not readers:
        raise ValueError(f'register_attention({cls.__name__}) needs a reader.')
    for reader in readers:
        if reader.kind not in KINDS:
            raise ValueError(f"Unknown kind '{reader.kind}' of attention map, expected one of {list(KINDS)}.")
    if len({reader.part for reader in readers}) < len(readers):
        raise ValueError(f'The readers of {cls.__name__} need a `part` each, to tell their sites apart.')
    READERS[cls] = readers
