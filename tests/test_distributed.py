"""Two gloo processes against one"""
import os
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from networks import make_batch, make_model
from study.task import StudyTask
from tasks import free_port
from timm.task import TrainingTask

from dreal_timm import DrealTask


def _make_task(probe: str) -> TrainingTask:
    model = make_model('cbam', group_norm=True)
    task = DrealTask(model, verbose=False, input_size=(3, 48, 48), probe=probe)
    task.get_trainable_module().train()
    for module in model.modules():  # statistics of a part of a batch differ: off, as the parity asks
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return task


def _steps(task: TrainingTask, input: torch.Tensor, target: torch.Tensor, probe: str) -> dict:
    """Run a step, or the two that taylor needs to give rewards; the gradients are the sum of both."""
    result = task(input, target)
    result['loss'].backward()
    if probe == 'taylor':
        result = task(input, target)
        result['loss'].backward()
    return result


def _worker(rank: int, port: int, path: str, probe: str) -> None:
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    task = _make_task(probe)
    task.prepare_distributed()
    input, target = make_batch(batch_size=8, size=48)
    # the second process has no sample that is right: its rewards are all -gamma
    with torch.no_grad():
        target[4:] = (task.get_eval_model()(input[4:]).argmax(1) + 1) % 7
    half = slice(4 * rank, 4 * rank + 4)
    result = _steps(task, input[half], target[half], probe)
    state = {
        'probed': result['probed'],
        'reward': result['reward'],
        'grads': {n.removeprefix('module.'): p.grad for n, p in task.get_trainable_module().named_parameters()},
    }
    torch.save(state, f'{path}/{rank}.pt')
    dist.destroy_process_group()


def _training_worker(rank: int, port: int, path: str, probe: str, options: dict) -> None:
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    kind = StudyTask if options else DrealTask
    task = kind(make_model('cbam'), verbose=False, input_size=(3, 48, 48), rotate='step', probe=probe, **options)
    task.prepare_distributed()
    module = task.get_trainable_module()
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    for step in range(4):
        batch = make_batch(batch_size=4, size=48, seed=10 * step + rank)
        with task.no_sync() if step % 2 == 0 else nullcontext():
            task(*batch)['loss'].backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    module.eval()
    loss = task(*make_batch(batch_size=4, size=48, seed=rank))['loss']
    loss.backward()
    torch.save({
        'parameters': dict(module.named_parameters()),
        'grads': {name: p.grad for name, p in module.named_parameters()},
        'rotation': module.module.rotation.state_dict(),
    }, f'{path}/{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.parametrize(('probe', 'options'), [
    ('exact', {}), ('split', {}), ('taylor', {}), ('split', {'actor_share': 0.3, 'critic_standardized': True}),
    ('taylor', {'actor': 'direct', 'actor_share': 0.3, 'wrong_samples': 'measure', 'reward_form': 'log'})])
def test_two_processes_train(tmp_path, probe, options):
    """With batch norm in training mode and no_sync, both processes keep equal weights; so they do in eval mode."""
    torch.multiprocessing.spawn(_training_worker, args=(free_port(), str(tmp_path), probe, options), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2))
    assert first['rotation'] == second['rotation'] == {'epoch': 0, 'step': 4, 'steps_in_epoch': 4}
    for kind in ('parameters', 'grads'):
        for name, value in first[kind].items():
            assert torch.equal(value, second[kind][name]), (kind, name)
            assert value.isfinite().all()


def _static_worker(rank: int, port: int, path: str, probe: str) -> None:
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    task = DrealTask(make_model('se'), verbose=False, input_size=(3, 48, 48), probe=probe)
    task.prepare_distributed(static_graph=True)
    module = task.get_trainable_module()
    module.train()
    for step in range(3):
        module.zero_grad()
        task(*make_batch(batch_size=4, size=48, seed=10 * step + rank))['loss'].backward()
    torch.save({name: p.grad for name, p in module.named_parameters()}, f'{path}/{rank}.pt')
    dist.destroy_process_group()


def test_static_graph(tmp_path, probe):
    """DDP finds the tensors in what the module returns, also where it looks for them with pytree."""
    torch.multiprocessing.spawn(_static_worker, args=(free_port(), str(tmp_path), probe), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2))
    assert sum(gradient.abs().sum() for gradient in first.values()) > 0
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name


def test_two_processes_equal_one(tmp_path, probe):
    """Two processes have the gradients of one on the joined batch, judge the same sites, and do not hang."""
    torch.multiprocessing.spawn(_worker, args=(free_port(), str(tmp_path), probe), nprocs=2)
    parts = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2)]
    # split draws which group a sample answers for from the batch of a process: its rewards are those of exact
    task = _make_task('exact' if probe == 'split' else probe)
    input, target = make_batch(batch_size=8, size=48)
    with torch.no_grad():
        target[4:] = (task.get_eval_model()(input[4:]).argmax(1) + 1) % 7
    result = _steps(task, input, target, probe)
    assert parts[0]['probed'] == parts[1]['probed'] == result['probed']
    rewards = torch.cat([part['reward'] for part in parts])
    judged = ~rewards.isnan()
    assert judged.sum() == (8 if probe == 'split' else rewards.numel())
    assert (rewards[4:][judged[4:]] == -1).all()
    torch.testing.assert_close(rewards[judged], result['reward'][judged], rtol=0, atol=1e-5)
    for name, parameter in task.get_trainable_module().named_parameters():
        torch.testing.assert_close(parts[0]['grads'][name], parts[1]['grads'][name], rtol=0, atol=0)
        if probe != 'split' or not name.startswith('critic.'):
            torch.testing.assert_close(parts[0]['grads'][name], parameter.grad, rtol=1e-5, atol=1e-6)
