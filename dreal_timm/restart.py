"""Restarting a forward pass at an attention site: what of the network need not run again, and what must be kept for it

The network is run once on the meta device, and every operation on every storage is written down. A pass can begin at a
site where all that is read after it, and was computed before it, is the input of a module that contains the site (the
shortcut of a residual block, say). That holds wherever blocks run one after the other.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dreal_timm.attention import Site, on_meta
from dreal_timm.capture import bypass
from dreal_timm.draws import is_masking
from dreal_timm.overrides import module_flags, replaced_forward

__all__ = ['Flow', 'Restart', 'keep_inputs', 'restarted', 'select', 'skipped', 'trace_flow']


@dataclass(frozen=True)
class Restart:
    """How a forward pass can begin at a site.

    Attributes:
        site: The site.
        join: Name of the outermost module whose own input is needed, or of the site itself: a pass enters it.
        inputs: Names of the modules, from `join` down to the site, whose inputs are needed.
        outside: Names of the modules before `join`, which are skipped.
        inside: Names of the modules in `join` and before the site, which are skipped.
    """
    site: Site
    join: str
    inputs: tuple[str, ...]
    outside: tuple[str, ...]
    inside: tuple[str, ...]

    def within(self) -> 'Restart':
        """Return how a pass can begin where `join` does, which needs no other input to be kept."""
        return Restart(self.site, self.join, (self.join,), self.outside, ())


@dataclass(frozen=True)
class Flow:
    """What the trace of a network told.

    Attributes:
        restarts: How a pass can begin at each site, by its name; None where it must begin with the image.
        functional: Whether numbers are drawn outside of the layers that `is_masking` knows, and only after the last
            site.
    """
    restarts: Mapping[str, Restart | None]
    functional: bool


@dataclass
class _Call:
    """One call of a module: when it began and ended, where in the stack, and the storage of its first argument."""
    name: str
    stack: tuple['_Call', ...]
    enter: int
    input: int | None
    exit: int = -1
    output: int | None = None


@dataclass
class _Log(TorchDispatchMode):
    """Write down when each storage is made, read and written, and when random numbers are drawn."""
    clock: int = 0
    born: dict[int, int] = field(default_factory=dict)
    reads: dict[int, int] = field(default_factory=dict)  # the last one
    writes: dict[int, int] = field(default_factory=dict)  # the last one
    draws: list[tuple[int, bool]] = field(default_factory=list)  # when, and whether outside of a masking layer
    masking: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._alive: list[Any] = []  # storages are told apart by their address

    def key(self, tensor: Any) -> int | None:
        return tensor.untyped_storage()._cdata if isinstance(tensor, torch.Tensor) else None

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        now = self.tick()
        for tensor in tree_leaves((args, kwargs)):
            if (key := self.key(tensor)) is not None:
                self.reads[key] = now
        output = func(*args, **kwargs)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    if (key := self.key(tensor)) is not None:
                        self.writes[key] = now
        for tensor in tree_leaves(output):
            if (key := self.key(tensor)) is not None and key not in self.reads:
                self.born.setdefault(key, now)
        self._alive.append(output)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.draws.append((now, not self.masking))
        return output


def trace_flow(model: nn.Module, sites: Sequence[Site], input_size: Sequence[int]) -> Flow:
    """Find out where a forward pass can begin.

    The model runs on the meta device in training mode: nothing is computed and nothing in the model changes.

    Args:
        model: The model.
        sites: Its sites.
        input_size: (C, H, W) of the images.
    """
    log = _Log()
    calls: list[_Call] = []
    stack: list[_Call] = []

    def on_input(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            call = _Call(name, tuple(stack), log.tick(), log.key(args[0]) if args else None)
            log.masking += is_masking(module)
            calls.append(call)
            stack.append(call)
        return hook

    def on_output(module: nn.Module, args: Any, output: Any) -> None:
        call = stack.pop()
        log.masking -= is_masking(module)
        call.exit, call.output = log.tick(), log.key(output)

    with ExitStack() as context:
        context.enter_context(module_flags(model, training=True, grad_checkpointing=False))
        for name, module in model.named_modules():
            context.callback(module.register_forward_pre_hook(on_input(name)).remove)
            context.callback(module.register_forward_hook(on_output).remove)
        context.enter_context(torch.no_grad())
        context.enter_context(log)
        on_meta(model, input_size)
    begin = calls[0].enter
    log.born = {key: born for key, born in log.born.items() if born > begin or key == calls[0].input}  # no weights
    restarts = {site.name: _restart(site, calls, log) for site in sites}
    last = max((call.exit for call in calls if call.name in restarts), default=0)
    outside = [now for now, functional in log.draws if functional]
    return Flow(restarts, bool(outside) and min(outside) > last)


def _restart(site: Site, calls: Sequence[_Call], log: _Log) -> Restart | None:
    """How to begin at a site, or None."""
    call = next(c for c in calls if c.name == site.name)
    ancestors = [c for c in call.stack if c.name]
    counts: dict[str, int] = {}
    for c in calls:
        counts[c.name] = counts.get(c.name, 0) + 1
    if any(counts[c.name] > 1 for c in (call, *ancestors)) or call.input is None or call.output is None:
        return None
    before = [c for c in calls if c.stack and c.stack[-1] in call.stack and c.exit < call.enter]
    if any(c.input is None or c.output is None for c in before):
        return None
    after = {c.name for c in calls if c.enter > call.exit}
    if after & {c.name for c in before}:
        return None
    inputs = {site.name}
    for key, born in log.born.items():
        read = log.reads.get(key, -1)
        if read <= call.exit:
            continue
        if call.enter < born < call.exit and key != call.output:
            return None  # something of the attention module beside its output
        if born < call.enter:
            owner = next((c for c in reversed(ancestors) if c.input == key and c.exit > read), None)
            if owner is None:
                return None
            inputs.add(owner.name)
    needed = [c for c in (*ancestors, call) if c.name in inputs]
    if any(log.writes.get(c.input or 0, -1) > call.enter for c in needed):
        return None  # what is kept would not last
    join = needed[0]
    inside = [c.name for c in before if join in c.stack]
    outside = [c.name for c in before if join not in c.stack]
    return Restart(site, join.name, tuple(c.name for c in needed), tuple(outside), tuple(inside))


@contextmanager
def keep_inputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Keep the inputs of some modules in the forward pass inside the context, without a graph and without a copy."""
    kept: dict[str, torch.Tensor] = {}

    def on_input(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            kept[name] = args[0].detach()
        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(on_input(name)).remove)
        yield kept


def _first_argument(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


def select(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Return some samples of a batch; None are all of them."""
    return x if rows is None else x[rows]


@contextmanager
def skipped(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let modules return their first argument as it is."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(replaced_forward(model.get_submodule(name), _first_argument))
        yield


@contextmanager
def restarted(
        model: nn.Module,
        restart: Restart,
        kept: Mapping[str, torch.Tensor],
        rows: torch.Tensor | None,
        null: bool = False,
) -> Iterator[torch.Tensor]:
    """Let a call of the module `restart.join` begin at the site, with its map replaced by its mean.

    Args:
        model: The model.
        restart: How to begin.
        kept: Inputs of the judged pass, from `keep_inputs`.
        rows: Samples of the judged batch; None are all of them.
        null: Leave the map as it is.

    Yields:
        The input to call that module with.
    """

    def on_input(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return select(kept[name], rows), *args[1:]
        return hook

    with ExitStack() as stack:
        stack.enter_context(skipped(model, restart.inside))
        for name in restart.inputs[1:]:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(on_input(name)).remove)
        stack.enter_context(bypass(model, [] if null else [restart.site]))
        yield select(kept[restart.join], rows)
