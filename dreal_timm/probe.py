"""Probes: what would the network have predicted with an attention map replaced by its mean? (Eq. 1, Algorithm 1 l. 8)

A probe answers with the log-probability of the true class. Nothing but the map may differ from the judged pass, so a
counterfactual pass draws the same dropout masks, normalises with the batch statistics that the judged pass had, and
leaves no trace in the model.

Shape letters: B batch, K classes, P probed sites.
"""
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import FrozenBatchNormAct2d, SplitBatchNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torchvision.ops.misc import FrozenBatchNorm2d

from dreal_timm.attention import Group, Site, bypass, scratch_buffers

__all__ = [
    'PROBES',
    'ExactProbe',
    'Judged',
    'Probe',
    'check_probeable',
    'counterfactual',
    'log_probabilities',
    'null_noise',
    'record_norms',
    'rng_state',
]

Stats = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Judged:
    """What a counterfactual pass must share with the judged pass.

    Attributes:
        input: Images, (B, C, H, W).
        norms: Mean and biased variance of each batch norm that used the batch's, by its name, one pair a call.
        rng: State of the random number generators before the judged pass, from `rng_state`.
    """
    input: torch.Tensor
    norms: Mapping[str, Sequence[Stats]]
    rng: Mapping[str, torch.Tensor]


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return log-softmax of the logits (B, K), in float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)


def check_probeable(model: nn.Module) -> None:
    """Raise a ValueError if a layer normalises with batch statistics that a probe cannot replay."""
    replayed = (_BatchNorm, _InstanceNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d)
    for name, module in model.named_modules():
        batch_stats = 'running_var' in module._buffers and not isinstance(module, replayed)
        if batch_stats or isinstance(module, SplitBatchNorm2d):
            raise ValueError(
                f'{name} ({type(module).__name__}) normalises with batch statistics that a counterfactual pass cannot '
                'replay. Use a torch batch norm, timm BatchNormAct2d, group norm or layer norm.'
            )


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of the generators that a forward pass on the device may draw from."""
    states = {'cpu': torch.get_rng_state()}
    if device.type not in ('cpu', 'meta'):
        backend = getattr(torch, device.type)
        states[device.type] = backend.get_rng_state() if device.type == 'mps' else backend.get_rng_state(device)
    return states


def _set_rng_state(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    for name, state in states.items():
        if name == 'cpu':
            torch.set_rng_state(state)
        elif name == 'mps':
            torch.mps.set_rng_state(state)
        else:
            getattr(torch, name).set_rng_state(state, device)


@contextmanager
def _replay_rng(states: Mapping[str, torch.Tensor], device: torch.device) -> Iterator[None]:
    now = rng_state(device)
    try:
        _set_rng_state(states, device)
        yield
    finally:
        _set_rng_state(now, device)


def _batch_stats(module: nn.Module, x: torch.Tensor) -> Stats:
    """Mean and biased variance over all but the channels, those of all processes for a synchronised batch norm."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = [d for d in range(x.ndim) if d != 1]
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square().mean(dims)
    mean = mean.flatten()
    if isinstance(module, nn.SyncBatchNorm) and dist.is_initialized() and dist.get_world_size() > 1:
        mean, variance = _join_stats(mean, variance, x.numel() // x.shape[1], module.process_group)
    weight = getattr(module, 'weight', None)
    dtype = mean.dtype if weight is None else weight.dtype
    return mean.to(dtype), variance.to(dtype)


def _join_stats(mean: torch.Tensor, variance: torch.Tensor, count: int, process_group: Any) -> Stats:
    # in float64: the variance is a difference of large sums
    wide, counts = mean.double(), torch.full_like(mean, count, dtype=torch.float64)
    sums = torch.stack([counts, counts * wide, counts * (variance.double() + wide.square())])
    dist.all_reduce(sums, group=process_group)
    joint = sums[1] / sums[0]
    return joint.to(mean.dtype), (sums[2] / sums[0] - joint.square()).clamp(min=0).to(mean.dtype)


@contextmanager
def record_norms(model: nn.Module) -> Iterator[dict[str, list[Stats]]]:
    """Record, for the passes inside the context, the statistics of each batch norm that uses the batch's."""
    stats: dict[str, list[Stats]] = {}

    def on_input(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            with torch.no_grad():
                stats.setdefault(name, []).append(_batch_stats(module, args[0]))
        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                stack.callback(module.register_forward_pre_hook(on_input(name)).remove)
        yield stats


@contextmanager
def _replay_norms(model: nn.Module, norms: Mapping[str, Sequence[Stats]]) -> Iterator[None]:
    """Let batch norms use recorded statistics, as in evaluation mode; flags and buffers are given back."""
    saved = []

    def on_input(pairs: Iterator[Stats]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            module._buffers['running_mean'], module._buffers['running_var'] = next(pairs)
        return hook

    try:
        for name, pairs in norms.items():
            module = model.get_submodule(name)
            handle = module.register_forward_pre_hook(on_input(iter(pairs)))
            saved.append((module, module.training, dict(module._buffers), handle))
            module.training = False
        yield
    finally:
        for module, training, buffers, handle in saved:
            handle.remove()
            module.training = training
            module._buffers.update(buffers)


@torch.no_grad()
def counterfactual(
        model: nn.Module,
        judged: Judged,
        sites: Sequence[Site],
        dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the log-probabilities (B, K) of the judged pass with the maps of the sites replaced by their means.

    Args:
        model: The model itself, with no wrapper around it, in the mode of the judged pass.
        judged: What the judged pass left.
        sites: Sites to bypass; none makes it the null probe, which repeats the judged pass.
        dtype: torch.float32 runs the pass in float32 with autocast off. None keeps the autocast around the call.
    """
    device = judged.input.device
    other = [m for name, m in model.named_modules() if m.training and name not in judged.norms]
    with ExitStack() as stack:
        stack.enter_context(_replay_rng(judged.rng, device))
        stack.enter_context(scratch_buffers(other))
        stack.enter_context(_replay_norms(model, judged.norms))
        stack.enter_context(bypass(model, sites))
        stack.enter_context(nullcontext() if dtype is None else torch.autocast(device.type, enabled=False))
        return log_probabilities(model(judged.input if dtype is None else judged.input.to(dtype)))


def null_noise(model: nn.Module, judged: Judged, log_probs: torch.Tensor, target: torch.Tensor) -> float:
    """Return the rms over the batch of what a pass that bypasses nothing changes in log p of the true class.

    Args:
        model: The model itself, with no wrapper around it.
        judged: What the judged pass left.
        log_probs: Its log-probabilities, (B, K).
        target: Class indices, (B,).
    """
    difference = counterfactual(model, judged, []) - log_probs
    return difference.gather(1, target[:, None]).square().mean().sqrt().item()


class Probe(ABC):
    """What every probe does: say which sites it judges in a step, and what the true class would have been given.

    Args:
        groups: Groups of attention sites.
        dtype: Precision of the counterfactual passes, see `counterfactual`.
    """

    def __init__(self, groups: Sequence[Group], dtype: torch.dtype | None = None):
        self.groups = list(groups)
        self.dtype = dtype

    @abstractmethod
    def sites(self, drawn: Sequence[int]) -> list[tuple[int, Site]]:
        """Return (index of its group, site) for each column of the answer.

        Args:
            drawn: Index, in its group, of the site that was drawn, for each group.
        """

    def reference(self, model: nn.Module, judged: Judged, log_probs: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities (B, K) that rewards are measured against.

        They are those of the judged pass, or of a null probe where counterfactual passes run in a precision of
        their own.
        """
        return log_probs if self.dtype is None else counterfactual(model, judged, [], self.dtype)

    @abstractmethod
    def __call__(
            self,
            model: nn.Module,
            judged: Judged,
            target: torch.Tensor,
            sites: Sequence[Site],
    ) -> torch.Tensor:
        """Return the log-probability of each sample's class with one map bypassed, (B, P), NaN where not probed.

        Args:
            model: The model itself, with no wrapper around it.
            judged: What the judged pass left.
            target: Class indices, (B,).
            sites: Sites to probe, one a column.
        """


class ExactProbe(Probe):
    """One counterfactual pass over the whole batch for the drawn site of each group."""

    def sites(self, drawn: Sequence[int]) -> list[tuple[int, Site]]:
        return [(i, group.sites[index]) for i, (group, index) in enumerate(zip(self.groups, drawn, strict=True))]

    def __call__(
            self,
            model: nn.Module,
            judged: Judged,
            target: torch.Tensor,
            sites: Sequence[Site],
    ) -> torch.Tensor:
        columns = [counterfactual(model, judged, [site], self.dtype).gather(1, target[:, None]) for site in sites]
        return torch.cat(columns, dim=1)


PROBES: dict[str, type[Probe]] = {'exact': ExactProbe}
