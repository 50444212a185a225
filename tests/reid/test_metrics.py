"""Retrieval metrics equal the slow textbook's, in every odd case"""
import math

import pytest
import torch
from reid.textbook import textbook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dreal_timm.reid import metrics
from dreal_timm.reid.metrics import Retrieval, distance_blocks, pool_queries, retrieve, score


def case(seed, queries=23, gallery=90, identities=9, cameras=3, ties=False, dtype=torch.float32):
    """Random identities with distractors (0), an identity that the gallery lacks, and distances."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*args):
        return torch.randint(*args, generator=generator)

    pids = draw(1, identities + 2, (queries,)), draw(0, identities + 1, (gallery,))
    camids = draw(0, cameras, (queries,)), draw(0, cameras, (gallery,))
    distances = torch.rand(queries, gallery, generator=generator, dtype=dtype)
    if ties:
        distances = (distances * 6).round()
    return distances, *pids, *camids


def check(found: Retrieval, expected) -> None:
    assert found.first.tolist() == [first for first, *_ in expected]
    for values, column in ((found.average_precision, 1), (found.inverse_penalty, 2)):
        for value, row in zip(values.tolist(), expected, strict=True):
            assert math.isnan(value) if row[column] is None else abs(value - row[column]) < 1e-9


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('cameras', [1, 3])
@pytest.mark.parametrize('rule', metrics.CAMERA_RULES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_textbook(seed, ties, cameras, rule, dtype):
    """Ranks, average precision and inverse penalty of every query, with ties, distractors and queries without match."""
    data = case(seed, cameras=cameras, ties=ties, dtype=dtype)
    expected = textbook(*data, camera_rule=rule)
    check(score(iter(data[0].clone().split(7)), *data[1:], rule), expected)
    assert any(first == 0 for first, *_ in expected)
    assert any(first > 0 for first, *_ in expected) == (rule == 'ignore' or cameras > 1)


@pytest.mark.parametrize('rule', metrics.CAMERA_RULES)
@pytest.mark.parametrize('ties', [False, True])
def test_identities_of_many_images(rule, ties, monkeypatch):
    """Queries whose identity has too many images to count between them are sorted: the same numbers, in their order."""
    for seed in range(4):
        data = case(seed, gallery=200, identities=12, ties=ties)
        expected = score(iter(data[0].clone().split(7)), *data[1:], rule)
        check(expected, textbook(*data, camera_rule=rule))
        sizes = torch.bincount(data[2], minlength=14)[data[1]]
        for many in (0, int(sizes.median()), int(sizes.max()) - 1):
            monkeypatch.setattr(metrics, '_MANY', many)
            found = score(iter(data[0].clone().split(7)), *data[1:], rule)
            assert torch.equal(found.first, expected.first)
            torch.testing.assert_close(
                found.average_precision, expected.average_precision, rtol=0, atol=1e-15, equal_nan=True)
            assert torch.equal(found.inverse_penalty.nan_to_num(), expected.inverse_penalty.nan_to_num())
        monkeypatch.undo()


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves(found) if isinstance(value, torch.Tensor)]
        self.numbers = max([self.numbers, *(value.untyped_storage().nbytes() for value in tensors)])
        return found


def test_memory_of_an_identity_of_many_images():
    """No tensor grows with queries x images of an identity: it is the block of distances that sets the size."""
    queries, gallery, block = 400, 3_000, 10
    pids = torch.ones(queries, dtype=torch.int64), torch.ones(gallery, dtype=torch.int64)
    camids = torch.zeros(queries, dtype=torch.int64), torch.arange(gallery) % 3
    generator = torch.Generator().manual_seed(0)
    blocks = (torch.rand(block, gallery, generator=generator) for _ in range(queries // block))
    with Largest() as largest:
        found = score(blocks, *pids, *camids)
    assert found.summary()['mAP'] == 100.0  # by hand: all that is left is right
    assert largest.numbers <= 2 * 8 * block * gallery


def test_one_camera_has_no_answer():
    """With one camera the rule of Market-1501 leaves nothing, and the summary says so."""
    data = case(0, cameras=1)
    summary = score(iter([data[0]]), *data[1:]).summary()
    assert (summary['queries'], summary['skipped']) == (0, 23)
    assert all(math.isnan(summary[name]) for name in ('rank1', 'rank20', 'mAP', 'mINP'))


def test_worked_by_hand():
    """Five images: the nearest is of the query's camera and left out, ranks of both right answers are 2 and 4.

    AP = (1/2 + 2/4) / 2 = 0.5, INP = 2 / 4, rank-1 is missed.
    """
    distances = torch.tensor([[0.1, 0.3, 0.2, 0.5, 0.4]])
    gallery_pids, gallery_camids = torch.tensor([7, 7, 0, 7, 3]), torch.tensor([1, 2, 2, 3, 1])
    found = score(iter([distances]), torch.tensor([7]), gallery_pids, torch.tensor([1]), gallery_camids)
    assert found.first.tolist() == [2]
    summary = found.summary((1, 2))
    assert summary == {'rank1': 0.0, 'rank2': 100.0, 'mAP': 50.0, 'mINP': 50.0, 'queries': 1, 'skipped': 0}


def test_numbers_that_are_next_to_each_other():
    """Distances a bit apart are told apart, and zeros of both signs are equal."""
    one = torch.tensor(1.0)
    steps = [torch.nextafter(one, torch.tensor(0.0)), one, torch.nextafter(one, torch.tensor(2.0))]
    for values in (steps, steps[::-1], [torch.tensor(0.0), torch.tensor(-0.0), one]):
        distances = torch.stack([values[i % 3] for i in range(9)])[None]
        data = (distances, torch.tensor([1]), torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 0]), torch.zeros(1).long(),
                torch.ones(9).long())
        check(score(iter([distances.clone()]), *data[1:]), textbook(*data))


@pytest.mark.parametrize('metric', metrics.METRICS)
def test_features(metric, monkeypatch):
    """Distances are the cosine's or Euclid's, in blocks of any size, and the metrics are those of the distances."""
    data = case(3)
    query, gallery = torch.randn(23, 16) + 3, torch.randn(90, 16) + 3
    if metric == 'cosine':
        expected = 1 - torch.cosine_similarity(query.double()[:, None], gallery.double()[None], dim=2)
    else:
        expected = torch.cdist(query.double(), gallery.double()).square()
    torch.testing.assert_close(
        torch.cat(list(distance_blocks(query, gallery, metric))).double(), expected, rtol=1e-4, atol=1e-4)
    whole = torch.cat(list(distance_blocks(query.double(), gallery.double(), metric)))
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-9)
    check(retrieve(query.double(), gallery.double(), *data[1:], metric), textbook(expected, *data[1:]))
    monkeypatch.setattr(metrics, '_BLOCK', 90 * 5)
    assert [len(block) for block in distance_blocks(query, gallery, metric)] == [5, 5, 5, 5, 3]
    before = query.clone(), gallery.clone()
    check(retrieve(query.double(), gallery.double(), *data[1:], metric), textbook(expected, *data[1:]))
    assert torch.equal(query, before[0]) and torch.equal(gallery, before[1])


def test_euclid_of_features_far_from_zero():
    """Distances that are small beside the norms are still told apart in float32."""
    torch.manual_seed(0)
    gallery = torch.randn(50, 32).mul_(1e-2).add_(30)
    query = gallery[:10] + 1e-4 * torch.randn(10, 32)
    nearest = torch.cat(list(distance_blocks(query, gallery, 'euclidean'))).argmin(1)
    assert nearest.tolist() == list(range(10))


def test_pooled_queries():
    """Multi query is the mean of all features of an identity in a camera."""
    features = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0], [7.0, 1.0]])
    pooled, pids, camids = pool_queries(features, torch.tensor([4, 4, 4, 2]), torch.tensor([1, 1, 2, 1]))
    rows = {(p, c): row for p, c, row in zip(pids.tolist(), camids.tolist(), pooled.tolist(), strict=True)}
    assert rows == {(2, 1): [7.0, 1.0], (4, 1): [2.0, 1.0], (4, 2): [5.0, 5.0]}


@pytest.mark.parametrize(('change', 'message'), [
    ('rule', 'camera_rule must be one of'), ('metric', 'metric must be one of'), ('junk', 'junk'),
    ('nan', 'not finite'), ('short', 'Distances are those of 20 queries'), ('long', 'Distances are not those of'),
    ('narrow', 'Distances are not those of'), ('empty', 'The gallery is empty'),
])
def test_errors(change, message):
    """What cannot be ranked is an error in a line."""
    distances, query_pids, gallery_pids, query_camids, gallery_camids = case(0)
    rule = 'own' if change == 'rule' else 'exclude'
    if change == 'junk':
        gallery_pids[3] = -1
    elif change == 'nan':
        distances[2, 2] = float('nan')
    elif change == 'short':
        distances = distances[:20]
    elif change == 'long':
        distances = torch.cat([distances, distances])
    elif change == 'narrow':
        distances = distances[:, :-1]
    elif change == 'empty':
        gallery_pids, gallery_camids, distances = gallery_pids[:0], gallery_camids[:0], distances[:, :0]
    with pytest.raises(ValueError, match=message):
        if change == 'metric':
            next(distance_blocks(torch.ones(1, 2), torch.ones(1, 2), 'manhattan'))
        score(iter(distances.split(23)), query_pids, gallery_pids, query_camids, gallery_camids, rule)


def test_no_queries():
    """No query gives no rank, and NaN, not an error."""
    _, _, gallery_pids, _, gallery_camids = case(0)
    nothing = torch.zeros(0, dtype=torch.int64)
    summary = score(iter([]), nothing, gallery_pids, nothing, gallery_camids).summary()
    assert (summary['queries'], summary['skipped']) == (0, 0)
    assert math.isnan(summary['mAP'])
