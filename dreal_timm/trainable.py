"""The trainable module: the network and its critic, called together

Shape letters: B batch, K classes, L sites of all groups.
"""
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import nn

from dreal_timm.attention.capture import read_map, tap
from dreal_timm.attention.judged_pass import JudgedPass, judged_pass, stack_readings
from dreal_timm.attention.sites import Group, sites_of
from dreal_timm.critic import Critic
from dreal_timm.replay.batch_norms import Stats
from dreal_timm.rotation import Rotation

__all__ = ['DrealTrainableModule', 'Judgement']


class Judgement(NamedTuple):
    """What a training step begins with: the judged pass and the critics' judgement of its maps.

    A named tuple and no dataclass: DDP with `static_graph` looks for tensors in what pytree flattens.

    Attributes:
        output: Logits, (B, K).
        actor_quality: Quality of all maps, (B, L), with a graph to the attention parameters alone.
        critic_quality: Quality, (B, L), with a graph to the critic alone: the same, or of the maps of another batch.
        states: Reduced feature maps of each group, (B, L, *judged_size), float32, without a graph.
        maps: Attention maps of each group, (B, L, *size), float32, without a graph.
        norms: Statistics of batch norms, which counterfactual passes need.
        inputs: Inputs of modules, where they begin.
    """
    output: torch.Tensor
    actor_quality: torch.Tensor
    critic_quality: torch.Tensor
    states: Mapping[str, torch.Tensor]
    maps: Mapping[str, torch.Tensor]
    norms: Mapping[str, Sequence[Stats]]
    inputs: Mapping[str, torch.Tensor]


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

    def forward(
            self,
            input: torch.Tensor,
            replay: bool = False,
            saved: Sequence[str] = (),
            taps: Mapping[str, torch.Tensor] | None = None,
            pending: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]] | None = None,
    ) -> Judgement:
        """Run the judged pass and judge its maps.

        Args:
            input: Images, (B, C, H, W).
            replay: Whether counterfactual passes will follow, which need statistics of batch norms.
            saved: Names of the modules whose inputs they need.
            taps: Tensors to add to the maps of each group, (B, L, *size).
            pending: States and maps of another batch, for the critic to judge in the place of this one's.
        """
        return self.judge(self.judged_pass(input, replay, saved, taps), pending)

    def judged_pass(
            self,
            input: torch.Tensor,
            replay: bool,
            saved: Sequence[str],
            taps: Mapping[str, torch.Tensor] | None,
    ) -> JudgedPass:
        """Run the network; the arguments are those of `forward`."""
        tapping = nullcontext() if taps is None else tap(self.model, self.groups, taps)
        return judged_pass(self.model, sites_of(self.groups), input, replay, saved, tapping)

    def judge(
            self,
            judged: JudgedPass,
            pending: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]] | None = None,
    ) -> Judgement:
        """Let the critics judge the maps of a pass, see `forward`."""
        graphs = {site.name: read_map(self.model, site, judged.readings[site.name]) for site in sites_of(self.groups)}
        states, maps = stack_readings(self.groups, judged.readings, graphs)
        fixed = {name: attention.detach() for name, attention in maps.items()}
        with torch.autocast(judged.output.device.type, enabled=False):
            frozen = {name: parameter.detach() for name, parameter in self.critic.named_parameters()}
            actor = torch.func.functional_call(self.critic, frozen, (states, maps))
            critic = self.critic(*((states, fixed) if pending is None else pending))
        return Judgement(judged.output, actor, critic, states, fixed, judged.norms, judged.inputs)
