"""What a run tells while it trains: running means, and a bar on a terminal or plain lines elsewhere"""
import logging
import sys
import time
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from dreal_timm.reward import target_class

__all__ = ['Meter', 'Progress']

_logger = logging.getLogger(__name__)


class Meter:
    """Means over the epoch so far, summed on the device: only `means()` waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor | int] = {}
        self.samples = 0

    def _add(self, name: str, total: torch.Tensor, count: torch.Tensor | int) -> None:
        wide = torch.float32 if total.device.type == 'mps' else torch.float64
        self._sums[name] = self._sums.get(name, 0) + total.detach().to(wide)
        self._counts[name] = self._counts.get(name, 0) + count

    def update(self, result: dict[str, Any], target: torch.Tensor) -> None:
        """Add what a task returned for a batch with these targets."""
        samples = len(target)
        self.samples += samples
        for name in ('loss', 'class_loss', 'actor_loss', 'critic_loss'):
            if name in result:
                self._add(name, result[name] * samples, samples)
        correct = result['output'].argmax(dim=1) == target_class(target)
        self._add('top1', 100 * correct.sum(), samples)
        for name in ('reward', 'quality'):
            if name in result:
                probed = ~result[name].isnan()
                self._add(name, result[name].nan_to_num().sum(), probed.sum())
        if 'reward' in result:
            probed = ~result['reward'].isnan() & correct[:, None]
            self._add('reward_correct', result['reward'].where(probed, 0.0).sum(), probed.sum())

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes."""
        for name, total in self._sums.items():
            count = torch.as_tensor(self._counts[name], device=total.device).to(total.dtype)
            self._sums[name], self._counts[name] = accelerator.reduce(torch.stack([total, count])).unbind()

    def means(self) -> dict[str, float]:
        """Return the means: losses, top1 (percent), reward, quality, and the reward of correct samples alone."""
        return {name: float(total) / max(float(self._counts[name]), 1) for name, total in self._sums.items()}


class Progress:
    """A bar on a terminal, a line every so many steps elsewhere.

    Args:
        epoch: Number of the epoch.
        epochs: Number of epochs.
        steps: Number of steps in the epoch.
        interval: Steps between updates of the numbers.
        enabled: False is silent (all processes but the first).
    """

    def __init__(self, epoch: int, epochs: int, steps: int, interval: int, enabled: bool = True):
        self._name = f'epoch {epoch + 1}/{epochs}'
        self._steps = steps
        self._interval = max(interval, 1)
        self._enabled = enabled
        self._start = time.perf_counter()
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=steps, desc=self._name, leave=False, dynamic_ncols=True)

    def step(self, index: int, meter: Meter) -> None:
        """Count a step; index starts at 0."""
        due = (index + 1) % self._interval == 0 or index + 1 == self._steps
        if self._bar is not None:
            self._bar.update()
            if due or index % 10 == 0:
                self._bar.set_postfix_str(self._numbers(meter))
        elif self._enabled and due:
            seconds = time.perf_counter() - self._start
            left = seconds / (index + 1) * (self._steps - index - 1)
            _logger.info(f'{self._name} step {index + 1}/{self._steps}  {self._numbers(meter)}  {left:.0f} s left')

    def _numbers(self, meter: Meter) -> str:
        means = meter.means()
        rate = meter.samples / (time.perf_counter() - self._start)
        text = f'loss {means["loss"]:.3f}  acc {means["top1"]:.2f}%'
        if 'reward' in means:
            text += f'  reward {means["reward"]:+.4f}  quality {means["quality"]:+.4f}'
        return f'{text}  {rate:.0f} img/s'

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
