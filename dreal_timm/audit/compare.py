"""`dreal-timm compare`: two networks on the same images, before and after reinforcement, say

Shape letters: N images.
"""
import csv
import html
import json
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dreal_timm.audit.command import audit_model, check_output, save_figures
from dreal_timm.audit.examples import Examples
from dreal_timm.audit.intervals import bootstrap
from dreal_timm.audit.parts import write_json
from dreal_timm.audit.report import draw_figures, write_report
from dreal_timm.audit.result import SCHEMA_VERSION, Audit
from dreal_timm.audit.subject import load_subject
from dreal_timm.audit.summary import caution, summarize
from dreal_timm.data.classes import names_of_config

__all__ = ['compare_audits', 'compare_models', 'format_comparison', 'read_summary']

_logger = logging.getLogger(__name__)


def _names(audits: Sequence[Audit]) -> list[Mapping[str, str]] | None:
    """Return the names of the classes of each audit by the number of the output, where all of them know names.

    Those of the data set are the first choice; those of the network are the same where they told the classes.
    """
    known: list[Mapping[str, str]] = [audit.provenance.get('class_names') or {} for audit in audits]
    if not all(known):
        known = []
        for audit in audits:
            by = (audit.provenance.get('classes') or {}).get('by', 'name')
            names = names_of_config(audit.provenance) if by == 'name' else None
            known.append({str(index): name for index, name in enumerate(names or ())})
    return known if all(known) else None


def _same_images(first: Audit, second: Audit) -> bool:
    """Whether two audits are of the same images in the same classes, whichever outputs these have."""
    if not torch.equal(first.number, second.number):
        return False
    names = _names((first, second))
    if names is None:
        return torch.equal(first.target, second.target)
    pairs = set(zip(first.target.tolist(), second.target.tolist(), strict=True))
    if not len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs}):
        return False  # two classes of one name
    labels = [
        [unicodedata.normalize('NFC', own.get(str(output), f'class {output}')) for output in outputs]
        for own, outputs in zip(names, zip(*pairs, strict=True), strict=True)
    ]
    return labels[0] == labels[1]


def compare_audits(first: Audit, second: Audit, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Return what differs between two networks on the same images, as plain values for JSON.

    Images are paired: each resample of an interval takes the same ones of both networks. Classes are those of the same
    name, where names are known, so that the two may have them in another order.

    Args:
        first: Audit of a network.
        second: Audit of another.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        Dictionary of differences, second less first, each with '_low' and '_high' of its 95% interval:
            - 'images': Number of images, and 'right', of those that both get right
            - 'network': 'top1' (percentage points) and 'log_likelihood' (mean, nats)
            - 'sites': For each site that both have, 'reward' over the images that both get right, and
                'log_likelihood_gain' over all images

    Raises:
        ValueError: They are of different images, or of classes of other names.
    """
    if not _same_images(first, second):
        raise ValueError(
            'The audits are of different images, or of the same ones in different classes: audit both networks on the '
            'same data set.')
    options: dict[str, Any] = dict(resamples=resamples, seed=seed)

    def interval(key: str, difference: torch.Tensor, weights: torch.Tensor | None = None) -> list[dict[str, float]]:
        columns = bootstrap(difference.double(), weights, **options)
        ends = ('', '_low', '_high')
        return [
            {f'{key}{end}': float(value) for end, value in zip(ends, values, strict=True)}
            for values in zip(*columns, strict=True)
        ]

    shared = [name for name in first.names if name in second.names]
    both = first.right & second.right
    network = {
        **interval('top1', 100 * (second.right.double() - first.right.double())[:, None])[0],
        **interval('log_likelihood', (second.log_p - first.log_p)[:, None])[0],
    }
    sites: list[dict[str, Any]] = []
    if shared:
        own = [[audit.column(name) for name in shared] for audit in (first, second)]
        rewards = second.rewards()[:, own[1]] - first.rewards()[:, own[0]]
        gains = second.gain[:, own[1]] - first.gain[:, own[0]]
        sites = [
            {'site': name, **reward, **gain}
            for name, reward, gain in zip(
                shared, interval('reward', rewards, both), interval('log_likelihood_gain', gains), strict=True)
        ]
    return {'images': len(first.number), 'right': int(both.sum()), 'network': network, 'sites': sites}


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """Return a comparison, with the names of the networks as 'first' and 'second', as text."""
    network = comparison['network']
    lines = [
        f"{comparison['second']} less {comparison['first']}, {comparison['images']:,} images: "
        f"top-1 {network['top1']:+.2f} points "
        f"({network['top1_low']:+.2f} to {network['top1_high']:+.2f}), log-likelihood {network['log_likelihood']:+.4f} "
        f"({network['log_likelihood_low']:+.4f} to {network['log_likelihood_high']:+.4f})"
    ]
    width = max((len(row['site']) for row in comparison['sites']), default=0)
    for row in comparison['sites']:
        interval = f"{row['reward_low']:+.4f} to {row['reward_high']:+.4f}"
        lines.append(f"{row['site']:{width}}  reward {row['reward']:+.4f} ({interval})")
    return '\n'.join([*lines, *filter(None, [caution(comparison['right'])])])


def _audited(model: str, output: Path, data_dir: str, options: Mapping[str, Any]) -> Path:
    """Return the folder of a finished audit: the one that is named, or a new one of the network that is named."""
    if (Path(model) / 'audit.json').is_file():
        return Path(model)
    if not data_dir:
        raise ValueError(f"'{model}' is no folder of a finished audit: --data DIR names the images to audit it on.")
    if (output / 'audit.json').is_file():
        return output  # of a comparison that was stopped later
    audit_model(model, data_dir, output, **options)
    return output


def read_summary(folder: Path, audit: Audit) -> dict[str, Any]:
    """Return the figures of a finished audit, which those of earlier versions lack some of."""
    content: dict[str, Any] = json.loads((folder / 'audit.json').read_text(encoding='utf-8'))
    return content if 'floor' in content['network'] else summarize(audit, **content['settings'])


def _labels(models: Sequence[str]) -> list[str]:
    labels = [Path(model).name if Path(model).is_dir() else model for model in models]
    return labels if labels[0] != labels[1] else [str(model) for model in models]


def _audit_both(models: Sequence[str], output: Path, data_dir: str, options: Mapping[str, Any]) -> list[Path] | None:
    """Return the folders of both finished audits; None on a process that another one writes them for."""
    if data_dir and not any((folder / 'audit.json').is_file() for folder in (Path(models[1]), output / 'second')):
        load_subject(models[1], input_size=options.get('input_size'))  # an error before the first is measured
    folders = [
        _audited(model, output / part, data_dir, options)
        for model, part in zip(models, ('first', 'second'), strict=True)
    ]
    return folders if all((folder / 'audit.json').is_file() for folder in folders) else None


def _write(
        output: Path,
        folders: Mapping[str, Path],
        audits: Mapping[str, Audit],
        comparison: Mapping[str, Any],
        command: Sequence[str],
) -> None:
    """Write all files of a comparison of finished audits, which are in folders, by the names of their networks."""
    summaries = {name: read_summary(folder, audits[name]) for name, folder in folders.items()}
    examples = {name: Examples.load(folder) for name, folder in folders.items()}
    drawn = draw_figures(audits, summaries, examples)
    output.mkdir(parents=True, exist_ok=True)
    save_figures(output / 'figures', drawn)
    headline = html.escape(format_comparison({**comparison, 'sites': []}))
    write_report(output / 'report.html', audits, summaries, examples, drawn, command, f'<p>{headline}</p>')
    if comparison['sites']:
        with (output / 'compare.csv').open('w', encoding='utf-8', newline='') as file:
            writer = csv.DictWriter(file, list(comparison['sites'][0]))
            writer.writeheader()
            writer.writerows(comparison['sites'])
    write_json(output / 'compare.json', comparison)


def compare_models(
        models: Sequence[str],
        output: str | Path,
        data_dir: str = '',
        labels: Sequence[str] | None = None,
        resamples: int = 1000,
        resume: bool = False,
        command: Sequence[str] = (),
        **options: Any,
) -> dict[str, Any] | None:
    """Compare two networks on the same images, and write numbers, figures and a report.

    The folder gets `compare.json`, `compare.csv`, `figures/*.png`, `report.html`, and an audit of each network that was
    not audited yet, in `first/` and `second/`.

    Args:
        models: Two networks, as `audit_model` takes them, or folders of finished audits.
        output: Folder to write.
        data_dir: Folder of the data set; not needed for finished audits.
        labels: Names for the two; None takes theirs.
        resamples: Bootstrap resamples.
        resume: Go on with a comparison of the same settings that was stopped.
        command: Command line to name in the report.
        **options: Further options of `audit_model`.

    Returns:
        What `compare_audits` returned, with the names as 'first' and 'second', on the process of rank 0; None on
        others.

    Raises:
        FileExistsError: The folder exists.
        ValueError: The audits are of different images, or the two have the same name.
    """
    output = Path(output)
    begun = any((output / part).is_dir() for part in ('first', 'second'))
    if not (resume and begun) or (output / 'compare.json').exists():
        check_output(output, resume=False)
    names = list(labels or _labels(models))
    if len(set(names)) != 2:
        raise ValueError(f'A comparison needs two networks of different names, got {" and ".join(names)}.')
    options = {'resamples': resamples, 'resume': resume, 'command': command, **options}
    folders = _audit_both(models, output, data_dir, options)
    if folders is None:
        return None
    audits = {name: Audit.load(folder) for name, folder in zip(names, folders, strict=True)}
    comparison = {
        'schema_version': SCHEMA_VERSION, 'first': names[0], 'second': names[1],
        **compare_audits(audits[names[0]], audits[names[1]], resamples, options.get('seed', 0))}
    _write(output, dict(zip(names, folders, strict=True)), audits, comparison, command)
    return comparison
