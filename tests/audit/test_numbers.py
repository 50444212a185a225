"""Intervals, sums of maps and calibration, against other libraries and by hand"""
import math

import numpy as np
import pytest
import torch
from scipy import stats

from dreal_timm.audit import bootstrap
from dreal_timm.audit.calibration import calibrate, reliability
from dreal_timm.audit.images import draw_numbers
from dreal_timm.audit.maps import MapSums
from dreal_timm.audit.parts import cut
from dreal_timm.audit.result import Audit
from dreal_timm.audit.sites import SiteRow


def test_bootstrap_agrees_with_scipy():
    """Mean and percentile interval are those of scipy's bootstrap, to its own noise."""
    values = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([1.0, 3.0])
    mean, low, high = bootstrap(values, resamples=20_000)
    for column in range(2):
        expected = stats.bootstrap(
            (values[:, column].numpy(),), np.mean, n_resamples=20_000, batch=1000, method='percentile',
            random_state=np.random.default_rng(0)).confidence_interval
        error = values[:, column].std().item() / 20
        assert mean[column] == pytest.approx(values[:, column].mean().item(), abs=1e-12)
        assert low[column] == pytest.approx(expected.low, abs=0.1 * error)
        assert high[column] == pytest.approx(expected.high, abs=0.1 * error)


def test_bootstrap_of_some_samples():
    """Only samples of weight 1 count, NaN elsewhere does no harm, and the interval is as wide as theirs alone."""
    values = torch.randn(300, 1, generator=torch.Generator().manual_seed(1)).double()
    weights = torch.arange(300) % 3 == 0
    spoilt = values.clone()
    spoilt[~weights] = math.nan
    mean, low, high = bootstrap(spoilt, weights, resamples=2000)
    _, alone_low, alone_high = bootstrap(values[weights], resamples=2000, seed=5)
    assert mean.item() == pytest.approx(values[weights].mean().item())
    assert (high - low).item() == pytest.approx((alone_high - alone_low).item(), rel=0.1)
    again = bootstrap(spoilt, weights, resamples=2000)
    assert torch.equal(low, again[1])
    assert not torch.equal(low, bootstrap(spoilt, weights, resamples=2000, seed=9)[1])


def test_bootstrap_of_nothing():
    """Without a sample that counts there is no mean, and no error."""
    assert all(value.isnan().all() for value in bootstrap(torch.ones(4, 1), torch.zeros(4), resamples=10))


def test_sums_of_parts():
    """Statistics by hand: maps (2 images, 2 positions), and the same when the images come one at a time."""
    maps = torch.tensor([[[0.0], [1.0]], [[0.5], [1.0]]])
    whole, first, second = MapSums(), MapSums(), MapSums()
    whole.add({'a': maps})
    first.add({'a': maps[:1]})
    second.add({'a': maps[1:]})
    first.merge(second)
    for sums in (whole, first):
        found = sums.statistics('a')
        assert found.mean.flatten().tolist() == [0.25, 1.0]
        assert found.variance.flatten().tolist() == [0.0625, 0.0]
        assert found.spread == pytest.approx((0.5 + 0.25) / 2)
        # all numbers 0, 1, .5, 1: mean .625, mean square .5625, variance .171875; over images .03125
        assert found.input_share == pytest.approx(0.03125 / 0.171875)
    assert torch.equal(whole.means()['a'], first.means()['a'])


def test_a_constant_map_has_no_share():
    """Where nothing varies there is no share of the variance."""
    sums = MapSums()
    sums.add({'a': torch.full((3, 4), 0.3)})
    assert math.isnan(sums.statistics('a').input_share)
    assert sums.statistics('a').variance.abs().max() < 1e-12


def made(quality, change, right):
    """An audit of one site from numbers."""
    count = len(change)
    log_p = torch.full((count,), -1.0)
    row = SiteRow('site', 'SEModule', 'channel', (4,), 'group', 1, 1)
    right = torch.tensor(right)
    return Audit(
        [row], torch.arange(count), torch.zeros(count, dtype=torch.long), log_p, right,
        log_p[:, None] + torch.tensor(change)[:, None], right[:, None], log_p[:, None], right[:, None],
        torch.tensor(quality)[:, None], {})


def test_calibration_by_hand():
    """Rewards of 1 - exp(change), -1 where wrong; rank correlations over right images and over all."""
    audit = made([0.1, 0.2, 0.3, -0.9], [-0.5, -1.0, -2.0, -3.0], [True, True, True, False])
    assert audit.rewards()[:, 0].tolist() == pytest.approx([1 - math.exp(-0.5), 1 - math.exp(-1), 1 - math.exp(-2), -1])
    found = calibrate(audit, 'site')
    assert found['quality'] == pytest.approx(-0.075)
    assert found['rank_correlation'] == pytest.approx(1)
    assert found['rank_correlation_all'] == pytest.approx(1)
    swapped = calibrate(made([0.2, 0.1, 0.3, 0.9], [-0.5, -1.0, -2.0, -3.0], [True, True, True, False]), 'site')
    assert swapped['rank_correlation'] == pytest.approx(0.5)
    assert swapped['rank_correlation_all'] == pytest.approx(-0.4)
    assert math.isnan(calibrate(made([0.2] * 3, [-1.0, -2.0, -3.0], [True] * 3), 'site')['rank_correlation'])


def test_reliability_by_hand():
    """Images in bins of equal number by the judgement: mean judgement, mean reward, and 1.96 standard errors."""
    audit = made([0.4, 0.1, 0.2, 0.3], [-4.0, -1.0, -2.0, -3.0], [True] * 4)
    points = reliability(audit, 'site', bins=2)
    rewards = [1 - math.exp(-k) for k in (1, 2, 3, 4)]
    assert [point[0] for point in points] == pytest.approx([0.15, 0.35])
    assert [point[1] for point in points] == pytest.approx([sum(rewards[:2]) / 2, sum(rewards[2:]) / 2])
    error = 1.96 * abs(rewards[1] - rewards[0]) / 2 ** 0.5 / 2 ** 0.5
    assert points[0][3] - points[0][1] == pytest.approx(error)


def test_draw_and_cut():
    """All images, or so many of them, in order and by the seed; parts are of equal size but for the last."""
    assert draw_numbers(5, None, 0) == draw_numbers(5, 9, 0) == [0, 1, 2, 3, 4]
    drawn = draw_numbers(1000, 10, 0)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 10
    assert drawn == draw_numbers(1000, 10, 0) != draw_numbers(1000, 10, 1)
    with pytest.raises(ValueError, match='num_samples'):
        draw_numbers(5, 0, 0)
    assert [len(part) for part in cut(range(600))] == [256, 256, 88]
    parts = cut(range(10_001))
    assert len(parts) == 16
    assert [number for part in parts for number in part] == list(range(10_001))
