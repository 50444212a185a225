"""Attention sites: where a network computes attention maps

A *site* is one call of a map-producing gate (A in the paper, Sec. 3.1). This file knows no critic and no reward.
"""
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import nn

from dreal_timm.attention.gates import on_map
from dreal_timm.attention.readers import MapReader, map_size, readers_of
from dreal_timm.replay.overrides import module_flags, weights_on_meta

__all__ = ['Group', 'Site', 'attention_parameters', 'find_sites', 'group_sites', 'on_meta', 'site_reader', 'sites_of']


@dataclass(frozen=True)
class Site:
    """One call of a map-producing gate.

    Attributes:
        name: Dotted path of its module in the model; where a module has several sites, followed by a colon and a part.
        kind: What the map has a weight for, see `dreal_timm.attention.readers.KINDS`.
        stage: Dotted path of the stage that the site belongs to.
        size: Size of the map: (C,), (H, W) of a spatial one, (C, H), (C, W) or (C, H, W).
    """
    name: str
    kind: str
    stage: str
    size: tuple[int, ...]

    @property
    def module(self) -> str:
        """Dotted path of the module that owns the gate, in the model."""
        return self.name.partition(':')[0]


@dataclass(frozen=True)
class Group:
    """The sites of one stage and one kind, in depth order, all with maps of one size: one critic judges them."""
    name: str
    stage: str
    kind: str
    size: tuple[int, ...]
    sites: tuple[Site, ...]

    @property
    def judged_size(self) -> tuple[int, ...]:
        """Size of the maps that the critic reads: (H, W) of spatial maps, else (C,), averaged over what follows."""
        return self.size if self.kind == 'spatial' else self.size[:1]


def sites_of(groups: Sequence[Group]) -> list[Site]:
    """Return the sites of all groups, group after group: the columns of what the critics return."""
    return [site for group in groups for site in group.sites]


def site_reader(model: nn.Module, site: Site) -> tuple[nn.Module, MapReader]:
    """Return the module of a site and the reader of its map."""
    module = model.get_submodule(site.module)
    part = site.name.partition(':')[2]
    return module, next(reader for reader in readers_of(module) if reader.part == part)


def on_meta(model: nn.Module, input_size: Sequence[int], images: int = 2) -> None:
    """Run the model once on the meta device; random numbers that it draws elsewhere leave no trace."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)), weights_on_meta(model):
        model(torch.empty(images, *input_size, dtype=dtype, device='meta'))


@dataclass
class _Trace:
    """What happened in one run of a model.

    Attributes:
        maps: Name of the site, reader and shape of the map, of every call of a gate that makes one.
        events: Names of the sites when their map is made, and of the modules in `feature_info` when they are done.
    """
    maps: list[tuple[str, MapReader, torch.Size]]
    events: list[str]

    def on_map(self, name: str, reader: MapReader) -> Callable[[torch.Tensor], None]:
        def seen(attention: torch.Tensor) -> None:
            self.maps.append((name, reader, attention.shape))
            self.events.append(name)
        return seen

    def on_feature(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.events.append(name)
        return hook


def _trace(model: nn.Module, input_size: Sequence[int]) -> _Trace:
    """Run the model once on the meta device, without a copy and without a trace."""
    trace = _Trace([], [])
    feature_info = getattr(model, 'feature_info', None) or []
    features = [info['module'] for info in feature_info if info.get('module')]
    known = dict(model.named_modules())
    with ExitStack() as stack:
        stack.enter_context(module_flags(model, training=False, grad_checkpointing=False))
        for name, module in known.items():
            for reader in readers_of(module):
                site = f'{name}:{reader.part}' if reader.part else name
                stack.enter_context(on_map(module, reader, trace.on_map(site, reader)))
        for name in features:
            if name in known:
                stack.callback(known[name].register_forward_hook(trace.on_feature(name)).remove)
        stack.enter_context(torch.no_grad())
        on_meta(model, input_size)
    return trace


def find_sites(model: nn.Module, input_size: Sequence[int] | None = None) -> list[Site]:
    """List the attention sites of a model in the order in which a forward pass reaches them.

    The model is run once on the meta device: nothing is computed and nothing in the model changes. The stage of a site
    is the entry of `feature_info` that is done first after the site was called, or the site's top-level module where a
    model has no `feature_info`. A spatial map of a single position is no site.

    Args:
        model: A timm model, or any model that takes one image tensor.
        input_size: (C, H, W) of the images, which sizes spatial maps. None takes it from a timm model's config.

    Raises:
        ValueError: No `input_size` is given and the model is none of timm's, or a gate is called more than once.
    """
    if input_size is None:
        if not hasattr(model, 'pretrained_cfg'):
            raise ValueError(f'{type(model).__name__} is not a timm model: pass input_size=(C, H, W).')
        input_size = get_model_input_config(model)['input_size']
    if len(input_size) != 3:
        raise ValueError(f'input_size must be (C, H, W), got {tuple(input_size)}.')
    if not any(readers_of(module) for module in model.modules()):
        return []

    trace = _trace(model, input_size)
    sites = []
    names = {name for name, _, _ in trace.maps}
    for name, reader, shape in trace.maps:
        if (calls := trace.events.count(name)) > 1:
            raise ValueError(f'The gate of {name} is called {calls} times in one forward pass.')
        size = map_size(reader.kind, shape)
        if reader.kind == 'spatial' and size == (1, 1):
            continue
        later = trace.events[trace.events.index(name):]
        stage = next((event for event in later if event not in names), name.partition(':')[0].split('.')[0])
        sites.append(Site(name, reader.kind, stage, size))
    return sites


def group_sites(sites: Sequence[Site]) -> list[Group]:
    """Group sites by stage, kind and map size, in the order of first appearance (Sec. 3.2: a critic for each stage,
    and two of them where spatial and channel attention coexist)."""
    members: dict[tuple[str, str, tuple[int, ...]], list[Site]] = {}
    for site in sites:
        members.setdefault((site.stage, site.kind, site.size), []).append(site)
    several = [key[:2] for key in members]
    groups = []
    for (stage, kind, size), group in members.items():
        name = f'{stage}_{kind}'.replace('.', '_')
        if several.count((stage, kind)) > 1:
            name += '_' + 'x'.join(map(str, size))
        groups.append(Group(name, stage, kind, size, tuple(group)))
    return groups


def attention_parameters(model: nn.Module, sites: Sequence[Site]) -> dict[str, nn.Parameter]:
    """Return the attention parameters (theta in the paper) of the sites by their name in the model."""
    found = {}
    for site in sites:
        module, reader = site_reader(model, site)
        for name, parameter in module.named_parameters():
            if reader.parameters is None or name.split('.')[0] in reader.parameters:
                found[f'{site.module}.{name}'] = parameter
    return found
