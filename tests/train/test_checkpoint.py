import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from equal import assert_equal
from small_run import recipe

from dreal_timm.cli import main
from dreal_timm.errors import WeightsError
from dreal_timm.hub import export_run
from dreal_timm.hub.damage import damaged_record
from dreal_timm.hub.folder import checksums
from dreal_timm.hub.loading import load, read_checkpoint
from dreal_timm.train import load_config, run
from dreal_timm.train.checkpoint import BEST, LAST, Checkpoints, write_summary
from dreal_timm.train.publish import export_anew
from dreal_timm.train.setup import set_up

ROOT = Path(__file__).parent.parent.parent


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize('links', [True, False])
def test_the_best_are_kept(tmp_path, monkeypatch, links):
    """The last, the best, the n best and the milestones are kept; a tie keeps the earlier; with or without links."""
    if not links:
        monkeypatch.setattr('os.link', lambda *args: (_ for _ in ()).throw(OSError('no links here')))
    checkpoints = Checkpoints(tmp_path, keep=2)
    best = [
        checkpoints.save({'x': torch.tensor(epoch)}, epoch, metric, milestone=epoch == 1)
        for epoch, metric in enumerate([3.0, 1.0, 5.0, 5.0, 4.0])
    ]
    assert best == [True, False, True, False, False]
    assert names(tmp_path) == ['checkpoint-2.pth.tar', 'checkpoint-3.pth.tar', LAST, 'milestone-2.pth.tar', BEST]
    loaded = {name: torch.load(tmp_path / name, weights_only=True) for name in names(tmp_path)}
    assert [int(state['x']) for state in loaded.values()] == [2, 3, 4, 1, 2]
    assert [state['metric'] for state in loaded.values()] == [5.0, 5.0, 4.0, 1.0, 5.0]
    assert loaded[LAST]['saver'] == {
        'checkpoint_files': [('checkpoint-2.pth.tar', 5.0), ('checkpoint-3.pth.tar', 5.0)],
        'best_epoch': 2, 'best_metric': 5.0, 'pending': (None, None), 'dropped': ['checkpoint-4.pth.tar'],
    }


def test_a_lower_loss_is_better(tmp_path):
    """With a metric that decreases, the lowest are kept."""
    checkpoints = Checkpoints(tmp_path, keep=1, decreasing=True)
    assert [checkpoints.save({}, epoch, loss) for epoch, loss in enumerate([3.0, 1.0, 2.0])] == [True, True, False]
    assert names(tmp_path) == ['checkpoint-1.pth.tar', LAST, BEST]


def gone_on(directory, epochs=None, **options):
    """The checkpoints of a run that goes on from the last one of a folder."""
    last = torch.load(directory / LAST, weights_only=True)
    checkpoints = Checkpoints(directory, **options)
    checkpoints.load_state_dict(
        last['saver'], last['epoch'] + 1 if epochs is None else epochs, directory / LAST, last['epoch'])
    return checkpoints


def test_only_what_the_last_lists_is_removed(tmp_path):
    """Going on, our scratch files are removed, and no checkpoint that the last one does not list."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save({}, 0, 1.0)
    mine = ('checkpoint-1.pth.tar', 'checkpoint-mine.pth.tar', 'milestone-9.pth.tar', 'notes.tmp')
    for name in (*mine, f'{LAST}.tmp', 'checkpoint-7.pth.tar.tmp'):
        (tmp_path / name).write_bytes(b'x')
    again = gone_on(tmp_path, keep=3)
    assert len(names(tmp_path)) == 9  # nothing is written before the run begins
    again.clean()
    assert names(tmp_path) == sorted(['checkpoint-0.pth.tar', LAST, BEST, *mine])
    assert (again.best_epoch, again.best_metric, again.files) == (0, 1.0, [('checkpoint-0.pth.tar', 1.0)])


def test_bodies(tmp_path):
    """Damage to the last file is not damage to the others: they have a body of their own, and share that."""
    Checkpoints(tmp_path).save({'x': torch.ones(4)}, 0, 1.0, milestone=True)
    inodes = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    assert len(inodes) == 4
    assert inodes.pop(LAST) not in inodes.values()
    assert len(set(inodes.values())) == 1


def content(directory):
    return {path.name: torch.load(path, weights_only=True) for path in directory.iterdir()}


def _epochs(checkpoints, first, last):
    """Save epochs whose metric goes up and down; two are kept, and a milestone after the third."""
    metrics = [1.0, 3.0, 2.0, 4.0, 0.5]
    for epoch in range(first, last):
        checkpoints.save({'x': torch.full((3,), epoch)}, epoch, metrics[epoch], milestone=epoch == 2)


_CALLS = [(owner, name) for owner, name in (
    (torch, 'save'), (os, 'fsync'), (os, 'replace'), (os, 'link'), (shutil, 'copyfile'), (Path, 'unlink'))]


def _kill_at(number, after):
    """Die at the n-th call of all that touches the disk, before it or after; half a file is what a copy leaves."""
    left = [number]

    def dying(original, name):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0 and not after:
                if name == 'copyfile':
                    Path(arguments[1]).write_bytes(Path(arguments[0]).read_bytes()[:100])
                os._exit(9)
            result = original(*arguments, **options)
            if left[0] == 0:
                os._exit(9)
            return result
        return call

    for owner, name in _CALLS:
        setattr(owner, name, dying(getattr(owner, name), name))


@pytest.mark.parametrize('epoch', range(5))
def test_a_kill_at_each_step_of_a_save(tmp_path, epoch):
    """Killed before and after each thing that a save does to the disk, a run that goes on ends with the same files."""
    whole = tmp_path / 'whole'
    whole.mkdir()
    _epochs(Checkpoints(whole, keep=2), 0, 5)
    expected = content(whole)
    for number, after in ((number, after) for number in range(1, 60) for after in (False, True)):
        folder = tmp_path / f'{number}-{after}'
        folder.mkdir()
        checkpoints = Checkpoints(folder, keep=2)
        _epochs(checkpoints, 0, epoch)
        pid = os.fork()
        if pid == 0:
            _kill_at(number, after)
            _epochs(checkpoints, epoch, epoch + 1)
            os._exit(0)
        killed = os.waitpid(pid, 0)[1] != 0
        done = 0
        if (folder / LAST).exists():
            again = gone_on(folder, keep=2)
            done = torch.load(folder / LAST, weights_only=True)['epoch'] + 1
        else:
            assert epoch == 0
            again = Checkpoints(folder, keep=2)
        again.clean(milestones=[3])
        _epochs(again, done, 5)
        found = content(folder)
        assert found.keys() == expected.keys(), (number, after)
        for name, state in expected.items():
            assert found[name]['epoch'] == state['epoch'] and torch.equal(found[name]['x'], state['x']), (name, number)
            assert found[name]['saver'] == state['saver']
        shutil.rmtree(folder)
        if not killed:
            break
    assert not killed and number > 5


def test_rewound_checkpoints(tmp_path):
    """Going back to an earlier epoch forgets the later ones, also as the best."""
    checkpoints = Checkpoints(tmp_path)
    for epoch, metric in enumerate([3.0, 1.0, 5.0]):
        checkpoints.save({}, epoch, metric)
    again = gone_on(tmp_path, epochs=2)
    assert (again.best_epoch, again.best_metric) == (0, 3.0)
    again.clean()
    assert len(names(tmp_path)) == 5  # nothing goes before an epoch stands in its place
    assert torch.load(tmp_path / BEST, weights_only=True)['epoch'] == 2
    assert not again.save({}, 2, 2.0)
    assert names(tmp_path) == [*(f'checkpoint-{epoch}.pth.tar' for epoch in range(3)), LAST, BEST]
    assert torch.load(tmp_path / BEST, weights_only=True)['epoch'] == 0
    again = gone_on(tmp_path, epochs=0)
    assert (again.best_epoch, again.files) == (None, [])
    again.clean()
    assert again.save({}, 0, 1.0)
    assert names(tmp_path) == ['checkpoint-0.pth.tar', LAST, BEST]


def _copied(source, target):
    """A folder as rsync makes it: every file has a body of its own."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
    return target


def test_the_best_is_never_lost(tmp_path):
    """A damaged checkpoint is not linked over a whole best file; each is restored from the other."""
    source = tmp_path / 'source'
    source.mkdir()
    _epochs(Checkpoints(source, keep=4), 0, 5)
    best = 'checkpoint-3.pth.tar'
    for number, damaged in enumerate((best, BEST)):
        folder = _copied(source, tmp_path / str(number))
        _flip_bytes(folder / damaged)
        gone_on(folder, keep=4).clean()
        for name in (best, BEST):
            assert not damaged_record(folder / name)
            assert torch.load(folder / name, weights_only=True)['epoch'] == 3
    folder = _copied(source, tmp_path / 'gone')
    for name in (best, BEST):
        (folder / name).unlink()
    again = gone_on(folder, keep=4)
    assert (again.best_epoch, again.best_metric) == (1, 3.0)


def _flip_bytes(path):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        record = max(file.infolist(), key=lambda info: info.file_size)
        with file.open(record) as opened:
            start = opened._orig_compress_start
    content[start] ^= 0x80
    path.write_bytes(content)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    """A write that fails midway is told with the folder, and leaves the files and the ranking as they were."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({'x': torch.ones(3)}, 0, 1.0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(state, file):
        file.write(b'half')
        raise RuntimeError('PytorchStreamWriter failed writing file data/1: file write failed')

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(OSError, match=r'epoch 2: cannot write .*PytorchStreamWriter.*before is whole.*resume=auto'):
        checkpoints.save({}, 1, 2.0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert (checkpoints.best_epoch, checkpoints.best_metric) == (0, 1.0)


def test_an_interrupt_in_a_write(images, tmp_path, monkeypatch, capsys):
    """Ctrl-C while a checkpoint is written is no full disk: code 130, and the checkpoint before is what it was."""
    run(recipe(images, tmp_path, stop_epoch=1))
    before = content_of(tmp_path / 'run')
    original = torch.save

    class Interrupted:
        def __init__(self, file):
            self.file, self.left = file, 3

        def write(self, content):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return self.file.write(content)

        def flush(self):
            self.file.flush()

    monkeypatch.setattr(torch, 'save', lambda state, file: original(state, Interrupted(file)))
    path = tmp_path / 'recipe.yaml'
    path.write_text(yaml.safe_dump(recipe(images, tmp_path, resume='auto')))
    assert main(['train', str(path)]) == 130
    assert 'interrupted' in capsys.readouterr().err.splitlines()[-1]
    left = content_of(tmp_path / 'run')
    assert left.keys() == before.keys()
    assert all(left[name] == before[name] for name in before if name.endswith('.pth.tar'))


def test_a_full_disk(images, tmp_path):
    """A run that cannot write its checkpoint stops with one line and code 2; the last good one resumes."""
    values = dict(epochs=3, stop_epoch=1)
    run(recipe(images, tmp_path, **values))
    size = (tmp_path / 'run' / LAST).stat().st_size
    last = (tmp_path / 'run' / LAST).read_bytes()
    path = tmp_path / 'recipe.yaml'
    path.write_text(yaml.safe_dump(recipe(images, tmp_path, epochs=3, resume='auto')))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    process = subprocess.run(
        [sys.executable, '-m', 'dreal_timm', 'train', str(path)], capture_output=True, text=True, timeout=120,
        preexec_fn=limit, cwd=ROOT,
    )
    assert process.returncode == 2
    assert 'epoch 2: cannot write a checkpoint' in process.stderr
    assert 'Traceback' not in process.stderr
    assert (tmp_path / 'run' / LAST).read_bytes() == last
    assert not list((tmp_path / 'run').glob('*.tmp'))
    results = run(recipe(images, tmp_path, epochs=3, resume='auto'))
    assert [entry['epoch'] for entry in results['epochs']] == [0, 1, 2]


def test_summary_of_different_epochs(tmp_path):
    """Epochs with other columns than each other make one table."""
    write_summary(tmp_path / 'summary.csv', [
        {'epoch': 0, 'lr': 0.1, 'train': {'loss': 2.0}},
        {'epoch': 1, 'lr': 0.2, 'train': {'loss': 1.0}, 'validation': {'top1': 50.0}, 'validation_ema': {'top1': 60.0}},
    ])
    assert (tmp_path / 'summary.csv').read_text().splitlines() == [
        'epoch,train_loss,eval_top1,eval_ema_top1,lr', '0,2.0,,,0.1', '1,1.0,50.0,60.0,0.2']


@pytest.fixture(scope='module')
def stopped(images, tmp_path_factory):
    """A reinforced run with one of two epochs done. Not to be changed."""
    path = tmp_path_factory.mktemp('stopped')
    run(recipe(images, path, stop_epoch=1))
    return path / 'run'


def resumed(images, stopped, tmp_path, **values):
    shutil.copytree(stopped, tmp_path / 'run')
    return recipe(images, tmp_path, resume='auto', **values)


@pytest.mark.parametrize(('values', 'message'), [
    ({'model': 'test_resnet.r160_in1k'}, 'is of test_resnet, the recipe trains test_resnet.r160_in1k'),
    ({'dreal': {'enabled': False}}, 'is of reinforced training, but dreal.enabled is false'),
    ({'dreal': {'critic_hidden_size': 3}}, 'does not fit the recipe: .*Critic'),
    ({'opt': 'adamw'}, 'the state of sgd, but opt is adamw; add no_resume_opt'),
    ({'num_classes': 5}, 'does not fit the recipe: .*fc.weight'),
    ({'eval_metric': 'loss'}, 'ranked its epochs otherwise .*experiment=NAME'),
    ({'weight_decay': 0.0}, 'does not fit the recipe: .*parameter group'),
])
def test_a_checkpoint_that_does_not_fit(images, stopped, tmp_path, values, message):
    """A checkpoint of another model, task or optimizer is refused in a line, and nothing is written."""
    settings = resumed(images, stopped, tmp_path, **values)
    before = {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=message):
        run(settings)
    assert {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir() if path.is_file()} == before


@pytest.mark.parametrize(('content', 'message'), [
    ('truncated', 'is broken or no checkpoint'),
    ('text', 'is broken or no checkpoint'),
    ('empty', 'is broken or no checkpoint'),
    ('weights', 'no training checkpoint: it has no state_dict, optimizer, epoch.*initial_checkpoint'),
    ('tensor', 'no training checkpoint'),
    ('missing', 'no file'),
])
def test_a_file_that_is_no_checkpoint(images, stopped, tmp_path, content, message):
    """A truncated or foreign file is refused in a line, and nothing is written."""
    path = tmp_path / 'given.pth.tar'
    if content == 'truncated':
        path.write_bytes((stopped / LAST).read_bytes()[:50_000])
    elif content in ('text', 'empty'):
        path.write_text('nothing of the kind' if content == 'text' else '')
    elif content != 'missing':
        torch.save({'a': torch.ones(1)} if content == 'weights' else torch.ones(1), path)
    error = FileNotFoundError if content == 'missing' else ValueError
    with pytest.raises(error, match=message):
        run(recipe(images, tmp_path, resume=str(path)))
    assert not (tmp_path / 'run').exists()


def test_resume_by_path(images, stopped, tmp_path):
    """A path goes on in the folder of its checkpoint; with another experiment, in a new folder with its history."""
    whole = run(recipe(images, tmp_path, experiment='whole'))
    shutil.copytree(stopped, tmp_path / 'old')
    there = run(recipe(images, tmp_path, experiment='', resume=str(tmp_path / 'old' / LAST)))
    assert there['directory'] == str(tmp_path / 'old')
    earlier = stopped / 'checkpoint-0.pth.tar'
    for settings in ({'experiment': ''}, {'experiment': 'run', 'output': str(stopped.parent)}):
        with pytest.raises((ValueError, FileExistsError), match='experiment=NAME'):
            run(recipe(images, tmp_path) | settings | {'resume': str(earlier)})
    assert earlier.exists()
    new = run(recipe(images, tmp_path, experiment='new', resume=str(earlier)))
    assert new['epochs'] == there['epochs'] == whole['epochs']
    assert new['best_epoch'] == 1  # the file of the best of the old folder stays there
    states = [torch.load(tmp_path / name / LAST, weights_only=True)['state_dict'] for name in ('whole', 'old', 'new')]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])
        assert torch.equal(value, states[2][name])


def test_resume_of_a_finished_run(images, stopped, tmp_path):
    """A finished run that is resumed exports again and trains nothing; more epochs go on."""
    first = run(resumed(images, stopped, tmp_path))
    before = (tmp_path / 'run' / LAST).read_bytes()
    shutil.rmtree(tmp_path / 'run' / 'model')
    again = run(recipe(images, tmp_path, resume='auto'))
    assert (again['epochs'], again['metrics']) == (first['epochs'], first['metrics'])
    assert (tmp_path / 'run' / LAST).read_bytes() == before
    assert (tmp_path / 'run' / 'model' / 'model.safetensors').is_file()
    more = run(recipe(images, tmp_path, resume='auto', epochs=3))
    assert [entry['epoch'] for entry in more['epochs']] == [0, 1, 2]


def test_resume_auto_of_nothing(images, tmp_path):
    """'auto' starts anew where there is no run yet, or no checkpoint yet, and needs a name to look for."""
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'args.yaml').write_text('')  # killed in its first epoch
    assert run(recipe(images, tmp_path, resume='auto', epochs=1))['best_epoch'] == 0
    with pytest.raises(ValueError, match=r"'auto' .*experiment=NAME"):
        run(recipe(images, tmp_path, resume='auto', experiment=''))
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'precious').write_text('')
    with pytest.raises(FileExistsError, match='not empty'):
        run(recipe(images, tmp_path, resume='auto', experiment='other'))


def _flip_signs(path, count=3):
    """Flip the sign bits of numbers in the largest record of a checkpoint, as a bad disk would."""
    with zipfile.ZipFile(path) as file:
        record = max(file.infolist(), key=lambda info: info.file_size)
        with file.open(record) as opened:
            start = opened._orig_compress_start
    content = bytearray(path.read_bytes())
    for number in range(count):
        content[start + 4 * number + 3] ^= 0x80
    path.write_bytes(content)
    return record.filename


def _zero_a_page(path):
    with zipfile.ZipFile(path) as file:
        record = max(file.infolist(), key=lambda info: info.file_size)
        with file.open(record) as opened:
            start = opened._orig_compress_start
    content = bytearray(path.read_bytes())
    content[start:start + 512] = bytes(512)
    path.write_bytes(content)
    return record.filename


@pytest.mark.parametrize('damage', [_flip_signs, _zero_a_page])
def test_a_damaged_checkpoint_is_read_by_nothing(images, stopped, tmp_path, damage):
    """torch.load reads flipped bits without a word; no command of ours does, and no file is written."""
    shutil.copytree(stopped, tmp_path / 'run')
    paths = [tmp_path / 'run' / name for name in (LAST, BEST, 'checkpoint-0.pth.tar')]
    (tmp_path / 'run' / BEST).unlink()
    shutil.copyfile(stopped / BEST, tmp_path / 'run' / BEST)  # a body of its own
    for path in paths:
        record = damage(path)
        torch.load(path, weights_only=True)
        with pytest.raises(WeightsError, match=record):
            read_checkpoint(path)
    before = content_of(tmp_path / 'run')
    last = str(paths[0])
    for values in (
        {'resume': 'auto'}, {'resume': last, 'experiment': 'new'}, {'initial_checkpoint': last, 'experiment': 'new'},
        {'dreal': {'start': {'backbone': last}}, 'experiment': 'new'}, {'pretrained_path': last, 'experiment': 'new'},
    ):
        with pytest.raises(WeightsError, match='CRC'):
            run(recipe(images, tmp_path, **values))
    with pytest.raises(WeightsError, match='CRC'):
        export_run(tmp_path / 'run', tmp_path / 'exported')
    with pytest.raises(WeightsError, match='CRC'):
        load('test_resnet', last)
    assert content_of(tmp_path / 'run') == before
    assert names(tmp_path) == ['run']


def content_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_a_damaged_file_of_another_program(tmp_path, caplog):
    """A file that no run of ours wrote is read, with a warning: some write no checksums."""
    torch.save({'state_dict': {'a': torch.ones(10_000)}}, tmp_path / 'other.pth')
    _flip_signs(tmp_path / 'other.pth')
    assert read_checkpoint(tmp_path / 'other.pth')['state_dict']['a'].sum() == 9_994
    assert 'may be damaged' in caplog.text


@pytest.mark.parametrize('damage', [_flip_signs, lambda path: path.write_bytes(path.read_bytes()[:5_000])])
def test_a_damaged_last_is_told_with_the_way_out(images, tmp_path, damage):
    """The error names the newest whole file; moved out of the way, the run goes on from that to the bit."""
    whole = run(recipe(images, tmp_path, experiment='whole', epochs=3))
    run(recipe(images, tmp_path, epochs=3, stop_epoch=2))
    folder = tmp_path / 'run'
    damage(folder / LAST)
    newest = max(folder.glob('checkpoint-*'), key=lambda path: path.name)
    with pytest.raises(WeightsError, match=rf'{newest.name}.*mv .*last\.pth\.tar'):
        run(recipe(images, tmp_path, epochs=3, resume='auto'))
    (folder / LAST).rename(folder / 'last.damaged')
    resumed = run(recipe(images, tmp_path, epochs=3, resume='auto'))
    assert resumed['epochs'] == whole['epochs']
    states = [torch.load(tmp_path / name / LAST, weights_only=True) for name in ('whole', 'run')]
    for state in states:
        del state['args']
    assert_equal(*states)
    assert names(folder) == sorted([*names(tmp_path / 'whole'), 'last.damaged'])


@pytest.mark.parametrize('left', [
    ['checkpoint-0', 'checkpoint-1'], ['checkpoint-0', 'milestone-2'], ['checkpoint-0'], ['model_best']])
def test_without_a_last(images, tmp_path, left):
    """Without a last checkpoint 'auto' goes on from the newest one that is whole, to the bit, and removes nothing."""
    whole = run(recipe(images, tmp_path, experiment='whole', epochs=3, save_epochs=[2]))
    run(recipe(images, tmp_path, epochs=3, save_epochs=[2], stop_epoch=2))
    folder = tmp_path / 'run'
    kept = {f'{name}.pth.tar' for name in left}
    for path in folder.glob('*.pth.tar'):
        if path.name not in kept:
            path.unlink()
    shutil.copyfile(folder / f'{left[0]}.pth.tar', folder / 'checkpoint-17.pth.tar')
    _flip_signs(folder / 'checkpoint-17.pth.tar')  # newer by its name, and not whole
    resumed = run(recipe(images, tmp_path, epochs=3, save_epochs=[2], resume='auto'))
    assert resumed['epochs'] == whole['epochs']
    assert names(folder) == sorted([*names(tmp_path / 'whole'), 'checkpoint-17.pth.tar'])
    for name in (LAST, BEST, 'milestone-2.pth.tar'):
        states = [torch.load(tmp_path / run_ / name, weights_only=True)['state_dict'] for run_ in ('whole', 'run')]
        assert_equal(*states)


def test_nothing_whole_is_left(images, stopped, tmp_path):
    """Where no checkpoint is whole the run stops, and nothing is removed or written."""
    shutil.copytree(stopped, tmp_path / 'run')
    (tmp_path / 'run' / LAST).unlink()
    for name in ('checkpoint-0.pth.tar', BEST):
        _flip_signs(tmp_path / 'run' / name)
    before = content_of(tmp_path / 'run')
    with pytest.raises(WeightsError, match='none of its 1 other checkpoints is whole'):
        run(recipe(images, tmp_path, resume='auto'))
    assert content_of(tmp_path / 'run') == before


def test_files_of_the_user_stay(images, stopped, tmp_path):
    """A run that goes on exports anew, and leaves what else lies in its folder and in model/."""
    shutil.copytree(stopped, tmp_path / 'run')
    mine = ['notes.txt', 'model/notes.txt', 'model/test/mine.json', 'checkpoint-99.pth.tar', 'model/.gitattributes']
    for name in mine:
        (tmp_path / 'run' / name).write_text(name)
    edited = (tmp_path / 'run' / 'model' / 'README.md').read_text() + 'mine'
    (tmp_path / 'run' / 'model' / 'README.md').write_text(edited)
    os.utime(tmp_path / 'run' / 'model' / 'README.md', (time.time() + 60,) * 2)
    run(recipe(images, tmp_path, resume='auto'))
    whole = run(recipe(images, tmp_path, experiment='whole'))
    for name in mine:
        assert (tmp_path / 'run' / name).read_text() == name
    for name in ('model.safetensors', 'config.json', 'test/rand_tensors.safetensors'):
        assert (tmp_path / 'run' / 'model' / name).read_bytes() == Path(whole['model'], name).read_bytes()
    assert (tmp_path / 'run' / 'model' / 'README.old.md').read_text() == edited
    for text in ('twice', 'thrice'):  # a name that is taken is no reason to stop
        (tmp_path / 'run' / 'model' / 'README.md').write_text(text)
        os.utime(tmp_path / 'run' / 'model' / 'README.md', (time.time() + 60,) * 2)
        run(recipe(images, tmp_path, resume='auto'))
    cards = {path.read_text() for path in (tmp_path / 'run' / 'model').glob('README*')}
    assert {edited, 'twice', 'thrice'} < cards and len(cards) == 4
    before = content_of(tmp_path / 'run' / 'model')
    run(recipe(images, tmp_path, resume='auto'))  # exports anew, the same
    assert content_of(tmp_path / 'run' / 'model') == before
    assert not [name for name in names(tmp_path / 'run') if name.startswith('model.')]


@pytest.mark.parametrize('link', [False, True])
def test_a_kill_at_each_step_of_an_export(tmp_path, link):
    """Killed at any moment, there is the old export or the new one, and every file of the user; then it goes on."""
    replace = os.replace

    def make(folder, version):
        scratch = folder.with_name(f'.{folder.name}.{version}')
        for name in ('config.json', 'test/a.txt'):
            os.makedirs((scratch / name).parent, exist_ok=True)
            (scratch / name).write_text(f'{version} of {name}')
        (scratch / 'SHA256SUMS').write_text(checksums(scratch))
        replace(scratch, folder)

    for number in range(1, 80):
        root = tmp_path / str(number)
        root.mkdir()
        folder = root / 'model'
        if link:
            (root / 'elsewhere').mkdir()
            folder.symlink_to(root / 'elsewhere' / 'place')
            make(root / 'elsewhere' / 'place', 'old')
        else:
            make(folder, 'old')
        (folder / 'mine.txt').write_text('mine')
        pid = os.fork()
        if pid == 0:
            for owner, name in ((os, 'replace'), (Path, 'unlink'), (Path, 'rmdir'), (Path, 'mkdir')):
                setattr(owner, name, _dying(getattr(owner, name), number))
            export_anew(folder, lambda new: make(new, 'new'))
            os._exit(0)
        killed = os.waitpid(pid, 0)[1] != 0
        mine = [path for path in root.rglob('mine.txt') if path.is_file()]
        assert len(mine) == 1 and mine[0].read_text() == 'mine', number
        assert [path for path in root.rglob('config.json') if path.parent.joinpath('SHA256SUMS').is_file()], number
        export_anew(folder, lambda new: make(new, 'third'))
        assert (folder / 'config.json').read_text() == 'third of config.json', number
        assert (folder / 'mine.txt').read_text() == 'mine'
        assert not [path for path in folder.resolve().parent.iterdir() if path.name.endswith(('.new', '.old'))], number
        if not killed:
            break
    assert not killed and number > 4


_LEFT = [0]


def _dying(original, number):
    def call(*arguments, **options):
        _LEFT[0] += 1
        if _LEFT[0] == number:
            os._exit(9)
        return original(*arguments, **options)
    return call


def test_changed_settings_are_told(images, stopped, tmp_path, caplog):
    """A resumed run says which settings are not those it was started with."""
    with caplog.at_level('INFO'):
        run(resumed(images, stopped, tmp_path, lr=0.01))
    assert 'not those of the checkpoint: lr 0.05 -> 0.01' in caplog.text


def test_changed_settings_are_kept(images, stopped, tmp_path):
    """run.json, checkpoints and exports tell from which epoch on which settings were others."""
    run(resumed(images, stopped, tmp_path, epochs=4, stop_epoch=2, lr=0.01))
    run(recipe(images, tmp_path, epochs=4, stop_epoch=3, lr=0.01, resume='auto'))
    other = tmp_path / 'images'
    shutil.copytree(images, other)
    run(recipe(
        other, tmp_path, epochs=4, lr=0.01, momentum=0.5, dreal={'gamma': 0.7}, resume='auto', eval_metric='top1'))
    expected = [
        {'epoch': 1, 'settings': {'epochs': [2, 4], 'lr': [0.05, 0.01]}},
        {'epoch': 3, 'settings': {'momentum': [0.9, 0.5], 'dreal.gamma': [1.0, 0.7]}},
    ]
    folder = tmp_path / 'run'
    assert json.loads((folder / 'run.json').read_text())['changes'] == expected
    assert json.loads((folder / 'model' / 'training' / 'run.json').read_text())['changes'] == expected
    states = {epoch: torch.load(folder / f'checkpoint-{epoch}.pth.tar', weights_only=True) for epoch in range(4)}
    assert [state['changes'] for state in states.values()] == [[], expected[:1], expected[:1], expected]
    assert [state['args']['lr'] for state in states.values()] == [0.05, 0.01, 0.01, 0.01]
    export_run(folder / 'checkpoint-0.pth.tar', tmp_path / 'first')
    assert yaml.safe_load((tmp_path / 'first' / 'training' / 'args.yaml').read_text())['lr'] == 0.05
    branch = run(recipe(
        images, tmp_path, epochs=4, lr=0.02, experiment='branch', resume=str(folder / 'checkpoint-1.pth.tar')))
    assert json.loads(Path(branch['directory'], 'run.json').read_text())['changes'] == [
        expected[0], {'epoch': 2, 'settings': {'lr': [0.01, 0.02]}}]


def test_options_of_a_resumed_run(images, stopped, tmp_path):
    """The optimizer of a resumed run has the recipe's options and the schedule's learning rate, group by group."""
    state = set_up(load_config(resumed(images, stopped, tmp_path, weight_decay=0.5, momentum=0.1)))
    groups = state.optimizer.param_groups
    assert {group['weight_decay'] for group in groups} == {0.0, 0.5}
    assert {group['momentum'] for group in groups} == {0.1}
    assert {group['lr'] for group in groups} == {0.025}
    state = set_up(load_config(recipe(images, tmp_path, resume='auto', sched='none', lr=0.01)))
    assert {group['lr'] for group in state.optimizer.param_groups} == {0.01}


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_another_schedule_after_a_resume(images, tmp_path):
    """A run goes on under another schedule than it began with."""
    run(recipe(images, tmp_path, sched='plateau', stop_epoch=1))
    results = run(recipe(images, tmp_path, resume='auto'))
    assert results['epochs'][1]['lr'] == pytest.approx(0.025)


def test_other_processes_are_told(images, stopped, tmp_path, caplog):
    """A run that goes on with another number of processes says so."""
    settings = resumed(images, stopped, tmp_path)
    state = torch.load(tmp_path / 'run' / LAST, weights_only=True)
    torch.save(state | {'processes': 4}, tmp_path / 'run' / LAST)
    with caplog.at_level('INFO'):
        set_up(load_config(settings))
    assert 'processes 4 -> 1' in caplog.text


def test_checkpoints_of_timm_resume(images, tmp_path):
    """A checkpoint with timm's keys alone, and its arguments as a Namespace, goes on."""
    run(recipe(images, tmp_path, stop_epoch=1, dreal={'enabled': False}))
    state = torch.load(tmp_path / 'run' / LAST, weights_only=True)
    timms = {key: state[key] for key in ('epoch', 'arch', 'optimizer', 'version', 'state_dict', 'metric')}
    torch.save(timms | {'args': argparse.Namespace(model='test_resnet')}, tmp_path / 'timm.pth.tar')
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm.pth.tar').rename(tmp_path / 'timm' / LAST)
    (tmp_path / 'timm' / 'args.yaml').write_text('')
    with pytest.raises(ValueError, match='not of this package: add experiment=NAME'):
        run(recipe(images, tmp_path, experiment='', resume=str(tmp_path / 'timm' / LAST), dreal={'enabled': False}))
    results = run(recipe(
        images, tmp_path, experiment='new', resume=str(tmp_path / 'timm' / LAST), dreal={'enabled': False}))
    whole = run(recipe(images, tmp_path, experiment='whole', dreal={'enabled': False}))
    assert [entry['epoch'] for entry in results['epochs']] == [1]
    assert results['epochs'] == whole['epochs'][1:]


def test_start_epoch_and_no_resume_opt(images, stopped, tmp_path):
    """start_epoch wins over the checkpoint's number; no_resume_opt leaves the optimizer fresh."""
    results = run(resumed(images, stopped, tmp_path, start_epoch=0))
    assert [entry['epoch'] for entry in results['epochs']] == [0, 1]
    assert [entry['lr'] for entry in results['epochs']] == [0.05, 0.025]
    buffers = {}
    for fresh in (False, True):
        shutil.copytree(stopped, tmp_path / f'run-{fresh}')
        run(recipe(images, tmp_path, experiment=f'run-{fresh}', resume='auto', no_resume_opt=fresh))
        state = torch.load(tmp_path / f'run-{fresh}' / LAST, weights_only=True)['optimizer']['state']
        buffers[fresh] = state[0]['momentum_buffer']
    assert not torch.equal(buffers[False], buffers[True])
