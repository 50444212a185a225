"""Intervals, sums of maps, calibration and findings, against other libraries and by hand"""
import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

from dreal_timm.audit import bootstrap, compare_audits, format_comparison, format_summary, summarize
from dreal_timm.audit.calibration import calibrate, reliability
from dreal_timm.audit.compare import read_summary
from dreal_timm.audit.examples import Examples, extremes
from dreal_timm.audit.images import draw_numbers
from dreal_timm.audit.maps import MapStatistics, MapSums
from dreal_timm.audit.parts import cut
from dreal_timm.audit.report import draw_figures, write_report
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
        log_p[:, None] + torch.tensor(change)[:, None], right[:, None].clone(),
        log_p[:, None].clone(), right[:, None].clone(),
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


def noisy(change, null, right=None):
    """An audit of one site: changes of log p without the map, and by the null pass (NaN: not passed), by image."""
    right = [True] * len(change) if right is None else right
    found = made([0.0] * len(change), change, right)
    moved = torch.tensor(null)
    flipped = torch.tensor(right)[:, None].logical_xor(moved[:, None] > 1)  # a change by more than 1 is a flip here
    return dataclasses.replace(
        found, quality=None, null_log_p=found.log_p[:, None] + moved[:, None], null_right=flipped,
        maps={'site': MapStatistics(torch.zeros(1, 4), torch.zeros(1, 4), 0.0, 0.0)})


def test_noise_by_hand():
    """Root mean squares over the images of the null pass, those of rewards over the right ones; flips in percent."""
    audit = noisy([0.0] * 5, [0.3, -0.4, 0.0, 1.2, math.nan], [True, True, False, False, True])
    noise = audit.noise()
    assert noise['log_likelihood_gain'] == pytest.approx(math.sqrt((0.09 + 0.16 + 1.44) / 4), rel=1e-5)
    assert noise['reward'] == pytest.approx(
        math.sqrt(((math.exp(0.3) - 1) ** 2 + (1 - math.exp(-0.4)) ** 2) / 2), rel=1e-5)
    assert noise['top1_gain'] == pytest.approx(25)
    assert set(made([0.0], [0.1], [True]).noise().values()) == {0.0}


@pytest.mark.parametrize(('change', 'null', 'finding'), [
    ([-3e-6, -3.1e-6, -2.9e-6, -3e-6, -3e-6], [0.0] * 5, 0),  # all of one sign, and nothing
    ([-0.02, -0.03, -0.02, -0.03, -0.02], [1e-6, -1e-6, 0.0, 0.0, 1e-6], 1),
    ([0.02, 0.03, 0.02, 0.03, 0.02], [1e-6, -1e-6, 0.0, 0.0, 1e-6], -1),
    ([-0.02, -0.03, -0.02, -0.03, -0.02], [0.05, -0.05, 0.05, -0.05, 0.05], 0),  # the null pass moves it as much
    ([-0.02, 0.03, -0.02, 0.03, -0.02], [0.0] * 5, 0),  # the interval holds 0
])
def test_findings_by_hand(change, null, finding, tmp_path):
    """An effect is a finding beyond the floor of the null pass with an interval clear of 0: in every form of it."""
    audit = noisy(change, null)
    summary = summarize(audit, resamples=200)
    row = summary['sites'][0]
    assert row['reward_low'] <= row['reward'] <= row['reward_high']
    assert row['reward'] == pytest.approx(sum(1 - math.exp(value) for value in change) / 5, rel=1e-2)
    assert (row['reward_finding'], row['log_likelihood_gain_finding']) == (finding, finding)
    assert row['constant_reward_finding'] == row['top1_gain_finding'] == 0
    assert summary['network']['floor']['log_likelihood_gain'] == pytest.approx(
        max(1e-4, math.sqrt(sum(value ** 2 for value in null) / 5)), rel=1e-3)
    words = format_summary(summary).splitlines()[2].split()
    assert [word for word in words if word in ('raises', 'lowers')] == {1: ['raises'], -1: ['lowers'], 0: []}[finding]
    none = Examples({}, np.zeros((0, 1, 1, 3), dtype=np.uint8), {})
    drawn = draw_figures({'a': audit}, {'a': summary}, {'a': none})
    filled = [line for line in drawn['reward'].axes[0].lines if line.get_marker() == 'o' and (
        line.get_markerfacecolor() != 'none')]
    assert [list(line.get_xdata()) for line in filled] == [[row['reward']] if finding else []]
    write_report(tmp_path / 'report.html', {'a': audit}, {'a': summary}, {'a': none}, drawn)
    page = (tmp_path / 'report.html').read_text()
    assert page.count('class="up"') == (2 if finding > 0 else 0)  # reward, and log-likelihood
    assert page.count('class="down"') == (2 if finding < 0 else 0)
    helped, hurt = extremes(audit, 'site')
    assert bool(helped) == (abs(min(change)) > 1e-4 and max(null) < 0.05 and min(change) < 0)
    assert bool(hurt) == (max(change) > 0)


def test_top1_beyond_the_null_pass():
    """A gain of top-1 is a finding where it is more than the images that the null pass turns by itself."""
    for turned, finding in ((0, 1), (9, 0)):
        count = 10
        audit = noisy([-1.0] * count, [1.5] * turned + [0.0] * (count - turned))
        audit = dataclasses.replace(audit, mean_right=torch.tensor([[False]] * 8 + [[True]] * 2))
        row = summarize(audit, resamples=200)['sites'][0]
        assert row['top1_gain'] == pytest.approx(80)
        assert row['top1_gain_finding'] == finding


def test_an_audit_without_a_null_pass(tmp_path):
    """A folder of an earlier version, without null pass and findings, is read, and its findings are told by 1e-4."""
    audit = dataclasses.replace(noisy([-0.02] * 5, [0.0] * 5), null_log_p=None, null_right=None)
    before = summarize(audit, resamples=50)
    before['network'] = {key: value for key, value in before['network'].items() if key not in ('floor', 'right')}
    before['sites'] = [
        {key: value for key, value in row.items() if not key.endswith('_finding')} for row in before['sites']]
    audit.save(tmp_path, before)
    loaded = Audit.load(tmp_path)
    assert loaded.null_log_p is None
    read = read_summary(tmp_path, loaded)
    assert read['sites'][0]['reward_finding'] == 1
    assert {key: value for key, value in read['sites'][0].items() if not key.endswith('_finding')} == before['sites'][0]
    assert read['network']['floor'] == {'reward': 1e-4, 'top1_gain': 0, 'log_likelihood_gain': 1e-4}


@pytest.mark.parametrize(('right', 'warned'), [(99, True), (100, False)])
def test_few_right_images_are_told(right, warned):
    """Below 100 right images the text has a line more, whatever the number of all images."""
    audit = noisy([-0.1] * 150, [0.0] * 150, [number < right for number in range(150)])
    summary = summarize(audit, resamples=10)
    assert summary['network']['right'] == right
    lines = format_summary(summary).splitlines()
    assert len(lines) == (4 if warned else 3)
    assert (f' {right} ' in lines[-1]) == warned
    compared = compare_audits(audit, dataclasses.replace(audit, right=torch.arange(150) < 120), resamples=10)
    assert compared['right'] == right
    assert len(format_comparison({**compared, 'first': 'a', 'second': 'b'}).splitlines()) == (3 if warned else 2)


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
