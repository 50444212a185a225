"""The parts of an audit on the disk: what is done is kept, so that an audit goes on where it was stopped

A part is a run of consecutive images. Its numbers are computed by one process and written in one step, and they are the
same whichever process did it.
"""
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

__all__ = ['Parts', 'cut', 'write_json']

_FEWEST, _PARTS = 256, 16


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one step."""
    scratch = path.with_name(f'.{path.name}.{os.getpid()}')
    scratch.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
    os.replace(scratch, path)


def cut(numbers: Sequence[int]) -> list[list[int]]:
    """Cut the numbers of the images into parts: 16, or as many as hold 256."""
    size = max(_FEWEST, -(-len(numbers) // _PARTS))
    return [list(numbers[i:i + size]) for i in range(0, len(numbers), size)]


class Parts:
    """A folder of parts.

    Args:
        directory: The folder.
        plan: What the numbers depend on. Parts of another plan are not mixed with these.
    """

    def __init__(self, directory: Path, plan: Mapping[str, Any]):
        self.directory = directory
        self.plan = json.loads(json.dumps(plan))

    def begin(self) -> None:
        """Make the folder, or go on with one of the same plan.

        Raises:
            ValueError: What is there was computed with other settings.
        """
        path = self.directory / 'plan.json'
        if path.is_file():
            before = json.loads(path.read_text(encoding='utf-8'))
            differing = [key for key in {**before, **self.plan} if before.get(key) != self.plan.get(key)]
            if differing:
                told = ', '.join(f'{key} {before.get(key)} -> {self.plan.get(key)}' for key in differing)
                raise ValueError(
                    f'{self.directory.parent} holds the beginning of another audit ({told[:300]}): '
                    'choose another folder, or give the settings that it had.'
                )
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(path, self.plan)

    def _path(self, phase: str, part: int) -> Path:
        return self.directory / f'{phase}-{part:06}.safetensors'

    def done(self, phase: str, part: int) -> bool:
        """Return whether a part is there."""
        return self._path(phase, part).is_file()

    def save(self, phase: str, part: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a part."""
        path = self._path(phase, part)
        scratch = path.with_name(f'.{path.name}.{os.getpid()}')
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch)
        os.replace(scratch, path)

    def load(self, phase: str, part: int) -> dict[str, torch.Tensor]:
        """Read a part."""
        return load_file(self._path(phase, part))
