"""`dreal-timm export`: a network out of a run, or of one of its checkpoints, as a folder for others"""
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.models import get_model_input_config
from torch import nn

from dreal_timm.data.classes import names_of_config
from dreal_timm.errors import reason
from dreal_timm.hub.config import CONFIG, check_config
from dreal_timm.hub.export import export, halved
from dreal_timm.hub.files import read_bytes, read_json
from dreal_timm.hub.loading import load, read_checkpoint, weights_of
from dreal_timm.hub.results import read_results, shared_settings
from dreal_timm.hub.shapes import bounded
from dreal_timm.hub.timm_run import is_timm_run, load_timm_run
from dreal_timm.models.reid import drop_identities
from dreal_timm.provenance import preprocessing_of, versions

__all__ = [
    'NETWORK', 'WEIGHTS', 'export_run', 'exported_folder', 'names_beside', 'names_of_weights', 'open_network',
    'read_network',
]

NETWORK = 'network.json'  # config.json of the network that a run trains
WEIGHTS = ('auto', 'ema', 'raw')
_BEST = 'model_best.pth.tar'


def _state(checkpoint: Any, path: Path, weights: str) -> tuple[Mapping[str, torch.Tensor], str]:
    """Weights of the plain network out of a checkpoint, and which they are."""
    state, taken = weights_of(checkpoint, path, weights)
    foreign = [name for name in state if name.split('.')[0] in ('critic', 'task', 'trainable_module')]
    if foreign:
        raise ValueError(f"'{path}' holds training-only weights ({foreign[0]}): it is not of a plain network.")
    return state, taken


def _training(
        run: Path,
        checkpoint: Mapping[str, Any],
        weights: str,
        settings: Mapping[str, Any] | None,
) -> dict[str, bytes]:
    """Files of the training: its settings, its epochs, and which weights these are."""
    record = {
        'epoch': checkpoint.get('epoch'),
        'metric': checkpoint.get('metric'),
        'weights': weights,
        'seed': (checkpoint.get('args') or {}).get('seed') if isinstance(checkpoint.get('args'), Mapping) else None,
        'exported_with': versions(python=True),
    }
    files = {'training/checkpoint.json': (json.dumps(record, indent=2) + '\n').encode()}
    if settings:
        files['training/args.yaml'] = yaml.safe_dump(shared_settings(settings), sort_keys=False).encode()
    for name in ('run.json', 'summary.csv'):
        if (run / name).is_file():
            files[f'training/{name}'] = (run / name).read_bytes()
    return files


def _shared(results: Mapping[str, Any]) -> bytes:
    """Results as JSON, without paths of this machine."""
    shared = {key: value for key, value in results.items() if key not in ('model', 'data')}
    if shared.get('training'):
        shared['training'] = shared_settings(shared['training'])
    return (json.dumps(shared, indent=2) + '\n').encode()


def _build(run: Path) -> nn.Module:
    """The network that a run trains, without weights."""
    if not (run / NETWORK).is_file():
        raise FileNotFoundError(f"'{run}' has no {NETWORK}, which a run writes when it starts: it is no folder of one.")
    with tempfile.TemporaryDirectory() as folder:
        try:
            (Path(folder) / CONFIG).write_bytes(read_bytes(run / NETWORK, 2 ** 22))
            check_config(folder)
            with bounded():
                network: nn.Module = timm.create_model(f'local-dir:{folder}', pretrained=False)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"'{run / NETWORK}' describes no network ({reason(error)}).") from error
    return network


def _read(source: str | Path, weights: str) -> tuple[nn.Module, Mapping[str, Any], Path, str]:
    """The network of a run or a checkpoint, the checkpoint, the run's folder, and which weights were taken."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got '{weights}'.")
    path = Path(source) / _BEST if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint '{path}'.")
    run = path.parent
    if is_timm_run(path):
        model, content, taken = load_timm_run(path, weights)
        return model, content, run, taken
    checkpoint = read_checkpoint(path)
    state, taken = _state(checkpoint, path, weights)
    model = _build(run)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"'{path}' does not fit the network of '{run / NETWORK}': {reason(error)}") from error
    return model, checkpoint, run, taken


def read_network(source: str | Path, weights: str = 'auto') -> nn.Module:
    """Return the network of a run, of a checkpoint in a run's folder, or of what `dreal_timm.hub.load` takes.

    Args:
        source: Folder of a run, or of timm's train.py, whose best checkpoint is taken, a checkpoint in one of them, an
            exported folder, or the name of a network.
        weights: 'raw', 'ema' (the moving average), or 'auto': the moving average where there is one. Of runs alone.

    Raises:
        FileNotFoundError: No such run, checkpoint or folder.
        ValueError: The checkpoint is broken or of another network, or has no such weights; no such model.
        WeightsError: The weights cannot be had.
    """
    if Path(source).is_file() or (Path(source) / NETWORK).is_file() or is_timm_run(source):
        return _read(source, weights)[0]
    if weights != 'auto':
        raise ValueError(f"weights: '{source}' is no run that could hold others.")
    return load(str(source))


def exported_folder(model: str | Path) -> Path | None:
    """Return the exported folder that a name stands for: itself, or `model/` of the run that it is."""
    is_run = any((Path(model) / name).is_file() for name in (NETWORK, 'args.yaml'))
    for folder in (Path(model), Path(model) / 'model') if is_run else (Path(model),):
        if (folder / 'config.json').is_file():
            return folder
    return None


def names_beside(path: str | Path) -> list[str] | None:
    """Return the names of the classes out of the config of the exported folder, or of the run, that a file lies in."""
    for name in (CONFIG, NETWORK):
        try:
            config = read_json(Path(path).parent / name, 2 ** 22)
        except (OSError, ValueError):
            continue
        if isinstance(config, dict):
            return names_of_config({**(config.get('pretrained_cfg') or {}), **config})
    return None


def names_of_weights(path: str | Path) -> list[str] | None:
    """Return the names of the classes that weights were trained on, where the file or the config beside it has them."""
    if Path(path).suffix != '.safetensors':
        content = read_checkpoint(path, checked=True)
        names = content.get('class_names') if isinstance(content, dict) else None
        if names:
            return [str(name) for name in names]
    return names_beside(path)


def open_network(model: str | Path, checkpoint: str | Path = '', **model_kwargs: Any) -> nn.Module:
    """Return the network that a user names, with its weights.

    Args:
        model: Name of a timm model, 'hf-hub:USER/NAME', an exported folder, the folder of a run (what it exported, or
            while it trains its best checkpoint) or of timm's train.py, or a checkpoint in one of these two.
        checkpoint: File with weights to load, in place of its own.
        **model_kwargs: Options of `timm.create_model` that the checkpoint needs.

    Raises:
        FileNotFoundError: No such folder or checkpoint.
        ValueError: No such model, options without a checkpoint, or options that it does not take; it has no weights.
        WeightsError: The weights cannot be had.
    """
    exported = exported_folder(model)
    if model_kwargs and not checkpoint and not is_timm_run(model):
        raise ValueError('Options of the network go with a checkpoint: published weights would not fit all of it.')
    if exported is None and is_timm_run(model):
        return load_timm_run(model, checkpoint=checkpoint, **model_kwargs)[0]
    if exported is None and (Path(model).is_file() or (Path(model) / NETWORK).is_file()):
        if checkpoint:
            raise ValueError(f"'{model}' is of a run: name the checkpoint '{checkpoint}' alone.")
        return _read(model, 'auto')[0]
    network = load(str(exported or model), checkpoint, **model_kwargs)
    _fit_config(network, names_of_weights(checkpoint) if checkpoint else None)
    return network


def _fit_config(network: Any, names: list[str] | None) -> None:
    """Give the config of a network names of classes, where there are some, and a mean and a std for each channel."""
    if names is not None:
        network.pretrained_cfg = {**network.pretrained_cfg, 'label_names': names}
    channels = get_model_input_config(network)['input_size'][0]
    for key in ('mean', 'std'):
        given = network.pretrained_cfg[key]
        if len(given) not in (1, channels):  # averaged, as timm's loaders do
            network.pretrained_cfg = {**network.pretrained_cfg, key: (sum(given) / len(given),) * channels}


def export_run(
        source: str | Path,
        directory: str | Path,
        weights: str = 'auto',
        half: bool = False,
        *,
        results: str | Path = '',
        control: str | Path = '',
        measure: Callable[[nn.Module], dict[str, Any]] | None = None,
) -> Path:
    """Export the network of a run, or of one of its checkpoints, with what is to be known of its training.

    Beside what `export` writes, the folder has `training/`: the run's `args.yaml` (without paths of the
    machine and arguments of trackers), `summary.csv`, `run.json` (versions, the commit of a checkout, the time of each
    epoch), `checkpoint.json` (epoch, metric, seed, versions), and the results that the card tells. The run need not
    have ended. Before the folder appears it is loaded in a fresh
    process, and its logits are compared.

    Args:
        source: Folder of a run, or of timm's train.py, whose best checkpoint is taken, or a checkpoint in one.
        directory: Folder to write.
        weights: 'raw', 'ema' (the moving average), or 'auto': the moving average where there is one.
        half: Write float16 weights.
        results: File that `dreal-timm validate --results` wrote of these weights, for the card.
        control: The same of the plain network that was trained with the same settings.
        measure: Validates the network that is exported, in place of `results`, and with `half` the one before as well.

    Raises:
        FileExistsError: The folder exists.
        FileNotFoundError: No such run or checkpoint.
        ValueError: The checkpoint is broken or of another network, or has no such weights; the results are of other
            weights, or the control is not one.
    """
    if results and measure is not None:
        raise ValueError('Results are given, or measured: not both.')
    measured = {name: read_results(file) for name, file in (('results', results), ('control', control)) if file}
    if Path(directory).exists():
        raise FileExistsError(f'{directory} exists: choose another folder, or remove it.')
    model, checkpoint, run, taken = _read(source, weights)
    drop_identities(model)
    config: Any = model.pretrained_cfg
    trained = checkpoint.get('args')  # those of the run may have changed since
    if not isinstance(trained, Mapping) and (run / 'args.yaml').is_file():
        trained = yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8'))
    trained = dict(trained) if isinstance(trained, Mapping) else None
    files = _training(run, checkpoint, taken, trained)
    if measure is not None:
        exported = halved(model).float() if half else model
        measured['results'] = {**measure(exported), 'training': trained}
        if half:
            measured['float32'] = {**measure(model), 'training': trained}
    files.update({f'training/{name}.json': _shared(content) for name, content in measured.items()})
    return export(
        model, directory, data_config=preprocessing_of(config), half=half, files=files, fresh_process=True)
