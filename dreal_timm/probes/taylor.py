"""Probe 'taylor': first-order rewards, from the gradient that the backward pass computes anyway

    log p' - log p ~ <d log p_c / dA, mean(A) - A>

for the log-probability of class c with a map A, and with its mean in its place. It needs no counterfactual pass,
answers for every site and sample, and is known only after the backward pass: the critic learns from it one step later.

Shape letters: B batch, G groups, L sites in a group, N positions of a map.
"""
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, PolyCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from dreal_timm.attention.sites import Group, find_sites, group_sites, sites_of
from dreal_timm.probes.base import Probe, ProbeSetup, Rewards
from dreal_timm.probes.passes import log_probabilities
from dreal_timm.reward import RewardRule, is_correct
from dreal_timm.trainable import DrealTrainableModule, Judgement
from dreal_timm.utils.transfer import to_device

__all__ = ['Pending', 'TaylorProbe', 'check_criterion', 'first_order']

_logger = logging.getLogger(__name__)

_HINT = "probe='exact' and probe='split' work with any loss"


def check_criterion(criterion: nn.Module | Callable, target: str | None) -> None:
    """Raise a ValueError if the gradient of the loss is not that of what rewards are made of.

    Args:
        criterion: The class loss.
        target: None asks for the log-probability of the class, 'loss' for each sample's own class loss.
    """
    name = getattr(criterion, '__name__', type(criterion).__name__)
    if target not in (None, 'loss'):
        raise ValueError(f"taylor_target must be None or 'loss', got {target!r}.")
    if not _is_mean_of_samples(criterion):
        raise ValueError(
            f"probe='taylor' needs a loss that is the mean of a term for each sample, which {name} is not known to be; "
            f'{_HINT}.'
        )
    if target is None and not _is_plain(criterion):
        raise ValueError(
            f"probe='taylor' needs plain cross-entropy, whose gradient is that of the class's log-probability, not "
            f"{name} with these options; {_HINT}, and taylor_target='loss' measures rewards by each sample's own loss."
        )


def _is_mean_of_samples(criterion: Any) -> bool:
    if type(criterion) is nn.CrossEntropyLoss:
        return criterion.reduction == 'mean' and criterion.weight is None
    if type(criterion) is BinaryCrossEntropy:
        return criterion.sum_classes or criterion.reduction == 'mean'
    known = (LabelSmoothingCrossEntropy, SoftTargetCrossEntropy, PolyCrossEntropy)
    return type(criterion) in known and getattr(criterion, 'reduction', 'mean') == 'mean'


def _is_plain(criterion: Any) -> bool:
    if type(criterion) is nn.CrossEntropyLoss:
        return criterion.label_smoothing == 0
    return type(criterion) is LabelSmoothingCrossEntropy and criterion.smoothing == 0


def first_order(gradient: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Return <gradient, mean(A) - A>, the change to first order if a map is replaced by its mean, (B, L).

    Args:
        gradient: Gradient of what changes at the maps, (B, L, *size).
        attention: The maps, (B, L, *size).
    """
    flat = attention.flatten(2)
    return (gradient.flatten(2) * (flat.mean(2, keepdim=True) - flat)).sum(2)


@dataclass
class Pending:
    """A batch whose rewards are known after its backward pass.

    Attributes:
        states: Reduced feature maps of each group, (B, L, *judged_size), without a graph.
        maps: Attention maps of each group, (B, L, *size), without a graph.
        taps: Zero leaf tensors of the same shapes as the maps, that were added to them.
        right: Samples whose class wins or ties, (B,) bool.
        known: Samples that have a class, (B,) bool: a criterion may ignore labels such as -100.
        sites: Sites to measure, (L of all groups,) bool.
    """
    states: Mapping[str, torch.Tensor]
    maps: Mapping[str, torch.Tensor]
    taps: Mapping[str, torch.Tensor]
    right: torch.Tensor
    known: torch.Tensor
    sites: torch.Tensor
    _scales: list[torch.Tensor] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, 'gradients': {name: tap.grad for name, tap in self.taps.items()}}  # pickle drops them

    def __setstate__(self, state: dict[str, Any]) -> None:
        gradients = state.pop('gradients')
        self.__dict__.update(state)
        for name, gradient in gradients.items():
            self.taps[name].grad = gradient

    def watch(self, loss: torch.Tensor) -> None:
        """Learn by which factor (of a gradient scaler, of accumulation) `backward()` will multiply the loss."""
        def hook(gradient: torch.Tensor) -> None:
            self._scales.append(gradient.detach())

        loss.register_hook(hook)

    @property
    def lost(self) -> bool:
        """Whether there was a backward pass, and a map that it left no gradient at."""
        return bool(self._scales) and any(tap.grad is None for tap in self.taps.values())

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradient of the log-probability (or of minus the sample's loss) at the maps of each group.

        (B, L, *size), NaN where no gradient arrived, or one that is not finite, and at sites that are not measured.
        """
        gradients, start = {}, 0
        for name, tap in self.taps.items():
            measured = self.known[:, None] & self.sites[start:start + tap.shape[1]]
            start += tap.shape[1]
            if tap.grad is None or not self._scales:
                gradients[name] = torch.full_like(tap, float('nan'))
                continue
            # the loss is a mean over the samples that have a class
            gradient = tap.grad.detach() * -(self.known.sum() / torch.stack(self._scales).sum().to(tap.dtype))
            measured = measured & gradient.flatten(2).isfinite().all(2)
            gradients[name] = gradient.masked_fill(~measured.view(*measured.shape, *[1] * (tap.ndim - 2)), float('nan'))
        return gradients

    def change(self) -> torch.Tensor:
        """Return the change of the log-probability (or of minus the sample's loss) at every site, (B, L of all groups).

        NaN where the gradient is.
        """
        gradients = self.gradients()
        change = torch.cat([first_order(gradients[name], self.maps[name]) for name in self.taps], dim=1)
        return change.where(change.isfinite(), torch.full_like(change, float('nan')))


class TaylorProbe(Probe):
    """Rewards of the batch before, from the gradient of its own backward pass.

    Args:
        groups: Groups of attention sites.
        rule: How a reward is made of a change of log-probability.
        criterion: The class loss.
        target: 'loss' takes each sample's own class loss in the place of minus the log-probability of its class.
        ignored: Label of samples that have no class.

    Raises:
        ValueError: The gradient of this loss is not that of what rewards are made of.
    """

    def __init__(
            self,
            groups: Sequence[Group],
            rule: RewardRule,
            criterion: nn.Module | Callable,
            target: str | None = None,
            ignored: int | None = None,
    ):
        check_criterion(criterion, target)
        super().__init__(groups, rule, ignored)
        self._group = [index for index, group in enumerate(self.groups) for _ in group.sites]
        self.target = target
        self._loss_logged = False
        self.pending: Pending | None = None  # an attribute, not a buffer: DDP would send that of the first process
        self._sizes: dict[tuple[int, ...], dict[str, tuple[int, ...]]] = {}

    @classmethod
    def build(cls, setup: ProbeSetup) -> 'TaylorProbe':
        return cls(
            group_sites(setup.sites), setup.rule, setup.criterion, setup.config.taylor_target, setup.ignored)

    def _taps(self, model: nn.Module, input: torch.Tensor) -> dict[str, torch.Tensor]:
        """Zero leaf tensors of the shapes of all maps of a batch, (B, L, *size), float32 or wider, by group."""
        shape = tuple(input.shape[1:])
        if shape not in self._sizes:
            # a spatial map of one position is no site at this size, but was one at another
            sizes = {site.name: site.size for site in find_sites(model, shape)}
            self._sizes[shape] = {g.name: sizes.get(g.sites[0].name, (1, 1)) for g in self.groups}
        options: dict[str, Any] = dict(
            dtype=torch.promote_types(input.dtype, torch.float32), device=input.device, requires_grad=True)
        return {
            group.name: torch.zeros(len(input), len(group.sites), *self._sizes[shape][group.name], **options)
            for group in self.groups
        }

    def __call__(
            self,
            call: nn.Module,
            trainable: DrealTrainableModule,
            input: torch.Tensor,
            target: torch.Tensor,
    ) -> tuple[Judgement, Rewards]:
        if self.target is None and target.ndim == 2:
            raise ValueError(
                f"probe='taylor' needs class indices, got soft targets; {_HINT}, and taylor_target='loss' measures "
                "rewards by each sample's own loss."
            )
        before, self.pending = self.pending, None
        rewards = None if before is None else self._rewards(before)
        pending = None if before is None else (before.states, before.maps)
        options = self.options(before, trainable.rotation.due)
        before = None  # taps and gradients are gone when the next ones are made
        taps = self._taps(trainable.model, input) if trainable.rotation.due else None
        judged = call(input, taps=taps, pending=pending, **options)
        output = judged.output.detach()
        if rewards is None:
            rewards = self.unmeasured(output, target, sites_of(self.groups))
        if taps is not None:
            classes, known = self.classes(output, target)
            self.pending = self.save(
                judged, taps, is_correct(log_probabilities(output), classes), known,
                to_device(self.measured_sites(trainable), output.device))
        return judged, rewards

    def options(self, before: Pending | None, due: bool) -> dict[str, Any]:
        """Return further arguments of the trainable module; a study's method may have some."""
        return {}

    def measured_sites(self, trainable: DrealTrainableModule) -> torch.Tensor:
        """Return a mask of the sites to measure, (L of all groups,) bool, on the CPU."""
        return torch.ones(len(self._group), dtype=torch.bool)

    def save(
            self,
            judged: Judgement,
            taps: Mapping[str, torch.Tensor],
            right: torch.Tensor,
            known: torch.Tensor,
            sites: torch.Tensor,
    ) -> Pending:
        """Return what the rewards of this batch are made of, see `Pending`."""
        return Pending(self.own(judged.states), self.own(judged.maps), taps, right, known, sites)

    def own(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors that stay: the next step of a compiled module may overwrite what it returned."""
        return {name: tensor.clone() if self.compiled else tensor for name, tensor in tensors.items()}

    def _rewards(self, pending: Pending) -> Rewards:
        if pending.lost and not self._loss_logged:
            self._loss_logged = True
            _logger.warning(
                "probe='taylor': a backward pass left no gradient at some maps, whose rewards are missing. Reentrant "
                'gradient checkpointing (timm.layers.set_reentrant_ckpt) does that, the default does not.'
            )
        values = self.rule(pending.change(), pending.right, self._group)
        return Rewards(sites_of(self.groups), values, pending.right)

    def watch(self, loss: torch.Tensor) -> None:
        if self.pending is not None:
            self.pending.watch(loss)

    def reset(self) -> None:
        self.pending = None
