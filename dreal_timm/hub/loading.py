"""Networks by name, from an exported folder or from the Hub, with errors that say what to do"""
import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import clean_state_dict
from torch import nn

from dreal_timm.errors import UNREADABLE, WeightsError, nearest, why_unreadable
from dreal_timm.hub.config import CONFIG, check_config
from dreal_timm.hub.damage import check_damage
from dreal_timm.hub.fetch import WEIGHTS_FILES, fetch
from dreal_timm.hub.folder import check_folder
from dreal_timm.hub.shapes import bounded
from dreal_timm.models.releases import find_release

__all__ = ['check_model_name', 'fetch_network', 'load', 'read_checkpoint', 'timm_name', 'weights_of']


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
        WeightsError: The folder's config is broken, or asks for more than a network.
    """
    name = model
    if Path(model).is_dir():
        if not (Path(model) / 'config.json').is_file():
            raise FileNotFoundError(f"'{model}' has no config.json: it is not an exported model.")
        name = f'local-dir:{model}'
    elif '/' in model and ':' not in model:
        raise FileNotFoundError(f"No folder '{model}' (models of the Hub are written hf-hub:USER/NAME).")
    check_model_name(name)
    source, path = timm.models.parse_model_name(name)
    if source == 'local-dir':
        check_config(path)
    return name


def _fetch_repository(source: str, weights: bool) -> None:
    """Bring a network of the Hub into the cache, and look at it there as at any folder."""
    repo, _, revision = source.partition('@')
    fetch(source, config=True, weights=WEIGHTS_FILES if weights else ())
    path = try_to_load_from_cache(repo, CONFIG, revision=revision or None)
    if isinstance(path, str):
        try:
            (check_folder if weights else check_config)(Path(path).parent)
        except WeightsError as error:
            raise WeightsError(f"'{source}': {error}") from error


def fetch_network(name: str, weights: bool = True) -> None:
    """Bring what `timm.create_model` would ask the Hub for into the cache, in a way that fails at once and clearly.

    Args:
        name: As timm takes it.
        weights: Whether the weights are wanted; a repository's config is in any case.

    Raises:
        WeightsError: Offline, no such repository, revision or file, no access, a broken copy in the cache, or a network
            that fetches or opens what it should not.
    """
    source, model = timm.models.parse_model_name(name)
    if source == 'hf-hub':
        _fetch_repository(model, weights)
    elif source is None and weights:
        config = timm.models.get_pretrained_cfg(model)
        repo = getattr(config, 'hf_hub_id', None)
        if repo and not (config.file or config.state_dict):
            named = config.hf_hub_filename
            release = find_release(model)
            try:
                fetch(
                    repo, config=False, weights=(named,) if named else WEIGHTS_FILES,
                    sha256=release.sha256 if release else '')
            except WeightsError as error:
                raise WeightsError(f'The weights of {model} cannot be had: {error}') from error.__cause__


def load(model: str, checkpoint: str | Path = '', **kwargs: Any) -> nn.Module:
    """Return a network with its weights; one error says in a line why they cannot be had.

    Weights of the Hub are compared with the hash that the client stores them under, and those of an exported folder
    with its list `SHA256SUMS`; both are compared with the network that their config describes. Without the Hub, and
    without them in the cache, it fails at the first request.

    Args:
        model: Name of a timm model, 'hf-hub:USER/NAME' (with `@REVISION` where one is meant), or an exported folder.
        checkpoint: File with weights to load, in place of the model's published ones.
        **kwargs: Passed to `timm.create_model`.

    Raises:
        FileNotFoundError: The folder or the checkpoint is missing.
        ValueError: No such model, or it has no weights.
        WeightsError: The weights cannot be had: offline, no such repository, revision or file, no access, broken,
            not those that were published, or of another architecture. It is an OSError and a ValueError.
    """
    name = timm_name(model)
    if checkpoint and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"No checkpoint '{checkpoint}'.")
    if checkpoint:
        check_damage(checkpoint)
    source, path = timm.models.parse_model_name(name)
    if source is None and not checkpoint and not timm.models.is_model_pretrained(name):
        raise ValueError(f"'{model}' has no published weights: name a folder, or pass a checkpoint.")
    if source == 'local-dir' and not checkpoint:
        check_folder(path)
    if not {'pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir'} & kwargs.keys():
        fetch_network(name, weights=not checkpoint)
    try:
        with bounded():
            network: nn.Module = timm.create_model(
                name, pretrained=not checkpoint, checkpoint_path=str(checkpoint) or None, **kwargs)
    except Exception as error:  # of any kind, since arguments come from a config
        if source is None and not isinstance(error, (*UNREADABLE, MemoryError)):
            raise  # arguments of the network, not its weights
        what = f"'{checkpoint}' as weights of '{model}'" if checkpoint else f"'{model}'"
        hint = ' (a run exports its best epoch to the folder model/)' if checkpoint else ''
        raise WeightsError(f'Cannot load {what}{hint}: {why_unreadable(error)}') from error
    return network


def read_checkpoint(path: str | Path, checked: bool = False) -> Any:
    """Return what a checkpoint of this package or of timm's train.py holds, tensors on the CPU; no code of it is run.

    Args:
        path: The file.
        checked: Whether it has been compared with its checksums already.

    Raises:
        WeightsError: The file is broken or damaged, or no checkpoint of PyTorch.
    """
    if not checked and Path(path).is_file():
        check_damage(path)
    allow = getattr(torch.serialization, 'safe_globals', None)
    if allow is None:  # torch 2.4 knows no such context
        torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        with nullcontext() if allow is None else allow([argparse.Namespace]):  # timm stores its arguments as one
            return torch.load(path, map_location='cpu', weights_only=True)
    except (*UNREADABLE, ValueError) as error:
        raise WeightsError(f"'{path}' is broken or no checkpoint of PyTorch ({why_unreadable(error)}).") from error


def weights_of(checkpoint: Any, path: Path, weights: str) -> tuple[dict[str, torch.Tensor], str]:
    """Return the weights of a training checkpoint by their names in the network, and which they are, 'ema' or 'raw'.

    Args:
        checkpoint: What `read_checkpoint` returned.
        path: Where it is from, for the WeightsError that tells that it has no such weights.
        weights: 'raw', 'ema' (the moving average), or 'auto': the moving average where there is one.
    """
    keys = checkpoint if isinstance(checkpoint, Mapping) else {}
    averaged = weights == 'ema' or (weights == 'auto' and 'state_dict_ema' in keys)
    key = 'state_dict_ema' if averaged else 'state_dict'
    if key not in keys:
        raise WeightsError(f"'{path}' holds no {'moving average' if averaged else 'weights'} ({key}).")
    state: dict[str, torch.Tensor] = clean_state_dict(keys[key])
    return state, 'ema' if averaged else 'raw'
