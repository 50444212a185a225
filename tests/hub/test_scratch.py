"""Exports that cannot end: a full disk is an error in a line that leaves nothing, and the rest of a kill is removed"""
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import make_model

import dreal_timm
from dreal_timm.hub import describe_network, export
from dreal_timm.utils.scratch import new_folder

ROOT = Path(dreal_timm.__file__).parents[1]
# each command alone, in a process that may write files of so many bytes
FULL = '''
import contextlib, importlib.util, io, json, resource, sys
from pathlib import Path
from dreal_timm.cli import main
commands = {'timm': [], 'half': ['--half'], 'torch-export': ['--format', 'torch-export']}
if importlib.util.find_spec('onnxruntime') and importlib.util.find_spec('onnxscript'):
    commands['onnx'] = ['--format', 'onnx']
found = {}
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for name, options in commands.items():
    for target in ('out', 'kept'):
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            code = main(['export', 'run', f'exports/{target}', *options])
        found[f'{name}.{target}'] = [code, told.getvalue(), sorted(str(path) for path in Path('exports').rglob('*'))]
print(json.dumps(found))
'''
SLOW = '''
import sys, time
from networks import make_model
from dreal_timm.hub import export
module = sys.modules['dreal_timm.hub.export']
def wait(folder):
    print('writing', flush=True)
    time.sleep(600)
module.write_card = wait
export(make_model(), sys.argv[1])
'''


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """What an export needs of a run: its network and its best checkpoint, of 1.5 MB."""
    folder = tmp_path_factory.mktemp('full') / 'run'
    folder.mkdir()
    model = make_model(num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, 'input_size': (3, 64, 64)}
    (folder / 'network.json').write_text(json.dumps(describe_network(model)))
    torch.save({'state_dict': model.state_dict(), 'epoch': 0, 'metric': 1.0}, folder / 'model_best.pth.tar')
    return folder


@pytest.mark.skipif(sys.platform == 'win32', reason='needs a limit on the size of files')
def test_a_full_disk(run):
    """Each writer ends with the code 2 and one line; nothing is left, and a folder that was there stays as it was.

    One process for all of them, which traces the network twice for the other formats.
    """
    kept = run.parent / 'exports' / 'kept'
    kept.mkdir(parents=True)
    (kept / 'model.safetensors').write_bytes(b'weights')
    done = subprocess.run(
        [sys.executable, '-c', FULL], cwd=run.parent, env={'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    for name, (code, told, left) in json.loads(done.stdout.splitlines()[-1]).items():
        assert code == 2, name
        lines = [line for line in told.splitlines() if 'error' in line]
        assert len(lines) == 1 and f"exports/{name.split('.')[1]}" in lines[0], (name, told)
        assert left == ['exports/kept', 'exports/kept/model.safetensors'], name
    assert (kept / 'model.safetensors').read_bytes() == b'weights'


@pytest.mark.skipif(sys.platform == 'win32', reason='needs locks that end with their process')
def test_what_a_kill_leaves(tmp_path):
    """A later export to the same place removes it, and nothing that a living process or a user holds."""
    target, user = tmp_path / 'model', tmp_path / '.model.writing-notes'
    user.mkdir()
    (user / 'notes.txt').write_text('mine')
    env = {'PYTHONPATH': f"{ROOT}:{ROOT / 'tests'}", 'OMP_NUM_THREADS': '1'}
    with subprocess.Popen(
        [sys.executable, '-c', SLOW, str(target)], env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == 'writing\n'
            left, = {path.parent for path in tmp_path.rglob('config.json')}
            while left.parent != tmp_path:
                left = left.parent
            export(make_model(), target)
            assert left.is_dir()  # its process lives
        finally:
            process.send_signal(signal.SIGKILL)
    target.rename(tmp_path / 'former')
    export(make_model(), target)
    assert {path.name for path in tmp_path.iterdir()} == {'model', 'former', user.name}
    assert (user / 'notes.txt').read_text() == 'mine'


def test_two_of_one_process(tmp_path):
    """One that is written beside another takes nothing from it."""
    with new_folder(tmp_path / 'model') as first:
        (first / 'a.txt').write_text('first')
        with pytest.raises(ValueError, match='stop'), new_folder(tmp_path / 'model') as second:
            assert second != first
            raise ValueError('stop')
        assert (first / 'a.txt').read_text() == 'first'
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob('*')] == ['model', 'model/a.txt']
