"""What benchmarks say of themselves: their commit, and intervals of what they measured"""
import shutil
import subprocess

import pytest
import report
import torch
from scipy import stats


@pytest.mark.parametrize('n', [2, 3, 8, 30, 41])
def test_interval_is_students(n):
    """Mean and half of the 95% interval are scipy's."""
    values = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).tolist()
    mean, half = report.interval(values)
    low, high = stats.t.interval(0.95, n - 1, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-3)


@pytest.mark.skipif(shutil.which('git') is None, reason='needs git')
def test_runs_name_their_commit(tmp_path):
    """The commit of the clone, marked where a file was changed since, and none where there is no clone."""
    def git(*words):
        told = subprocess.run(
            ['git', '-c', 'user.name=T', '-c', 'user.email=t@example.org', *words], cwd=tmp_path, check=True,
            capture_output=True, text=True)
        return told.stdout.strip()

    assert report.commit(tmp_path) is None
    git('init')
    (tmp_path / 'code.py').write_text('a = 1')
    git('add', '.')
    git('commit', '-m', 'First')
    git('tag', 'v1')
    assert report.commit(tmp_path) == git('rev-parse', '--short=12', 'HEAD')
    (tmp_path / 'code.py').write_text('a = 2')
    assert report.commit(tmp_path) == git('rev-parse', '--short=12', 'HEAD') + '+'
