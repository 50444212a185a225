"""`dreal-timm audit`: a network, a data set, and a folder of results; and the same of what is in memory"""
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from timm.utils import unwrap_model
from torch import nn

from dreal_timm.audit.examples import Examples, collect_examples, telling_numbers
from dreal_timm.audit.folder import audit_folder, remove_parts
from dreal_timm.audit.loader import LoaderImages
from dreal_timm.audit.report import draw_figures, write_report
from dreal_timm.audit.result import Audit
from dreal_timm.audit.run import measure
from dreal_timm.audit.settings import AuditSettings
from dreal_timm.audit.subject import load_subject, open_images
from dreal_timm.audit.summary import summarize, write_csv

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
        checkpoint: str = '',
        model_kwargs: Mapping[str, Any] | None = None,
        resume: bool = False,
        command: Sequence[str] = (),
        **options: Any,
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
        checkpoint: File with weights to load, in place of the model's published ones.
        model_kwargs: Options of `timm.create_model` that the checkpoint needs.
        resume: Go on with an audit of the same settings that was stopped.
        command: Command line to name in the report.
        **options: Which images and how, the attributes of `AuditSettings`.

    Returns:
        The audit and its summary (see `summarize`), on the process of rank 0; None on others.

    Raises:
        FileExistsError: The folder exists.
        FileNotFoundError: The network, the data or the checkpoint is missing.
        ValueError: The network has no attention site, or does not fit its weights or the data.
    """
    settings = AuditSettings(**options)
    output = Path(output)
    check_output(output, resume)
    subject = load_subject(model, checkpoint, settings.input_size, model_kwargs)
    images = open_images(
        subject.model, data_dir, settings.dataset, settings.split, settings.class_map, settings.input_size,
        settings.by_order)
    measured = audit_folder(subject, images, output, settings, {
        'data': str(data_dir), 'dataset': settings.dataset, 'split': settings.split, 'classes': images.match.summary()})
    if measured is None:
        return None
    audit, auditor = measured
    if audit.unreadable:
        _logger.warning(
            f'{len(audit.unreadable)} images could not be read and are left out: {", ".join(audit.unreadable[:5])}')
    examples = collect_examples(audit, auditor, images, next(subject.model.parameters()).device)
    summary = summarize(audit, resamples=settings.resamples, seed=settings.seed)
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
        batch_size: int = 128,
        workers: int = 0,
        seed: int = 0,
        resamples: int = 1000,
        **options: Any,
) -> tuple[Audit, dict[str, Any]]:
    """Measure what each attention module of a network in memory is worth, on a loader of one's own.

    It is `audit_model` for what is not in files: of `audit` it makes the same summary and, where a folder is named, the
    same files.

    Args:
        model: A model with attention sites.
        data: Batches of images (B, C, H, W) and class indices (B,), or a data set, see `audit`. It is read twice.
        output: Folder to write; None writes none.
        name: What the network is called in the report; empty is its architecture.
        batch_size: Images a batch, of a data set.
        workers: Loader processes, of a data set.
        seed: Seed of the intervals.
        resamples: Bootstrap resamples.
        **options: `sites`, `input_size` and `critic`, see `audit`.

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
    result, auditor = measure(model, images, name=name, telling=telling, **options)
    summary = summarize(result, resamples=resamples, seed=seed)
    if output is not None:
        examples = collect_examples(result, auditor, images, images.like.device)
        Path(output).mkdir(parents=True, exist_ok=True)
        _write(Path(output), result.provenance['model'], result, summary, examples)
    return result, summary
