"""Overrides: what is changed in a network for a while, and given back whatever happens"""
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = [
    'Hooks', 'forward_hooks', 'hooks_of', 'module_flags', 'replaced_forward', 'scratch_buffers', 'weights_on_meta']

Hooks = Mapping[str, Mapping[str, Mapping[int, Callable[..., Any]]]]
_HOOKS = ('_forward_pre_hooks', '_forward_hooks')


@contextmanager
def module_flags(model: nn.Module, **flags: bool) -> Iterator[None]:
    """Set flags (`training`, `grad_checkpointing`) of all modules that have them; each gets its own back."""
    own = [(m, name, m.__dict__[name]) for m in model.modules() for name in flags if name in m.__dict__]
    try:
        for module, name, _ in own:
            setattr(module, name, flags[name])
        yield
    finally:
        for module, name, flag in own:
            setattr(module, name, flag)


@contextmanager
def scratch_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let the modules (not their children) write to copies of their buffers, and give them the originals back.

    The tensors are swapped, not written back: autograd may have saved the originals for a backward pass to come.
    """
    saved = [(m, name, buffer) for m in modules for name, buffer in m._buffers.items() if buffer is not None]
    try:
        for module, name, buffer in saved:
            module._buffers[name] = buffer.clone()
        yield
    finally:
        for module, name, buffer in saved:
            module._buffers[name] = buffer


@contextmanager
def weights_on_meta(model: nn.Module) -> Iterator[None]:
    """Let the parameters and buffers be on the meta device for a while, without a copy; tied ones stay tied.

    `torch.func.functional_call` does not give a module that stands under two names its own tensors back.
    """
    moved: dict[int, torch.Tensor] = {}
    saved: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (tensors, dict(tensors)) for m in model.modules() for tensors in (m._parameters, m._buffers)]
    try:
        for tensors, own in saved:
            for name, tensor in own.items():
                if tensor is not None:
                    tensors[name] = moved.setdefault(id(tensor), tensor.to('meta'))
        yield
    finally:
        for tensors, own in saved:
            tensors.clear()  # a module may have made a buffer meanwhile
            tensors.update(own)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else for a while."""
    own = module.__dict__.get('forward')
    try:
        module.forward = forward
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def hooks_of(model: nn.Module) -> Hooks:
    """Return a copy of the lists of forward hooks of all modules, by the modules' names."""
    return {name: {hooks: OrderedDict(m.__dict__[hooks]) for hooks in _HOOKS} for name, m in model.named_modules()}


@contextmanager
def forward_hooks(model: nn.Module, hooks: Hooks) -> Iterator[None]:
    """Let modules have the forward hooks of then (`hooks_of`), and none that came later."""
    own = [(m, {name: m.__dict__[name] for name in _HOOKS}) for m in model.modules()]
    try:
        for name, module in model.named_modules():
            module.__dict__.update({key: OrderedDict(value) for key, value in hooks.get(name, {}).items()})
        yield
    finally:
        for module, lists in own:
            module.__dict__.update(lists)
