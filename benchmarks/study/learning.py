"""Does the reward teach? Accuracy of plain and reinforced training at equal steps and equal time, over paired seeds

Runs of one seed share the initial weights, the images, their order and their augmentation. Every run becomes a line of
the study's file as it ends; what is there already is not run again. The table is of all runs in the file with the same
settings (--seed-range: of some seeds) and compares each form with plain training and with its control: mean difference
of the paired seeds and its 95% interval (Student's t). Forms and controls are those of forms.py; FORM*1.2 trains for
1.2 times as many steps, so that plain training can have the time of a reinforced one. Seconds are those of training, in
the median; on a CPU, of its own clock.
"""
import argparse
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreal_timm import find_sites
from dreal_timm.attention.capture import record
from dreal_timm.attention.sites import group_sites

if not __package__:  # a script's path begins with its own folder; that of the other benchmarks is one up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import report

from study import fashion, forms, jsonl

_EVERY = [
    'plain', 'literal', 'literal-weak', 'taylor', 'taylor/shuffled', 'taylor/random', 'taylor-drawn', 'standardized',
    'exclude', 'exclude-standardized', 'measure-log', 'measure-log-standardized', 'capacity', 'inputs',
    'capacity-inputs', 'warmup', 'share', 'inputs-share', 'capacity-inputs-share', 'direct', 'direct-share',
    'direct-log-share', 'direct-log-full', 'cal',
]
# forms that begin with the first epoch, and two controls, to begin after it
_LATE = [f'{name}@1' for name in _EVERY if name in forms.FORMS and 'actor_start' not in forms.FORMS[name]]
_LATE += ['taylor@1/shuffled', 'direct-log-full@1/shuffled']
# the form that the screening chose, and its control
_CHOSEN = ['direct-log-full', 'direct-log-full/shuffled']
_FOUR = ['plain', 'literal', *_CHOSEN]
# what is run, by the name of the study; docs/evidence.md says why
STUDIES: dict[str, dict[str, Any]] = {
    'minutes': dict(images=2_000, epochs=2, seeds=2, forms=['plain', 'taylor', 'taylor/shuffled']),
    'small': dict(
        images=10_000, epochs=5, seeds=6, weights=[0.03, 0.1, 0.3, 1.0],
        forms=['plain', 'literal', 'split', 'taylor', 'taylor/shuffled']),
    'screen': dict(images=10_000, epochs=5, seeds=6, first_seed=100, forms=_EVERY),
    'primary': dict(images=10_000, epochs=5, seeds=60, first_seed=1000, forms=['plain', *_CHOSEN]),
    'late': dict(images=10_000, epochs=5, seeds=8, first_seed=3000, forms=['plain', *_LATE]),
    'letters': dict(set='letters', images=7_200, epochs=16, seeds=8, first_seed=2000, forms=_FOUR),
    'few': dict(images=2_000, epochs=25, seeds=8, first_seed=2000, forms=_FOUR),
    'all': dict(images=60_000, epochs=5, seeds=8, first_seed=2000, forms=_FOUR),
    'full': dict(images=60_000, epochs=5, seeds=24, first_seed=4000, forms=['plain', *_CHOSEN]),
}
_DEFAULTS: dict[str, Any] = dict(
    set='fashion', attention='se', width=0.25, batch_size=128, lr=0.1, first_seed=0, weights=None)
_SETTINGS = ('set', 'attention', 'images', 'epochs', 'width', 'batch_size', 'lr')

_OPEN: dict[str, fashion.ImageSet] = {}  # of this process


def split_stretch(name: str) -> tuple[str, float]:
    """Return the form and how many times as many steps it has."""
    form, _, stretch = name.partition('*')
    forms.split_name(form)
    return form, float(stretch) if stretch else 1.0


@torch.no_grad()
def gates(model: nn.Module, images: torch.Tensor) -> dict[str, dict[str, float]]:
    """Tell of each group of sites which share of its map values is below 0.05 or above 0.95, and how much maps differ.

    The latter is the standard deviation over the images, averaged over the positions.
    """
    model.eval()
    sites = find_sites(model, fashion.SIZE)
    with record(model, sites) as readings:
        model(images)
    told = {}
    for group in group_sites(sites):
        maps = [readings[site.name].attention.flatten(1).float() for site in group.sites]
        told[group.name] = {
            'saturated': statistics.mean(((m < 0.05) | (m > 0.95)).float().mean().item() for m in maps),
            'spread': statistics.mean(m.std(0).mean().item() for m in maps)}
    return told


def run(name: str, weight: float | None, seed: int, settings: Mapping[str, Any], folder: str, device: str) -> dict:
    """Train once; return the accuracy, and the seconds of training after every epoch."""
    form, stretch = split_stretch(name)
    kind, where = settings['set'], torch.device(device)
    if kind not in _OPEN:
        _OPEN[kind] = fashion.open_set(kind, Path(folder))
    data = _OPEN[kind]
    model = fashion.network(settings['attention'], settings['width'], seed, classes=data.classes)
    model = model.to(where).to(memory_format=torch.channels_last)
    task = forms.make_task(model, form, seed, where, weight)
    images = fashion.subset(data.splits['train'], settings['images'], seed)
    steps = settings['images'] // settings['batch_size']
    total = round(stretch * settings['epochs'] * steps)
    curve: list[dict[str, float]] = []
    # the CPU's own time, which other processes on the machine do not stretch as much; a GPU has the wall's
    clock = time.process_time if where.type == 'cpu' and torch.get_num_threads() == 1 else time.perf_counter
    trained, begun = 0.0, clock()

    def after_epoch(epoch: int) -> None:
        nonlocal trained, begun
        trained += clock() - begun  # the validation is not timed
        done = min((epoch + 1) * steps, total)
        # the rate falls to zero at the end: what comes before is another schedule's, and is not looked at
        found = {'top1': fashion.accuracy(model, data.splits['test'], where)} if done == total else {}
        curve.append({'epoch': epoch + 1, 'steps': done, 'seconds': trained, **found})
        begun = clock()

    fashion.train(
        task, images, stretch * settings['epochs'], settings['batch_size'], settings['lr'], seed, where, after_epoch,
        data.mirrored)
    return {
        'form': name, 'weight': weight, 'seed': seed, 'top1': curve[-1]['top1'], 'curve': curve,
        'gates': gates(model, data.splits['test'][0][:500].to(where))}


def table(runs: Sequence[dict]) -> list[dict]:
    """Compare every form and weight by paired seeds: with plain training, also of more steps, and with its control."""
    found = {(r['form'], r['weight'], r['seed']): r for r in runs}
    longer = dict.fromkeys((r['form'], None) for r in runs if r['form'].startswith('plain*'))
    rows = []
    for name, weight in dict.fromkeys((r['form'], r['weight']) for r in runs):
        seeds = sorted(r['seed'] for r in runs if (r['form'], r['weight']) == (name, weight))
        own = [found[name, weight, seed] for seed in seeds]
        row: dict[str, Any] = {
            'form': name, 'weight': weight, 'seeds': len(seeds),
            'top1': statistics.mean(r['top1'] for r in own),
            'seconds': statistics.median(r['curve'][-1]['seconds'] for r in own),
            'saturated': statistics.mean(g['saturated'] for r in own for g in r['gates'].values()) if own[0].get(
                'gates') else None,
        }
        others = [('plain', ('plain', None)), ('shuffled', (f'{name}/shuffled', weight))]
        others += [('longer', key) for key in longer if not name.startswith('plain')]
        for other, key in others:
            pairs = [r['top1'] - found[(*key, r['seed'])]['top1'] for r in own if (*key, r['seed']) in found]
            if pairs and key != (name, weight):
                row[f'minus_{other}'], row[f'minus_{other}_95'] = report.interval(pairs)
                row[f'minus_{other}_seeds'] = len(pairs)
        rows.append(row)
    return rows


def read(path: Path, settings: Mapping[str, Any], seeds: Sequence[int] | None = None) -> list[dict]:
    """Return the runs of a file that have these settings, of all seeds or of a first to a last, in the order of tables.

    Where two processes made the same run, it is the first of them.
    """
    first, last = seeds or (-math.inf, math.inf)
    found: dict[str, dict] = {}
    for r in jsonl.read(path):
        if all(r[key] == settings[key] for key in _SETTINGS) and first <= r['seed'] <= last:
            found.setdefault(_name(r['form'], r['weight'], r['seed']), r)
    return [found[name] for name in sorted(found)]


def tell(row: Mapping[str, Any]) -> str:
    """Return a row of the table as a line."""
    name = row['form'] if row['weight'] is None else f"{row['form']} {row['weight']:g}"
    text = f"{name:28} {row['top1']:.2f}% in {row['seconds']:4.0f} s, {row['seeds']} seeds"
    if row['saturated'] is not None:
        text += f", {100 * row['saturated']:3.0f}% saturated"
    for other in ('plain', 'shuffled', 'longer'):
        if f'minus_{other}' in row:
            text += f"  minus {other} {row[f'minus_{other}']:+.2f} +- {row[f'minus_{other}_95']:.2f}"
            if row[f'minus_{other}_seeds'] < row['seeds']:
                text += f" ({row[f'minus_{other}_seeds']} seeds)"
    return text


def _train(job: tuple[Path, str, float | None, int, dict, str, str, dict]) -> str:
    """Run one job in a process of the pool, and write it."""
    path, name, weight, seed, settings, folder, device, header = job
    result = {**settings, **header, **run(name, weight, seed, settings, folder, device)}
    jsonl.append(path, result)
    return f"{name}{'' if weight is None else f' {weight:g}'} seed {seed}: {result['top1']:.2f}%"


def _name(form: str, weight: float | None, seed: int) -> str:
    """Name a run. Sorted, forms that were not planned stand in tables by their names, a control before its form."""
    return f"{form.replace('/', '+')}{'' if weight is None else f'-{weight:g}'}-{seed}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('study', choices=STUDIES, help='what to run; the options change it')
    parser.add_argument('--set', choices=('fashion', 'letters'))
    parser.add_argument('--attention', choices=('se', 'cbam', 'srm'))
    parser.add_argument('--forms', nargs='+', help='see forms.py')
    parser.add_argument('--weights', nargs='+', type=float, help="actor_weight; each form's own by default")
    parser.add_argument('--seeds', type=int, help='paired seeds')
    parser.add_argument('--first-seed', type=int)
    parser.add_argument('--images', type=int, help='images to train on')
    parser.add_argument('--epochs', type=int)
    parser.add_argument('--width', type=float, help='share of the channels')
    parser.add_argument('--batch-size', type=int)
    parser.add_argument('--lr', type=float)
    parser.add_argument('--jobs', type=int, default=2, help='trainings at a time')
    parser.add_argument('--data', type=Path, default=fashion.DEBIAN_FILES, help='folder of Fashion-MNIST')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, help='file of the runs, .jsonl; their table is beside it')
    parser.add_argument('--table-only', action='store_true', help='print that of the runs that are there')
    parser.add_argument(
        '--seed-range', nargs=2, type=int, metavar=('FIRST', 'LAST'), help='the same, of these seeds alone')
    return parser


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    for name, value in {**_DEFAULTS, **STUDIES[args.study]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.device == 'cpu':
        torch.set_num_threads(1)  # a training each
    path = args.output or report.RESULTS / 'learning' / f'{args.study}-{args.attention}.jsonl'
    if path.suffix == '.json' or path.is_dir():
        parser.error(f"--output is the file of the runs, such as 'runs.jsonl', and not '{path}'")
    header = report.begin(args, torch.device(args.device))
    settings = {key: getattr(args, key) for key in _SETTINGS}
    plan = [
        (name, weight, seed)
        for seed in range(args.first_seed, args.first_seed + args.seeds)
        for name in args.forms
        for weight in ([None] if args.weights is None or name == 'plain' else args.weights)]
    told = {'versions': header['versions'], 'machine': header['machine']}
    table_only = args.table_only or args.seed_range is not None
    made = {_name(r['form'], r['weight'], r['seed']) for r in read(path, settings)}
    jobs = [
        (path, *job, settings, str(args.data), args.device, told) for job in plan
        if _name(*job) not in made and not table_only]
    try:
        for name in args.forms:
            split_stretch(name)
        if jobs and args.set == 'fashion':
            fashion.files(args.data)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    with ProcessPoolExecutor(args.jobs, get_context('spawn'), torch.set_num_threads, (1,)) as pool:
        for number, line in enumerate(pool.map(_train, jobs), 1):
            print(f'{number}/{len(jobs)} {line}', flush=True)
    found = read(path, settings, args.seed_range)
    if not found:
        parser.error(f"no runs of these settings in '{path}'")
    header['made_on'] = sorted({f"{r['machine']}, torch {r['versions']['torch']}" for r in found})
    rows = table(found)
    order = list(dict.fromkeys((name, weight) for name, weight, _ in plan))
    rows.sort(key=lambda row: order.index(key) if (key := (row['form'], row['weight'])) in order else len(order))
    for row in rows:
        print(tell(row))
    if not table_only:
        report.write(path.with_suffix('.json'), header, rows)


if __name__ == '__main__':
    main()
