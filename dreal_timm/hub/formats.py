"""Networks for other runtimes: ONNX, and programs of torch.export, compared with the network that they come from"""
import io
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torch import nn

from dreal_timm.errors import reason
from dreal_timm.hub.export import check_plain
from dreal_timm.hub.folder import SUMS, checksums
from dreal_timm.provenance import preprocessing_of, versions
from dreal_timm.utils.scratch import new_folder

__all__ = ['FORMATS', 'TOLERANCE', 'export_format']

FORMATS = {'onnx': 'model.onnx', 'torch-export': 'model.pt2'}
_PACKAGES = {'onnx': ('onnx', 'onnxscript', 'onnxruntime'), 'torch-export': ()}
TOLERANCE = 1e-4  # of a logit, where logits are about 1 or less; else of the largest
_BATCHES = (1, 3)  # sizes beside that of all images, since a program can be bound to the one it was traced with
Program = Callable[[torch.Tensor], torch.Tensor]


def _check_onnx() -> None:
    for name in ('onnxscript', 'onnxruntime'):  # the first is what torch's exporter needs
        if find_spec(name) is None:
            raise ModuleNotFoundError(f'ONNX needs the package {name}: pip install "dreal_timm[onnx]".', name=name)
    if tuple(int(part) for part in torch.__version__.split('.')[:2]) < (2, 6):
        raise ValueError(f'ONNX needs torch 2.6 or newer, and this is {torch.__version__}.')


def _write_onnx(model: nn.Module, example: torch.Tensor, path: Path) -> Program:
    """Write the network and return what ONNX Runtime makes of the file."""
    import onnxruntime
    torch.onnx.export(
        model, (example,), str(path), dynamo=True, external_data=False, verbose=False, input_names=['images'],
        output_names=['logits'], dynamic_shapes=({0: torch.export.Dim('batch')},))
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


def _write_program(model: nn.Module, example: torch.Tensor, path: Path) -> Program:
    """Write the network and return what the file is loaded as."""
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    content = io.BytesIO()  # torch's own writer of files aborts the process where the disk is full
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())
    return torch.export.load(path).module()


@torch.no_grad()
def _compare(program: Program, model: nn.Module, images: torch.Tensor, what: str) -> float:
    """Largest difference of a logit; a RuntimeError if it is too large."""
    worst = 0.0
    for batch in (*(images[:size] for size in _BATCHES), images):
        expected, output = model(batch), program(batch)
        if output.shape != expected.shape:
            raise RuntimeError(f'{what}: logits are {tuple(output.shape)} and not {tuple(expected.shape)}.')
        difference = (output - expected).abs().max().item()
        allowed = TOLERANCE * max(1.0, expected.abs().max().item())
        if not difference <= allowed:
            raise RuntimeError(
                f'{what}: logits differ from those of the network by up to {difference:.3g}, more than {allowed:.3g}.')
        worst = max(worst, difference)
    return worst


def export_format(
        model: nn.Module,
        directory: str | Path,
        format: str,
        images: torch.Tensor | None = None,
        label_names: Sequence[str] | None = None,
) -> Path:
    """Write a network for another runtime into a new folder, and compare what is read back with the network.

    The folder holds `model.onnx` (input `images`, output `logits`, weights inside of the file) or `model.pt2`
    (`torch.export.load(path).module()`), `preprocessing.json` and `SHA256SUMS`. The batch size is free, height and
    width are those of `input_size`. Compared are batches of noise, of 1, 3 and 8, and of the images.

    Args:
        model: A timm model, with no wrapper around it.
        directory: Folder to write. Its parents are made.
        format: 'onnx', which needs torch 2.6 and the extra `onnx`, or 'torch-export'.
        images: Real images, preprocessed as the model's config says, (N, C, H, W), to compare with as well.
        label_names: Names of the classes in the order of the logits; None takes those of the model's config.

    Raises:
        FileExistsError: The folder exists.
        ModuleNotFoundError: A package that ONNX needs is not installed.
        OSError: There is no room for the folder; nothing is left of it.
        RuntimeError: The network has what cannot be exported; or logits differ by more than 1e-4, or by more than that
            part of the largest where it is above 1.
        TypeError: The model is not one that timm built.
        ValueError: No such format, or the model holds a critic.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got '{format}'.")
    if format == 'onnx':
        _check_onnx()
    directory = Path(directory)
    plain = check_plain(model, directory)
    data = timm.data.resolve_model_data_config(plain)
    noise = torch.randn(8, *data['input_size'], generator=torch.Generator().manual_seed(0))
    with new_folder(directory) as folder:
        write = _write_onnx if format == 'onnx' else _write_program
        try:
            program = write(plain, noise[:2], folder / FORMATS[format])
        except OSError:
            raise
        except Exception as error:  # the exporters raise all kinds
            raise RuntimeError(f'{format}: the network cannot be exported: {reason(error)}') from error
        compared = {'noise': noise} if images is None else {'noise': noise, 'images': images}
        record = {
            'architecture': plain.pretrained_cfg['architecture'],
            **preprocessing_of(data),
            'label_names': list(label_names or plain.pretrained_cfg.get('label_names') or []) or None,
            'largest_difference': {
                name: {'count': len(batch), 'logit': _compare(program, plain, batch, f'{format}, {name}')}
                for name, batch in compared.items()},
            'versions': {**versions(), **{name: version(name) for name in _PACKAGES[format]}},
        }
        (folder / 'preprocessing.json').write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')
        (folder / SUMS).write_text(checksums(folder), encoding='utf-8')
    return directory
