"""What a run tells while it trains: running means, and a bar on a terminal or plain lines elsewhere"""
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from dreal_timm.reward import target_class
from dreal_timm.utils.transfer import to_device

__all__ = ['Meter', 'Progress']

_logger = logging.getLogger(__name__)

_LOSSES = ('loss', 'class_loss', 'actor_loss', 'critic_loss', 'id_loss', 'triplet_loss')


class Meter:
    """Means over the epoch so far, summed on the device: only `means()` waits for it.

    Args:
        groups: For each attention site the name of its group, by which rewards are reported as well.
    """

    def __init__(self, groups: Mapping[str, str] | None = None) -> None:
        self._groups = dict(groups or {})
        self._names = list(dict.fromkeys(self._groups.values()))
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor | int] = {}
        self._probed: torch.Tensor | None = None
        self._columns: dict[tuple[str, ...], torch.Tensor] = {}
        self.samples = 0

    def _add(self, name: str, total: torch.Tensor, count: torch.Tensor | int) -> None:
        wide = torch.float32 if total.device.type == 'mps' else torch.float64
        finite = total.detach().isfinite()  # float16 skips a batch now and then
        self._sums[name] = self._sums.get(name, 0) + total.detach().to(wide).where(finite, 0.0)
        self._counts[name] = self._counts.get(name, 0) + count * finite

    def update(self, result: dict[str, Any], target: torch.Tensor) -> None:
        """Add what a task returned for a batch with these targets."""
        samples = len(target)
        self.samples += samples
        for name in _LOSSES:
            if name in result:
                self._add(name, result[name] * samples, samples)
        correct = result['output'].argmax(dim=1) == target_class(target)
        self._add('top1', 100 * correct.sum(), samples)
        if 'reward' in result:
            self._update_groups(result)

    def _update_groups(self, result: dict[str, Any]) -> None:
        """Sums of each group of sites: `means()` separates the rows."""
        reward, quality = result['reward'], result['quality']
        probed = ~reward.isnan()
        right = probed & result['right'][:, None]
        rows = torch.stack([
            torch.full_like(reward, 1.0), probed.to(reward.dtype), reward.where(probed, 0.0),
            right.to(reward.dtype), reward.where(right, 0.0),
            quality.where(probed, 0.0), (quality - reward).square().where(probed, 0.0),
        ]).sum(dim=1)
        names = tuple(result['probed'])
        if names not in self._columns:
            index = [self._names.index(self._groups[name]) for name in names]
            self._columns[names] = to_device(torch.tensor(index), reward.device)
        if self._probed is None:
            wide = torch.float32 if reward.device.type == 'mps' else torch.float64
            self._probed = torch.zeros(len(rows), len(self._names), dtype=wide, device=reward.device)
        self._probed.index_add_(1, self._columns[names], rows.to(self._probed.dtype))

    def reduced(self, accelerator: Accelerator) -> 'Meter':
        """Return the meter of all processes; every process must call this."""
        if accelerator.num_processes == 1:
            return self
        joint = Meter(self._groups)
        sums = torch.stack(list(self._sums.values()))
        counts = torch.stack([torch.as_tensor(count, device=sums.device).to(sums) for count in self._counts.values()])
        flat = [sums, counts, sums.new_full((1,), self.samples)]
        if self._probed is not None:
            flat.append(self._probed.flatten())
        # one collective for everything
        parts = accelerator.reduce(torch.cat(flat)).split([len(part) for part in flat])
        joint._sums = dict(zip(self._sums, parts[0].unbind(), strict=True))
        joint._counts = dict(zip(self._counts, parts[1].unbind(), strict=True))
        joint.samples = int(parts[2])
        if self._probed is not None:
            joint._probed = parts[3].view_as(self._probed)
        return joint

    def means(self) -> dict[str, float]:
        """Return the means.

        Returns:
            Dictionary containing:
                - 'loss', 'class_loss', 'actor_loss', 'critic_loss', 'id_loss', 'triplet_loss', as the task gives them,
                    and 'top1' (percent)
            and of the probed maps, each also as 'name/GROUP':
                - 'reward', and 'reward_correct': over all samples, and over those that are classified right
                - 'quality': Judgement of the critic
                - 'critic_error': Mean of (Q - R)^2
                - 'judged': Share of the samples, in [0, 1], whose reward was measured
        """
        means = {name: float(total) / max(float(self._counts[name]), 1) for name, total in self._sums.items()}
        if self._probed is not None:
            rows = self._probed.cpu()
            means.update(_group_means(rows.sum(dim=1).tolist()))
            for name, column in zip(self._names, rows.T.tolist(), strict=True):
                means.update({f'{key}/{name}': value for key, value in _group_means(column).items()})
        return means


def _group_means(sums: list[float]) -> dict[str, float]:
    samples, probed, reward, right, reward_correct, quality, error = sums
    return {
        'reward': reward / max(probed, 1),
        'reward_correct': reward_correct / max(right, 1),
        'quality': quality / max(probed, 1),
        'critic_error': error / max(probed, 1),
        'judged': probed / max(samples, 1),
    }


class Progress:
    """A bar on a terminal, a line every N steps elsewhere.

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

    def due(self, index: int) -> bool:
        """Return whether the numbers are shown after this step, which is the same in all processes."""
        return (index + 1) % self._interval == 0 or index + 1 == self._steps

    def step(self, index: int, means: Mapping[str, float] | None = None, samples: int = 0, lr: float = 0.0) -> None:
        """Count a step; index starts at 0. Numbers that are due are means over `samples` samples."""
        if self._bar is not None:
            self._bar.update()
            if means is not None:
                self._bar.set_postfix_str(self._numbers(means, samples, lr))
        elif self._enabled and means is not None:
            seconds = time.perf_counter() - self._start
            left = seconds / (index + 1) * (self._steps - index - 1)
            numbers = self._numbers(means, samples, lr)
            _logger.info(f'{self._name} step {index + 1}/{self._steps}  {numbers}  {left:.0f} s left')

    def _numbers(self, means: Mapping[str, float], samples: int, lr: float) -> str:
        rate = samples / (time.perf_counter() - self._start)
        text = f'loss {means["loss"]:.3f}  acc {means["top1"]:.2f}%'
        if 'reward' in means:
            text += f'  reward {means["reward"]:+.4f}  quality {means["quality"]:+.4f}'
        return f'{text}  lr {lr:.3g}  {rate:.0f} img/s'

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
