"""The training task: timm's ClassificationTask with a critic (Sec. 3.4, Algorithm 1)

Shape letters: B batch, K classes, L sites of all groups, P probed sites.
"""
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from timm.models import get_model_input_config
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dreal_timm.attention.readers import without_sites
from dreal_timm.attention.sites import Group, Site, attention_parameters, find_sites, group_sites
from dreal_timm.config import DrealConfig
from dreal_timm.critic import Critic
from dreal_timm.losses import actor_loss, critic_loss, reduce_critic_loss
from dreal_timm.probes.base import Measure, PassMeasure
from dreal_timm.probes.counterfactual import PROBES
from dreal_timm.probes.entry_points import trace_flow
from dreal_timm.probes.taylor import TaylorMeasure
from dreal_timm.replay.batch_norms import check_probeable
from dreal_timm.reward import RewardRule, reward
from dreal_timm.rotation import Rotation
from dreal_timm.share import ActorShare
from dreal_timm.trainable import DrealTrainableModule
from dreal_timm.utils.transfer import to_device

__all__ = ['DrealTask']

_logger = logging.getLogger(__name__)

_STUDY: dict[str, Any] = dict(
    reward_form='ratio', reward_standardized=False, wrong_samples='penalty', critic_standardized=False,
    taylor_sites='all', actor='critic', actor_start=0, actor_share=None)


def check_model(model: nn.Module, config: DrealConfig) -> None:
    """Raise a ValueError if the network cannot be trained so."""
    if config.probe_dtype is not None and any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        raise ValueError("probe_dtype='float32' needs a network with float32 weights, under autocast.")
    if isinstance(model, DistributedDataParallel) or hasattr(model, '_orig_mod'):
        raise ValueError('Pass the plain network; compile() and prepare_distributed() are methods of the task.')
    check_probeable(model)


class DrealTask(ClassificationTask):
    """Deep reinforced attention learning, in the place of timm's ClassificationTask.

    In training mode one call runs the judged pass, lets the critics judge every attention map (Q), measures by
    counterfactual passes how much the probed maps helped (R), and returns

        loss = L_c + actor_weight * L_q + L_r                                                     (Sec. 3.4)

    with one graph for one `backward()`, in which the backbone learns from the class loss L_c alone, attention
    parameters from L_c and L_q (Eq. 8), and the critic from L_r alone (Eq. 9; Algorithm 1, l. 10 to 12). In evaluation
    mode, or without gradients, it returns the class loss.

    The trainable module is model and critic; the eval model, and every saved `state_dict`, is the model alone. The
    critic's weights and the count of epochs are the task's own state (`task_state` in timm's checkpoints).

    Args:
        model: A model with attention sites, see `dreal_timm.find_sites`.
        criterion: Loss function. Created from criterion_kwargs when None.
        criterion_kwargs: Arguments for timm's create_classification_loss() when criterion is None.
        device: Device for task tensors/buffers.
        dtype: Dtype for task tensors/buffers.
        verbose: Enable info logging.
        gamma: Penalty of a wrongly classified sample (Eq. 1).
        actor_weight: Weight of L_q. The paper adds it with 1, at which most gates end near 0 or 1 (docs/evidence.md).
            With 0 the model learns exactly as it does without a critic.
        probe: How rewards are measured: 'split', one counterfactual pass in which each sample answers for one group;
            'exact', one for each group (Algorithm 1); 'taylor', to first order from the gradient that the backward
            pass computes anyway, for all sites, of which the critic learns in the next step.
        probe_every: Rewards are measured in every so many steps; in those between the critic's judgement alone goes on
            to teach.
        taylor_target: 'loss' lets 'taylor' measure by each sample's own class loss l, R = 1 - exp(-(l' - l)), which
            losses other than plain cross-entropy need.
        rotate: When another site of each group is probed: 'epoch' (Sec. 4.1), 'step', or a number of steps. An epoch
            begins at `train()` of the trainable module after at least one step, or at `set_epoch()`.
        reward_clip: Rewards are clamped to [-reward_clip, reward_clip]; None is the literal Eq. 1.
        reward_form: 'ratio' is Eq. 1; 'log' takes the gain of log-likelihood, log p_c - log p_c(bypassed) (nats).
        reward_standardized: Standardize the rewards of right samples within each group of the batch, to mean 0 and
            standard deviation 1/2, before they are clamped.
        wrong_samples: 'penalty' gives a wrongly classified sample -gamma (Eq. 1), 'exclude' leaves it out of L_r,
            'measure' gives it the reward of a right one.
        probe_dtype: 'float32' measures rewards in float32 under autocast, at the price of one more pass.
        input_size: (C, H, W) of the images, which sizes the critics of spatial maps. None takes the model's config.
        seed: Seed of the critic's weights and of the draw of sites.
        critic_cell: 'lstm' (Sec. 3.2) or 'gru'.
        critic_hidden_size: Hidden units of a critic; other than 1, a linear read-out follows.
        critic_depth: Cells of a critic on top of each other.
        critic_standardized: Whether a critic reads states and maps standardized over the batch.
        taylor_sites: 'all', or 'drawn': 'taylor' measures at the drawn site of each group alone.
        actor: 'critic' is the paper's; 'direct' has L_q raise the rewards of 'taylor' themselves, without the critic,
            which goes on to learn. The push comes one step late, as these rewards do.
        actor_start: Epochs in which the critic learns alone, before L_q is added.
        actor_share: Weighs L_q so that its gradient at the attention parameters is so many times as long as that of
            L_c, in place of actor_weight; see `dreal_timm.share`.

    Raises:
        ValueError: The model has no attention site, none of its attention parameters is trainable, one of its layers
            cannot be probed, the model is wrapped already, gamma does not lie in (0, reward_clip], or an option has
            an unknown value.

    Examples:

        ```python
        model = timm.create_model('dreal_se_resnet50')
        task = DrealTask(model, criterion_kwargs=dict(smoothing=0.1))
        optimizer = timm.optim.create_optimizer_v2(task.get_trainable_module(), 'sgd', lr=0.1)
        task.get_trainable_module().train()
        result = task(input, target)
        result['loss'].backward()
        ```
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: nn.Module | Callable | None = None,
            criterion_kwargs: dict[str, Any] | None = None,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
            *,
            config: DrealConfig | None = None,
            input_size: Sequence[int] | None = None,
            **options: Any,
    ):
        study = {name: options.pop(name, default) for name, default in _STUDY.items()}
        if config is not None and options:
            raise TypeError(f"Pass config or options, not both: {', '.join(options)}.")
        self.config = config = DrealConfig(**options) if config is None else config
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        check_model(model, config)
        self.rule = RewardRule(
            config.gamma, config.reward_clip, study['reward_form'], study['wrong_samples'],
            study['reward_standardized'])
        self.actor, self.actor_start = study['actor'], study['actor_start']
        self.share = None if study['actor_share'] is None else ActorShare(study['actor_share'])
        sites = find_sites(model, input_size)
        groups = group_sites(sites)
        if not groups:
            raise ValueError(without_sites(model))
        if input_size is None:
            input_size = get_model_input_config(model)['input_size']
        rule: dict[str, Any] = dict(rule=self.rule, ignored=getattr(self.criterion, 'ignore_index', None))
        self.measure: Measure
        seed = config.seed or 0
        if config.probe == 'taylor':
            self.measure = TaylorMeasure(
                groups, self.criterion, config.taylor_target, study['taylor_sites'], self.actor == 'direct', **rule)
        else:
            dtype = None if config.probe_dtype is None else torch.float32
            flow = trace_flow(model, sites, input_size)
            self.measure = PassMeasure(PROBES[config.probe](groups, flow, dtype, seed), **rule)
        critic = Critic(
            {group.name: group.judged_size for group in groups},
            seed=seed,
            cell=config.critic_cell,
            hidden_size=config.critic_hidden_size,
            depth=config.critic_depth,
            standardized=study['critic_standardized'],
            device=next(model.parameters()).device,
        )
        lengths = [(group.stage, len(group.sites)) for group in groups]
        rotation = Rotation(lengths, seed, config.rotate, config.probe_every)
        self.trainable_module: nn.Module = DrealTrainableModule(model, critic, groups, rotation)
        # column of each site in what the critics return, and index of its group
        self._columns = {
            site.name: (column, groups.index(group))
            for column, (group, site) in enumerate((group, site) for group in groups for site in group.sites)
        }
        self._check_trainable()
        if verbose:
            measured = f'{config.probe}, by the loss' if config.taylor_target == 'loss' else config.probe
            _logger.info(
                f'DrealTask: {len(sites)} attention sites in {len(groups)} groups, '
                f'{sum(p.numel() for p in critic.parameters())} critic parameters, probe={measured}, '
                f'rotate={config.rotate}'
            )

    @property
    def _trainable(self) -> DrealTrainableModule:
        return unwrap_model(self.trainable_module)

    @property
    def groups(self) -> list[Group]:
        """Groups of attention sites, one critic each."""
        return self._trainable.groups

    @property
    def _sites(self) -> list[Site]:
        return [site for group in self.groups for site in group.sites]

    def _check_trainable(self) -> None:
        theta = attention_parameters(self._trainable.model, self._sites)
        if not theta:
            raise ValueError('The attention modules have no parameters: L_q has nothing to train.')
        if not any(p.requires_grad for p in theta.values()):
            raise ValueError('All attention parameters are frozen (requires_grad=False): L_q has nothing to train.')

    def set_epoch(self, epoch: int) -> None:
        """Begin the given epoch, in place of counting the calls of `train()`."""
        self._trainable.rotation.begin_epoch(epoch)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        """Forward pass, judgement and losses.

        Args:
            input: Images, (B, C, H, W).
            target: Class indices (B,), or soft targets (B, K).

        Returns:
            Dictionary containing:
                - 'loss': Loss to call backward() on
                - 'output': Logits, (B, K)
            and in training mode, detached, for logging:
                - 'class_loss', 'actor_loss' (not weighted), 'critic_loss'
                - 'probed': Names of the P sites that were probed
                - 'reward', 'quality': (B, P) float32, NaN where a sample was not probed
                - 'right': Samples whose class wins or ties, (B,) bool
            With probe='taylor' the last four are those of the batch before.

        Raises:
            ValueError: Soft targets, with probe='taylor' that measures log-probabilities.
        """
        trainable = self._trainable
        if not (trainable.training and torch.is_grad_enabled()):
            return self._evaluate(input, target)
        if trainable.rotation.steps_in_epoch == 0:
            self.measure.forget()  # a run that is resumed here would have nothing either
        judged, measured = self.measure(self.trainable_module, trainable, input, target)
        class_loss = self.criterion(judged['output'], target)
        if not judged['actor_quality'].requires_grad:
            self._check_trainable()
        columns = [self._columns[site.name] for site in measured.sites]
        with torch.autocast(input.device.type, enabled=False):
            index = to_device(torch.tensor([column for column, _ in columns]), input.device)
            quality = judged['critic_quality'].index_select(1, index)
            l_q = self._actor_loss(judged, measured.right)
            l_r = reduce_critic_loss(critic_loss(quality, measured.reward), [group for _, group in columns])
            # 0 times the sum: every critic parameter has a gradient in every step, as DDP needs
            loss = class_loss + l_r + 0 * judged['critic_quality'].sum()
            if trainable.rotation.epoch >= self.actor_start and l_q.requires_grad:
                if self.share is not None:
                    loss = loss + self.share.weigh(l_q, self._actor_parameters())
                    self.share.watch(loss)
                elif self.config.actor_weight:
                    loss = loss + self.config.actor_weight * l_q
        self.measure.watch(loss)
        trainable.rotation.advance()
        return {
            'loss': loss,
            'output': judged['output'],
            'class_loss': class_loss.detach(),
            'actor_loss': l_q.detach(),
            'critic_loss': l_r.detach(),
            'probed': [site.name for site in measured.sites],
            'reward': measured.reward,
            'quality': quality.detach().masked_fill(measured.reward.isnan(), math.nan),
            'right': measured.right,
        }

    def _actor_loss(self, judged: dict[str, Any], right: torch.Tensor) -> torch.Tensor:
        """Return L_q, a number: by the critics' quality (Eq. 8), or by the first-order rewards themselves."""
        if self.actor == 'critic':
            return actor_loss(judged['actor_quality']).mean()
        if 'change' not in judged:  # the first step of an epoch has no batch before it
            return judged['actor_quality'].detach().sum() * 0
        wrong = 'measure' if self.rule.wrong == 'measure' else 'exclude'
        rewards = reward(judged['change'], right, clip=self.rule.clip, form=self.rule.form, wrong=wrong)
        return actor_loss(rewards.where(~rewards.isnan(), torch.zeros_like(rewards))).mean()

    def _actor_parameters(self) -> list[nn.Parameter]:
        theta = attention_parameters(self._trainable.model, self._sites)
        return [parameter for parameter in theta.values() if parameter.requires_grad]

    def _evaluate(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Class loss alone; with gradients through DDP's wrapper, which must see its parameters."""
        if torch.is_grad_enabled() and isinstance(self.trainable_module, DistributedDataParallel):
            judged = self.trainable_module(input)
            nothing = 0 * (judged['actor_quality'].sum() + judged['critic_quality'].sum())
            return {'loss': self.criterion(judged['output'], target) + nothing, 'output': judged['output']}
        model = self.get_eval_model()
        assert model is not None
        output = model(input)
        return {'loss': self.criterion(output, target), 'output': output}

    def compile(
            self,
            backend: str = 'inductor',
            mode: str | None = None,
            **compile_kwargs: Any,
    ) -> nn.Module:
        """Compile train and eval entry points; draws and probes stay outside.

        With inductor the train entry point draws random numbers as eager mode does (`fallback_random`), so that a
        probe can draw the same dropout masks again. `actor_share` looks at a gradient before the backward pass, for
        which compiled backward passes of this process keep their buffers (functorch's `donated_buffer` is off).
        """
        if isinstance(self.trainable_module, DistributedDataParallel):
            raise RuntimeError('compile() must come before prepare_distributed().')
        trainable = self._trainable
        self.eval_model = cast(nn.Module, torch.compile(trainable.model, backend=backend, mode=mode, **compile_kwargs))
        if backend == 'inductor':
            options = torch._inductor.list_mode_options(mode) if mode is not None else {}
            options = {**options, **compile_kwargs.pop('options', {}), 'fallback_random': True}
            compile_kwargs, mode = {**compile_kwargs, 'options': options}, None
        if self.share is not None and hasattr(torch._functorch.config, 'donated_buffer'):
            torch._functorch.config.donated_buffer = False
        self.measure.compiled = True
        self.trainable_module = cast(
            nn.Module, torch.compile(trainable, backend=backend, mode=mode, **compile_kwargs))
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the model without its critic."""
        resolved = super().get_eval_model(module=module, ema=ema)
        trainable = None if resolved is None else unwrap_model(resolved)
        return trainable.model if isinstance(trainable, DrealTrainableModule) else resolved

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return the model's parameters (the critic is not clipped), less those of its classifier if asked."""
        model = self._trainable.model
        get_classifier = getattr(model, 'get_classifier', None)
        head: set[int] = set()
        if exclude_head and get_classifier is not None:
            head = {id(parameter) for parameter in get_classifier().parameters()}
        return [parameter for parameter in model.parameters() if id(parameter) not in head]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the critic's weights and the count of steps and epochs."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            return {}
        trainable = unwrap_model(module)
        share = {} if self.share is None else {'share': self.share.state_dict()}
        return {'critic': trainable.critic.state_dict(), 'rotation': trainable.rotation.state_dict(), **share}

    def load_task_state(
            self,
            state: dict[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        """Load what `get_task_state` returned. A checkpoint without it (of plain training) leaves a fresh critic."""
        if not state or 'critic' not in state:
            _logger.info('The checkpoint holds no critic: it starts fresh.')
            return
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            raise RuntimeError('Cannot load EMA task state before setup_ema().')
        trainable = unwrap_model(module)
        trainable.critic.load_state_dict(state['critic'], strict=strict)
        trainable.rotation.load_state_dict(state['rotation'])
        if self.share is not None and 'share' in state and not ema:
            self.share.load_state_dict(state['share'])
