"""Forms of the reward and of its use that the study compares, and the controls whose rewards are other images'

A name is FORM, FORM/shuffled or FORM/random; FORM@1 (FORM@1/shuffled) leaves L_q out for an epoch. `plain` is timm's
ClassificationTask; `twice` is that with twice the gradient at the attention parameters, a push as long as that of
`direct-log-full` without any reward; `cal` is the counterfactual loss of `Counterfactual Attention Learning for
Fine-Grained Visual Categorization and Re-identification` (ICCV 2021) - https://arxiv.org/abs/2108.08728, the nearest
competitor. All others are options of `StudyTask`; those of the paper are `literal`.
"""
from contextlib import ExitStack
from typing import Any

import torch
from timm.task import ClassificationTask, TrainingTask
from torch import nn

from dreal_timm import find_sites
from dreal_timm.attention.gates import on_map
from dreal_timm.attention.sites import attention_parameters, site_reader
from dreal_timm.probes.base import Probe, Rewards
from dreal_timm.replay.overrides import scratch_buffers
from study import fashion
from study.task import StudyTask, StudyTaylorProbe

_TAYLOR: dict[str, Any] = dict(actor_weight=1.0, probe='taylor')
_EXACT: dict[str, Any] = dict(actor_weight=1.0, probe='exact', rotate='epoch')
_EXCLUDE = dict(wrong_samples='exclude')
FORMS: dict[str, dict[str, Any]] = {
    # the paper, and its rewards by cheaper probes
    'literal': _EXACT,
    'literal-weak': {**_EXACT, 'actor_weight': 0.1},
    'split': dict(actor_weight=1.0, probe='split', rotate='step'),
    'taylor': _TAYLOR,
    'taylor-drawn': dict(_TAYLOR, taylor_sites='drawn', rotate='step'),
    # what the critic is taught
    'standardized': dict(_TAYLOR, reward_standardized=True),
    'exclude': dict(_TAYLOR, **_EXCLUDE),
    'exclude-standardized': dict(_TAYLOR, **_EXCLUDE, reward_standardized=True),
    'measure-log': dict(_TAYLOR, wrong_samples='measure', reward_form='log'),
    'measure-log-standardized': dict(_TAYLOR, wrong_samples='measure', reward_form='log', reward_standardized=True),
    # what the critic is
    'capacity': dict(_TAYLOR, **_EXCLUDE, reward_standardized=True, critic_hidden_size=16),
    'inputs': dict(_TAYLOR, **_EXCLUDE, reward_standardized=True, critic_standardized=True),
    'capacity-inputs': dict(
        _TAYLOR, **_EXCLUDE, reward_standardized=True, critic_hidden_size=16, critic_standardized=True),
    # when and how strongly it teaches
    'warmup': dict(_TAYLOR, actor_start=1),
    'share': dict(_TAYLOR, actor_share=0.1),
    'inputs-share': dict(
        _TAYLOR, **_EXCLUDE, reward_standardized=True, critic_standardized=True, actor_start=1, actor_share=0.3),
    'capacity-inputs-share': dict(
        _TAYLOR, **_EXCLUDE, reward_standardized=True, critic_hidden_size=16, critic_standardized=True, actor_start=1,
        actor_share=0.3),
    # without a critic
    'direct': dict(_TAYLOR, actor='direct'),
    'direct-share': dict(_TAYLOR, actor='direct', actor_share=0.3),
    'direct-log-share': dict(_TAYLOR, actor='direct', actor_share=0.3, wrong_samples='measure', reward_form='log'),
    'direct-log-full': dict(_TAYLOR, actor='direct', actor_share=1.0, wrong_samples='measure', reward_form='log'),
}
BESIDE = ('plain', 'twice', 'cal')  # that are no options of StudyTask
CONTROLS = ('shuffled', 'random')


class Control(Probe):
    """The rewards of another probe without what they say of each image, each site by itself; their mean stays.

    'shuffled' permutes them among the samples of the batch that have one; 'random' draws normal numbers of the same
    mean and standard deviation. Of the direct actor, which needs gradients, it is those that are permuted or drawn.
    """

    def __init__(self, probe: Probe, kind: str, seed: int):
        super().__init__(probe.groups, probe.rule, probe.ignored)
        self.inner = probe
        self.kind = kind
        self.generator = torch.Generator().manual_seed(seed)

    def _blind(self, values: torch.Tensor) -> torch.Tensor:
        """(N, ...) with the samples permuted, or drawn anew."""
        if self.kind == 'shuffled':
            return values[torch.randperm(len(values), generator=self.generator).to(values.device)]
        noise = torch.randn(values.shape, generator=self.generator).to(values)
        return noise * values.std(0, correction=0) + values.mean(0)

    def __call__(self, call: nn.Module, trainable: Any, input: torch.Tensor, target: torch.Tensor) -> Any:
        if isinstance(self.inner, StudyTaylorProbe) and self.inner.direct and self.inner.pending is not None:
            for tap in self.inner.pending.taps.values():
                if tap.grad is not None:
                    tap.grad = torch.stack([self._blind(one) for one in tap.grad.unbind(1)], dim=1)
        judged, rewards = self.inner(call, trainable, input, target)
        values = rewards.values.clone()
        for column in values.unbind(1):
            known = ~column.isnan()
            if known.any():
                column[known] = self._blind(column[known])
        return judged, Rewards(rewards.sites, values, rewards.right)

    def watch(self, loss: torch.Tensor) -> None:
        self.inner.watch(loss)

    def reset(self) -> None:
        self.inner.reset()

    @classmethod
    def build(cls, *args: Any) -> 'Control':
        raise TypeError('A control is made of a probe.')


class CounterfactualTask(ClassificationTask):
    """CAL: the class loss, and that of the difference of the logits to those with random maps in place of all maps.

    Random maps are uniform between 0 and twice the mean of the map that they replace. Gradients reach everything
    through both passes, as in the paper; running statistics are those of the first.
    """

    def __init__(self, model: nn.Module, weight: float = 1.0, **kwargs: Any):
        super().__init__(model, **kwargs)
        self.weight = weight
        self.sites = find_sites(model, fashion.SIZE)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        model: Any = self.trainable_module
        output = model(input)
        loss = self.criterion(output, target)
        if model.training and torch.is_grad_enabled():
            with ExitStack() as stack:
                stack.enter_context(scratch_buffers(list(model.modules())))
                for site in self.sites:
                    stack.enter_context(on_map(*site_reader(model, site), _random_map))
                other = model(input)
            loss = loss + self.weight * self.criterion(output - other, target)
        return {'loss': loss, 'output': output}


class TwiceTask(ClassificationTask):
    """Plain training in which the gradients at the attention parameters are 1 + weight times as long."""

    def __init__(self, model: nn.Module, weight: float = 1.0, **kwargs: Any):
        super().__init__(model, **kwargs)
        for parameter in attention_parameters(model, find_sites(model, fashion.SIZE)).values():
            parameter.register_hook(lambda gradient: (1 + weight) * gradient)


def _random_map(attention: torch.Tensor) -> torch.Tensor:
    dims = tuple(range(1, attention.ndim))
    return torch.rand_like(attention) * 2 * attention.detach().mean(dims, keepdim=True)


def split_name(name: str) -> tuple[str, dict[str, Any], str]:
    """Return form, options beside its own, and control of a name; raise a ValueError if there is no such form."""
    first, _, control = name.partition('/')
    form, at, start = first.partition('@')
    if form not in (*BESIDE, *FORMS) or control not in ('', *CONTROLS) or (at and not start.isdigit()) or (
            form not in FORMS and (at or control)):
        raise ValueError(
            f"Unknown form '{name}', expected one of {', '.join((*BESIDE, *FORMS))}, those after {BESIDE[-1]} also "
            f"with @EPOCHS or {' or '.join(f'/{control}' for control in CONTROLS)}.")
    return form, {'actor_start': int(start)} if at else {}, control


def make_task(
        model: nn.Module,
        name: str,
        seed: int,
        device: torch.device,
        weight: float | None = None,
) -> TrainingTask:
    """Make the task of a form.

    Args:
        model: The network.
        name: FORM, FORM@EPOCHS, and either with /shuffled or /random.
        seed: Seed of critic, draw of sites and control.
        device: Device of the network.
        weight: actor_weight (of `cal`, of its loss; of `twice`, of what is added) in place of the form's own.
    """
    form, options, control = split_name(name)
    if form == 'plain':
        return ClassificationTask(model, device=device, verbose=False)
    given = {} if weight is None else {'weight': weight}
    if form == 'cal':
        return CounterfactualTask(model, device=device, verbose=False, **given)
    if form == 'twice':
        return TwiceTask(model, device=device, verbose=False, **given)
    options = {**FORMS[form], **options, **({} if weight is None else {'actor_weight': weight})}
    task = StudyTask(model, device=device, verbose=False, input_size=fashion.SIZE, seed=seed, **options)
    if control:
        task.probe = Control(task.probe, control, seed)
    return task
