"""An audit of a network in memory, on a loader of one's own"""
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from audit.loop import batches_of, maps_of, oracle
from networks import make_model
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dreal_timm import DrealTask, find_sites
from dreal_timm.audit import Audit, audit, audit_network, compare_audits, load_critic
from dreal_timm.audit.examples import Examples
from dreal_timm.hub import weights_digest

DOCS = Path(__file__).parents[2] / 'docs' / 'audit.md'


@pytest.fixture(scope='module')
def network():
    """A network, 12 images and their classes, of which it gets 6 right."""
    model = make_model('cbam')
    images, target = (torch.cat(part) for part in zip(*batches_of(model), strict=True))
    return model, images, target


class _Stream(IterableDataset):
    def __init__(self, images, target):
        self.pairs = list(zip(images, target, strict=True))

    def __iter__(self):
        return iter(self.pairs)


class _Numpy(Dataset):
    """Images as arrays, labels as numbers, and something more."""

    def __init__(self, images, target):
        self.images, self.target = images.numpy(), target.tolist()

    def __len__(self):
        return len(self.target)

    def __getitem__(self, index):
        return self.images[index], self.target[index], f'{index}.png'


@pytest.mark.parametrize('make', [
    lambda images, target: list(zip(images.split(5), target.split(5), strict=True)),
    lambda images, target: DataLoader(TensorDataset(images, target), batch_size=5),
    TensorDataset, _Numpy, _Stream,
], ids=['list', 'loader', 'dataset', 'numpy', 'stream'])
def test_any_loader_of_images_and_classes(network, make):
    """The numbers are those of a loop over sites by hand, whatever gives the images, of their own size."""
    model, images, target = network
    found, summary = audit_network(model, make(images, target), resamples=10, batch_size=5)
    with torch.no_grad():
        logits = model.eval()(images)
    assert summary['network']['images'] == 12
    assert summary['network']['top1'] == pytest.approx(100 * (logits.argmax(1) == target).double().mean().item())
    sites = find_sites(model, (3, 64, 64))  # the network's own size is another
    assert [row['size'] for row in summary['sites']] == [site.size for site in sites]
    log_p = logits.log_softmax(1).gather(1, target[:, None]).squeeze(1)
    for index in (0, 5):
        for constant, row in ((None, found.mean_log_p), (
                maps_of(model, images, sites[index]).mean(0, keepdim=True), found.constant_log_p)):
            expected, _ = oracle(model, images, target, sites[index], constant)
            torch.testing.assert_close(row[:, index], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.log_p, log_p, rtol=0, atol=1e-5)
    assert found.number.tolist() == list(range(12))


def test_lines_of_the_document(network, tmp_path, monkeypatch, capsys):
    """The lines from Python run as they stand, and write what the command writes, with pictures of the right images."""
    model, images, target = network
    monkeypatch.chdir(tmp_path)
    text = DOCS.read_text(encoding='utf-8')
    lines = text[text.index('```python\n') + 10:].partition('```')[0]
    assert len(lines.strip().splitlines()) <= 6
    names = {'model': model, 'loader': list(zip(images.split(5), target.split(5), strict=True))}
    exec(lines, names)
    assert '12 images' in capsys.readouterr().out
    folder = tmp_path / 'output' / 'audit' / 'mine'
    assert sorted(path.name for path in folder.iterdir()) == [
        'audit.json', 'examples.safetensors', 'figures', 'maps.safetensors', 'report.html', 'samples.safetensors',
        'sites.csv']
    content = json.loads((folder / 'audit.json').read_text())
    assert content['sites'][0]['reward'] == names['summary']['sites'][0]['reward']
    assert content['provenance']['weights'] == weights_digest(model.state_dict())
    loaded = Audit.load(folder)
    assert torch.equal(loaded.log_p, names['found'].log_p)
    examples = Examples.load(folder)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    assert examples.pictures
    for number, picture in examples.pictures.items():
        expected = ((images[number] * std + mean).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(picture.astype(float) - expected).max() <= 1
    assert len(examples.shown) == len(next(iter(examples.maps.values()))) > 0
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.fc.weight.mul_(0.5)
        difference = (
            other.eval()(images).log_softmax(1) - model.eval()(images).log_softmax(1)).gather(1, target[:, None]).mean()
    compared = compare_audits(loaded, audit(other, names['loader']), resamples=10)
    assert compared['network']['log_likelihood'] == pytest.approx(difference.item(), abs=1e-6)
    with pytest.raises(FileExistsError):
        audit_network(model, names['loader'], folder)


def test_images_without_a_label_are_left_out(network):
    """The label -1 is one of an image that could not be read: it counts nowhere, and the others keep their numbers."""
    model, images, target = network
    marked = target.clone()
    marked[[0, 7]] = -1
    found, summary = audit_network(model, TensorDataset(images, marked), batch_size=5, resamples=10)
    left = [number for number in range(12) if number not in (0, 7)]
    assert found.number.tolist() == left
    assert summary['network']['unreadable'] == 2
    whole = audit(model, [(images, target)])
    torch.testing.assert_close(found.mean_log_p, whole.mean_log_p[left], rtol=0, atol=1e-5)


class _Changing:
    """A loader that gives something else the second time."""

    def __init__(self, first, second):
        self.readings = [first, second]

    def __iter__(self):
        return iter(self.readings.pop(0))


def test_another_order_the_second_time_is_an_error(network):
    """What shuffles, augments, ends early or goes on is refused: the mean maps would be of other images."""
    model, images, target = network
    first = [(images[:6], target[:6]), (images[6:], target[6:])]
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    flipped = images[:6].clone()
    flipped[3] = flipped[3].flip(-1)
    for second in (
            [(images[:6][order], target[:6][order]), first[1]], [(flipped, target[:6]), first[1]], first[::-1],
            [first[0]], [], [*first, first[0]], [(images[:6], (target[:6] + 1) % 7), first[1]]):
        with pytest.raises(ValueError, match='the second time'):
            audit_network(model, _Changing(first, second), sites=['layer4.0.se.channel'])
    torch.manual_seed(0)
    with pytest.raises(ValueError, match='the second time'):
        audit(model, DataLoader(TensorDataset(images, target), batch_size=5, shuffle=True), ['layer4.0.se.channel'])
    with pytest.raises(ValueError, match='read twice'):
        audit(model, (batch for batch in first))
    assert audit(model, _Changing(first, first), ['layer4.0.se.channel']).log_p.shape == (12,)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda images, target: [(images, target + 7)], 'has 7 classes'),
    (lambda images, target: [(images, target - 9)], 'has 7 classes'),
    (lambda images, target: [(images, target.float())], 'must be integers'),
    (lambda images, target: [(images, torch.eye(7)[target].long())], 'must be integers'),
    (lambda images, target: [((images * 255).byte(), target)], 'tensors of floats'),
    (lambda images, target: [(images[0], target)], 'tensors of floats'),
    (lambda images, target: [{'image': images, 'label': target}], 'Batches must be'),
    (lambda images, target: [images], 'Batches must be'),
    (lambda images, target: [], 'yields nothing'),
    (lambda images, target: [(images, torch.full_like(target, -1))], 'None of the images'),
])
def test_what_is_no_loader_of_images_and_classes(network, tmp_path, change, message):
    """What cannot be measured is an error, and no folder is written."""
    model, images, target = network
    with pytest.raises(ValueError, match=message):
        audit_network(model, change(images, target), tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_networks_and_data_sets_that_are_refused(network):
    """A network without classes, and a data set of PIL images."""
    _, images, target = network
    with pytest.raises(ValueError, match='has no classes'):
        audit_network(make_model('se', num_classes=0), [(images, target)])
    with pytest.raises(ValueError, match='create_transform'):
        audit_network(make_model('se'), _Pictures())


class _Pictures(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return Image.new('RGB', (64, 64)), 0


def test_other_channels_and_precision(tmp_path):
    """Networks of two channels in bfloat16 are audited on float32 images, and their report has pictures."""
    model = make_model('se', in_chans=2).bfloat16()
    images, target = torch.randn(4, 2, 48, 48, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    found, _ = audit_network(model, [(images, target)], tmp_path / 'out', resamples=10)
    with torch.no_grad():
        expected = model.eval()(images.bfloat16()).float().log_softmax(1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(found.log_p, expected, rtol=0, atol=1e-5)
    assert all(picture.shape == (48, 48, 3) for picture in Examples.load(tmp_path / 'out').pictures.values())


def test_a_critic_of_a_checkpoint(tmp_path):
    """The critic that load_critic returns for the network judges as the task's does."""
    model = make_model('se')
    task = DrealTask(model, input_size=(3, 64, 64), verbose=False, seed=4)
    torch.save(task.get_checkpoint_state(), tmp_path / 'last.pth.tar')
    critic = load_critic(tmp_path / 'last.pth.tar', task.groups, model)
    images, target = batches_of(model, (5,))[0]
    found, summary = audit_network(model, [(images, target)], input_size=(3, 64, 64), critic=critic, resamples=10)
    trainable = task.get_trainable_module().eval()
    with torch.no_grad():
        expected = trainable(images).critic_quality
    order = [site.name for group in task.groups for site in group.sites]
    torch.testing.assert_close(
        found.quality, expected[:, [order.index(name) for name in found.names]], rtol=0, atol=1e-6)
    assert summary['sites'][0]['quality'] == pytest.approx(found.quality[:, 0].mean().item(), abs=1e-6)


def test_class_orders_in_memory():
    """Two audits in memory are compared by the names that the networks know."""
    first = make_model('se')
    order = torch.arange(7).roll(3)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.fc.weight.copy_(first.fc.weight[order])
        second.fc.bias.copy_(first.fc.bias[order])
    names = list('abcdefg')
    first.pretrained_cfg = {**first.pretrained_cfg, 'label_names': names}
    second.pretrained_cfg = {**second.pretrained_cfg, 'label_names': [names[index] for index in order]}
    images, target = batches_of(first, (6,))[0]
    audits = [audit(first, [(images, target)]), audit(second, [(images, order.argsort()[target])])]
    compared = compare_audits(*audits, resamples=10)
    assert set(compared['network'].values()) == {0.0}
    assert [row['log_likelihood_gain'] for row in compared['sites']] == [0.0] * len(audits[0].names)
    with pytest.raises(ValueError, match='different classes'):
        compare_audits(audits[0], audit(second, [(images, target)]))
