"""Slow, independent versions of the method, written from the equations and without the package

Forward passes are the network's own; maps, batch norms and rewards are computed by hand.
"""
import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers.cbam import ChannelAttn, SpatialAttn
from timm.layers.squeeze_excite import SEModule
from torch import nn

from dreal_timm.attention.sites import Group
from dreal_timm.layers import SrmModule


def conv_by_hand(module: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, module.weight, module.bias, module.stride, module.padding)


def map_by_hand(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The attention map of a module for its input, from Eq. 4 to 7; batch norms are called as they are."""
    if isinstance(module, SEModule):
        return torch.sigmoid(conv_by_hand(module.fc2, F.relu(conv_by_hand(module.fc1, x.mean((2, 3), keepdim=True)))))
    if isinstance(module, ChannelAttn):
        branches = [
            conv_by_hand(module.fc2, F.relu(conv_by_hand(module.fc1, pooled)))
            for pooled in (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
        ]
        return torch.sigmoid(branches[0] + branches[1])
    if isinstance(module, SpatialAttn):
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return torch.sigmoid(module.conv.bn(conv_by_hand(module.conv.conv, pooled)))
    assert isinstance(module, SrmModule)
    mean = x.mean((2, 3))
    positions = x.shape[2] * x.shape[3]
    variance = x.var((2, 3), unbiased=True) if positions > 1 else torch.zeros_like(mean)
    style = module.cfc[:, 0] * mean + module.cfc[:, 1] * (variance + 1e-5).sqrt()
    return torch.sigmoid(module.bn(style[:, :, None, None]))


class BatchNormByHand:
    """Replaces the normalisation of every batch norm of a network by its formula, with statistics that can be kept."""

    def __init__(self, model: nn.Module):
        self.stats: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self.keep = True
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.forward = self._forward(module)

    def _forward(self, module: nn.BatchNorm2d) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            if not module.training:
                mean, variance = module.running_mean, module.running_var
            elif self.keep:
                mean, variance = self.stats[module] = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            else:
                mean, variance = self.stats[module]
            x = (x - mean[:, None, None]) / (variance[:, None, None] + module.eps).sqrt()
            x = x * module.weight[:, None, None] + module.bias[:, None, None]
            return module.act(x) if hasattr(module, 'act') else x
        return forward


def slow_rewards(
        model: nn.Module,
        input: torch.Tensor,
        target: torch.Tensor,
        sites: list[str],
        seed: int,
        gamma: float = 1.0,
        clip: float | None = 1.0,
) -> torch.Tensor:
    """Reward of each sample and site, (B, P): Eq. 1 with one map swapped by hand in a full forward pass.

    `seed` is given to the global generator before every pass, so that all passes have the same dropout masks.
    """
    model = copy.deepcopy(model)
    norms = BatchNormByHand(model)
    with torch.no_grad():
        torch.manual_seed(seed)
        p = model(input).softmax(dim=1)
        norms.keep = False
        columns = []
        for site in sites:
            module = model.get_submodule(site)
            forward = module.forward
            module.forward = lambda x, module=module: x * map_by_hand(module, x).mean((1, 2, 3), keepdim=True)
            torch.manual_seed(seed)
            bypassed = model(input).softmax(dim=1)
            module.forward = forward
            column = []
            for i, c in enumerate(target.tolist()):
                if all(p[i, c] >= p[i, k] for k in range(p.shape[1])):
                    r = 1 - (bypassed[i, c] / p[i, c]).item()
                    column.append(r if clip is None else min(max(r, -clip), clip))
                else:
                    column.append(-gamma)
            columns.append(column)
    return torch.tensor(columns, dtype=torch.float64).T


def lstm_by_hand(cell: nn.LSTM, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Quality of each map of a group, Eq. 2 and 3, from the textbook equations of an LSTM with one unit."""
    h = c = inputs[0].new_zeros(len(inputs[0]), 1)
    quality = []
    for x in inputs:
        gates = x @ cell.weight_ih_l0.T + cell.bias_ih_l0 + h @ cell.weight_hh_l0.T + cell.bias_hh_l0
        i, f, g, o = gates.unbind(1)
        c = torch.sigmoid(f)[:, None] * c + torch.sigmoid(i)[:, None] * torch.tanh(g)[:, None]
        h = torch.sigmoid(o)[:, None] * torch.tanh(c)
        quality.append(h)
    return quality


def gru_by_hand(gru: nn.GRU, layer: int, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Hidden states of one layer of a GRU, sample by sample, in Python numbers."""
    hidden = gru.hidden_size
    states = [[0.0] * hidden for _ in inputs[0]]
    w_ih, w_hh, b_ih, b_hh = (
        getattr(gru, f'{name}_l{layer}').tolist() for name in ('weight_ih', 'weight_hh', 'bias_ih', 'bias_hh'))

    def dot(weights, values):
        return sum(w * v for w, v in zip(weights, values, strict=True))

    outputs = []
    for x in inputs:
        for b, row in enumerate(x.tolist()):
            h = states[b]
            new = []
            for j in range(hidden):
                r, z, n = j, hidden + j, 2 * hidden + j
                reset = 1 / (1 + math.exp(-(dot(w_ih[r], row) + b_ih[r] + dot(w_hh[r], h) + b_hh[r])))
                update = 1 / (1 + math.exp(-(dot(w_ih[z], row) + b_ih[z] + dot(w_hh[z], h) + b_hh[z])))
                candidate = math.tanh(dot(w_ih[n], row) + b_ih[n] + reset * (dot(w_hh[n], h) + b_hh[n]))
                new.append((1 - update) * candidate + update * h[j])
            states[b] = new
        outputs.append(torch.tensor(states))
    return outputs


def site_inputs(model: nn.Module, input: torch.Tensor, sites: Sequence[str], seed: int = 11) -> dict[str, torch.Tensor]:
    """Inputs of some modules in a forward pass, which moves running statistics; `seed` is the global generator's."""
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(site).register_forward_pre_hook(
            lambda module, args, site=site: inputs.update({site: args[0].detach()}))
        for site in sites]
    torch.manual_seed(seed)
    with torch.no_grad():
        model(input)
    for hook in hooks:
        hook.remove()
    return inputs


def quality_by_hand(
        model: nn.Module,
        critic: Mapping[str, nn.Module],
        groups: Sequence[Group],
        inputs: Mapping[str, torch.Tensor],
) -> list[torch.Tensor]:
    """Quality of all maps, a (B, L) for each group, with maps by hand from the sites' inputs and the LSTM by hand.

    Its graph reaches the attention parameters of the model and the critic's weights.
    """
    qualities = []
    for group in groups:
        rows = []
        for site in group.sites:
            x = inputs[site.name]
            state = x.mean((2, 3)) if site.kind == 'channel' else x.mean(1).flatten(1)
            rows.append(torch.cat([state, map_by_hand(model.get_submodule(site.name), x).flatten(1)], dim=1).float())
        qualities.append(torch.cat(lstm_by_hand(critic[group.name].rnn, rows), dim=1))
    return qualities


def taylor_by_hand(
        model: nn.Module,
        input: torch.Tensor,
        target: torch.Tensor,
        sites: Sequence[str],
        seed: int = 11,
        gamma: float = 1.0,
        clip: float = 1.0,
) -> torch.Tensor:
    """Reward of each sample and site to first order, (B, P): the gradient of the summed log-probabilities at each map.

    In training mode a map also moves the statistics of the other samples, in the gradient as in `probe='taylor'`.
    """
    model = copy.deepcopy(model)
    BatchNormByHand(model)
    maps: dict[str, torch.Tensor] = {}

    def gated(module: nn.Module, site: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            maps[site] = map_by_hand(module, x)
            maps[site].retain_grad()
            return x * maps[site]
        return forward

    for site in sites:
        module = model.get_submodule(site)
        module.forward = gated(module, site)
    torch.manual_seed(seed)
    log_p = model(input).log_softmax(dim=1)
    own = log_p.gather(1, target[:, None])
    own.sum().backward()
    right = (own >= log_p.amax(1, keepdim=True)).squeeze(1)
    columns = []
    for site in sites:
        flat, gradient = maps[site].detach().flatten(1), maps[site].grad.flatten(1)
        change = (gradient * (flat.mean(1, keepdim=True) - flat)).sum(1)
        columns.append((1 - change.exp()).clamp(-clip, clip).where(right, torch.full_like(change, -gamma)))
    return torch.stack(columns, dim=1)
