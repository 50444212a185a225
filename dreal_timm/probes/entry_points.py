"""Where a forward pass can begin: the network is run once on the meta device, and every operation is written down

A pass can begin at a call of a module if all that is read after its begin, and was computed before it, is the first
argument of that call or of one that contains it (the shortcut of a residual block, say), and nothing that is computed
in front of it outside of modules has to be skipped. That holds wherever blocks run one after the other.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dreal_timm.attention.sites import Site, on_meta
from dreal_timm.probes.restart import Restart, restarted, skipped
from dreal_timm.replay.overrides import Hooks, forward_hooks, hooks_of, module_flags, replaced_forward
from dreal_timm.replay.random_masks import is_masking

__all__ = ['Flow', 'trace_flow']

_IMAGES, _FEWER = 5, 3  # of the trace, and of the pass that checks a restart


@dataclass(frozen=True)
class Flow:
    """Where counterfactual passes can begin, from the trace of a network.

    Attributes:
        restarts: How a pass can begin at each site, by its name; None where it must begin with the image.
        functional: Whether numbers are drawn outside of the layers that `is_masking` knows, and only behind all blocks
            where passes begin.
        per_sample: Whether all masks have one row a sample.
    """
    restarts: Mapping[str, Restart | None]
    functional: bool
    per_sample: bool


class _Checked(Mapping[str, Restart | None]):
    """How a pass can begin at each site; tried out on the meta device when a site is first looked up."""

    def __init__(self, plans: Mapping[str, Restart | None], works: Callable[[Restart], bool]):
        self._plans = dict(plans)
        self._works = works
        self._tried: set[str] = set()

    def __getitem__(self, name: str) -> Restart | None:
        plan = self._plans[name]
        if plan is not None and name not in self._tried:
            self._tried.add(name)
            self._plans[name] = plan if self._works(plan) else None
        return self._plans[name]

    def __getstate__(self) -> dict[str, Any]:
        plans = {name: self[name] for name in self._plans}  # a copy has nothing left to try
        return {'_plans': plans, '_tried': set(plans), '_works': None}

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)


@dataclass(eq=False)
class _Call:
    """One call of a module.

    Attributes:
        module: The module.
        name: Its name.
        stack: Calls that this one is made in, the network's own first.
        enter: When it began.
        input: Storage of its first argument, None where that is no tensor.
        shape: Shape of its first argument.
        whole: Whether the first argument is all of its storage.
        others: Storages of its other arguments.
        inline: When it first computed something itself, outside of modules that it calls.
        exit: When it ended.
        output: Storage of what it returned, None where that is no tensor.
        returned: Shape of what it returned.
    """
    module: nn.Module
    name: str
    stack: tuple['_Call', ...]
    enter: int
    input: int | None = None
    shape: tuple[int, ...] = ()
    whole: bool = False
    others: frozenset[int] = frozenset()
    inline: float = float('inf')
    exit: int = -1
    output: int | None = None
    returned: tuple[int, ...] = ()

    def owns(self, key: int, read: int) -> bool:
        """Return whether this call's first argument is the only source of that storage at time `read`."""
        return self.input == key and self.whole and key not in self.others and self.exit > read


def _key(tensor: Any) -> int | None:
    return tensor.untyped_storage()._cdata if isinstance(tensor, torch.Tensor) else None


def _keys(values: Any) -> set[int]:
    return {key for value in tree_leaves(values) if (key := _key(value)) is not None}


@dataclass
class _Log(TorchDispatchMode):
    """Write down when each storage is made, read and written, when modules are called, and what is random."""
    clock: int = 0
    born: dict[int, int] = field(default_factory=dict)
    reads: dict[int, int] = field(default_factory=dict)  # the last one
    writes: dict[int, int] = field(default_factory=dict)  # the last one
    draws: list[tuple[int, bool]] = field(default_factory=list)  # outside of masking layers; whether one row a sample
    calls: list[_Call] = field(default_factory=list)
    stack: list[_Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._alive: list[Any] = []  # storages are identified by their address

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.native_batch_norm.default and args[0].is_meta:
            # of which PyTorch computes each step there, for milliseconds
            output: Any = (torch.empty_like(args[0]), *(args[0].new_empty(args[0].shape[1]) for _ in range(2)))
        else:
            output = func(*args, **kwargs)
        self._alive.append(output)
        if not self.stack:
            return output
        now, call = self.tick(), self.stack[-1]
        call.inline = min(call.inline, now)
        read = _keys((args, kwargs))
        self.reads.update(dict.fromkeys(read, now))
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                self.writes.update(dict.fromkeys(_keys(value), now))
        for key in _keys(output) - read:
            self.born.setdefault(key, now)
        if torch.Tag.nondeterministic_seeded in func.tags and not any(is_masking(c.module) for c in self.stack):
            shape = output.shape if isinstance(output, torch.Tensor) else ()
            self.draws.append((now, shape[:1] == (_IMAGES,)))
        return output

    def on_input(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = _Call(module, name, tuple(self.stack), self.tick())
            if args and isinstance(args[0], torch.Tensor):
                first = args[0]
                call.input, call.shape = _key(first), tuple(first.shape)
                call.whole = first.numel() * first.element_size() == first.untyped_storage().nbytes()
            call.others = frozenset(_keys((args[1:], kwargs)))
            self.calls.append(call)
            self.stack.append(call)
        return hook

    def on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self.stack.pop()
        call.exit, call.output = self.tick(), _key(output)
        call.returned = tuple(output.shape) if isinstance(output, torch.Tensor) else ()


def _trace(model: nn.Module, run: Callable[[], None]) -> _Log:
    log = _Log()
    with ExitStack() as context:
        context.enter_context(module_flags(model, training=True, grad_checkpointing=False))
        for name, module in model.named_modules():
            context.callback(module.register_forward_pre_hook(log.on_input(name), with_kwargs=True).remove)
            context.callback(module.register_forward_hook(log.on_output).remove)
        context.enter_context(torch.no_grad())
        context.enter_context(log)
        run()
    return log


def trace_flow(model: nn.Module, sites: Sequence[Site], input_size: Sequence[int]) -> Flow:
    """Find out where a forward pass can begin.

    The model runs on the meta device in training mode: nothing is computed and nothing in the model changes.

    Args:
        model: The model.
        sites: Its sites.
        input_size: (C, H, W) of the images.
    """
    log = _trace(model, lambda: on_meta(model, input_size, _IMAGES))
    if log.calls[0].input is not None:
        log.born[log.calls[0].input] = 0
    counts: dict[nn.Module, int] = {}
    for call in log.calls:
        counts[call.module] = counts.get(call.module, 0) + 1
    replayed = [m for m in counts if isinstance(m, _BatchNorm) or is_masking(m)]
    masking = [c for c in log.calls if is_masking(c.module)]
    plans: dict[str, Restart | None] = dict.fromkeys(site.name for site in sites)
    last = 0
    # what was recorded of a layer is identified by its place in the order of its calls, which a restart would change
    for site in sites if all(counts[module] == 1 for module in replayed) else ():
        call = next(c for c in log.calls if c.name == site.module)
        entries = (_enter(site, entry, log, counts) for entry in (call, *reversed(call.stack[1:])))
        found = plans[site.name] = next((restart for restart in entries if restart is not None), None)
        if found is not None:
            last = max(last, next(c.exit for c in log.calls if c.name == found.join))
    owners = {site.module for site in sites}
    last = max([last, *(call.exit for call in log.calls if call.name in owners)])
    per_sample = all(c.shape[:1] == (_IMAGES,) for c in masking) and all(rows for _, rows in log.draws)
    hooks = hooks_of(model)
    restarts = _Checked(plans, lambda restart: _works(model, restart, log, hooks, input_size))
    return Flow(restarts, bool(log.draws) and min(now for now, _ in log.draws) > last, per_sample)


def _enter(site: Site, call: _Call, log: _Log, counts: Mapping[nn.Module, int]) -> Restart | None:
    """How a pass can begin at a call that is, or contains, that of the site; None where it cannot."""
    ancestors = call.stack[1:]
    if any(counts[c.module] > 1 for c in (call, *ancestors)) or call.input is None or call.output is None:
        return None
    if any(c.inline < call.enter for c in call.stack):
        return None
    before = [c for c in log.calls if c.stack and c.stack[-1] in call.stack and c.exit < call.enter]
    if any(c.input is None or c.output is None for c in before):
        return None
    if {c.module for c in before} & {c.module for c in log.calls if c.enter > call.enter}:
        return None
    needed = {call}
    for key, born in log.born.items():
        read = log.reads.get(key, -1)
        if call.enter < born < call.exit < read and key != call.output:
            return None  # something that it made beside its output
        if born < call.enter < read and not call.owns(key, read):
            owner = next((c for c in reversed(ancestors) if c.owns(key, read)), None)
            if owner is None:
                return None
            needed.add(owner)
    if any(log.writes.get(c.input or 0, -1) > c.enter for c in needed):
        return None  # what is kept would not last
    inputs = [c for c in (*ancestors, call) if c in needed]
    join = inputs[0]
    inside = tuple(c.name for c in before if join in c.stack)
    outside = tuple(c.name for c in before if join not in c.stack)
    return Restart(site, join.name, tuple(c.name for c in inputs), outside, inside)


def _works(model: nn.Module, restart: Restart, log: _Log, hooks: Hooks, input_size: Sequence[int]) -> bool:
    """Whether a pass that begins there, with fewer samples, calls the same modules and returns the same shapes.

    It would not where the size of something that is skipped is read. (A size that is made a number and multiplied with
    cannot be seen.) Hooks that were registered after the trace are not called.
    """
    calls = {c.name: c for c in log.calls}
    kept = {name: torch.empty(_FEWER, *calls[name].shape[1:], device='meta') for name in restart.inputs}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    kept = {name: tensor.to(dtype) for name, tensor in kept.items()}
    join = model.get_submodule(restart.join)
    forward = join.forward

    def entered(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with restarted(model, restart, kept, None) as begin:
            return forward(begin, *args, **kwargs)

    try:
        with forward_hooks(model, hooks), skipped(model, restart.outside), replaced_forward(join, entered):
            again = _trace(model, lambda: on_meta(model, input_size, _IMAGES))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError):
        return False
    left = calls[restart.inputs[-1]].exit
    expected = [(c.name, _fewer(c.returned)) for c in log.calls if c.enter > left]
    seen = [(c.name, c.returned) for c in again.calls][-len(expected):] if expected else []
    return seen == expected and again.calls[0].returned == _fewer(log.calls[0].returned)


def _fewer(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a pass of fewer samples has in the place of this one."""
    return (shape[0] * _FEWER // _IMAGES, *shape[1:]) if shape else ()
