"""What every benchmark says of itself: command, machine, versions and settings, and the numbers as JSON"""
import argparse
import json
import math
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch

import dreal_timm

RESULTS = Path(__file__).parent / 'results'


def machine(device: torch.device) -> str:
    """Name the processor and, where it is used, the GPU."""
    cpu = platform.machine()
    info = Path('/proc/cpuinfo')
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith('model name')]
        cpu = lines[0].split(':', 1)[1].strip() if lines else cpu
    text = f'{cpu}, {torch.get_num_threads()} threads'
    return f'{torch.cuda.get_device_name()}; {text}' if device.type == 'cuda' else text


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """Return the commit that a clone is at, with '+' if tracked files were changed since; None without git."""
    try:
        return subprocess.run(
            ['git', 'describe', '--always', '--abbrev=12', '--exclude=*', '--dirty=+'], cwd=folder, check=True,
            capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def begin(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Print command, machine and versions; return them with the settings, for the JSON."""
    versions = {
        'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
        'accelerate': accelerate.__version__, 'dreal_timm': dreal_timm.__version__,
    }
    at = commit()
    if at is not None:
        versions['commit'] = at
    header = {
        'command': shlex.join(['python', *sys.argv]),
        'machine': machine(device),
        'versions': versions,
        'settings': {name: value if not isinstance(value, Path) else str(value) for name, value in vars(args).items()},
    }
    print(f"command: {header['command']}")
    print(f"machine: {header['machine']}")
    print('versions: ' + ', '.join(f'{name} {version}' for name, version in versions.items()))
    return header


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and most of some measurements, and how many they are."""
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values), 'n': len(values)}


def tell(values: Mapping[str, float], digits: int = 3) -> str:
    """Print a spread as 'median (min to max)'."""
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f} to {values['max']:.{digits}f})"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of some values and half of its 95% interval (Student's t); NaN for one value."""
    from scipy import stats
    mean, n = statistics.mean(values), len(values)
    return mean, float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


def write(path: Path, header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write header and rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**header, 'rows': list(rows)}, indent=1) + '\n')
    print(f'written: {path}')
