"""What may import what: the arrows of the design"""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dreal_timm

ROOT = Path(dreal_timm.__file__).parent
METHOD = {'attention', 'config', 'critic', 'losses', 'options', 'probes', 'replay', 'reward', 'rotation', 'trainable'}
BASE = {'errors', 'provenance', 'utils', 'version'}
NETWORKS = {'data', 'hub', 'layers', 'models'}
ALLOWED = {
    **{name: set[str]() for name in (
        'version', 'errors', 'layers', 'replay', 'critic', 'reward', 'rotation', 'losses', 'options')},
    'utils': {'errors'},
    'provenance': {'version'},
    'models': {'errors', 'layers'},
    'attention': {'layers', 'replay'},
    'trainable': {'attention', 'critic', 'replay', 'rotation'},
    'config': {'options'},
    'probes': {'attention', 'config', 'replay', 'reward', 'trainable', 'utils'},
    'task': METHOD | {'utils'},
    'data': {'errors', 'utils'},
    'hub': METHOD | NETWORKS | BASE,
    'audit': METHOD | NETWORKS | BASE,
    'reid': METHOD | NETWORKS | BASE,
    'train': METHOD | NETWORKS | BASE | {'reid', 'task'},
    'cli': METHOD | NETWORKS | BASE | {'audit', 'reid', 'train'},
    '__init__': METHOD | {'models', 'task', 'version'},
    '__main__': {'cli'},
}
PACKAGES = {  # beside the standard library, torch and timm
    'train': {'accelerate', 'torchvision', 'tqdm', 'yaml'},
    'data': {'numpy', 'PIL', 'matplotlib', 'sklearn', 'torchvision'},
    'audit': {'PIL', 'matplotlib', 'numpy', 'safetensors', 'scipy', 'tqdm'},
    'hub': {'huggingface_hub', 'onnxruntime', 'safetensors', 'yaml'},
    'replay': {'torchvision'},
    'reid': {'PIL', 'pytorch_metric_learning'},
    'errors': {'safetensors'},
    'cli': {'yaml'},
}


def unit(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix('.py')


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ['dreal_timm', *path.relative_to(ROOT).parts[:-1]]
            base = package[:len(package) - node.level + 1] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            found += [f'{module}.{alias.name}' for alias in node.names] if module == 'dreal_timm' else [module]
    return found


@pytest.mark.parametrize('path', sorted(ROOT.rglob('*.py')), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    """No file imports from downstream of it, and only its own packages from outside."""
    here = unit(path)
    for name in imports(path):
        top, *rest = name.split('.')
        if top == 'dreal_timm':
            assert not rest or rest[0] == here or rest[0] in ALLOWED[here], name
        elif top not in sys.stdlib_module_names:
            assert top in {'torch', 'timm'} | PACKAGES.get(here, set()), name


def test_import_needs_no_extra():
    """Importing the package loads nothing of the extras, and not the train package."""
    code = (
        'import sys, dreal_timm\n'
        'loaded = {n.split(".")[0] for n in sys.modules}\n'
        'assert not loaded & {"accelerate", "sklearn", "tensorboard"}, loaded\n'
        'assert "dreal_timm.train" not in sys.modules\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT.parent)


def test_every_public_name_exists():
    """What __all__ promises is there."""
    for path in ROOT.rglob('*.py'):
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
                names = [element.value for element in node.value.elts]
                module = '.'.join(path.relative_to(ROOT.parent).with_suffix('').parts)
                imported = __import__(module, fromlist=['_'])
                assert all(hasattr(imported, name) for name in names), module
