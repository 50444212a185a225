import copy
import csv
import importlib.util
import math
import shutil
from functools import partial

import pytest
import timm
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from equal import assert_equal
from safetensors.torch import save_file
from small_run import GROUP_NORM, SE, assert_close, before_updates, copied, recipe, start
from tasks import gradients

from dreal_timm.train import run, runner
from dreal_timm.train.loop import fit, train_one_epoch

SMALL = {'batch_size': 6, 'no_aug': True}
LR, LOW = 0.05, 0.001


def begin(images, path, **values):
    """All of a run of small batches before its first epoch."""
    return start(images, path, **SMALL | values)


def rates_of(state):
    """Return the list of the learning rates of the updates from now on, of every parameter group."""
    return before_updates(state, lambda: [group['lr'] for group in state.optimizer.param_groups])


def found(monkeypatch, metrics):
    """Have the validations of a run find these values of top1, and 1 / top1 as the loss."""
    values = iter(metrics)
    monkeypatch.setattr(
        runner, 'evaluate',
        lambda *_, **__: {'top1': (top1 := next(values)), 'top5': 100.0, 'loss': 1 / top1, 'samples': 12})


def names(directory):
    return {path.name for path in directory.iterdir()}


def load(directory, name='last.pth.tar'):
    return torch.load(directory / name, weights_only=True)


def cosine(share, high=LR):
    return LOW + 0.5 * (high - LOW) * (1 + math.cos(math.pi * share))


def tanh(share):
    return LOW + 0.5 * (LR - LOW) * (1 - math.tanh(-7 * (1 - share) + 3 * share))


def noisy(epoch):
    return LR * (1 + 0.1 * torch.randn(1, generator=torch.Generator().manual_seed(42 + epoch)).item())


@pytest.mark.parametrize(('values', 'expected'), [
    ({'sched': 'none', 'warmup_epochs': 2}, [LR] * 4),
    ({'sched': 'constant', 'warmup_epochs': 2}, [0.01, 0.03, LR, LR]),
    ({'sched': 'constant', 'lr_noise': [0.5], 'lr_noise_std': 0.1}, [LR, LR, noisy(2), noisy(3)]),
    ({'sched': 'cosine'}, [cosine(t / 4) for t in range(4)]),
    ({'sched': 'cosine', 'lr_k_decay': 2.0}, [cosine(t ** 2 / 16) for t in range(4)]),
    ({'sched': 'cosine', 'warmup_epochs': 2}, [0.01, 0.03, cosine(0.5), cosine(0.75)]),
    ({'sched': 'cosine', 'epochs': 3, 'warmup_epochs': 1, 'warmup_prefix': True},
     [0.01, cosine(0), cosine(1 / 3), cosine(2 / 3)]),
    ({'sched': 'cosine', 'epochs': 2, 'cooldown_epochs': 2}, [cosine(0), cosine(0.5), LOW, LOW]),
    ({'sched': 'cosine', 'epochs': 2, 'lr_cycle_limit': 2, 'lr_cycle_decay': 0.2},
     [cosine(0), cosine(0.5), cosine(0, 0.01), cosine(0.5, 0.01)]),
    ({'sched': 'cosine', 'epochs': 1, 'lr_cycle_limit': 2, 'lr_cycle_mul': 3.0},
     [LR, *(cosine(t / 3, LR / 2) for t in range(3))]),
    ({'sched': 'tanh'}, [tanh(t / 4) for t in range(4)]),
    ({'sched': 'poly', 'decay_rate': 0.5}, [LOW + (LR - LOW) * (1 - t / 4) ** 0.5 for t in range(4)]),
    ({'sched': 'step', 'decay_epochs': 2, 'decay_rate': 0.3}, [LR, LR, 0.3 * LR, 0.3 * LR]),
    ({'sched': 'multistep', 'decay_milestones': [2, 4], 'decay_rate': 0.3}, [LR, 0.3 * LR, 0.3 * LR, 0.09 * LR]),
    ({'sched': 'wsd', 'decay_epochs': 2}, [LR, LR, LR, LOW + (LR - LOW) * (1 - 0.5 ** 0.5)]),
    ({'sched': 'wsd', 'decay_epochs': 0.5, 'lr_decay_fn': 'linear'}, [LR, LR, LR, (LR + LOW) / 2]),
    ({'sched': 'rsqrt', 'decay_epochs': 2, 'lr_stable_timescale': 2.0},
     [LR, LR * 1.5 ** -0.5, LR * 2 ** -0.5, (LR * 2.5 ** -0.5 + LOW) / 2]),
])
def test_schedules(few, tmp_path, values, expected):
    """The rates of four epochs are those of the formula of the schedule, at every update and in the history."""
    values = {'epochs': 4, 'lr': LR, 'min_lr': LOW, 'warmup_lr': 0.01, 'val_interval': 4, **values}
    state = begin(few, tmp_path, **values)
    rates = rates_of(state)
    fit(state)
    assert [epoch['lr'] for epoch in state.history] == pytest.approx(expected)
    assert len(rates) == 8
    for index, groups in enumerate(rates):
        assert groups == pytest.approx([expected[index // 2]] * len(groups))


@pytest.mark.parametrize(('values', 'metrics', 'expected'), [
    ({'patience_epochs': 0}, [50, 40, 60, 60], [1, 1, 0.5, 0.5]),
    ({'patience_epochs': 1}, [50, 40, 30, 60], [1, 1, 1, 0.5]),
    ({'patience_epochs': 0, 'eval_metric': 'loss'}, [50, 60, 40, 70], [1, 1, 1, 0.5]),
    ({'patience_epochs': 0, 'val_interval': 2}, [50, 40, 30], [1, 1, 1, 1, 0.5, 0.5]),
    ({'patience_epochs': 0, 'model_ema': True}, [50, 10, 40, 20, 30, 15, 20, 20], [1, 1, 1, 0.5]),
])
def test_plateau(few, tmp_path, monkeypatch, values, metrics, expected):
    """The rate falls when the metric that ranks the epochs is not better for longer than the patience."""
    found(monkeypatch, metrics)
    state = begin(few, tmp_path, sched='plateau', decay_rate=0.5, lr=LR, epochs=len(expected), **values)
    fit(state)
    assert [epoch['lr'] for epoch in state.history] == pytest.approx([LR * factor for factor in expected])


def test_schedule_on_updates(few, tmp_path):
    """Stepped with updates, which join two steps here, a schedule moves within an epoch, the warm-up included."""
    state = begin(
        few, tmp_path, epochs=3, lr=LR, min_lr=LOW, sched_on_updates=True, warmup_epochs=1, warmup_lr=0.01,
        batch_size=4, grad_accum_steps=2)
    rates = rates_of(state)
    fit(state)
    expected = [0.01, 0.03, *(cosine(n / 6) for n in range(2, 6))]
    assert [groups[0] for groups in rates] == pytest.approx(expected)
    assert [epoch['lr'] for epoch in state.history] == pytest.approx(expected[::2])


class Sgd:
    """SGD by hand."""

    def __init__(self, lr=0.05, momentum=0.9, decay=2e-5, nesterov=True):
        self.lr, self.momentum, self.decay, self.nesterov = lr, momentum, decay, nesterov
        self.buffers = {}

    def step(self, name, weight, gradient):
        if weight.ndim > 1 and not name.startswith('critic.'):
            gradient = gradient + self.decay * weight
        buffer = self.momentum * self.buffers[name] + gradient if name in self.buffers else gradient.clone()
        self.buffers[name] = buffer
        return weight - self.lr * (gradient + self.momentum * buffer if self.nesterov else buffer)


class AdamW:
    """AdamW by hand, with an epsilon of 0.01 and betas of 0.8 and 0.7."""

    def __init__(self):
        self.moments = {}

    def step(self, name, weight, gradient):
        first, second, n = self.moments.get(name, (0, 0, 0))
        first, second, n = 0.8 * first + 0.2 * gradient, 0.7 * second + 0.3 * gradient ** 2, n + 1
        self.moments[name] = first, second, n
        decay = 0.1 if weight.ndim > 1 and not name.startswith('critic.') else 0
        move = (first / (1 - 0.8 ** n)) / ((second / (1 - 0.7 ** n)).sqrt() + 0.01)
        return weight - 0.05 * decay * weight - 0.05 * move


@pytest.mark.parametrize(('values', 'optimizer'), [
    ({}, Sgd),
    ({'momentum': 0.5, 'weight_decay': 0.1}, partial(Sgd, momentum=0.5, decay=0.1)),
    ({'opt': 'momentum'}, partial(Sgd, nesterov=False)),
    ({'opt_kwargs': {'nesterov': False}}, partial(Sgd, nesterov=False)),
    ({'opt': 'adamw', 'opt_betas': [0.8, 0.7], 'opt_eps': 0.01, 'weight_decay': 0.1}, AdamW),
])
def test_optimizers(few, tmp_path, values, optimizer):
    """Weights after two epochs are those of the optimizer by hand, with its settings."""
    state = begin(few, tmp_path, sched='none', batch_size=4, model_kwargs=GROUP_NORM, **values)
    module = state.task.get_trainable_module()
    weights, optimizer = copied(module), optimizer()
    seen = before_updates(state, lambda: gradients(module))
    fit(state)
    assert len(seen) == 6
    for found in seen:
        weights = {name: optimizer.step(name, value, found[name]) for name, value in weights.items()}
    assert_close(copied(module), weights, 1e-5)


@pytest.mark.parametrize(('batch_size', 'syncs'), [(3, (6, 12)), (4, (6, 9))])
def test_lookahead(images, tmp_path, batch_size, syncs):
    """The first slow weights are those after 6 updates; they are averaged in after 6 more, and with an epoch."""
    state = begin(
        images, tmp_path, opt='lookahead_sgd', sched='none', model_kwargs=GROUP_NORM, epochs=1,
        batch_size=batch_size)
    module = state.task.get_trainable_module()
    weights, slow, optimizer = copied(module), {}, Sgd()
    seen = before_updates(state, lambda: gradients(module))
    fit(state)
    assert len(seen) == syncs[-1]
    for n, found in enumerate(seen, start=1):
        weights = {name: optimizer.step(name, value, found[name]) for name, value in weights.items()}
        if n in syncs:
            slow = weights = {name: (slow.get(name, value) + value) / 2 for name, value in weights.items()}
    assert_close(copied(module), weights, 1e-5)


@pytest.mark.parametrize(('values', 'scales'), [
    ({}, [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]),
    ({'layer_decay_min_scale': 0.2}, [0.2, 0.2, 0.2, 1 / 4, 1 / 2, 1]),
    ({'layer_decay_no_opt_scale': 0.1}, [0, 0, 1 / 8, 1 / 4, 1 / 2, 1]),
])
def test_layer_decay(few, tmp_path, values, scales):
    """Rates halve with each layer below the classifier, the critic has the full rate and no weight decay."""
    state = begin(few, tmp_path, layer_decay=0.5, weight_decay=0.1, **values)
    module = state.task.get_trainable_module()
    before = copied(module)
    groups = {id(p): group for group in state.optimizer.param_groups for p in group['params']}
    train_one_epoch(state, 0)
    for name, parameter in module.named_parameters():
        part = name.split('.')[1]
        critic = name.startswith('critic.')
        scale = scales[-1 if critic or part == 'fc' else int(part[-1]) if part.startswith('layer') else 0]
        assert (id(parameter) in groups) == (scale > 0), name
        if 'weight_hh' not in name:  # without a gradient in groups of one site
            assert torch.equal(parameter, before[name]) == (scale == 0), name
        if scale:
            assert groups[id(parameter)]['lr'] == pytest.approx(0.05 * scale), name
            assert groups[id(parameter)]['weight_decay'] == (0 if critic or parameter.ndim == 1 else 0.1), name


@pytest.fixture(scope='module')
def weight_files(tmp_path_factory):
    """Files with the weights of a network of 5 classes and of one of 3, and one that is cut off."""
    path = tmp_path_factory.mktemp('weights')
    for classes in (3, 5):
        torch.manual_seed(classes)
        model = timm.create_model('test_resnet', in_chans=1, num_classes=classes, **copy.deepcopy(SE))
        torch.save(model.state_dict(), path / f'{classes}.pth')
        save_file(model.state_dict(), path / f'{classes}.safetensors')
    (path / 'cut.pth').write_bytes((path / '3.pth').read_bytes()[:5000])
    return path


@pytest.mark.parametrize(('kind', 'classes'), [('pth', 3), ('safetensors', 3), ('pth', 1000)])
def test_pretrained_path(few, tmp_path, weight_files, kind, classes):
    """Weights of a network with other classes are taken, but for the classifier, which starts anew."""
    state = begin(few, tmp_path, pretrained_path=str(weight_files / f'5.{kind}'), num_classes=classes)
    given = torch.load(weight_files / '5.pth', weights_only=True)
    assert state.model.fc.weight.shape == (classes, 96)
    named = {name: value for name, value in copied(state.model).items() if not name.startswith('fc.')}
    assert all(torch.equal(value, given[name]) for name, value in named.items())


@pytest.mark.parametrize('kind', ['pth', 'safetensors'])
def test_initial_checkpoint(few, tmp_path, weight_files, kind):
    """A run starts from all of the weights of the file."""
    state = begin(few, tmp_path, initial_checkpoint=str(weight_files / f'3.{kind}'))
    given = torch.load(weight_files / '3.pth', weights_only=True)
    assert all(torch.equal(value, given[name]) for name, value in copied(state.model).items())


@pytest.mark.parametrize('name', ['5.pth', '5.safetensors', 'cut.pth'])
def test_initial_checkpoint_that_does_not_fit(few, tmp_path, weight_files, name):
    """Weights that do not fit are refused in one line, which names the file, before anything is written."""
    with pytest.raises(ValueError, match=rf'Cannot load .*{name}') as caught:
        run(recipe(few, tmp_path, initial_checkpoint=str(weight_files / name)))
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_validation_interval(few, tmp_path, monkeypatch):
    """With val_interval=2 every other epoch and the last are validated and saved; the schedule moves with each."""
    found(monkeypatch, [10.0, 30.0, 20.0])
    results = run(recipe(few, tmp_path, epochs=5, val_interval=2, lr=LR, min_lr=LOW, **SMALL))
    assert ['validation' in epoch for epoch in results['epochs']] == [False, True, False, True, True]
    assert [epoch['lr'] for epoch in results['epochs']] == pytest.approx([cosine(t / 5) for t in range(5)])
    saved = {name for name in names(tmp_path / 'run') if name.startswith('checkpoint')}
    assert saved == {f'checkpoint-{epoch}.pth.tar' for epoch in (1, 3, 4)}
    assert (results['best_epoch'], results['metrics']['top1']) == (3, 30.0)
    rows = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    assert [row['eval_top1'] for row in rows] == ['', '10.0', '', '30.0', '20.0']


def test_nothing_to_validate(few, tmp_path):
    """Without a validation split the epoch with the smallest training loss is the best, and is exported."""
    results = run(recipe(few, tmp_path, val_split='', epochs=3, eval_metric='top1', **SMALL))
    losses = [epoch['train']['loss'] for epoch in results['epochs']]
    assert not any('validation' in epoch for epoch in results['epochs'])
    assert results['best_epoch'] == losses.index(min(losses))
    assert results['metrics'] == results['epochs'][results['best_epoch']]['train']
    model = timm.create_model(f'local-dir:{tmp_path}/run/model', pretrained=True)
    best = load(tmp_path / 'run', f"checkpoint-{results['best_epoch']}.pth.tar")['state_dict']
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(('metric', 'best'), [('top1', 1), ('loss', 2)])
def test_metric_of_the_best(few, tmp_path, monkeypatch, metric, best):
    """Epochs are ranked by the highest top1 or the smallest loss, and the best two are kept."""
    metrics = iter([(20.0, 0.4), (50.0, 0.9), (40.0, 0.1), (10.0, 0.3)])
    monkeypatch.setattr(
        runner, 'evaluate', lambda *_, **__: {**dict(zip(('top1', 'loss'), next(metrics), strict=True)), 'samples': 12})
    results = run(recipe(few, tmp_path, epochs=4, eval_metric=metric, checkpoint_hist=2, save_epochs=[1, 4], **SMALL))
    directory = tmp_path / 'run'
    assert results['best_epoch'] == best
    kept = {'top1': (1, 2), 'loss': (2, 3)}[metric]
    files = {name for name in names(directory) if name.endswith('.tar')}
    assert files == {
        'last.pth.tar', 'model_best.pth.tar', 'milestone-1.pth.tar', 'milestone-4.pth.tar',
        *(f'checkpoint-{epoch}.pth.tar' for epoch in kept),
    }
    epochs = {name: load(directory, name)['epoch'] for name in files}
    assert epochs == {
        'last.pth.tar': 3, 'model_best.pth.tar': best, 'milestone-1.pth.tar': 0, 'milestone-4.pth.tar': 3,
        **{f'checkpoint-{epoch}.pth.tar': epoch for epoch in kept},
    }
    model = timm.create_model(f'local-dir:{directory}/model', pretrained=True)
    assert torch.equal(model.fc.weight, load(directory, 'model_best.pth.tar')['state_dict']['fc.weight'])


@pytest.mark.parametrize('values', [
    {'sched_on_updates': True, 'warmup_epochs': 1, 'grad_accum_steps': 2, 'batch_size': 4, 'clip_grad': 1.0},
    {'sched': 'plateau', 'patience_epochs': 0, 'decay_rate': 0.5, 'model_ema': True, 'model_ema_decay': 0.5},
    {'opt': 'lookahead_sgd', 'batch_size': 3},
    {'mixup': 0.5, 'mixup_off_epoch': 2, 'drop': 0.2, 'drop_path': 0.2, 'no_aug': False, 'hflip': 0.5, 'vflip': 0.5},
    {'val_split': '', 'lr_noise': [0.25, 0.9], 'dreal': {'rotate': 1}},
    {'dreal': {'freeze': 'backbone', 'critic_cell': 'gru'}, 'layer_decay': 0.5},
])
def test_resumed_run(few, tmp_path, values):
    """Stopped after two epochs and resumed, a run ends bit for bit as an uninterrupted one, with the same history."""
    values = {'epochs': 3, 'checkpoint_hist': 2, 'save_epochs': [1, 3], **SMALL, **values}
    whole = run(recipe(few, tmp_path, experiment='whole', **values))
    first = run(recipe(few, tmp_path, experiment='parts', stop_epoch=2, resume='auto', **values))
    assert first['epochs'] == whole['epochs'][:2]
    second = run(recipe(few, tmp_path, experiment='parts', resume='auto', **values))
    for key in ('best_epoch', 'metrics', 'epochs'):
        assert second[key] == whole[key]
    one, two = tmp_path / 'whole', tmp_path / 'parts'
    assert names(one) == names(two)
    for name in ('last.pth.tar', 'model_best.pth.tar', 'milestone-3.pth.tar'):
        checkpoints = [load(directory, name) for directory in (one, two)]
        for checkpoint in checkpoints:
            del checkpoint['args']
        assert_equal(*checkpoints)
    assert (one / 'summary.csv').read_text() == (two / 'summary.csv').read_text()
    assert (one / 'model' / 'model.safetensors').read_bytes() == (two / 'model' / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('on_updates', [False, True])
@pytest.mark.parametrize(('resumed', 'epochs', 'done'), [
    ({'resume': 'auto', 'no_resume_opt': True}, [0, 1, 2], 1), ({'start_epoch': 2}, [2], 2),
])
def test_start_at_an_epoch(few, tmp_path, resumed, epochs, done, on_updates):
    """Without its state (no_resume_opt), or at start_epoch, the optimizer starts anew, at the rate of the epoch."""
    values = dict(epochs=3, lr=LR, min_lr=LOW, sched_on_updates=on_updates)
    if 'resume' in resumed:
        run(recipe(few, tmp_path, stop_epoch=1, **SMALL, **values))
    state = begin(few, tmp_path, **values, **resumed)
    assert not state.optimizer.state_dict()['state']
    rates = rates_of(state)
    fit(state)
    expected = [cosine(n / 6 if on_updates else n // 2 / 3) for n in range(2 * done, 6)]
    assert [groups[0] for groups in rates] == pytest.approx(expected)
    assert [epoch['epoch'] for epoch in state.history] == epochs


def test_a_finished_run_is_not_trained_again(few, tmp_path):
    """Resumed after its last epoch, a run is as it was; with more epochs it goes on."""
    done = run(recipe(few, tmp_path, **SMALL))
    before = load(tmp_path / 'run')
    again = run(recipe(few, tmp_path, resume='auto', **SMALL))
    assert again == done
    assert_equal(load(tmp_path / 'run'), before)
    longer = run(recipe(few, tmp_path, resume='auto', sched='constant', epochs=3, **SMALL))
    assert longer['epochs'][:2] == done['epochs']
    assert [epoch['epoch'] for epoch in longer['epochs']] == [0, 1, 2]


def scalars(directory):
    """The curves that TensorBoard shows of a folder: tag -> [(step, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(directory / 'dreal_timm'), size_guidance={'scalars': 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()['scalars']}


def test_tensorboard(few, tmp_path):
    """TensorBoard has the losses, the rewards of each group and both validations, at the updates they are of."""
    pytest.importorskip('tensorboard')
    values = dict(epochs=2, log_with=['tensorboard'], log_interval=1, model_ema=True, sched_on_updates=True, lr=LR)
    state = begin(few, tmp_path / 'names', **values)
    results = run(recipe(few, tmp_path, **SMALL, **values))
    curves = scalars(tmp_path / 'run')
    groups = [group.name for group in state.task.groups]
    assert groups == [f'layer{stage}_channel' for stage in range(1, 5)]
    numbers = ('reward', 'reward_correct', 'quality', 'critic_error', 'judged')
    train = {'loss', 'class_loss', 'actor_loss', 'critic_loss', 'top1', *numbers, 'lr'}
    train |= {f'{name}/{group}' for name in numbers for group in groups}
    assert set(curves) == {f'train/{name}' for name in train} | {
        f'{part}/{name}' for part in ('validation', 'validation_ema') for name in ('loss', 'top1', 'top5')}
    for name in train - {'lr'}:
        assert [step for step, _ in curves[f'train/{name}']] == [1, 2, 3, 4]
        ends = [value for step, value in curves[f'train/{name}'] if step % 2 == 0]
        assert ends == pytest.approx([epoch['train'][name] for epoch in results['epochs']], rel=1e-5, abs=1e-7)
    rates = [0.5 * LR * (1 + math.cos(math.pi * n / 4)) for n in range(1, 5)]
    assert [value for _, value in curves['train/lr']] == pytest.approx(rates, abs=1e-8)
    for part in ('validation', 'validation_ema'):
        for name in ('loss', 'top1', 'top5'):
            points = [(2 * epoch['epoch'] + 2, epoch[part][name]) for epoch in results['epochs']]
            assert curves[f'{part}/{name}'] == [(step, pytest.approx(value, rel=1e-5)) for step, value in points]


def test_tensorboard_of_a_resumed_run(few, tmp_path):
    """A run that goes on from an earlier epoch has each step once in TensorBoard, with the later value."""
    pytest.importorskip('tensorboard')
    values = dict(log_with=['tensorboard'], log_interval=1, checkpoint_hist=10, sched='constant', **SMALL)
    run(recipe(few, tmp_path, epochs=3, **values))
    shutil.copy(tmp_path / 'run' / 'checkpoint-0.pth.tar', tmp_path / 'run' / 'last.pth.tar')  # as if killed since
    results = run(recipe(few, tmp_path, epochs=3, resume='auto', **values | {'lr': 0.2}))
    curves = scalars(tmp_path / 'run')
    assert [step for step, _ in curves['train/loss']] == [1, 2, 3, 4, 5, 6]
    losses = [value for step, value in curves['train/loss'] if step % 2 == 0]
    assert losses == pytest.approx([epoch['train']['loss'] for epoch in results['epochs']], rel=1e-5)
    found = [(2 * epoch['epoch'] + 2, epoch['validation']['loss']) for epoch in results['epochs']]
    assert curves['validation/loss'] == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in found]


MISSING = [str(name) for name in LOGGER_TYPE_TO_CLASS if importlib.util.find_spec(str(name)) is None]


@pytest.mark.parametrize(('values', 'error', 'message'), [
    ({'log_with': ['tensorbord']}, ValueError, r"tracker 'tensorbord' \(did you mean 'tensorboard'\?\)"),
    ({'log_with': ['tensorboard'], 'log_kwargs': {'wandb': {'name': 'x'}}}, ValueError, "log_kwargs: .*'wandb'"),
    ({'log_kwargs': {'tensorboard': {}}}, ValueError, 'none is on'),
    *[({'log_with': [name]}, ModuleNotFoundError, f"'{name}' is not installed; pip") for name in sorted(MISSING)[-1:]],
    ({'resume': 'auto', 'experiment': ''}, ValueError, 'experiment=NAME'),
    ({'resume': '/nowhere/last.pth.tar'}, FileNotFoundError, '/nowhere/last.pth.tar'),
])
def test_refused_settings(few, tmp_path, values, error, message):
    """What cannot be followed or resumed is refused in one line, before anything is written."""
    with pytest.raises(error, match=message) as caught:
        run(recipe(few, tmp_path, **SMALL | values))
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.iterdir())
