"""What the attention maps of a batch are worth: the network's answer as it is, and with each map replaced

Shape letters: B batch, K classes, L sites.
"""
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from timm.models import get_model_input_config
from torch import nn

from dreal_timm.attention.capture import Reading, nudge, replace
from dreal_timm.attention.judged_pass import judged_pass, stack_readings
from dreal_timm.attention.readers import without_sites
from dreal_timm.attention.sites import Group, Site, find_sites, group_sites
from dreal_timm.critic import Critic
from dreal_timm.errors import nearest
from dreal_timm.probes.entry_points import trace_flow
from dreal_timm.probes.passes import Entry, RecordedPass, class_log_probability, counterfactual, travel
from dreal_timm.replay.overrides import module_flags
from dreal_timm.replay.random_masks import Draws, rng_state
from dreal_timm.reward import is_correct

__all__ = ['Answer', 'Auditor', 'Seen', 'check_network']

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What a network says of the true class.

    Attributes:
        log_p: Its log-probability, (B,), or (B, L) with the map of each site replaced.
        right: Whether it wins or ties, of the same shape, bool.
    """
    log_p: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True)
class Seen:
    """A batch as the network sees it, and what the passes with replaced maps begin with.

    Attributes:
        answer: Its answer.
        maps: Map of each site, by its name, in the shape that its gate gives it.
        quality: The critic's judgement of each map, (B, L); None without a critic.
        recorded: What other passes over the batch share with this one.
        target: Class indices, (B,).
    """
    answer: Answer
    maps: Mapping[str, torch.Tensor]
    quality: torch.Tensor | None
    recorded: RecordedPass
    target: torch.Tensor


def check_network(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise a ValueError if a network has no attention site, or no classes whose probability could change."""
    if not sites:
        raise ValueError(without_sites(model))
    if getattr(model, 'num_classes', None) == 0:
        raise ValueError(
            f'{type(model).__name__} has no classes, and an audit asks what maps do to their probability: audit a '
            'network with its classifier.')


class Auditor:
    """Replace the maps of a network, one at a time, and see what becomes of its answer.

    The network runs in evaluation mode, and nothing in it changes. Passes with a replaced map begin in the middle of
    the network where its blocks run one after the other; the first batch is passed that way with nothing replaced, and
    where that does not repeat the network's answer, passes run from the images.

    Args:
        model: A model with attention sites.
        names: Names of the sites to replace, or of modules that contain them; None are all.
        input_size: (C, H, W) of the images. None takes it from a timm model's config.
        critic: Critics of all groups of the model, whose judgement is wanted.

    Raises:
        ValueError: The model has no site, none of such a name, or no classes.
    """

    def __init__(
            self,
            model: nn.Module,
            names: Sequence[str] | None = None,
            input_size: Sequence[int] | None = None,
            critic: Critic | None = None,
    ):
        self.model = model
        self.critic = critic
        sites = find_sites(model, input_size)
        check_network(model, sites)
        self.groups: list[Group] = group_sites(sites)
        self.sites: list[Site] = _chosen(sites, names)
        if input_size is None:
            input_size = get_model_input_config(model)['input_size']
        self.restarts = dict(trace_flow(model, self.sites, input_size).restarts)
        self._tried = False

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with module_flags(self.model, training=False, grad_checkpointing=False), torch.no_grad():
            yield

    def see(self, images: torch.Tensor, target: torch.Tensor) -> Seen:
        """Run the network as it is.

        Args:
            images: Images, (B, C, H, W), on the model's device.
            target: Class indices, (B,).

        Raises:
            ValueError: The network has not so many classes, or gives logits that are no numbers.
        """
        needed = {name for restart in self.restarts.values() if restart is not None for name in restart.inputs}
        watched = self.sites if self.critic is None else [site for group in self.groups for site in group.sites]
        draws = Draws(rng_state(images.device))
        with self._evaluating():
            judged = judged_pass(self.model, watched, images, replay=True, saved=sorted(needed))
            logits = judged.output
            if not 0 <= int(target.min()) <= int(target.max()) < logits.shape[1]:
                raise ValueError(
                    f'Class indices lie from {int(target.min())} to {int(target.max())}, but the network has '
                    f'{logits.shape[1]} classes.')
            if not logits.isfinite().all():
                raise ValueError('The network gives logits that are no numbers: it cannot be audited.')
            quality = self._judge(judged.readings)
        draws.after = rng_state(images.device)
        recorded = RecordedPass(images, judged.norms, draws, judged.inputs)
        if not self._tried:
            self._try(recorded, logits, target)
        maps = {site.name: judged.readings[site.name].attention for site in self.sites}
        return Seen(_answer(logits, target), maps, quality, recorded, target)

    def without(self, seen: Seen, constants: Mapping[str, torch.Tensor] | None = None) -> Answer:
        """Run the network again for each site, with its map replaced.

        Args:
            seen: What `see` returned of the batch.
            constants: Map of each site, by its name, with a first dimension of 1, for every sample. None takes, for
                each sample, the mean of its own map (Eq. 1).
        """
        def changing(site: Site) -> AbstractContextManager[None] | None:
            return None if constants is None else replace(self.model, site, constants[site.name])

        return self._answers(seen, changing)

    def again(self, seen: Seen) -> Answer:
        """Run the network again for each site with nothing changed but roundings, see `attention.capture.nudge`.

        Args:
            seen: What `see` returned of the batch.
        """
        return self._answers(seen, lambda site: nudge(self.model, site))

    def _answers(self, seen: Seen, changing: Callable[[Site], AbstractContextManager[None] | None]) -> Answer:
        with self._evaluating():
            answers = [
                _answer(self._logits(seen.recorded, site, changing(site)), seen.target) for site in self.sites
            ]
        return Answer(
            torch.stack([answer.log_p for answer in answers], dim=1),
            torch.stack([answer.right for answer in answers], dim=1),
        )

    def _logits(
            self,
            recorded: RecordedPass,
            site: Site,
            changing: AbstractContextManager[None] | None,
    ) -> torch.Tensor:
        """Logits with the map of a site changed by a context, or else replaced by its mean."""
        restart = None if recorded.whole else self.restarts[site.name]
        with changing or nullcontext():
            if restart is None:
                return counterfactual(self.model, recorded, [] if changing else [site])
            return travel(self.model, recorded, [Entry(restart, None)], null=changing is not None)

    def _judge(self, readings: Mapping[str, Reading]) -> torch.Tensor | None:
        if self.critic is None:
            return None
        maps = {name: reading.attention for name, reading in readings.items()}
        quality: torch.Tensor = self.critic(*stack_readings(self.groups, readings, maps))
        order = [site.name for group in self.groups for site in group.sites]
        return quality[:, [order.index(site.name) for site in self.sites]]

    def _try(self, recorded: RecordedPass, logits: torch.Tensor, target: torch.Tensor) -> None:
        """Let passes of a site begin with the images where those that begin in the middle say something else."""
        self._tried = True
        rows = torch.arange(min(2, len(target)), device=logits.device)
        expected = logits[rows].log_softmax(dim=1)
        with self._evaluating():
            for name, restart in self.restarts.items():
                if restart is None or recorded.whole:
                    continue
                again = travel(self.model, recorded, [Entry(restart, rows)], null=True).log_softmax(dim=1)
                if not torch.allclose(again, expected, rtol=1e-3, atol=1e-3):
                    self.restarts[name] = None
        stuck = [name for name, restart in self.restarts.items() if restart is None]
        if stuck:
            _logger.info(
                f'Passes without the map of {stuck[0]}{" and others" if len(stuck) > 1 else ""} begin with the images, '
                'since more than a block of what was computed before it is needed after it.'
            )


def _answer(logits: torch.Tensor, target: torch.Tensor) -> Answer:
    """Return what logits say, to the bit the same whatever the order of the classes: their sum is in order of size."""
    right = is_correct(logits, target)
    ranked, order = logits.sort(dim=1, stable=True)
    return Answer(class_log_probability(ranked, (order == target[:, None]).int().argmax(dim=1)), right)


def _chosen(sites: Sequence[Site], names: Sequence[str] | None) -> list[Site]:
    if names is None:
        return list(sites)
    for name in names:
        if not any(_within(site, name) for site in sites):
            hint = nearest(name, [site.name for site in sites])
            raise ValueError(f"No attention site '{name}'{hint}; `dreal-timm inspect` lists them.")
    return [site for site in sites if any(_within(site, name) for name in names)]


def _within(site: Site, name: str) -> bool:
    return site.name == name or site.name.startswith((f'{name}.', f'{name}:'))
