"""A run from a recipe to an exported network: set-up, training, export"""
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.layers import convert_sync_batchnorm
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import random_seed
from torch import nn

from dreal_timm.hub import describe_network, export
from dreal_timm.hub.loading import read_checkpoint
from dreal_timm.hub.results import flat_settings, shared_settings
from dreal_timm.hub.run import NETWORK
from dreal_timm.hub.upload import check_target
from dreal_timm.train import build, datasets, loaders, reid
from dreal_timm.train.checkpoint import BEST, LAST, Checkpoints, write_summary
from dreal_timm.train.config import load_config, to_dict
from dreal_timm.train.evaluate import METRICS, evaluate
from dreal_timm.train.launch import launch, run_directory
from dreal_timm.train.lock import FolderLock
from dreal_timm.train.loop import Run, fit
from dreal_timm.train.publish import export_anew, publish
from dreal_timm.train.record import RECORD, Record
from dreal_timm.train.resume import is_last_of, load_checkpoint, restore, restore_scheduler, resume_path
from dreal_timm.train.settings import TrainConfig
from dreal_timm.train.trackers import check_trackers, start_trackers
from dreal_timm.utils.files import write_text

__all__ = ['describe', 'run', 'set_up']

_logger = logging.getLogger(__name__)


# settings that do not change what is learnt
_FREE = ('resume', 'stop_epoch', 'output', 'experiment', 'start_epoch', 'log_with', 'log_kwargs', 'log_interval')


def _changes(config: TrainConfig, checkpoint: Mapping[str, Any], processes: int) -> dict[str, list[Any]]:
    """Return the settings that a resumed run changes: [before, after] by their names."""
    trained = checkpoint.get('args')
    if not isinstance(trained, Mapping):
        return {}
    before, after = flat_settings(trained), flat_settings(to_dict(config))
    changed = {
        name: [before[name], value] for name, value in after.items()
        if name not in _FREE and before.get(name, value) != value}
    if checkpoint.get('processes', processes) != processes:
        changed['processes'] = [checkpoint['processes'], processes]
    return changed


def _check_folder(config: TrainConfig, path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Raise a ValueError if the files beside a checkpoint are not ranked as this run ranks its own."""
    problem = ''
    if 'history' not in checkpoint:
        problem = 'is not of this package'
    elif any(checkpoint['args'][key] != getattr(config, key) for key in ('eval_metric', 'val_split')):
        problem = 'ranked its epochs otherwise (eval_metric, val_split)'
    if problem:
        raise ValueError(f"resume: '{path}' {problem}: add experiment=NAME and resume={path} to go on in a new folder.")


def _check_metric(config: TrainConfig) -> None:
    known = reid.METRICS if reid.is_reid(config) else METRICS
    if config.eval_metric not in known and config.val_split:
        raise ValueError(
            f"eval_metric: with dreal.task={config.dreal.task} one of {', '.join(known)}, got '{config.eval_metric}'.")
    if config.eval_metric == 'epoch' and config.sched == 'plateau':
        raise ValueError("eval_metric: sched=plateau needs a metric that can stop improving, not 'epoch'.")


def _distribute(config: TrainConfig, task: Any, device: torch.device, processes: int) -> None:
    """Compile and distribute, in timm's order: after the moving average, and DDP last."""
    if config.torchcompile:
        task.compile(backend=config.torchcompile, mode=config.torchcompile_mode)
        if task.has_ema():
            task.compile_ema(backend=config.torchcompile, mode=config.torchcompile_mode)
    if processes > 1:
        buffers = dict(broadcast_buffers=False) if config.no_ddp_bb else {}
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None, **buffers)


def _build_data(config: TrainConfig, model: Any, data: Mapping[str, Any]) -> tuple[Any, Any]:
    """Open both splits, the second of them None where nothing is validated, and compare their classes."""
    channels = data['input_size'][0]
    train_set = datasets.build_dataset(config, config.train_split, channels, True, model.num_classes)
    val_set = None
    if config.val_split:
        val_set = datasets.build_dataset(config, config.val_split, channels, False, model.num_classes)
    datasets.check_labels(train_set, val_set, model.num_classes, given=config.num_classes is not None)
    return train_set, val_set


def _validate(model: nn.Module, loader: Any, **options: Any) -> dict[str, float]:
    """Metrics of an epoch; images that cannot be read are named by the loader, and counted here."""
    metrics = evaluate(model, loader, **options)
    samples = metrics.pop('samples')
    if not isinstance(loader.dataset, torch.utils.data.IterableDataset) and samples < len(loader.dataset):
        _logger.warning(f'validation: {len(loader.dataset) - samples:,} images cannot be read and are left out')
    return metrics


def _label_names(run: Run) -> list[str] | None:
    """Names of the classes for an export; nobody else has the identities of re-identification."""
    return None if reid.is_reid(run.config) else run.class_names


def _build_learner(config: TrainConfig, model: Any, data: Mapping[str, Any], accelerator: Accelerator) -> Any:
    """Freeze what is to be frozen, and make the task, its moving average and the optimizer."""
    frozen: list[nn.Module] = []
    if config.dreal.start.freeze:
        frozen = build.freeze_backbone(model, data['input_size'])
    task = build.build_task(
        config, model, accelerator.device, data['input_size'], verbose=accelerator.is_main_process)
    optimizer = build.build_optimizer(
        config, task.get_trainable_module(), config.batch_size * accelerator.num_processes * config.grad_accum_steps)
    if config.model_ema:
        task.setup_ema(
            decay=config.model_ema_decay,
            use_warmup=config.model_ema_warmup,
            device=torch.device('cpu') if config.model_ema_force_cpu else None,
        )
    return task, optimizer, frozen


def _resume(run: Run, optimizer: torch.optim.Optimizer, path: Path | None, checkpoint: dict[str, Any] | None) -> None:
    """Take the run to where the checkpoint left it."""
    config, is_main = run.config, run.accelerator.is_main_process
    if checkpoint is not None and path is not None:
        run.start_epoch = restore(
            checkpoint, path, run.task, None if config.no_resume_opt else optimizer, run.accelerator.scaler)
    if config.start_epoch is not None:
        run.start_epoch = config.start_epoch
    if checkpoint is not None and path is not None:
        run.history = [entry for entry in checkpoint.get('history', []) if entry['epoch'] < run.start_epoch]
        if is_main and (config.resume == 'auto' or is_last_of(path, run.directory)):
            run.checkpoints.load_state_dict(checkpoint['saver'], run.start_epoch, path, int(checkpoint['epoch']))
            run.record.load(run.directory, run.start_epoch)
    if run.scheduler is None:
        for group in optimizer.param_groups:
            group['lr'] = config.lr * group.get('lr_scale', 1.0)
    elif checkpoint is not None or run.start_epoch:
        state = None if config.start_epoch is not None else (checkpoint or {}).get('scheduler')
        restore_scheduler(run.scheduler, state, run.start_epoch, run.start_epoch * run.updates_per_epoch)
    if is_main and checkpoint is not None:
        _logger.info(f'resumed from {path}: {run.start_epoch} of {run.epochs} epochs are done')
        run.record.changes = [row for row in checkpoint.get('changes', ()) if row['epoch'] < run.start_epoch]
        changed = _changes(config, checkpoint, run.accelerator.num_processes)
        if changed:
            told = ', '.join(f'{name} {old} -> {new}' for name, (old, new) in changed.items())
            _logger.info(f'Settings that are not those of the checkpoint: {told}')
            run.record.changes.append({'epoch': run.start_epoch, 'settings': shared_settings(changed)})


def _decide(is_main: bool, decision: Callable[[], Any]) -> Any:
    """Return what the first process decides, or raise what it raises, in every process."""
    found: list[Any] = [None, None]
    if is_main:
        try:
            found = [decision(), None]
        except (OSError, ValueError) as error:
            found = [None, error]
    result, problem = broadcast_object_list(found)
    if problem is not None:
        raise problem
    return result


def _held_path(config: TrainConfig, lock: FolderLock, directory: Path) -> Path | None:
    """Hold a folder that exists, and return what to go on from: nobody else replaces it any more."""
    if directory.is_dir():
        lock.take(directory)
    return resume_path(config, directory)


def set_up(config: TrainConfig) -> Run:
    """Check and build everything of a run; nothing is written, but for the lock of a folder that exists.

    Raises:
        BlockingIOError: Another run holds the folder.
        FileNotFoundError: The data or a checkpoint is missing.
        FileExistsError: The run's folder exists and is not empty.
        ValueError: A setting is wrong.
    """
    lock = FolderLock()
    try:
        return _set_up(config, lock)
    except BaseException:
        lock.release()
        raise


def _set_up(config: TrainConfig, lock: FolderLock) -> Run:
    build.import_device_modules(config)
    _check_metric(config)
    check_trackers(config.log_with or (), config.log_kwargs)
    if config.dreal.hub.push_to:
        check_target(config.dreal.hub.push_to)
    accelerator = launch(config)
    device, is_main, processes = accelerator.device, accelerator.is_main_process, accelerator.num_processes
    random_seed(config.seed, accelerator.process_index)

    people = reid.open_data(config) if reid.is_reid(config) else None
    model: Any = build.build_model(config)
    data = datasets.data_config(config, model)
    train_set, val_set = None, None
    if people is not None:
        reid.check_model(model, config.model)
    else:
        with accelerator.local_main_process_first() if config.dataset_download else nullcontext():
            train_set, val_set = _build_data(config, model, data)
    directory = run_directory(config, data['input_size'], is_main)
    # one process decides: a machine that does not see the folder stops, in place of training from the start
    path = _decide(is_main, lambda: _held_path(config, lock, directory))
    checkpoint = None if path is None else load_checkpoint(path, config)
    if people is not None and path is None:
        reid.read_all(config, people, processes)
    if checkpoint is not None and path.resolve().parent == directory.resolve():
        _check_folder(config, path, checkpoint)
    names = None if people is None else people.identity_names()
    if people is None:
        names = datasets.settle_classes(config, model, train_set, val_set, checkpoint, path)
        # of the network that it started from: they are not those of this data
        names_of_others = ('label_names', 'label_descriptions')
        model.pretrained_cfg = {
            key: value for key, value in model.pretrained_cfg.items() if key not in names_of_others}
    elif checkpoint is not None:
        datasets.check_same_classes(names, checkpoint, path)

    model.to(device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
    if config.sync_bn and processes > 1:
        model = convert_sync_batchnorm(model)
    task, optimizer, frozen = _build_learner(config, model, data, accelerator)
    mixup = loaders.build_mixup(config, model.num_classes)
    validate: Any = None
    if people is not None:
        train_loader = reid.build_train_loader(config, people, data, device, accelerator.process_index, processes)
        images = len(people.train), len(people.query) + len(people.gallery) if config.val_split else 0
        if config.val_split:
            validate = reid.build_validation(config, people, data, accelerator)
    else:
        train_loader = loaders.build_loader(config, train_set, data, device, True, processes > 1, mixup)
        images = loaders.count_images(train_set, processes), loaders.count_images(val_set, processes)
        if val_set is not None:
            val_loader = loaders.build_loader(config, val_set, data, device, False, processes > 1)
            validate = partial(
                _validate, loader=val_loader, device=device, distributed=processes > 1, autocast=accelerator.autocast,
                channels_last=config.channels_last)

    decreasing = config.eval_metric == 'loss' or (validate is None and config.eval_metric != 'epoch')
    run = Run(
        config=config, accelerator=accelerator, model=model, data=data, task=task, optimizer=optimizer,
        scheduler=None, epochs=config.epochs, train_loader=train_loader, validate=validate,
        class_names=names, directory=directory,
        checkpoints=Checkpoints(directory, config.checkpoint_hist, decreasing), record=Record(device, processes),
        mixup=mixup, frozen_norms=frozen, lock=lock, resumed=path is not None,
    )
    run.scheduler, run.epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(config, decreasing_metric=decreasing), updates_per_epoch=run.updates_per_epoch)
    if is_main:
        _logger.info(
            f'{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters, '
            f'{images[0]:,} images to train on, {images[1]:,} to validate on, {processes} x {device.type}, {directory}'
        )
    _resume(run, optimizer, path, checkpoint)
    _distribute(config, task, device, processes)
    run.optimizer = accelerator.prepare(optimizer)
    return run


def _export(run: Run) -> None:
    """Export the weights that the best epoch was ranked by."""
    best = read_checkpoint(run.directory / BEST)
    if best['epoch'] != run.checkpoints.best_epoch:
        raise ValueError(
            f'{run.directory / BEST} is of epoch {best["epoch"] + 1}, and the file of the best epoch is gone: '
            'dreal-timm export makes a folder of any checkpoint.')
    averaged = run.config.model_ema and not run.config.model_ema_force_cpu
    run.model.load_state_dict(best['state_dict_ema' if averaged else 'state_dict'])
    if reid.is_reid(run.config):
        run.model.reset_classifier(0)  # nobody has these identities
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
        run.model, folder, data_config=run.data, label_names=_label_names(run), files=files))


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

    The run's folder holds `args.yaml`, `summary.csv`, `run.json` (versions, the commit of a checkout, the time of each
    epoch), `network.json` (timm's config of the network), checkpoints (`last.pth.tar`, `model_best.pth.tar`, the best
    `checkpoint-EPOCH.pth.tar`, and `milestone-N.pth.tar` where `save_epochs` asks for them) and `model/`, which
    `timm.create_model('local-dir:.../model', pretrained=True)` loads.

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
    network = describe_network(run.model, run.data, _label_names(run))
    write_text(directory / NETWORK, json.dumps(network, indent=2) + '\n')


def _run(state: Run) -> dict[str, Any]:
    accelerator, is_main, directory = state.accelerator, state.accelerator.is_main_process, state.directory
    _decide(is_main, lambda: _open_folder(state))
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
