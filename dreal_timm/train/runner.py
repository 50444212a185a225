"""A run from a recipe to an exported network: set-up, training, export"""
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list

from dreal_timm.hub import describe_network, export
from dreal_timm.hub.loading import read_checkpoint
from dreal_timm.hub.results import shared_settings
from dreal_timm.hub.run import NETWORK
from dreal_timm.train.checkpoint import BEST, LAST, write_summary
from dreal_timm.train.config import load_config, to_dict
from dreal_timm.train.launch import decide
from dreal_timm.train.loop import Run, fit
from dreal_timm.train.publish import export_anew, publish
from dreal_timm.train.record import RECORD
from dreal_timm.train.settings import TrainConfig
from dreal_timm.train.setup import set_up
from dreal_timm.train.trackers import start_trackers
from dreal_timm.utils.files import write_text

__all__ = ['describe', 'run']


def _export(run: Run) -> None:
    """Export the weights that the best epoch was ranked by."""
    best = read_checkpoint(run.directory / BEST)
    if best['epoch'] != run.checkpoints.best_epoch:
        raise ValueError(
            f'{run.directory / BEST} is of epoch {best["epoch"] + 1}, and the file of the best epoch is gone: '
            'dreal-timm export makes a folder of any checkpoint.')
    averaged = run.config.model_ema and not run.config.model_ema_force_cpu
    run.model.load_state_dict(best['state_dict_ema' if averaged else 'state_dict'])
    run.domain.drop_head(run.model)
    target = run.directory / 'model'
    # a run that was killed after its last checkpoint comes here without an epoch
    write_summary(run.directory / 'summary.csv', run.history)
    run.record.write(run.directory)
    settings = yaml.safe_dump(shared_settings(best['args']), sort_keys=False).encode()
    files = {
        'training/args.yaml': settings,
        'training/run.json': (run.directory / RECORD).read_bytes(),
        'training/summary.csv': (run.directory / 'summary.csv').read_bytes(),
    }
    export_anew(target, lambda folder: export(
        run.model, folder, data_config=run.data, label_names=run.domain.label_names(run.class_names), files=files))


def describe(results: Mapping[str, Any]) -> str:
    """Return in words what a run came to, and how to load the network that it exported."""
    model, metrics = results['model'], results['metrics']
    architecture = json.loads((Path(model) / 'config.json').read_text(encoding='utf-8'))['architecture']
    imports = 'import timm, dreal_timm' if architecture.startswith('dreal_') else 'import timm'
    pushed = f"\nsent to        {results['pushed']}" if results.get('pushed') else ''
    seen = any('validation' in entry for entry in results['epochs'])
    measured = f"top-1 accuracy {metrics['top1']:.2f} %{'' if seen else ' in training'}" if 'top1' in metrics else (
        f"mAP {metrics['mAP']:.2f} %, rank-1 {metrics['rank1']:.2f} %")
    return (
        f"{measured} (epoch {results['best_epoch'] + 1} of {len(results['epochs'])})\n"
        f'exported model {model}\n'
        f"load it with   {imports}; model = timm.create_model('local-dir:{model}', pretrained=True)"
        f'{pushed}'
    )


def run(
        config: TrainConfig | Mapping[str, Any] | str | Path,
        overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a network as a recipe says, and export the best epoch without its critic.

    docs/training.md lists the files of the run's folder; `timm.create_model('local-dir:.../model', pretrained=True)`
    loads the network in it.

    Args:
        config: A configuration from `load_config`, or what it takes: a recipe's file, name, or keys and values.
        overrides: Further 'key=value' settings.

    Returns:
        Dictionary containing:
            - 'directory': Folder of the run
            - 'model': Folder of the exported model
            - 'best_epoch', 'metrics': Number of the best epoch, from 0, and its validation metrics: those of the
                moving average where there is one, those of the training where nothing is validated
            - 'epochs': For each epoch 'epoch', 'lr', 'train', 'validation' and 'validation_ema' metrics
            - 'pushed': Where `dreal.hub.push_to` is set, the address of the commit on the Hub, empty if the push failed

    Raises:
        FileNotFoundError: The recipe, the data or a checkpoint is missing.
        BlockingIOError: Another run writes to the folder.
        FileExistsError: The run's folder exists and is not empty.
        FloatingPointError: A loss was not finite.
        OSError: A checkpoint cannot be written.
        ValueError: A setting is wrong.
        WeightsError: Weights to start from cannot be had, or `dreal.hub.push_to` is set and there is no token.
    """
    if isinstance(config, TrainConfig):
        config = to_dict(config)
    state = set_up(load_config(config, overrides))
    try:
        return _run(state)
    finally:
        state.lock.release()


def _open_folder(run: Run) -> None:
    """Make the run's folder, or finish what a kill left in it, and write what it is made of."""
    directory = run.directory
    directory.mkdir(parents=True, exist_ok=True)
    run.lock.take(directory)
    if not run.resumed and (directory / LAST).exists():
        raise FileExistsError(f'{directory}: another run has written here meanwhile. Choose another experiment=NAME.')
    run.checkpoints.clean(run.config.save_epochs or ())
    write_text(directory / 'args.yaml', yaml.safe_dump(to_dict(run.config), sort_keys=False))
    network = describe_network(run.model, run.data, run.domain.label_names(run.class_names))
    write_text(directory / NETWORK, json.dumps(network, indent=2) + '\n')


def _run(state: Run) -> dict[str, Any]:
    accelerator, is_main, directory = state.accelerator, state.accelerator.is_main_process, state.directory
    decide(is_main, lambda: _open_folder(state))
    start_trackers(
        accelerator, directory, to_dict(state.config), state.config.log_kwargs,
        state.start_epoch * state.updates_per_epoch,
    )
    try:
        fit(state)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
    best_epoch = broadcast_object_list([state.checkpoints.best_epoch])[0]
    if best_epoch is None:
        raise ValueError(f'Nothing to train: {state.start_epoch} of {state.epochs} epochs are done already.')
    pushed = None
    if is_main:  # the others have nothing to wait for, which might take longer than they may wait
        _export(state)
        pushed = publish(state) if state.config.dreal.hub.push_to else None
    best: dict[str, Any] = next((entry for entry in state.history if entry['epoch'] == best_epoch), {})
    return {
        'directory': str(directory),
        'model': str(directory / 'model'),
        'best_epoch': best_epoch,
        'metrics': best.get('validation_ema') or best.get('validation') or best.get('train', {}),
        'epochs': state.history,
        'pushed': pushed,
    }
