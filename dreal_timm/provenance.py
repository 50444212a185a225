"""Where numbers come from: the versions and the weights that they were measured with, and how images were prepared"""
import hashlib
import platform
from collections.abc import Mapping
from typing import Any

import timm
import torch

from dreal_timm.version import __version__

__all__ = ['hash_tensor', 'preprocessing_of', 'versions', 'weights_digest']

_PREPROCESSING = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')


def preprocessing_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config of a network, or of a loader of timm, says of the preparation of images."""
    return {key: config[key] for key in _PREPROCESSING if key in config}


def versions(python: bool = False, **others: str) -> dict[str, str]:
    """Return the versions of torch, timm and this package, with Python's and those of other packages where given."""
    own = {'python': platform.python_version()} if python else {}
    return {**own, 'torch': torch.__version__, 'timm': timm.__version__, **others, 'dreal_timm': __version__}


def hash_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Add name, shape and numbers of a tensor on the CPU to a hash of `hashlib`."""
    digest.update(f'{name} {list(tensor.shape)} {tensor.dtype}\n'.encode())
    digest.update(tensor.contiguous().numpy().tobytes())


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return a SHA-256 of names, shapes and numbers of a state dict, the same for a file and for the network loaded.

    Args:
        state: Tensors by name. Floating-point numbers count as float32, which float16 weights are loaded as.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        hash_tensor(digest, name, tensor.float() if tensor.is_floating_point() else tensor)
    return digest.hexdigest()
