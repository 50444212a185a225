"""How true are cheap rewards? Each probe against the exact float32 reward, on networks trained for real

A network is trained on Fashion-MNIST; its early, middle and late weights are kept. On training batches, in training
mode, the reward of every site and sample is measured by `exact` in float32, and compared, over the samples that the
network gets right and pooled over the sites of a group, with `split`, `taylor` and, under bf16 autocast, with all of
them and with probe_dtype='float32'. Split's reward of one draw is missing for most (sample, group) pairs: its row
compares those that it gave, and says how far the mean over the group is off, in standard errors. `first order, fixed
statistics` takes taylor's gradient with the statistics of batch norms held fixed, as `exact` holds them: what is left
of taylor's error there is curvature, what goes away is how a map moves the other samples' normalisation.
"""
import argparse
import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import report
import torch
from study import fashion
from timm.task import ClassificationTask

from dreal_timm import DrealTask, find_sites
from dreal_timm.attention.capture import record, tap
from dreal_timm.attention.sites import Group
from dreal_timm.replay.batch_norms import record_norms, replay_norms

FIXED = 'first order, fixed statistics'
KINDS: dict[str, dict[str, Any]] = {
    'exact': dict(probe='exact'),
    'split': dict(probe='split'),
    'taylor': dict(probe='taylor'),
    FIXED: dict(probe='taylor'),
    'exact bf16': dict(probe='exact', bf16=True),
    'split bf16': dict(probe='split', bf16=True),
    'taylor bf16': dict(probe='taylor', bf16=True),
    'exact bf16, probe_dtype float32': dict(probe='exact', probe_dtype='float32', bf16=True),
    'split bf16, probe_dtype float32': dict(probe='split', probe_dtype='float32', bf16=True),
}


def rewards(
        model: torch.nn.Module,
        batch: fashion.Data,
        device: torch.device,
        step: int,
        bf16: bool = False,
        **options: Any,
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Return names of all sites, rewards (B, L) and which samples are right (B,); the network is left as it is."""
    task = DrealTask(
        copy.deepcopy(model), device=device, verbose=False, input_size=fashion.SIZE, rotate='step', reward_clip=None,
        **options,
    )
    task.get_trainable_module().train()
    rotation = task.get_trainable_module().rotation
    names = [site.name for group in task.groups for site in group.sites]
    result = torch.full((len(batch[0]), len(names)), math.nan)
    images, labels = batch[0].to(device), batch[1].to(device)
    context = torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
    turns = 2 if options['probe'] == 'taylor' else max(len(group.sites) for group in task.groups)
    for turn in range(turns):
        rotation.draw = lambda turn=turn: [turn % len(group.sites) for group in task.groups]
        rotation.step = step + turn  # split draws by the step
        rotation.steps_in_epoch = turn
        torch.manual_seed(0)
        with context:
            output = task(images, labels)
        output['loss'].backward()
        if options['probe'] != 'taylor' or turn:
            for column, name in enumerate(output['probed']):
                result[:, names.index(name)] = output['reward'][:, column].cpu()
    return names, result, output['right'].cpu()


def fixed_statistics(
        model: torch.nn.Module,
        batch: fashion.Data,
        device: torch.device,
        names: list[str],
) -> torch.Tensor:
    """Return first-order rewards (B, L) whose gradient does not pass through the statistics of batch norms."""
    model = copy.deepcopy(model).train()
    order = {site.name: site for site in find_sites(model, fashion.SIZE)}
    sites = [order[name] for name in names]
    images, labels = batch[0].to(device), batch[1].to(device)
    torch.manual_seed(0)
    with record_norms(model) as norms, record(model, sites) as readings:
        model(images)
    taps = [torch.zeros_like(readings[name].attention, requires_grad=True) for name in names]
    alone = [Group(site.name, site.stage, site.kind, site.size, (site,)) for site in sites]
    of_groups = {site.name: one[:, None] for site, one in zip(sites, taps, strict=True)}
    with replay_norms(model, norms), tap(model, alone, of_groups):
        log_p = model(images).log_softmax(1).gather(1, labels[:, None]).sum()
    columns = []
    for name, gradient in zip(names, torch.autograd.grad(log_p, taps), strict=True):
        attention = readings[name].attention.flatten(1)
        columns.append((gradient.flatten(1) * (attention.mean(1, keepdim=True) - attention)).sum(1))
    return -torch.expm1(torch.stack(columns, dim=1)).cpu()


def ranks(x: torch.Tensor) -> torch.Tensor:
    return x.argsort().argsort().double()


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1].item() if len(x) > 2 else math.nan


def compare(exact: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Compare the rewards of a group that both have."""
    both = ~(exact.isnan() | other.isnan())
    x, y = exact[both], other[both]
    difference = (y - x).double()
    deviation = (y.double() - exact[~exact.isnan()].double().mean())
    return {
        'n': int(both.sum()),
        'std_exact': x.std().item(),
        'pearson': correlation(x, y),
        'spearman': correlation(ranks(x), ranks(y)),
        'bias': difference.mean().item(),
        'rms_error': difference.square().mean().sqrt().item(),
        'sign': ((x > 0) == (y > 0)).double().mean().item(),
        'mean_off_in_standard_errors': (deviation.mean() / (deviation.std() / math.sqrt(len(deviation)))).item(),
    }


def measure(model: torch.nn.Module, data: fashion.Data, args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Compare all kinds of rewards over some batches."""
    collected: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    right, names = [], list[str]()
    loader = fashion.batches(data, args.batch_size, 10_000, args.seed)
    for index, batch in zip(range(args.batches), loader, strict=False):
        for kind, options in KINDS.items():
            if kind == FIXED:
                collected[kind].append(fixed_statistics(model, batch, device, names))
                continue
            names, reward, correct = rewards(model, batch, device, 100 * index, **options)
            collected[kind].append(reward)
            if kind == 'exact':
                right.append(correct)
    keep = torch.cat(right)
    exact = torch.cat(collected['exact'])[keep]
    task = DrealTask(copy.deepcopy(model), verbose=False, input_size=fashion.SIZE)
    rows = []
    for kind, tensors in collected.items():
        other = torch.cat(tensors)[keep]
        if kind == 'exact':
            continue
        for group in task.groups:
            columns = [names.index(site.name) for site in group.sites]
            numbers = compare(exact[:, columns].flatten(), other[:, columns].flatten())
            rows.append({'kind': kind, 'group': group.name, 'right': len(exact), **numbers})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--attention', choices=('se', 'cbam', 'srm'), default='se')
    parser.add_argument('--width', type=float, default=0.25, help='share of the channels')
    parser.add_argument('--images', type=int, default=10_000, help='images to train on')
    parser.add_argument('--epochs', type=int, default=6)
    parser.add_argument('--lr', type=float, default=0.1)
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--batches', type=int, default=8, help='batches to measure on')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--reinforced', action='store_true', help='train with probe split, not plainly')
    parser.add_argument('--data', type=Path, default=fashion.DEBIAN_FILES, help='folder of Fashion-MNIST')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    header = report.begin(args, device)
    data = fashion.load(args.data)
    model = fashion.network(args.attention, args.width, args.seed).to(device)
    if args.reinforced:
        options = dict(actor_weight=1.0, probe='split', rotate='step', input_size=fashion.SIZE, seed=args.seed)
        task = DrealTask(model, device=device, verbose=False, **options)
    else:
        task = ClassificationTask(model, device=device, verbose=False)
    images = fashion.subset(data['train'], args.images, args.seed)
    stages = {0: 'early', args.epochs // 2 - 1: 'middle', args.epochs - 1: 'late'}
    rows: list[dict] = []

    def after_epoch(epoch: int) -> None:
        if epoch not in stages:
            return
        top1 = fashion.accuracy(model, data['test'], device)
        model.train()
        print(f'{stages[epoch]}: epoch {epoch + 1}, {top1:.2f}% of the test images')
        for row in measure(model, images, args, device):
            rows.append({'stage': stages[epoch], 'epoch': epoch + 1, 'top1': top1, **row})
            print(
                f"{stages[epoch]:6} {row['kind']:31} {row['group']:16} sd {row['std_exact']:.4f}  "
                f"pearson {row['pearson']:.3f}  spearman {row['spearman']:.3f}  bias {row['bias']:+.5f}  "
                f"rms error {row['rms_error']:.5f}  sign {row['sign']:.3f}  "
                f"mean off {row['mean_off_in_standard_errors']:+.1f} se",
                flush=True,
            )

    fashion.train(task, images, args.epochs, args.batch_size, args.lr, args.seed, device, after_epoch)
    report.write(args.output or report.RESULTS / f'reward_fidelity-{args.attention}.json', header, rows)


if __name__ == '__main__':
    main()
