"""Restarting a forward pass at an attention site: what of the network is skipped, and what is put in its place"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dreal_timm.attention.capture import bypass
from dreal_timm.attention.sites import Site
from dreal_timm.replay.overrides import replaced_forward

__all__ = ['Restart', 'restarted', 'select', 'skipped']


@dataclass(frozen=True)
class Restart:
    """How a forward pass can begin at a site, or in front of it.

    Attributes:
        site: The site.
        join: Name of the outermost module whose own input is needed: a pass enters it.
        inputs: Names of the modules, from `join` down to where the pass begins, whose inputs are needed.
        outside: Names of the modules before `join`, which are skipped.
        inside: Names of the modules in `join` and before the last of `inputs`, which are skipped.
    """
    site: Site
    join: str
    inputs: tuple[str, ...]
    outside: tuple[str, ...]
    inside: tuple[str, ...]

    def within(self) -> 'Restart':
        """Return how a pass can begin where `join` does, which needs no other input to be kept."""
        return Restart(self.site, self.join, (self.join,), self.outside, ())


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
