"""Rows of the paper's Table 2 on letters seen through fonts: baseline, attention, reinforce, over paired seeds

A check of the pipeline from data to numbers, and no result about people. Every run is a folder of `--runs`: one that
has ended is not trained again, one that was stopped goes on. The last epoch is evaluated. The table has means over the
seeds, and the mean difference of paired seeds with its 95% interval (Student's t): runs of a seed see the same images
in the same order, and attention and reinforce begin with the same weights. `reinforce-weak` has a tenth of the paper's
actor_weight.
"""
import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import report
import torch

from dreal_timm.train import load_config

VARIANTS = {
    'baseline': ('dreal.enabled=false', 'model_kwargs.backbone=resnet18'),
    'attention': ('dreal.enabled=false',),
    'reinforce': ('dreal.actor_weight=1.0',),
    'reinforce-weak': ('dreal.actor_weight=0.1',),
}
METRICS = ('mAP', 'rank1', 'rank5', 'mINP')


def train(variant: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one network, or go on with it, and return what its last epoch came to."""
    name = f'{variant}-{seed}'
    folder = args.runs / name
    if not (folder / 'model').is_dir():
        settings = (
            f'data_dir={args.data}', f'seed={seed}', f'output={args.runs}', f'experiment={name}', 'resume=auto',
            'workers=0', *VARIANTS[variant], *args.set)
        done = subprocess.run(
            [sys.executable, '-m', 'dreal_timm.train', args.recipe, *settings], capture_output=True, text=True,
            env={**os.environ, 'OMP_NUM_THREADS': '1'}, check=False)
        if done.returncode:
            raise RuntimeError(f'{name}: {done.stderr[-500:]}')
    with (folder / 'summary.csv').open() as file:
        last = list(csv.DictReader(file))[-1]
    seconds = [row['seconds'] for row in json.loads((folder / 'run.json').read_text())['epochs']]
    row = {'variant': variant, 'seed': seed, **{key: float(last[f'eval_{key}']) for key in METRICS}}
    row |= {'epochs': len(seconds), 'seconds_an_epoch': statistics.median(seconds)}
    print(f"{name:14} " + '  '.join(f'{key} {row[key]:6.2f}' for key in METRICS), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', type=Path, default=Path('data/glyphs'), help='made by dreal-timm data glyphs')
    parser.add_argument('--recipe', default='reid_glyphs')
    parser.add_argument('--runs', type=Path, default=Path('output/reid_glyphs'), help='folder of the runs')
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS)[:3])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--jobs', type=int, default=2, help='trainings at a time, a thread each')
    parser.add_argument('--set', nargs='*', default=[], metavar='KEY=VALUE', help='further settings of all runs')
    parser.add_argument('--output', type=Path, default=report.RESULTS / 'reid_glyphs.json')
    args = parser.parse_args()
    header = report.begin(args, torch.device('cpu'))
    header['recipe'] = {key: value for key, value in vars(load_config(args.recipe, args.set)).items() if key != 'dreal'}
    jobs = [(variant, seed) for seed in args.seeds for variant in args.variants]
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda job: train(job[0], job[1], args), jobs))
    found = {(row['variant'], row['seed']): row for row in rows}
    for variant in args.variants:
        means = [report.interval([found[variant, seed][key] for seed in args.seeds]) for key in METRICS]
        print(f'{variant:14} ' + '  '.join(
            f'{key} {mean:6.2f} +- {half:.2f}' for key, (mean, half) in zip(METRICS, means, strict=True)))
    for second in args.variants:
        first = 'baseline' if second == 'attention' else 'attention'
        if second == 'baseline' or first not in args.variants:
            continue
        text = []
        for key in ('mAP', 'rank1'):
            mean, half = report.interval([found[second, seed][key] - found[first, seed][key] for seed in args.seeds])
            text.append(f'{key} {mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})')
        print(f"{second} less {first}: {', '.join(text)}")
    report.write(args.output, header, rows)


if __name__ == '__main__':
    main()
