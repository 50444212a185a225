"""An audit of a network on images

Two passes over the images: the first measures the network as it is, its maps, and what it says with each of them
replaced by its mean; the second, what it says with each replaced by the mean map of the data set, which is known then.
Of some images the first also measures what roundings alone do: the null pass.
"""
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import nn

from dreal_timm.audit.auditor import Auditor
from dreal_timm.audit.loader import LoaderImages
from dreal_timm.audit.maps import MapSums
from dreal_timm.audit.result import Audit
from dreal_timm.audit.sites import describe_sites
from dreal_timm.critic import Critic
from dreal_timm.data.classes import names_of_config
from dreal_timm.provenance import versions, weights_digest

__all__ = ['Batches', 'audit', 'first_pass', 'measure', 'result', 'second_pass']

_NULL = 256  # images of a part of the data set that the null pass looks at

Batches = Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def first_pass(auditor: Auditor, images: Batches) -> tuple[dict[str, torch.Tensor], MapSums]:
    """Return what the first pass measures of some images: tensors by the names in `Audit`, and sums of maps."""
    columns: dict[str, list[torch.Tensor]] = {}
    sums = MapSums()
    for pixels, target, number in images:
        if not len(target):
            continue
        seen = auditor.see(pixels, target)
        mean = auditor.without(seen)
        null = auditor.again(seen) if sums.count < _NULL else None
        sums.add(seen.maps)
        measured = dict(
            number=number, target=target, log_p=seen.answer.log_p, right=seen.answer.right, mean_log_p=mean.log_p,
            mean_right=mean.right, quality=seen.quality,
            null_log_p=torch.full_like(mean.log_p, torch.nan) if null is None else null.log_p,
            null_right=seen.answer.right[:, None].expand_as(mean.right) if null is None else null.right,
        )
        for name, tensor in measured.items():
            if tensor is not None:
                columns.setdefault(name, []).append(tensor.cpu())
    return {name: torch.cat(tensors) for name, tensors in columns.items()}, sums


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


def measure(
        model: nn.Module,
        images: LoaderImages,
        sites: Sequence[str] | None = None,
        input_size: Sequence[int] | None = None,
        critic: Critic | None = None,
        name: str = '',
        telling: Callable[[Audit], Collection[int]] | None = None,
) -> tuple[Audit, Auditor]:
    """Audit a network on images of a loader.

    Args:
        model: A model with attention sites.
        images: The images.
        sites: Names of the sites to audit, or of modules that contain them; None are all.
        input_size: (C, H, W) of the images, see `audit`.
        critic: Critics of all groups of the model, whose calibration is wanted.
        name: What the network is called.
        telling: Returns the numbers of the images to keep, from an audit whose second pass has not been made.
    """
    if input_size is None and critic is None:
        input_size = images.size()
    rows = describe_sites(model, input_size)
    auditor = Auditor(model, sites, input_size, None if critic is None else critic.to(images.like.device))
    samples, sums = first_pass(auditor, images.read())
    config = getattr(model, 'pretrained_cfg', None) or {}
    others: dict[str, Any] = {
        'unreadable': [images.filename(number) for number in images.unreadable],
        'provenance': {
            'model': name or config.get('architecture') or type(model).__name__,
            'weights': weights_digest(model.state_dict()), 'critic': critic is not None,
            'critic_sha256': None if critic is None else weights_digest(critic.state_dict()),
            'images': sums.count + len(images.unreadable), 'sites': [site.name for site in auditor.sites],
            'input_size': None if input_size is None else list(input_size), 'label_names': names_of_config(config),
            'device': str(images.like.device), 'versions': versions(python=True),
        },
    }
    keep: Collection[int] = ()
    if telling is not None and sums.count:
        means = {'constant_log_p': samples['mean_log_p'], 'constant_right': samples['mean_right']}
        keep = set(telling(result(auditor, {**samples, **means}, sums, rows=rows)))
    if sums.count:
        samples.update(second_pass(auditor, images.read(keep), sums.means()))
    return result(auditor, samples, sums, rows=rows, **others), auditor


def audit(
        model: nn.Module,
        loader: Iterable[Any],
        sites: Sequence[str] | None = None,
        input_size: Sequence[int] | None = None,
        critic: Critic | None = None,
        *,
        batch_size: int = 128,
        workers: int = 0,
) -> Audit:
    """Measure what each attention map of a network is worth, on images from anywhere.

    The network is read in evaluation mode, on the device where it is, and stays as it is. Images with the label -1 are
    left out, and listed as `unreadable`.

    Args:
        model: A model with attention sites.
        loader: Batches of images (B, C, H, W) and class indices (B,), in the same order each of the two times that it
            is iterated over; or a data set of torch, whose images are tensors.
        sites: Names of the sites to audit, or of modules that contain them; None are all.
        input_size: (C, H, W) of the images. None takes that of the first image, or, with a critic, which is made for
            images of one size, that of a timm model's config.
        critic: Critics of all groups of the model, whose calibration is wanted, see `load_critic`.
        batch_size: Images a batch, of a data set.
        workers: Loader processes, of a data set.

    Raises:
        ValueError: The model has no site, none of such a name, or no classes; the loader yields nothing, no pairs of
            images and class indices, classes that the model does not have, or something else the second time.

    Examples:

        ```python
        from dreal_timm.audit import audit, format_summary, summarize
        print(format_summary(summarize(audit(model, loader))))
        ```
    """
    model = unwrap_model(model)
    return measure(model, LoaderImages(loader, model, batch_size, workers), sites, input_size, critic)[0]
