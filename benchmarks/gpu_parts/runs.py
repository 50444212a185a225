"""runs: the quickstart from digits to an exported network, a kill and a resume, and an audit against the CPU's"""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from equal import assert_equal
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from dreal_timm.audit import audit
from dreal_timm.audit.subject import load_subject, open_images
from dreal_timm.data import prepare_digits
from dreal_timm.train import run
from gpu_parts.record import Late, Record

__all__ = ['main']

ERROR = 5.0  # top-1 error of the quickstart, percent
SMALL_ERROR = 60.0  # of a network of 0.4M parameters after two epochs
LOGITS = 1e-3
AUDIT = 1e-4  # log-probability (nats)


def recipe(folder: Path, device: torch.device, small: bool, name: str, **values: Any) -> dict[str, Any]:
    """Return the quickstart's recipe, with a run folder `folder`/name."""
    import yaml
    found = yaml.safe_load((Path(__file__).parents[2] / 'recipes' / 'quickstart.yaml').read_text(encoding='utf-8'))
    cuda = {'amp': True, 'amp_dtype': 'float16'} if device.type == 'cuda' else {'device': 'cpu'}
    tiny = {
        'model': 'test_resnet', 'model_kwargs': {'zero_init_last': False, 'block_args': {'attn_layer': 'se'}},
        'epochs': 2, 'smoothing': 0.0} if small else {}
    return {**found, **cuda, **tiny, 'data_dir': str(folder / 'digits'), 'output': str(folder), 'experiment': name,
            **values}


def check_quickstart(record: Record, folder: Path, device: torch.device, small: bool) -> None:
    values = recipe(folder, device, small, 'quickstart')
    started = time.perf_counter()
    results = run(values)
    top1 = results['metrics']['top1']
    record.near(
        'quickstart', 100 - top1, SMALL_ERROR if small else ERROR, top1=top1,
        seconds=round(time.perf_counter() - started, 1), amp=values.get('amp_dtype', 'none'))


def check_loads(record: Record, folder: Path, device: torch.device) -> None:
    """timm alone loads what was exported, and it says on the device what it said where it was exported."""
    exported = folder / 'quickstart' / 'model'
    model = timm.create_model(f'local-dir:{exported}', pretrained=True).to(device).eval()
    kept = load_file(exported / 'test' / 'rand_tensors.safetensors')
    with torch.no_grad():
        logits = model(kept['input'].to(device))
    record.near('loads', (logits.cpu() - kept['output']).abs().max().item(), LOGITS)


class Trainings:
    """Trainings in processes of their own, by the names of their runs."""

    def __init__(self, folder: Path, device: torch.device, small: bool):
        self.folder, self.device, self.small = folder, device, small
        threads = {} if device.type == 'cuda' else {'OMP_NUM_THREADS': '1'}
        self.environment = {**os.environ, 'CUBLAS_WORKSPACE_CONFIG': ':4096:8', **threads}

    def last(self, name: str) -> Path:
        return self.folder / name / 'last.pth.tar'

    def start(self, name: str, **values: Any) -> subprocess.Popen:
        file = self.folder / f'{name}.recipe.json'
        file.write_text(json.dumps(recipe(self.folder, self.device, self.small, name, epochs=3, **values)))
        return subprocess.Popen(
            [sys.executable, '-m', 'gpu_parts.training', str(file), str(self.folder / f'{name}.json')],
            env=self.environment)

    def kill_after_an_epoch(self, name: str, process: subprocess.Popen, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while not self.last(name).exists() and process.poll() is None:
            if time.monotonic() > ends:
                raise Late
            time.sleep(0.005)
        if process.poll() is not None:
            raise AssertionError('the training ended before it was killed')
        process.send_signal(signal.SIGKILL)
        process.wait()

    def result(self, name: str, process: subprocess.Popen, seconds: float) -> dict[str, Any]:
        try:
            code = process.wait(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            raise Late from None
        if code:
            raise AssertionError(f'the training ended with {code}')
        return json.loads((self.folder / f'{name}.json').read_text())

    def difference(self, first: str, second: str) -> str:
        """Return where the last checkpoints of two runs differ; '' where they are equal to the bit."""
        states = [torch.load(self.last(name), map_location='cpu', weights_only=True) for name in (first, second)]
        for state in states:
            for key in ('args', 'saver'):  # names of the runs
                state.pop(key)
        try:
            assert_equal(*states)
        except AssertionError as error:
            return str(error).split('\n')[0][:200]
        return ''


def check_resume(record: Record, folder: Path, device: torch.device, small: bool) -> None:
    """A run that was killed and resumed ends as one that was not, to the bit.

    Where it does not, a second run that was not killed tells whether any two are equal.
    """
    trainings = Trainings(folder, device, small)
    whole, killed = trainings.start('whole'), trainings.start('killed')
    processes = [whole, killed]
    try:
        trainings.kill_after_an_epoch('killed', killed, record.left)
        processes.append(trainings.start('killed', resume='auto'))
        kernels = trainings.result('whole', whole, record.left)['not_deterministic']
        trainings.result('killed', processes[-1], record.left)
        where = trainings.difference('whole', 'killed')
        if where and kernels:
            processes.append(trainings.start('again'))
            trainings.result('again', processes[-1], record.left)
            control = trainings.difference('whole', 'again')
            if control:
                record.absent(['resume'], f'two whole runs differ ({control}), by {", ".join(kernels)}')
                return
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    record.add('resume', value=int(bool(where)), limit=0, ok=not where, where=where, not_deterministic=kernels)


def check_audit(record: Record, folder: Path, device: torch.device) -> None:
    """The audit of the network is the CPU's."""
    subject = load_subject(str(folder / 'quickstart' / 'model'))
    images = open_images(subject.model, str(folder / 'digits'))
    batches = [(pixels, target) for pixels, target, _ in DataLoader(images, batch_size=128)]
    found = []
    for where in (device, torch.device('cpu')):
        found.append(audit(subject.model.to(where), batches))
    errors = {
        name: (getattr(found[0], name) - getattr(found[1], name)).abs().max().item()
        for name in ('log_p', 'mean_log_p', 'constant_log_p')}
    record.near('audit', max(errors.values()), AUDIT, images=len(found[0].number), sites=len(found[0].sites), **errors)


def main(record: Record, device: torch.device, small: bool) -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        prepare_digits(folder / 'digits')
        record.run('quickstart', partial(check_quickstart, record, folder, device, small))
        record.run('loads', partial(check_loads, record, folder, device), seconds=2)
        record.run('audit', partial(check_audit, record, folder, device), seconds=5)
        record.run('resume', partial(check_resume, record, folder, device, small), seconds=8 if small else 30)
