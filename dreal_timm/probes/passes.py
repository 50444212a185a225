"""Counterfactual passes: the judged pass again, with an attention map replaced by its mean (Algorithm 1 l. 8)

Nothing but the map may differ from the judged pass, so a counterfactual pass applies the same dropout masks, normalises
with the batch statistics that the judged pass had, and leaves no trace in the model. It begins with the images, or at
the sites whose maps are replaced (see `restart`).

Shape letters: B batch, K classes.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm

from dreal_timm.attention.capture import bypass
from dreal_timm.attention.sites import Site
from dreal_timm.probes.restart import Restart, restarted, select, skipped
from dreal_timm.replay.batch_norms import Stats, replay_norms
from dreal_timm.replay.overrides import module_flags, replaced_forward, scratch_buffers
from dreal_timm.replay.random_masks import Draws, Rows, replay_draws, replay_rng

__all__ = [
    'Entry', 'RecordedPass', 'class_log_probability', 'counterfactual', 'log_probabilities', 'null_noise', 'travel']


@dataclass(frozen=True)
class RecordedPass:
    """What a counterfactual pass must share with the judged pass.

    Attributes:
        input: Images, (B, C, H, W).
        norms: Mean and biased variance of each batch norm that used the batch's, by its name, one pair a call.
        draws: What random layers drew.
        inputs: Inputs of the modules where passes can begin, by their names.
    """
    input: torch.Tensor
    norms: Mapping[str, Sequence[Stats]]
    draws: Draws
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether only a pass of the whole batch through the whole network draws the same numbers."""
        return not (self.draws.none or self.draws.complete)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return log-softmax of the logits (B, K), in float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)


@contextmanager
def _as_judged(model: nn.Module, recorded: RecordedPass, rows: Rows) -> Iterator[None]:
    """Let forward passes inside the context differ from the judged pass in nothing, and leave no trace."""
    other = [m for name, m in model.named_modules() if m.training and name not in recorded.norms]
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _SpectralNorm):  # its vectors have moved on in the judged pass, once
                stack.enter_context(module_flags(module, training=False))
        stack.enter_context(module_flags(model, grad_checkpointing=False))  # it would call stages past their modules
        stack.enter_context(replay_rng(recorded.draws.before, recorded.input.device))
        if not recorded.whole:
            stack.enter_context(replay_draws(model, recorded.draws, rows))
        stack.enter_context(scratch_buffers(other))
        stack.enter_context(replay_norms(model, recorded.norms))
        yield


@torch.no_grad()
def counterfactual(
        model: nn.Module,
        recorded: RecordedPass,
        sites: Sequence[Site],
        bypassed: Sequence[torch.Tensor] | None = None,
        rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the logits (B, K) of the judged pass, run again from the images with maps replaced by their means.

    Args:
        model: The model itself, with no wrapper around it, in the mode of the judged pass.
        recorded: What the judged pass left.
        sites: Sites to bypass; none makes it the null probe, which repeats the judged pass.
        bypassed: For each site the samples for which it is bypassed, (B,) bool; None are all of them.
        rows: Indices of the samples to run; None are all of them.
    """
    with _as_judged(model, recorded, Rows(rows)), bypass(model, sites, bypassed):
        return model(select(recorded.input, rows))


@dataclass(frozen=True)
class Entry:
    """Samples that enter a pass at a site; None are all of them."""
    restart: Restart
    rows: torch.Tensor | None


@torch.no_grad()
def travel(model: nn.Module, recorded: RecordedPass, entries: Sequence[Entry], null: bool = False) -> torch.Tensor:
    """Return the logits of samples that enter the network at one site after another and leave it as one batch.

    Their order is that of the entries, which is the order of the sites in the network. The map of the site where a
    sample enters is replaced by its mean for that sample, unless `null`.
    """
    rows = Rows()
    entering: dict[str, list[Entry]] = {}
    for entry in entries:
        entering.setdefault(entry.restart.join, []).append(entry)
    first = entries[0].restart

    def grow(module: nn.Module, here: Sequence[Entry]) -> Callable[..., torch.Tensor]:
        forward = module.forward

        def grown(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            outputs, travelling = [], []
            if here[0] is not entries[0]:
                outputs.append(forward(x, *args, **kwargs))
                travelling.append(rows.now)
            for entry in here:
                rows.now = entry.rows
                with restarted(model, entry.restart, recorded.inputs, entry.rows, null) as entered:
                    outputs.append(forward(entered, *args, **kwargs))
                travelling.append(entry.rows)
            if len(outputs) == 1:
                return outputs[0]
            rows.now = torch.cat([part for part in travelling if part is not None])
            return torch.cat(outputs)
        return grown

    with ExitStack() as stack:
        stack.enter_context(_as_judged(model, recorded, rows))
        stack.enter_context(skipped(model, first.outside))
        for name, here in entering.items():
            module = model.get_submodule(name)
            stack.enter_context(replaced_forward(module, grow(module, here)))
        return model(recorded.input)


def class_log_probability(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Log-probability of each sample's class, (B,), in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(dim=1)


def null_noise(
        model: nn.Module,
        recorded: RecordedPass,
        log_probs: torch.Tensor,
        target: torch.Tensor,
        restarts: Sequence[Restart | None],
) -> float:
    """Return the rms, over the batch and sites, of what a pass that bypasses nothing changes in log p of the class.

    Args:
        model: The model itself, with no wrapper around it.
        recorded: What the judged pass left.
        log_probs: Its log-probabilities, (B, K).
        target: Class indices, (B,).
        restarts: Where the passes begin; None is the image.
    """
    expected = log_probs.gather(1, target[:, None]).squeeze(1)
    errors = []
    for restart in restarts:
        if restart is None:
            logits = counterfactual(model, recorded, [])
        else:
            logits = travel(model, recorded, [Entry(restart, None)], null=True)
        errors.append(class_log_probability(logits, target) - expected)
    return torch.stack(errors).square().mean().sqrt().item()
