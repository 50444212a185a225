"""The model card of an exported folder, from what the folder holds

A number stands in a card only if `training/results.json` has it, which `dreal-timm validate` wrote of these weights.
"""
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
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
)
from dreal_timm.provenance import weights_digest

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
    record = read_json(path, 2 ** 20) if path.is_file() else {}
    epoch, weights = (record.get('epoch'), record.get('weights')) if isinstance(record, dict) else ('', '')
    if epoch is None:
        return None, ''
    if type(epoch) is not int or epoch < 0 or weights not in ('ema', 'raw'):
        raise ValueError(f"'{path}' does not tell of a checkpoint: export the network again.")
    return epoch, _WEIGHTS[weights]


def _results(path: Path, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Results of a file, with the numbers that others have; {} without one."""
    results = read_results(path) if path.is_file() else {}
    if results and like and ('mAP' in results) != ('mAP' in like):
        raise ValueError(f"'{path}' has other numbers than the results.")
    return results


@dataclass(frozen=True)
class _Folder:
    """What an exported folder holds: its results, settings and record are empty where it has none."""
    config: dict[str, Any]
    weights: Mapping[str, torch.Tensor]
    epoch: int | None  # of the weights, from 0
    weights_kind: str  # see `_WEIGHTS`
    results: dict[str, Any]
    control: dict[str, Any]
    float32: dict[str, Any]
    settings: dict[str, Any]
    record: dict[str, Any]

    @property
    def embedding(self) -> bool:
        return bool(self.config['architecture'] == 'dreal_reid')

    @property
    def trained_on(self) -> str:
        return str(self.settings.get('dataset') or '')

    @property
    def measured_on(self) -> str:
        return str(self.results.get('dataset') or '')

    @property
    def data(self) -> tuple[str, str]:
        """Title and id on the Hub of the data set that it was measured on, or else trained on."""
        known = self.results or self.settings
        return _data(self.measured_on if self.results else self.trained_on)[:2] if known else ('', '')

    @property
    def reinforced(self) -> bool | None:
        return is_reinforced(self.settings) if self.settings else None

    @property
    def title(self) -> str:
        trained = _data(self.trained_on)[0] if self.trained_on else ''
        return _title(self.config['architecture'], self.reinforced, trained)


def _read(directory: Path) -> _Folder:
    """Read what a folder holds; a ValueError names what does not belong together."""
    training = directory / 'training'
    config, (epoch, kind) = check_config(directory), _checkpoint(training / 'checkpoint.json')
    weights = load_file(directory / 'model.safetensors')
    results = _results(training / 'results.json')
    if results and results['weights_sha256'] != weights_digest(weights):
        raise ValueError('The results are of other weights: validate the network that is exported.')
    control, float32 = (_results(training / name, results) for name in ('control.json', 'float32.json'))
    if control:
        if not results:
            raise ValueError('A control needs results of the network to stand beside.')
        check_control(results, control)
    settings, record = training_settings(directory) or {}, training_record(directory) or {}
    return _Folder(config, weights, epoch, kind, results, control, float32, settings, record)


def _columns(results: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Key, title and digits of each number of the table."""
    if 'mAP' in results:
        return [('mAP', 'mAP %', 2), ('rank1', 'rank-1 %', 2), ('rank5', 'rank-5 %', 2), ('mINP', 'mINP %', 2)]
    return [('top1', 'top-1 %', 2), ('top5', 'top-5 %', 2), ('loss', 'loss', 4)]


def _rows(results: Mapping[str, Any], control: Mapping[str, Any]) -> list[dict[str, Any]]:
    named = [('this network', results), ('plain, the same settings', control)]
    return [
        {'name': name, 'values': [f'{own[key]:.{digits}f}' for key, _, digits in _columns(results)]}
        for name, own in named if own]


def _notes(results: Mapping[str, Any], control: Mapping[str, Any], float32: Mapping[str, Any]) -> list[str]:
    lines = []
    if float32:
        key, name, _ = _columns(results)[0]
        change, name = results[key] - float32[key], name.removesuffix(' %')
        lines.append(f'In float32, before the weights were rounded: {float32[key]:.2f} {name} ({change:+.2f} since).')
    if 'settings' in results:
        settings = ', '.join(f'{escape(name)} {escape(value)}' for name, value in results['settings'].items())
        lines.append(f'Evaluated with {settings}.')
    if control and 'mAP' in control:
        lines.append(f"This network less the plain one: {results['mAP'] - control['mAP']:+.2f} points of mAP.")
    elif control:
        error = 100 * sum(r['top1'] / 100 * (1 - r['top1'] / 100) / r['samples'] for r in (results, control)) ** 0.5
        lines.append(
            f"This network less the plain one: {results['top1'] - control['top1']:+.2f} points of top-1; the standard "
            f'error of such a difference, from the number of images alone, is at most {error:.2f}.')
    versions = results.get('versions')
    if versions:
        packages = ', '.join(f'{escape(name)} {escape(number)}' for name, number in versions.items())
        lines.append(f'Measured with {packages}.')
    return lines


def _seconds(record: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds of epochs by the device they were trained on."""
    seconds: dict[str, list[float]] = {}
    for row in record.get('epochs', ()):
        seconds.setdefault(str(row['device']), []).append(float(row['seconds']))
    return seconds


def _made_with(record: Mapping[str, Any]) -> str:
    """Versions and commit of a training."""
    versions = [f'{escape(name)} {escape(number)}' for name, number in (record.get('versions') or {}).items()]
    commit = record.get('commit')
    return f"Trained with {', '.join(versions)}{f', commit {code(commit[:12])}' if commit else ''}." if versions else ''


def _changed(record: Mapping[str, Any], epoch: int | None) -> list[str]:
    """Settings that changed before an epoch, a line for each time."""
    rows = [row for row in record.get('changes') or () if epoch is None or row['epoch'] <= epoch]
    return [
        f'From epoch {row["epoch"] + 1} on ' + ', '.join(
            f'{code(str(name))} {code(str(after))} (before {code(str(before))})'
            for name, (before, after) in row['settings'].items()) + '.'
        for row in rows]


def _cost(folder: _Folder) -> str:
    """What the training cost, beside the plain network's where both were timed on one device."""
    probe = _PASSES.get(str((folder.settings.get('dreal') or {}).get('probe')), 'the probe')
    line = f'What a step costs beyond plain training: {probe}, and the critic. '
    own, plain = _seconds(folder.record), _seconds(folder.control.get('run') or {})
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


def _front_matter(folder: _Folder) -> ModelCardData:
    """The front matter of the card, which the Hub reads."""
    task = 'image-feature-extraction' if folder.embedding else 'image-classification'
    results, (data, data_id) = folder.results, folder.data
    metrics = [('mAP', 'mAP (%)'), ('rank1', 'rank-1 (%)')] if folder.embedding else [
        ('top1', 'top-1 accuracy (%)'), ('top5', 'top-5 accuracy (%)')]
    return ModelCardData(
        library_name='timm',
        license=plain((folder.config.get('pretrained_cfg') or {}).get('license') or 'apache-2.0'),
        pipeline_tag=task, tags=[task, *(['person-re-identification'] if folder.embedding else []), 'timm', 'dreal'],
        datasets=[data_id] if data_id and folder.measured_on in ('', folder.trained_on) else None,
        model_name=plain(folder.title) if results else None,
        eval_results=[
            EvalResult(
                task, data_id or plain(folder.measured_on) or 'imagefolder', plain(data), key, results[key],
                metric_name=metric, dataset_split=plain(results['split']),
                task_name='Re-identification' if folder.embedding else 'Image classification')
            for key, metric in metrics] if results else None,
    )


def _shown_settings(folder: _Folder) -> list[tuple[str, str]]:
    """Settings of the training that the card shows, with their values."""
    flat = flat_settings(folder.settings)
    rows = [(key, folder.settings[key]) for key in _SETTINGS if folder.settings.get(key) not in (None, '', False)]
    if folder.reinforced:
        rows += [(key, flat[key]) for key in _REINFORCED if flat.get(key) not in (None, '')]
    return [(key, escape(value)) for key, value in rows]


def _chosen(folder: _Folder) -> bool:
    """Whether the epoch was chosen by the data that the results are of."""
    split = folder.embedding or folder.results.get('split') == folder.settings.get('val_split')
    return bool(folder.results) and folder.epoch is not None and split and (
        folder.measured_on == folder.trained_on and folder.settings.get('eval_metric') != 'epoch')


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
    folder = _read(directory)
    results, architecture = folder.results, folder.config['architecture']
    trained, _, data_license = _data(folder.trained_on) if folder.settings else ('', '', 'not recorded')
    parameters, gmacs, size = _network(directory)
    dtype = next(tensor for tensor in folder.weights.values() if tensor.is_floating_point()).dtype
    card = ModelCard.from_template(
        _front_matter(folder), template_str=_template().read_text(encoding='utf-8'),
        title=escape(folder.title), kind=escape(_title(architecture, None, '')), classes=folder.config['num_classes'],
        dataset=escape(trained), reinforced=folder.reinforced, ours='dreal' in folder.settings,
        architecture=code(architecture), parameters=f'{parameters:,}', gmacs=f'{gmacs:.3f}',
        input=' x '.join(map(str, size)), mode='L' if size[0] == 1 else 'RGB', dtype=str(dtype).removeprefix('torch.'),
        backbone=code((folder.config.get('model_args') or {}).get('backbone', 'dreal_cbam_resnet50')),
        data_license=data_license, rows=_rows(results, folder.control) if results else [],
        data_line=_data_line(results, folder.data[0]) if results else '', embedding=folder.embedding,
        columns=[name for _, name, _ in _columns(results)],
        notes=_notes(results, folder.control, folder.float32) if results else [], control=bool(folder.control),
        settings=_shown_settings(folder), summary=(directory / 'training' / 'summary.csv').is_file(),
        extra_import=', dreal_timm' if architecture.startswith('dreal_') else '',
        weights_line='' if folder.epoch is None else
        f'These are {folder.weights_kind} after epoch {folder.epoch + 1}, the checkpoint that was exported.',
        made_with=_made_with(folder.record), changes=_changed(folder.record, folder.epoch),
        cost_line=_cost(folder), chosen=_chosen(folder),
    )
    (directory / 'README.md').write_text(re.sub('\n{3,}', '\n\n', str(card)).rstrip() + '\n', encoding='utf-8')
    data_id = folder.data[1]
    if results and data_id and not folder.embedding:  # what the Hub's leaderboards read
        target = directory / '.eval_results' / f"{data_id.replace('/', '_')}.yaml"
        target.parent.mkdir(exist_ok=True)
        entries = eval_result_entries_to_yaml([EvalResultEntry(
            data_id, 'top1', results['top1'], notes=f"split {plain(results['split'])}, {results['samples']} images")])
        target.write_text(yaml.safe_dump(entries, sort_keys=False), encoding='utf-8')
