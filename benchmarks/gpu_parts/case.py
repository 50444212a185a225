"""A network with attention, a batch for it, and what is right for them by slow versions written from the equations"""
import copy
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import timm
import torch
from networks import correct_targets, make_batch, make_model, randomise
from oracle import slow_rewards, taylor_by_hand
from torch import nn

from dreal_timm import DrealTask

__all__ = ['SEED', 'Case', 'gradients_of', 'largest', 'length']

SEED = 11  # of the masks of a pass


class Case:
    """One network, in training mode, and a batch of which it gets all but two samples right.

    Args:
        attention: 'se', 'cbam' or 'srm'.
        device: Where it is.
        small: timm's test_resnet in place of a ResNet.
        depth: Depth of that ResNet.
        **kwargs: Options of the network.
    """

    def __init__(
            self,
            attention: str,
            device: torch.device,
            small: bool,
            depth: int = 50,
            **kwargs: Any,
    ):
        self.device = device
        self.size = (3, 48, 48) if small else (3, 64, 64)
        if small:
            model = make_model(attention, **kwargs)
        else:
            torch.manual_seed(0)
            name = f'dreal_{attention}_resnet{depth}'
            model = randomise(timm.create_model(name, num_classes=7, zero_init_last=False, **kwargs))
            for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
                for block in stage:  # a deep network of random weights would make a lot of any rounding
                    getattr(block, 'bn2' if depth < 50 else 'bn3').weight.data.mul_(0.25)
        self.model = model.to(device).train()
        self.input = make_batch(8 if small else 16, self.size[1])[0].to(device)
        self.target = correct_targets(self.model, self.input, seed=SEED)
        self._rewards: dict[tuple[str, ...], torch.Tensor] = {}

    def task(self, probe: str, double: bool = False, **options: Any) -> DrealTask:
        """Return a task in training mode with a copy of the network."""
        model = copy.deepcopy(self.model).double() if double else copy.deepcopy(self.model)
        task = DrealTask(
            model, device=self.device, verbose=False, probe=probe, actor_weight=1.0, input_size=self.size, **options)
        task.get_trainable_module().train()
        return task

    def step(self, task: Any, double: bool = False) -> dict[str, Any]:
        """Run a task's step without its backward pass, with the case's masks."""
        torch.manual_seed(SEED)
        return task(self.input.double() if double else self.input, self.target)

    def rewards(self, sites: Sequence[str], dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Return the rewards of Eq. 1, (B, P) float64, with each map swapped by hand in a full forward pass."""
        key = (str(dtype), *sites)
        if key not in self._rewards:
            model = copy.deepcopy(self.model).to(dtype)
            self._rewards[key] = slow_rewards(model, self.input.to(dtype), self.target, list(sites), SEED)
        return self._rewards[key]

    def first_order_rewards(self, sites: Sequence[str]) -> torch.Tensor:
        """Return the rewards to first order, (B, P) float64, from autograd in float64."""
        model = copy.deepcopy(self.model).double()
        return taylor_by_hand(model, self.input.double(), self.target, sites, SEED).cpu()

    @cached_property
    def sites(self) -> list[str]:
        """Names of all sites."""
        return [site.name for group in self.task('exact').groups for site in group.sites]


def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference."""
    return (found.detach().double().cpu() - expected.detach().double().cpu()).abs().max().item()


def length(values: Iterable[torch.Tensor]) -> float:
    """Return the Euclidean length of tensors taken together."""
    return math.sqrt(sum(value.square().sum().item() for value in values))


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of all parameters, by their names without those of wrappers; no gradient is zeros."""
    found = {}
    for name, parameter in module.named_parameters():
        for wrapper in ('module.', '_orig_mod.', 'model.'):
            name = name.removeprefix(wrapper)
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = gradient.detach().double().cpu()
    return found
