"""What learns in a run, from its configuration: network, task and optimizer, made by timm's factories"""
import importlib
import logging
import math
import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import set_fast_norm
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.task import ClassificationTask
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dreal_timm.attention.sites import attention_parameters, find_sites
from dreal_timm.errors import UNREADABLE, WeightsError, nearest, why_unreadable
from dreal_timm.hub.backbone import load_backbone, open_gates
from dreal_timm.hub.damage import check_damage
from dreal_timm.hub.loading import check_model_name, fetch_network
from dreal_timm.models.reid import backbone_of
from dreal_timm.task import DrealTask
from dreal_timm.train.settings import TrainConfig

__all__ = [
    'build_model', 'build_optimizer', 'build_task', 'freeze_backbone', 'import_device_modules',
]


_logger = logging.getLogger(__name__)


def import_device_modules(config: TrainConfig) -> None:
    """Import the modules that the recipe names, as timm's train.py does."""
    for name in config.device_modules or ():
        importlib.import_module(name)


def _init_head(model: Any, scale: float | None, bias: float | None) -> None:
    head = model.get_classifier()
    with torch.no_grad():
        if bias is not None and head.bias is None:
            raise ValueError('head_init_bias: the classifier has no bias.')
        if scale is not None:
            for parameter in head.parameters():
                parameter.mul_(scale)
        if bias is not None:
            head.bias.fill_(bias)


def _start_backbone(config: TrainConfig, model: nn.Module) -> None:
    if config.dreal.start.backbone:
        loaded = load_backbone(backbone_of(model), config.dreal.start.backbone, gates=config.dreal.start.gates)
        _logger.info(f'backbone {config.dreal.start.backbone}: {loaded}')
        for word, names in (('missing', loaded.missing), ('unused', loaded.unused)):
            if len(names) > 3:  # the line before names them otherwise
                _logger.info(f"{word}: {', '.join(names)}")
    elif config.dreal.start.gates == 'open':
        open_gates(model)


def _check_start(config: TrainConfig) -> None:
    """Raise an error if what the network starts from is not there, or is named twice."""
    check_model_name(config.model)
    for key in ('initial_checkpoint', 'pretrained_path'):
        path = getattr(config, key)
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"{key}: no file '{path}'.")
        if path:
            check_damage(path)
    started = config.pretrained or config.pretrained_path or config.initial_checkpoint
    if started and (config.dreal.start.backbone or config.dreal.start.gates == 'open'):
        raise ValueError(
            'dreal.start.backbone, dreal.start.gates: the network starts from pretrained, pretrained_path or '
            'initial_checkpoint.')
    if config.pretrained_path and timm.models.parse_model_name(config.model)[0] is not None:
        raise ValueError(
            f"pretrained_path: '{config.model}' names weights of its own, which timm takes in place of the file: name "
            'the architecture.')
    if config.pretrained and config.model == 'dreal_reid':
        raise ValueError('pretrained: dreal_reid has no weights; dreal.start.backbone names those of its backbone.')


def _model_arguments(config: TrainConfig) -> dict[str, Any]:
    """Arguments of `timm.create_model`."""
    kwargs = resolve_model_input_args(
        config.model,
        dict(in_chans=config.in_chans, input_size=config.input_size, img_size=config.img_size),
        **dict(
            num_classes=config.num_classes,
            drop_rate=config.drop,
            drop_path_rate=config.drop_path,
            drop_block_rate=config.drop_block,
            global_pool=config.gp,
            bn_momentum=config.bn_momentum,
            bn_eps=config.bn_eps,
        ) | config.model_kwargs,
    )
    if config.pretrained_path:
        # as timm's train.py: the file comes before the Hub, and the classifier is made anew
        kwargs['pretrained_cfg_overlay'] = dict(file=config.pretrained_path, num_classes=-1)
    return dict(
        kwargs,
        pretrained=config.pretrained or bool(config.pretrained_path),
        checkpoint_path=config.initial_checkpoint or None,
    )


def build_model(config: TrainConfig) -> nn.Module:
    """Create the network of a run.

    Raises:
        ValueError: No such model, or weights that do not fit it.
        FileNotFoundError: No such initial checkpoint.
        WeightsError: The weights cannot be downloaded from the Hub.
    """
    _check_start(config)
    if config.fast_norm:
        set_fast_norm()
    if not {'pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir'} & config.model_kwargs.keys():
        fetch_network(config.model, weights=bool(config.pretrained) and not config.pretrained_path)
    arguments = _model_arguments(config)
    given = config.initial_checkpoint or config.pretrained_path
    try:
        model = timm.create_model(**arguments)
    except TypeError as error:
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if refused is None or refused[1] not in config.model_kwargs:
            raise
        raise ValueError(
            f'model_kwargs: {config.model} does not take {refused[1]}. The recipe has it for another network: '
            'model_kwargs=null leaves all of them out.') from error
    except UNREADABLE as error:
        if not given and config.pretrained and isinstance(error, OSError):
            raise WeightsError(f'The weights of {config.model} cannot be had: {error}') from error
        if not given:
            raise
        hint = '' if config.pretrained_path else ' (pretrained_path leaves its classifier out)'
        raise ValueError(
            f"Cannot load '{given}' as weights of {config.model}{hint}: {why_unreadable(error)}") from error
    _start_backbone(config, model)
    if config.head_init_scale is not None or config.head_init_bias is not None:
        _init_head(model, config.head_init_scale, config.head_init_bias)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    network: nn.Module = model
    return network


def freeze_backbone(model: Any, input_size: tuple[int, ...]) -> list[nn.Module]:
    """Freeze all but the attention modules and the classifier, of an embedding network also its neck.

    Returns:
        The batch norms that are frozen: they must be in evaluation mode while the rest trains, or their running
        statistics would drift.
    """
    free = {id(p) for p in attention_parameters(model, find_sites(model, input_size)).values()}
    free |= {id(p) for p in model.get_classifier().parameters()}
    backbone = {id(p) for p in backbone_of(model).parameters()}
    free |= {id(p) for p in model.parameters() if p.requires_grad and id(p) not in backbone}
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in free
    return [
        module for module in model.modules()
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters())
    ]


def build_task(
        config: TrainConfig,
        model: nn.Module,
        input_size: tuple[int, ...],
        **options: Any,
) -> ClassificationTask:
    """Create the task: reinforced, or timm's plain one with `dreal.enabled: false`.

    Args:
        config: The configuration.
        model: The network.
        input_size: (C, H, W) of the images.
        **options: Arguments that both tasks have: criterion, device and verbosity.
    """
    if not config.dreal.enabled:
        return ClassificationTask(model, **options)
    return DrealTask(model, input_size=input_size, config=config.dreal.of_task(config.seed), **options)


def build_optimizer(config: TrainConfig, module: nn.Module, global_batch_size: int) -> torch.optim.Optimizer:
    """Create the optimizer; the learning rate scales with the batch size as in timm's train.py.

    Args:
        config: The configuration; its `lr` is set.
        module: The trainable module.
        global_batch_size: Images that go into one update, of all processes and accumulated steps.

    Raises:
        ValueError: timm has no such optimizer.
    """
    if not config.opt or config.opt.lower().removeprefix('lookahead_') not in list_optimizers():
        raise ValueError(f"Unknown optimizer '{config.opt}'{nearest(config.opt, list_optimizers())}.")
    if not config.lr:
        ratio = global_batch_size / config.lr_base_size
        adaptive = any(name in config.opt.lower() for name in ('ada', 'lamb'))
        scale = config.lr_base_scale or ('sqrt' if adaptive else 'linear')
        config.lr = config.lr_base * (math.sqrt(ratio) if scale == 'sqrt' else ratio)
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        module, **optimizer_kwargs(cfg=config), **config.opt_kwargs)
    return optimizer
