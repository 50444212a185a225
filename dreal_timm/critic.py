"""Recurrent critics: one small recurrent network for each group of attention sites (Sec. 3.2, Eq. 2 and 3)

Shape letters: B batch, L sites in a group, N positions of a map (C, or H * W).
"""
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ['CELLS', 'Critic', 'RecurrentCritic']

_logger = logging.getLogger(__name__)

CELLS: dict[str, type[nn.RNNBase]] = {'lstm': nn.LSTM, 'gru': nn.GRU}


class RecurrentCritic(nn.Module):
    """Judge the attention maps of one group, from the first block of the stage to the last.

    Q_l is the hidden state after the cell has read (state, map) of site l; hidden and cell state start at zero (Sec.
    4.1). With the paper's hidden size of 1 it is the output itself and lies in (-1, 1); a larger hidden size gets a
    linear read-out, whose output is not bounded.

    Weights start uniform in +-1/sqrt(fan-in), biases at zero. The paper does not say how they start. PyTorch draws a
    cell's weights by its hidden size, which for a size of 1 is +-1: summed over 2N inputs, that saturates every gate.

    All weights stay in float32 through `half()`, `bfloat16()`, `double()` and `to(dtype)`.

    Args:
        size: Size of the maps: (C,), or (H, W) of spatial maps. A spatial map of another size is average-pooled to it;
            maps (C, H), (C, W) and (C, H, W) are averaged to (C,).
        cell: 'lstm' (the paper's) or 'gru'.
        hidden_size: Number of hidden units.
        depth: Number of cells on top of each other.

    Raises:
        ValueError: Unknown cell, or a hidden size or depth below 1.
    """

    def __init__(
            self,
            size: tuple[int, ...],
            cell: str = 'lstm',
            hidden_size: int = 1,
            depth: int = 1,
            device: torch.device | str | None = None,
    ):
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"Unknown critic cell '{cell}', expected one of {sorted(CELLS)}.")
        if hidden_size < 1 or depth < 1:
            raise ValueError(f'hidden_size and depth must be 1 or more, got {hidden_size} and {depth}.')
        dd: dict[str, Any] = {'device': device, 'dtype': torch.float32}
        self.size = size
        self.hidden_size = hidden_size
        positions = size[0] if len(size) == 1 else size[0] * size[1]
        self.rnn = CELLS[cell](
            input_size=2 * positions, hidden_size=hidden_size, num_layers=depth, batch_first=True, **dd)
        self.readout = nn.Identity() if hidden_size == 1 else nn.Linear(hidden_size, 1, **dd)
        self._pooling_logged = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for name, parameter in self.named_parameters():
            if 'bias' in name:
                nn.init.zeros_(parameter)
            else:
                bound = parameter.shape[1] ** -0.5
                nn.init.uniform_(parameter, -bound, bound)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> 'RecurrentCritic':
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return super()._apply(keep_dtype, *args, **kwargs)

    def _fit(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, C), (B, L, H, W), or (B, L, C, ...) averaged over what follows C -> (B, L, N)."""
        if x.ndim > 2 + len(self.size):
            x = x.flatten(3).mean(3)
        if tuple(x.shape[2:]) == self.size:
            return x.flatten(2)
        if len(self.size) == 1 or x.ndim != 4:
            raise ValueError(f'The critic was built for maps of size {self.size}, got {tuple(x.shape[2:])}.')
        if not self._pooling_logged:
            _logger.info(f'Spatial maps of {tuple(x.shape[2:])} are pooled to the size of their critic, {self.size}.')
            self._pooling_logged = True
        return F.adaptive_avg_pool2d(x, (self.size[0], self.size[1])).flatten(2)

    def inputs(self, state: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Return what the cell reads of each site, (B, L, 2 N): state and map of all N positions."""
        return torch.cat([self._fit(state), self._fit(attention)], dim=2)

    def forward(self, state: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Return the quality Q of each map, (B, L).

        Args:
            state: Reduced feature maps F~, (B, L, C) or (B, L, H, W), float32.
            attention: Attention maps A, of the same shape, or with height, width or both behind C.
        """
        x = self.inputs(state, attention)
        rnn = self.rnn
        start = x.new_zeros(rnn.num_layers, len(x), rnn.hidden_size)
        # not rnn(x): it keeps a list of its weights, past which detached ones from functional_call would have no effect
        weights: list[torch.Tensor] = list(rnn.parameters())
        options = (weights, True, rnn.num_layers, 0.0, True, False, True)
        if isinstance(rnn, nn.LSTM):
            hidden = torch.lstm(x, (start, start), *options)[0]
        else:
            hidden = torch.gru(x, start, *options)[0]
        return self.readout(hidden).squeeze(2)


class Critic(nn.ModuleDict):
    """The critics of all groups, by the name of the group.

    Args:
        sizes: Map size of each group, (C,) or (H, W).
        seed: Seed of a generator of its own for the weights: building a critic draws nothing from the global one.
        **kwargs: Passed to each `RecurrentCritic`.
    """
    critic_class: type[RecurrentCritic] = RecurrentCritic

    def __init__(self, sizes: Mapping[str, tuple[int, ...]], seed: int = 0, **kwargs: Any):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            device = kwargs.pop('device', None)
            super().__init__({name: self.critic_class(size, **kwargs) for name, size in sizes.items()})
        if device is not None:
            self.to(device)

    def forward(
            self,
            states: Mapping[str, torch.Tensor],
            maps: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Return the quality of all maps, (B, sum of L), group after group.

        Args:
            states: Reduced feature maps of each group, (B, L, C) or (B, L, H, W), float32.
            maps: Attention maps of each group, of the same shapes.
        """
        return torch.cat([critic(states[name], maps[name]) for name, critic in self.items()], dim=1)
