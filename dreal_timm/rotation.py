"""Which site of each group is judged when: one building block of each stage an epoch (Sec. 4.1)"""
import logging
import random
from collections.abc import Sequence
from typing import Any

__all__ = ['Rotation']

_logger = logging.getLogger(__name__)

_LONG_EPOCH = 10_000


class Rotation:
    """Draw one site of each group, anew every epoch, every step or every N steps.

    A group's sites are drawn without replacement until all were seen, then in another order. The draw is a function
    of (seed, turn, stage) alone: every process agrees, a resumed run draws the same, and the groups of a stage that
    are equally long (the channel and the spatial maps of CBAM) draw the same block.

    Args:
        groups: (stage, number of sites) of each group.
        seed: Seed of the draw.
        rotate: 'epoch', 'step', or a number of steps.
        every: Sites are judged every N steps: 'step' draws anew for each of those.

    Raises:
        ValueError: `rotate` is none of these, or `every` is no whole number above 0.
    """

    def __init__(self, groups: Sequence[tuple[str, int]], seed: int = 0, rotate: str | int = 'epoch', every: int = 1):
        whole = isinstance(rotate, int) and not isinstance(rotate, bool) and rotate >= 1
        if not whole and rotate not in ('epoch', 'step'):
            raise ValueError(f"rotate must be 'epoch', 'step' or a number of steps (1 or more), got {rotate!r}.")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f'probe_every must be a number of steps, 1 or more, got {every!r}.')
        self.groups = list(groups)
        self.seed = seed
        self.every = every
        self.rotate = rotate
        self.epoch = 0
        self.step = 0
        self.steps_in_epoch = 0

    def draw(self) -> list[int]:
        """Return the index, in its group, of the site that is judged now, for each group."""
        turn = self.epoch
        if self.rotate != 'epoch':
            turn = self.step // (self.every if self.rotate == 'step' else int(self.rotate))
        drawn = []
        for stage, length in self.groups:
            cycle, position = divmod(turn, length)
            order = list(range(length))
            random.Random(f'{self.seed}/{stage}/{cycle}').shuffle(order)
            drawn.append(order[position])
        return drawn

    @property
    def due(self) -> bool:
        """Whether sites are judged in this step."""
        return self.step % self.every == 0

    def advance(self) -> None:
        """Count one step."""
        self.step += 1
        self.steps_in_epoch += 1
        if self.rotate == 'epoch' and self.steps_in_epoch == _LONG_EPOCH:
            _logger.warning(
                f'{_LONG_EPOCH} steps without a new epoch: the same sites are judged all the while. An epoch begins '
                "with train() of the task's trainable module or with task.set_epoch(); pass rotate='step' or a number "
                'of steps where the loop has no epochs.'
            )

    def begin_epoch(self, epoch: int | None = None) -> None:
        """Begin an epoch: the given one, or the next one if at least one step was made in the current one."""
        if epoch is not None:
            self.epoch = epoch
        elif self.steps_in_epoch:
            self.epoch += 1
        self.steps_in_epoch = 0

    def state_dict(self) -> dict[str, int]:
        return {'epoch': self.epoch, 'step': self.step, 'steps_in_epoch': self.steps_in_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = int(state['epoch'])
        self.step = int(state['step'])
        self.steps_in_epoch = int(state['steps_in_epoch'])
