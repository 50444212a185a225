"""Options that depart from the paper: what rewards are made of, what the critic reads, and how L_q teaches"""
import copy
import math

import pytest
import torch
from networks import correct_targets, make_batch, make_model
from oracle import map_by_hand
from tasks import gradients, make_task
from timm.layers import SEModule
from timm.task import ClassificationTask
from torch import nn

from dreal_timm.attention.sites import attention_parameters
from dreal_timm.audit import load_critic
from dreal_timm.critic import RecurrentCritic
from dreal_timm.reward import RewardRule, reward, standardize

NAN = math.nan
RIGHT = torch.tensor([True, True, False, True])


def case(**kwargs):
    """A model in training mode with two blocks in its first stage, images, and targets of which two are wrong."""
    model = make_model('se', layers=(2, 1, 1, 1), **kwargs).train()
    input, _ = make_batch(8)
    return model, input, correct_targets(model, input)


def theta_of(task):
    sites = [site for group in task.groups for site in group.sites]
    return set(attention_parameters(task.get_eval_model(), sites))


def test_forms_by_hand():
    """The ratio of Eq. 1 and the gain of log-likelihood, for right samples and for wrong ones that are measured."""
    change = torch.log(torch.tensor([[0.5], [2.0], [0.25], [NAN]]))
    expected = {
        ('ratio', 'penalty'): [0.5, -1.0, -1.0, NAN], ('ratio', 'exclude'): [0.5, -1.0, NAN, NAN],
        ('ratio', 'measure'): [0.5, -1.0, 0.75, NAN],
        ('log', 'penalty'): [math.log(2), -math.log(2), -1.0, NAN],
        ('log', 'exclude'): [math.log(2), -math.log(2), NAN, NAN],
        ('log', 'measure'): [math.log(2), -math.log(2), 1.0, NAN],  # log 4, clamped
    }
    for (form, wrong), values in expected.items():
        found = reward(change, RIGHT, form=form, wrong=wrong)
        torch.testing.assert_close(found[:, 0], torch.tensor(values), equal_nan=True, msg=f'{form} {wrong}')


def test_standardized_by_hand():
    """Mean 0 and standard deviation 1/2 over the chosen samples of all columns of a group; the rest as it was."""
    rewards = torch.tensor([[1.0, 3.0, 7.0], [5.0, NAN, 9.0], [100.0, 100.0, 100.0], [NAN, NAN, 8.0]])
    found = standardize(rewards, RIGHT, [0, 0, 1])
    spread = math.sqrt(8 / 3)  # of 1, 3, 5
    expected = torch.tensor([
        [-2 / spread / 2, 0.0, -1 / math.sqrt(2 / 3) / 2], [2 / spread / 2, NAN, 1 / math.sqrt(2 / 3) / 2],
        [100.0, 100.0, 100.0], [NAN, NAN, 0.0]])
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_standardized_without_spread():
    """Rewards that are all alike, one alone, and none at all."""
    for rewards in (torch.full((4, 1), 0.25), torch.tensor([[0.25], [NAN], [NAN], [NAN]]), torch.full((4, 1), NAN)):
        found = standardize(rewards, RIGHT, [0])
        meant = RIGHT[:, None] & ~rewards.isnan()
        assert torch.equal(found[meant], torch.zeros(int(meant.sum())))


def test_standardized_rewards_do_not_depend_on_scale():
    """Gains a thousand times as small are the same rewards; wrong samples keep their penalty."""
    change = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)) * 0.1
    right = torch.arange(64) < 48
    rule = RewardRule(form='log', standardized=True)
    found = rule(change, right, [0, 0])
    torch.testing.assert_close(found, rule(change / 1000, right, [0, 0]), rtol=1e-4, atol=1e-5)
    assert (found[48:] == -1).all()
    assert found[:48].abs().max() <= 1


@pytest.mark.parametrize('probe', ['exact', 'split', 'taylor'])
def test_wrong_samples(probe):
    """A wrong sample has the penalty, no reward, or that of its own counterfactual, and a right one what it had."""
    model, input, target = case()
    found = {}
    for wrong in ('penalty', 'exclude', 'measure'):
        task = make_task(copy.deepcopy(model), probe=probe, wrong_samples=wrong, seed=1)
        result = task(input, target)
        if probe == 'taylor':
            result['loss'].backward()
            result = task(input, target)
        found[wrong], right = result['reward'], result['right']
    assert right.tolist() == [True] * 6 + [False] * 2
    probed = ~found['penalty'].isnan()
    assert (found['penalty'][6:][probed[6:]] == -1).all()
    assert found['exclude'][6:].isnan().all()
    assert torch.equal(~found['measure'].isnan(), probed)
    assert (found['measure'][6:][probed[6:]] != -1).any()
    for wrong in ('exclude', 'measure'):
        torch.testing.assert_close(found[wrong][:6], found['penalty'][:6], equal_nan=True)


def test_measured_wrong_samples_equal_swapped_maps():
    """The reward of a wrong sample is that of its class's probability with the map swapped by hand."""
    model, input, target = case()
    task = make_task(copy.deepcopy(model).eval(), probe='exact', wrong_samples='measure', reward_clip=None)
    task.get_trainable_module().training = True  # the network stays in evaluation mode: nothing but the map counts
    result = task(input, target)
    model.eval()
    for column, name in enumerate(result['probed']):
        module = model.get_submodule(name)
        plain = model(input).softmax(1).gather(1, target[:, None])[:, 0]
        module.forward = lambda x, m=module: x * map_by_hand(m, x).mean((1, 2, 3), keepdim=True)
        without = model(input).softmax(1).gather(1, target[:, None])[:, 0]
        del module.forward
        torch.testing.assert_close(result['reward'][:, column], 1 - without / plain, rtol=1e-4, atol=1e-5)


def test_excluded_samples_teach_the_critic_nothing():
    """L_r of a batch is that of its right samples alone."""
    model, input, target = case()
    task = make_task(copy.deepcopy(model), probe='exact', wrong_samples='exclude')
    result = task(input, target)
    error = (result['quality'] - result['reward']).square()
    expected = sum(error[:6, column].mean() for column in range(error.shape[1]))
    torch.testing.assert_close(result['critic_loss'], expected)


def test_drawn_sites_of_taylor():
    """With 'drawn' the rewards are those of 'all' at the drawn sites, and missing elsewhere."""
    model, input, target = case()
    found = {}
    for sites in ('all', 'drawn'):
        task = make_task(copy.deepcopy(model), probe='taylor', taylor_sites=sites, rotate='step')
        drawn = task.get_trainable_module().rotation.draw()
        task(input, target)['loss'].backward()
        found[sites] = task(input, target)
    names = [group.sites[index].name for group, index in zip(task.groups, drawn, strict=True)]
    chosen = torch.tensor([name in names for name in found['all']['probed']])
    assert chosen.sum() == len(task.groups) < len(chosen)
    torch.testing.assert_close(found['drawn']['reward'][:, chosen], found['all']['reward'][:, chosen])
    assert found['drawn']['reward'][:, ~chosen].isnan().all()


def test_standardized_critic_by_hand():
    """It reads what the plain one would read of inputs that were standardized over the batch by hand."""
    plain, critic = RecurrentCritic((6,)), RecurrentCritic((6,), standardized=True)
    critic.load_state_dict(plain.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(0)
    state, attention = (3 + 0.1 * torch.randn(5, 2, 6, generator=generator) for _ in range(2))
    by_hand = [torch.stack([(x - torch.stack(list(x)).sum(0) / 5) / (
        sum((y - x.mean(0)) ** 2 for y in x) / 5 + 1e-8).sqrt()])[0] for x in (state, attention)]
    torch.testing.assert_close(critic(state, attention), plain(*by_hand), rtol=1e-4, atol=1e-5)


def test_a_standardized_critic_does_not_push_all_samples_alike():
    """Its gradient at the maps sums to nothing over the batch: it cannot move a gate for every image."""
    critic = RecurrentCritic((6,), standardized=True)
    state = torch.randn(16, 2, 6)
    attention = torch.rand(16, 2, 6, requires_grad=True)
    critic(state, attention).sum().backward()
    assert attention.grad.abs().max() > 1e-4
    torch.testing.assert_close(attention.grad.sum(0), torch.zeros(2, 6), rtol=0, atol=1e-4)


def test_a_standardized_critic_of_one_image():
    """A batch of one has no differences: finite, and alike whatever the image."""
    critic = RecurrentCritic((6,), standardized=True)
    first, second = (critic(torch.randn(1, 2, 6), torch.rand(1, 2, 6)) for _ in range(2))
    assert torch.equal(first, second)


def test_a_standardized_critic_is_known_from_its_checkpoint(tmp_path):
    """Whoever loads it from a checkpoint gets one that reads as it did."""
    task = make_task(make_model('se'), critic_standardized=True, critic_hidden_size=3)
    path = tmp_path / 'last.pth.tar'
    torch.save({'state_dict': task.get_eval_model().state_dict(), 'task_state': task.get_task_state()}, path)
    found = load_critic(path, task.groups)
    assert all(critic.standardized is not None for critic in found.values())
    plain = make_task(make_model('se')).get_trainable_module().critic
    assert all(critic.standardized is None for critic in plain.values())


def test_direct_actor_by_hand():
    """L_q's gradient at the attention parameters is that of the first-order rewards, taken apart by hand."""
    model, input, target = case(group_norm=True)
    plain = copy.deepcopy(model)
    task = make_task(model, probe='taylor', actor='direct', actor_weight=0.5, reward_form='log', reward_clip=None)
    first = task(input, target)
    assert first['actor_loss'] == 0
    first['loss'].backward()
    task.zero_grad()
    result = task(input, target)
    result['loss'].backward()
    found = gradients(model)

    # maps of each module, cut from what is before them, and the gradient of log p at them
    sites = {name: module for name, module in plain.named_modules() if isinstance(module, SEModule)}
    maps, leaves = {}, {}
    for name, module in sites.items():
        def forward(x, name=name, module=module):
            maps[name] = map_by_hand(module, x.detach())
            leaves[name] = maps[name].detach().requires_grad_()
            return x * (map_by_hand(module, x) - map_by_hand(module, x).detach() + leaves[name])
        module.forward = forward
    logits = plain(input)
    log_p = logits.log_softmax(1).gather(1, target[:, None])[:, 0]
    slopes = dict(zip(leaves, torch.autograd.grad(log_p.sum(), leaves.values(), retain_graph=True), strict=True))
    right = (logits.argmax(1) == target).float()
    worth = sum(
        ((slopes[n] * (maps[n] - maps[n].mean(1, keepdim=True))).sum((1, 2, 3)) * right).sum() for n in maps) / 8
    torch.testing.assert_close(result['actor_loss'], -worth.detach(), rtol=1e-4, atol=1e-6)
    (nn.functional.cross_entropy(logits, target) - 0.5 * worth).backward()
    expected = gradients(plain)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize('attention', ['se', 'cbam', 'srm'])
@pytest.mark.parametrize('kwargs', [
    dict(actor='direct'), dict(actor='direct', wrong_samples='measure', reward_form='log'),
    dict(actor='direct', taylor_sites='drawn'), dict(actor='direct', actor_share=0.5)])
def test_direct_actor_moves_attention_alone(attention, kwargs):
    """Nothing but the attention parameters has another gradient than in plain training; all gradients are finite."""
    input, _ = make_batch(8)
    target = correct_targets(make_model(attention).train(), input)
    model, plain = make_model(attention), make_model(attention)
    task, other = make_task(model, probe='taylor', **kwargs), ClassificationTask(plain, verbose=False)
    for one in (task, other):
        one.get_trainable_module().train()
        for _ in range(3):
            one.zero_grad()
            one(input, target)['loss'].backward()
    theta, found, expected = theta_of(task), gradients(model), gradients(plain)
    assert found.keys() == expected.keys()
    assert all(gradient.isfinite().all() for gradient in found.values())
    changed = {name for name in found if not torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6)}
    assert changed
    assert changed <= theta


def test_share_is_the_share():
    """From the second step on L_q's gradient at the attention parameters is the share of L_c's in length."""
    model, input, target = case()
    plain = copy.deepcopy(model)
    task, other = make_task(model, actor_share=0.25), ClassificationTask(plain, verbose=False)
    found = []
    for _ in range(2):
        for one in (task, other):
            one.zero_grad()
            one(input, target)['loss'].backward()
        theta = theta_of(task)
        ours, theirs = gradients(model), gradients(plain)
        length = math.sqrt(sum(theirs[n].square().sum().item() for n in theta))
        found.append(math.sqrt(sum((ours[n] - theirs[n]).square().sum().item() for n in theta)) / length)
    assert found[0] == pytest.approx(0, abs=1e-4)
    assert found[1] == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize('scale', [1024.0, 1 / 3])
def test_share_under_a_scaled_loss(scale):
    """A gradient scaler, or accumulation, changes neither the average nor the share."""
    model, input, target = case()
    lengths = []
    for factor in (1.0, scale):
        task = make_task(copy.deepcopy(model), actor_share=0.25)
        for _ in range(3):
            task.zero_grad()
            (task(input, target)['loss'] * factor).backward()
        lengths.append(task.get_task_state()['share']['class_length'].item())
    assert lengths[0] > 0
    assert lengths[1] == pytest.approx(lengths[0], rel=1e-4)


def test_share_leaves_no_hooks_and_goes_with_the_checkpoint():
    """Its average is task state; looking at it leaves no hook at a parameter."""
    model, input, target = case()
    task = make_task(model, actor_share=0.25)
    task(input, target)['loss'].backward()
    state = task.get_task_state()
    assert not any(p._backward_hooks for p in model.parameters())
    other = make_task(make_model('se', layers=(2, 1, 1, 1)), actor_share=0.25)
    other.load_task_state(state)
    assert torch.equal(other.get_task_state()['share']['class_length'], state['share']['class_length'])


def test_share_skips_a_step_without_a_number():
    """Gradients that are not finite, of a step that a loss scaler skips, do not reach the average."""
    model, input, target = case()
    task = make_task(model, actor_share=0.25)
    for factor in (1.0, math.inf, 1.0):
        task.zero_grad()
        (task(input, target)['loss'] * factor).backward()
    assert task.get_task_state()['share']['class_length'].isfinite()


def test_the_critic_begins_alone():
    """For `actor_start` epochs the network learns as it does in plain training, and the critic learns."""
    model, input, target = case()
    plain = copy.deepcopy(model)
    task, other = make_task(model, actor_start=1), ClassificationTask(plain, verbose=False)
    for epoch, same in ((0, True), (1, False)):
        task.set_epoch(epoch)
        for one in (task, other):
            one.zero_grad()
            one(input, target)['loss'].backward()
        ours, theirs = gradients(model), gradients(plain)
        assert all(torch.allclose(ours[n], theirs[n], atol=1e-7) for n in ours) == same
        assert sum(p.grad.abs().sum() for p in task.get_trainable_module().critic.parameters()) > 0


@pytest.mark.parametrize('kwargs', [
    dict(probe='taylor', actor='direct', actor_share=0.3), dict(wrong_samples='measure', reward_form='log'),
    dict(probe='exact', wrong_samples='exclude', reward_standardized=True, critic_standardized=True),
    dict(probe='taylor', taylor_sites='drawn', actor_start=1, critic_hidden_size=4)])
def test_a_short_training(kwargs):
    """On timm's own loop, with accumulation, the loss falls and all stays finite."""
    model = make_model('se')
    input, target = make_batch(8)
    task = make_task(model, **kwargs)
    batches = [(input, target)] * 4
    losses = []
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.02)
    for _ in range(3):
        task.get_trainable_module().train()
        for batch in batches:
            result = task(*batch)
            result['loss'].backward()
            losses.append(result['class_loss'].item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in task.get_trainable_module().parameters())


@pytest.mark.filterwarnings('ignore')  # of the compiler's own
@pytest.mark.parametrize('kwargs', [
    dict(actor_share=0.3), dict(probe='taylor', actor='direct'), dict(probe='taylor', actor='direct', actor_share=0.3),
    dict(critic_standardized=True, reward_standardized=True, wrong_samples='exclude')])
def test_compiled(kwargs):
    """A compiled task has the gradients of an eager one, over several steps."""
    model, input, target = case()
    eager, compiled = (make_task(copy.deepcopy(model), **kwargs) for _ in range(2))
    compiled.compile(backend='aot_eager')
    for _ in range(3):
        for task in (eager, compiled):
            task.zero_grad()
            task(input, target)['loss'].backward()
    ours, theirs = (gradients(task.get_eval_model()) for task in (eager, compiled))
    for name, gradient in ours.items():
        torch.testing.assert_close(
            theirs.get(name, theirs.get(f'_orig_mod.{name}')), gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(reward_form='sum'), 'reward_form'), (dict(wrong_samples='drop'), 'wrong_samples'),
    (dict(actor='self'), 'actor'), (dict(actor='direct'), 'taylor'), (dict(taylor_sites='drawn'), 'taylor_sites'),
    (dict(probe='taylor', taylor_sites='some'), 'taylor_sites'), (dict(actor_start=-1), 'actor_start'),
    (dict(actor_share=0.0), 'actor_share'), (dict(actor_share=math.nan), 'actor_share'),
    (dict(probe='taylor', actor='direct', reward_standardized=True), 'standardized')])
def test_wrong_options(kwargs, message):
    """One line that names the option."""
    with pytest.raises(ValueError, match=message):
        make_task(make_model('se'), **kwargs)
