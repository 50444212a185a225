"""Starting a network with attention from the weights of one without: the backbone is copied, the attention is fresh"""
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers.cbam import ChannelAttn, SpatialAttn
from timm.layers.squeeze_excite import SEModule
from timm.models import adapt_input_conv, clean_state_dict, get_model_input_config
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn

from dreal_timm.attention.readers import READERS
from dreal_timm.errors import UNREADABLE
from dreal_timm.hub.loading import load, read_checkpoint
from dreal_timm.layers import SrmModule

__all__ = ['Backbone', 'load_backbone', 'open_gates']

_OPEN = 4.0  # sigmoid(4) is 0.982


@dataclass(frozen=True)
class Backbone:
    """What became of the weights.

    Attributes:
        loaded: Names of the tensors that were copied.
        fresh: Names of the network's tensors that keep what they had: those of attention modules, and of the classifier
            where it is not requested.
        missing: Names of the network's other tensors, which the weights do not have.
        unused: Names of the weights' tensors that have no place in the network.
    """
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        text = f'{len(self.loaded)} tensors loaded, {len(self.fresh)} fresh (attention and classifier)'
        for word, names in (('missing', self.missing), ('unused', self.unused)):
            if names:
                more = f' and {len(names) - 3} more' if len(names) > 3 else ''
                text += f', {len(names)} {word}: {", ".join(names[:3])}{more}'
        return text


# the last layer before the sigmoid of each class, and the bias that lets the map be about sigmoid(4)
_LAST: dict[type[nn.Module], tuple[str, float]] = {
    SEModule: ('fc2', _OPEN),
    SqueezeExcite: ('conv_expand', _OPEN),
    ChannelAttn: ('fc2', _OPEN / 2),  # the mean and the maximum both go through it
    SpatialAttn: ('conv.bn', _OPEN),
    SrmModule: ('bn', _OPEN),
}


def _attention(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module) in READERS}


@torch.no_grad()
def open_gates(model: nn.Module) -> int:
    """Let each gate start at about 1, for every input, so that features pass nearly as they are.

    The layer before the sigmoid keeps a tenth of its weights and gets a bias of 4, in all, so that maps lie around
    0.98. Gates of SE, EfficientNet's SqueezeExcite, CBAM with MLP biases, and SRM can be opened.

    Args:
        model: The network.

    Returns:
        Number of the attention modules.

    Raises:
        ValueError: An attention module is of another class, or has no bias.
    """
    modules = _attention(model)
    layers: list[tuple[Any, float]] = []
    for name, module in modules.items():
        if type(module) not in _LAST:
            known = ', '.join(sorted(cls.__name__ for cls in _LAST))
            raise ValueError(f'{name} is a {type(module).__name__}, whose gate cannot be opened; known are {known}.')
        path, bias = _LAST[type(module)]
        layers.append((module.get_submodule(path), bias))
        if layers[-1][0].bias is None:
            raise ValueError(f'{name} has no bias that could open its gate (mlp_bias=True gives it one).')
    for layer, bias in layers:
        layer.weight.mul_(0.1)
        layer.bias.fill_(bias)
    return len(modules)


def _first_layers(model: nn.Module) -> tuple[int, list[str]]:
    """Channels of the images, and names of the layers that they enter."""
    config = get_model_input_config(model)
    names = config['first_conv'] or ()
    return config['input_size'][0], [names] if isinstance(names, str) else list(names)


def _weights(source: str | Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a file, or of a network that timm knows, whose first layers it fits to the channels if it can."""
    path = Path(source)
    if not path.is_file():
        if path.suffix in ('.pth', '.pt', '.tar', '.bin', '.safetensors'):
            raise FileNotFoundError(f"backbone: no file '{source}'.")
        channels, names = _first_layers(model)
        layers = [model.get_submodule(name) for name in names]
        plain = all(isinstance(layer, nn.Conv2d) and layer.in_channels == channels for layer in layers)
        # a stem that timm cannot fit it would draw at random
        return (load(str(source), in_chans=channels) if plain else load(str(source))).state_dict()
    content: Any
    if path.suffix == '.safetensors':
        from safetensors.torch import load_file
        try:
            content = load_file(path)
        except UNREADABLE as error:
            raise ValueError(f"'{source}' is broken or no safetensors file ({error}).") from error
    else:
        content = read_checkpoint(path)
        for key in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):  # timm's order: the moving average first
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
                break
    if not (isinstance(content, dict) and content and all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items())):
        raise ValueError(f"'{source}' holds no weights.")
    weights: dict[str, torch.Tensor] = clean_state_dict(content)
    return weights


def _fit_channels(weights: dict[str, torch.Tensor], model: nn.Module, source: str | Path) -> None:
    """Fit the first layers to the channels of the images, in place, as timm fits its pretrained weights."""
    channels, names = _first_layers(model)
    own = model.state_dict()
    for key in (f'{name}.weight' for name in names):
        if key not in weights or key not in own or weights[key].ndim < 2:
            continue
        given, wanted = weights[key].shape, own[key].shape
        if given == wanted or (given[0], *given[2:]) != (wanted[0], *wanted[2:]):
            continue
        there, rest = divmod(given[1] * channels, wanted[1])  # a stem may take several pixels of each channel at once
        try:
            if rest:
                raise NotImplementedError
            weights[key] = adapt_input_conv(channels, weights[key], base_chans=there)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(
                f"'{source}' is for images of {given[1] * channels / wanted[1]:g} channels, and its {key} cannot be "
                f'fitted to the {channels} of {type(model).__name__}: give the network as many channels.') from error


@torch.no_grad()
def load_backbone(model: nn.Module, source: str | Path, head: bool = False, gates: str = 'fresh') -> Backbone:
    """Copy the weights of a plain network into one with attention; its attention modules stay as they were made.

    The first layer is fitted to the channels of the images as timm does it: summed to one channel, else repeated or cut
    off, and scaled.

    Args:
        model: A timm model with attention, changed in place.
        source: Name of a timm model (`resnet50.a1_in1k`), 'hf-hub:USER/NAME', an exported folder, or a file of weights.
        head: Whether the classifier is copied too.
        gates: 'fresh', or 'open' to let each gate start at about 1 (see `open_gates`), so that the pretrained features
            survive the first step.

    Returns:
        What was loaded, and the names of the tensors that are missing or without a place.

    Raises:
        FileNotFoundError: No such file or folder.
        ValueError: The weights are of another architecture, or cannot be read; no such model; unknown `gates`.
    """
    if gates not in ('fresh', 'open'):
        raise ValueError(f"gates must be 'fresh' or 'open', got '{gates}'.")
    config: Any = getattr(model, 'pretrained_cfg', {})
    own = model.state_dict()
    classifier = config.get('classifier') or 'fc'
    inside = tuple(f'{name}.' for name in _attention(model))
    fresh = {key for key in own if key.startswith(inside)}
    if not head:
        fresh |= {key for key in own if key.startswith(f'{classifier}.')}
    wanted = [key for key in own if key not in fresh]
    weights = _weights(source, model)
    if not any(key in weights for key in wanted):  # an embedding network, whose backbone is the network
        weights = {key.removeprefix('backbone.'): value for key, value in weights.items()}
    _fit_channels(weights, model, source)
    unfit = [key for key in wanted if key in weights and weights[key].shape != own[key].shape]
    loaded = [key for key in wanted if key in weights and key not in unfit]
    if unfit or not any(own[key].is_floating_point() for key in loaded):
        reason = 'no tensor has a name of it'
        if unfit:
            reason = f'{unfit[0]} is {tuple(weights[unfit[0]].shape)} there and {tuple(own[unfit[0]].shape)} here'
        raise ValueError(f"'{source}' does not fit {type(model).__name__} {config.get('architecture', '')}: {reason}.")
    if gates == 'open':
        open_gates(model)
    for key in loaded:
        own[key].copy_(weights[key])
    return Backbone(
        loaded=tuple(loaded),
        fresh=tuple(key for key in own if key in fresh),
        missing=tuple(key for key in wanted if key not in weights),
        unused=tuple(key for key in weights if key not in own),
    )
