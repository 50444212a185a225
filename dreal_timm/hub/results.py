"""Results of a validation: bound to the weights that they were measured with by a hash"""
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dreal_timm.hub.files import read_json, read_yaml

__all__ = [
    'check_control', 'flat_settings', 'is_reinforced', 'read_results', 'run_settings', 'shared_settings',
    'training_record', 'training_settings',
]

_KEYS = {
    'architecture': str, 'weights_sha256': str, 'dataset': str, 'split': str, 'samples': int,
    'loss': float, 'top1': float, 'top5': float,
}
_PERCENT = ('top1', 'top5', 'mAP', 'rank1', 'rank5', 'mINP')
_LARGEST, _HUGE = 2 ** 22, 1e15  # bytes of a file; no number that is measured here is larger
# of dreal-timm reid eval
_REID_KEYS = {
    'architecture': str, 'weights_sha256': str, 'dataset': str, 'split': str, 'samples': int, 'settings': dict,
    'queries': int, 'mAP': float, 'rank1': float, 'rank5': float, 'mINP': float,
}
# settings that two runs of one recipe may differ in
_FREE = (
    'dreal', 'output', 'experiment', 'resume', 'stop_epoch', 'log_with', 'log_kwargs', 'log_interval', 'data_dir',
    'workers', 'pin_mem', 'device', 'checkpoint_hist', 'save_epochs', 'class_map')
# settings under `dreal:` that plain training has too
_SHARED = (
    'dreal.task', 'dreal.start.freeze', 'dreal.start.backbone', 'dreal.start.gates', 'dreal.reid.num_instances',
    'dreal.reid.crop', 'dreal.reid.margin', 'dreal.reid.triplet_weight')
_PRIVATE = (
    'data', 'data_dir', 'output', 'resume', 'initial_checkpoint', 'pretrained_path', 'class_map', 'log_with',
    'log_kwargs')


def _is(value: Any, kind: type) -> bool:
    """Whether a value of JSON is of a kind; a whole number is also a float, and a truth value is no number."""
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _check_number(results: Mapping[str, Any], key: str, kind: type) -> None:
    value = results[key]
    if kind in (str, dict):
        return
    if not abs(value) <= _HUGE or (kind is int and value < 1) or (key in _PERCENT and not 0 <= value <= 100):
        raise ValueError(f'its {key} is {value}, which is no result')


def _check_record(record: Any) -> None:
    """Raise a ValueError if a record of a training, or None, is not what a run writes."""
    table = {} if record is None else record
    rows = table.get('epochs', []) if isinstance(table, dict) else None
    if not isinstance(rows, list) or not all(
            isinstance(row, dict) and isinstance(row.get('device'), str) and _is(row.get('seconds'), float)
            and 0 <= row['seconds'] <= _HUGE for row in rows):
        raise ValueError('its record of the training is not what a run writes (epochs with seconds and device)')
    changes = table.get('changes') or []
    if not isinstance(changes, list) or not all(
            isinstance(row, dict) and _is(row.get('epoch'), int) and row['epoch'] >= 0
            and isinstance(row.get('settings'), dict)
            and all(isinstance(pair, list) and len(pair) == 2 for pair in row['settings'].values()) for row in changes):
        raise ValueError('its record of the training is not what a run writes (changes with epoch and settings)')
    if not isinstance(table.get('versions') or {}, dict) or not isinstance(table.get('commit') or '', str):
        raise ValueError('its record of the training is not what a run writes (versions, commit)')


def _check_settings(settings: Any) -> None:
    """Raise a ValueError if settings of a training, or None, are no table with another under `dreal`."""
    table = {} if settings is None else settings
    if not isinstance(table, dict) or not isinstance(table.get('dreal') or {}, dict):
        raise ValueError('its settings of the training are no table, or `dreal` in them is none')


def read_results(path: str | Path) -> dict[str, Any]:
    """Return what `dreal-timm validate --results` or `dreal-timm reid eval --results` wrote.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is none of these, or a result is no number.
    """
    try:
        results: dict[str, Any] = read_json(path, _LARGEST)
    except ValueError as error:
        raise ValueError(f"'{path}' is no JSON ({error}).") from error
    reid = isinstance(results, dict) and 'mAP' in results
    kinds, command = (_REID_KEYS, 'reid eval') if reid else (_KEYS, 'validate')
    for key, kind in kinds.items():
        if not isinstance(results, dict) or not _is(results.get(key), kind):
            raise ValueError(f"'{path}' has no '{key}': write it with dreal-timm {command} --results.")
    try:
        for key, kind in kinds.items():
            _check_number(results, key, kind)
        for key in ('versions', 'settings'):
            if key in results and not isinstance(results[key], dict):
                raise ValueError(f'its {key} are no table')
        _check_settings(results.get('training'))
        _check_record(results.get('run'))
    except ValueError as error:
        raise ValueError(f"'{path}': {error}: write it with dreal-timm {command} --results.") from error
    return results


def _read_table(path: Path, check: Callable[[Any], None]) -> dict[str, Any] | None:
    """What a file holds that passes a check; None without one."""
    if not path.is_file():
        return None
    try:
        table: dict[str, Any] | None = read_json(path, _LARGEST) if path.suffix == '.json' else read_yaml(path)
        check(table)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}.") from error
    return table


def training_settings(directory: Path) -> dict[str, Any] | None:
    """Return the settings (`args.yaml`) that an exported folder's network was trained with, where they are known.

    Raises:
        ValueError: The file is broken, giant, or no table.
    """
    return _read_table(directory / 'training' / 'args.yaml', _check_settings)


def run_settings(source: Path) -> dict[str, Any] | None:
    """Return the settings that a run, a checkpoint in its folder, or what was exported of it was trained with."""
    folder = source.parent if source.is_file() else source
    return _read_table(folder / 'args.yaml', _check_settings) or training_settings(folder)


def training_record(directory: Path) -> dict[str, Any] | None:
    """Return what its training was made with and how long its epochs took (`run.json`), where it is known."""
    return _read_table(directory / 'training' / 'run.json', _check_record)


def is_reinforced(settings: Mapping[str, Any]) -> bool:
    """Return whether a training with these settings was reinforced; those of timm's train.py have no `dreal`."""
    dreal = settings.get('dreal')
    return dreal is not None and bool(dreal.get('enabled', True))


def _relevant_changes(record: Any) -> list[Any]:
    """What changed while a network was trained, but for what two runs may differ in."""
    rows = []
    for row in (record or {}).get('changes') or ():
        settings = {
            name: pair for name, pair in row['settings'].items()
            if name not in _FREE and not name.startswith('dreal.')}
        rows += [[row['epoch'], settings]] if settings else []
    return rows


def flat_settings(settings: Mapping[str, Any], where: str = '') -> dict[str, Any]:
    """Return settings with those of `dreal`, and of the blocks in it, by their names with dots."""
    found = {}
    for name, value in settings.items():
        is_block = isinstance(value, Mapping) and (where == 'dreal.' or (not where and name == 'dreal'))
        found.update(flat_settings(value, f'{where}{name}.') if is_block else {f'{where}{name}': value})
    return found


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
    if is_reinforced(plain):
        raise ValueError('control: it was reinforced too: train it with dreal.enabled=false.')
    own, other = flat_settings(trained), flat_settings(plain)
    changes = [_relevant_changes(measured.get('run')) for measured in (results, control)]
    if changes[0] != changes[1]:
        raise ValueError(
            f'control: settings changed while it was trained ({changes[1] or "none"}), and not as those of the network '
            f'({changes[0] or "none"}).')
    for key in _SHARED:
        if key in own and key in other and own[key] != other[key]:
            raise ValueError(
                f'control: it was trained with {key} {other[key]!r}, and not {own[key]!r} as the network.')
    for key in sorted(trained.keys() | plain.keys()):
        if key not in _FREE and trained.get(key) != plain.get(key):
            raise ValueError(
                f"control: it was trained with {key} {plain.get(key)!r}, and not {trained.get(key)!r} as the network.")
