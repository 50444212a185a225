"""Random layers in a counterfactual pass: the masks of the judged pass, also for some of its samples alone

The mask of a layer that multiplies its input by one (dropout, drop path, drop block) is drawn again by running the
layer on ones, from the generators' state that was saved before its call.
"""
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropBlock2d, DropPath
from torch import nn
from torch.overrides import TorchFunctionMode

from dreal_timm.replay.overrides import replaced_forward

__all__ = ['Draws', 'Rows', 'is_masking', 'record_draws', 'replay_draws', 'replay_rng', 'rng_state']

State = Mapping[str, torch.Tensor]


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of the generators that a forward pass on the device may draw from."""
    states = {'cpu': torch.get_rng_state()}
    if device.type not in ('cpu', 'meta'):
        backend = getattr(torch, device.type)
        states[device.type] = backend.get_rng_state() if device.type == 'mps' else backend.get_rng_state(device)
    return states


def _set_rng_state(states: State, device: torch.device) -> None:
    for name, state in states.items():
        if name == 'cpu':
            torch.set_rng_state(state)
        elif name == 'mps':
            torch.mps.set_rng_state(state)
        else:
            getattr(torch, name).set_rng_state(state, device)


def _same(first: State, second: State) -> bool:
    return all(torch.equal(state, second[name]) for name, state in first.items())


@contextmanager
def replay_rng(states: State, device: torch.device) -> Iterator[None]:
    """Let the generators begin at the given state; they are put back."""
    now = rng_state(device)
    try:
        _set_rng_state(states, device)
        yield
    finally:
        _set_rng_state(now, device)


def is_masking(module: nn.Module) -> bool:
    """Return whether a layer draws nothing but a mask that it multiplies its input with."""
    masks = type(module) in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, DropPath, DropBlock2d)
    return masks and not getattr(module, 'with_noise', False)


@dataclass
class _Draw:
    """One call of a random layer."""
    before: State
    after: State
    ones: Callable[[], torch.Tensor]
    draw: Callable[[torch.Tensor], torch.Tensor]
    inplace: bool = False
    mask: torch.Tensor | None = None

    def drawn(self) -> torch.Tensor:
        """The mask of the whole batch."""
        if self.mask is None:
            ones = self.ones()
            with replay_rng(self.before, ones.device):
                self.mask = self.draw(ones)
        return self.mask

    def masked(self, x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        mask = (self.drawn() if rows is None else self.drawn()[rows]).to(x.dtype)
        return x.mul_(mask) if self.inplace else x * mask


@dataclass
class Draws:
    """The calls of random layers in a forward pass.

    Attributes:
        before: State of the generators before the pass, from `rng_state`.
        after: State after it; None where it is not known.
        modules: Calls of each layer, by its name.
        functions: Calls of `torch.nn.functional.dropout` outside of layers.
    """
    before: State
    after: State | None = None
    modules: dict[str, list[_Draw]] = field(default_factory=dict)
    functions: list[_Draw] = field(default_factory=list)
    calls: list[_Draw] = field(default_factory=list)

    @property
    def none(self) -> bool:
        """Whether the pass drew nothing at all."""
        return self.after is not None and _same(self.before, self.after)

    @property
    def complete(self) -> bool:
        """Whether every number that the pass drew belongs to a call that can be repeated by itself."""
        if self.after is None or any(len(calls) > 1 for calls in self.modules.values()):
            return False
        states = [self.before, *(state for call in self.calls for state in (call.before, call.after)), self.after]
        return all(_same(*pair) for pair in zip(states[::2], states[1::2], strict=True))


def _call(
        before: State,
        x: torch.Tensor,
        draw: Callable[[torch.Tensor], torch.Tensor],
        inplace: bool = False,
) -> _Draw:
    shape, stride, dtype, device = x.shape, x.stride(), x.dtype, x.device

    def ones() -> torch.Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype, device=device).fill_(1)

    return _Draw(before, rng_state(device), ones, draw, inplace)


class _FunctionalDropout(TorchFunctionMode):
    """Give each call of `torch.nn.functional.dropout` that draws a mask to `handle(x, p, inplace, call)`."""

    def __init__(self, handle: Callable[[torch.Tensor, float, bool, Callable[[], torch.Tensor]], torch.Tensor]):
        super().__init__()
        self.handle = handle

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout and kwargs.get('training', True) and 0 < kwargs.get('p', 0.5) < 1:
            return self.handle(
                args[0], kwargs.get('p', 0.5), kwargs.get('inplace', False), lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


@contextmanager
def record_draws(model: nn.Module, device: torch.device, functional: bool = False) -> Iterator[Draws]:
    """Record the calls of random layers in the forward pass inside the context.

    Args:
        model: The model.
        device: Where it runs.
        functional: Whether functional dropout may be called outside of random layers, which is watched at some cost.
    """
    draws = Draws(rng_state(device))
    depth = 0
    state: list[State] = []

    def on_input(module: nn.Module, args: Any) -> None:
        nonlocal depth
        depth += 1
        state.append(rng_state(device))

    def on_output(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            nonlocal depth
            depth -= 1
            call = _call(state.pop(), output, module.forward, getattr(module, 'inplace', False))
            draws.modules.setdefault(name, []).append(call)
            draws.calls.append(call)
        return hook

    def on_function(x: torch.Tensor, p: float, inplace: bool, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        if depth:
            return call()
        before, output = rng_state(device), call()
        draws.functions.append(_call(before, output, lambda ones: F.dropout(ones, p), inplace))
        draws.calls.append(draws.functions[-1])
        return output

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if is_masking(module) and module.training and (getattr(module, 'p', 0) or getattr(module, 'drop_prob', 0)):
                stack.callback(module.register_forward_pre_hook(on_input).remove)
                stack.callback(module.register_forward_hook(on_output(name)).remove)
        if functional:
            stack.enter_context(_FunctionalDropout(on_function))
        yield draws
        draws.after = rng_state(device)


class Rows:
    """Which samples of the judged batch travel through the network at the moment; None are all of them."""

    def __init__(self, rows: torch.Tensor | None = None):
        self.now = rows


@contextmanager
def replay_draws(model: nn.Module, draws: Draws, rows: Rows) -> Iterator[None]:
    """Let random layers apply the masks that they drew in the judged pass, in the passes inside the context.

    Args:
        model: The model, in the mode of the judged pass.
        draws: What was recorded, complete.
        rows: Which samples travel.
    """
    functions = iter(draws.functions)

    def masked(call: _Draw) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: call.masked([*args, *kwargs.values()][0], rows.now)

    with ExitStack() as stack:
        for name, (call,) in draws.modules.items():
            stack.enter_context(replaced_forward(model.get_submodule(name), masked(call)))
        if draws.functions:
            for call in draws.calls:  # before functions are watched: a layer calls one to draw its mask
                call.drawn()
            stack.enter_context(_FunctionalDropout(lambda x, *_: next(functions).masked(x, rows.now)))
        yield
