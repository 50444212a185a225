"""Forms and their training: controls by the rewards of other images, CAL's loss, the table and a study that goes on"""
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import correct_targets, make_batch, make_model
from study import fashion, forms, jsonl, learning
from timm.layers import SEModule
from timm.task import ClassificationTask
from torch.nn.functional import cross_entropy

from dreal_timm import DrealTask
from dreal_timm.probes import taylor

CPU = torch.device('cpu')


def controlled(kind, **options):
    """A task of a small network under a control, and the same without, after a step each on one batch."""
    input, _ = make_batch(16)
    found = []
    for control in (None, kind):
        model = make_model('se').train()
        target = correct_targets(make_model('se').train(), input)
        task = DrealTask(model, verbose=False, input_size=(3, 64, 64), **options)
        if control:
            task.measure = forms.Control(task.measure, control, 0)
        task(input, target)['loss'].backward()
        task.zero_grad()
        result = task(input, target)
        result['loss'].backward()
        found.append((task, result))
    return found


@pytest.mark.parametrize('options', [
    dict(probe='taylor'), dict(probe='taylor', wrong_samples='exclude'), dict(probe='split'), dict(probe='exact')])
def test_shuffled_rewards(options):
    """The same numbers at each site, of other samples; who has none has none."""
    (_, plain), (_, shuffled) = controlled('shuffled', **options)
    own, other = plain['reward'], shuffled['reward']
    assert torch.equal(own.isnan(), other.isnan())
    moved = 0
    for one, two in zip(own.unbind(1), other.unbind(1), strict=True):
        known = ~one.isnan()
        torch.testing.assert_close(one[known].sort().values, two[known].sort().values)
        moved += int((one[known] != two[known]).sum())
    assert moved > 0


def test_random_rewards():
    """Other numbers of about the same mean and spread."""
    control = forms.Control.__new__(forms.Control)
    control.kind, control.generator = 'random', torch.Generator().manual_seed(0)
    values = 3 + 0.1 * torch.randn(5000, 2)
    drawn = control._blind(values)
    assert abs(torch.corrcoef(torch.stack([values[:, 0], drawn[:, 0]]))[0, 1]) < 0.05
    torch.testing.assert_close(drawn.mean(0), values.mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(drawn.std(0), values.std(0), rtol=0.1, atol=0)


def test_the_direct_actor_is_shuffled_too(monkeypatch):
    """What it is pushed by is the gradient of another sample: the same gradients at each site, and another push."""
    seen = {}
    own = taylor.TaylorMeasure.__call__

    def look(self, *args):
        if self.pending is not None:
            seen[id(self)] = [one for tap in self.pending.taps.values() for one in tap.grad.unbind(1)]
        return own(self, *args)

    monkeypatch.setattr(taylor.TaylorMeasure, '__call__', look)
    (plain, first), (shuffled, second) = controlled('shuffled', probe='taylor', actor='direct')
    moved = 0
    for one, two in zip(seen[id(plain.measure)], seen[id(shuffled.measure.inner)], strict=True):
        rows = [sorted(map(tuple, values.flatten(1).tolist())) for values in (one, two)]
        assert rows[0] == rows[1]
        moved += int((one != two).flatten(1).any(1).sum())
    assert moved > 0
    assert first['actor_loss'] != second['actor_loss']
    gradients = [
        torch.cat([p.grad.flatten() for n, p in task.get_eval_model().named_parameters() if '.se.' in n])
        for task in (plain, shuffled)]
    assert not torch.allclose(*gradients)


def test_twice(monkeypatch):
    """Gradients are twice as long at the attention parameters, and what they are everywhere else."""
    monkeypatch.setattr(fashion, 'SIZE', (3, 64, 64))
    found = []
    for task in (ClassificationTask, forms.TwiceTask):
        model = make_model('se').train()
        task(model, verbose=False)(*make_batch(8))['loss'].backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.any()
        torch.testing.assert_close(found[1][name], gradient * (2 if '.se.' in name else 1))


def test_cal_by_hand(monkeypatch):
    """The class loss, and that of the difference to the logits with all maps replaced by given random ones."""
    monkeypatch.setattr(fashion, 'SIZE', (3, 64, 64))
    model = make_model('se').train()
    input, target = make_batch(8)
    monkeypatch.setattr(forms, '_random_map', lambda attention: torch.full_like(attention, 0.25))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    task = forms.CounterfactualTask(model, 0.5, verbose=False)
    loss = task(input, target)['loss']
    moved = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])]
    counts = {int(b) for n, b in model.named_buffers() if n.endswith('num_batches_tracked')}
    assert moved and counts == {1}  # the second pass leaves the running statistics
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    logits = model(input)
    for module in model.modules():
        if isinstance(module, SEModule):
            module.forward = lambda x: x * 0.25
    expected = cross_entropy(logits, target) + 0.5 * cross_entropy(logits - model(input), target)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize('name', [*forms.BESIDE, *forms.FORMS, 'taylor/shuffled', 'direct/random'])
def test_every_form_takes_two_steps(name):
    """All that the study runs is there, and its loss is a finite number with gradients."""
    task = forms.make_task(fashion.network('se', 0.25, 0), name, 0, CPU)
    task.get_trainable_module().train()
    for seed in range(2):
        images = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
        loss = task(images, torch.arange(8))['loss']
        loss.backward()
        assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.get_trainable_module().parameters())


@pytest.mark.parametrize('name', [
    'plane', 'plain/shuffled', 'taylor/sorted', 'cal/random', 'twice@1', 'plain@1', 'taylor@x'])
def test_forms_that_are_not_there(name):
    """A form or control that is not known is an error that lists those that are."""
    with pytest.raises(ValueError, match='expected one of plain, twice, cal, literal'):
        forms.split_name(name)


def test_forms_that_begin_later():
    """FORM@1 is the form without L_q for an epoch, its control as well."""
    late = forms.make_task(fashion.network('se', 0.25, 0), 'literal@1/shuffled', 0, CPU)
    assert isinstance(late, DrealTask) and isinstance(late.measure, forms.Control)
    images = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for weight in (0, 1):
        late.get_trainable_module().train()  # an epoch begins
        result = late(images, torch.arange(8))
        rest = result['loss'] - result['class_loss'] - result['critic_loss']
        assert result['actor_loss'] != 0
        torch.testing.assert_close(rest.detach(), weight * result['actor_loss'], atol=1e-5, rtol=1e-5)


def test_table_by_hand():
    """Differences are those of the same seed, to plain training and to the control of the same weight."""
    def made(form, seed, top1, weight=None):
        return {'form': form, 'weight': weight, 'seed': seed, 'top1': top1, 'curve': [{'seconds': 10.0 * (seed + 1)}]}

    rows = {row['form']: row for row in learning.table([
        made('plain', 0, 80.0), made('plain', 1, 90.0), made('taylor', 0, 82.0), made('taylor', 1, 91.0),
        made('taylor/shuffled', 0, 81.0), made('taylor/shuffled', 1, 92.0), made('cal', 1, 95.0),
        made('plain*1.2', 1, 90.5)])}
    assert rows['taylor']['minus_plain'] == 1.5
    assert rows['taylor']['minus_shuffled'] == 0.0
    assert rows['taylor']['minus_plain_95'] == pytest.approx(12.706 * math.sqrt(0.5) / math.sqrt(2), rel=1e-4)
    assert rows['cal']['minus_plain'] == 5.0 and rows['cal']['seeds'] == 1
    assert rows['taylor']['minus_longer'] == 0.5 and rows['taylor']['minus_longer_seeds'] == 1  # of the shared seed
    assert rows['plain*1.2']['minus_plain'] == 0.5 and 'minus_longer' not in rows['plain*1.2']
    assert rows['plain']['seconds'] == 15.0 and 'minus_plain' not in rows['plain']


def test_runs_of_a_seed_are_paired(monkeypatch):
    """They have the same weights, images and order: without a push one is the other; more steps are those and more."""
    splits = {name: (torch.randn(n, 1, 32, 32), torch.randint(3, (n,))) for name, n in (('train', 64), ('test', 500))}
    monkeypatch.setattr(fashion, 'open_set', lambda name, folder: fashion.ImageSet(splits, 3, True))
    monkeypatch.setattr(learning, '_OPEN', {})
    settings = dict(set='fashion', attention='se', images=32, epochs=2, width=0.25, batch_size=16, lr=0.01)
    first = learning.run('plain', None, 0, settings, '', 'cpu')
    again = learning.run('plain', None, 0, settings, '', 'cpu')
    zero = learning.run('taylor', 0.0, 0, settings, '', 'cpu')
    assert first['top1'] == again['top1'] == zero['top1']  # a weight of 0 is plain training
    longer = learning.run('plain*1.5', None, 0, settings, '', 'cpu')
    assert [row['steps'] for row in longer['curve']] == [2, 4, 6]
    assert 0 <= first['gates']['layer1_channel']['saturated'] <= 1


def test_a_study_is_resumed(tmp_path, monkeypatch, capsys):
    """A study writes a line a run, does not run again what is there, and a table of all that is in its file."""
    made, path = [], tmp_path / 'new' / 'runs.jsonl'

    def run(name, weight, seed, *_):
        made.append((name, seed))
        return {'form': name, 'weight': weight, 'seed': seed, 'top1': 80.0 + seed + len(name), 'gates': {
            'stage': {'saturated': 0.1}}, 'curve': [{'seconds': 1.0}]}

    def study(*arguments):
        made.clear()
        monkeypatch.setattr(
            sys, 'argv', ['learning.py', 'few', '--seeds', '2', '--output', str(path), *arguments])
        learning.main()
        return [line.split()[0] for line in capsys.readouterr().out.splitlines() if '% in' in line]

    def drop(form, seed):
        lines = path.read_text().splitlines(keepends=True)
        rest = [line for line in lines if f'"form": "{form}", "weight": null, "seed": {seed}' not in line]
        assert len(rest) == len(lines) - 1
        path.write_text(''.join(rest))

    monkeypatch.setattr(learning, 'run', run)
    monkeypatch.setattr(learning, 'ProcessPoolExecutor', lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(fashion, 'files', lambda folder: None)
    forms_of = ('--forms', 'taylor', 'plain')
    assert study(*forms_of) == ['taylor', 'plain'] and len(made) == 4
    drop('plain', 2001)
    assert study(*forms_of) == ['taylor', 'plain'] and made == [('plain', 2001)]
    assert study('--forms', 'plain', 'twice') == ['plain', 'twice', 'taylor']
    rows = json.loads(path.with_suffix('.json').read_text())['rows']
    assert [(row['form'], row['seeds'], row.get('minus_plain')) for row in rows] == [
        ('plain', 2, None), ('twice', 2, 0), ('taylor', 2, 1)]
    path.with_suffix('.json').unlink()
    assert study('--forms', 'cal', 'plain', '--table-only') == ['plain', 'taylor', 'twice'] and not made
    drop('twice', 2000)
    assert study('--seed-range', '1990', '2000') == ['plain', 'taylor'] and not made
    assert not path.with_suffix('.json').exists()
    assert study('--forms', 'plain', '--lr', '0.2') == ['plain'] and len(made) == 2  # of other settings
    run_again = {**jsonl.read(path)[0], 'top1': 0.0}  # of two processes that made the same run, the first counts
    jsonl.append(path, run_again)
    settings = {key: run_again[key] for key in ('set', 'attention', 'images', 'epochs', 'width', 'batch_size', 'lr')}
    assert all(one['top1'] for one in learning.read(path, settings))


@pytest.mark.parametrize(('arguments', 'message'), [
    (['few', '--forms', 'plane'], "Unknown form 'plane'"),
    (['few', '--data', 'nowhere'], "No 'train-images-idx3-ubyte.gz' in 'nowhere'"),
    (['few', '--table-only'], 'no runs of these settings'),
    (['few', '--seed-range', '5', '6'], 'no runs of these settings'),
    (['few', '--output', 'runs.json'], "such as 'runs.jsonl', and not 'runs.json'"),
    (['few', '--output', '.'], "such as 'runs.jsonl', and not '.'"),
])
def test_a_study_on_wrong_input(arguments, message, tmp_path, monkeypatch, capsys):
    """What cannot be run is said in a line, and no table is written."""
    monkeypatch.setattr(sys, 'argv', ['learning.py', arguments[0], '--output', 'runs.jsonl', *arguments[1:]])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='2'):
        learning.main()
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
