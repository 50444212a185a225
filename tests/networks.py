"""Small real networks of timm with each kind of attention, and batches for them"""
from functools import partial

import timm
import torch
from timm.layers import GroupNorm
from timm.layers.cbam import CbamModule
from timm.models.ghostnet import GhostNet
from torch import nn

import dreal_timm  # noqa: F401
from dreal_timm.layers import SrmModule

GROUP_NORM = partial(GroupNorm, num_groups=8)
_LAYERS = {
    'se': 'se',
    'cbam': partial(CbamModule, mlp_bias=True),
    'srm': SrmModule,
}
ATTENTION = tuple(_LAYERS)
PROBES = ('exact', 'split', 'taylor')


def make_model(attention: str = 'se', seed: int = 0, group_norm: bool = False, num_classes: int = 7, **kwargs):
    """timm's test_resnet (0.4M parameters) with an attention layer, its attention and norms randomised.

    zero_init_last=False, since a zero-initialised norm hides every effect of a map.
    """
    torch.manual_seed(seed)
    if group_norm:
        kwargs['norm_layer'] = GROUP_NORM
    return randomise(timm.create_model(
        'test_resnet', num_classes=num_classes, zero_init_last=False,
        block_args=dict(attn_layer=_LAYERS[attention]), **kwargs,
    ))


def ghost_net(version: str, num_classes: int = 5) -> nn.Module:
    """A GhostNet 'v2' or 'v3' of four blocks; the last two have the attention of its version, one of them also SE."""
    blocks = [[[3, 16, 16, 0, 1]], [[3, 48, 24, 0, 2]], [[5, 72, 40, 0.25, 2], [5, 120, 40, 0, 1]]]
    return GhostNet(blocks, num_classes=num_classes, width=0.5, version=version)


def randomise(model: nn.Module) -> nn.Module:
    """Draw what starts alike in all channels: batch norms, and the weights of SRM."""
    for module in model.modules():
        if isinstance(module, SrmModule):
            nn.init.normal_(module.cfc, std=0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model


def make_batch(batch_size: int = 8, size: int = 64, num_classes: int = 7, seed: int = 1, dtype=torch.float32):
    """Random images (B, 3, size, size) and class indices (B,)."""
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(batch_size, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
    return input, torch.randint(num_classes, (batch_size,), generator=generator)


def correct_targets(model: nn.Module, input: torch.Tensor, wrong: int = 2, seed: int = 3) -> torch.Tensor:
    """Targets that the model, in the mode it is in, gets right, but for the last `wrong` samples."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(seed)
    with torch.no_grad():
        target = model(input).argmax(dim=1)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    if wrong:
        target[-wrong:] = (target[-wrong:] + 1) % model.num_classes
    return target
