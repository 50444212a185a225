"""The parts of an audit on the disk: what is done is kept, so that an audit goes on where it was stopped

A part is a run of consecutive images. Its numbers are computed by one process and written in one step, and they are the
same whichever process did it. A file holds a hash of its numbers and of the plan: one that a crash cut off, or that a
failing disk changed, is as good as none.
"""
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreal_timm.errors import UNREADABLE
from dreal_timm.provenance import hash_tensor
from dreal_timm.utils.files import replacing, write_text

__all__ = ['Parts', 'cut', 'write_json']

_FEWEST, _PARTS = 256, 16


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one step."""
    write_text(path, json.dumps(content, indent=2) + '\n')


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
        try:
            before = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else self.plan
        except ValueError:  # cut off: parts tell themselves whether they are of this plan
            before = self.plan
        differing = [key for key in {**before, **self.plan} if before.get(key) != self.plan.get(key)]
        if differing:
            changes = ', '.join(f'{key} {before.get(key)} -> {self.plan.get(key)}' for key in differing)
            raise ValueError(
                f'{self.directory.parent} holds the beginning of another audit ({changes[:300]}): '
                'choose another folder, or give the settings that it had.'
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(path, self.plan)

    def _path(self, phase: str, part: int) -> Path:
        return self.directory / f'{phase}-{part:06}.safetensors'

    def _hash(self, tensors: Mapping[str, torch.Tensor]) -> str:
        digest = hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode())
        for name in sorted(tensors):
            hash_tensor(digest, name, tensors[name])
        return digest.hexdigest()

    def done(self, phase: str, part: int) -> bool:
        """Return whether a part is there, whole and of this plan."""
        path = self._path(phase, part)
        if not path.is_file():
            return False
        try:
            with safe_open(path, 'pt') as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
                return self._hash(tensors) == (file.metadata() or {}).get('sha256')
        except UNREADABLE:
            return False

    def save(self, phase: str, part: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a part."""
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with replacing(self._path(phase, part)) as scratch:
            save_file(tensors, scratch, {'sha256': self._hash(tensors)})

    def load(self, phase: str, part: int) -> dict[str, torch.Tensor]:
        """Read a part that is done."""
        return load_file(self._path(phase, part))
