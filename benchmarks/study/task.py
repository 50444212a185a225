"""DREAL with what departs from the paper: other rewards, another critic, and L_q made and weighed in other ways

`DrealTask` is built of parts that can be replaced; here are the replacements that the study compares.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from dreal_timm import DrealTask
from dreal_timm.attention.capture import map_again
from dreal_timm.attention.judged_pass import stack_maps
from dreal_timm.attention.sites import Group, attention_parameters, sites_of
from dreal_timm.config import DrealConfig
from dreal_timm.losses import actor_loss
from dreal_timm.options import option
from dreal_timm.probes.base import Probe, ProbeSetup, Rewards
from dreal_timm.probes.taylor import Pending, TaylorProbe, first_order
from dreal_timm.replay.batch_norms import Stats
from dreal_timm.trainable import DrealTrainableModule, Judgement
from study.actor_share import ActorShare
from study.rewards import StandardizedCritic, StudyRule

__all__ = ['StudyConfig', 'StudyTask']


@dataclass(frozen=True, kw_only=True)
class StudyConfig(DrealConfig):
    """Options of `StudyTask`: those of `DrealTask`, and

    Attributes:
        reward_form: 'ratio' is Eq. 1; 'log' the gain of log-likelihood.
        reward_standardized: Standardize the rewards of right samples within each group of the batch.
        wrong_samples: 'penalty' of gamma, 'exclude' them, or 'measure' them as right ones.
        critic_standardized: Whether a critic reads states and maps standardized over the batch.
        taylor_sites: 'all', or 'drawn': 'taylor' measures at the drawn site of each group alone.
        actor: 'critic' is the paper's; 'direct' has L_q raise the rewards of 'taylor' themselves, without the critic,
            which goes on to learn. The push comes one step late, as these rewards do.
        actor_start: Epochs in which the critic learns alone, before L_q is added.
        actor_share: Weighs L_q so that its gradient at the attention parameters is so many times as long as that of
            L_c, in place of actor_weight; see `ActorShare`.

    Raises:
        ValueError: An option has a value that it does not accept, or options contradict each other.
    """
    reward_form: str = option('ratio', 'form of the reward', choices=('ratio', 'log'))
    reward_standardized: bool = option(False, 'standardize the rewards of right samples within each group')
    wrong_samples: str = option('penalty', 'reward of a wrong sample', choices=('penalty', 'exclude', 'measure'))
    critic_standardized: bool = option(False, 'the critic reads states and maps standardized over the batch')
    taylor_sites: str = option('all', 'sites that taylor measures', choices=('all', 'drawn'))
    actor: str = option('critic', 'what L_q raises', choices=('critic', 'direct'))
    actor_start: int = option(0, 'epochs in which the critic learns alone', minimum=0)
    actor_share: float | None = option(None, "length of L_q's gradient beside L_c's, in place of actor_weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe != 'taylor':
            for name, departs in (('taylor_sites', self.taylor_sites != 'all'), ('actor', self.actor != 'critic')):
                if departs:
                    raise ValueError(f"{name} is for probe='taylor', not for probe='{self.probe}'.")
        if self.actor == 'direct' and self.reward_standardized:
            raise ValueError("actor='direct' raises rewards themselves, whose sum standardized ones would not change.")


class StudyJudgement(NamedTuple):
    """A judgement, and what the direct actor needs.

    Attributes:
        output: See `Judgement`, as of all up to `inputs`.
        descriptors: What the map of each site was computed from, by its name.
        change: How the log-probability of the batch before changes to first order if a map is replaced by its mean,
            (B, L), with a graph to the attention parameters alone.
    """
    output: torch.Tensor
    actor_quality: torch.Tensor
    critic_quality: torch.Tensor
    states: Mapping[str, torch.Tensor]
    maps: Mapping[str, torch.Tensor]
    norms: Mapping[str, Sequence[Stats]]
    inputs: Mapping[str, torch.Tensor]
    descriptors: Mapping[str, Sequence[torch.Tensor]]
    change: torch.Tensor | None


@dataclass
class StudyPending(Pending):
    """A batch whose rewards are known after its backward pass, with the descriptors of its maps."""
    descriptors: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict)


class StudyTrainable(DrealTrainableModule):
    """Model and critic; with `earlier` it computes the maps of the batch before again, for the direct actor."""

    def forward(
            self,
            input: torch.Tensor,
            replay: bool = False,
            saved: Sequence[str] = (),
            taps: Mapping[str, torch.Tensor] | None = None,
            pending: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]] | None = None,
            descriptors: bool = False,
            earlier: tuple[
                Mapping[str, Sequence[torch.Tensor]], Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]
            ] | None = None,
    ) -> Any:
        """Return a `StudyJudgement`, see `DrealTrainableModule.forward`.

        Args:
            descriptors: Whether to return what maps were computed from.
            earlier: Such descriptors by site, maps by group, and the gradient of a quantity at these maps by group, of
                another batch.
        """
        judged = self.judged_pass(input, replay, saved, taps)
        return StudyJudgement(
            *self.judge(judged, pending),
            descriptors={name: one.descriptors for name, one in judged.readings.items()} if descriptors else {},
            change=None if earlier is None else self._change(*earlier))

    def _change(
            self,
            descriptors: Mapping[str, Sequence[torch.Tensor]],
            maps: Mapping[str, torch.Tensor],
            gradients: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        again = stack_maps(
            self.groups,
            {site.name: map_again(self.model, site, descriptors[site.name]) for site in sites_of(self.groups)})
        # what is not known changes nothing, and a NaN would reach the parameters through any mask
        return torch.cat([
            first_order(gradients[name].nan_to_num(0.0, 0.0, 0.0), maps[name] + (graph - graph.detach()))
            for name, graph in again.items()], dim=1)


class StudyTaylorProbe(TaylorProbe):
    """'taylor' at the drawn sites alone, and with what the direct actor needs."""
    drawn_alone = direct = False

    def options(self, before: Pending | None, due: bool) -> dict[str, Any]:
        if not self.direct:
            return {}
        before = cast(StudyPending | None, before)
        earlier = None if before is None else (before.descriptors, before.maps, before.gradients())
        return {'earlier': earlier, 'descriptors': due}

    def measured_sites(self, trainable: DrealTrainableModule) -> torch.Tensor:
        if not self.drawn_alone:
            return super().measured_sites(trainable)
        return torch.cat([
            torch.arange(len(group.sites)) == index
            for group, index in zip(self.groups, trainable.rotation.draw(), strict=True)])

    def save(
            self,
            judged: Judgement,
            taps: Mapping[str, torch.Tensor],
            right: torch.Tensor,
            known: torch.Tensor,
            sites: torch.Tensor,
    ) -> Pending:
        plain = super().save(judged, taps, right, known, sites)
        if not self.direct:
            return plain
        descriptors = {
            name: tuple(tensor.clone() if self.compiled else tensor for tensor in tensors)
            for name, tensors in cast(Any, judged).descriptors.items()}
        return StudyPending(plain.states, plain.maps, taps, right, known, sites, descriptors=descriptors)


class StudyTask(DrealTask):
    """`DrealTask` with the options of `StudyConfig`."""
    config_class = StudyConfig
    trainable_class = StudyTrainable
    config: StudyConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.share = None if self.config.actor_share is None else ActorShare(self.config.actor_share)

    def reward_rule(self) -> StudyRule:
        config = self.config
        return StudyRule(
            config.gamma, config.reward_clip, config.reward_form, config.wrong_samples, config.reward_standardized)

    def make_probe(self, setup: ProbeSetup) -> Probe:
        if self.config.probe != 'taylor':
            return super().make_probe(setup)
        probe = StudyTaylorProbe.build(setup)
        assert isinstance(probe, StudyTaylorProbe)
        probe.drawn_alone = self.config.taylor_sites == 'drawn'
        probe.direct = self.config.actor == 'direct'
        return probe

    def make_trainable(self, model: nn.Module, groups: Sequence[Group]) -> DrealTrainableModule:
        if self.config.critic_standardized:
            self.critic_class = StandardizedCritic
        return super().make_trainable(model, groups)

    def actor_loss(self, judged: Judgement, rewards: Rewards) -> torch.Tensor:
        if self.config.actor == 'critic':
            return super().actor_loss(judged, rewards)
        change = cast(Any, judged).change
        if change is None:  # the first step of an epoch has no batch before it
            return judged.actor_quality.detach().sum() * 0
        wrong = 'measure' if self.config.wrong_samples == 'measure' else 'exclude'
        rule = StudyRule(self.config.gamma, self.config.reward_clip, self.config.reward_form, wrong)
        values = rule(change, rewards.right, range(change.shape[1]))
        return actor_loss(values.where(~values.isnan(), torch.zeros_like(values))).mean()

    def with_actor(self, loss: torch.Tensor, l_q: torch.Tensor) -> torch.Tensor:
        if self._trainable.rotation.epoch < self.config.actor_start or not l_q.requires_grad:
            return loss
        if self.share is None:
            return super().with_actor(loss, l_q)
        theta = attention_parameters(self._trainable.model, self._sites)
        loss = loss + self.share.weigh(l_q, [parameter for parameter in theta.values() if parameter.requires_grad])
        self.share.watch(loss)
        return loss

    def compile(self, *args: Any, **kwargs: Any) -> nn.Module:
        """See `DrealTask.compile`. `ActorShare` looks at a gradient before the backward pass, for which compiled
        backward passes of this process keep their buffers (functorch's `donated_buffer` is off).
        """
        if self.share is not None and hasattr(torch._functorch.config, 'donated_buffer'):
            torch._functorch.config.donated_buffer = False
        return super().compile(*args, **kwargs)

    def get_task_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().get_task_state(*args, **kwargs)
        return {**state, 'share': self.share.state_dict()} if self.share is not None and state else state

    def load_task_state(
            self,
            state: dict[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        super().load_task_state(state, strict, module, ema)
        if self.share is not None and state and 'share' in state and not ema:
            self.share.load_state_dict(state['share'])
