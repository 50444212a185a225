import argparse
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_run import recipe

from dreal_timm.train import load_config, run
from dreal_timm.train.checkpoint import BEST, LAST, Checkpoints, write_summary
from dreal_timm.train.runner import set_up

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
        'best_epoch': 2, 'best_metric': 5.0, 'pending': (None, None),
    }


def test_a_lower_loss_is_better(tmp_path):
    """With a metric that decreases, the lowest are kept."""
    checkpoints = Checkpoints(tmp_path, keep=1, decreasing=True)
    assert [checkpoints.save({}, epoch, loss) for epoch, loss in enumerate([3.0, 1.0, 2.0])] == [True, True, False]
    assert names(tmp_path) == ['checkpoint-1.pth.tar', LAST, BEST]


def test_leftovers_of_a_kill_are_removed(tmp_path):
    """Going on, what an interrupted save left behind is removed, and nothing else."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save({}, 0, 1.0)
    for name in ('checkpoint-1.pth.tar', f'{LAST}.tmp', 'checkpoint-mine.pth.tar', 'milestone-9.pth.tar'):
        (tmp_path / name).write_bytes(b'x')
    again = Checkpoints(tmp_path, keep=3)
    again.load_state_dict(torch.load(tmp_path / LAST, weights_only=True)['saver'], epochs=1)
    assert len(names(tmp_path)) == 7  # nothing is written before the run begins
    again.clean()
    assert names(tmp_path) == [
        'checkpoint-0.pth.tar', 'checkpoint-mine.pth.tar', LAST, 'milestone-9.pth.tar', BEST]
    assert (again.best_epoch, again.best_metric, again.files) == (0, 1.0, [('checkpoint-0.pth.tar', 1.0)])


def test_the_best_file_follows_the_best_epoch(tmp_path, monkeypatch):
    """Killed between the best file and the last one, an epoch that comes out worse leaves the best epoch's weights."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({'x': torch.tensor(0)}, 0, 50.0)
    replace = os.replace

    def killed(source, target):
        if Path(target).name == LAST:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr('os.replace', killed)
        checkpoints.save({'x': torch.tensor(1)}, 1, 60.0)
    assert torch.load(tmp_path / BEST, weights_only=True)['epoch'] == 1
    again = Checkpoints(tmp_path)
    again.load_state_dict(torch.load(tmp_path / LAST, weights_only=True)['saver'], epochs=1)
    again.clean()
    assert not again.save({'x': torch.tensor(1)}, 1, 49.0)
    assert (again.best_epoch, torch.load(tmp_path / BEST, weights_only=True)['epoch']) == (0, 0)


def test_rewound_checkpoints(tmp_path):
    """Going back to an earlier epoch forgets the later ones, also as the best."""
    checkpoints = Checkpoints(tmp_path)
    for epoch, metric in enumerate([3.0, 1.0, 5.0]):
        checkpoints.save({}, epoch, metric)
    again = Checkpoints(tmp_path)
    again.load_state_dict(torch.load(tmp_path / LAST, weights_only=True)['saver'], epochs=2)
    assert (again.best_epoch, again.best_metric) == (0, 3.0)
    again.clean()
    assert names(tmp_path) == ['checkpoint-0.pth.tar', 'checkpoint-1.pth.tar', LAST, BEST]
    assert torch.load(tmp_path / BEST, weights_only=True)['epoch'] == 0
    again.load_state_dict(torch.load(tmp_path / LAST, weights_only=True)['saver'], epochs=0)
    assert (again.best_epoch, again.files) == (None, [])


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
        [sys.executable, '-m', 'dreal_timm.cli', 'train', str(path)], capture_output=True, text=True, timeout=120,
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


def test_changed_settings_are_told(images, stopped, tmp_path, caplog):
    """A resumed run says which settings are not those it was started with."""
    with caplog.at_level('INFO'):
        run(resumed(images, stopped, tmp_path, lr=0.01))
    assert 'not those of the checkpoint: lr 0.05 -> 0.01' in caplog.text


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
