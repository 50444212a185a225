"""The trainable module: the network and its critic, called together

Shape letters: B batch, K classes, L sites of all groups.
"""
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import nn

from dreal_timm.attention.capture import Reading, keep_inputs, map_again, read_map, record, tap
from dreal_timm.attention.readers import map_size
from dreal_timm.attention.sites import Group
from dreal_timm.critic import Critic
from dreal_timm.replay.batch_norms import record_norms
from dreal_timm.rotation import Rotation

__all__ = ['DrealTrainableModule', 'first_order', 'stack_maps', 'stack_readings']


def stack_maps(groups: Sequence[Group], maps: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the maps of each group, (B, L, *size), float32.

    Args:
        groups: Groups of attention sites.
        maps: Map of each site, by its name, in the shape that its gate gives it.
    """
    stacked = {}
    for group in groups:
        names = [site.name for site in group.sites]
        shape = (-1, 1, *map_size(group.kind, maps[names[0]].shape))
        stacked[group.name] = torch.cat([maps[name].reshape(shape) for name in names], dim=1).float()
    return stacked


def stack_readings(
        groups: Sequence[Group],
        readings: Mapping[str, Reading],
        maps: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return what the critics read: states (B, L, *judged_size) and maps (B, L, *size) of each group, float32.

    Args:
        groups: Groups of attention sites.
        readings: What was recorded at each site, by its name.
        maps: Map of each site, by its name, in the shape that its gate gives it.
    """
    stacked, states = stack_maps(groups, maps), {}
    for group in groups:
        size = stacked[group.name].shape[2:]
        judged = (-1, 1, *(size if group.kind == 'spatial' else size[:1]))
        states[group.name] = torch.cat(
            [readings[site.name].state.reshape(judged) for site in group.sites], dim=1).float()
    return states, stacked


def first_order(gradient: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Return <gradient, mean(A) - A>, the change to first order if a map is replaced by its mean, (B, L).

    Args:
        gradient: Gradient of what changes at the maps, (B, L, *size).
        attention: The maps, (B, L, *size).
    """
    flat = attention.flatten(2)
    return (gradient.flatten(2) * (flat.mean(2, keepdim=True) - flat)).sum(2)


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

    def _read(self, readings: Mapping[str, Reading]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        sites = [site for group in self.groups for site in group.sites]
        maps = {site.name: read_map(self.model, site, readings[site.name]) for site in sites}
        return stack_readings(self.groups, readings, maps)

    def forward(
            self,
            input: torch.Tensor,
            probed: bool = False,
            kept: Sequence[str] = (),
            taps: Mapping[str, torch.Tensor] | None = None,
            pending: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]] | None = None,
            descriptors: bool = False,
            earlier: tuple[
                Mapping[str, Sequence[torch.Tensor]], Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]
            ] | None = None,
    ) -> dict[str, Any]:
        """Run the judged pass and judge its maps.

        Args:
            input: Images, (B, C, H, W).
            probed: Whether counterfactual passes will follow, which need statistics of batch norms.
            kept: Names of the modules whose inputs they need.
            taps: Tensors to add to the maps of each group, (B, L, *size).
            pending: States and maps of another batch, for the critic to judge in the place of this one's.
            descriptors: Whether to return what maps were computed from.
            earlier: Such descriptors by site, maps by group, and the gradient of a quantity at these maps by group, of
                another batch.

        Returns:
            Dictionary containing:
                - 'output': Logits, (B, K)
                - 'actor_quality': Quality of all maps, (B, L), with a graph to the attention parameters alone
                - 'critic_quality': Quality, (B, L), with a graph to the critic alone: the same, or of `pending`
                - 'states', 'maps': Of each group, (B, L, *judged_size) and (B, L, *size), float32, without a graph
                - 'norms', 'kept': What counterfactual passes need
                - 'descriptors': By site, if asked for
                - 'change': With `earlier`, how its quantity changes to first order if a map is replaced by its mean,
                  (B, L), with a graph to the attention parameters alone
        """
        sites = [site for group in self.groups for site in group.sites]
        with ExitStack() as stack:
            readings = stack.enter_context(record(self.model, sites))
            norms = stack.enter_context(record_norms(self.model)) if probed else {}
            inputs = stack.enter_context(keep_inputs(self.model, kept))
            if taps is not None:
                stack.enter_context(tap(self.model, self.groups, taps))
            output = self.model(input)
        states, maps = self._read(readings)
        fixed = {name: attention.detach() for name, attention in maps.items()}
        with torch.autocast(input.device.type, enabled=False):
            frozen = {name: parameter.detach() for name, parameter in self.critic.named_parameters()}
            actor = torch.func.functional_call(self.critic, frozen, (states, maps))
            critic = self.critic(*((states, fixed) if pending is None else pending))
        result = {
            'output': output, 'actor_quality': actor, 'critic_quality': critic,
            'states': states, 'maps': fixed, 'norms': norms, 'kept': inputs,
        }
        if descriptors:
            result['descriptors'] = {name: reading.descriptors for name, reading in readings.items()}
        if earlier is not None:
            result['change'] = self._change(*earlier)
        return result

    def _change(
            self,
            descriptors: Mapping[str, Sequence[torch.Tensor]],
            maps: Mapping[str, torch.Tensor],
            gradients: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        sites = [site for group in self.groups for site in group.sites]
        again = stack_maps(
            self.groups, {site.name: map_again(self.model, site, descriptors[site.name]) for site in sites})
        # what is not known changes nothing, and a NaN would reach the parameters through any mask
        return torch.cat([
            first_order(gradients[name].nan_to_num(0.0, 0.0, 0.0), maps[name] + (graph - graph.detach()))
            for name, graph in again.items()], dim=1)
