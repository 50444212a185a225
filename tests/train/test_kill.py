import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from equal import assert_equal
from small_run import recipe

from dreal_timm.train import run

HERE = Path(__file__).parent


@pytest.mark.parametrize(('kills', 'places', 'workers', 'dreal'), [
    (12, 'all', 0, dict(probe='taylor', taylor_target='loss')),
    (8, 'none', 2, dict(probe='split', rotate='step', probe_every=2)),
])
def test_a_run_survives_being_killed(images, tmp_path, kills, places, workers, dreal):
    """Killed in steps, validations and saves, and at any moment, a run ends bit for bit as an uninterrupted one."""
    values = dict(
        epochs=8, workers=workers, model_ema=True, model_ema_decay=0.9, opt='adamw', lr=1e-3, reprob=0.5, drop=0.1,
        scale=[0.5, 1.0], checkpoint_hist=3, save_epochs=[2, 5], dreal=dreal,
    )
    start = time.perf_counter()
    whole = run(recipe(images, tmp_path, experiment='whole', **values))
    epoch = (time.perf_counter() - start) / 8
    path = tmp_path / 'recipe.json'
    path.write_text(json.dumps(recipe(images, tmp_path, experiment='killed', resume='auto', **values)))
    process = subprocess.run(
        [sys.executable, str(HERE / 'killed_run.py'), str(path), str(kills), str(2 * epoch), places],
        capture_output=True, text=True, timeout=400, cwd=HERE.parent.parent,
        env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(HERE.parent.parent)},
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads(process.stdout) == {'kills': kills, 'finished': True}

    for name in ('last.pth.tar', 'model_best.pth.tar', 'milestone-2.pth.tar', 'milestone-5.pth.tar'):
        one, two = (torch.load(tmp_path / run_ / name, weights_only=True) for run_ in ('whole', 'killed'))
        assert {'state_dict', 'state_dict_ema', 'task_state', 'task_state_ema', 'optimizer'} <= set(one)
        del one['args'], two['args']
        assert_equal(one, two)
    folders = [{path.name for path in (tmp_path / run_).iterdir()} for run_ in ('whole', 'killed')]
    assert folders[0] == folders[1]
    summaries = [(tmp_path / run_ / 'summary.csv').read_text() for run_ in ('whole', 'killed')]
    assert summaries[0] == summaries[1]
    assert len(list(csv.DictReader(summaries[1].splitlines()))) == 8
    assert whole['best_epoch'] == torch.load(tmp_path / 'killed' / 'model_best.pth.tar', weights_only=True)['epoch']
