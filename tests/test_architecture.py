"""What may import what: the arrows of the design"""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dreal_timm

ROOT = Path(dreal_timm.__file__).parent
CORE = {
    'readers', 'gates', 'overrides', 'attention', 'capture', 'critic', 'draws', 'flow', 'losses', 'measure', 'norms',
    'options', 'passes', 'probe', 'restart', 'reward', 'rotation', 'share', 'task', 'taylor', 'trainable', 'transfer',
}
ALLOWED = {
    'version': set(),
    'errors': set(),
    'terminal': {'errors'},
    'files': set(),
    'layers': set(),
    'models': {'layers'},
    'readers': {'layers'},
    'overrides': set(),
    'critic': set(),
    'reward': set(),
    'rotation': set(),
    'losses': set(),
    'share': set(),
    'transfer': set(),
    'norms': set(),
    'gates': {'readers'},
    'attention': {'readers', 'gates', 'overrides'},
    'capture': {'readers', 'gates', 'overrides', 'attention'},
    'draws': {'overrides'},
    'restart': {'overrides', 'attention', 'capture'},
    'flow': {'overrides', 'attention', 'draws', 'restart'},
    'passes': {'overrides', 'attention', 'capture', 'draws', 'norms', 'restart'},
    'probe': {'attention', 'flow', 'passes', 'restart', 'transfer'},
    'trainable': {'readers', 'attention', 'capture', 'critic', 'norms', 'restart', 'rotation'},
    'measure': {'attention', 'draws', 'passes', 'probe', 'reward', 'trainable'},
    'taylor': {'attention', 'measure', 'passes', 'reward', 'trainable', 'transfer'},
    'options': {'norms', 'probe'},
    'task': {
        'readers', 'attention', 'critic', 'flow', 'losses', 'measure', 'options', 'probe', 'reward', 'rotation',
        'share', 'taylor', 'trainable', 'transfer',
    },
    'data': {'errors'},
    'audit': CORE | {'files', 'layers', 'models', 'data', 'hub', 'errors', 'version'},
    'hub': CORE | {'files', 'layers', 'models', 'data', 'errors', 'version'},
    'reid': CORE | {'files', 'layers', 'models', 'data', 'hub', 'errors', 'version'},
    'train': CORE | {'files', 'terminal', 'layers', 'models', 'data', 'hub', 'reid', 'version', 'errors'},
    'cli': CORE | {
        'files', 'terminal', 'layers', 'models', 'data', 'hub', 'audit', 'reid', 'train', 'version', 'errors'},
    '__init__': CORE | {'models', 'version'},
    '__main__': {'cli'},
}
PACKAGES = {  # beside the standard library, torch and timm
    'train': {'accelerate', 'torchvision', 'tqdm', 'yaml'},
    'data': {'numpy', 'PIL', 'matplotlib', 'sklearn', 'torchvision'},
    'audit': {'PIL', 'matplotlib', 'numpy', 'safetensors', 'scipy', 'tqdm'},
    'hub': {'huggingface_hub', 'onnxruntime', 'safetensors', 'yaml'},
    'norms': {'torchvision'},
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
