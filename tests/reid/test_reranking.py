"""Re-ranking equals the paper's steps, written down with sets"""
import math

import pytest
import torch

from dreal_timm.reid import reranking
from dreal_timm.reid.metrics import METRICS


def textbook(query, gallery, k1, k2, weight, metric):
    """The steps of the paper's section 3, with sets of images and dictionaries for encodings."""
    features = torch.cat([query, gallery])
    total = len(features)
    if metric == 'cosine':
        raw = 1 - torch.cosine_similarity(features[:, None], features[None], dim=2)
    else:
        raw = torch.cdist(features, features).square()
    near = [row.argsort(stable=True).tolist() for row in raw]
    distance = [[value / max(row) for value in row] for row in raw.tolist()]

    def mutual(image, k):
        return {other for other in near[image][:k + 1] if image in near[other][:k + 1]}

    encodings = []
    for image in range(total):
        own = mutual(image, k1)
        joint = set(own)
        for other in own:
            theirs = mutual(other, round(k1 / 2))
            if len(theirs & own) > 2 / 3 * len(theirs):
                joint |= theirs
        values = {other: math.exp(-distance[image][other]) for other in joint}
        encodings.append({other: value / sum(values.values()) for other, value in values.items()})
    averaged = []
    for image in range(total):
        mean = {}
        for other in near[image][:k2]:
            for place, value in encodings[other].items():
                mean[place] = mean.get(place, 0) + value / k2
        averaged.append(mean)
    found = torch.zeros(len(query), len(gallery), dtype=torch.float64)
    for i in range(len(query)):
        for j in range(len(gallery)):
            one, other = averaged[i], averaged[len(query) + j]
            common = sum(min(value, other[place]) for place, value in one.items() if place in other)
            found[i, j] = (1 - common / (2 - common)) * (1 - weight) + weight * distance[i][len(query) + j]
    return found


def clustered(queries, gallery, seed):
    """Features of a few identities, some of them far from any."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 8, (queries + gallery,), generator=generator)
    noise = torch.randn(queries + gallery, 12, generator=generator, dtype=torch.float64)
    return (centers[labels] + 0.5 * noise).split([queries, gallery])


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize(('k1', 'k2', 'weight'), [(20, 6, 0.3), (7, 3, 0.5), (5, 1, 0.0), (9, 10, 1.0), (1, 1, 0.3)])
def test_textbook(seed, metric, k1, k2, weight):
    """Distances are those of the textbook, for odd and even k1, with and without averaging."""
    query, gallery = clustered(9, 50, seed)
    found = torch.cat(list(reranking.rerank(query, gallery, k1, k2, weight, metric)))
    torch.testing.assert_close(found, textbook(query, gallery, k1, k2, weight, metric), rtol=0, atol=1e-9)


@pytest.mark.parametrize('images', [8, 4])
def test_all_images_as_neighbours(images):
    """The highest k1 that so few images allow is re-ranked as in the textbook."""
    query, gallery = clustered(2, images - 2, 0)
    found = torch.cat(list(reranking.rerank(query, gallery, images - 1, 2)))
    expected = textbook(query, gallery, images - 1, 2, 0.3, 'cosine')
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_blocks(monkeypatch):
    """Blocks of any size give the same."""
    query, gallery = clustered(9, 50, 0)
    whole = torch.cat(list(reranking.rerank(query, gallery)))
    monkeypatch.setattr(reranking, '_PAIRS', 210)
    blocks = list(reranking.rerank(query, gallery))
    assert [len(block) for block in blocks] == [4, 4, 1]
    torch.testing.assert_close(torch.cat(blocks), whole, rtol=0, atol=1e-12)


def test_images_that_are_equal():
    """Copies of an image, whose distance is 0, and features that are all the same, give finite distances."""
    query, gallery = clustered(5, 30, 1)
    gallery = torch.cat([gallery, query, query])
    found = torch.cat(list(reranking.rerank(query, gallery, 6, 3)))
    assert found.isfinite().all()
    assert (found[range(5), range(30, 35)] < found[:, :30].min(1).values).all()
    same = torch.ones(12, 4)
    assert torch.cat(list(reranking.rerank(same[:3], same[3:], 4, 2))).isfinite().all()


@pytest.mark.parametrize(('k1', 'k2', 'weight'), [(60, 6, 0.3), (20, 0, 0.3), (5, 7, 0.3), (20, 6, 1.5)])
def test_errors(k1, k2, weight):
    """Numbers that make no sense for so many images are an error."""
    query, gallery = clustered(9, 50, 0)
    with pytest.raises(ValueError, match=r'^k1|^lambda'):
        next(reranking.rerank(query, gallery, k1, k2, weight))


def test_features_that_are_no_numbers():
    """A feature that is not finite is an error."""
    query, gallery = clustered(9, 50, 0)
    query[3, 3] = float('nan')
    with pytest.raises(ValueError, match='A feature is not finite'):
        next(reranking.rerank(query, gallery))
