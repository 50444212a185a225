"""An audit of a network on images

Two passes over the images: the first measures the network as it is, its maps, and what it says with each of them
replaced by its mean; the second, what it says with each replaced by the mean map of the data set, which is known then.
Of some images the first also measures what roundings alone do: the null pass.
"""
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dreal_timm.audit.effects import Auditor
from dreal_timm.audit.maps import MapSums
from dreal_timm.audit.result import Audit
from dreal_timm.audit.sites import describe_sites
from dreal_timm.critic import Critic

__all__ = ['Batches', 'audit', 'first_pass', 'result', 'second_pass']

_NULL = 256  # images of a part of the data set that the null pass looks at

Batches = Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def first_pass(auditor: Auditor, images: Batches) -> tuple[dict[str, torch.Tensor], MapSums]:
    """Return what the first pass measures of some images: tensors by the names in `Audit`, and sums of maps."""
    kept: dict[str, list[torch.Tensor]] = {}
    sums = MapSums()
    for pixels, target, number in images:
        if not len(target):
            continue
        seen = auditor.see(pixels, target)
        mean = auditor.without(seen)
        null = auditor.again(seen) if sums.count < _NULL else None
        sums.add(seen.maps)
        found = dict(
            number=number, target=target, log_p=seen.answer.log_p, right=seen.answer.right, mean_log_p=mean.log_p,
            mean_right=mean.right, quality=seen.quality,
            null_log_p=torch.full_like(mean.log_p, torch.nan) if null is None else null.log_p,
            null_right=seen.answer.right[:, None].expand_as(mean.right) if null is None else null.right,
        )
        for name, tensor in found.items():
            if tensor is not None:
                kept.setdefault(name, []).append(tensor.cpu())
    return {name: torch.cat(tensors) for name, tensors in kept.items()}, sums


def second_pass(auditor: Auditor, images: Batches, means: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what the second pass measures of some images, with the mean map of each site."""
    log_p, right = [], []
    for pixels, target, _ in images:
        if len(target):
            constant = auditor.without(auditor.see(pixels, target), means)
            log_p.append(constant.log_p.cpu())
            right.append(constant.right.cpu())
    return {'constant_log_p': torch.cat(log_p), 'constant_right': torch.cat(right)} if log_p else {}


def result(auditor: Auditor, samples: Mapping[str, torch.Tensor], sums: MapSums, **others: Any) -> Audit:
    """Return the audit from what both passes measured of all images, in their order."""
    if not sums.count:
        raise ValueError('None of the images could be read.')
    rows = {row.site: row for row in others.pop('rows')}
    return Audit(
        sites=[rows[site.name] for site in auditor.sites],
        maps={site.name: sums.statistics(site.name) for site in auditor.sites},
        **{'quality': None, **samples}, **others,  # type: ignore[arg-type]
    )


def audit(
        model: nn.Module,
        loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
        sites: Sequence[str] | None = None,
        input_size: Sequence[int] | None = None,
        critic: Critic | None = None,
) -> Audit:
    """Measure what each attention map of a network is worth, on images from anywhere.

    The network is read in evaluation mode and stays as it is.

    Args:
        model: A model with attention sites.
        loader: Batches of images (B, C, H, W) and class indices (B,), in the same order each of the two times that it
            is iterated over.
        sites: Names of the sites to audit, or of modules that contain them; None are all.
        input_size: (C, H, W) of the images. None takes it from a timm model's config.
        critic: Critics of all groups of the model, whose calibration is wanted.

    Raises:
        ValueError: The model has no site, none of such a name, or the loader yields nothing.

    Examples:

        ```python
        from dreal_timm.audit import audit, format_summary, summarize
        print(format_summary(summarize(audit(model, loader))))
        ```
    """
    device = next(model.parameters()).device

    def numbered() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        count = 0
        for pixels, target in loader:
            yield pixels.to(device), target.to(device), torch.arange(count, count + len(target))
            count += len(target)

    auditor = Auditor(model, sites, input_size, critic)
    samples, sums = first_pass(auditor, numbered())
    samples.update(second_pass(auditor, numbered(), sums.means()) if sums.count else {})
    return result(auditor, samples, sums, rows=describe_sites(model, input_size))
