"""A watch over the loss: the first step at which it is not finite, and which term it was"""
from collections.abc import Mapping

import torch
from accelerate import Accelerator

__all__ = ['FiniteWatch']

_TERMS = ('class_loss', 'actor_loss', 'critic_loss', 'loss')


class FiniteWatch:
    """Remembers, on the device and without waiting for it, the first step of an epoch whose loss is not finite.

    Args:
        patience: Number of such steps in a row that are too many. With the loss scaler of float16 a single one is
            skipped and the scale halved, as timm's train.py lets it be.
    """

    def __init__(self, patience: int = 1) -> None:
        self._patience = patience
        self._terms: list[str] = []
        self._row = torch.tensor(0)  # bad steps in a row
        self._broken = torch.tensor(False)
        self._step = torch.tensor(0)  # where the row began
        self._values = torch.zeros(0)

    def update(self, index: int, result: Mapping[str, torch.Tensor]) -> None:
        """Look at what a task returned for the step `index`, from 0."""
        if not self._terms:
            self._terms = [term for term in _TERMS if term in result]
            device = result['loss'].device
            self._row, self._broken, self._step = (t.to(device) for t in (self._row, self._broken, self._step))
            self._values = torch.zeros(len(self._terms), device=device)
        values = torch.stack([result[term].detach().float() for term in self._terms])
        self._row = (self._row + 1) * ~values.isfinite().all()
        begins = (self._row == 1) & ~self._broken
        self._step = torch.where(begins, index, self._step)
        self._values = torch.where(begins, values, self._values)
        self._broken = self._broken | (self._row >= self._patience)

    def check(self, accelerator: Accelerator, epoch: int, steps: int) -> None:
        """Raise if a loss was not finite in any process; every process must call this, and every one raises.

        Args:
            accelerator: Accelerate's accelerator.
            epoch: Number of the epoch, from 0.
            steps: Number of steps in the epoch.

        Raises:
            FloatingPointError: With the step, the terms and the process.
        """
        seen = torch.cat([self._broken[None].float(), self._step[None].float(), self._values])[None]
        everyone = enumerate(accelerator.gather(seen).tolist())
        found = [(step, rank, values) for rank, (broken, step, *values) in everyone if broken]
        if not found:
            return
        step, rank, values = min(found)  # the others only follow: their weights broke with the next update
        terms = [f'{name} is {value}' for name, value in zip(self._terms, values, strict=True)]
        bad = [text for text, value in zip(terms, values, strict=True) if not abs(value) < float('inf')]
        where = f' of process {rank}' if accelerator.num_processes > 1 else ''
        raise FloatingPointError(
            f'epoch {epoch + 1}, step {int(step) + 1} of {steps}: the batch{where} has a loss that is not finite '
            f'({"; ".join(bad)}). Training has diverged: try a smaller lr, a longer warm-up, clip_grad, or '
            'amp_dtype=bfloat16 in place of float16.'
        )
