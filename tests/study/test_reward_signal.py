"""What is said of rewards, critic and pushes: correlations, gains by hand, and steps along gradients"""
import sys

import pytest
import torch
from oracle import map_by_hand
from study import fashion, forms, jsonl, reward_signal
from timm.layers import SEModule


def test_intraclass_correlation():
    """1 where views of an image are alike, about 0 where they are noise, and the share of the variance between."""
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(4000, 1, generator=generator), torch.randn(4000, 4, generator=generator)
    assert reward_signal.intraclass(image.expand(4000, 4)) == pytest.approx(1)
    assert abs(reward_signal.intraclass(noise)) < 0.03
    assert reward_signal.intraclass(image + noise) == pytest.approx(0.5, abs=0.03)


def test_partial_ranks():
    """What two values have from a third alone is taken away; what they have of their own stays."""
    generator = torch.Generator().manual_seed(0)
    a, b, shared, own = torch.randn(4, 4000, generator=generator)
    assert reward_signal.ranks_together(a + shared, b + shared) > 0.4
    assert abs(reward_signal.partial_ranks(a + shared, b + shared, shared)) < 0.05
    assert reward_signal.partial_ranks(a + shared + own, b + shared + own, shared) > 0.4


def test_exact_gains_by_hand():
    """1 - p'/p of each site, with the map swapped by hand."""
    model = fashion.network('se', 0.25, 0).eval()
    images, labels = torch.randn(6, 1, 32, 32), torch.arange(6)
    gains, right, known = reward_signal.exact_gains(model, images, labels)
    probabilities = model(images).softmax(1)
    torch.testing.assert_close(known.exp(), probabilities[range(6), labels])
    assert torch.equal(right, probabilities.argmax(1) == labels)
    modules = [module for module in model.modules() if isinstance(module, SEModule)]
    for column, module in enumerate(modules):
        module.forward = lambda x, m=module: x * map_by_hand(m, x).mean((1, 2, 3), keepdim=True)
        without = model(images).softmax(1)
        del module.forward
        expected = (1 - without[range(6), labels] / probabilities[range(6), labels]).clamp(-1, 1)
        torch.testing.assert_close(gains[:, column], expected.detach(), rtol=1e-3, atol=1e-5)


def test_a_training_that_is_there_is_printed(tmp_path, monkeypatch, capsys):
    """The committed training is shown without another; of other settings, or for another file, one is made."""
    made = []
    monkeypatch.setattr(reward_signal, 'run', lambda args: made.append(args.seed) or [])

    def look(*arguments):
        monkeypatch.setattr(sys, 'argv', ['reward_signal.py', *arguments])
        reward_signal.main()
        return capsys.readouterr().out

    assert 'epoch 5: top-1 83.62%' in look() and not made
    for seed in (7, 8, 8):
        look('--seed', str(seed), '--output', str(tmp_path / 'new.jsonl'))
    assert made == [7, 8]
    assert [line['settings']['seed'] for line in jsonl.read(tmp_path / 'new.jsonl')] == [7, 8]


def test_directions_are_gradients():
    """A small step along each direction lowers what it is the gradient of."""
    model = fashion.network('se', 0.25, 0)
    task = forms.make_task(model, 'split', 0, torch.device('cpu'))
    data = torch.randn(32, 1, 32, 32), torch.randint(10, (32,))
    told = reward_signal.steps_along(task, data, data, 1e-3, 0)
    assert told['steps']['class']['same']['loss'] < 0
    for measured in ('gain', 'scaled'):
        assert told['steps']['direct']['same'][measured] > told['steps']['random']['same'][measured]
    gains, right, known = reward_signal.exact_gains(model, *data)
    before, gains = told['before']['new'], gains[right]
    assert before['loss'] == pytest.approx(-known.mean().item())
    assert before['gain'] == pytest.approx(gains.sum(1).mean().item())
    assert before['scaled'] == pytest.approx((gains.mean(0) / gains.std(0)).sum().item(), rel=1e-4)
    found = reward_signal.directions(task, data, 0)
    assert told['cosine_class_log'] == pytest.approx(reward_signal._cosine(found['class'], found['log']))
    assert 0.9 < told['cosine_class_log'] < 1
    assert told['cosine_class_shuffled'] < told['cosine_class_log']
