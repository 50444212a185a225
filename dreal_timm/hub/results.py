"""Results of a validation: bound to the weights that they were measured with by a hash"""
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

__all__ = [
    'check_control', 'read_results', 'run_settings', 'shared_settings', 'training_record', 'training_settings',
    'weights_digest',
]

_KEYS = {
    'architecture': str, 'weights_sha256': str, 'dataset': str, 'split': str, 'samples': int,
    'loss': float, 'top1': float, 'top5': float,
}
# of dreal-timm reid eval
_REID_KEYS = {
    'architecture': str, 'weights_sha256': str, 'dataset': str, 'split': str, 'samples': int, 'settings': dict,
    'mAP': float, 'rank1': float,
}
# settings that two runs of one recipe may differ in
_FREE = (
    'dreal', 'output', 'experiment', 'resume', 'stop_epoch', 'log_with', 'log_kwargs', 'log_interval', 'data_dir',
    'workers', 'pin_mem', 'device', 'checkpoint_hist', 'save_epochs', 'class_map')
# settings under `dreal:` that plain training has too
_SHARED = ('task', 'freeze', 'backbone', 'gates', 'num_instances', 'crop', 'margin', 'triplet_weight')
_PRIVATE = (
    'data', 'data_dir', 'output', 'resume', 'initial_checkpoint', 'pretrained_path', 'class_map', 'log_with',
    'log_kwargs')


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return a SHA-256 of names, shapes and numbers of a state dict, the same for a file and for the network loaded.

    Args:
        state: Tensors by name. Floating-point numbers count as float32, which float16 weights are loaded as.
    """
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        tensor = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        found.update(f'{name} {list(tensor.shape)} {tensor.dtype}\n'.encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def read_results(path: str | Path) -> dict[str, Any]:
    """Return what `dreal-timm validate --results` or `dreal-timm reid eval --results` wrote.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is none of these.
    """
    try:
        results = json.loads(Path(path).read_text(encoding='utf-8'))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"'{path}' is no JSON ({error}).") from error
    reid = isinstance(results, dict) and 'mAP' in results
    for key, kind in (_REID_KEYS if reid else _KEYS).items():
        if not isinstance(results, dict) or not isinstance(results.get(key), kind):
            command = 'reid eval' if reid else 'validate'
            raise ValueError(f"'{path}' has no '{key}': write it with dreal-timm {command} --results.")
    return results


def _told(path: Path) -> dict[str, Any] | None:
    told = yaml.safe_load(path.read_text(encoding='utf-8')) if path.is_file() else None  # JSON is YAML
    return told if isinstance(told, dict) else None


def training_settings(directory: Path) -> dict[str, Any] | None:
    """Return the settings (`args.yaml`) that an exported folder's network was trained with, where they are known."""
    return _told(directory / 'training' / 'args.yaml')


def run_settings(source: Path) -> dict[str, Any] | None:
    """Return the settings that a run, a checkpoint in its folder, or what was exported of it was trained with."""
    folder = source.parent if source.is_file() else source
    return _told(folder / 'args.yaml') or training_settings(folder)


def training_record(directory: Path) -> dict[str, Any] | None:
    """Return what its training was made with and how long its epochs took (`run.json`), where it is known."""
    return _told(directory / 'training' / 'run.json')


def shared_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a training without the paths of the machine and the arguments of its trackers."""
    return {key: value for key, value in settings.items() if key not in _PRIVATE}


def check_control(results: Mapping[str, Any], control: Mapping[str, Any]) -> None:
    """Raise a ValueError if a control is not the plain network of the same settings, measured on the same images."""
    for key in ('architecture', 'dataset', 'split', 'samples', 'classes', 'settings'):
        if results.get(key) != control.get(key):
            raise ValueError(
                f"control: its {key} is {control.get(key)!r}, but {results.get(key)!r} is that of the network.")
    trained, plain = results.get('training'), control.get('training')
    if not trained or not plain:
        raise ValueError('control: results tell of no training settings: validate the folders that the runs exported.')
    if plain.get('dreal', {}).get('enabled', True):
        raise ValueError('control: it was reinforced too: train it with dreal.enabled=false.')
    own, other = trained.get('dreal') or {}, plain.get('dreal') or {}
    for key in _SHARED:
        if key in own and key in other and own[key] != other[key]:
            raise ValueError(
                f'control: it was trained with dreal.{key} {other[key]!r}, and not {own[key]!r} as the network.')
    changes = [(told.get('run') or {}).get('changes') or [] for told in (results, control)]
    if changes[0] != changes[1]:
        raise ValueError(
            f'control: its settings changed during its training otherwise ({changes[1]}) than the network\'s '
            f'({changes[0]}).')
    for key in sorted(trained.keys() | plain.keys()):
        if key not in _FREE and trained.get(key) != plain.get(key):
            raise ValueError(
                f"control: it was trained with {key} {plain.get(key)!r}, and not {trained.get(key)!r} as the network.")
