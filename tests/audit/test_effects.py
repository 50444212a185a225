"""What a site is worth, against a hand-written loop over sites; and the network stays as it is"""
import copy
import math
from contextlib import ExitStack

import pytest
import timm
import torch
from audit.loop import batches_of, maps_of, oracle
from networks import make_batch, make_model
from small_run import copied
from timm.layers import SEModule
from torch import nn

from dreal_timm import find_sites
from dreal_timm.attention.capture import bypass, record
from dreal_timm.attention.readers import readers_of
from dreal_timm.audit import Auditor, audit, summarize
from dreal_timm.critic import Critic


def test_numbers_are_those_of_a_loop_over_sites(attention):
    """Every number of every site equals that of a hand-written loop over sites, to 1e-6."""
    model = make_model(attention).double()
    made = batches_of(model)
    found = audit(model, made, input_size=(3, 64, 64))
    images, target = (torch.cat(part) for part in zip(*made, strict=True))
    rows = {row['site']: row for row in summarize(found, resamples=20)['sites']}
    with torch.no_grad():
        logits = model(images)
    right = logits.argmax(1) == target
    log_p = logits.log_softmax(1).gather(1, target[:, None]).squeeze(1)
    assert torch.equal(found.right, right)
    assert 0 < right.sum() < len(right)
    torch.testing.assert_close(found.log_p, log_p, rtol=0, atol=1e-9)
    sites = find_sites(model, (3, 64, 64))
    assert [row.site for row in found.sites] == [site.name for site in sites]
    for index, site in enumerate(sites):
        own = maps_of(model, images, site)
        mean = own.mean(0, keepdim=True)
        row = rows[site.name]
        for prefix, constant in (('', None), ('constant_', mean)):
            changed, still = oracle(model, images, target, site, constant)
            assert row[f'{prefix}reward'] == pytest.approx(
                (1 - (changed - log_p).exp())[right].clamp(-1, 1).mean().item(), abs=1e-6)
            assert row[f'{prefix}top1_gain'] == pytest.approx(
                100 * (right.double().mean() - still.double().mean()).item(), abs=1e-6)
            assert row[f'{prefix}log_likelihood_gain'] == pytest.approx((log_p - changed).mean().item(), abs=1e-6)
        changed, still = oracle(model, images, target, site)
        assert (log_p - changed).abs().max() > 1e-4
        assert row['helps'] == pytest.approx((log_p - changed > 1e-4).double().mean().item())
        assert row['hurts'] == pytest.approx((log_p - changed < -1e-4).double().mean().item())
        assert row['saved'] == (right & ~still).sum()
        assert row['lost'] == (~right & still).sum()
        flat = own.flatten(1)
        assert row['map_mean'] == pytest.approx(flat.mean().item(), abs=1e-9)
        assert row['map_spread'] == pytest.approx(flat.std(1, unbiased=False).mean().item(), abs=1e-9)
        share = flat.var(0, unbiased=False).mean() / flat.flatten().var(unbiased=False)
        assert row['map_input_share'] == pytest.approx(share.item(), abs=1e-6)
        torch.testing.assert_close(found.rewards()[:, index][~right], torch.full((int((~right).sum()),), -1.0))


@pytest.mark.parametrize(
    'name', ['efficientnet_b0', 'regnety_002', 'resnest14d', 'skresnet18', 'ghostnet_100', 'mobilenetv3_small_050'])
def test_networks_of_other_kinds(name):
    """A sample of networks of timm: the gain of each site equals that of a pass with its map replaced."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    made = batches_of(model, (3,), 64, 5)
    auditor = Auditor(model, input_size=(3, 64, 64))
    seen = auditor.see(*made[0])
    answer = auditor.without(seen)
    for column, site in enumerate(auditor.sites):
        with bypass(model, [site]), torch.no_grad():
            logits = model(made[0][0])
        expected = logits.log_softmax(1).gather(1, made[0][1][:, None]).squeeze(1)
        torch.testing.assert_close(answer.log_p[:, column], expected, rtol=0, atol=1e-9)


def test_the_sizes_of_batches_do_not_matter(attention):
    """The same images in other batches have the same numbers."""
    model = make_model(attention)
    images, target = (torch.cat(part) for part in zip(*batches_of(model), strict=True))
    whole = audit(model, [(images, target)], input_size=(3, 64, 64))
    cut = audit(model, list(zip(images.split(5), target.split(5), strict=True)), input_size=(3, 64, 64))
    for name in ('log_p', 'mean_log_p', 'constant_log_p'):
        torch.testing.assert_close(getattr(whole, name), getattr(cut, name), rtol=0, atol=1e-5)
    for name in whole.names:
        torch.testing.assert_close(whole.maps[name].mean, cut.maps[name].mean, rtol=0, atol=1e-6)
    assert whole.number.tolist() == cut.number.tolist() == list(range(12))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize('fails', [False, True])
def test_the_network_stays_as_it_is(attention, fails):
    """Weights, buffers, modes, hooks and generators are bit-equal afterwards, also where a pass broke off."""
    model = make_model(attention)
    made = batches_of(model)
    model.train()
    model.layer2.eval()
    before, modes = copied(model), [m.training for m in model.modules()]
    state = torch.get_rng_state()

    def break_off(module, args):
        if len(broken) == 7:
            raise RuntimeError('in the middle')
        broken.append(1)

    broken = []
    if fails:
        handle = model.layer3.register_forward_pre_hook(break_off)
        with pytest.raises(RuntimeError, match='in the middle'):
            audit(model, made, input_size=(3, 64, 64))
        handle.remove()
    else:
        audit(model, made, input_size=(3, 64, 64))
    assert [m.training for m in model.modules()] == modes
    assert hooks(model) == 0
    assert all('forward' not in m.__dict__ for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_seeing_costs_one_pass():
    """A batch is seen in one forward pass, after the first one, on which passes that begin in the middle are tried."""
    model = make_model('se')
    made = batches_of(model)
    auditor = Auditor(model, input_size=(3, 64, 64))
    auditor.see(*made[0])
    calls = []
    model.conv1[0].register_forward_hook(lambda module, args, output: calls.append(1))
    seen = auditor.see(*made[1])
    assert len(calls) == 1
    auditor.without(seen)
    assert len(calls) == 1  # they begin behind the stem


def test_sites_by_name():
    """Sites are chosen by their own names or by those of modules around them; an unknown name is an error."""
    model = make_model('cbam')
    auditor = Auditor(model, ['layer2', 'layer1.0.se.spatial'], (3, 64, 64))
    assert [site.name for site in auditor.sites] == [
        'layer1.0.se.spatial', 'layer2.0.se.channel', 'layer2.0.se.spatial']
    with pytest.raises(ValueError, match="No attention site 'layer9'"):
        Auditor(model, ['layer9'], (3, 64, 64))
    with pytest.raises(ValueError, match='No attention site'):
        Auditor(model, ['layer'], (3, 64, 64))
    with pytest.raises(ValueError, match='has no attention site'):
        Auditor(timm.create_model('test_resnet'), None, (3, 64, 64))


class _Late(nn.Module):
    """A network whose answer needs what the eyes of the trace do not see: it multiplies by a number that it keeps."""

    def __init__(self):
        super().__init__()
        self.net = make_model('se')
        self.scale = 1.0
        self.net.layer1.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        if output.device.type != 'meta':
            self.scale = float(output.detach().abs().mean())

    def forward(self, x):
        x = self.net(x)
        return x * self.scale


def test_a_pass_that_does_not_repeat_is_made_from_the_images(caplog):
    """Where a pass from the middle says something else than the whole network, passes begin with the images."""
    torch.manual_seed(0)
    model = _Late().eval()
    images, target = make_batch(4, 64)
    auditor = Auditor(model, None, (3, 64, 64))
    assert all(restart is not None for restart in auditor.restarts.values())
    with caplog.at_level('INFO'):
        answer = auditor.without(auditor.see(images, target))
    assert 'begin with the images' in caplog.text
    fresh = copy.deepcopy(model)
    for column, site in enumerate(auditor.sites):
        with torch.no_grad():
            expected, _ = oracle(fresh, images, target, site)
        torch.testing.assert_close(answer.log_p[:, column], expected, rtol=0, atol=1e-5)


def test_quality_is_the_critics():
    """With a critic the judgement of each site is what the trainable module's critic says in evaluation mode."""
    from dreal_timm import DrealTask
    model = make_model('cbam')
    made = batches_of(model)
    task = DrealTask(model, input_size=(3, 64, 64), verbose=False, seed=3)
    trainable = task.get_trainable_module()
    trainable.eval()
    critic: Critic = trainable.critic
    found = audit(model, made, ['layer2', 'layer3'], (3, 64, 64), critic)
    with torch.no_grad():
        judged = trainable(made[0][0]).critic_quality
    order = [site.name for group in task.groups for site in group.sites]
    columns = [order.index(name) for name in found.names]
    torch.testing.assert_close(found.quality[:5], judged[:, columns], rtol=0, atol=1e-6)
    assert found.quality.std() > 1e-4
    row = summarize(found, resamples=10)['sites'][0]
    assert row['quality'] == pytest.approx(found.quality[:, 0].mean().item(), abs=1e-6)
    assert not math.isnan(row['rank_correlation'])


def test_the_null_pass(attention, monkeypatch):
    """Its log p is that of a plain pass with the map's last digit raised, in bfloat16 where that shows; of some images.

    In bfloat16 that moves log p by far more than in float32, and the floor of findings is what it moves it by.
    """
    monkeypatch.setattr('dreal_timm.audit.run._NULL', 5)
    floors = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(attention).to(dtype)
        made = batches_of(model)
        found = audit(model, made, input_size=(3, 64, 64))
        images, target = made[0]
        for column, site in enumerate(find_sites(model, (3, 64, 64))):
            module = model.get_submodule(site.module)
            gate = module.get_submodule(readers_of(module)[0].gate)
            handle = gate.register_forward_hook(
                lambda gate, args, output: output * (1 + torch.finfo(output.dtype).eps))
            with torch.no_grad():
                logits = model.eval()(images)
            handle.remove()
            log_p = logits.float().log_softmax(1).gather(1, target[:, None]).squeeze(1)
            torch.testing.assert_close(found.null_log_p[:5, column], log_p, rtol=0, atol=2e-6)
        assert found.null_log_p[5:].isnan().all()
        assert not found.null_log_p[:5].isnan().any()
        moved = (found.null_log_p - found.log_p[:, None])[:5]
        floors.append(summarize(found, resamples=10)['network']['floor']['log_likelihood_gain'])
        assert floors[-1] == pytest.approx(max(1e-4, moved.square().mean(0).max().sqrt().item()), rel=1e-4)
        assert moved.abs().max() > 0
    assert floors[0] == 1e-4 < 1e-3 < floors[1]


def test_maps_that_do_nothing_are_no_finding():
    """Where all numbers of a map are one, its mean changes nothing, and nothing is a finding."""
    model = make_model('se')
    for module in model.modules():
        if isinstance(module, SEModule):
            nn.init.zeros_(module.fc2.weight)
            nn.init.constant_(module.fc2.bias, 0.3)
    found = audit(model, batches_of(model, (5,)), input_size=(3, 64, 64))
    rows = summarize(found, resamples=50)['sites']
    assert [row[key] for row in rows for key in row if key.endswith('_finding')] == [0] * 6 * len(rows)
    plain = summarize(audit(make_model('se'), batches_of(model, (5,)), input_size=(3, 64, 64)), resamples=50)
    assert any(row['reward_finding'] for row in plain['sites'])


def test_recordings_leave_no_hooks(attention):
    """Ten recordings within each other, ten times, see the same maps and leave no hook, also after an exception."""
    model = make_model(attention).eval()
    images, _ = make_batch(2, 64)
    sites = find_sites(model, (3, 64, 64))
    before = copied(model)
    for round_ in range(10):
        with ExitStack() as stack:
            recordings = [stack.enter_context(record(model, sites)) for _ in range(10)]
            with torch.no_grad():
                model(images)
            assert all(
                torch.equal(recording[site.name].attention, recordings[0][site.name].attention)
                for recording in recordings for site in sites)
            if round_ == 5:
                stack.enter_context(pytest.raises(ValueError, match='in the middle'))
                raise ValueError('in the middle')
        assert hooks(model) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
