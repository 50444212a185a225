"""Does it learn better? Accuracy of plain and reinforced training against steps and wall time, over paired seeds

Runs of one seed share the initial weights, the images, their order and their augmentation. `shuffled` is the control:
rewards of `taylor`, permuted among the samples of the batch, so that they carry no knowledge of which map helped. Every
run is written to a file of its own as it ends; what is there already is not run again. The table compares each setting
with plain training and with the shuffled one: mean difference of the paired seeds and its 95% interval (Student's t).
"""
import argparse
import copy
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import fashion
import report
import torch
from timm.task import ClassificationTask, TrainingTask
from torch import nn

from dreal_timm import DrealTask
from dreal_timm.measure import Measure, Measured

SIZES: dict[str, dict[str, Any]] = {
    'minutes': dict(width=0.25, images=2_000, epochs=2, seeds=2),
    'small': dict(width=0.25, images=10_000, epochs=5, seeds=6),
    'full': dict(width=1.0, images=60_000, epochs=20, seeds=8),
}
ARMS: dict[str, dict[str, Any]] = {
    'exact': dict(probe='exact', rotate='epoch'),
    'split': dict(probe='split', rotate='step'),
    'taylor': dict(probe='taylor'),
    'shuffled': dict(probe='taylor'),
}
# two-sided 97.5% quantiles of Student's t for 1 to 15 degrees of freedom
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


class Shuffled(Measure):
    """The rewards of another measure, permuted among the samples of a batch, each site by itself."""

    def __init__(self, measure: Measure, seed: int):
        super().__init__(measure.gamma, measure.clip, measure.ignored)
        self.inner = measure
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, call: nn.Module, trainable: Any, input: torch.Tensor, target: torch.Tensor) -> Any:
        judged, measured = self.inner(call, trainable, input, target)
        order = torch.rand(measured.reward.shape, generator=self.generator).argsort(dim=0)
        rewards = measured.reward.gather(0, order.to(measured.reward.device))
        return judged, Measured(measured.sites, rewards, measured.right)

    def watch(self, loss: torch.Tensor) -> None:
        self.inner.watch(loss)

    def forget(self) -> None:
        self.inner.forget()


def make_task(model: nn.Module, arm: str, weight: float, seed: int, device: torch.device) -> TrainingTask:
    """Make the task of one arm of the comparison."""
    if arm == 'plain':
        return ClassificationTask(model, device=device, verbose=False)
    task = DrealTask(
        model, device=device, verbose=False, input_size=fashion.SIZE, actor_weight=weight, seed=seed, **ARMS[arm])
    if arm == 'shuffled':
        task.measure = Shuffled(task.measure, seed)
    return task


def run(arm: str, weight: float, seed: int, args: argparse.Namespace, data: dict, device: torch.device) -> dict:
    """Train once; return accuracy and seconds after every epoch."""
    model = fashion.network(args.attention, args.width, seed).to(device)
    task = make_task(model, arm, weight, seed, device)
    images = fashion.subset(data['train'], args.images, seed)
    curve: list[dict[str, float]] = []
    # the CPU's own time, which other processes on the machine do not stretch as much; a GPU has the wall's
    clock = time.process_time if device.type == 'cpu' and torch.get_num_threads() == 1 else time.perf_counter
    trained, begun = 0.0, clock()

    def after_epoch(epoch: int) -> None:
        nonlocal trained, begun
        trained += clock() - begun  # the validation is not timed
        top1 = fashion.accuracy(model, data['test'], device)
        steps = (epoch + 1) * (args.images // args.batch_size)
        curve.append({'epoch': epoch + 1, 'steps': steps, 'seconds': trained, 'top1': top1})
        begun = clock()

    fashion.train(task, images, args.epochs, args.batch_size, args.lr, seed, device, after_epoch)
    return {'arm': arm, 'weight': weight, 'seed': seed, 'top1': curve[-1]['top1'], 'curve': curve}


def interval(differences: list[float]) -> tuple[float, float]:
    """Return mean and half of the 95% interval."""
    n = len(differences)
    if n < 2:
        return differences[0], math.nan
    return statistics.mean(differences), T[min(n - 2, len(T) - 1)] * statistics.stdev(differences) / math.sqrt(n)


def table(runs: list[dict]) -> list[dict]:
    """Compare every arm and weight with plain and with shuffled, by paired seeds."""
    top1 = {(r['arm'], r['weight'], r['seed']): r['top1'] for r in runs}
    seconds = {(r['arm'], r['weight'], r['seed']): r['curve'][-1]['seconds'] for r in runs}
    rows = []
    for arm, weight in dict.fromkeys((r['arm'], r['weight']) for r in runs):
        seeds = sorted(r['seed'] for r in runs if (r['arm'], r['weight']) == (arm, weight))
        row = {
            'arm': arm, 'weight': weight, 'seeds': len(seeds),
            'top1': statistics.mean(top1[arm, weight, s] for s in seeds),
            'seconds': statistics.median(seconds[arm, weight, s] for s in seeds),
        }
        for other in ('plain', 'shuffled'):
            key = (other, 0.0 if other == 'plain' else weight)
            pairs = [top1[arm, weight, s] - top1[(*key, s)] for s in seeds if (*key, s) in top1]
            if pairs and arm not in ('plain', other):
                row[f'minus_{other}'], row[f'minus_{other}_95'] = interval(pairs)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--size', choices=SIZES, default='small', help='how much: minutes, an hour or two, or a GPU')
    parser.add_argument('--attention', choices=('se', 'cbam', 'srm'), default='se')
    parser.add_argument('--arms', nargs='+', choices=('plain', *ARMS), default=['plain', *ARMS])
    parser.add_argument('--weights', nargs='+', type=float, default=[0.03, 0.1, 0.3, 1.0], help='actor_weight')
    parser.add_argument('--seeds', type=int, help='paired seeds')
    parser.add_argument('--first-seed', type=int, default=0)
    parser.add_argument('--images', type=int, help='images to train on')
    parser.add_argument('--epochs', type=int)
    parser.add_argument('--width', type=float, help='share of the channels')
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--lr', type=float, default=0.1)
    parser.add_argument('--data', type=Path, default=fashion.DEBIAN_FILES, help='folder with the four gz files')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, help='folder of the runs')
    parser.add_argument('--table-only', action='store_true', help='of the runs that are there')
    args = parser.parse_args()
    for name, value in SIZES[args.size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    device = torch.device(args.device)
    folder = args.output or report.RESULTS / f'learning-{args.attention}-{args.size}'
    header = report.begin(args, device)
    settings = {k: getattr(args, k) for k in ('attention', 'images', 'epochs', 'width', 'batch_size', 'lr')}
    folder.mkdir(parents=True, exist_ok=True)
    data = {} if args.table_only else fashion.load(args.data)
    plan = [
        (arm, weight, seed)
        for seed in range(args.first_seed, args.first_seed + args.seeds)
        for arm in args.arms
        for weight in ([0.0] if arm == 'plain' else args.weights)
    ]
    for index, (arm, weight, seed) in enumerate([] if args.table_only else plan):
        path = folder / f'{arm}-{weight:g}-{seed}.json'
        if path.exists():
            continue
        result = {**settings, 'versions': header['versions'], 'machine': header['machine']}
        result.update(run(arm, weight, seed, args, copy.copy(data), device))
        path.with_suffix('.part').write_text(json.dumps(result) + '\n')
        path.with_suffix('.part').replace(path)
        seconds = result['curve'][-1]['seconds']
        text = f'{arm} {weight:g} seed {seed}: {result["top1"]:.2f}% in {seconds:.0f} s'
        print(f'{index + 1}/{len(plan)} {text}', flush=True)
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob('*.json'))]
    runs = [r for r in runs if all(r[k] == v for k, v in settings.items())]
    rows = table(runs)
    for row in rows:
        text = f"{row['arm']:9} {row['weight']:5g}  {row['top1']:.2f}% in {row['seconds']:.0f} s, {row['seeds']} seeds"
        for other in ('plain', 'shuffled'):
            if f'minus_{other}' in row:
                text += f"  minus {other} {row[f'minus_{other}']:+.2f} +- {row[f'minus_{other}_95']:.2f}"
        print(text)
    report.write(folder.with_suffix('.json'), header, rows)


if __name__ == '__main__':
    main()
