"""SE-, CBAM- and SRM-ResNets: timm's ResNet with the attention of the DREAL paper's Table 1

Paper: `Deep Reinforced Attention Learning for Quality-Aware Visual Recognition` (ECCV 2020)

* SE: `Squeeze-and-Excitation Networks` - https://arxiv.org/abs/1709.01507, timm's own module. The networks have the
  state-dict keys and shapes of timm's `seresnet*`.
* CBAM: `CBAM: Convolutional Block Attention Module` - https://arxiv.org/abs/1807.06521, timm's own module with
  `mlp_bias=True`, which the paper's parameter counts need.
* SRM: `SRM: A Style-based Recalibration Module` - https://arxiv.org/abs/1903.10829, `dreal_timm.layers.SrmModule`. The
  DREAL paper's count for SRM (25.587M for 50 layers) leaves out the batch norm inside the module; with it there are
  25,617,448 parameters.
"""
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.cbam import CbamModule
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, list_pretrained, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from dreal_timm.layers import SrmModule
from dreal_timm.models.releases import RELEASES, find_release
from dreal_timm.models.sources import check_source

__all__: list[str] = []  # register_model adds every entry point

_ATTENTION: dict[str, Any] = {
    'se': 'se',
    'cbam': partial(CbamModule, mlp_bias=True),
    'srm': SrmModule,
}
_STAGES: dict[int, dict[str, Any]] = {
    18: dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    34: dict(block=BasicBlock, layers=(3, 4, 6, 3)),
    50: dict(block=Bottleneck, layers=(3, 4, 6, 3)),
    101: dict(block=Bottleneck, layers=(3, 4, 23, 3)),
    152: dict(block=Bottleneck, layers=(3, 8, 36, 3)),
}


def _create_dreal_resnet(attention: str, depth: int, pretrained: bool = False, **kwargs: Any) -> ResNet:
    check_source(kwargs)
    name = f'dreal_{attention}_resnet{depth}'
    tag = kwargs.get('pretrained_cfg')  # timm passes the tag of a name; its own callers may pass a config
    release = find_release(f"{name}.{getattr(tag, 'tag', tag)}")
    if pretrained and release is not None and release.file.is_file():
        release.check(release.file)
    model_args = dict(_STAGES[depth], block_args=dict(attn_layer=_ATTENTION[attention]))
    try:
        return build_model_with_cfg(ResNet, name, pretrained, **dict(model_args, **kwargs))
    except RuntimeError as error:
        if not str(error).startswith('No pretrained weights exist'):
            raise
        staged = '' if release is None else (
            f' The weights of {release.name} are in a clone of dreal_timm (hub_cards/), and not published yet.')
        raise RuntimeError(
            f'No pretrained weights exist for {name} here.{staged} '
            f'These have some: {", ".join(list_pretrained("dreal_*"))}. '
            "dreal_timm.hub.load_backbone(model, 'resnet50.a1_in1k') starts a network from a plain ResNet's."
        ) from error


def _cfg(url: str = '', **kwargs: Any) -> dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc',
        'license': 'apache-2.0',
        **kwargs,
    }


def _timms_cfg(name: str) -> dict[str, Any]:
    """The config of timm's own weights of a network that it has under another name."""
    cfg = get_pretrained_cfg(name)
    assert cfg is not None
    return {
        **cfg.to_dict(),
        'description': f"timm's {name}: trained on ImageNet-1k, not reinforced. The warm start of a fine-tune.",
    }


def timm_architecture(name: str) -> str | None:
    """Return the name under which timm itself has this network, or None where it does not."""
    prefix = 'dreal_se_resnet'
    return f'seresnet{name.removeprefix(prefix)}' if name.startswith(prefix) else None


_TIMMS = ('ra2_in1k', 'a1_in1k', 'a2_in1k', 'a3_in1k')  # of seresnet50, the default first

default_cfgs = generate_default_cfgs({
    **{f'dreal_se_resnet50.{tag}': _timms_cfg(f'seresnet50.{tag}') for tag in _TIMMS},
    # a release on small data is no default: before the tag with the star, or timm makes it one
    **{release.name: _cfg(license=release.license, **release.source(), **release.cfg) for release in RELEASES},
    **{
        f'dreal_{attention}_resnet{depth}.untrained' + ('' if (attention, depth) == ('se', 50) else '*'): _cfg()
        for attention in _ATTENTION for depth in _STAGES},
})


@register_model
def dreal_se_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SE-ResNet-18."""
    return _create_dreal_resnet('se', 18, pretrained, **kwargs)


@register_model
def dreal_se_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SE-ResNet-34."""
    return _create_dreal_resnet('se', 34, pretrained, **kwargs)


@register_model
def dreal_se_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SE-ResNet-50."""
    return _create_dreal_resnet('se', 50, pretrained, **kwargs)


@register_model
def dreal_se_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SE-ResNet-101."""
    return _create_dreal_resnet('se', 101, pretrained, **kwargs)


@register_model
def dreal_se_resnet152(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SE-ResNet-152."""
    return _create_dreal_resnet('se', 152, pretrained, **kwargs)


@register_model
def dreal_cbam_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """CBAM-ResNet-18."""
    return _create_dreal_resnet('cbam', 18, pretrained, **kwargs)


@register_model
def dreal_cbam_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """CBAM-ResNet-34."""
    return _create_dreal_resnet('cbam', 34, pretrained, **kwargs)


@register_model
def dreal_cbam_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """CBAM-ResNet-50."""
    return _create_dreal_resnet('cbam', 50, pretrained, **kwargs)


@register_model
def dreal_cbam_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """CBAM-ResNet-101."""
    return _create_dreal_resnet('cbam', 101, pretrained, **kwargs)


@register_model
def dreal_cbam_resnet152(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """CBAM-ResNet-152."""
    return _create_dreal_resnet('cbam', 152, pretrained, **kwargs)


@register_model
def dreal_srm_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SRM-ResNet-18."""
    return _create_dreal_resnet('srm', 18, pretrained, **kwargs)


@register_model
def dreal_srm_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SRM-ResNet-34."""
    return _create_dreal_resnet('srm', 34, pretrained, **kwargs)


@register_model
def dreal_srm_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SRM-ResNet-50."""
    return _create_dreal_resnet('srm', 50, pretrained, **kwargs)


@register_model
def dreal_srm_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SRM-ResNet-101."""
    return _create_dreal_resnet('srm', 101, pretrained, **kwargs)


@register_model
def dreal_srm_resnet152(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """SRM-ResNet-152."""
    return _create_dreal_resnet('srm', 152, pretrained, **kwargs)
