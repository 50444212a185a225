"""Folders of strangers end in an error or in the network that they hold: soon, in little memory, and never otherwise"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from networks import make_model

from dreal_timm.hub import export

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads the use of memory from /proc')


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A small exported classifier."""
    return export(make_model(), tmp_path_factory.mktemp('exported') / 'net', data_config={'input_size': (3, 64, 64)})


def look(exported, *arguments):
    """What the process with the limited memory found."""
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tests' / 'hub' / 'hostile.py'), str(exported), *arguments], capture_output=True,
        text=True, check=False, cwd=ROOT, timeout=500,
        env=os.environ | {'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}', 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_hostile_folders_end_soon_and_in_little_memory(exported):
    """Giant numbers, lists, tables and promises, links, pipes and devices, bombs of YAML and pickle: one clean error.

    Each takes less than 5 seconds of the processor and 300 MB beyond three times the bytes of the folder.
    """
    assert look(exported, 'cases') == {'wrong': {}}


def test_fuzz(exported):
    """200 mutations, half of them with checksums that fit: a clean error, or the very weights that the folder holds."""
    found = look(exported, 'fuzz')
    assert found['wrong'] == {}
    assert 30 <= found['loaded'] <= 100
