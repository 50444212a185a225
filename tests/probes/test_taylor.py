import copy
import io
import os
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import pytest
import tasks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from equal import assert_equal
from networks import correct_targets, make_batch, make_model
from oracle import map_by_hand, quality_by_hand
from timm.layers import SEModule, set_reentrant_ckpt
from timm.layers.cbam import ChannelAttn, SpatialAttn
from timm.loss import (
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    PolyCrossEntropy,
    SoftTargetCrossEntropy,
)
from timm.task import ClassificationTask
from timm_loop import train
from torch import nn

from dreal_timm import DrealTask
from dreal_timm.layers import SrmModule

MODES = ('batch_norm', 'frozen_batch_norm', 'group_norm')
RIGHT = torch.tensor([True, True, False, False])

make_task = partial(tasks.make_task, probe='taylor', input_size=(3, 48, 48))


def prepare(attention='se', mode='batch_norm', dtype=torch.float32, **kwargs):
    """A model in training mode, two blocks in its first stage, with batch norms frozen or absent if so asked."""
    kwargs.setdefault('layers', (2, 1, 1, 1))
    model = make_model(attention, group_norm=mode == 'group_norm', **kwargs).to(dtype).train()
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        # also with group norm: the gates of SRM and of CBAM's spatial attention have a batch norm of their own
        if isinstance(module, nn.BatchNorm2d) and mode != 'batch_norm':
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.eval()
    return model


def make_case(attention='se', mode='batch_norm', dtype=torch.float32, batch_size=4, size=48, **kwargs):
    """A model, images, and targets of which the last two are wrong."""
    model = prepare(attention, mode, dtype, **kwargs)
    input, _ = make_batch(batch_size, size, dtype=dtype)
    return model, input, correct_targets(model, input, seed=11)


def step(task, input, target, backward=lambda result: result['loss'].backward(), seed=11):
    """One step without an update."""
    task.zero_grad()
    torch.manual_seed(seed)
    result = task(input, target)
    backward(result)
    return result


def rewards_of(task, input, target, backward=lambda result: result['loss'].backward()):
    """The rewards of a batch, which the step after reports."""
    step(task, input, target, backward)
    return step(task, input, target)['reward']


def sites_by_hand(model):
    return [n for n, m in model.named_modules() if isinstance(m, (SEModule, ChannelAttn, SpatialAttn, SrmModule))]


def theta_names(model):
    return {f'{site}.{name}' for site in sites_by_hand(model)
            for name, _ in model.get_submodule(site).named_parameters()}


def log_p(target):
    """The log-probability of each sample's class, (B,), 0 for a label that is no class."""
    return lambda logits: torch.stack([
        logits[i].log_softmax(0)[c] if 0 <= c < logits.shape[1] else 0 * logits[i, 0]
        for i, c in enumerate(target.tolist())
    ])


def first_order(model, input, terms, sites, coupled=False, seed=11):
    """Change of each sample's term to first order where a map becomes its mean, (B, P), with the map as a leaf.

    Args:
        model: The network; samples that are not `coupled` by batch statistics are differentiated one by one.
        input: Images.
        terms: From logits (B, K) to a term for each sample, (B,).
        sites: Names of the modules.
        coupled: Differentiate the sum of all terms.
        seed: Seed of the dropout masks.
    """
    model = copy.deepcopy(model)
    columns = []
    for site in sites:
        module = model.get_submodule(site)
        leaves = []

        def forward(x):
            leaves.append(map_by_hand(module, x).detach().requires_grad_())
            return x * leaves[0]

        module.forward = forward
        torch.manual_seed(seed)
        values = terms(model(input))
        del module.forward
        leaf, = leaves
        if coupled:
            gradient, = torch.autograd.grad(values.sum(), leaf)
        else:
            rows = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in values]
            gradient = torch.stack([row[i] for i, row in enumerate(rows)])
        mean = leaf.mean((1, 2, 3), keepdim=True)
        columns.append((gradient * (mean - leaf)).sum((1, 2, 3)).detach())
    return torch.stack(columns, dim=1)


def reward_by_hand(change, right, gamma=1.0, clip=1.0):
    rows = []
    for values, is_right in zip(change, right.tolist(), strict=True):
        rows.append((1 - values.exp()).clamp(-clip, clip) if is_right else torch.full_like(values, -gamma))
    return torch.stack(rows)


def keep_inputs(model):
    """A dict that is filled with the inputs of all sites when the model runs, and the handles of its hooks."""
    inputs, handles = {}, []
    for site in sites_by_hand(model):
        module = model.get_submodule(site)
        handles.append(module.register_forward_pre_hook(
            lambda m, args, site=site: inputs.update({site: args[0].detach()})))
    return inputs, handles


@pytest.mark.parametrize('mode', MODES)
def test_change_and_reward_equal_the_oracle(attention, mode):
    """At all sites, change and reward are those of a gradient by hand: of each sample alone, or of a coupled batch."""
    model, input, target = make_case(attention, mode, torch.float64, drop_rate=0.2, drop_path_rate=0.3)
    names = sites_by_hand(model)
    expected = first_order(model, input, log_p(target), names, coupled=mode == 'batch_norm')
    clip = expected[:2].abs().quantile(0.75).item()  # so that some are clipped
    task = make_task(model, gamma=clip / 2, reward_clip=clip)
    step(task, input, target)
    change = task.measure.pending.change()
    result = step(task, input, target)
    assert sorted(result['probed']) == sorted(names)
    expected = expected[:, [names.index(name) for name in result['probed']]]
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)  # maps are kept in float32
    assert torch.equal(result['right'], RIGHT)
    assert result['reward'].dtype == torch.float32
    rewards = reward_by_hand(expected, RIGHT, gamma=clip / 2, clip=clip)
    torch.testing.assert_close(result['reward'].double(), rewards, rtol=0, atol=1e-6)
    assert (rewards[2:] == -clip / 2).all()
    assert (rewards[:2].abs() == clip).any()
    assert ((rewards[:2].abs() > 1e-3) & (rewards[:2].abs() < clip)).any()


def test_coupling_is_a_part_of_the_estimate():
    """In a batch norm a map moves other samples too: the estimate differs from that of each sample alone."""
    model, input, target = make_case('se', 'batch_norm', torch.float64)
    sites = sites_by_hand(model)[:3:2]
    alone, coupled = (first_order(model, input, log_p(target), sites, coupled=c) for c in (False, True))
    assert (alone - coupled).abs().max() > 1e-3
    model, input, target = make_case('se', 'group_norm', torch.float64)
    alone, coupled = (first_order(model, input, log_p(target), sites, coupled=c) for c in (False, True))
    torch.testing.assert_close(alone, coupled, rtol=1e-9, atol=1e-12)


def test_estimate_is_the_limit_of_small_changes(attention):
    """(log p' - log p) / eps of a map that goes a part eps of the way to its mean tends to the estimate."""
    model, input, target = make_case(attention, 'group_norm', torch.float64)
    twin = copy.deepcopy(model)
    task = make_task(model)
    step(task, input, target)
    change = task.measure.pending.change()
    names = step(task, input, target)['probed']
    errors = []
    with torch.no_grad():
        log_probs = log_p(target)(twin(input))
        for eps in (1e-3, 1e-5):  # in between are kinks of ReLU
            columns = []
            for name in names:
                module = twin.get_submodule(name)

                def forward(x):
                    attention_map = map_by_hand(module, x)
                    return x * ((1 - eps) * attention_map + eps * attention_map.mean((1, 2, 3), keepdim=True))

                module.forward = forward
                columns.append((log_p(target)(twin(input)) - log_probs) / eps)
                del module.forward
            errors.append((torch.stack(columns, dim=1) - change).abs().max() / change.abs().max())
    assert errors[0] < 0.1
    assert errors[1] < 1e-4


def _divided(result):
    result['loss'] /= 4
    result['loss'].backward()


def _through_a_scaler(result):
    torch.amp.GradScaler('cpu').scale(result['loss']).backward()


def _twice(result):
    result['loss'].backward(retain_graph=True)
    (5 * result['loss']).backward()


def test_scale_of_the_loss_does_not_matter():
    """Whatever factor a loop puts between the loss and backward(), the rewards are the same."""
    model, input, target = make_case('cbam', drop_rate=0.2, drop_path_rate=0.3)
    ways = {
        'divided in place': _divided,
        'gradient scaler': _through_a_scaler,
        'twice': _twice,
        'loss scale': lambda result: (result['loss'] * 2 ** 16).backward(),
        'copy': lambda result: (result['loss'] * 3).backward(),
        'gradient to start from': lambda result: result['loss'].backward(torch.tensor(0.1)),
        'sum': lambda result: (result['loss'] / 8 + result['loss']).backward(),
        'negative': lambda result: (-result['loss']).backward(),
        'plain': lambda result: result['loss'].backward(),
    }
    task = make_task(model)
    plain = rewards_of(task, input, target)
    assert (plain[:2].abs() > 1e-2).any()
    for way, backward in ways.items():
        rewards = rewards_of(task, input, target, backward)
        torch.testing.assert_close(rewards, plain, rtol=1e-4, atol=1e-6, msg=lambda m: f'{way}: {m}')


def test_accumulation():
    """Of micro-batches whose gradients are summed, each has the rewards that it has alone."""
    model, input, target = make_case(batch_size=9)
    batches = [(input[a:b], target[a:b]) for a, b in ((0, 3), (3, 6), (6, 9), (0, 4))]
    alone = [rewards_of(make_task(copy.deepcopy(model)), *batch) for batch in batches]
    task = make_task(model)
    together = []
    for batch in [*batches, batches[0]]:
        result = task(*batch)
        result['loss'] /= 5
        result['loss'].backward()
        together.append(result['reward'])
    assert not torch.equal(alone[0] == -1, alone[2] == -1)
    for first, second in zip(alone, together[1:], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_autocast(attention):
    """Under bf16 autocast, with a loss scale or without, rewards are near those of float32."""
    model, input, target = make_case(attention, 'frozen_batch_norm', batch_size=6)
    plain = rewards_of(make_task(copy.deepcopy(model)), input, target)
    task = make_task(model)
    for loss_scale in (1, 2 ** 16):
        for _ in range(2):
            with torch.autocast('cpu', dtype=torch.bfloat16):
                result = task(input, target)
            (loss_scale * result['loss']).backward()
        both = result['right'] & (torch.arange(6) < 4)
        assert both.sum() >= 3
        error = result['reward'][both] - plain[both]
        assert result['reward'].dtype == torch.float32
        assert 0 < error.norm() < 0.2 * plain[both].norm()


def test_low_precision_model():
    """A bfloat16 model has finite rewards, in float32."""
    model, input, target = make_case()
    task = make_task(model.to(torch.bfloat16))
    rewards = rewards_of(task, input.to(torch.bfloat16), target)
    assert rewards.dtype == torch.float32
    assert rewards.isfinite().all()


def test_critic_learns_one_step_later(attention):
    """The first step of an epoch teaches the critic nothing, the second one the rewards of the batch before."""
    model, input, target = make_case(attention)
    task = make_task(model)
    critic = task.get_trainable_module().critic
    inputs, handles = keep_inputs(model)
    first = step(task, input, target)
    for handle in handles:
        handle.remove()
    judged = copy.deepcopy(model)
    change = task.measure.pending.change()
    number = len(sites_by_hand(model))
    for name in ('reward', 'quality'):
        assert first[name].shape == (4, number)
        assert first[name].isnan().all()
    assert first['critic_loss'] == 0
    assert first['loss'].isfinite()
    assert all((p.grad == 0).all() for p in critic.parameters())
    with torch.no_grad():  # an update of both
        for p in model.parameters():
            p.sub_(0.05 * p.grad)
        for p in critic.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    second = step(task, *make_batch(batch_size=5, size=48, seed=7))
    assert second['output'].shape == (5, 7)
    assert second['reward'].shape == second['quality'].shape == (4, number)
    assert not second['reward'].requires_grad
    assert sorted(second['probed']) == sorted(first['probed']) == sorted(sites_by_hand(model))
    assert torch.equal(second['right'], RIGHT)
    torch.testing.assert_close(second['reward'], reward_by_hand(change, RIGHT), rtol=1e-5, atol=1e-6)
    # the regression by hand: maps of the first batch and of the network at that time, critic of now
    by_hand = copy.deepcopy(critic)
    by_hand.zero_grad()
    qualities = quality_by_hand(judged, by_hand, task.groups, inputs)
    torch.testing.assert_close(second['quality'], torch.cat(qualities, dim=1).detach(), rtol=1e-4, atol=1e-6)
    widths = [quality.shape[1] for quality in qualities]
    assert max(widths) == 2
    rewards = second['reward'].split(widths, dim=1)
    loss = sum((q - r).square().mean() for q, r in zip(qualities, rewards, strict=True))
    loss.backward()
    torch.testing.assert_close(second['critic_loss'], loss.detach())
    for name, parameter in critic.named_parameters():
        torch.testing.assert_close(parameter.grad, by_hand.get_parameter(name).grad, rtol=1e-3, atol=1e-6)
        assert parameter.grad.norm() > 1e-4 or 'weight_hh' in name, name
    third = step(task, input, target)
    assert third['reward'].shape == (5, number)
    assert third['right'].shape == (5,)


def test_returned_dictionary():
    """Keys are those of the other probes, in every step, and the sum is the loss."""
    task = make_task(prepare('cbam'), actor_weight=0.5)
    for _ in range(2):
        result = step(task, *make_batch(batch_size=4, size=48))
        assert set(result) == {
            'loss', 'output', 'class_loss', 'actor_loss', 'critic_loss', 'probed', 'reward', 'quality', 'right'}
        logged = ('class_loss', 'actor_loss', 'critic_loss', 'reward', 'quality')
        assert not any(result[name].requires_grad for name in logged)
        expected = result['class_loss'] + 0.5 * result['actor_loss'] + result['critic_loss']
        torch.testing.assert_close(result['loss'].detach(), expected)
    assert expected > result['class_loss'] + 0.5 * result['actor_loss']


def test_gradients(attention):
    """Backbone: the plain gradient, bit for bit. Attention: plus actor_weight times that of L_q, by hand."""
    model, input, target = make_case(attention, drop_rate=0.2, drop_path_rate=0.3)
    plain = ClassificationTask(copy.deepcopy(model), verbose=False)
    logits = step(plain, input, target)['output']
    reference = tasks.gradients(plain.get_trainable_module(), 'model.')
    theta = theta_names(model)
    judged = copy.deepcopy(model)
    inputs, _ = keep_inputs(judged)
    torch.manual_seed(11)
    judged(input)
    for weight in (0.0, 1.0, 3.0):
        task = make_task(copy.deepcopy(model), actor_weight=weight)
        judged.zero_grad()
        qualities = quality_by_hand(judged, task.get_trainable_module().critic, task.groups, inputs)
        (-torch.cat(qualities, dim=1).sum(dim=1).mean()).backward()
        by_hand = {name: p.grad for name, p in judged.named_parameters() if p.grad is not None}
        assert set(by_hand) == theta
        for number in range(2):  # in the second one the critic learns
            result = step(task, input, target)
            assert (result['critic_loss'] > 0) == bool(number)
            assert torch.equal(result['output'], logits)
            grads = tasks.gradients(task.get_trainable_module(), 'model.')
            for name, value in reference.items():
                if name not in theta or not weight:
                    assert torch.equal(grads[name], value), name
                else:
                    difference, scale = grads[name] - value, max(value.norm(), weight * by_hand[name].norm())
                    assert (difference - weight * by_hand[name]).norm() <= 1e-5 * scale, name
        assert any(by_hand[name].norm() > 1e-4 for name in theta)


def test_weight_zero_is_plain_training(attention):
    """With actor_weight=0, ten steps leave bit for bit the same model, buffers included, as plain training."""
    models = [make_model(attention, drop_rate=0.1, drop_path_rate=0.1) for _ in range(2)]
    tasks = [make_task(models[0], actor_weight=0.0), ClassificationTask(models[1], verbose=False)]
    outputs = []
    for task in tasks:
        module = task.get_trainable_module()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(0)
        for number in range(10):
            if number % 4 == 0:
                module.train()
            optimizer.zero_grad()
            result = task(*make_batch(batch_size=4, size=48, seed=number))
            result['loss'].backward()
            optimizer.step()
        outputs.append(result['output'])
    assert torch.equal(*outputs)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def test_frozen_backbone():
    """Sites below the only trainable layers are measured too, and frozen parameters keep no gradient."""
    model, input, target = make_case('se', 'group_norm', torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = 'layer4.0.se' in name
    task = make_task(model)
    step(task, input, target)
    change = task.measure.pending.change()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    names = step(task, input, target)['probed']
    torch.testing.assert_close(change, first_order(model, input, log_p(target), names), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('way', ['no_backward', 'gradient_of_parameters_alone', 'late_backward'])
def test_no_backward_between_two_steps(way):
    """A batch whose gradient has not arrived has no rewards; the critic's loss is 0, and the step after is as ever."""
    model, input, target = make_case()
    expected = rewards_of(make_task(copy.deepcopy(model)), input, target)
    task = make_task(model)
    first = task(input, target)
    if way == 'gradient_of_parameters_alone':
        torch.autograd.grad(first['loss'], [p for p in task.get_trainable_module().parameters()])
    second = task(input, target)
    assert second['reward'].isnan().all()
    assert second['quality'].isnan().all()
    assert second['critic_loss'] == 0
    assert second['loss'].isfinite()
    if way == 'late_backward':
        first['loss'].backward()
    second['loss'].backward()
    assert all(p.grad.isfinite().all() for p in task.get_trainable_module().parameters())
    torch.testing.assert_close(task(input, target)['reward'], expected)


def test_loss_times_a_factor_that_is_no_scale():
    """A loss that was multiplied by inf, NaN or 0 leaves a batch without rewards, and the next loss finite."""
    model, input, target = make_case('cbam')
    expected = rewards_of(make_task(copy.deepcopy(model)), input, target)
    task = make_task(model)
    for factor in (float('inf'), float('nan'), 0.0):
        step(task, input, target, lambda result: (result['loss'] * factor).backward())
        result = step(task, input, target)
        assert result['reward'].isnan().all(), factor
        assert result['loss'].isfinite()
        assert all(p.grad.isfinite().all() for p in task.get_trainable_module().parameters())
        torch.testing.assert_close(step(task, input, target)['reward'], expected)


@pytest.mark.parametrize(('where', 'index', 'value'), [
    ('layer3', (1,), float('inf')), ('layer3', (1,), float('nan')), ('layer4.0.se', (1, 3, 0, 0), float('inf')),
])
def test_gradient_of_one_sample_that_is_not_finite(where, index, value):
    """A sample has no reward at the sites below an overflow; other sites and other samples keep theirs."""
    model, input, target = make_case('se', 'group_norm')
    task = make_task(model)
    expected = rewards_of(task, input, target)

    def overflow(gradient):
        gradient = gradient.clone()
        gradient[index] = value
        return gradient

    def on_output(module, args, output):
        output.register_hook(overflow)

    handle = model.get_submodule(where).register_forward_hook(on_output)
    step(task, input, target)
    handle.remove()
    if where == 'layer4.0.se':  # a single element of the map's gradient: the sum is infinite, not NaN
        assert task.measure.pending.taps[task.groups[-1].name].grad[1].isinf().sum() == 1
    result = step(task, input, target)
    lost = torch.zeros_like(expected, dtype=torch.bool)
    lost[1] = torch.tensor([where != 'layer3' or not name.startswith('layer4') for name in result['probed']])
    assert lost.sum() == (4 if where == 'layer3' else 5)
    assert torch.equal(result['reward'].isnan(), lost)
    assert torch.equal(result['quality'].isnan(), lost)
    torch.testing.assert_close(result['reward'][~lost], expected[~lost])
    error = (result['quality'] - result['reward']).square()
    groups = [error[:, :2], *error[:, 2:].split(1, dim=1)]
    torch.testing.assert_close(result['critic_loss'], sum(group.nanmean() for group in groups))
    assert all(p.grad.isfinite().all() for p in task.get_trainable_module().parameters())


@pytest.mark.parametrize('ignored', [-100, 3])
@pytest.mark.parametrize('mode', ['group_norm', 'batch_norm'])
def test_ignored_labels(ignored, mode):
    """Samples whose label is ignored have no reward, and the mean of the loss is over the others alone."""
    model, input, target = make_case('se', mode, torch.float64, batch_size=5)
    target[(target == ignored)] = 2
    target[[0, 3]] = ignored
    twin = copy.deepcopy(model)
    task = make_task(model, criterion=nn.CrossEntropyLoss(ignore_index=ignored))
    step(task, input, target)
    result = step(task, input, target)
    labels = target.masked_fill(target == ignored, -100)
    expected = first_order(twin, input, log_p(labels), result['probed'], coupled=mode == 'batch_norm')
    keep = [1, 2, 4]
    expected = reward_by_hand(expected[keep], result['output'].argmax(dim=1)[keep] == target[keep])
    assert result['reward'][[0, 3]].isnan().all()
    torch.testing.assert_close(result['reward'][keep].double(), expected, rtol=0, atol=1e-6)
    assert result['loss'].isfinite()
    assert (expected != -1).any()


def test_an_epoch_begins_without_rewards():
    """The pending batch is dropped where an epoch begins; the second step of each has rewards again."""
    task = make_task(make_model())
    module = task.get_trainable_module()
    for begin in (module.train, module.train, lambda: task.set_epoch(5), lambda: module.eval().train()):
        begin()
        results = [step(task, *make_batch(batch_size=4, size=48, seed=number)) for number in range(3)]
        assert results[0]['reward'].isnan().all()
        assert results[0]['quality'].isnan().all()
        assert results[0]['critic_loss'] == 0
        assert all(result['reward'].isfinite().all() for result in results[1:])


def written(value) -> int:
    """Bytes of an object in a file."""
    file = io.BytesIO()
    torch.save(value, file)
    return len(file.getvalue())


def test_pending_batch_is_not_saved():
    """The pending batch is in no state, no parameter, no buffer, no checkpoint, no EMA and not in what is trained."""
    task = make_task(make_model(), actor_weight=0.5)
    task.setup_ema(decay=0.9)

    def everything():
        states = {
            'module': task.get_trainable_module(), 'state_dict': task.state_dict(), 'task': task.get_task_state(),
            'ema': task.get_trainable_module(ema=True), 'ema_task': task.get_task_state(ema=True),
            'checkpoint': task.get_checkpoint_state(), 'ema_checkpoint': task.get_checkpoint_state(ema=True),
        }
        names = [
            [name for name, _ in owner.named_parameters()] + [name for name, _ in owner.named_buffers()]
            for owner in (task, task.get_trainable_module())
        ]
        return {name: written(value) for name, value in states.items()}, set(task.state_dict()), names

    task.get_trainable_module().rotation.advance()  # the counts take as many bytes before and after
    before = everything()
    step(task, *make_batch())
    task.zero_grad(set_to_none=True)
    task.update_ema(step=1)
    pending = task.measure.pending
    assert written([pending.states, pending.maps]) > 5000
    after = everything()
    assert before[1:] == after[1:]
    for name, size in before[0].items():
        assert abs(after[0][name] - size) < 500, name
    task.setup_ema(decay=0.9)
    assert abs(written(task.get_trainable_module(ema=True)) - before[0]['ema']) < 500


def test_resume_is_bit_equal(tmp_path):
    """An epoch, a resume and another one equal two in one run; the critic learns in both of them."""
    def run_task(seed=0):
        return make_task(make_model(seed=seed, drop_path_rate=0.1), input_size=(3, 32, 32))

    def batches(epoch):
        return [make_batch(batch_size=4, size=32, seed=10 * epoch + i) for i in range(3)]

    whole, first, second = run_task(), run_task(), run_task(seed=5)
    options = dict(accum_steps=2, clip_grad=1.0)
    _, optimizer = train(whole, batches, 2, tmp_path / 'whole', **options)
    train(first, batches, 1, tmp_path / 'parts', **options)
    critics = [copy.deepcopy(task.get_task_state()['critic']) for task in (run_task(), first, whole)]
    last = str(tmp_path / 'parts' / 'last.pth.tar')
    _, resumed = train(second, batches, 2, tmp_path / 'parts', resume=last, **options)
    assert_equal(whole.get_checkpoint_state(), second.get_checkpoint_state())
    assert_equal(whole.get_checkpoint_state(ema=True), second.get_checkpoint_state(ema=True))
    assert_equal(optimizer.state_dict(), resumed.state_dict())
    for before, after in pairwise(critics):
        assert all(not torch.equal(before[name], after[name]) for name in before if 'weight_ih' in name)


def test_plain_cross_entropy():
    """Cross-entropy without smoothing is accepted, under each of its names, with equal rewards."""
    model, input, target = make_case()
    plain = rewards_of(make_task(copy.deepcopy(model)), input, target)
    for kwargs in (
            dict(criterion=nn.CrossEntropyLoss()), dict(criterion_kwargs=dict(smoothing=0.0)),
            dict(criterion=LabelSmoothingCrossEntropy(0.0)),
            dict(criterion=nn.CrossEntropyLoss(), taylor_target='loss'),
    ):
        rewards = rewards_of(make_task(copy.deepcopy(model), **kwargs), input, target)
        torch.testing.assert_close(rewards, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('kwargs', [
    dict(criterion_kwargs=dict(smoothing=0.1)), dict(criterion=nn.CrossEntropyLoss(label_smoothing=0.1)),
    dict(criterion=LabelSmoothingCrossEntropy(0.1)), dict(criterion=SoftTargetCrossEntropy()),
    dict(criterion=BinaryCrossEntropy()), dict(criterion=PolyCrossEntropy()), dict(criterion=PolyCrossEntropy(0.0)),
    dict(criterion_kwargs=dict(loss_type='bce', bce_sum=True)), dict(criterion_kwargs=dict(soft_targets=True)),
])
def test_losses_that_need_another_target(kwargs):
    """A loss that is no plain cross-entropy is refused with the ways out, of which taylor_target='loss' is one."""
    with pytest.raises(ValueError, match=r"'exact'.*'split'.*taylor_target='loss'"):
        make_task(make_model(), **kwargs)
    assert make_task(make_model(), **kwargs, taylor_target='loss').measure.target == 'loss'


class _Subclass(nn.CrossEntropyLoss):
    pass


@pytest.mark.parametrize('criterion', [
    JsdCrossEntropy(), nn.CrossEntropyLoss(weight=torch.ones(7)), nn.CrossEntropyLoss(reduction='sum'),
    nn.CrossEntropyLoss(reduction='none'), BinaryCrossEntropy(reduction='sum'), PolyCrossEntropy(reduction='sum'),
    nn.MultiMarginLoss(), _Subclass(), F.cross_entropy, lambda output, target: F.cross_entropy(output, target),
])
@pytest.mark.parametrize('taylor_target', [None, 'loss'])
def test_losses_that_are_refused(criterion, taylor_target):
    """A loss that is not known to be a mean over the samples is always refused, with the probes that can take it."""
    name = getattr(criterion, '__name__', type(criterion).__name__)
    with pytest.raises(ValueError, match=rf"{name} .*'exact'.*'split'"):
        make_task(make_model(), criterion=criterion, taylor_target=taylor_target)


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(taylor_target='log_probability'), "None or 'loss'"), (dict(taylor_target=True), "None or 'loss'"),
    (dict(taylor_target='loss', probe='exact'), "'taylor'.*'exact'"),
    (dict(taylor_target='loss', probe='split'), "'taylor'.*'split'"),
    (dict(probe_dtype='float32'), 'probe_dtype'), (dict(probe_every=0), 'probe_every'),
])
def test_wrong_options(kwargs, message):
    """Wrong options raise a ValueError that says what is accepted."""
    with pytest.raises(ValueError, match=message):
        DrealTask(make_model(), verbose=False, input_size=(3, 48, 48), **{'probe': 'taylor', **kwargs})


def soften(target):
    """Soft targets with another class beside the sample's own, float32."""
    soft = torch.full((len(target), 7), 0.02).scatter_add(1, target[:, None], torch.full((len(target), 1), 0.56))
    return soft.scatter_add(1, (target[:, None] + 3) % 7, torch.full((len(target), 1), 0.3))


def test_soft_targets_are_refused():
    """Soft targets of mixup, given to plain cross-entropy, raise and leave no hook; class indices then go on."""
    model, input, target = make_case()
    expected = rewards_of(make_task(copy.deepcopy(model)), input, target)
    task = make_task(model)
    step(task, input, target)
    with pytest.raises(ValueError, match=r"soft targets.*'exact'.*'split'.*taylor_target='loss'"):
        task(input, soften(target))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(step(task, input, target)['reward'], expected)


def _smoothed(target, smoothing, dtype=torch.float64):
    return F.one_hot(target, 7).to(dtype) * (1 - smoothing) + smoothing / 7


def _cross_entropy(logits, target):
    return -(target * logits.log_softmax(1)).sum(1)


def _binary(logits, target):
    p = logits.sigmoid()
    return -(target * p.log() + (1 - target) * (1 - p).log())


def _poly(logits, target, epsilon):
    return _cross_entropy(logits, target) + epsilon * (1 - (target * logits.softmax(1)).sum(1))


@pytest.mark.parametrize(('criterion', 'soft', 'by_hand'), [
    (nn.CrossEntropyLoss(label_smoothing=0.2), False, lambda x, t: _cross_entropy(x, _smoothed(t, 0.2))),
    (nn.CrossEntropyLoss(), True, _cross_entropy),
    (LabelSmoothingCrossEntropy(0.2), False, lambda x, t: _cross_entropy(x, _smoothed(t, 0.2))),
    (SoftTargetCrossEntropy(), True, _cross_entropy),
    (BinaryCrossEntropy(0.2), False, lambda x, t: _binary(x, _smoothed(t, 0.2)).mean(1)),
    (BinaryCrossEntropy(0.2, sum_classes=True), False, lambda x, t: _binary(x, _smoothed(t, 0.2)).sum(1)),
    (BinaryCrossEntropy(sum_classes=True), True, lambda x, t: _binary(x, t).sum(1)),
    (BinaryCrossEntropy(sum_classes=True, target_threshold=0.2), True, lambda x, t: _binary(x, 1 * (t > 0.2)).sum(1)),
    (PolyCrossEntropy(1.5, smoothing=0.2), False, lambda x, t: _poly(x, _smoothed(t, 0.2), 1.5)),
    (PolyCrossEntropy(1.5), True, lambda x, t: _poly(x, t, 1.5)),
], ids=['torch_smoothing', 'torch_soft', 'smoothing', 'soft', 'bce', 'bce_sum', 'bce_soft', 'bce_threshold', 'poly',
        'poly_soft'])
def test_rewards_by_the_loss(criterion, soft, by_hand):
    """With taylor_target='loss', R = 1 - exp(-(l' - l)) to first order, l being the sample's own loss by hand."""
    # with group norm the gradient of the sum is that of each sample
    model, input, target = make_case('se', 'group_norm', torch.float64)
    labels = soften(target).double() if soft else target
    twin = copy.deepcopy(model)
    torch.testing.assert_close(criterion(twin(input), labels).double(), by_hand(twin(input), labels).mean())
    task = make_task(model, criterion=criterion, taylor_target='loss')
    step(task, input, labels)
    result = step(task, input, labels)
    expected = first_order(twin, input, lambda logits: -by_hand(logits, labels), result['probed'], coupled=True)
    assert torch.equal(result['right'], RIGHT)
    torch.testing.assert_close(result['reward'].double(), reward_by_hand(expected, RIGHT), rtol=0, atol=1e-6)
    plain = first_order(twin, input, log_p(target), result['probed'], coupled=True)
    assert (reward_by_hand(plain, RIGHT) - result['reward']).abs().max() > 1e-3


def test_probe_every(monkeypatch):
    """Every third step is tapped, and its rewards arrive in the step after; L_q teaches the attention in all."""
    import dreal_timm.trainable
    model, input, target = make_case()
    task, plain = make_task(copy.deepcopy(model), probe_every=3), ClassificationTask(model, verbose=False)
    step(plain, input, target)
    reference = tasks.gradients(plain.get_trainable_module(), 'model.')
    every = rewards_of(make_task(copy.deepcopy(model)), input, target)
    tap, tapped = dreal_timm.trainable.tap, []
    monkeypatch.setattr(dreal_timm.trainable, 'tap', lambda *args: tapped.append(number) or tap(*args))
    for number in range(8):
        result = step(task, input, target)
        grads = tasks.gradients(task.get_trainable_module(), 'model.')
        critic = [grads[name].abs().sum() for name in grads if name.startswith('critic.') and 'weight_hh' not in name]
        if number % 3 == 1:
            torch.testing.assert_close(result['reward'], every)
            assert result['critic_loss'] > 0
            assert all(value > 0 for value in critic)
        else:
            assert result['reward'].shape == (4, len(sites_by_hand(model)))
            assert result['reward'].isnan().all()
            assert result['quality'].isnan().all()
            assert result['critic_loss'] == 0
            assert all(value == 0 for value in critic)
        if number == 0:
            first = grads
        for name in reference:
            assert torch.equal(grads[name], first[name])
            assert torch.equal(grads[name], reference[name]) == (name not in theta_names(model)), name
    assert tapped == [0, 3, 6]


def test_gradient_checkpointing(attention):
    """Gradient checkpointing changes neither rewards nor gradients, under autocast or not."""
    model, input, target = make_case(attention, drop_path_rate=0.2)
    both = [make_task(copy.deepcopy(model)) for _ in range(2)]
    both[1].get_eval_model().set_grad_checkpointing(True)
    for enabled in (False, True):
        results = []
        for task in both:
            for number in range(2):
                task.zero_grad()
                torch.manual_seed(11 + number)
                with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
                    result = task(input, target)
                result['loss'].backward()
            results.append({'reward': result['reward'], **tasks.gradients(task.get_trainable_module(), 'model.')})
        assert results[0]['reward'].isfinite().all()
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_is_told(caplog):
    """Where checkpointing keeps the gradient from the maps, there are no rewards, and it is said once."""
    model, input, target = make_case()
    task = make_task(model)
    task.get_eval_model().set_grad_checkpointing(True)
    set_reentrant_ckpt(True)
    try:
        for _ in range(3):
            result = task(input.requires_grad_(), target)
            result['loss'].backward()
    finally:
        set_reentrant_ckpt(False)
    assert result['reward'].isnan().all()
    assert [r.levelname for r in caplog.records if 'left no gradient' in r.message] == ['WARNING']
    result = task(input, target)
    result['loss'].backward()
    assert task(input, target)['reward'].isfinite().all()


@pytest.mark.filterwarnings('ignore')  # of the compiler's own
def test_compile():
    """A compiled task has the rewards, losses and gradients of an eager one, over several steps and epochs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), SEModule(8, rd_channels=4), nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8), nn.ReLU(), SEModule(8, rd_channels=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 7),
    )
    input, _ = make_batch(size=8)
    target = model(input).argmax(dim=1)
    tasks = [make_task(copy.deepcopy(model), input_size=(3, 8, 8)) for _ in range(2)]
    tasks[1].compile(backend='aot_eager')
    for epoch in range(2):
        for number in range(3):
            results = [step(task, input, target) for task in tasks]
            for key in ('loss', 'reward', 'quality', 'right'):
                torch.testing.assert_close(
                    results[0][key], results[1][key], rtol=1e-4, atol=1e-5, equal_nan=True)
            assert results[1]['reward'].isnan().all() == (number == 0), epoch
            pairs = zip(tasks[0].parameters(), tasks[1].parameters(), strict=True)
            for first, second in pairs:
                torch.testing.assert_close(first.grad, second.grad, rtol=1e-3, atol=1e-5)
        for task in tasks:
            task.get_trainable_module().train()
    assert (results[1]['reward'].abs() > 1e-3).any()


def test_evaluation_leaves_the_pending_batch():
    """Without gradients or in evaluation mode the task returns the class loss, and rewards arrive as if it had not."""
    model, input, target = make_case('cbam', 'frozen_batch_norm')
    expected = rewards_of(make_task(copy.deepcopy(model)), input, target)
    plain = ClassificationTask(copy.deepcopy(model), verbose=False)
    task = make_task(model)
    step(task, input, target)
    other = make_batch(batch_size=3, size=48)
    with torch.no_grad():
        first, second = task(*other), plain(*other)
    assert set(first) == {'loss', 'output'}
    assert torch.equal(first['loss'], second['loss'])
    assert torch.equal(first['output'], second['output'])
    with torch.inference_mode():
        task.get_eval_model().eval()(other[0])
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    assert torch.equal(step(task, input, target)['reward'], expected)
    task.get_trainable_module().eval()
    result = task(*other)
    assert set(result) == {'loss', 'output'}
    result['loss'].backward()
    task.get_trainable_module().train()
    assert step(task, input, target)['reward'].isnan().all()


@pytest.mark.parametrize('built', [32, 64])
def test_images_of_other_sizes(built):
    """Images of any size are measured by the oracle, also where a spatial map has one position and is worth 0."""
    model = prepare('cbam', dtype=torch.float64, layers=(1, 1, 1, 1))
    task = make_task(model, input_size=(3, built, built))
    assert len(task.groups) == (7 if built == 32 else 8)
    for size in (64, 80, 32) if built == 64 else (64, 32):
        input, _ = make_batch(4, size, dtype=torch.float64)
        target = correct_targets(model, input, seed=11)
        step(task, input, target)
        change = task.measure.pending.change()
        result = step(task, input, target)
        expected = first_order(model, input, log_p(target), result['probed'], coupled=True)
        torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(result['right'], RIGHT)
        torch.testing.assert_close(
            result['reward'].double(), reward_by_hand(expected, result['right']), rtol=0, atol=1e-6)
        if size == 32 and built == 64:
            spatial = result['probed'].index(next(n for n in sites_by_hand(model) if n.startswith('layer4.0.se.sp')))
            assert (result['reward'][:2, spatial] == 0).all()


def _process_batch(number, rank):
    return make_batch(batch_size=4 - rank, size=32, seed=10 * number + rank)


def _process_task():
    return make_task(make_model(), input_size=(3, 32, 32))


def _worker(rank: int, port: int, path: str) -> None:
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    task = _process_task()
    task.prepare_distributed()
    module = task.get_trainable_module()
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    rewards = []
    for number in range(4):
        with task.no_sync() if number % 2 == 0 else nullcontext():
            result = task(*_process_batch(number, rank))
            (result['loss'] / 2).backward()
        rewards.append(result['reward'])
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
        if number == 1:
            middle = copy.deepcopy(module.module.state_dict())
    torch.save({'rewards': rewards, 'middle': middle, 'last': module.module.state_dict()}, f'{path}/{rank}.pt')
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """Each process has the rewards of its own batch, of whatever size, and both keep equal weights."""
    torch.multiprocessing.spawn(_worker, args=(tasks.free_port(), str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2)]
    start = _process_task().get_trainable_module().state_dict()
    parameters = [name for name, _ in _process_task().get_trainable_module().named_parameters()]
    for when in ('middle', 'last'):
        for name in parameters:
            assert torch.equal(parts[0][when][name], parts[1][when][name]), name
    assert any(not torch.equal(parts[0]['last'][name], start[name]) for name in parameters if 'critic' in name)
    assert any(not torch.equal(parts[0]['last'][name], start[name]) for name in parameters if 'model' in name)
    for rank, part in enumerate(parts):
        assert part['rewards'][0].isnan().all()
        for number in range(3):
            task = _process_task()
            if number == 2:
                task.get_trainable_module().load_state_dict(part['middle'])
            batch = _process_batch(number, rank)
            torch.testing.assert_close(part['rewards'][number + 1], rewards_of(task, *batch), rtol=1e-4, atol=1e-5)
    rewards = torch.cat([r for part in parts for r in part['rewards'][1:]])
    assert ((rewards != -1) & (rewards.abs() > 1e-3)).any()


@pytest.mark.filterwarnings('ignore:.*create_graph=True:UserWarning')
def test_gradients_with_a_graph():
    """After backward(create_graph=True), as timm's loop asks for Adahessian, rewards are constants as ever."""

    model, input, target = make_case()
    with_graph = make_task(copy.deepcopy(model), actor_weight=0.0)
    plain = make_task(model, actor_weight=0.0)
    backwards = [lambda r: r['loss'].backward(create_graph=True), lambda r: r['loss'].backward()]
    results, grads = [], []
    for task, backward in zip((with_graph, plain), backwards, strict=True):
        step(task, input, target, backward)
        results.append(step(task, input, target))
        grads.append(tasks.gradients(task.get_trainable_module(), 'model.'))
    torch.testing.assert_close(results[0]['reward'].detach(), results[1]['reward'])
    assert not results[0]['reward'].requires_grad
    for name, value in grads[1].items():
        torch.testing.assert_close(grads[0][name], value)
