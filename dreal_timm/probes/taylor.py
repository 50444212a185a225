"""First-order rewards: what a map is worth, from the gradient that the backward pass computes anyway

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

from dreal_timm.attention.sites import Group, find_sites
from dreal_timm.probes.base import Measure, Measured
from dreal_timm.probes.passes import log_probabilities
from dreal_timm.reward import is_correct
from dreal_timm.trainable import DrealTrainableModule, first_order
from dreal_timm.utils.transfer import to_device

__all__ = ['TAYLOR_SITES', 'Pending', 'TaylorMeasure', 'check_criterion']

TAYLOR_SITES = ('all', 'drawn')

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


@dataclass
class Pending:
    """A batch whose rewards are known after its backward pass.

    Attributes:
        states: Reduced feature maps of each group, (B, L, *judged_size), without a graph.
        maps: Attention maps of each group, (B, L, *size), without a graph.
        taps: Zero leaf tensors of the same shapes as the maps, that were added to them.
        right: Samples whose class wins or ties, (B,) bool.
        known: Samples that have a class, (B,) bool: a criterion may ignore labels such as -100.
        sites: Which sites, of all groups, are asked for, (L of all groups,) bool.
        descriptors: What the map of each site was computed from, by its name; kept for the direct actor alone.
    """
    states: Mapping[str, torch.Tensor]
    maps: Mapping[str, torch.Tensor]
    taps: Mapping[str, torch.Tensor]
    right: torch.Tensor
    known: torch.Tensor
    sites: torch.Tensor
    descriptors: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict)
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

        (B, L, *size), NaN where no gradient arrived, or one that is not finite, and where no site is asked for.
        """
        found, start = {}, 0
        for name, tap in self.taps.items():
            asked = self.known[:, None] & self.sites[start:start + tap.shape[1]]
            start += tap.shape[1]
            if tap.grad is None or not self._scales:
                found[name] = torch.full_like(tap, float('nan'))
                continue
            # the loss is a mean over the samples that have a class
            gradient = tap.grad.detach() * -(self.known.sum() / torch.stack(self._scales).sum().to(tap.dtype))
            asked = asked & gradient.flatten(2).isfinite().all(2)
            found[name] = gradient.masked_fill(~asked.view(*asked.shape, *[1] * (tap.ndim - 2)), float('nan'))
        return found

    def change(self) -> torch.Tensor:
        """Return the change of the log-probability (or of minus the sample's loss) at every site, (B, L of all groups).

        NaN where the gradient is.
        """
        gradients = self.gradients()
        change = torch.cat([first_order(gradients[name], self.maps[name]) for name in self.taps], dim=1)
        return change.where(change.isfinite(), torch.full_like(change, float('nan')))


class TaylorMeasure(Measure):
    """Rewards of the batch before, from the gradient of its own backward pass.

    Args:
        groups: Groups of attention sites.
        criterion: The class loss.
        target: 'loss' takes each sample's own class loss in the place of minus the log-probability of its class.
        sites: 'all' measures at every site, 'drawn' at the one that is drawn of each group.
        direct: Whether what the direct actor needs is kept too.
        **kwargs: Passed to `Measure`.

    Raises:
        ValueError: The gradient of this loss is not that of what rewards are made of.
    """

    def __init__(
            self,
            groups: Sequence[Group],
            criterion: nn.Module | Callable,
            target: str | None = None,
            sites: str = 'all',
            direct: bool = False,
            **kwargs: Any,
    ):
        check_criterion(criterion, target)
        if sites not in TAYLOR_SITES:
            raise ValueError(f"taylor_sites must be one of {', '.join(TAYLOR_SITES)}, got '{sites}'.")
        super().__init__(**kwargs)
        self.drawn_alone, self.direct = sites == 'drawn', direct
        self.groups = list(groups)
        self._sites = [site for group in self.groups for site in group.sites]
        self._group = [index for index, group in enumerate(self.groups) for _ in group.sites]
        self.target = target
        self._told = False
        self.pending: Pending | None = None  # an attribute, not a buffer: DDP would send that of the first process
        self._sizes: dict[tuple[int, ...], dict[str, tuple[int, ...]]] = {}

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
    ) -> tuple[dict[str, Any], Measured]:
        if self.target is None and target.ndim == 2:
            raise ValueError(
                f"probe='taylor' needs class indices, got soft targets; {_HINT}, and taylor_target='loss' measures "
                "rewards by each sample's own loss."
            )
        before, self.pending = self.pending, None
        asked, measured, earlier = None, None, None
        if before is not None:
            asked = before.states, before.maps
            measured = self._measured(before)
            if self.direct:
                earlier = before.descriptors, before.maps, before.gradients()
            before = None  # taps and gradients are gone when the next ones are made
        taps = self._taps(trainable.model, input) if trainable.rotation.due else None
        options: dict[str, Any] = {'earlier': earlier, 'descriptors': taps is not None} if self.direct else {}
        judged = call(input, taps=taps, pending=asked, **options)
        output = judged['output'].detach()
        if measured is None:
            measured = self.unmeasured(output, target, self._sites)
        if taps is not None:
            classes, known = self.classes(output, target)
            states, maps = (
                {name: tensor.clone() if self.compiled else tensor for name, tensor in judged[kind].items()}
                for kind in ('states', 'maps')  # the next step of a compiled module may overwrite what it returned
            )
            descriptors = {
                name: tuple(tensor.clone() if self.compiled else tensor for tensor in tensors)
                for name, tensors in judged.get('descriptors', {}).items()}
            self.pending = Pending(
                states, maps, taps, is_correct(log_probabilities(output), classes), known,
                to_device(self._asked(trainable), output.device), descriptors)
        return judged, measured

    def _asked(self, trainable: DrealTrainableModule) -> torch.Tensor:
        """Which sites are asked for, (L of all groups,) bool."""
        asked = torch.ones(len(self._sites), dtype=torch.bool)
        if self.drawn_alone:
            drawn = trainable.rotation.draw()
            asked = torch.cat([
                torch.arange(len(group.sites)) == index for group, index in zip(self.groups, drawn, strict=True)])
        return asked

    def _measured(self, pending: Pending) -> Measured:
        if pending.lost and not self._told:
            self._told = True
            _logger.warning(
                "probe='taylor': a backward pass left no gradient at some maps, whose rewards are missing. Reentrant "
                'gradient checkpointing (timm.layers.set_reentrant_ckpt) does that, the default does not.'
            )
        rewards = self.rule(pending.change(), pending.right, self._group)
        return Measured(self._sites, rewards, pending.right)

    def watch(self, loss: torch.Tensor) -> None:
        if self.pending is not None:
            self.pending.watch(loss)

    def forget(self) -> None:
        self.pending = None
