"""Print the sizes of all registered dreal models as a GitHub markdown table

Everything runs on the meta device: no weight is allocated and nothing is computed.

* Parameters are those of the plain network, what is saved, exported and published.
* GMACs are 1e9 multiply-accumulates of one image, half of what `torch.utils.flop_counter.FlopCounterMode` counts. It
  counts convolutions and matrix products (`aten.convolution` and `aten.addmm` in these networks, those of the attention
  gates included) and no other operation: no batch norm, activation, pooling, bias of a convolution, nor the
  multiplication by an attention map. All of SRM is made of the latter, so that its figures are the plain ResNet's.
  The paper's Table 1 cuts digits off where this table rounds: 4.0917 is 4.091 there and 4.092 here.
* Critic parameters exist while a network trains and at no other time. Each is the sum over the stages, weights and
  LSTM biases. Those of spatial critics depend on the input size.
"""
import argparse
import shlex
import sys
from collections.abc import Iterator

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dreal_timm
from dreal_timm.attention.sites import find_sites, group_sites

COLUMNS = ('model', 'params (M)', 'GMACs', 'critic params, channel', 'critic params, spatial', 'critic share (%)')


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters, biases included."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Return the multiply-accumulates of one image of input_size (C, H, W) in evaluation mode."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(torch.empty(1, *input_size, device='meta'))
    return counter.get_total_flops() // 2


def leave_out_norms(model: nn.Module) -> None:
    """Let batch norms return what they are given: they count for nothing here, and are slow on the meta device."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = lambda input: input  # type: ignore[method-assign]


def count_critic(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Return the critic's parameters by kind of map, for images of input_size (C, H, W)."""
    groups = group_sites(find_sites(model, input_size))
    return {
        kind: count_parameters(
            dreal_timm.Critic({group.name: group.size for group in groups if group.kind == kind}, device='meta')
        )
        for kind in ('channel', 'spatial')
    }


def table(input_size: tuple[int, int, int]) -> Iterator[str]:
    """Yield the lines of the table, one model at a time, for images of input_size (C, H, W)."""
    yield f'| {" | ".join(COLUMNS)} |'
    yield f'|{"|".join(["---"] + ["---:"] * (len(COLUMNS) - 1))}|'
    for name in timm.list_models('dreal_*_resnet*'):
        model = timm.create_model(name, device='meta')
        parameters = count_parameters(model)
        leave_out_norms(model)
        critic = count_critic(model, input_size)
        cells = (
            name,
            f'{parameters / 1e6:.3f}',
            f'{count_macs(model, input_size) / 1e9:.3f}',
            f'{critic["channel"]:,}',
            f'{critic["spatial"]:,}',
            f'{100 * sum(critic.values()) / parameters:.3f}',
        )
        yield f'| {" | ".join(cells)} |'


def main() -> None:
    parser = argparse.ArgumentParser(description='Print the sizes of all registered dreal models.')
    parser.add_argument('--input-size', type=int, default=224, metavar='N', help='height and width of the images')
    args = parser.parse_args()
    if args.input_size < 1:
        parser.error(f'--input-size must be 1 or more, got {args.input_size}')

    print('command:', shlex.join(['python', 'benchmarks/model_table.py', *sys.argv[1:]]))
    print(f'versions: torch {torch.__version__}, timm {timm.__version__}, dreal_timm {dreal_timm.__version__}')
    print()
    for line in table((3, args.input_size, args.input_size)):
        print(line, flush=True)


if __name__ == '__main__':
    main()
