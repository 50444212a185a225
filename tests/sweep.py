"""What of timm can be reinforced: every registered network is looked at, one of each kind takes reinforced steps

    python tests/sweep.py           # all of it, and docs/supported.md from what was found

A kind is a file of timm and the classes of attention that its networks have; its smallest network is tried.
"""
import argparse
import copy
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from torch import nn

from dreal_timm import DrealTask
from dreal_timm.attention.capture import bypass, read_map, record
from dreal_timm.attention.gates import second_map
from dreal_timm.attention.readers import readers_of, unread
from dreal_timm.attention.sites import Site, attention_parameters, find_sites, site_reader
from dreal_timm.audit import Auditor
from dreal_timm.replay.overrides import scratch_buffers

DOCUMENT = Path(__file__).parents[1] / 'docs' / 'supported.md'
SIZES = (64, 96, 128, 160, 192, 224, 256)
CLASSES = 5


@dataclass
class Network:
    """What a look at a network told: its file in timm, its size, and how many modules of each class have maps."""
    name: str
    file: str
    parameters: int
    attention: Counter[str]
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> tuple[str, tuple[str, ...]]:
        return self.file, tuple(sorted(self.attention))


def look(name: str) -> Network:
    """Build a network on the meta device and look for attention."""
    try:
        with torch.device('meta'):
            model = timm.create_model(name)
    except (NotImplementedError, RuntimeError):  # one that computes while it is built
        model = timm.create_model(name)
    found = Counter(type(module).__name__ for module in model.modules() if readers_of(module))
    file = timm.model_entrypoint(name).__module__.rsplit('.', 1)[-1]
    return Network(name, file, sum(p.numel() for p in model.parameters()), found, unread(model))


def networks() -> list[str]:
    """Names of all networks of timm itself."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith('timm.')]


def smallest(found: Iterable[Network]) -> list[Network]:
    """The smallest network of each kind that has sites."""
    kinds: dict[tuple[str, tuple[str, ...]], Network] = {}
    for network in found:
        if network.attention:
            kept = kinds.setdefault(network.kind, network)
            if network.parameters < kept.parameters:
                kinds[network.kind] = network
    return sorted(kinds.values(), key=lambda network: network.kind)


def randomise(model: nn.Module) -> None:
    """Give constant parameters (norm weights, layer scales, zero-initialised ends) random values."""
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and parameter.min() == parameter.max():
            if parameter.mean() == 0 and name.endswith('bias'):
                nn.init.normal_(parameter, std=0.1)
            else:
                nn.init.uniform_(parameter, 0.5, 1.5)


def fitting(name: str) -> tuple[nn.Module, int]:
    """A network with random weights, and the smallest size of images that it takes."""
    config = timm.get_pretrained_cfg(name)
    default = (config.input_size if config is not None else (3, 224, 224))[-1]
    for size in sorted({*SIZES, default}):
        for options in ({}, {'img_size': size}):
            torch.manual_seed(0)
            try:
                model = timm.create_model(name, num_classes=CLASSES, **options)
                with torch.no_grad():
                    model.eval()(torch.randn(2, 3, size, size))
                return model, size
            except (AssertionError, RuntimeError, TypeError, ValueError):
                continue
    raise RuntimeError(f'{name} takes images of none of the sizes {SIZES}.')


def used_maps(model: nn.Module, sites: Sequence[Site], input: torch.Tensor) -> dict[str, torch.Tensor]:
    """The maps that a copy of the model uses, seen at its gates."""
    twin = copy.deepcopy(model)
    outputs: dict[str, list[torch.Tensor]] = {}
    for module in {site.module: site for site in sites}.values():
        owner, reader = site_reader(twin, module)
        seen = outputs.setdefault(module.module, [])
        owner.get_submodule(reader.gate).register_forward_hook(
            lambda m, a, output, seen=seen: seen.append(output.detach()))
    torch.manual_seed(1)
    twin(input)
    maps = {}
    for site in sites:
        _, reader = site_reader(twin, site)
        output = outputs[site.module][reader.call]
        maps[site.name] = reader.activation(output) if reader.activation else output
    return maps


def check_reading(model: nn.Module, sites: Sequence[Site], input: torch.Tensor) -> None:
    """Maps read are the maps used, bit for bit, and computing them again gives the same."""
    used = used_maps(model, sites, input)
    start = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    with record(model, sites) as readings:
        model(input)
    model.load_state_dict(start)
    for site in sites:
        reading = readings[site.name]
        assert torch.equal(reading.attention, used[site.name]), f'{site.name}: another map was read than was used'
        assert torch.equal(read_map(model, site, reading).detach(), used[site.name]), site.name
        module, reader = site_reader(model, site)
        with scratch_buffers([m for m in module.modules() if m.training and m._buffers]), torch.no_grad():
            again = second_map(module, reader, *reading.descriptors)
        torch.testing.assert_close(again, used[site.name], rtol=1e-4, atol=1e-5)


def check_audit(model: nn.Module, sites: Sequence[Site], input: torch.Tensor, target: torch.Tensor) -> None:
    """A bypassed map changes the output, and an audit says what the network does without it."""
    auditor = Auditor(model, input_size=tuple(input.shape[1:]))
    answer = auditor.without(auditor.see(input, target))
    model.eval()
    with torch.no_grad():
        plain = model(input)
        for site in {sites[0], sites[-1]}:
            with bypass(model, [site]):
                output = model(input)
            assert not torch.equal(output, plain), f'{site.name}: bypassing it changes nothing'
            expected = output.log_softmax(1).gather(1, target[:, None]).squeeze(1)
            seen = answer.log_p[:, auditor.sites.index(site)]
            torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-3)
    model.train()


def check_steps(model: nn.Module, sites: Sequence[Site], input: torch.Tensor, target: torch.Tensor) -> DrealTask:
    """In reinforced steps theta learns from L_q, and the rest of the network does not; keys stay."""
    keys, twin, gradients = set(model.state_dict()), copy.deepcopy(model), []
    task = DrealTask(twin, verbose=False, input_size=tuple(input.shape[1:]), probe='split', rotate='step')
    for weight in (0.0, 1.0):
        twin.load_state_dict(model.state_dict())  # buffers that a step moves, such as the vectors of spectral norms
        task.zero_grad()
        task.actor_weight = weight
        task.get_trainable_module().train()
        torch.manual_seed(3)
        result = task(input, target)
        result['loss'].backward()
        assert result['loss'].isfinite(), 'the loss is not finite'
        assert not result['reward'].isnan().all(), 'no reward was measured'
        assert set(twin.state_dict()) == keys, 'keys of the state dict changed'
        assert all(p.grad is not None for p in task._trainable.critic.parameters())
        gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in twin.named_parameters()})
    theta = set(attention_parameters(model, sites))
    changed = {
        n for n, g in gradients[1].items()
        if (g is None) != (gradients[0][n] is None) or (g is not None and not torch.equal(g, gradients[0][n]))}
    assert changed <= theta, f'L_q reached {sorted(changed - theta)[0]}'
    assert changed, 'L_q reached no attention parameter'
    return task


def check(model: nn.Module, size: int) -> dict[str, object]:
    """Audit a network and take reinforced steps; raise an AssertionError where anything is not as it must be."""
    randomise(model)
    model.train()
    sites = find_sites(model, (3, size, size))
    assert sites, 'no site was found'
    torch.manual_seed(2)
    input, target = torch.randn(3, 3, size, size), torch.arange(3)
    check_reading(model, sites, input)
    check_audit(model, sites, input, target)
    task = check_steps(model, sites, input, target)

    flow = task.probe.flow
    plans = [flow.restarts[site.name] for site in sites]
    begin = 'images' if None in plans else 'sites'
    if begin == 'sites' and any(plan.inputs[-1] != plan.site.module for plan in plans):
        begin = 'blocks'
    return {'sites': len(sites), 'groups': len(task.groups), 'size': size, 'begin': begin}


def attempt(network: Network) -> dict[str, object]:
    """Check a network; say what went wrong."""
    try:
        return check(*fitting(network.name))
    except Exception as error:
        message = str(error).strip().splitlines()
        return {'error': f'{type(error).__name__}: {message[0] if message else ""}', 'trace': traceback.format_exc()}


def document(found: Sequence[Network], rows: Sequence[tuple[Network, dict[str, object]]]) -> str:
    """The text of docs/supported.md."""
    having = [network for network in found if network.attention]
    working = [network for network, result in rows if 'error' not in result]
    kinds = {network.kind for network in working}
    counts = Counter(network.kind for network in having)
    covered = sum(counts[kind] for kind in kinds)
    text = f"""# Networks of timm that can be reinforced

Of the {len(found)} networks in timm {timm.__version__}, {len(having)} have attention sites, in {len(rows)} kinds:
a file of timm and the classes of attention in it. The smallest network of each kind took reinforced steps at a small
size and was audited: the maps that were read are those that were used, bit for bit; replacing one by its mean changes
the output, and the audit says by how much; L_q reaches attention parameters and nothing else; the keys of the state
dict stay. It works for {len(working)} kinds, {covered} networks. `python tests/sweep.py` does all that and writes this
page; `pytest -m sweep` does it as a test.

*Passes from*: where counterfactual passes begin - at the sites, at the blocks around some of them, or with the images,
which is slower (see performance.md).

| file of timm | attention | networks | tried | sites | groups | passes from | works |
|---|---|---:|---|---:|---:|---|---|
"""
    for network, result in rows:
        attention = ', '.join(sorted(network.attention))
        works = 'yes' if 'error' not in result else str(result['error'])
        cells = [
            network.file, attention, counts[network.kind], network.name, result.get('sites', ''),
            result.get('groups', ''), result.get('begin', ''), works]
        text += '| ' + ' | '.join(str(cell) for cell in cells) + ' |\n'
    reasons: dict[str, list[str]] = {}
    why: dict[str, str] = {}
    for network in found:
        for name, reason in network.reasons.items():
            reasons.setdefault(name, []).append(network.name)
            why[name] = reason
    text += """
Modules that look like attention and have no site:

| class | in | why |
|---|---|---|
"""
    for name in sorted(reasons):
        examples = reasons[name]
        more = f' and {len(examples) - 1} more' if len(examples) > 1 else ''
        text += f'| {name} | {examples[0]}{more} | {why[name]} |\n'
    return text


def sweep(patterns: Sequence[str] | None = None) -> str:
    """Look at all networks, or at those of some names, try one of each kind, and return the text of the document."""
    found = [look(name) for name in (networks() if patterns is None else timm.list_models(patterns))]
    rows = []
    for network in smallest(found):
        begun = time.perf_counter()
        result = attempt(network)
        rows.append((network, result))
        told = result.get('trace') or ', '.join(f'{key} {value}' for key, value in result.items())
        print(f'{network.file} {"+".join(sorted(network.attention))} {network.name}: {told}'
              f' ({time.perf_counter() - begun:.0f} s)', flush=True)
    return document(found, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', nargs='+', help='patterns of names, as in timm.list_models; nothing is written')
    args = parser.parse_args()
    text = sweep(args.only)
    if args.only is None:
        DOCUMENT.write_text(text, encoding='utf-8')
        print(f'written: {DOCUMENT}')


if __name__ == '__main__':
    main()
