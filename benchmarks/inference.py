"""What reinforcement leaves behind: the exported network against timm's plain one - graph, logits and time

The network takes a few reinforced steps, is exported, loaded again, and compared with a network of the same weights
that never saw a critic: operations of the graphs, bits of the logits, seconds. For SE and CBAM that one is built by
timm alone; timm has no SRM, so that there it is a fresh one of this package.
"""
import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import report
import timm
import torch
from timm.layers.cbam import CbamModule
from timm.optim import create_optimizer_v2

from dreal_timm import DrealTask
from dreal_timm.hub.export import export


def timms_own(name: str) -> torch.nn.Module:
    """Build the network as timm does, without this package where timm has its attention."""
    attention, depth = name.removeprefix('dreal_').split('_')
    options: dict[str, Any] = dict(num_classes=10, zero_init_last=False)
    if attention == 'se':
        return timm.create_model(f'se{depth}', **options)
    if attention == 'cbam':
        return timm.create_model(depth, block_args=dict(attn_layer=partial(CbamModule, mlp_bias=True)), **options)
    return timm.create_model(name, **options)


def operations(model: torch.nn.Module, input: torch.Tensor) -> str:
    """Return the code of the graph that torch.export captures."""
    return torch.export.export(model, (input,)).graph_module.code


@torch.no_grad()
def seconds(model: torch.nn.Module, input: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input)
    if input.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, probe: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train, export, load and compare one network."""
    torch.manual_seed(0)
    size = (3, args.size, args.size)
    model = timm.create_model(name, num_classes=10, zero_init_last=False).to(device)
    task = DrealTask(model, device=device, verbose=False, input_size=size, probe=probe)
    module = task.get_trainable_module()
    optimizer = create_optimizer_v2(module, 'sgd', lr=0.01)
    module.train()
    for _ in range(2):
        task(torch.randn(8, *size, device=device), torch.randint(10, (8,), device=device))['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder) / 'model')
        exported = timm.create_model(f'local-dir:{folder}/model', pretrained=True).to(device).eval()
    plain = timms_own(name).to(device).eval()
    plain.load_state_dict(model.state_dict())
    input = torch.randn(args.batch_size, *size, device=device)
    with torch.no_grad():
        equal = torch.equal(exported(input), plain(input))
    times: dict[str, list[float]] = {'plain': [], 'exported': []}
    for index in range(args.runs + 2):
        for kind, network in (('plain', plain), ('exported', exported)):
            elapsed = seconds(network, input)
            if index >= 2:
                times[kind].append(elapsed)
    return {
        'model': name, 'probe': probe,
        'graphs_equal': operations(exported, input) == operations(plain, input),
        'logits_equal': equal,
        'parameters': [sum(p.numel() for p in network.parameters()) for network in (plain, exported)],
        'plain': report.spread(times['plain']), 'exported': report.spread(times['exported']),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=[f'dreal_{name}_resnet50' for name in ('se', 'cbam', 'srm')])
    parser.add_argument('--probes', nargs='+', default=['exact', 'split', 'taylor'])
    parser.add_argument('--size', type=int, default=96, help='side of the images, pixels')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--runs', type=int, default=9)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    header = report.begin(args, device)
    rows = []
    for name in args.models:
        for probe in args.probes:
            row = compare(name, probe, args, device)
            rows.append(row)
            print(
                f"{name} trained with {probe}: graphs equal {row['graphs_equal']}, logits bit-equal "
                f"{row['logits_equal']}, {report.tell(row['plain'])} s plain, {report.tell(row['exported'])} s exported"
            )
            if not (row['graphs_equal'] and row['logits_equal']):
                raise SystemExit('the exported network is not the plain one')
    report.write(args.output or report.RESULTS / f'inference-{device.type}.json', header, rows)


if __name__ == '__main__':
    main()
