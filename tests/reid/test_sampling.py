"""P x K batches: exact, the same for a seed, whole on each process"""
from collections import Counter

import pytest
import torch

from dreal_timm.reid.sampling import PKSampler


def labels_of(sizes, seed=0):
    """So many images of each identity, in random order; identities have any numbers."""
    values = torch.repeat_interleave(torch.arange(len(sizes)) * 7 + 3, torch.tensor(sizes))
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize('sizes', [
    [4] * 8, [9, 1, 5, 30, 8, 2, 4, 4, 7, 12], [1] * 12, [100, 4, 4, 4], [50, 50, 50, 1], [3, 17, 4, 4, 4, 4, 9],
])
@pytest.mark.parametrize('epoch', [0, 5])
def test_batches_are_exact(sizes, epoch):
    """Each batch has P identities and K images of each, no image twice but of an identity with fewer than K."""
    p, k = 4, 4
    labels = labels_of(sizes)
    sampler = PKSampler(labels, p, k, seed=1)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) > 0
    for batch in batches:
        assert sorted(Counter(labels[batch].tolist()).values()) == [k] * p
        groups = labels[batch].view(p, k)
        assert (groups == groups[:, :1]).all()
    used = Counter(index for batch in batches for index in batch)
    count = Counter(labels.tolist())
    for index, times in used.items():
        assert times == 1 or count[labels[index].item()] < k


def test_every_image_is_used():
    """Where identities have a multiple of K images, an epoch holds each image once, but for a last part of a batch."""
    labels = labels_of([8, 4, 12, 16, 4, 4, 8])
    used = Counter(index for batch in PKSampler(labels, 3, 4) for index in batch)
    assert set(used.values()) == {1}
    assert len(used) == 56 // 12 * 12
    few = labels_of([2, 3, 4, 5])
    seen = set()
    sampler = PKSampler(few, 4, 4)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        seen |= {index for batch in sampler for index in batch}
    assert seen == set(range(14))


def test_an_image_of_few_is_repeated_by_chance():
    """An identity with fewer than K images gives all of them, and some again, other ones in other epochs."""
    labels = labels_of([3, 3])
    sampler, drawn = PKSampler(labels, 2, 8), []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        batch, = sampler
        drawn.append(sorted(batch))
        assert set(batch) == set(range(6))
    assert len({tuple(batch) for batch in drawn}) > 3


def test_seed_and_epoch():
    """The same seed and epoch give the same batches, whatever was drawn before; others give others."""
    labels = labels_of([8] * 20)
    one, other = PKSampler(labels, 4, 4, seed=3), PKSampler(labels, 4, 4, seed=3)
    first = list(one)
    one.set_epoch(1)
    second = list(one)
    assert first != second
    torch.manual_seed(5)
    other.set_epoch(1)
    assert list(other) == second
    other.set_epoch(0)
    assert list(other) == first
    assert list(PKSampler(labels, 4, 4, seed=4)) != first


@pytest.mark.parametrize('processes', [2, 3])
def test_processes_share_the_batches_of_one(processes):
    """The n-th batches of the processes are the next ones of a single process, and all have as many."""
    labels = labels_of([8] * 23)
    whole = list(PKSampler(labels, 4, 4, seed=3))
    parts = [list(PKSampler(labels, 4, 4, 3, process, processes)) for process in range(processes)]
    assert {len(part) for part in parts} == {len(whole) // processes}
    joint = [batch for step in zip(*parts, strict=True) for batch in step]
    assert joint == whole[:len(joint)]


def test_identities_meet_by_chance():
    """Two identities are in a batch together about as often as any other two."""
    sampler, pairs = PKSampler(labels_of([4] * 12), 3, 4), Counter()
    for epoch in range(300):
        sampler.set_epoch(epoch)
        for batch in sampler:
            a, b, c = sorted({index for index in sampler.labels[batch].tolist()})
            pairs.update([(a, b), (a, c), (b, c)])
    expected = 300 * 4 * 3 / 66
    assert len(pairs) == 66
    assert max(abs(count - expected) for count in pairs.values()) < 4.5 * expected ** 0.5


def test_many_identities():
    """100,000 identities with a million images: what is kept is a number an image and two an identity, no more."""
    labels = torch.arange(1_000_000) // 10
    sampler = PKSampler(labels, 16, 8)
    assert len(next(iter(sampler))) == 128
    assert len(sampler) == 100_000 // 16
    kept = [value for value in vars(sampler).values() if not isinstance(value, int)]
    assert all(isinstance(value, torch.Tensor) for value in kept)
    assert sum(value.untyped_storage().nbytes() for value in kept) <= 8 * (1_000_000 + 2 * 100_000)


@pytest.mark.parametrize(('sizes', 'arguments', 'message'), [
    ([4, 4, 4], {'identities': 4}, 'A batch has 4 identities, and the training split has 3'),
    ([4, 4], {'identities': 1}, 'A batch needs 2 identities'),
    ([4, 4], {'identities': 2, 'images': 0}, 'A batch needs 2 identities'),
    ([4] * 4, {'identities': 2, 'images': 4, 'processes': 3}, 'An epoch has 2 batches of 2 x 4, fewer than processes'),
])
def test_errors(sizes, arguments, message):
    """Batches that cannot be made are an error."""
    with pytest.raises(ValueError, match=message):
        PKSampler(labels_of(sizes), **arguments)
