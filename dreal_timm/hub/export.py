"""Export of a trained network as a folder in the layout of the Hugging Face Hub, which timm loads"""
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save
from timm.models import get_model_input_config
from timm.models._hub import save_config_for_hf
from torch import nn

from dreal_timm.hub.card import write_card
from dreal_timm.hub.folder import SUMS, checksums
from dreal_timm.models.dreal_resnet import timm_architecture
from dreal_timm.models.reid import ReidNetwork, portable_arguments
from dreal_timm.utils.scratch import new_folder

__all__ = ['check_export', 'check_plain', 'describe_network', 'export', 'halved']


@torch.no_grad()
def _test_tensors(
        model: Any,
        input_size: Sequence[int],
        batch_size: int = 2,
        seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A random input and what the model makes of it, by the names that timm's own test tensors have."""
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(batch_size, *input_size, generator=generator)
    features = model.forward_features(input)
    return {
        'input': input,
        'output': model(input),
        'features': features,
        'pre_logits': model.forward_head(features, pre_logits=True),
    }


def check_export(directory: Path) -> None:
    """Raise a RuntimeError if a folder's network does not repeat the logits that lie beside it."""
    expected = load_file(directory / 'test' / 'rand_tensors.safetensors')
    model = timm.create_model(f'local-dir:{directory}', pretrained=True).eval()
    with torch.no_grad():
        output = model(expected['input'])
    if not torch.allclose(output, expected['output'], rtol=1e-4, atol=1e-5):
        difference = (output - expected['output']).abs().max().item()
        raise RuntimeError(f'The exported model does not repeat its logits: they differ by up to {difference:.3g}.')


def _check_afresh(directory: Path, architecture: str) -> None:
    """The same in a process of its own, which imports this package only where the network needs it."""
    code = (
        'import sys, timm, torch\n'
        'from safetensors.torch import load_file\n'
        f'{"import dreal_timm" if architecture.startswith("dreal_") else ""}\n'
        'expected = load_file(sys.argv[1] + "/test/rand_tensors.safetensors")\n'
        'model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()\n'
        'with torch.no_grad():\n'
        '    torch.testing.assert_close(model(expected["input"]), expected["output"], rtol=1e-4, atol=1e-5)\n'
    )
    done = subprocess.run([sys.executable, '-c', code, str(directory)], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ['it was killed'])[-1]
        raise RuntimeError(f'The exported model does not repeat its logits in a fresh process: {reason}')


def halved(model: Any) -> Any:
    """Return the network with weights in float16.

    Raises:
        ValueError: A number is too large for it.
    """
    rounded = copy.deepcopy(model).half()
    for name, tensor in rounded.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f'{name} holds numbers that float16 cannot hold: export float32.')
    return rounded


def _write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a file of safetensors, which stores each tensor whole, in order and once, whatever memory it lies in.

    Tensors that are transposed, expanded or have two names are copied; of a full disk an OSError tells.
    """
    path.write_bytes(save({
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}))


def _describe(model: Any, label_names: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The network's config without names of classes, and what is exported in place of or beside its entries."""
    config = dict(model.pretrained_cfg)
    known = config.pop('label_names', None)  # of a network that was exported before; timm writes them beside its config
    if label_names is None and known is not None and len(known) == model.num_classes:
        label_names = known
    architecture = config['architecture']
    changes: dict[str, Any] = {
        # the config of the weights that it started from says what these are not
        'pretrained_cfg': {
            'architecture': timm_architecture(architecture) or architecture, 'tag': None, 'description': None,
            'origin_url': None, 'paper_ids': None,
        },
    }
    if isinstance(model, ReidNetwork):
        changes['model_args'] = portable_arguments(model)
    if label_names is not None:
        changes['label_names'] = list(label_names)
    return config, changes


def _write_config(
        model: nn.Module,
        directory: Path,
        changes: dict[str, Any],
        data_config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write timm's `config.json` of a network into a folder, and return it.

    The number of classes stands at its top alone: timm takes it from there, and transformers, which passes it beside
    `model_args`, could not build the network if it stood in both.
    """
    path = directory / 'config.json'
    save_config_for_hf(
        model, str(path), model_config=changes, data_config=None if data_config is None else dict(data_config))
    config: dict[str, Any] = json.loads(path.read_text(encoding='utf-8'))
    arguments = config.get('model_args', {})
    if arguments.get('num_classes') == config['num_classes']:
        del arguments['num_classes']
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')
    return config


def check_plain(model: nn.Module, directory: Path) -> Any:
    """Return a copy of a plain network for an export: on the CPU, in float32, in evaluation mode.

    Args:
        model: The network.
        directory: Folder that is to be written.

    Raises:
        FileExistsError: The folder exists.
        TypeError: The model is not one that timm built.
        ValueError: The model holds a critic.
    """
    if directory.exists():
        raise FileExistsError(f'{directory} exists: choose another folder, or remove it.')
    if not hasattr(model, 'pretrained_cfg'):
        raise TypeError(f'Only models that timm built can be exported, got {type(model).__name__}.')
    if any(name.split('.')[0] == 'critic' for name, _ in model.named_parameters()):
        raise ValueError('The model holds a critic: pass the plain network, task.get_eval_model().')
    return copy.deepcopy(model).cpu().float().to(memory_format=torch.contiguous_format).eval()


def describe_network(
        model: nn.Module,
        data_config: Mapping[str, Any] | None = None,
        label_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the `config.json` that `export` would write, from which timm builds the network; arguments are its."""
    described: Any = copy.copy(model)
    described.pretrained_cfg, changes = _describe(model, label_names)
    with tempfile.TemporaryDirectory() as scratch:
        return _write_config(described, Path(scratch), changes, data_config)


def export(
        model: nn.Module,
        directory: str | Path,
        data_config: Mapping[str, Any] | None = None,
        label_names: Sequence[str] | None = None,
        *,
        half: bool = False,
        files: Mapping[str, bytes] | None = None,
        fresh_process: bool = False,
) -> Path:
    """Export a plain network to a new folder that `timm.create_model('local-dir:...', pretrained=True)` loads.

    The folder holds `model.safetensors`, `config.json`, `test/rand_tensors.safetensors` (a random input with its
    features and logits), the card `README.md` (see `write_card`) and `SHA256SUMS`, which `sha256sum -c` reads. A
    network that is one of timm's under another name (`dreal_se_resnet50` is `seresnet50`) is exported under timm's
    name, so that it loads without this package. The folder is loaded again and its logits are compared before it
    appears under its name.

    Args:
        model: A timm model, with no wrapper around it.
        directory: Folder to write. Its parents are made.
        data_config: Preprocessing that the weights were trained with: input_size, mean, std, interpolation, crop_pct.
        label_names: Names of the classes in the order of the logits.
        half: Write float16 weights, which are loaded as float32 again.
        files: Further files, by their paths in the folder.
        fresh_process: Compare the logits in a process of its own, as another user would have it.

    Raises:
        FileExistsError: The folder exists.
        TypeError: The model is not one that timm built.
        ValueError: The model holds a critic, or numbers that float16 cannot hold; or results among `files` are of
            other weights.
        OSError: There is no room for the folder; nothing is left of it.
        RuntimeError: The exported folder does not repeat the model's logits.
    """
    directory = Path(directory)
    plain = check_plain(model, directory)
    plain.pretrained_cfg, model_config = _describe(plain, label_names)
    saved = halved(plain) if half else plain
    if half:
        plain = copy.deepcopy(saved).float()

    with new_folder(directory) as folder:
        _write_tensors(saved.state_dict(), folder / 'model.safetensors')
        _write_config(saved, folder, model_config, data_config)
        (folder / 'test').mkdir()
        input_size = (data_config or {}).get('input_size') or get_model_input_config(plain)['input_size']
        _write_tensors(_test_tensors(plain, input_size), folder / 'test' / 'rand_tensors.safetensors')
        for name, content in (files or {}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        write_card(folder)
        (folder / SUMS).write_text(checksums(folder), encoding='utf-8')
        if fresh_process:
            _check_afresh(folder, model_config['pretrained_cfg']['architecture'])
        else:
            check_export(folder)
    return directory
