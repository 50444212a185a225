"""What is installed"""
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dreal_timm

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp('wheel')
    for name in ('dreal_timm', 'hub_cards', 'recipes'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'setup.cfg', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, folder)
    subprocess.run(
        [sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', 'dist', '.'],
        check=True, cwd=folder, capture_output=True,
    )
    return next((folder / 'dist').glob('*.whl'))


def test_contents(wheel):
    """The wheel holds every module, every recipe, the marker of types and the licence, and no weights."""
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / 'dreal_timm').rglob('*.py')}
    recipes = {f'dreal_timm/recipes/{path.name}' for path in (ROOT / 'recipes').glob('*.yaml')}
    assert recipes
    assert modules | recipes | {'dreal_timm/py.typed', 'dreal_timm/hub_cards/template.md'} <= names
    assert any(name.endswith('licenses/LICENSE') for name in names)
    assert not any('tests' in name for name in names)
    assert {name for name in names if '/hub_cards/' in name} == {'dreal_timm/hub_cards/template.md'}  # no weights
    assert wheel.stat().st_size < 1e6


def test_version_stands_in_one_place(wheel):
    """The wheel has the version of version.py, which stands nowhere else."""
    assert wheel.name.startswith(f'dreal_timm-{dreal_timm.__version__}-')
    assert dreal_timm.__version__ not in (ROOT / 'pyproject.toml').read_text() + (ROOT / 'setup.cfg').read_text()


def test_recipes_are_found_where_the_wheel_is_unpacked(wheel, tmp_path):
    """Outside of a checkout the recipes inside of the package are found."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        'import dreal_timm\n'
        'from dreal_timm.train import find_recipe, load_config\n'
        f'assert dreal_timm.__file__.startswith({str(tmp_path)!r}), dreal_timm.__file__\n'
        f'assert str(find_recipe("quickstart")).startswith({str(tmp_path)!r})\n'
        'assert load_config("quickstart").model == "dreal_se_resnet18"\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path, env={'PYTHONPATH': str(tmp_path)})
