"""The training task: timm's ClassificationTask with a critic (Sec. 3.4, Algorithm 1)

Shape letters: B batch, K classes, L sites of all groups, P probed sites.
"""
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from timm.models import get_model_input_config
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dreal_timm.attention.readers import without_sites
from dreal_timm.attention.sites import Group, Site, attention_parameters, find_sites, group_sites, sites_of
from dreal_timm.config import DrealConfig
from dreal_timm.critic import Critic
from dreal_timm.losses import actor_loss, critic_loss, reduce_critic_loss
from dreal_timm.probes.base import Probe, ProbeSetup, Rewards
from dreal_timm.probes.table import PROBES
from dreal_timm.replay.batch_norms import check_probeable
from dreal_timm.reward import RewardRule
from dreal_timm.rotation import Rotation
from dreal_timm.trainable import DrealTrainableModule, Judgement
from dreal_timm.utils.transfer import to_device

__all__ = ['DrealTask']

_logger = logging.getLogger(__name__)

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
        config: Options of the method.
        input_size: (C, H, W) of the images, which sizes the critics of spatial maps. None takes the model's config.
        **options: Fields of `DrealConfig`, in place of `config`.

    Attributes:
        actor_weight: Weight of L_q in the next step; a schedule may change it.

    Raises:
        ValueError: The model has no attention site, none of its attention parameters is trainable, one of its layers
            cannot be probed, the model is wrapped already, or an option has a value that it does not accept.
        TypeError: Both `config` and options, or an option that there is not.

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
    config_class: type[DrealConfig] = DrealConfig
    critic_class: type[Critic] = Critic
    trainable_class: type[DrealTrainableModule] = DrealTrainableModule

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
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        if config is not None and options:
            raise TypeError(f"Pass config or options, not both: {', '.join(options)}.")
        unknown = options.keys() - {each.name for each in fields(self.config_class)}
        if unknown:
            raise TypeError(f"Unknown option '{min(unknown)}': see {self.config_class.__name__}.")
        self.config = self.config_class(**options) if config is None else config
        if not isinstance(self.config, self.config_class):
            raise TypeError(f'config must be a {self.config_class.__name__}, got a {type(config).__name__}.')
        self.actor_weight = self.config.actor_weight
        check_model(model, self.config)
        sites = find_sites(model, input_size)
        groups = group_sites(sites)
        if not groups:
            raise ValueError(without_sites(model))
        if input_size is None:
            input_size = get_model_input_config(model)['input_size']
        self.probe = self.make_probe(
            ProbeSetup(self.config, model, sites, self.criterion, self.reward_rule(), input_size))
        self.trainable_module: nn.Module = self.make_trainable(model, groups)
        # column of each site in what the critics return, and index of its group
        self._columns = {
            site.name: (column, index) for column, (index, site) in enumerate(
                (index, site) for index, group in enumerate(groups) for site in group.sites)}
        self._check_trainable()
        if verbose:
            by_loss = ', by the loss' if self.config.taylor_target == 'loss' else ''
            _logger.info(
                f'DrealTask: {len(sites)} attention sites in {len(groups)} groups, '
                f'{sum(p.numel() for p in self._trainable.critic.parameters())} critic parameters, '
                f'probe={self.config.probe}{by_loss}, rotate={self.config.rotate}'
            )

    def reward_rule(self) -> RewardRule:
        """Return how a reward is made of a change of log-probability."""
        return RewardRule(self.config.gamma, self.config.reward_clip)

    def make_probe(self, setup: ProbeSetup) -> Probe:
        """Return what measures the rewards of the network's sites."""
        return PROBES[self.config.probe].build(setup)

    def make_trainable(self, model: nn.Module, groups: Sequence[Group]) -> DrealTrainableModule:
        """Return the network and its critic in one module."""
        config, seed = self.config, self.config.seed or 0
        critic = self.critic_class(
            {group.name: group.judged_size for group in groups},
            seed=seed,
            cell=config.critic_cell,
            hidden_size=config.critic_hidden_size,
            depth=config.critic_depth,
            device=next(model.parameters()).device,
        )
        lengths = [(group.stage, len(group.sites)) for group in groups]
        rotation = Rotation(lengths, seed, config.rotate, config.probe_every)
        return self.trainable_class(model, critic, groups, rotation)

    @property
    def _trainable(self) -> DrealTrainableModule:
        return unwrap_model(self.trainable_module)

    @property
    def groups(self) -> list[Group]:
        """Groups of attention sites, one critic each."""
        return self._trainable.groups

    @property
    def _sites(self) -> list[Site]:
        return sites_of(self.groups)

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
            self.probe.reset()  # a run that is resumed here would have nothing either
        judged, rewards = self.probe(self.trainable_module, trainable, input, target)
        class_loss = self.criterion(judged.output, target)
        if not judged.actor_quality.requires_grad:
            self._check_trainable()
        with torch.autocast(input.device.type, enabled=False):
            columns, groups = self._columns_of(rewards.sites)
            quality = judged.critic_quality.index_select(1, to_device(columns, input.device))
            l_q = self.actor_loss(judged, rewards)
            l_r = reduce_critic_loss(critic_loss(quality, rewards.values), groups)
            # 0 times the sum: every critic parameter has a gradient in every step, as DDP needs
            loss = self.with_actor(class_loss + l_r + 0 * judged.critic_quality.sum(), l_q)
        self.probe.watch(loss)
        trainable.rotation.advance()
        return {
            'loss': loss,
            'output': judged.output,
            'class_loss': class_loss.detach(),
            'actor_loss': l_q.detach(),
            'critic_loss': l_r.detach(),
            'probed': [site.name for site in rewards.sites],
            'reward': rewards.values,
            'quality': quality.detach().masked_fill(rewards.values.isnan(), math.nan),
            'right': rewards.right,
        }

    def _columns_of(self, sites: Sequence[Site]) -> tuple[torch.Tensor, list[int]]:
        """Return the column of each site in what the critics return, (P,), and the index of its group."""
        columns, groups = zip(*(self._columns[site.name] for site in sites), strict=True)
        return torch.tensor(columns), list(groups)

    def actor_loss(self, judged: Judgement, rewards: Rewards) -> torch.Tensor:
        """Return L_q of a batch (Eq. 8), a number with a graph to the attention parameters."""
        return actor_loss(judged.actor_quality).mean()

    def with_actor(self, loss: torch.Tensor, l_q: torch.Tensor) -> torch.Tensor:
        """Return the loss of a step with L_q, weighed."""
        if self.actor_weight and l_q.requires_grad:
            loss = loss + self.actor_weight * l_q
        return loss

    def _evaluate(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Class loss alone; with gradients through DDP's wrapper, which must see its parameters."""
        if torch.is_grad_enabled() and isinstance(self.trainable_module, DistributedDataParallel):
            judged = self.trainable_module(input)
            nothing = 0 * (judged.actor_quality.sum() + judged.critic_quality.sum())
            return {'loss': self.criterion(judged.output, target) + nothing, 'output': judged.output}
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
        probe can draw the same dropout masks again.
        """
        if isinstance(self.trainable_module, DistributedDataParallel):
            raise RuntimeError('compile() must come before prepare_distributed().')
        trainable = self._trainable
        self.eval_model = cast(nn.Module, torch.compile(trainable.model, backend=backend, mode=mode, **compile_kwargs))
        if backend == 'inductor':
            options = torch._inductor.list_mode_options(mode) if mode is not None else {}
            options = {**options, **compile_kwargs.pop('options', {}), 'fallback_random': True}
            compile_kwargs, mode = {**compile_kwargs, 'options': options}, None
        self.probe.compiled = True
        self.trainable_module = cast(
            nn.Module, torch.compile(trainable, backend=backend, mode=mode, **compile_kwargs))
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the model without its critic."""
        resolved = super().get_eval_model(module=module, ema=ema)
        trainable = None if resolved is None else unwrap_model(resolved)
        return trainable.model if isinstance(trainable, DrealTrainableModule) else resolved

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return the model's parameters (the critic is not clipped), less those of its classifier if `exclude_head`."""
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
        return {'critic': trainable.critic.state_dict(), 'rotation': trainable.rotation.state_dict()}

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
