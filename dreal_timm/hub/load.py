"""Networks by name, from an exported folder or from the Hub, with errors that say what to do"""
import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from dreal_timm.errors import UNREADABLE, nearest

__all__ = ['check_model_name', 'load_network', 'read_checkpoint', 'timm_name']


def check_model_name(name: str) -> None:
    """Raise a ValueError that names the nearest model if timm knows none of this name."""
    source, model = timm.models.parse_model_name(name)
    if source is None and (not model or not timm.is_model(model)):
        base = model.split('.')[0]
        raise ValueError(f"Unknown model '{name}'{nearest(base, timm.list_models())}.")


def timm_name(model: str) -> str:
    """Return what `timm.create_model` calls a network that is named by a user.

    Args:
        model: Name of a timm model, 'hf-hub:USER/NAME', or an exported folder.

    Raises:
        FileNotFoundError: No such folder, or one without an exported network.
        ValueError: No such model.
    """
    name = model
    if Path(model).is_dir():
        if not (Path(model) / 'config.json').is_file():
            raise FileNotFoundError(f"'{model}' has no config.json: it is not an exported model.")
        name = f'local-dir:{model}'
    elif '/' in model and ':' not in model:
        raise FileNotFoundError(f"No folder '{model}' (models of the Hub are written hf-hub:USER/NAME).")
    check_model_name(name)
    return name


def load_network(model: str, checkpoint: str | Path = '', **kwargs: Any) -> nn.Module:
    """Return a network with its weights.

    Args:
        model: Name of a timm model, 'hf-hub:USER/NAME', or an exported folder.
        checkpoint: File with weights to load, in place of the model's published ones.
        **kwargs: Passed to `timm.create_model`.

    Raises:
        FileNotFoundError: The folder or the checkpoint is missing.
        ValueError: No such model, or it has no weights, or they do not fit.
    """
    name = timm_name(model)
    if checkpoint and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"No checkpoint '{checkpoint}'.")
    source, _ = timm.models.parse_model_name(name)
    if source is None and not checkpoint and not timm.models.is_model_pretrained(name):
        raise ValueError(f"'{model}' has no published weights: name a folder, or pass a checkpoint.")
    try:
        return timm.create_model(name, pretrained=not checkpoint, checkpoint_path=str(checkpoint) or None, **kwargs)
    except UNREADABLE as error:
        what = f"'{checkpoint}' as weights of '{model}'" if checkpoint else f"'{model}'"
        hint = ' (a run exports its best epoch to the folder model/)' if checkpoint else ''
        raise ValueError(f'Cannot load {what}{hint}: {" ".join(str(error).split())[:200]}') from error


def read_checkpoint(path: str | Path) -> Any:
    """Return what a checkpoint of this package or of timm's train.py holds, tensors on the CPU; no code of it is run.

    Raises:
        ValueError: The file is broken, or no checkpoint of PyTorch.
    """
    allow = getattr(torch.serialization, 'safe_globals', None)
    if allow is None:  # torch 2.4 knows no such context
        torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        with nullcontext() if allow is None else allow([argparse.Namespace]):  # timm stores its arguments as one
            return torch.load(path, map_location='cpu', weights_only=True)
    except (*UNREADABLE, ValueError) as error:
        reason = ' '.join(str(error).split())[:120]
        raise ValueError(f"'{path}' is broken or no checkpoint of PyTorch ({reason}).") from error
