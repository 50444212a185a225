"""The model card of an exported folder, from what the folder holds

A number stands in a card only if `training/results.json` has it, which `dreal-timm validate` wrote of these weights.
"""
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from safetensors.torch import load_file
from timm.models import get_model_input_config
from torch.utils.flop_counter import FlopCounterMode

from dreal_timm.hub.config import check_config
from dreal_timm.hub.files import read_json
from dreal_timm.hub.markdown import code, escape, plain
from dreal_timm.hub.results import (
    check_control,
    flat_settings,
    is_reinforced,
    read_results,
    training_record,
    training_settings,
    weights_digest,
)

__all__ = ['write_card']

_SETTINGS = (
    'epochs', 'batch_size', 'opt', 'lr', 'momentum', 'weight_decay', 'sched', 'warmup_epochs', 'smoothing', 'mixup',
    'cutmix', 'aa', 'model_ema', 'amp', 'seed', 'pretrained')
_REINFORCED = (
    'dreal.probe', 'dreal.probe_every', 'dreal.actor_weight', 'dreal.gamma', 'dreal.rotate', 'dreal.start.backbone')
# title, id on the Hub and licence of data sets that are known
_DATA = {
    'torch/fashion_mnist': ('Fashion-MNIST', 'zalando-datasets/fashion_mnist', 'MIT'),
    'torch/imagenet': ('ImageNet-1k', 'ILSVRC/imagenet-1k', 'non-commercial research, terms of image-net.org'),
    'hfds/imagenet-1k': ('ImageNet-1k', 'ILSVRC/imagenet-1k', 'non-commercial research, terms of image-net.org'),
    'hfds/ILSVRC/imagenet-1k': ('ImageNet-1k', 'ILSVRC/imagenet-1k', 'non-commercial research, terms of image-net.org'),
}
_PASSES = {
    'exact': 'one counterfactual pass for each group of attention sites',
    'split': 'one counterfactual pass from the first probed site on, each sample for one group of sites',
    'taylor': 'no counterfactual pass: rewards are measured to first order in the backward pass',
}


def _template() -> Path:
    package = Path(__file__).parent.parent
    installed = package / 'hub_cards' / 'template.md'  # in a wheel
    return installed if installed.is_file() else package.parent / 'hub_cards' / 'template.md'  # in a checkout


def _data(name: str) -> tuple[str, str, str]:
    known = _DATA.get(name)
    if known:
        return known
    kind, _, rest = name.partition('/')
    if name in ('reid/csv', 'reid/folders'):
        rest = 'a set of identities of its own'
    hub = kind in ('hfds', 'hfids') and all(
        re.fullmatch(r'[A-Za-z0-9][\w.-]{0,95}', part, re.ASCII) for part in rest.split('/', 1))
    return (rest or 'an image folder', rest if hub else '', 'not recorded')


def _network(directory: Path) -> tuple[int, float, list[int]]:
    """Parameters, GMACs and size of the input."""
    with torch.device('meta'):
        model = timm.create_model(f'local-dir:{directory}', pretrained=False).eval()
        size = list(get_model_input_config(model)['input_size'])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, *size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9, size


def _title(architecture: str, reinforced: bool | None, data: str) -> str:
    match = re.fullmatch('(?:dreal_)?(se|cbam|srm)_?resnet([0-9]+)', architecture)
    name = f'{match[1].upper()}-ResNet-{match[2]}' if match else architecture
    name = 'Embedding network' if architecture == 'dreal_reid' else name
    return f"{name}{', reinforced' if reinforced else ''}{f', {data}' if data else ''}"


_WEIGHTS = {'ema': 'a moving average of the training\'s weights', 'raw': 'the weights themselves'}


def _checkpoint(path: Path) -> tuple[int | None, str]:
    """Epoch of the weights, and what they are."""
    told = read_json(path, 2 ** 20) if path.is_file() else {}
    epoch, weights = (told.get('epoch'), told.get('weights')) if isinstance(told, dict) else ('', '')
    if epoch is None:
        return None, ''
    if type(epoch) is not int or epoch < 0 or weights not in ('ema', 'raw'):
        raise ValueError(f"'{path}' does not tell of a checkpoint: export the network again.")
    return epoch, _WEIGHTS[weights]


def _results(path: Path, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Results of a file, with the numbers that others have; {} without one."""
    found = read_results(path) if path.is_file() else {}
    if found and like and ('mAP' in found) != ('mAP' in like):
        raise ValueError(f"'{path}' has other numbers than the results.")
    return found


def _columns(results: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Key, title and digits of each number that is told."""
    if 'mAP' in results:
        return [('mAP', 'mAP %', 2), ('rank1', 'rank-1 %', 2), ('rank5', 'rank-5 %', 2), ('mINP', 'mINP %', 2)]
    return [('top1', 'top-1 %', 2), ('top5', 'top-5 %', 2), ('loss', 'loss', 4)]


def _rows(results: Mapping[str, Any], control: Mapping[str, Any]) -> list[dict[str, Any]]:
    named = [('this network', results), ('plain, the same settings', control)]
    return [
        {'name': name, 'values': [f'{told[key]:.{digits}f}' for key, _, digits in _columns(results)]}
        for name, told in named if told]


def _notes(results: Mapping[str, Any], control: Mapping[str, Any], float32: Mapping[str, Any]) -> list[str]:
    lines = []
    if float32:
        key, name, _ = _columns(results)[0]
        change, name = results[key] - float32[key], name.removesuffix(' %')
        lines.append(f'In float32, before the weights were rounded: {float32[key]:.2f} {name} ({change:+.2f} since).')
    if 'settings' in results:
        told = ', '.join(f'{escape(name)} {escape(value)}' for name, value in results['settings'].items())
        lines.append(f'Evaluated with {told}.')
    if control and 'mAP' in control:
        lines.append(f"This network less the plain one: {results['mAP'] - control['mAP']:+.2f} points of mAP.")
    elif control:
        error = 100 * sum(r['top1'] / 100 * (1 - r['top1'] / 100) / r['samples'] for r in (results, control)) ** 0.5
        lines.append(
            f"This network less the plain one: {results['top1'] - control['top1']:+.2f} points of top-1; the standard "
            f'error of such a difference, from the number of images alone, is at most {error:.2f}.')
    versions = results.get('versions')
    if versions:
        told = ', '.join(f'{escape(name)} {escape(number)}' for name, number in versions.items())
        lines.append(f'Measured with {told}.')
    return lines


def _seconds(record: Any) -> dict[str, list[float]]:
    """Seconds of epochs by the device they were trained on."""
    found: dict[str, list[float]] = {}
    for row in (record or {}).get('epochs', ()):
        found.setdefault(str(row['device']), []).append(float(row['seconds']))
    return found


def _made_with(record: Any) -> str:
    """Versions and commit of a training."""
    versions = [f'{escape(name)} {escape(number)}' for name, number in ((record or {}).get('versions') or {}).items()]
    commit = (record or {}).get('commit')
    return f"Trained with {', '.join(versions)}{f', commit {code(commit[:12])}' if commit else ''}." if versions else ''


def _changed(record: Any, epoch: int | None) -> list[str]:
    """Settings that changed before an epoch, a line for each time."""
    rows = [row for row in (record or {}).get('changes') or () if epoch is None or row['epoch'] <= epoch]
    return [
        f'From epoch {row["epoch"] + 1} on ' + ', '.join(
            f'{code(str(name))} {code(str(after))} (before {code(str(before))})'
            for name, (before, after) in row['settings'].items()) + '.'
        for row in rows]


def _cost(probe: Any, record: Any, control: Any) -> str:
    """What the training cost, beside the plain network's where both were timed on one device."""
    line = f"What a step costs beyond plain training: {_PASSES.get(str(probe), 'the probe')}, and the critic. "
    own, plain = _seconds(record), _seconds(control)
    if not own:
        return line + 'Wall time was not recorded.'
    device = max(own, key=lambda name: (name in plain, len(own[name])))
    median = statistics.median(own[device])
    line += f'The steps of an epoch took {median:,.1f} s (median of {len(own[device])} epochs, {escape(device)})'
    other = statistics.median(plain.get(device, [0]))
    if not other:
        return line + '.'
    return line + f', and {other:,.1f} s of the plain network, on a device of that name: {median / other:.2f} times.'


def _data_line(results: Mapping[str, Any], data: str) -> str:
    if 'mAP' in results:
        return f"{results['queries']:,} queries in {results['samples']:,} images of {escape(data)} with queries."
    return f"{results['samples']:,} images of the split '{escape(results['split'])}' of {escape(data)}."


def write_card(directory: str | Path) -> None:
    """Write `README.md`, and `.eval_results/` where the data set is known to the Hub, from what a folder holds.

    Read are `config.json`, the weights, and where they exist `training/args.yaml`, `training/checkpoint.json`,
    `training/run.json`, and of `dreal-timm validate --results` `training/results.json`, `training/control.json` (the
    plain network of the same settings) and `training/float32.json` (before the weights were rounded to float16). What
    these files say stands in the card as text: no markup of theirs, and no number that is none.

    Args:
        directory: The folder, which `dreal_timm.hub.export` writes.

    Raises:
        ValueError: Results are of other weights or no numbers, the control is none, or a file is broken.
    """
    directory = Path(directory)
    training = directory / 'training'
    config, (epoch, weights) = check_config(directory), _checkpoint(training / 'checkpoint.json')
    state = load_file(directory / 'model.safetensors')
    results = _results(training / 'results.json')
    if results and results['weights_sha256'] != weights_digest(state):
        raise ValueError('The results are of other weights: validate the network that is exported.')
    control, float32 = (_results(training / name, results) for name in ('control.json', 'float32.json'))
    if control:
        if not results:
            raise ValueError('A control needs results of the network to stand beside.')
        check_control(results, control)
    settings, record = training_settings(directory) or {}, training_record(directory)
    dreal = settings.get('dreal') or {}
    reinforced = is_reinforced(settings) if settings else None
    name = str(settings.get('dataset') or '')
    trained, _, data_license = _data(name) if settings else ('', '', 'not recorded')
    measured = results.get('dataset') or ''
    data, data_id, _ = _data(measured) if results else _data(name) if settings else ('', '', '')
    parameters, gmacs, size = _network(directory)
    architecture = config['architecture']
    title = _title(architecture, reinforced, trained if name else '')
    told = [(key, settings[key]) for key in _SETTINGS if settings.get(key) not in (None, '', False)]
    if reinforced:
        flat = flat_settings(settings)
        told += [(key, flat[key]) for key in _REINFORCED if flat.get(key) not in (None, '')]
    embedding = architecture == 'dreal_reid'
    task = 'image-feature-extraction' if embedding else 'image-classification'
    front = ModelCardData(
        library_name='timm', license=plain((config.get('pretrained_cfg') or {}).get('license') or 'apache-2.0'),
        pipeline_tag=task, tags=[task, *(['person-re-identification'] if embedding else []), 'timm', 'dreal'],
        datasets=[data_id] if data_id and measured in ('', name) else None,
        model_name=plain(title) if results else None,
        eval_results=[
            EvalResult(
                task, data_id or plain(measured) or 'imagefolder', plain(data), key, results[key], metric_name=metric,
                dataset_split=plain(results['split']),
                task_name='Re-identification' if embedding else 'Image classification')
            for key, metric in (
                [('mAP', 'mAP (%)'), ('rank1', 'rank-1 (%)')] if embedding else
                [('top1', 'top-1 accuracy (%)'), ('top5', 'top-5 accuracy (%)')])] if results else None,
    )
    card = ModelCard.from_template(
        front, template_str=_template().read_text(encoding='utf-8'),
        title=escape(title), kind=escape(_title(architecture, None, '')), classes=config['num_classes'],
        dataset=escape(trained), reinforced=reinforced, ours='dreal' in settings, architecture=code(architecture),
        parameters=f'{parameters:,}',
        gmacs=f'{gmacs:.3f}', input=' x '.join(map(str, size)), mode='L' if size[0] == 1 else 'RGB',
        dtype=str(next(t for t in state.values() if t.is_floating_point()).dtype).removeprefix('torch.'),
        backbone=code((config.get('model_args') or {}).get('backbone', 'dreal_cbam_resnet50')),
        data_license=data_license, rows=_rows(results, control) if results else [],
        data_line=_data_line(results, data) if results else '', embedding=embedding,
        columns=[name for _, name, _ in _columns(results)],
        notes=_notes(results, control, float32) if results else [],
        control=bool(control), settings=[(key, escape(value)) for key, value in told],
        summary=(training / 'summary.csv').is_file(),
        extra_import=', dreal_timm' if architecture.startswith('dreal_') else '',
        weights_line='' if epoch is None else
        f'These are {weights} after epoch {epoch + 1}, the checkpoint that was exported.',
        made_with=_made_with(record), changes=_changed(record, epoch),
        cost_line=_cost(dreal.get('probe'), record, control.get('run')),
        chosen=bool(results) and epoch is not None and measured == name and settings.get('eval_metric') != 'epoch' and (
            embedding or results['split'] == settings.get('val_split')),
    )
    (directory / 'README.md').write_text(re.sub('\n{3,}', '\n\n', str(card)).rstrip() + '\n', encoding='utf-8')
    if results and data_id and not embedding:
        folder = directory / '.eval_results'
        folder.mkdir(exist_ok=True)
        entries = eval_result_entries_to_yaml([EvalResultEntry(
            data_id, 'top1', results['top1'], notes=f"split {plain(results['split'])}, {results['samples']} images")])
        target = folder / f"{data_id.replace('/', '_')}.yaml"
        target.write_text(yaml.safe_dump(entries, sort_keys=False), encoding='utf-8')
