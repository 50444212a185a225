"""The smallest real run: three classes of grey images that differ in brightness, and a network of 0.4M parameters"""
import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image

SE = {'zero_init_last': False, 'block_args': {'attn_layer': 'se'}}
GROUP_NORM = SE | {'norm_layer': 'groupnorm1'}


def write_images(root: Path, train: int = 12, validation: int = 4) -> Path:
    """Write an image folder of 3 classes, with so many images of each."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', train), ('validation', validation)):
        for label in range(3):
            folder = root / split / f'class{label}'
            folder.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(0, 40, (32, 32), generator=generator)
                Image.fromarray((noise + 90 * label).to(torch.uint8).numpy()).save(folder / f'{i}.png')
    return root


def recipe(images: Path, output: Path, **values: Any) -> dict[str, Any]:
    """A recipe for these images, with a run folder `output`/run."""
    return {
        'data_dir': str(images), 'model': 'test_resnet', 'num_classes': 3, 'input_size': [1, 32, 32], 'mean': [0.4],
        'std': [0.3], 'crop_pct': 1.0, 'batch_size': 8, 'workers': 0, 'lr': 0.05, 'epochs': 2, 'warmup_epochs': 0,
        'smoothing': 0.0, 'hflip': 0.0, 'color_jitter': 0.0, 'output': str(output), 'experiment': 'run',
        'model_kwargs': copy.deepcopy(SE), 'device': 'cpu', **values,
    }


def start(images: Path, output: Path, **values: Any) -> Any:
    """All of a run before its first epoch."""
    from dreal_timm.train import load_config
    from dreal_timm.train.runner import set_up
    state = set_up(load_config(recipe(images, output, **values)))
    state.directory.mkdir(parents=True, exist_ok=True)
    return state


def copied(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def before_updates(state, record):
    """Return the list of what `record()` gives before each update."""
    seen = []
    optimizer = state.optimizer.optimizer
    getattr(optimizer, '_base_optimizer', optimizer).register_step_pre_hook(lambda *_: seen.append(record()))
    return seen


def assert_close(first, second, tolerance):
    """Tensors of the same names are equal, relative to the norm of each."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        error = (value.double() - second[name].double()).norm()
        assert error <= tolerance * second[name].double().norm(), (name, error)
