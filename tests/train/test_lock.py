"""One run, one folder"""
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_run import recipe

from dreal_timm.train import run
from dreal_timm.train.lock import LOCK, FolderLock

ROOT = Path(__file__).parent.parent.parent


def held(folder):
    """Whether another process would be refused."""
    with (folder / LOCK).open('a') as file:
        pid = os.fork()
        if pid == 0:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os._exit(1)
            os._exit(0)
        return os.waitpid(pid, 0)[1] != 0


def test_a_second_process_is_refused(tmp_path):
    """While one process holds a folder another is told who does; after it, and after its death, nobody is refused."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        lock = FolderLock()
        lock.take(tmp_path)
        os.write(writing, b'x')
        time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    try:
        with pytest.raises(BlockingIOError, match=str(pid)):
            FolderLock().take(tmp_path)
        assert json.loads((tmp_path / LOCK).read_text())['pid'] == pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    lock = FolderLock()
    lock.take(tmp_path)
    lock.release()
    assert not held(tmp_path)


@pytest.mark.parametrize('number', [38, 95, 37])  # ENOSYS, EOPNOTSUPP, ENOLCK
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog, number):
    """Where there are no locks, that is said, and the run goes on."""
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, 'lockf', refuse)
    lock = FolderLock()
    lock.take(tmp_path)
    assert 'no locks here' in caplog.text
    lock.release()


def test_a_run_holds_its_folder(images, tmp_path, monkeypatch):
    """A run holds its folder while it trains, and lets go of it at its end; a second one is stopped at once."""
    from dreal_timm.train import loop
    seen, original = [], loop.train_one_epoch
    monkeypatch.setattr(
        loop, 'train_one_epoch', lambda *args: (seen.append(held(tmp_path / 'run')), original(*args))[1])
    run(recipe(images, tmp_path, stop_epoch=1))
    assert seen == [True]
    assert not held(tmp_path / 'run')
    before = (tmp_path / 'run' / 'last.pth.tar').read_bytes()
    pid = os.fork()
    if pid == 0:
        lock = FolderLock()
        lock.take(tmp_path / 'run')
        (tmp_path / 'ready').touch()
        time.sleep(60)
        os._exit(0)
    try:
        while not (tmp_path / 'ready').exists():
            time.sleep(0.01)
        for values in ({'resume': 'auto'}, {'resume': str(tmp_path / 'run' / 'last.pth.tar'), 'experiment': ''}):
            with pytest.raises(BlockingIOError, match='another run writes here'):
                run(recipe(images, tmp_path, **values))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert (tmp_path / 'run' / 'last.pth.tar').read_bytes() == before


def test_a_restart_right_after_a_kill(images, tmp_path):
    """Killed while its loader processes live on, a run is gone on with at once."""
    path = tmp_path / 'recipe.json'
    path.write_text(json.dumps(recipe(images, tmp_path, workers=2, epochs=50)))
    code = (
        'import json, sys, dreal_timm.train as train\n'
        'train.run(json.load(open(sys.argv[1])))\n')
    process = subprocess.Popen(
        [sys.executable, '-c', code, str(path)], cwd=ROOT, stderr=subprocess.DEVNULL,
        env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    loaders: list[int] = []
    try:
        while not (tmp_path / 'run' / 'last.pth.tar').exists() or not loaders:
            loaders = [int(pid) for pid in children.read_text().split()]
            assert process.poll() is None
            time.sleep(0.002)
        for pid in loaders:
            os.kill(pid, signal.SIGSTOP)  # they do not see their parent die
    finally:
        process.kill()
        process.wait()
    try:
        alive = [pid for pid in loaders if Path(f'/proc/{pid}').exists()]
        lock = FolderLock()
        lock.take(tmp_path / 'run')
        lock.release()
        assert alive
        assert torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=True)['epoch'] >= 0
    finally:
        for pid in loaders:
            os.kill(pid, signal.SIGKILL)
