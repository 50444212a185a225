import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import tasks
import timm
import torch
from networks import ATTENTION, correct_targets, make_batch, make_model
from oracle import lstm_by_hand, map_by_hand, quality_by_hand, site_inputs
from timm.layers import SEModule
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dreal_timm
from dreal_timm import DrealTask
from dreal_timm.attention.sites import attention_parameters
from dreal_timm.probes.exact import ExactProbe
from dreal_timm.train.finite import FiniteWatch
from dreal_timm.train.progress import Meter

make_task = partial(tasks.make_task, probe='exact')


def gradients_of_step(task, input, target, seed=11):
    task.zero_grad()
    torch.manual_seed(seed)
    task(input, target)['loss'].backward()
    return tasks.gradients(task.get_trainable_module(), 'model.')


def actor_gradients_by_hand(model, input, task, seed=11):
    """L_q, and its gradient at the attention parameters."""
    model = copy.deepcopy(model).train()
    inputs = site_inputs(model, input, [site.name for group in task.groups for site in group.sites], seed)
    quality = quality_by_hand(model, task.get_trainable_module().critic, task.groups, inputs)
    loss = -torch.cat(quality, dim=1).sum(1).mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def theta_names(model):
    return set(attention_parameters(model, [s for g in make_task(copy.deepcopy(model)).groups for s in g.sites]))


@pytest.mark.parametrize('kwargs', [{}, dict(drop_rate=0.2, drop_path_rate=0.2)])
def test_gradients(attention, probe, kwargs):
    """Backbone: the plain gradient. Attention: plus L_q's, by hand and linear in actor_weight. Critic: the same."""
    model = make_model(attention, **kwargs).train()
    input, _ = make_batch()
    target = correct_targets(model, input, seed=11)
    plain_task = ClassificationTask(copy.deepcopy(model), verbose=False)
    plain = gradients_of_step(plain_task, input, target)
    tasks = {w: make_task(copy.deepcopy(model), actor_weight=w, probe=probe) for w in (0.0, 1.0, 3.0)}
    grads = {weight: gradients_of_step(task, input, target) for weight, task in tasks.items()}
    loss, by_hand = actor_gradients_by_hand(model, input, tasks[1.0])
    theta = theta_names(model)
    assert set(by_hand) == theta
    for name, reference in plain.items():
        for weight in grads:
            difference = grads[weight][name] - reference
            if name not in theta:
                assert difference.norm() <= 1e-6 * reference.norm(), name
            else:  # 1e-5: the oracle's own rounding in float32
                scale = max(reference.norm(), weight * by_hand[name].norm())
                assert (difference - weight * by_hand[name]).norm() <= 1e-5 * scale, name
    assert any(by_hand[name].norm() > 1e-4 for name in theta)
    critic = [name for name in grads[0.0] if name.startswith('critic.')]
    assert critic
    for name in critic:
        assert torch.equal(grads[0.0][name], grads[1.0][name])
        assert torch.equal(grads[0.0][name], grads[3.0][name])
    torch.manual_seed(11)
    torch.testing.assert_close(tasks[1.0](input, target)['actor_loss'], loss)


@pytest.mark.parametrize('probe', ['exact', 'split'])
def test_critic_gradient_is_that_of_the_regression(attention, probe):
    """The critic's gradient is that of L_r by hand: the squared error of Q at the probed sites (Eq. 9)."""
    model = make_model(attention).train()
    input, _ = make_batch()
    task = make_task(model, probe=probe)
    target = correct_targets(model, input)
    readings = {}

    def keep(name, x):  # of the judged pass, which is the first
        if not x.is_meta:
            readings.setdefault(name, x.detach())

    for group in task.groups:
        for site in group.sites:
            module = model.get_submodule(site.name)
            module.register_forward_pre_hook(lambda m, a, name=site.name: keep(name, a[0]))
    result = task(input, target)
    result['loss'].backward()
    critic = copy.deepcopy(task.get_trainable_module().critic)
    critic.zero_grad()
    loss = 0
    for column, (group, name) in enumerate(zip(task.groups, result['probed'], strict=True)):
        rows = []
        for site in group.sites:
            x = readings[site.name]
            state = x.mean((2, 3)) if site.kind == 'channel' else x.mean(1).flatten(1)
            with torch.no_grad():
                attention_map = map_by_hand(model.get_submodule(site.name), x)
            rows.append(torch.cat([state, attention_map.flatten(1)], dim=1))
        quality = lstm_by_hand(critic[group.name].rnn, rows)
        probed = quality[[site.name for site in group.sites].index(name)][:, 0]
        reward = result['reward'][:, column]
        judged = ~reward.isnan()
        assert judged.sum() == (8 if probe == 'exact' else 8 // len(task.groups))
        torch.testing.assert_close(result['quality'][judged, column], probed[judged].detach())
        loss = loss + (probed - reward)[judged].square().mean()
    loss.backward()
    torch.testing.assert_close(result['critic_loss'], loss.detach())
    for name, parameter in task.get_trainable_module().critic.named_parameters():
        torch.testing.assert_close(parameter.grad, critic.get_parameter(name).grad, rtol=1e-4, atol=1e-7)


def test_weight_zero_is_plain_training(attention, probe):
    """With actor_weight=0, ten steps leave bit for bit the same model, buffers included, as plain training."""
    models = [make_model(attention, drop_rate=0.1, drop_path_rate=0.1) for _ in range(2)]
    tasks = [make_task(models[0], actor_weight=0.0, probe=probe), ClassificationTask(models[1], verbose=False)]
    for task in tasks:
        optimizer = create_optimizer_v2(task.get_trainable_module(), 'sgd', lr=0.05, weight_decay=1e-4)
        task.get_trainable_module().train()
        torch.manual_seed(0)
        for step in range(10):
            optimizer.zero_grad()
            task(*make_batch(seed=step))['loss'].backward()
            optimizer.step()
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def test_reinforced_training_differs():
    """With actor_weight=1 the attention parameters go another way (so that the test above can fail)."""
    models = [make_model('se') for _ in range(2)]
    for model, weight in zip(models, (0.0, 1.0), strict=True):
        task = make_task(model, actor_weight=weight)
        optimizer = create_optimizer_v2(task.get_trainable_module(), 'sgd', lr=0.05)
        for step in range(2):
            optimizer.zero_grad()
            task(*make_batch(seed=step))['loss'].backward()
            optimizer.step()
    assert not torch.equal(models[0].layer1[0].se.fc1.weight, models[1].layer1[0].se.fc1.weight)


def test_returned_dictionary(probe):
    """Keys, shapes, dtypes and graphs are those of the contract; the sum is the loss."""
    task = make_task(make_model('cbam'), actor_weight=0.5, probe=probe)
    result = task(*make_batch())
    assert set(result) == {
        'loss', 'output', 'class_loss', 'actor_loss', 'critic_loss', 'probed', 'reward', 'quality', 'right'}
    assert result['output'].shape == (8, 7)
    assert len(result['probed']) == len(task.groups) == 8
    for name in ('reward', 'quality'):
        assert result[name].shape == (8, 8)
        assert result[name].dtype == torch.float32
    logged = ('class_loss', 'actor_loss', 'critic_loss', 'reward', 'quality')
    assert not any(result[name].requires_grad for name in logged)
    expected = result['class_loss'] + 0.5 * result['actor_loss'] + result['critic_loss']
    torch.testing.assert_close(result['loss'].detach(), expected)
    result['loss'] /= 2
    result['loss'].backward()
    torch.testing.assert_close(2 * result['loss'].detach(), expected)


def test_evaluation_is_the_class_loss(attention, probe):
    """In evaluation mode and under no_grad the task is a ClassificationTask, bit for bit."""
    model = make_model(attention)
    task = make_task(copy.deepcopy(model), probe=probe)
    plain = ClassificationTask(model, verbose=False)
    input, target = make_batch()
    with torch.no_grad():
        model.train()
        first, second = task(input, target), plain(input, target)
        assert set(first) == {'loss', 'output'}
        assert torch.equal(first['output'], second['output'])
    task.get_trainable_module().eval()
    model.eval()
    first, second = task(input, target), plain(input, target)
    assert torch.equal(first['loss'], second['loss'])
    assert set(first) == {'loss', 'output'}


def test_inference_is_the_plain_network(attention, probe):
    """After training the eval model is the very network that was passed, with no hook and no critic in it."""
    model = make_model(attention)
    task = make_task(model, probe=probe)
    task(*make_batch())['loss'].backward()
    assert task.get_eval_model() is model
    assert not any(m._forward_hooks or m._forward_pre_hooks or 'forward' in vars(m) for m in model.modules())
    fresh = make_model(attention)
    fresh.load_state_dict(task.get_checkpoint_state()['state_dict'])
    input, _ = make_batch()
    assert torch.equal(model.eval()(input), fresh.eval()(input))
    first, second = (torch.export.export(m, (input,)).graph_module.code for m in (model, fresh))
    assert first == second


def test_checkpoint_has_no_critic(probe):
    """state_dict is the network's; the critic and the counters are task_state, plain and loadable by weights_only."""
    task = make_task(make_model('se'), probe=probe)
    task(*make_batch())['loss'].backward()
    state = task.get_checkpoint_state()
    assert set(state) == {'state_dict', 'task_state'}
    assert set(state['state_dict']) == set(make_model('se').state_dict())
    assert set(state['task_state']) == {'critic', 'rotation'}
    assert state['task_state']['rotation'] == {'epoch': 0, 'step': 1, 'steps_in_epoch': 1}


def test_load_checkpoint_state():
    """A checkpoint restores critic and counters; one of plain training leaves a fresh critic."""
    task = make_task(make_model('se'), seed=1)
    task(*make_batch())
    state = copy.deepcopy(task.get_checkpoint_state())
    other = make_task(make_model('se', seed=4), seed=2)
    other.load_checkpoint_state(state['state_dict'], state['task_state'])
    for name, value in task.get_trainable_module().state_dict().items():
        assert torch.equal(value, other.get_trainable_module().state_dict()[name])
    assert other.get_trainable_module().rotation.step == 1
    fresh = make_task(make_model('se', seed=4), seed=2)
    before = copy.deepcopy(fresh.get_trainable_module().critic.state_dict())
    fresh.load_checkpoint_state(state['state_dict'], None)
    assert all(torch.equal(v, before[n]) for n, v in fresh.get_trainable_module().critic.state_dict().items())


def test_parameter_groups():
    """Critic parameters take no weight decay, and lr factor 1 under layer decay; the model's own are as in timm."""
    model = make_model('se')
    model.no_weight_decay = lambda: {'conv1.0.weight'}
    module = make_task(model).get_trainable_module()
    names = {id(p): name for name, p in module.named_parameters()}
    optimizer = create_optimizer_v2(module, 'adamw', lr=1.0, weight_decay=0.1, layer_decay=0.5)
    for group in optimizer.param_groups:
        for p in group['params']:
            name = names[id(p)]
            if name.startswith('critic.'):
                assert group['weight_decay'] == 0
                assert group['lr_scale'] == 1.0
            if name in ('model.conv1.0.weight', 'model.bn1.weight'):
                assert group['weight_decay'] == 0
            if name == 'model.layer1.0.conv1.weight':
                assert group['weight_decay'] == 0.1
            if name.startswith('model.layer1'):
                assert group['lr_scale'] < 1.0
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(names)


def test_clip_parameters():
    """The critic is not clipped; exclude_head leaves out the classifier and nothing else."""
    model = make_model('se')
    task = make_task(model)
    assert {id(p) for p in task.get_clip_parameters()} == {id(p) for p in model.parameters()}
    head = {id(p) for p in model.fc.parameters()}
    assert {id(p) for p in task.get_clip_parameters(exclude_head=True)} == {id(p) for p in model.parameters()} - head


def test_every_critic_parameter_has_a_gradient(probe):
    """Also in a batch in which no sample is right, and one in which nothing can be judged."""
    model = make_model('cbam')
    task = make_task(model, probe=probe)
    input, _ = make_batch()
    target = (correct_targets(model.train(), input, wrong=0, seed=0) + 1) % 7
    torch.manual_seed(0)
    result = task(input, target)
    judged = ~result['reward'].isnan()
    assert judged.sum() == {'exact': 64, 'split': 8, 'taylor': 0}[probe]
    assert (result['reward'][judged] == -1).all()
    result['loss'].backward()
    assert all(p.grad is not None for p in task.get_trainable_module().parameters())


def test_epochs():
    """An epoch begins at train() of the trainable module after a step, or at set_epoch(); the draw follows."""
    model = timm.create_model('dreal_se_resnet18', num_classes=7, zero_init_last=False)
    task = make_task(model, input_size=(3, 32, 32))
    batch = make_batch(batch_size=2, size=32)
    module = task.get_trainable_module()
    probed = []
    for _ in range(2):
        module.train()
        probed += [task(*batch)['probed'] for _ in range(2)]
        task.get_eval_model().eval()
    assert probed[0] == probed[1]
    assert probed[2] == probed[3]
    assert all(a != b for a, b in zip(probed[0], probed[2], strict=True))
    task.set_epoch(0)
    module.train()
    assert task(*batch)['probed'] == probed[0]


def test_rotate_each_step():
    """rotate='step' probes the other block of each stage in the next step."""
    model = timm.create_model('dreal_se_resnet18', num_classes=7)
    task = make_task(model, input_size=(3, 32, 32), rotate='step')
    batch = make_batch(batch_size=2, size=32)
    assert task(*batch)['probed'] != task(*batch)['probed']


def test_soft_targets():
    """Soft targets are judged by their arg max."""
    model = make_model('se').train()
    input, _ = make_batch()
    target = correct_targets(model, input, seed=11)
    soft = torch.full((8, 7), 0.05).scatter(1, target[:, None], 0.7)
    rewards = []
    for criterion, labels in ((None, target), (SoftTargetCrossEntropy(), soft)):
        task = make_task(copy.deepcopy(model), criterion=criterion)
        torch.manual_seed(11)
        rewards.append(task(input, labels)['reward'])
    assert torch.equal(*rewards)


def test_frozen_attention():
    """Frozen attention parameters are skipped by L_q; all of them frozen is an error, at once and later."""
    model = make_model('se')
    for name, parameter in model.named_parameters():
        parameter.requires_grad = 'layer4.0.se' in name
    task = make_task(model)
    task(*make_batch())['loss'].backward()
    assert all((p.grad is not None) == ('layer4.0.se' in name) for name, p in model.named_parameters())
    for parameter in model.layer4[0].se.parameters():
        parameter.requires_grad = False
    with pytest.raises(ValueError, match='frozen'):
        task(*make_batch())
    with pytest.raises(ValueError, match='frozen'):
        make_task(model)


@pytest.mark.parametrize('probe_every', [2, 3])
def test_a_reward_every_so_many_steps(probe, probe_every):
    """Between probed steps there are no rewards, the critic rests, and L_q teaches all the same."""
    task = make_task(make_model('se'), probe=probe, probe_every=probe_every, rotate='step')
    input, target = make_batch()
    for step in range(2 * probe_every):
        task.zero_grad()
        result = task(input, target)
        result['loss'].backward()
        module = task.get_trainable_module()
        judged = step % probe_every == (probe == 'taylor')
        assert bool((~result['reward'].isnan()).any()) == judged, step
        critic = sum(p.grad.abs().sum() for p in module.critic.parameters())
        assert (critic > 0) == judged
        assert result['actor_loss'].isfinite()
        if not judged:
            assert result['critic_loss'] == 0


def test_rotation_counts_probed_steps():
    """With rotate='step' each probed step draws anew, so that every site of a group is seen in turn."""
    model = timm.create_model('dreal_se_resnet18', num_classes=7)
    task = make_task(model, input_size=(3, 32, 32), rotate='step', probe_every=2)
    batch = make_batch(batch_size=2, size=32)
    probed = [tuple(task(*batch)['probed']) for _ in range(4)]
    assert probed[0] == probed[1] != probed[2] == probed[3]


@pytest.mark.parametrize('kwargs', [
    dict(critic_cell='gru'), dict(critic_hidden_size=4), dict(critic_depth=2),
    dict(critic_cell='gru', critic_hidden_size=3, critic_depth=2),
])
def test_critic_options(kwargs):
    """Other critics train as well: every parameter has a gradient, and some of each are not zero."""
    task = make_task(make_model('cbam'), **kwargs)
    task(*make_batch())['loss'].backward()
    assert all(p.grad is not None for p in task.get_trainable_module().critic.parameters())
    assert any(p.grad.abs().sum() > 0 for p in task.get_trainable_module().critic.parameters())


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(gamma=-1.0, reward_clip=None), 'gamma'), (dict(actor_weight=-1.0), 'actor_weight'),
    (dict(actor_weight=float('nan')), 'actor_weight'), (dict(gamma=2.0), 'reward_clip'), (dict(gamma=0.0), 'gamma'),
    (dict(probe='guess'), "'exact', 'split', 'taylor'"), (dict(probe_every=0), 'probe_every'),
    (dict(probe='taylor', probe_dtype='float32'), 'probe_dtype'), (dict(taylor_target='loss'), 'taylor_target'),
    (dict(probe_dtype='float16'), 'float32'), (dict(rotate='never'), 'rotate'), (dict(critic_cell='rnn'), 'lstm'),
    (dict(input_size=(64, 64)), 'C, H, W'),
])
def test_wrong_options(kwargs, message):
    """Wrong options raise a ValueError that says what is accepted."""
    with pytest.raises(ValueError, match=message):
        make_task(make_model('se'), **kwargs)


def test_gamma_beyond_the_literal_equation():
    """Without a clip any gamma is allowed, and wrong samples get it."""
    task = make_task(make_model('se'), gamma=3.0, reward_clip=None)
    assert task(*make_batch())['reward'].min() == -3.0


def test_wrapped_and_half_models():
    """A compiled network is refused, and so are float32 rewards of a network that has no float32 weights."""
    with pytest.raises(ValueError, match='plain network'):
        make_task(torch.compile(make_model('se'), backend='eager'))
    with pytest.raises(ValueError, match='float32 weights'):
        make_task(make_model('se').to(torch.bfloat16), probe_dtype='float32')


@pytest.mark.parametrize('label', [-100, 6])
def test_ignored_labels_are_not_probed(label):
    """A label that the criterion ignores has no reward; the other samples keep theirs."""
    model = make_model('se').train()
    input, _ = make_batch()
    target = correct_targets(model, input, seed=11)
    ignored = target.clone()
    ignored[1] = label
    rewards = []
    for labels in (target, ignored):
        task = make_task(copy.deepcopy(model), criterion=nn.CrossEntropyLoss(ignore_index=label))
        torch.manual_seed(11)
        result = task(input, labels)
        result['loss'].backward()
        rewards.append(result['reward'])
    assert rewards[1][1].isnan().all()
    keep = [0, *range(2, 8)]
    assert torch.equal(rewards[0][keep], rewards[1][keep])


def test_a_broken_critic_leaves_plain_training_alone(probe):
    """With actor_weight=0 not even NaN weights of the critic reach the network."""
    model = make_model('se')
    task = make_task(model, actor_weight=0.0, probe=probe)
    with torch.no_grad():
        for parameter in task.get_trainable_module().critic.parameters():
            parameter.fill_(float('nan'))
    task(*make_batch())['loss'].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_model_without_sites_is_refused():
    """The error says what a site is and how to find networks that have some."""
    with pytest.raises(ValueError, match=r'find_sites.*register_attention'):
        DrealTask(timm.create_model('resnet18'), verbose=False)


@pytest.mark.parametrize(('name', 'kwargs'), [
    ('seresnet50', {}), ('resnet50', dict(block_args=dict(attn_layer='cbam'))), ('seresnet18', {}),
])
def test_plain_timm_networks(name, kwargs):
    """timm's own SE and CBAM networks train as they are."""
    model = timm.create_model(name, num_classes=5, zero_init_last=False, **kwargs)
    task = make_task(model, input_size=(3, 32, 32))
    result = task(*make_batch(batch_size=2, size=32, num_classes=5))
    result['loss'].backward()
    assert result['reward'].isfinite().all()


def test_critic_size_is_the_papers():
    """The critic adds 4 x (2N + 1) weights and 8 biases a group: 28.088M becomes 28.119M (Table 1)."""
    model = timm.create_model('dreal_se_resnet50', device='meta')
    task = DrealTask(model, verbose=False)
    critic = sum(p.numel() for p in task.get_trainable_module().critic.parameters())
    assert critic == 30_736 + 32
    assert round((sum(p.numel() for p in model.parameters()) + critic) / 1e6, 3) == 28.119


def test_gradient_checkpointing(attention, probe):
    """Gradient checkpointing changes neither rewards nor gradients."""
    model = make_model(attention, drop_path_rate=0.2).train()
    input, _ = make_batch()
    target = correct_targets(model, input, seed=11)
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing(True)
    first, second = (gradients_of_step(make_task(m, probe=probe), input, target) for m in (model, checkpointed))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-7)


def test_low_precision_model(probe):
    """A bfloat16 model trains; its critic stays in float32."""
    task = make_task(make_model('se').to(torch.bfloat16), probe=probe)
    input, target = make_batch(dtype=torch.bfloat16)
    result = task(input, target)
    result['loss'].backward()
    assert result['quality'].dtype == result['reward'].dtype == torch.float32
    assert {p.dtype for p in task.get_trainable_module().critic.parameters()} == {torch.float32}


def test_other_image_size(caplog, probe):
    """CBAM's spatial critics pool maps of other images to the size they were built for."""
    task = make_task(make_model('cbam'), input_size=(3, 64, 64), probe=probe)
    with caplog.at_level('INFO'):
        task(*make_batch(size=96))['loss'].backward()
    assert any('pooled' in record.message for record in caplog.records)


@pytest.mark.filterwarnings('ignore')  # of the compiler's own
def test_compile(probe):
    """A compiled task has the losses, rewards and gradients of an eager one, over several steps and epochs."""
    model = make_model('cbam').train()
    input, _ = make_batch()
    target = correct_targets(model, input)
    eager, compiled = (make_task(copy.deepcopy(model), probe=probe) for _ in range(2))
    compiled.compile(backend='aot_eager')
    for step in range(6):
        results = [task(input, target) for task in (eager, compiled)]
        for key in ('loss', 'reward', 'quality'):
            torch.testing.assert_close(results[0][key], results[1][key], rtol=1e-4, atol=1e-5, equal_nan=True)
        assert results[0]['reward'].isnan().all() == (probe == 'taylor' and step % 2 == 0)
        for result in results:
            result['loss'].backward()
        if step % 2:
            for task in (eager, compiled):
                task.get_trainable_module().train()
    pairs = zip(eager.parameters(), compiled.parameters(), strict=False)
    for first, second in pairs:
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-3, atol=1e-4)
    assert compiled._trainable.rotation.epoch == 3
    assert set(compiled.get_checkpoint_state()['state_dict']) == set(model.state_dict())
    compiled.get_eval_model().eval()
    eager.get_eval_model().eval()
    with torch.no_grad():
        logits = [task.get_eval_model()(input) for task in (eager, compiled)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings('ignore')  # of the compiler's own
def test_inductor_replays_dropout():
    """Compiled by inductor, the judged pass draws masks that a probe can draw again: rewards are those of eager."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), SEModule(8), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7),
    )
    input, _ = make_batch(size=8)
    rewards = []
    for compiled in (False, True):
        task = make_task(copy.deepcopy(model), input_size=(3, 8, 8))
        if compiled:
            task.compile(mode='default')
        torch.manual_seed(11)
        target = task.get_trainable_module().train()(input).output.argmax(dim=1)
        torch.manual_seed(11)
        rewards.append(task(input, target)['reward'])
    assert (rewards[0] != -1).all()
    torch.testing.assert_close(*rewards, rtol=0, atol=1e-5)


def test_public_surface():
    """The names of the README are there."""
    assert isinstance(dreal_timm.__version__, str)
    assert issubclass(dreal_timm.DrealTask, ClassificationTask)
    assert {'find_sites', 'register_attention', 'MapReader', 'Critic'} <= set(dir(dreal_timm))


class Copies(TorchDispatchMode):
    """Counts the copies from the CPU to the meta device, and those of them that the host would wait for."""

    def __init__(self):
        super().__init__()
        self.count, self.blocking = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith('index') and isinstance(args[1], (list, tuple)) and args[0].device.type == 'meta':
            self.blocking += any(index is not None and index.device.type == 'cpu' for index in args[1])
        if name in ('_to_copy', 'copy_') and output.device.type == 'meta':
            source = args[1] if name == 'copy_' else args[0]
            if source.device.type == 'cpu':
                waits = not (kwargs or {}).get('non_blocking', args[2] if len(args) > 2 else False)
                self.count, self.blocking = self.count + 1, self.blocking + waits
        return output


@pytest.mark.parametrize('attention', ATTENTION)
def test_one_look_at_the_device_a_step(attention, probe, monkeypatch):
    """A step reads one number from the device at most, how many samples are right, and only where some may stay behind;
    it sends nothing there that the host would wait for, nor do the meter and the watch over the loss.

    On the meta device, as on an accelerator, nothing can be read without the host waiting for it: there it is an error.
    """
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())  # has no meta device
    model = make_model(attention, drop_path_rate=0.1).to('meta')
    task = make_task(model, probe=probe, device=torch.device('meta'))
    input, target = (tensor.to('meta') for tensor in make_batch(size=48))

    groups = {site.name: group.name for group in task.groups for site in group.sites}
    meter, watch, copies = Meter(groups), FiniteWatch(), Copies()

    def step():
        with copies:
            result = task(input, target)
            result['loss'].backward()
            meter.update(result, target)
            watch.update(0, result)
        return result

    looks = []
    rows = ExactProbe._rows
    monkeypatch.setattr(ExactProbe, '_rows', lambda self, right: looks.append(right.shape))
    assert step()['reward'].shape[0] == len(input)
    copies.count, copies.blocking = 0, 0  # the first step of a process asks more
    for _ in range(2):
        assert step()['reward'].shape[0] == len(input)
    assert copies.count
    assert copies.blocking == 0
    assert len(looks) == (3 if probe == 'exact' else 0)
    if probe == 'exact':
        monkeypatch.setattr(ExactProbe, '_rows', rows)
        with pytest.raises((RuntimeError, NotImplementedError), match='meta'):
            step()


@pytest.mark.parametrize('probe', ['exact', 'split', 'taylor'])
def test_a_task_can_be_pickled(probe):
    """A task out of pickle, as Lightning or a spawned process have it, learns on to the bit as the one it came from."""
    task = make_task(make_model('se').train(), probe=probe)
    input, target = make_batch()
    first = gradients_of_step(task, input, target)
    again = pickle.loads(pickle.dumps(task))
    for seed in (1, 2):
        one, two = gradients_of_step(task, input, target, seed), gradients_of_step(again, input, target, seed)
        assert one.keys() == two.keys() == first.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
