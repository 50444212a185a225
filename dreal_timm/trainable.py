"""The trainable module: the network and its critic, called together

Shape letters: B batch, K classes, L sites of all groups.
"""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import nn

from dreal_timm.attention import Group, Reading, read_map, record
from dreal_timm.critic import Critic
from dreal_timm.probe import record_norms
from dreal_timm.rotation import Rotation

__all__ = ['DrealTrainableModule']


class DrealTrainableModule(nn.Module):
    """Model and critic in one module: all that is trained is called inside forward(), as DDP needs.

    Args:
        model: The network.
        critic: The critics of its groups.
        groups: Its attention sites, grouped.
        rotation: Counter of steps and epochs; `train(True)` after at least one step begins an epoch.
    """

    def __init__(self, model: nn.Module, critic: Critic, groups: Sequence[Group], rotation: Rotation):
        super().__init__()
        self.model = model
        self.critic = critic
        self.groups = list(groups)
        self.rotation = rotation

    def train(self, mode: bool = True) -> 'DrealTrainableModule':
        if mode:
            self.rotation.begin_epoch()
        return super().train(mode)

    def no_weight_decay(self) -> set[str]:
        names: set[str] = getattr(self.model, 'no_weight_decay', set)()
        return {f'model.{name}' for name in names} | {'critic.*'}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layers of the model for layer-wise lr decay; the critic belongs to the last one, whose factor is 1."""
        matcher = getattr(self.model, 'group_matcher', None)
        if matcher is not None:
            layers = group_parameters(self.model, matcher(coarse=coarse), reverse=True)
        else:
            layers = auto_group_layers(self.model)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix('model.'), last) if name.startswith('model.') else last

    def _judge(self, readings: dict[str, Reading]) -> tuple[torch.Tensor, torch.Tensor]:
        """Quality of the maps as the actor sees it (critic detached) and as the critic does (maps detached)."""
        states, maps = {}, {}
        for group in self.groups:
            shape = (-1, 1, *(group.size if group.kind == 'channel' else readings[group.sites[0].name].state.shape[2:]))
            states[group.name] = torch.cat(
                [readings[site.name].state.reshape(shape).float() for site in group.sites], dim=1)
            maps[group.name] = torch.cat(
                [read_map(self.model, site, readings[site.name]).reshape(shape).float() for site in group.sites], dim=1)
        with torch.autocast(self._device_type(), enabled=False):
            frozen = {name: parameter.detach() for name, parameter in self.critic.named_parameters()}
            actor = torch.func.functional_call(self.critic, frozen, (states, maps))
            critic = self.critic(states, {name: attention.detach() for name, attention in maps.items()})
        return actor, critic

    def _device_type(self) -> str:
        return next(self.model.parameters()).device.type

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Run the judged pass and judge its maps.

        Args:
            input: Images, (B, C, H, W).

        Returns:
            Logits (B, K); quality of all maps (B, L) with a graph to the attention parameters alone; the same
            numbers with a graph to the critic alone; and the statistics of the batch norms.
        """
        sites = [site for group in self.groups for site in group.sites]
        with record(self.model, sites) as readings, record_norms(self.model) as norms:
            output = self.model(input)
        actor, critic = self._judge(readings)
        return output, actor, critic, norms
