"""What this Python has: `python -m gpu_parts.machine` prints versions, what is missing, the device and the commit"""
import importlib
import json
import platform
import re
import sys
from importlib import metadata
from typing import Any

from gpu_parts.table import PARTS, REQUIRED

__all__ = ['numbers']

_MODULES = {'pillow': 'PIL', 'pyyaml': 'yaml', 'scikit-learn': 'sklearn'}


def numbers(version: str) -> tuple[int, ...]:
    """'2.11.0+cu130' -> (2, 11, 0)."""
    found = []
    for part in version.split('+')[0].split('.'):
        digits = re.match(r'\d+', part)
        if digits is None:
            break
        found.append(int(digits.group()))
    return tuple(found)


def _problem(package: str, oldest: str | None) -> str | None:
    """Say what is wrong with a package, or None."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'not installed'
    if oldest is not None and numbers(version) < numbers(oldest):
        return f'{version} is older than {oldest}'
    try:
        importlib.import_module(_MODULES.get(package, package))
    except Exception as error:
        return f"{version} cannot be imported ({' '.join(str(error).split())[:120]})"
    return None


def main() -> None:
    missing = {name: _problem(name, oldest) for name, oldest in REQUIRED.items()}
    found: dict[str, Any] = {
        'versions': {'python': platform.python_version(), **{
            name: metadata.version(name) for name, problem in missing.items() if problem is None}},
        'missing': {name: problem for name, problem in missing.items() if problem is not None},
        'machine': platform.machine(), 'cuda': '', 'commit': None,
    }
    if 'torch' not in found['missing']:
        import torch
        found['versions']['torch'] = torch.__version__  # with the version of CUDA
        if torch.cuda.is_available():
            found['cuda'] = torch.cuda.get_device_name()
    if not found['missing'].keys() - {name for part in PARTS for name in part.needs}:
        import report
        import torch
        found['machine'] = report.machine(torch.device('cuda' if found['cuda'] else 'cpu'))
        found['commit'] = report.commit()
    json.dump(found, sys.stdout)


if __name__ == '__main__':
    main()
