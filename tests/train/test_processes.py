"""Two gloo processes: the network of one process, the same end in both, and none that waits for ever

Packages are imported once, by multiprocessing's fork server; the processes of a test are forks of it.
"""
import csv
import math
import multiprocessing
import os
import runpy
import socket
import sys
import time
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import yaml
from networks import make_batch, make_model
from PIL import Image
from reid.pictures import PEOPLE, market
from small_run import SE, recipe, write_images
from timm.utils import unwrap_model

from dreal_timm import DrealTask
from dreal_timm.attention.sites import attention_parameters
from dreal_timm.reid import PKSampler, evaluate_reid
from dreal_timm.train import build, load_config, loop, run, runner
from dreal_timm.train.checkpoint import Checkpoints
from dreal_timm.train.evaluate import evaluate

_FORKS = multiprocessing.get_context('forkserver')
_FORKS.set_forkserver_preload(['dreal_timm.train', 'torch.utils.tensorboard'])
_TIMEOUT = 60


def _enter(rank, port, folder, function, arguments):
    """Be one of two processes: call the function, and leave what it returns or raises in a file."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    log = os.open(folder / f'{rank}.log', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch.set_num_threads(1)
    try:
        result = function(*arguments)
    except Exception as error:
        result = error
    torch.save(result, folder / f'{rank}.pt')


def together(folder, function, *arguments):
    """Call a function in two processes; return for each what it returned, or the error or exit code it ended with."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = sock.getsockname()[1]
    processes = [_FORKS.Process(target=_enter, args=(rank, port, folder, function, arguments)) for rank in range(2)]
    deadline = time.monotonic() + _TIMEOUT
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    finally:
        for process in processes:
            process.kill()
            process.join(10)
    assert not hanging, f'process {hanging} did not end: ' + (folder / f'{hanging[0]}.log').read_text()[-2000:]
    files = [folder / f'{rank}.pt' for rank in range(2)]
    return [
        torch.load(file, weights_only=False) if file.exists() else process.exitcode
        for file, process in zip(files, processes, strict=True)
    ]


def _assert_same(first, second):
    """All tensors of two states are equal, bit for bit."""
    assert list(first) == list(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# one step: the gradients of one process

_CASES = [
    (attention, mode) for attention in ('se', 'cbam', 'srm') for mode in ('group norm', 'frozen norm', 'evaluation')
    if (attention, mode) != ('cbam', 'group norm')  # test_distributed.py
]


def _gradients(attention, mode, rank=None):
    """Take one step with the whole batch, or with a process's half of it."""
    model = make_model(attention, group_norm=mode == 'group norm')
    task = DrealTask(model, verbose=False, probe='exact', input_size=(3, 48, 48))
    task.get_trainable_module().train(mode != 'evaluation')
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    input, target = make_batch(batch_size=8, size=48)
    with torch.no_grad():
        best = model(input).argmax(1)
    target[:2] = best[:2]  # the first process has some that are right, the second has none
    target[4:] = (best[4:] + 1) % 7
    if rank is not None:
        task.prepare_distributed()
        input, target = input[4 * rank:4 * rank + 4], target[4 * rank:4 * rank + 4]
    result = task(input, target)
    result['loss'].backward()
    parameters = unwrap_model(task.get_trainable_module()).named_parameters()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters}
    sites = [site for group in task.groups for site in group.sites]
    attends = [f'model.{name}' for name in attention_parameters(model, sites)]
    return {'grads': grads, 'attention': attends, 'probed': result.get('probed'), 'reward': result.get('reward')}


def _all_gradients():
    dist.init_process_group('gloo')
    return [_gradients(attention, mode, dist.get_rank()) for attention, mode in _CASES]


@pytest.fixture(scope='module')
def gradients(tmp_path_factory):
    first, second = together(tmp_path_factory.mktemp('gradients'), _all_gradients)
    return dict(zip(_CASES, zip(first, second, strict=True), strict=True))


@pytest.mark.parametrize('case', _CASES, ids='-'.join)
def test_gradients_are_those_of_the_joined_batch(gradients, case):
    """Two processes have the gradients of one on both batches, those of attention and critic included."""
    first, second = gradients[case]
    whole = _gradients(*case)
    _assert_same(first['grads'], second['grads'])
    for name, grad in whole['grads'].items():
        bound = 1e-5 * grad.abs().max().item()
        torch.testing.assert_close(
            first['grads'][name], grad, rtol=1e-5, atol=bound, msg=lambda text: f'{name}: {text}')
    critics = [name for name in whole['grads'] if name.startswith('critic.')]
    assert all(whole['grads'][name].any() for name in whole['attention'])
    assert any(whole['grads'][name].any() for name in critics) == (case[1] != 'evaluation')


@pytest.mark.parametrize('case', [case for case in _CASES if case[1] != 'evaluation'], ids='-'.join)
def test_rewards_are_those_of_the_joined_batch(gradients, case):
    """Two processes judge the same sites, with the rewards of one; none of the second's samples is right."""
    first, second = gradients[case]
    whole = _gradients(*case)
    assert first['probed'] == second['probed'] == whole['probed']
    assert (second['reward'] == -1).all() and (first['reward'] != -1).any()
    torch.testing.assert_close(torch.cat([first['reward'], second['reward']]), whole['reward'], rtol=0, atol=1e-5)


# some steps: the same network in both


def _train(rotate, accumulate, probe):
    """Three epochs of two steps, of 8 images in the first process and of 3, none of them right, in the second."""
    dist.init_process_group('gloo')
    rank = dist.get_rank()
    model = make_model('cbam', layers=(2, 1, 1, 1))
    task = DrealTask(model, verbose=False, input_size=(3, 32, 32), rotate=rotate, probe=probe)
    task.setup_ema(decay=0.9)
    task.prepare_distributed()
    module = task.get_trainable_module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    probed = []
    for step in range(6):
        if step % 2 == 0:
            module.train()
        update = not accumulate or step % 2 == 1
        input, target = make_batch(batch_size=3 if rank else 8, size=32, seed=10 * step + rank)
        if rank:
            with torch.no_grad():
                target = (model(input).argmax(1) + 1) % 7
        with nullcontext() if update else task.no_sync():
            result = task(input, target)
            result['loss'].backward()
        assert not rank or (result['reward'].nan_to_num(-1) == -1).all()
        probed.append(result['probed'])
        if update:
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()
    average = {name: p.detach() for name, p in task.get_trainable_module(ema=True).named_parameters()}
    return {'probed': probed, 'weights': {name: p.detach() for name, p in module.named_parameters()}, 'ema': average}


@pytest.mark.parametrize(('rotate', 'accumulate', 'probe'), [
    ('epoch', False, 'exact'), ('epoch', True, 'exact'), ('step', True, 'exact'), (3, False, 'exact'),
    ('step', True, 'split'), ('epoch', False, 'split'), ('epoch', True, 'taylor'), ('step', False, 'taylor'),
])
def test_unequal_processes(tmp_path, rotate, accumulate, probe):
    """With other numbers of images, and none right in one, both judge the same sites and end with equal weights."""
    first, second = together(tmp_path, _train, rotate, accumulate, probe)
    assert first['probed'] == second['probed']
    turns = [first['probed'][step] for step in (0, 2, 4)] if rotate == 'epoch' else first['probed']
    assert (len({tuple(sites) for sites in turns}) > 1) == (probe != 'taylor')  # which judges all of them
    if rotate == 'epoch':
        assert all(first['probed'][step] == first['probed'][step + 1] for step in (0, 2, 4))
    for kind in ('weights', 'ema'):
        _assert_same(first[kind], second[kind])
        assert all(value.isfinite().all() for value in first[kind].values())


def _evaluate(sizes, wrapped):
    dist.init_process_group('gloo')
    rank = dist.get_rank()
    model = make_model('se')
    loader = [make_batch(batch_size=size, seed=100 * rank + i) for i, size in enumerate(sizes[rank])]
    if wrapped:
        model = torch.nn.parallel.DistributedDataParallel(model)
    return evaluate(model, loader, torch.device('cpu'), distributed=True)


@pytest.mark.parametrize('wrapped', [False, True])
@pytest.mark.parametrize('sizes', [((4, 4, 2), (3,)), ((5,), ())])
def test_evaluation_of_unequal_streams(tmp_path, sizes, wrapped):
    """Processes may have other numbers of validation batches, even none: the metrics are those of all samples."""
    results = together(tmp_path, _evaluate, sizes, wrapped)
    batches = [make_batch(batch_size=n, seed=100 * rank + i) for rank in range(2) for i, n in enumerate(sizes[rank])]
    input, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        output = make_model('se').eval()(input)
    expected = {
        'loss': torch.nn.functional.cross_entropy(output, target).item(),
        'top1': 100 * (output.argmax(1) == target).float().mean().item(),
        'top5': 100 * (output.topk(5).indices == target[:, None]).any(1).float().mean().item(),
        'samples': len(target),
    }
    assert results[0] == results[1] == pytest.approx(expected, rel=1e-5)


# whole runs


@pytest.fixture(scope='module')
def uneven(tmp_path_factory):
    """3, 5 and 5 images to validate on, which two processes do not share evenly."""
    root = write_images(tmp_path_factory.mktemp('uneven') / 'data', validation=5)
    for i in range(2):
        (root / 'validation' / 'class0' / f'{i}.png').unlink()
    return root


class _Wrong:
    """A loader with targets that the network gets wrong."""

    def __init__(self, loader, model):
        self.loader, self.model = loader, model

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for input, _ in self.loader:
            with torch.no_grad():
                target = (self.model(input).argmax(1) + 1) % 3
            yield input, target


def _run_and_tell(values, never_right):
    """Run a recipe; return its results, and this process's steps, weights and number."""
    steps, weights, fit, step = [], {}, runner.fit, loop._step

    def fit_wrong(state):
        if never_right and state.accelerator.process_index == 1:
            state.train_loader = _Wrong(state.train_loader, state.model)
        fit(state)
        module = unwrap_model(state.task.get_trainable_module())
        weights.update({name: value.clone() for name, value in module.state_dict().items()})

    def tell(state, input, target, *args):
        result = step(state, input, target, *args)
        groups = {site.name: group.name for group in state.task.groups for site in group.sites}
        steps.append({
            'target': target, 'groups': [groups[name] for name in result['probed']],
            **{name: result[name].detach() for name in ('loss', 'class_loss', 'output', 'reward', 'quality')},
        })
        return result

    runner.fit, loop._step = fit_wrong, tell
    results = run(values)
    return {'results': results, 'steps': steps, 'weights': weights, 'pid': os.getpid()}


_RUNS = {
    'plain': ({'batch_size': 4, 'dreal': {'probe': 'exact'}}, False),
    'all': ({
        'dreal': {'probe': 'exact', 'rotate': 'step'},
        'batch_size': 6, 'grad_accum_steps': 2, 'model_ema': True, 'model_ema_decay': 0.5, 'clip_grad': 5.0,
        'log_with': ['tensorboard'], 'log_interval': 1, 'validation_batch_size': 3,
    }, True),
}


@pytest.fixture(scope='module', params=_RUNS)
def trained(request, uneven, tmp_path_factory):
    """A run of two processes; in 'all' the second has no sample that is right."""
    path = tmp_path_factory.mktemp(request.param)
    values, never_right = _RUNS[request.param]
    if 'log_with' in values:
        pytest.importorskip('tensorboard')
    values = recipe(uneven, path, **values)
    return values, path / 'run', together(path / 'results', _run_and_tell, values, never_right)


def test_processes_end_alike(trained):
    """Both processes end a run with the same weights, and return the same results."""
    _, _, (first, second) = trained
    _assert_same(first['weights'], second['weights'])
    assert first['results'] == second['results']
    assert len(first['steps']) == len(second['steps']) > 0


def test_processes_of_a_run_judge_the_same_sites(trained):
    """In every step both processes judge the same sites; a process without a right sample has no reward but -gamma."""
    values, _, (first, second) = trained
    assert [step['groups'] for step in first['steps']] == [step['groups'] for step in second['steps']]
    if 'grad_accum_steps' in values:
        assert all((step['reward'] == -1).all() for step in second['steps'])


def test_training_metrics_are_of_both_processes(trained):
    """The summary's training metrics are means over the samples of both processes."""
    _, directory, parts = trained
    rows = list(csv.DictReader((directory / 'summary.csv').open()))
    assert len(rows) == 2
    steps_of_epoch = len(parts[0]['steps']) // 2
    for epoch, row in enumerate(rows):
        steps = [
            step for part in parts for step in part['steps'][epoch * steps_of_epoch:(epoch + 1) * steps_of_epoch]]
        expected = {
            name: sum(step[name].item() * len(step['target']) for step in steps)
            / sum(len(step['target']) for step in steps) for name in ('loss', 'class_loss')
        }
        right = [step['output'].argmax(1) == step['target'] for step in steps]
        expected['top1'] = 100 * torch.cat(right).float().mean().item()
        for group in dict.fromkeys(steps[0]['groups']):
            reward = torch.cat([step['reward'][:, step['groups'].index(group)] for step in steps])
            quality = torch.cat([step['quality'][:, step['groups'].index(group)] for step in steps])
            expected |= {
                f'reward/{group}': reward.mean().item(), f'judged/{group}': 1.0,
                f'reward_correct/{group}': reward[torch.cat(right)].mean().item() if torch.cat(right).any() else 0.0,
                f'critic_error/{group}': (quality - reward).square().mean().item(),
            }
        expected['reward'] = torch.cat([step['reward'] for step in steps]).mean().item()
        expected['judged'] = 1.0
        assert {name: float(row[f'train_{name}']) for name in expected} == pytest.approx(expected, abs=1e-5)


def test_validation_metrics_are_of_every_image_once(trained, uneven):
    """13 images over two processes: the metrics of each epoch are those of one process with the same weights."""
    values, directory, _ = trained
    files = sorted((uneven / 'validation').glob('*/*.png'))
    assert len(files) == 13
    pixels = torch.stack([torch.frombuffer(bytearray(Image.open(f).tobytes()), dtype=torch.uint8) for f in files])
    input = ((pixels / 255 - 0.4) / 0.3).view(13, 1, 32, 32)
    target = torch.tensor([int(file.parent.name[-1]) for file in files])
    for epoch, row in enumerate(csv.DictReader((directory / 'summary.csv').open())):
        checkpoint = torch.load(directory / f'checkpoint-{epoch}.pth.tar', weights_only=True)
        for prefix, key in (('eval_', 'state_dict'), ('eval_ema_', 'state_dict_ema'))[:1 + ('model_ema' in values)]:
            model = build.build_model(load_config(values)).eval()
            model.load_state_dict(checkpoint[key])
            with torch.no_grad():
                output = model(input)
            assert float(row[f'{prefix}loss']) == pytest.approx(
                torch.nn.functional.cross_entropy(output, target).item(), abs=1e-5)
            assert float(row[f'{prefix}top1']) == pytest.approx(
                100 * (output.argmax(1) == target).double().mean().item(), abs=1e-5)


@pytest.mark.parametrize('trained', ['all'], indirect=True)
def test_first_process_alone_tracks(trained):
    """TensorBoard's files are written by the first process alone."""
    _, directory, (first, second) = trained
    writers = {int(path.name.split('.')[-2]) for path in directory.rglob('events.out.tfevents.*')}
    assert writers == {first['pid']} != {second['pid']}


def test_a_resumed_run_ends_as_an_uninterrupted_one(uneven, tmp_path):
    """Two processes that stop and resume write the last checkpoint of those that do not, bit for bit."""
    values = dict(
        epochs=3, batch_size=6, grad_accum_steps=2, model_ema=True, model_ema_decay=0.5, drop=0.1, reprob=0.5,
        scale=[0.5, 1.0], opt='adamw', lr=1e-3, dreal={'rotate': 'step'},
    )
    results = []
    for name, settings in (
        ('whole', {}), ('parts', {'stop_epoch': 1}), ('parts', {'stop_epoch': 2, 'resume': 'auto'}),
        ('parts', {'resume': 'auto'}),
    ):
        part = recipe(uneven, tmp_path, experiment=name, **values, **settings)
        results.append(together(tmp_path / f'results{len(results)}', run, part))
    assert results[3][0]['epochs'] == results[3][1]['epochs'] == results[0][0]['epochs']
    whole, parts = (torch.load(tmp_path / name / 'last.pth.tar', weights_only=True) for name in ('whole', 'parts'))
    for kind in ('state_dict', 'state_dict_ema'):
        _assert_same(whole[kind], parts[kind])
    for kind in ('task_state', 'task_state_ema'):
        _assert_same(whole[kind]['critic'], parts[kind]['critic'])
        assert whole[kind]['rotation'] == parts[kind]['rotation']
    for index, state in whole['optimizer']['state'].items():
        _assert_same(state, parts['optimizer']['state'][index])


# errors: both end


def _run_with_a_step(values, number, change):
    """Run a recipe in which the second process's step of that number, from 0, has other images."""
    step, calls = loop._step, []

    def changed(state, input, *args):
        calls.append(None)
        if state.accelerator.process_index == 1 and len(calls) == number + 1:
            input = change(input)
        return step(state, input, *args)

    loop._step = changed
    return run(values)


def _not_finite(input):
    return input * math.nan


def _refuse(input):
    raise ValueError('an image that cannot be read')


@pytest.mark.parametrize('log_interval', [1, 50])
def test_a_loss_that_is_not_finite_in_one_process(uneven, tmp_path, log_interval):
    """One process's loss stops both with the message that names it and its step; the checkpoint before is kept."""
    values = recipe(uneven, tmp_path, batch_size=4, epochs=3, log_interval=log_interval)
    errors = together(tmp_path / 'results', _run_with_a_step, values, 4 + 1, _not_finite)
    assert [type(error) for error in errors] == [FloatingPointError] * 2
    assert str(errors[0]) == str(errors[1])
    last = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=True)
    assert last['epoch'] == 0
    assert all(value.isfinite().all() for value in last['state_dict'].values())
    assert 'epoch 2, step 2 of 4: the batch of process 1 has a loss that is not finite' in str(errors[0])


def _run_without_a_disk(values):
    def save(*args, **kwargs):
        raise OSError('cannot write a checkpoint')

    Checkpoints.save = save
    return run(values)


@pytest.mark.parametrize(('function', 'arguments', 'rank', 'message'), [
    (_run_with_a_step, (2, _refuse), 1, 'an image that cannot be read'),
    (_run_without_a_disk, (), 0, 'cannot write a checkpoint'),
], ids=['step', 'checkpoint'])
def test_an_error_in_one_process_ends_both(uneven, tmp_path, function, arguments, rank, message):
    """Where one process ends with an error, the other does not wait for it for ever."""
    errors = together(tmp_path / 'results', function, recipe(uneven, tmp_path, batch_size=4), *arguments)
    assert message in str(errors[rank])
    assert isinstance(errors[1 - rank], Exception)


def _run_with_a_long_export(values, path):
    """The first process exports until the second has ended its run."""
    def export(state):
        deadline = time.monotonic() + 60
        while not (path / 'second').exists():
            assert time.monotonic() < deadline, 'the second process waits for the export'
            time.sleep(0.05)

    runner._export = export
    results = run(values)
    if results['pushed'] is None and dist.get_rank() == 1:
        (path / 'second').touch()
    timeout = dist.group.WORLD._get_backend(torch.device('cpu')).options._timeout
    return timeout.total_seconds()


def test_nobody_waits_for_an_export(uneven, tmp_path):
    """An export may take longer than processes may wait for each other: the second waits for none of it."""
    found = together(
        tmp_path / 'results', _run_with_a_long_export,
        recipe(uneven, tmp_path, batch_size=4, epochs=1, ddp_timeout=47), tmp_path)
    assert found == [47, 47]


def _command(*arguments):
    sys.argv = ['dreal_timm.train', *arguments]
    runpy.run_module('dreal_timm.train', run_name='__main__')


@pytest.mark.parametrize(('setting', 'message'), [
    ('experiment=taken', 'exists, is not empty'),
    ('data_dir=/nowhere', "no folder '/nowhere'"),
    ('batch_size=19', '18 for each process'),
    ('sync_bn=true', 'needs GPUs'),
    ('resume=auto experiment=', 'experiment=NAME'),
    ('lr=fast', 'lr'),
])
def test_wrong_settings_end_both(uneven, tmp_path, setting, message):
    """A wrong setting ends every process with exit code 2 and the same line, before anything is written."""
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken' / 'precious').write_text('x')
    path = tmp_path / 'recipe.yaml'
    path.write_text(yaml.safe_dump(recipe(uneven, tmp_path)))
    results = tmp_path / 'results'
    assert together(results, _command, str(path), *setting.split()) == [2, 2]
    lines = [(results / f'{rank}.log').read_text().splitlines() for rank in range(2)]
    errors = [[line for line in text if 'error:' in line] for text in lines]
    assert errors[0] == errors[1] and len(errors[0]) == 1
    assert message in errors[0][0]
    assert not any('Traceback' in line for text in lines for line in text)
    assert {file.name for file in tmp_path.iterdir()} == {'taken', 'recipe.yaml', 'results'}
    assert [file.name for file in (tmp_path / 'taken').iterdir()] == ['precious']


def test_command(uneven, tmp_path):
    """The command ends without an error in every process, and one model is exported."""
    path = tmp_path / 'recipe.yaml'
    path.write_text(yaml.safe_dump(recipe(uneven, tmp_path, batch_size=4, epochs=1)))
    assert together(tmp_path / 'results', _command, str(path)) == [None, None]
    assert (tmp_path / 'run' / 'model' / 'model.safetensors').is_file()


# re-identification


@pytest.mark.parametrize('model_ema', [False, True])
def test_identities(tmp_path, model_ema):
    """Batches of two processes are those of one, each whole; the ends are alike, and validation sees every image."""
    people = market(tmp_path / 'data', {
        **PEOPLE, 'bounding_box_train': [(pid, 1 + pid % 2, 8) for pid in range(2, 8)]})
    values = recipe(people, tmp_path, **{
        'model': 'dreal_reid', 'model_kwargs': {'backbone': 'test_resnet', 'backbone_args': SE}, 'num_classes': None,
        'input_size': [3, 32, 16], 'mean': [0.5] * 3, 'std': [0.25] * 3, 'eval_metric': 'mAP', 'epochs': 2,
        'model_ema': model_ema, 'model_ema_decay': 0.5, 'dreal': {'task': 'reid', 'reid': {'num_instances': 4}}})
    first, second = together(tmp_path / 'results', _run_and_tell, values, False)
    _assert_same(first['weights'], second['weights'])
    assert first['results'] == second['results']
    shared = [[step['target'].tolist() for step in process['steps']] for process in (first, second)]
    sampler = PKSampler([pid for pid in range(6) for _ in range(8)], 2, 4, seed=42)
    expected = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected += [[index // 8 for index in batch] for batch in sampler]
    assert len(expected) == 12
    assert [batch for pair in zip(*shared, strict=True) for batch in pair] == expected
    found = evaluate_reid(first['results']['model'], people, workers=0)[0]
    metrics = first['results']['metrics']
    assert {name: found[name] for name in metrics} == pytest.approx(metrics, abs=1e-4)
