"""Export of a trained network as a folder in the layout of the Hugging Face Hub, which timm loads"""
import copy
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import get_model_input_config, save_for_hf
from torch import nn

from dreal_timm.models.dreal_resnet import timm_architecture

__all__ = ['export']


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
        'features': features.contiguous(),
        'pre_logits': model.forward_head(features, pre_logits=True),
    }


def _check(directory: Path) -> None:
    expected = load_file(directory / 'test' / 'rand_tensors.safetensors')
    model = timm.create_model(f'local-dir:{directory}', pretrained=True).eval()
    with torch.no_grad():
        output = model(expected['input'])
    if not torch.allclose(output, expected['output'], rtol=1e-4, atol=1e-5):
        difference = (output - expected['output']).abs().max().item()
        raise RuntimeError(f'The exported model does not repeat its logits: they differ by up to {difference:.3g}.')


def export(
        model: nn.Module,
        directory: str | Path,
        data_config: Mapping[str, Any] | None = None,
        label_names: Sequence[str] | None = None,
) -> Path:
    """Export a plain network to a new folder that `timm.create_model('local-dir:...', pretrained=True)` loads.

    The folder holds `model.safetensors`, `config.json` and `test/rand_tensors.safetensors` (a random input with its
    features and logits). A network that is one of timm's under another name (`dreal_se_resnet50` is `seresnet50`) is
    exported under timm's name, so that it loads without this package. The folder is loaded again and its logits are
    compared before it appears under its name.

    Args:
        model: A timm model, with no wrapper around it.
        directory: Folder to write. Its parents are made.
        data_config: Preprocessing that the weights were trained with: input_size, mean, std, interpolation, crop_pct.
        label_names: Names of the classes in the order of the logits.

    Raises:
        FileExistsError: The folder exists.
        TypeError: The model is not one that timm built.
        RuntimeError: The exported folder does not repeat the model's logits.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f'{directory} exists: choose another folder, or remove it.')
    if not hasattr(model, 'pretrained_cfg'):
        raise TypeError(f'Only models that timm built can be exported, got {type(model).__name__}.')
    plain: Any = copy.deepcopy(model).cpu().float().to(memory_format=torch.contiguous_format).eval()
    architecture = plain.pretrained_cfg['architecture']
    model_config: dict[str, Any] = {
        # the config of the weights that it started from says what these are not
        'pretrained_cfg': {
            'architecture': timm_architecture(architecture) or architecture, 'tag': None, 'description': None,
            'origin_url': None, 'paper_ids': None,
        },
    }
    if label_names is not None:
        model_config['label_names'] = list(label_names)

    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f'.{directory.name}-'))
    try:
        save_for_hf(
            plain, str(scratch), model_config=model_config, safe_serialization=True,
            data_config=None if data_config is None else dict(data_config),
        )
        (scratch / 'test').mkdir()
        input_size = (data_config or {}).get('input_size') or get_model_input_config(plain)['input_size']
        save_file(_test_tensors(plain, input_size), scratch / 'test' / 'rand_tensors.safetensors')
        _check(scratch)
        scratch.chmod(0o755)
        os.replace(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory
