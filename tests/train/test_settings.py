import csv
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from small_run import GROUP_NORM, assert_close, before_updates, copied, recipe, start
from tasks import gradients
from timm.layers import DropPath
from timm.utils import random_seed
from torch import nn

from dreal_timm import DrealTask
from dreal_timm.train import run, runner
from dreal_timm.train.loop import fit, train_one_epoch

SMALL = {'batch_size': 4, 'no_aug': True}


@pytest.fixture
def steps(monkeypatch):
    """What each training step got and gave: (images, targets, result)."""
    seen = []
    forward = DrealTask.forward

    def recorded(task, input, target):
        result = forward(task, input, target)
        if 'class_loss' in result:
            seen.append((input.clone(), target, result | {'output': result['output'].detach()}))
        return result

    monkeypatch.setattr(DrealTask, 'forward', recorded)
    return seen


def validation_images(images):
    """The images to validate on and their classes, read by hand."""
    paths = sorted((images / 'validation').glob('*/*.png'))
    pixels = [torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8) for path in paths]
    classes = torch.tensor([int(path.parent.name[-1]) for path in paths])
    return (torch.stack(pixels).view(-1, 1, 32, 32) / 255 - 0.4) / 0.3, classes


@pytest.mark.parametrize(('values', 'decay'), [
    ({}, lambda n: 0.6),
    ({'grad_accum_steps': 3}, lambda n: 0.6),
    ({'model_ema_warmup': True}, lambda n: min(0.6, 1 - n ** (-2 / 3))),
    ({'model_ema_force_cpu': True}, lambda n: 0.6),
])
def test_moving_average(images, tmp_path, values, decay):
    """The average in the checkpoint is that of the weights after each update of all epochs, the first one whole."""
    state = start(images, tmp_path, model_ema=True, model_ema_decay=0.6, **values)
    module, seen = state.task.get_trainable_module(), []
    state.optimizer.optimizer.register_step_post_hook(lambda *_: seen.append(copied(module)))
    fit(state)
    assert len(seen) == (4 if 'grad_accum_steps' in values else 8)
    average = seen[0]
    for n, now in enumerate(seen[1:], start=2):
        average = {
            name: decay(n) * average[name] + (1 - decay(n)) * value if value.is_floating_point() else value
            for name, value in now.items()
        }
    last = torch.load(state.directory / 'last.pth.tar', weights_only=True)
    saved = {f'model.{name}': value for name, value in last['state_dict_ema'].items()}
    saved |= {f'critic.{name}': value for name, value in last['task_state_ema']['critic'].items()}
    assert_close(saved, average, 1e-5)


def test_moving_average_is_what_counts(images, tmp_path, monkeypatch):
    """Both are validated, the average ranks the epochs, and that of the best epoch is exported."""
    found, evaluate = iter([90.0, 10.0, 80.0, 30.0, 70.0, 20.0]), runner.evaluate
    monkeypatch.setattr(
        runner, 'evaluate', lambda *args, **kwargs: evaluate(*args, **kwargs) | {'top1': next(found)})
    results = run(recipe(images, tmp_path, epochs=3, model_ema=True, model_ema_decay=0.8))
    assert (results['best_epoch'], results['metrics']['top1']) == (1, 30.0)
    assert results['metrics'] == results['epochs'][1]['validation_ema']
    rows = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    assert [float(row['eval_top1']) for row in rows] == [90, 80, 70]
    assert [float(row['eval_ema_top1']) for row in rows] == [10, 30, 20]
    model = timm.create_model(f'local-dir:{tmp_path}/run/model', pretrained=True).eval()
    best = torch.load(tmp_path / 'run' / 'checkpoint-1.pth.tar', weights_only=True)
    assert all(torch.equal(value, best['state_dict_ema'][name]) for name, value in model.state_dict().items())
    input, target = validation_images(images)
    for name, key in (('validation_ema', 'state_dict_ema'), ('validation', 'state_dict')):
        model.load_state_dict(best[key])
        with torch.no_grad():
            loss = F.cross_entropy(model(input), target).item()
        assert results['epochs'][1][name]['loss'] == pytest.approx(loss, rel=1e-4), name


def test_moving_average_on_the_cpu(few, tmp_path):
    """An average that is forced to the CPU is kept but not validated: the network itself is ranked and exported."""
    results = run(recipe(few, tmp_path, model_ema=True, model_ema_force_cpu=True, model_ema_decay=0.8, **SMALL))
    assert not any('validation_ema' in epoch for epoch in results['epochs'])
    assert results['metrics'] == results['epochs'][results['best_epoch']]['validation']
    model = timm.create_model(f'local-dir:{tmp_path}/run/model', pretrained=True)
    best = torch.load(tmp_path / 'run' / 'model_best.pth.tar', weights_only=True)
    assert all(torch.equal(value, best['state_dict'][name]) for name, value in model.state_dict().items())
    assert not torch.equal(best['state_dict']['fc.weight'], best['state_dict_ema']['fc.weight'])


def test_precision(few, tmp_path, steps):
    """Under bfloat16 logits are bfloat16 and all else float32; a run after it in the same process is not under it."""
    for index, amp in enumerate((True, False, True)):
        state = start(few, tmp_path, experiment=str(index), epochs=1, amp=amp, amp_dtype='bfloat16', **SMALL)
        low = torch.bfloat16 if amp else torch.float32
        validated = []
        state.model.register_forward_hook(lambda model, _, out: None if model.training else validated.append(out.dtype))
        fit(state)
        assert validated == [low]
        assert len(steps) == 3
        for _, target, result in steps:
            assert result['output'].dtype == low
            names = ('loss', 'class_loss', 'actor_loss', 'critic_loss', 'reward', 'quality')
            assert {result[name].dtype for name in names} == {torch.float32}
            torch.testing.assert_close(result['class_loss'], F.cross_entropy(result['output'].float(), target))
        momenta = [s['momentum_buffer'] for s in state.optimizer.state_dict()['state'].values()]
        assert {value.dtype for value in [*state.task.parameters(), *momenta]} == {torch.float32}
        steps.clear()


@pytest.mark.parametrize('accum', [2, 3, 9, 20])
def test_accumulation(images, tmp_path, accum):
    """Joined steps are an update with the large batch, of critic and network; the last joins what is left of 9."""
    values = dict(
        model_kwargs=GROUP_NORM, grad_accum_steps=accum, lr=None, lr_base=0.064, dreal={'probe': 'exact'}, **SMALL)
    state, by_hand = (start(images, tmp_path, **values) for _ in range(2))
    assert state.config.lr == pytest.approx(0.064 * 4 * accum / 256)
    updates = before_updates(state, lambda: None)
    random_seed(0)
    train_one_epoch(state, 0)
    assert len(updates) == math.ceil(9 / accum)

    random_seed(0)
    batches = list(by_hand.train_loader)
    module = by_hand.task.get_trainable_module().train()
    for first in range(0, 9, accum):
        input, target = (torch.cat(part) for part in zip(*batches[first:first + accum], strict=True))
        by_hand.optimizer.zero_grad()
        by_hand.task(input, target)['loss'].backward()
        by_hand.optimizer.step()
    assert_close(copied(state.task.get_trainable_module()), copied(module), 1e-5)


def test_accumulation_is_a_run_of_the_large_batch(images, tmp_path):
    """Three steps of 4 images are a step of 12, from the recipe to the weights after two epochs."""
    ends = []
    for name, batch_size, accum in (('small', 4, 3), ('large', 12, 1)):
        state = start(
            images, tmp_path, experiment=name, model_kwargs=GROUP_NORM, no_aug=True, batch_size=batch_size,
            grad_accum_steps=accum, lr=None, lr_base=0.064, sched_on_updates=True, dreal={'probe': 'exact'})
        fit(state)
        ends.append(copied(state.task.get_trainable_module()))
    assert_close(*ends, 1e-5)


def test_channels_last(few, tmp_path):
    """Weights and images are in channels_last layout, in training and validation, and the result is the same."""
    ends = []
    for layout in (False, True):
        state = start(
            few, tmp_path, experiment=f'{layout}', channels_last=layout, input_size=[3, 32, 32], epochs=1,
            lr=0.002, model_kwargs=GROUP_NORM, **SMALL)
        seen = []
        for module in (state.model, state.model.layer2):
            module.register_forward_pre_hook(lambda module, args: seen.append((module.training, args[0].stride())))
        fit(state)
        assert {training for training, _ in seen} == {True, False}
        assert all((stride[1] == 1) == layout for _, stride in seen)
        kernels = [value for value in state.model.state_dict().values() if value.ndim == 4 and value.shape[-1] > 1]
        assert all((kernel.stride()[1] == 1) == layout for kernel in kernels)
        ends.append(copied(state.task.get_trainable_module()))
    assert_close(*ends, 1e-5)


def clipped(mode, gradients, weights):
    """Gradients clipped by hand: by 0.1, and by 0.01 for 'agc', which leaves the classifier out."""
    if mode == 'norm':
        total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        return {name: gradient * min(1, 0.1 / total) for name, gradient in gradients.items()}
    if mode == 'value':
        return {name: gradient.clamp(-0.1, 0.1) for name, gradient in gradients.items()}
    result = {}
    for name, gradient in gradients.items():
        units = (len(gradient), -1) if gradient.ndim > 1 else (1, -1)
        rows = gradient.reshape(units)
        bound = 0.01 * weights[name].reshape(units).norm(dim=1, keepdim=True).clamp(min=1e-3)
        rows = rows * (bound / rows.norm(dim=1, keepdim=True)).clamp(max=1)
        result[name] = gradient if name.startswith('fc.') else rows.view_as(gradient)
    return result


@pytest.mark.parametrize('mode', ['norm', 'value', 'agc'])
def test_clipping(few, tmp_path, mode):
    """The joined gradient of the network is clipped as asked, that of the critic is not."""
    seen = []
    for clip in (None, 0.01 if mode == 'agc' else 0.1):
        state = start(few, tmp_path, clip_grad=clip, clip_mode=mode, grad_accum_steps=2, **SMALL)
        weights = copied(state.model)
        module = state.task.get_trainable_module()
        recorded = before_updates(state, lambda: gradients(module))
        train_one_epoch(state, 0)
        seen.append(recorded[0])
    critic = [{n: g for n, g in gradient.items() if n.startswith('critic.')} for gradient in seen]
    free, bounded = (
        {n.removeprefix('model.'): g for n, g in gradient.items() if n.startswith('model.')} for gradient in seen)
    assert_close(bounded, clipped(mode, free, weights), 1e-5)
    assert not torch.allclose(bounded['conv1.0.weight'], free['conv1.0.weight'])
    assert critic[0]
    assert all(torch.equal(value, critic[1][name]) for name, value in critic[0].items())


def test_gradient_checkpointing(few, tmp_path):
    """Activations are computed again in the backward pass, and the weights are the same."""
    ends, passes = [], []
    for checkpointing in (False, True):
        state = start(few, tmp_path, grad_checkpointing=checkpointing, drop_path=0.2, drop=0.2, **SMALL)
        calls = []
        state.model.layer1[0].conv1.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        random_seed(0)
        train_one_epoch(state, 0)
        ends.append({name: p.detach() for name, p in state.task.get_trainable_module().named_parameters()})
        passes.append(len(calls))
    assert passes[1] == passes[0] + 3
    assert_close(*ends, 1e-6)


@pytest.mark.parametrize('no_prefetcher', [False, True])
@pytest.mark.parametrize(('values', 'cuts', 'mixes'), [
    ({'mixup': 0.8}, False, True),
    ({'mixup': 0.8, 'smoothing': 0.3}, False, True),
    ({'cutmix': 1.0}, True, True),
    ({'cutmix_minmax': [0.3, 0.6]}, True, True),
    ({'mixup': 0.8, 'cutmix': 1.0, 'mixup_switch_prob': 1.0, 'mixup_mode': 'elem'}, True, True),
    ({'mixup': 0.8, 'cutmix': 1.0, 'mixup_switch_prob': 0.0, 'mixup_mode': 'pair'}, False, True),
    ({'mixup': 0.8, 'mixup_prob': 0.0}, True, False),
])
def test_mixed_images_have_mixed_targets(few, tmp_path, steps, values, cuts, mixes, no_prefetcher):
    """Images and soft targets are mixed alike up to mixup_off_epoch, and the class loss is that of these targets."""
    state = start(few, tmp_path, mixup_off_epoch=1, no_prefetcher=no_prefetcher, **SMALL, **values)
    fit(state)
    smoothing = values.get('smoothing', 0.0)
    in_bands, mixed, right = [], [], []
    for input, target, result in steps:
        pixels = 255 * (0.3 * input + 0.4)
        shares = (target - smoothing / 3) / (1 - smoothing)
        torch.testing.assert_close(target.sum(1), torch.ones(4))
        assert target.min() >= smoothing / 3 - 1e-6
        # an image of class k has pixels of 90 k to 90 k + 39
        brightness = 19.5 + 90 * shares @ torch.arange(3.0)
        assert (pixels.mean((1, 2, 3)) - brightness).abs().max() < 3
        in_bands.append(bool((pixels.round() % 90 < 40).all()))
        mixed.append(bool((shares.amax(1) < 0.99).any()))
        right += (result['output'].argmax(1) == target.argmax(1)).tolist()
        loss = -(target * result['output'].log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(result['class_loss'], loss)
    assert any(mixed[:3]) == mixes
    assert not any(mixed[3:])
    assert all(in_bands[:3]) == cuts
    top1 = [epoch['train']['top1'] for epoch in state.history]
    assert top1 == pytest.approx([100 * sum(right[:12]) / 12, 100 * sum(right[12:]) / 12])


@pytest.mark.parametrize(('mode', 'symmetric', 'shared'), [
    ('batch', True, True), ('pair', True, False), ('elem', False, False), ('half', False, False),
])
def test_what_shares_a_mixing_ratio(few, tmp_path, steps, mode, symmetric, shared):
    """One ratio holds for the batch, for a pair of images or for an image; 'half' trains on half of the images."""
    state = start(few, tmp_path, batch_size=12, no_aug=True, mixup=1.0, mixup_mode=mode)
    train_one_epoch(state, 0)
    target = steps[0][1]
    assert len(target) == (6 if mode == 'half' else 12)
    both = target + target.flip(0)
    assert torch.allclose(both, both.round(), atol=1e-5) == symmetric
    ratios = {round(share, 4) for share in target.amax(1).tolist() if share < 0.9999}
    assert (len(ratios) == 1) == shared


def binary(on, off, weight=1.0, per_image=3):
    """Binary cross-entropy with these targets, its sum for each image divided by per_image."""
    def loss(output, target):
        truth = torch.full_like(output, off).scatter(1, target[:, None], on)
        terms = -weight * truth * output.sigmoid().log() - (1 - truth) * (1 - output.sigmoid()).log()
        return terms.sum(1).mean() / per_image
    return loss


def smoothed(output, target):
    truth = torch.full_like(output, 0.1).scatter(1, target[:, None], 0.8)
    return -(truth * output.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize(('values', 'formula'), [
    ({}, lambda output, target: -output.log_softmax(1)[range(4), target].mean()),
    ({'smoothing': 0.3}, smoothed),
    ({'bce_loss': True}, binary(1.0, 0.0)),
    ({'bce_loss': True, 'smoothing': 0.3}, binary(0.8, 0.1)),
    ({'bce_loss': True, 'smoothing': 0.3, 'bce_sum': True}, binary(0.8, 0.1, per_image=1)),
    ({'bce_loss': True, 'smoothing': 0.3, 'bce_target_thresh': 0.2}, binary(1.0, 0.0)),
    ({'bce_loss': True, 'smoothing': 0.3, 'bce_pos_weight': 3.0}, binary(0.8, 0.1, weight=3.0)),
])
def test_class_loss(few, tmp_path, steps, values, formula):
    """The class loss is the formula of the setting; that of the validation is the plain cross-entropy."""
    state = start(few, tmp_path, epochs=1, **SMALL, **values)
    fit(state)
    for _, target, result in steps:
        torch.testing.assert_close(result['class_loss'], formula(result['output'], target))
    input, target = validation_images(few)
    with torch.no_grad():
        loss = F.cross_entropy(state.model.eval()(input), target)
    assert state.history[0]['validation']['loss'] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.filterwarnings('ignore')  # of the compiler's own
def test_compiled_run(few, tmp_path):
    """A compiled run ends with the weights of an eager one, critic and moving average included."""
    ends = []
    for backend in (None, 'eager'):
        state = start(
            few, tmp_path, experiment=f'{backend}', torchcompile=backend, epochs=1, model_ema=True, model_ema_decay=0.8,
            model_kwargs=GROUP_NORM, **SMALL)
        modules = (state.task.trainable_module, state.task.get_eval_model(), state.task.get_eval_model(ema=True))
        assert all(hasattr(module, '_orig_mod') == bool(backend) for module in modules)
        fit(state)
        last = torch.load(state.directory / 'last.pth.tar', weights_only=True)
        ends.append([last[key] for key in ('state_dict', 'state_dict_ema')] + [last['task_state']['critic']])
        assert 'validation_ema' in state.history[0]
    for eager, compiled in zip(*ends, strict=True):
        assert_close(compiled, eager, 1e-5)


@pytest.mark.parametrize('enabled', [True, False])
def test_frozen_backbone(few, tmp_path, enabled):
    """Attention and classifier alone are trained, statistics of frozen batch norms stay, and the export loads."""
    values = dict(weight_decay=0.1, dreal={'freeze': 'backbone', 'enabled': enabled}, **SMALL)
    before = copied(start(few, tmp_path, **values).model)
    run(recipe(few, tmp_path, **values))
    last = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=True)
    changed = {name for name, value in last['state_dict'].items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if '.se.' in name or name.startswith('fc.')}
    model = timm.create_model(f'local-dir:{tmp_path}/run/model', pretrained=True)
    assert torch.equal(model.conv1[0].weight, before['conv1.0.weight'])


def passes(state, module):
    """Return the list of (network is training, first argument) of each call of one of its modules, from now on."""
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append((state.model.training, args[0].detach().clone())))
    return seen


def test_drop(few, tmp_path):
    """Half of the features before the classifier are dropped in training, and none in validation."""
    state = start(few, tmp_path, epochs=1, drop=0.5, **SMALL)
    pooled, classified = [], passes(state, state.model.fc)
    state.model.global_pool.register_forward_hook(lambda _, args, output: pooled.append(output.detach().clone()))
    fit(state)
    dropped = []
    for features, (training, input) in zip(pooled, classified, strict=True):
        kept = features[input != 0]
        torch.testing.assert_close(input[input != 0], 2 * kept if training else kept)
        dropped.append((training, ((input == 0) & (features != 0)).sum().item(), (features != 0).sum().item()))
    assert all(count == 0 for training, count, _ in dropped if not training)
    counts = [(count, of) for training, count, of in dropped if training]
    assert abs(sum(count for count, _ in counts) / sum(of for _, of in counts) - 0.5) < 0.1
    assert len(counts) >= 6
    assert all(count for count, _ in counts)


def test_drop_path(few, tmp_path):
    """The rate of stochastic depth grows over the blocks, up to the one asked for."""
    state = start(few, tmp_path, drop_path=0.3)
    rates = [module.drop_prob for module in state.model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(('values', 'pooling'), [
    ({}, lambda x: x.mean((2, 3))), ({'gp': 'max'}, lambda x: x.amax((2, 3))),
    ({'gp': 'catavgmax'}, lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)),
])
def test_pooling(few, tmp_path, values, pooling):
    """The classifier sees the pooling that was asked for."""
    state = start(few, tmp_path, **SMALL, **values)
    maps, classified = passes(state, state.model.global_pool), passes(state, state.model.fc)
    train_one_epoch(state, 0)
    for (_, x), (_, input) in zip(maps, classified, strict=True):
        torch.testing.assert_close(input, pooling(x))


def test_batch_norm_settings(few, tmp_path):
    """Momentum and epsilon reach the batch norms of a model that takes them; another model is told by their name."""
    values = dict(model='test_efficientnet', model_kwargs={}, dreal={'enabled': False})
    state = start(few, tmp_path, bn_momentum=0.3, bn_eps=2e-3, **values)
    norms = [module for module in state.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.3, 2e-3)}
    for name in ('bn_momentum', 'bn_eps'):
        with pytest.raises((TypeError, ValueError), match=name):
            start(few, tmp_path, **{name: 0.3})


@pytest.mark.parametrize(('values', 'scale', 'bias'), [
    ({'head_init_scale': 0.5}, 0.5, None), ({'head_init_bias': -2.0}, 1.0, -2.0),
    ({'head_init_scale': 0.0, 'head_init_bias': 0.5}, 0.0, 0.5),
])
def test_start_of_the_classifier(few, tmp_path, values, scale, bias):
    """The classifier starts from the scaled weights and the bias that were asked for."""
    plain, head = (start(few, tmp_path, **v).model.fc for v in ({}, values))
    assert torch.equal(head.weight, scale * plain.weight)
    assert torch.equal(head.bias, scale * plain.bias if bias is None else torch.full((3,), bias))


@pytest.mark.parametrize(('values', 'shape'), [
    ({'input_size': [3, 48, 40]}, (3, 48, 40)),
    ({'input_size': None, 'in_chans': 1, 'img_size': 40}, (1, 40, 40)),
    ({'input_size': None, 'img_size': 40}, (3, 40, 40)),
    ({'input_size': None, 'in_chans': 1}, (1, 160, 160)),
])
def test_image_size(few, tmp_path, values, shape):
    """Images of both splits have the channels and the size that were asked for, and the network takes them."""
    state = start(few, tmp_path, batch_size=4, **values)
    assert state.data['input_size'] == shape
    for loader in (state.train_loader, state.validate.keywords['loader']):
        assert next(iter(loader))[0].shape[1:] == shape
    assert state.model.conv1[0].in_channels == shape[0]
    if shape[-1] <= 48:
        fit(state)


@pytest.mark.parametrize(('values', 'message'), [
    ({'amp': True}, 'float16 needs a GPU'),
    ({'mixup': 0.5, 'batch_size': 7}, 'odd 7'),
    ({'cutmix_minmax': [0.2, 0.8], 'batch_size': 7}, 'odd 7'),
    ({'mixup': 0.5, 'mixup_mode': 'half', 'no_prefetcher': True}, 'needs the prefetcher'),
])
def test_refused_settings(few, tmp_path, values, message):
    """What cannot be trained is refused in one line, before anything is written."""
    with pytest.raises(ValueError, match=message) as caught:
        run(recipe(few, tmp_path, **values))
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.iterdir())
