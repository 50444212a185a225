"""Embedding networks for re-identification: any convolutional network of timm, its last stride removed, and a neck

Paper: `Bag of Tricks and A Strong Baseline for Deep Person Re-identification` (CVPRW 2019) -
https://arxiv.org/abs/1903.07071: last stride 1, and a batch norm between the pooled features, which the triplet loss
sees, and those that are classified and retrieved.
"""
from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn
from torch.nn import functional as F

from dreal_timm.errors import reason
from dreal_timm.layers import GemPool
from dreal_timm.models.sources import FETCHING, check_source

__all__ = ['ReidNetwork', 'backbone_of', 'drop_identities', 'portable_arguments', 'remove_last_stride']

_POOLS = ('avg', 'max', 'gem')
_REGULARIZATION = {'drop_path_rate', 'drop_block_rate', 'bn_momentum', 'bn_eps'}
_HINT = ' (last_stride=2 leaves it)'
_Sizes = dict[str, tuple[int, int]]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _sizes(model: nn.Module, input: torch.Tensor) -> tuple[_Sizes, _Sizes, int]:
    """Heights and widths that each module takes and gives, by its name, and the height of the last map."""
    taken: _Sizes = {}
    given: _Sizes = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            maps = [part for part in (*args[:1], output) if isinstance(part, torch.Tensor) and part.dim() == 4]
            if len(maps) == 2:
                taken[name], given[name] = ((part.shape[2], part.shape[3]) for part in maps)
        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            last = model.forward_features(input)  # type: ignore[operator]
    except (AssertionError, RuntimeError) as error:
        size = tuple(input.shape[1:])
        raise ValueError(f'{type(model).__name__} cannot be tried with {size}{_HINT}: {reason(error)}') from error
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if last.dim() != 4:
        size = tuple(last.shape)
        raise ValueError(f'{type(model).__name__} gives no feature map, {size}: it has no last stride{_HINT}.')
    return taken, given, last.shape[2]


def remove_last_stride(model: nn.Module, input_size: tuple[int, int, int] = (3, 128, 128)) -> tuple[str, ...]:
    """Let the last layers that halve the map keep its size, without dilation, and return their names.

    Convolutions get the stride 1; a pooling of a shortcut becomes the identity. No weight changes.

    Args:
        model: A convolutional network of timm, changed in place.
        input_size: Channels, height and width of an image to try it with.

    Raises:
        ValueError: It gives no feature map, or its last stride is in a layer that is neither of these, or in one whose
            map would not fit then.
    """
    weight = next(model.parameters())
    input = torch.zeros(1, *input_size, device=weight.device, dtype=weight.dtype)
    taken, given, height = _sizes(model, input)
    halving = [
        name for name, size in given.items()
        if size[0] == height and taken[name][0] == 2 * height and not list(model.get_submodule(name).children())]
    changed = []
    for name in halving:
        module: Any = model.get_submodule(name)
        if isinstance(module, nn.Conv2d) and _pair(module.stride) == (2, 2):
            module.stride = (1, 1)
        elif isinstance(module, nn.AvgPool2d | nn.MaxPool2d) and _pair(module.stride) == (2, 2):
            parent, _, child = name.rpartition('.')
            setattr(model.get_submodule(parent), child, nn.Identity())
        else:
            raise ValueError(
                f'{name}, a {type(module).__name__}, halves the map: its stride cannot be removed{_HINT}.')
        changed.append(name)
    if not changed or _sizes(model, input)[2] != 2 * height:
        raise ValueError(f'{type(model).__name__} has no last stride that could be removed{_HINT}.')
    return tuple(changed)


class ReidNetwork(nn.Module):
    """An embedding network: features (before the neck) for the triplet loss, embeddings (after it) for all else.

    Args:
        backbone: Name of a timm model that gives a feature map.
        num_classes: Identities to classify; 0 gives the embeddings.
        in_chans: Channels of the images.
        global_pool: 'avg', 'max' or 'gem'.
        last_stride: 1 removes the last stride of the backbone, 2 leaves it.
        neck: Whether a batch norm without a bias stands between features and classifier.
        drop_rate: Dropout before the classifier.
        backbone_args: Further arguments of the backbone.
        **regularization: drop_path_rate, drop_block_rate, bn_momentum and bn_eps of the backbone; None leaves its own.

    Raises:
        TypeError: An argument of another name.
        ValueError: A wrong choice, or a backbone without a last stride that could be removed.
    """

    def __init__(
            self,
            backbone: str = 'dreal_cbam_resnet50',
            num_classes: int = 0,
            in_chans: int = 3,
            global_pool: str = 'avg',
            last_stride: int = 1,
            neck: bool = True,
            drop_rate: float = 0.0,
            backbone_args: dict[str, Any] | None = None,
            **regularization: float | None,
    ):
        super().__init__()
        unknown = sorted(regularization.keys() - _REGULARIZATION)
        if unknown:
            raise TypeError(f"ReidNetwork.__init__() got an unexpected keyword argument '{unknown[0]}'")
        if global_pool not in _POOLS or last_stride not in (1, 2):
            raise ValueError(
                f"global_pool must be one of {', '.join(_POOLS)} and last_stride 1 or 2, got '{global_pool}' and "
                f'{last_stride}.')
        given = {name: value for name, value in regularization.items() if value is not None}
        self.backbone: Any = timm.create_model(
            backbone, num_classes=0, global_pool='', in_chans=in_chans, **{**given, **(backbone_args or {})})
        if last_stride == 1:
            remove_last_stride(self.backbone, (in_chans, 128, 128))
        self.num_features = self.head_hidden_size = self.backbone.num_features
        self.num_classes, self.in_chans = num_classes, in_chans
        self.drop_rate, self.pool_type = drop_rate, global_pool
        self.global_pool = GemPool() if global_pool == 'gem' else nn.Identity()
        self.neck = nn.BatchNorm1d(self.num_features) if neck else nn.Identity()
        if neck:
            self.neck.bias.requires_grad_(False)  # features stay around the origin, which cosines are taken from
        self.fc = self._classifier(num_classes)
        self.grad_checkpointing = False

    def _classifier(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        layer = nn.Linear(self.num_features, num_classes, bias=False)
        nn.init.normal_(layer.weight, std=0.001)
        return layer

    def get_classifier(self) -> nn.Module:
        """Return the classifier of identities."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 leaves the embeddings."""
        if global_pool not in (None, self.pool_type):
            raise ValueError(f'The pooling is {self.pool_type}, and cannot be changed to {global_pool}.')
        self.num_classes = num_classes
        self.fc = self._classifier(num_classes).to(next(self.parameters()).device)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations of the backbone again in the backward pass."""
        self.grad_checkpointing = enable
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: those of the backbone."""
        names: set[str] = getattr(self.backbone, 'no_weight_decay', set)()
        return {f'backbone.{name}' for name in names} | ({'global_pool.p'} if self.pool_type == 'gem' else set())

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last feature map, (B, C, H, W)."""
        features: torch.Tensor = self.backbone.forward_features(x)
        return features

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Pool a feature map to features, (B, C)."""
        if self.pool_type == 'gem':
            pooled: torch.Tensor = self.global_pool(x)
            return pooled
        pool = F.adaptive_max_pool2d if self.pool_type == 'max' else F.adaptive_avg_pool2d
        return pool(x, 1).flatten(1)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Return logits of the identities, or embeddings with `pre_logits` or without a classifier."""
        x = self.neck(self.pool(x))
        if pre_logits:
            return x
        logits: torch.Tensor = self.fc(F.dropout(x, self.drop_rate, self.training))
        return logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of the identities, (B, num_classes), or embeddings, (B, C), without a classifier."""
        return self.forward_head(self.forward_features(x))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter groups, for a decay of learning rates by layers."""
        def prefixed(patterns: Any) -> Iterator[Any]:
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                text, *rest = pattern if isinstance(pattern, tuple) else (pattern,)
                text = r'^backbone\.' + text.removeprefix('^')
                yield (text, *rest) if rest else text

        groups = self.backbone.group_matcher(coarse=coarse)
        return {
            name: list(prefixed(value)) if isinstance(value, list) else next(prefixed(value))
            for name, value in groups.items()}


def _arguments(model: nn.Module) -> dict[str, Any]:
    """What timm built a network with, which it notes in a private attribute."""
    arguments: dict[str, Any] = getattr(model, '_model_args', {})
    return arguments


def backbone_of(model: Any) -> Any:
    """Return the network inside of an embedding network; of others, the network itself."""
    return model.backbone if isinstance(model, ReidNetwork) else model


def drop_identities(model: nn.Module) -> None:
    """Remove the classifier of an embedding network, whose identities are nobody else's, as an export does."""
    if isinstance(model, ReidNetwork):
        model.reset_classifier(0)


def portable_arguments(model: ReidNetwork) -> dict[str, Any]:
    """Return `backbone` and `backbone_args` for a config: they build the same network, and fetch and open nothing."""
    given = {name: value for name, value in _arguments(model).items() if name in ('backbone', 'backbone_args')}
    if any(sign in given.get('backbone', '') for sign in ':/\\'):  # of the Hub or a folder, whose config named more
        backbone: Any = model.backbone
        given = {'backbone': backbone.pretrained_cfg['architecture'], 'backbone_args': _arguments(backbone)}
    if given.get('backbone_args'):
        own = {*FETCHING, 'num_classes', 'global_pool', 'in_chans'}
        given['backbone_args'] = {key: value for key, value in given['backbone_args'].items() if key not in own}
    return given


default_cfgs = generate_default_cfgs({
    'dreal_reid.untrained': {
        'url': '', 'num_classes': 0, 'input_size': (3, 384, 128), 'pool_size': None, 'crop_pct': 1.0,
        'crop_mode': 'squash', 'interpolation': 'bilinear', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': None, 'classifier': 'fc', 'license': 'apache-2.0',
    },
})


@register_model
def dreal_reid(pretrained: bool = False, **kwargs: Any) -> ReidNetwork:
    """An embedding network for re-identification; `backbone` names the network that it is made of."""
    check_source(kwargs)
    if kwargs.pop('features_only', False):
        raise RuntimeError('features_only is not implemented for dreal_reid: make it of the backbone.')
    config = timm.get_pretrained_cfg(kwargs.get('backbone', 'dreal_cbam_resnet50'))
    inner = None if config is None else config.first_conv
    if inner is not None:  # which weights are fitted to the channels of the images by
        first = f'backbone.{inner}' if isinstance(inner, str) else tuple(f'backbone.{name}' for name in inner)
        kwargs['pretrained_cfg_overlay'] = {'first_conv': first, **(kwargs.get('pretrained_cfg_overlay') or {})}
    network: ReidNetwork = build_model_with_cfg(ReidNetwork, 'dreal_reid', pretrained, **kwargs)
    return network
