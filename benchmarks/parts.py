"""Parts of a step, by themselves and in the ways in which they could be done

Critics as one sequence call a group, and as a loop over a cell; the second evaluation of the gates as matrix products,
and by the modules themselves; the states from what the gates pooled, and by pooling again. Sizes are those of a network
at its attention sites; the ways of a part take turns.
"""
import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import report
import step_time
import torch
from torch import nn

from dreal_timm.attention.capture import read_map, record
from dreal_timm.attention.sites import find_sites, group_sites
from dreal_timm.critic import Critic, RecurrentCritic


class Cells(nn.Module):
    """The default critics as loops over their cells: hidden size 1, one layer."""

    def __init__(self, critic: Critic):
        super().__init__()
        self.cells = nn.ModuleDict()
        for name, one in critic.items():
            rnn = cast(RecurrentCritic, one).rnn
            cell, weights = nn.LSTMCell(rnn.input_size, 1), rnn.state_dict()
            cell.load_state_dict({key.removesuffix('_l0'): value for key, value in weights.items()})
            self.cells[name] = cell

    def forward(self, states: dict[str, torch.Tensor], maps: dict[str, torch.Tensor]) -> torch.Tensor:
        columns = []
        for name, cell in self.cells.items():
            hidden = None
            for state, attention in zip(states[name].unbind(1), maps[name].unbind(1), strict=True):
                hidden = cell(torch.cat([state.flatten(1), attention.flatten(1)], dim=1), hidden)
                columns.append(hidden[0])
        return torch.cat(columns, dim=1)


def learn(critic: nn.Module, states: dict[str, torch.Tensor], maps: dict[str, torch.Tensor]) -> torch.Tensor:
    """Judge, as actor and as critic, and go back."""
    wanted = {name: attention.detach().requires_grad_() for name, attention in maps.items()}
    critic.zero_grad()
    frozen = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    actor = torch.func.functional_call(critic, frozen, (states, wanted))
    quality = critic(states, maps)
    (actor.sum() + quality.square().mean()).backward()
    return quality.detach()


def take_turns(ways: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds of each way, measured in alternation."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(repeats + 2):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            if index >= 2:
                times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: report.spread(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='dreal_se_resnet50')
    parser.add_argument('--size', type=int, default=96, help='side of the images, pixels')
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path)
    args = parser.parse_args()
    vars(args).update(channels_last=False)
    device = torch.device(args.device)
    header = report.begin(args, device)
    model = step_time.make_model(args.model).to(device).train()
    sites = find_sites(model, (3, args.size, args.size))
    groups = group_sites(sites)
    images, _ = step_time.make_batch(args, device)
    seen: dict[str, torch.Tensor] = {}  # feature maps that enter the attention modules
    hooks = [
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda module, args, name=site.name: seen.update({name: args[0].detach()}))
        for site in sites
    ]
    with torch.no_grad(), record(model, sites) as readings:
        model(images)
    for hook in hooks:
        hook.remove()
    states, maps = (
        {
            group.name: torch.stack([
                getattr(readings[site.name], kind).reshape(len(images), *group.size) for site in group.sites], dim=1)
            for group in groups
        }
        for kind in ('state', 'attention')
    )
    critic = Critic({group.name: group.size for group in groups}, device=device)
    cells = Cells(critic).to(device)
    torch.testing.assert_close(learn(cells, states, maps), learn(critic, states, maps), rtol=1e-3, atol=1e-4)

    def by_products() -> None:
        torch.stack([read_map(model, site, readings[site.name]).sum() for site in sites]).sum().backward()

    def by_modules() -> None:
        torch.stack([model.get_submodule(site.name)(seen[site.name]).sum() for site in sites]).sum().backward()

    def pool() -> None:
        for site in sites:
            seen[site.name].mean((2, 3) if site.kind == 'channel' else 1)

    parts: dict[str, dict[str, Callable[[], Any]]] = {
        'critic': {
            'one call a group': lambda: learn(critic, states, maps),
            'a loop over the cell': lambda: learn(cells, states, maps),
        },
        'maps for L_q': {'from what the gates pooled': by_products, 'attention modules again': by_modules},
        'states': {'pooled again (else: nothing)': pool},
    }
    rows = []
    for part, ways in parts.items():
        for way, spread in take_turns(ways, device, args.repeats).items():
            print(f'{part:14} {way:30} {report.tell(spread, 2)} ms', flush=True)
            rows.append({'part': part, 'way': way, 'milliseconds': spread})
    report.write(args.output or report.RESULTS / f'parts-{args.model}-{device.type}.json', header, rows)


if __name__ == '__main__':
    main()
