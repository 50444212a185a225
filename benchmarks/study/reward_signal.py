"""The signal, followed: what the reward says, how much of it the critic knows, and where L_q pushes, over a training

A network is trained, and after chosen epochs, in evaluation mode, on images that it was not trained on:

- gains: 1 - p'/p of each site and image by exact passes, over right images: mean, standard deviation, and the share of
  the variance that belongs to the image (intraclass correlation over augmented views of it);
- penalty: the share of the variance of the literal reward (wrong images get -1) that right or wrong alone explains;
- critic: R^2 and Spearman's rank correlation of Q with the gain, over right images, against a constant; the rank
  correlation of p itself with the gain, since sure images have little to gain, and that of Q where p is held fixed
  (partial correlation); R^2 of Q with the literal reward over all images, against right or wrong alone;
- push: length of L_q's gradient at the attention parameters beside L_c's, and their cosine; and for steps of one length
  along L_q's, along L_c's, along the first-order reward's (`direct`), that of all images' log-likelihood (`log`), the
  same shuffled, and along random directions, what happens to the exact mean gain, to that in standard deviations of
  each site (`scaled`, as a standardized reward weighs them) and to the class loss, on the batch itself and on new
  images.

A training becomes a line of a file; one that is there with the same settings is printed from it and not made again.
"""
import argparse
import copy
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from dreal_timm import DrealTask, find_sites
from dreal_timm.attention.capture import bypass, read_map, record, tap
from dreal_timm.attention.judged_pass import stack_readings
from dreal_timm.attention.sites import Group, attention_parameters, group_sites

if not __package__:  # a script's path begins with its own folder; that of the other benchmarks is one up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import report

from study import fashion, forms, jsonl

Direction = dict[str, torch.Tensor]
_MEASURED = ('gain', 'scaled', 'loss')


def log_p(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each image's class, (B,)."""
    return model(images).log_softmax(1).gather(1, labels[:, None])[:, 0]


@torch.no_grad()
def exact_gains(
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return 1 - p'/p of each image and site, no less than -1, (B, L); which images are right, and log p, both (B,)."""
    model.eval()
    sites = [site for group in group_sites(find_sites(model, fashion.SIZE)) for site in group.sites]
    gains, right, known = [], [], []
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        logits = model(x)
        before = logits.log_softmax(1).gather(1, y[:, None])
        columns = []
        for site in sites:
            with bypass(model, [site]):
                columns.append(log_p(model, x, y))
        gains.append(-torch.expm1(torch.stack(columns, 1) - before))
        right.append(logits.argmax(1) == y)
        known.append(before[:, 0])
    return torch.cat(gains).clamp(-1, 1), torch.cat(right), torch.cat(known)


@torch.no_grad()
def judgements(task: DrealTask, images: torch.Tensor) -> torch.Tensor:
    """Return the critic's quality of each image and site, (B, L)."""
    trainable: Any = task.trainable_module
    trainable.model.eval()
    sites = [site for group in task.groups for site in group.sites]
    found = []
    for x in images.split(500):
        with record(trainable.model, sites) as readings:
            trainable.model(x)
        maps = {site.name: readings[site.name].attention for site in sites}
        found.append(trainable.critic(*stack_readings(task.groups, readings, maps)))
    return torch.cat(found)


def views(images: torch.Tensor, count: int, seed: int, mirrored: bool) -> list[torch.Tensor]:
    """Return views of the images, each shifted by up to 2 pixels of its own and mirrored or not.

    In training a batch is shifted as one, and what leaves at one side comes in at the other; here edges are repeated.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        padded = nn.functional.pad(images, (2, 2, 2, 2), mode='replicate')
        at = torch.randint(0, 5, (len(images), 2), generator=generator).tolist()
        view = torch.stack([image[:, y:y + 32, x:x + 32] for image, (y, x) in zip(padded, at, strict=True)])
        flipped = torch.rand(len(images), generator=generator) < (0.5 if mirrored else 0.0)
        found.append(torch.where(flipped[:, None, None, None], view.flip(3), view))
    return found


def intraclass(values: torch.Tensor) -> float:
    """Return the share of variance that belongs to the image, of (images, views): the one-way ICC(1)."""
    k = values.shape[1]
    between = k * values.mean(1).var(correction=1)
    within = values.var(1, correction=1).mean()
    return ((between - within) / (between + (k - 1) * within)).item()


def ranks_together(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return Spearman's rank correlation."""
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def partial_ranks(a: torch.Tensor, b: torch.Tensor, fixed: torch.Tensor) -> float:
    """Return the partial rank correlation of a and b, given a third."""
    ab, ac, bc = ranks_together(a, b), ranks_together(a, fixed), ranks_together(b, fixed)
    return (ab - ac * bc) / math.sqrt((1 - ac ** 2) * (1 - bc ** 2))


def explained(predicted: torch.Tensor, values: torch.Tensor) -> float:
    """Return R^2: 1 less the squared error beside that of the mean."""
    return (1 - (predicted - values).square().sum() / (values - values.mean()).square().sum()).item()


def signal_of(
        task: DrealTask,
        groups: Sequence[Group],
        data: fashion.Data,
        mirrored: bool,
        count: int,
) -> list[dict[str, Any]]:
    """Describe rewards and critic, a row for each group."""
    model = task.get_eval_model()
    assert model is not None
    images, labels = data
    gains, right, known = exact_gains(model, images, labels)
    quality = judgements(task, images)
    seen = [exact_gains(model, view, labels) for view in views(images, count, 0, mirrored)]
    always = torch.stack([r for _, r, _ in seen], 1).all(1)
    rows, start = [], 0
    for group in groups:
        columns = range(start, start + len(group.sites))
        start += len(group.sites)
        found: dict[str, list[float]] = {}
        for column in columns:
            gain, q = gains[:, column], quality[:, column]
            literal = gain.where(right, torch.full_like(gain, -1.0))
            guess = torch.where(right, gain[right].mean(), torch.tensor(-1.0))  # right or wrong, and nothing else
            values = {
                'mean': gain[right].mean().item(), 'sd': gain[right].std().item(),
                'icc': intraclass(torch.stack([g[:, column] for g, _, _ in seen], 1)[always]),
                'penalty_share': explained(guess, literal),
                'critic_r2': explained(q[right], gain[right]),
                'critic_rank': ranks_together(q[right], gain[right]),
                'p_rank': ranks_together(known[right], gain[right]),
                'critic_rank_given_p': partial_ranks(q[right], gain[right], known[right]),
                'critic_r2_all': explained(q, literal),
                'critic_sd': q[right].std().item(), 'critic_mean': q[right].mean().item(),
            }
            for key, value in values.items():
                found.setdefault(key, []).append(value)
        rows.append({'group': group.name, **{key: sum(v) / len(v) for key, v in found.items()}})
    return rows


def _gradient(value: torch.Tensor, theta: Mapping[str, nn.Parameter]) -> Direction:
    grads = torch.autograd.grad(value, list(theta.values()), retain_graph=True, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(theta.items(), grads, strict=True)}


def _length(direction: Direction) -> float:
    return math.sqrt(sum(d.square().sum().item() for d in direction.values()))


def _cosine(a: Direction, b: Direction) -> float:
    return sum((a[name] * b[name]).sum().item() for name in a) / max(_length(a) * _length(b), 1e-30)


def directions(task: DrealTask, data: fashion.Data, seed: int) -> dict[str, Direction]:
    """Return directions at the attention parameters, downhill of: L_q, L_c, minus first-order rewards; and noise."""
    trainable: Any = task.trainable_module
    model, (images, labels) = trainable.model.eval(), data
    sites = [site for group in task.groups for site in group.sites]
    theta = attention_parameters(model, sites)
    with record(model, sites) as readings:
        loss = nn.functional.cross_entropy(model(images), labels)
    maps = {site.name: read_map(model, site, readings[site.name]) for site in sites}
    frozen = {name: parameter.detach() for name, parameter in trainable.critic.named_parameters()}
    quality = torch.func.functional_call(trainable.critic, frozen, stack_readings(task.groups, readings, maps))
    actor = _gradient(-quality.sum(1).mean(), theta)
    # the gradient of log p at each map, by zero leaves; then the reward to first order as a function of theta
    by_class = _gradient(loss, theta)
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(p.shape, generator=generator) for name, p in theta.items()}
    found = {
        'actor': actor, 'class': by_class, 'direct': _first_order(model, data, maps, theta, 'right'),
        'log': _first_order(model, data, maps, theta, 'all'),
        'shuffled': _first_order(model, data, maps, theta, 'all', generator)}
    downhill = {name: {key: -value for key, value in uphill.items()} for name, uphill in found.items()}
    return {**downhill, 'random': noise}


def _first_order(
        model: nn.Module,
        data: fashion.Data,
        maps: Mapping[str, torch.Tensor],
        theta: Mapping[str, nn.Parameter],
        whose: str,
        shuffle: torch.Generator | None = None,
) -> Direction:
    """The gradient of minus the mean first-order reward, of 'right' or 'all' images; shuffled, by others' gradients."""
    images, labels = data
    sites = [site for group in group_sites(find_sites(model, fashion.SIZE)) for site in group.sites]
    taps = [torch.zeros_like(maps[site.name], requires_grad=True) for site in sites]
    alone = [Group(site.name, site.stage, site.kind, site.size, (site,)) for site in sites]
    with tap(model, alone, {site.name: one[:, None] for site, one in zip(sites, taps, strict=True)}):
        logits = model(images)
    counted = logits.argmax(1) == labels if whose == 'right' else torch.ones_like(labels)
    total = (logits.log_softmax(1).gather(1, labels[:, None])[:, 0] * counted).sum()
    rewards: list[torch.Tensor] = []
    for site, gradient in zip(sites, torch.autograd.grad(total, taps), strict=True):
        if shuffle is not None:
            gradient = gradient[torch.randperm(len(gradient), generator=shuffle)]
        attention = maps[site.name].flatten(1)
        rewards.append((gradient.flatten(1) * (attention - attention.mean(1, keepdim=True))).sum())
    return _gradient(-torch.stack(rewards).sum() / len(labels), theta)


def steps_along(task: DrealTask, batch: fashion.Data, new: fashion.Data, step: float, seed: int) -> dict[str, Any]:
    """Go a step along each direction, and tell how the exact mean gain and the class loss change."""
    model = task.get_eval_model()
    assert model is not None
    found = directions(task, batch, seed)
    theta = attention_parameters(model, [site for group in task.groups for site in group.sites])
    size = step * math.sqrt(sum(p.detach().square().sum().item() for p in theta.values()))
    before = {name: _measure(model, data, None) for name, data in (('same', batch), ('new', new))}
    told: dict[str, Any] = {
        'actor_length': _length(found['actor']), 'class_length': _length(found['class']),
        'direct_length': _length(found['direct']),
        'cosine_actor_class': _cosine(found['actor'], found['class']),
        'cosine_actor_direct': _cosine(found['actor'], found['direct']),
        'cosine_class_direct': _cosine(found['class'], found['direct']),
        'cosine_class_log': _cosine(found['class'], found['log']),
        'cosine_class_shuffled': _cosine(found['class'], found['shuffled']),
        'cosine_log_shuffled': _cosine(found['log'], found['shuffled']),
        'before': {where: {key: before[where][key] for key in _MEASURED} for where in before}, 'steps': {},
    }
    for name, direction in found.items():
        moved = copy.deepcopy(model)
        parameters = dict(moved.named_parameters())
        length = max(_length(direction), 1e-30)
        with torch.no_grad():
            for key, value in direction.items():
                parameters[key].add_(value, alpha=size / length)
        told['steps'][name] = {}
        for where, data in (('same', batch), ('new', new)):
            after = _measure(moved, data, before[where])
            told['steps'][name][where] = {key: after[key] - before[where][key] for key in _MEASURED}
    return told


def _measure(model: nn.Module, data: fashion.Data, first: Mapping[str, Any] | None) -> dict[str, Any]:
    """Gain summed over the sites, mean over the images that were right at first, and class loss, mean over all.

    `scaled` is the gain with each site's divided by its standard deviation at first.
    """
    gains, right, known = exact_gains(model, *data)
    if first is not None:
        right = first['right']
    sd = gains[right].std(0) if first is None else first['sd']
    mean = gains[right].mean(0)
    return {
        'gain': mean.sum().item(), 'scaled': (mean / sd).sum().item(), 'loss': -known.mean().item(),
        'right': right, 'sd': sd}


def tell(row: Mapping[str, Any]) -> None:
    """Print what was seen after an epoch; numbers of steps are means over the batches that they were made from."""
    print(f"epoch {row['epoch']}: top-1 {row['top1']:.2f}%")
    for group in row['groups']:
        numbers = [f'{key} {value:.3f}' for key, value in group.items() if key != 'group']
        print('  '.join([f"  {group['group']:16}", *numbers]))
    steps = row['pushes']
    for name in steps[0]['steps']:
        told = {
            f'{key} {where}': [s['steps'][name][where][key] for s in steps]
            for where in ('same', 'new') for key in _MEASURED}
        print(f'  along {name:9}' + '  '.join(f'{k} {sum(v) / len(v):+.5f}' for k, v in told.items()))
    for where, first in steps[0]['before'].items():
        print(f'  before, {where}: ' + '  '.join(
            f"{key} {sum(s['before'][where][key] for s in steps) / len(steps):.4f}" for key in first))
    keys = [key for key in steps[0] if key not in ('steps', 'before')]
    print('  ' + '  '.join(f'{key} {sum(s[key] for s in steps) / len(steps):.4f}' for key in keys), flush=True)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train once; return and print what was seen after each of the chosen epochs."""
    device = torch.device('cpu')
    data = fashion.open_set(args.set, args.data)
    model = fashion.network(args.attention, args.width, args.seed, classes=data.classes)
    task = forms.make_task(model, args.form, args.seed, device)
    assert isinstance(task, DrealTask), 'plain training has no critic: use --form split with weight 0'
    images = fashion.subset(data.splits['train'], args.images, args.seed)
    held_out = fashion.subset(data.splits['test'], args.held_out, 1)
    rows: list[dict[str, Any]] = []

    def after_epoch(epoch: int) -> None:
        if epoch + 1 not in args.after:
            return
        top1 = fashion.accuracy(model, data.splits['test'], device)
        groups = signal_of(task, task.groups, held_out, data.mirrored, args.views)
        loader = fashion.batches(images, args.batch_size, 10_000 + epoch, args.seed, data.mirrored)
        pushes = [steps_along(task, next(loader), held_out, args.step, i) for i in range(args.batches)]
        rows.append({'epoch': epoch + 1, 'top1': top1, 'groups': groups, 'pushes': pushes})
        tell(rows[-1])
        task.get_trainable_module().train()

    fashion.train(
        task, images, args.epochs, args.batch_size, args.lr, args.seed, device, after_epoch, data.mirrored)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--set', choices=('fashion', 'letters'), default='fashion')
    parser.add_argument('--attention', choices=('se', 'cbam', 'srm'), default='se')
    parser.add_argument('--form', default='split', help='form that it is trained with, see forms.py')
    parser.add_argument('--images', type=int, default=10_000, help='images to train on')
    parser.add_argument('--epochs', type=int, default=5)
    parser.add_argument('--after', type=int, nargs='+', default=[1, 3, 5], help='epochs after which to look')
    parser.add_argument('--held-out', type=int, default=2_000, help='images to look at')
    parser.add_argument('--views', type=int, default=4, help='augmented views of each')
    parser.add_argument('--batches', type=int, default=4, help='training batches that steps are made from')
    parser.add_argument('--step', type=float, default=0.01, help='length of a step, a share of that of the parameters')
    parser.add_argument('--width', type=float, default=0.25)
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--lr', type=float, default=0.1)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--data', type=Path, default=fashion.DEBIAN_FILES, help='folder of Fashion-MNIST')
    parser.add_argument('--output', type=Path, help='file of the trainings, .jsonl')
    args = parser.parse_args()
    torch.set_num_threads(1)
    header = report.begin(args, torch.device('cpu'))
    path = args.output or report.RESULTS / f'signal-{args.set}-{args.attention}.jsonl'
    settings = {key: value for key, value in header['settings'].items() if key not in ('data', 'output')}
    for made in jsonl.read(path):
        if made['settings'].items() >= settings.items():
            for row in made['rows']:
                tell(row)
            return
    jsonl.append(path, {**header, 'rows': run(args)})
    print(f'written: {path}')


if __name__ == '__main__':
    main()
