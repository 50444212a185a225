"""`dreal-timm audit`: a network, a data set, and a folder of results; and the same of what is in memory"""
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from timm.utils import unwrap_model
from torch import nn

from dreal_timm.audit.examples import Examples, collect_examples, telling_numbers
from dreal_timm.audit.folder import audit_folder, remove_parts
from dreal_timm.audit.loader import LoaderImages
from dreal_timm.audit.report import draw_figures, write_report
from dreal_timm.audit.result import Audit
from dreal_timm.audit.run import measure
from dreal_timm.audit.subject import load_subject, open_images
from dreal_timm.audit.summary import summarize, write_csv
from dreal_timm.critic import Critic

__all__ = ['audit_model', 'audit_network', 'check_output', 'save_figures']

_logger = logging.getLogger(__name__)


def check_output(directory: Path, resume: bool) -> None:
    """Raise a FileExistsError if the folder holds anything that is not to be gone on with."""
    if int(os.environ.get('RANK', 0)):
        return  # another process does
    if (directory / 'audit.json').exists() or (directory / 'compare.json').exists():
        raise FileExistsError(f"'{directory}' holds a finished audit: choose another folder.")
    begun = any((directory / part).is_dir() for part in ('parts', 'first', 'second'))
    if directory.exists() and any(directory.iterdir()) and not (resume and begun):
        hint = 'add --resume to go on with it, or ' if begun else ''
        raise FileExistsError(f"'{directory}' exists and is not empty: {hint}choose another folder.")


def save_figures(directory: Path, drawn: Mapping[str, Figure]) -> None:
    """Write figures to PNG files, named as they are."""
    directory.mkdir(exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(directory / f"{name.replace(' ', '-').replace('/', '-')}.png", dpi=150)


def audit_model(
        model: str,
        data_dir: str,
        output: str | Path,
        *,
        dataset: str = '',
        split: str = 'validation',
        checkpoint: str = '',
        model_kwargs: Mapping[str, Any] | None = None,
        class_map: str = '',
        by_order: bool = False,
        sites: Sequence[str] | None = None,
        input_size: Sequence[int] | None = None,
        num_samples: int | None = None,
        batch_size: int = 128,
        workers: int = 2,
        device: str | None = None,
        seed: int = 0,
        resamples: int = 1000,
        resume: bool = False,
        command: Sequence[str] = (),
) -> tuple[Audit, dict[str, Any]] | None:
    """Measure what each attention module of a trained network is worth, and write numbers, figures and a report.

    The folder gets `audit.json` and `sites.csv` (figures, with intervals), `samples.safetensors` (what was measured of
    each image), `maps.safetensors` (mean and variance of the maps), `examples.safetensors`, `figures/*.png` and
    `report.html`. An audit that is stopped goes on with `resume`. Processes that `torchrun` started share the images.

    Args:
        model: Name of a timm model, 'hf-hub:USER/NAME', an exported folder, or the folder of a run, whose critic is
            looked at as well, or of timm's train.py.
        data_dir: Folder of the data set.
        output: Folder to write.
        dataset: Kind and name of the data set as in a recipe; empty is an image folder.
        split: Its split.
        checkpoint: File with weights to load, in place of the model's published ones.
        model_kwargs: Options of `timm.create_model` that the checkpoint needs.
        class_map: File with the names of all classes, where the network does not know those of the data set.
        by_order: Take the classes of the data set in their order.
        sites: Names of the sites to audit, or of modules that contain them; None are all.
        input_size: (C, H, W) of the images; None is the model's own.
        num_samples: Number of images, drawn at random; None are all.
        batch_size: Images a batch.
        workers: Loader processes.
        device: Device; None takes an accelerator where there is one.
        seed: Seed of the draw of images and of the intervals.
        resamples: Bootstrap resamples.
        resume: Go on with an audit of the same settings that was stopped.
        command: Command line to name in the report.

    Returns:
        The audit and its summary (see `summarize`), on the process of rank 0; None on others.

    Raises:
        FileExistsError: The folder exists.
        FileNotFoundError: The network, the data or the checkpoint is missing.
        ValueError: The network has no attention site, or does not fit its weights or the data.
    """
    output = Path(output)
    check_output(output, resume)
    subject = load_subject(model, checkpoint, input_size, model_kwargs)
    images = open_images(subject.model, data_dir, dataset, split, class_map, input_size, by_order)
    place = None if device is None else torch.device(device)
    done = audit_folder(
        subject, images, output, sites, input_size, num_samples, batch_size, workers, place, seed,
        provenance={'data': str(data_dir), 'dataset': dataset, 'split': split, 'classes': images.match.told()},
    )
    if done is None:
        return None
    audit, auditor = done
    if audit.unreadable:
        _logger.warning(
            f'{len(audit.unreadable)} images could not be read and are left out: {", ".join(audit.unreadable[:5])}')
    examples = collect_examples(audit, auditor, images, next(subject.model.parameters()).device)
    summary = summarize(audit, resamples=resamples, seed=seed)
    runs = [model] if (Path(model) / 'summary.csv').is_file() and audit.quality is not None else []
    label = Path(model).name if Path(model).is_dir() else model
    _write(output, label, audit, summary, examples, runs, command)
    remove_parts(output)
    return audit, summary


def _write(
        output: Path,
        label: str,
        audit: Audit,
        summary: dict[str, Any],
        examples: Examples,
        runs: Sequence[str] = (),
        command: Sequence[str] = (),
) -> None:
    """Write all files of a finished audit to a folder that exists."""
    drawn = draw_figures({label: audit}, {label: summary}, {label: examples}, runs)
    examples.save(output)
    write_csv(output / 'sites.csv', summary)
    save_figures(output / 'figures', drawn)
    write_report(output / 'report.html', {label: audit}, {label: summary}, {label: examples}, drawn, command)
    audit.save(output, summary)  # the last: it is what tells a finished audit


def audit_network(
        model: nn.Module,
        data: Iterable[Any],
        output: str | Path | None = None,
        *,
        name: str = '',
        sites: Sequence[str] | None = None,
        input_size: Sequence[int] | None = None,
        critic: Critic | None = None,
        batch_size: int = 128,
        workers: int = 0,
        seed: int = 0,
        resamples: int = 1000,
) -> tuple[Audit, dict[str, Any]]:
    """Measure what each attention module of a network in memory is worth, on a loader of one's own.

    It is `audit_model` for what is not in files: of `audit`, whose other arguments it has, it makes the same summary
    and, where a folder is named, the same files.

    Args:
        model: A model with attention sites.
        data: Batches of images (B, C, H, W) and class indices (B,), or a data set, see `audit`. It is read twice.
        output: Folder to write; None writes none.
        name: What the network is called in the report; empty is its architecture.
        seed: Seed of the intervals.
        resamples: Bootstrap resamples.

    Returns:
        The audit and its summary (see `summarize`).

    Raises:
        FileExistsError: The folder exists.
        ValueError: As of `audit`.
    """
    if output is not None:
        check_output(Path(output), resume=False)
    model = unwrap_model(model)
    images = LoaderImages(data, model, batch_size, workers)
    telling = None if output is None else telling_numbers
    found, auditor = measure(model, images, sites, input_size, critic, name, telling)
    summary = summarize(found, resamples=resamples, seed=seed)
    if output is not None:
        examples = collect_examples(found, auditor, images, images.like.device)
        Path(output).mkdir(parents=True, exist_ok=True)
        _write(Path(output), found.provenance['model'], found, summary, examples)
    return found, summary
