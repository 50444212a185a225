"""Example images of an audit: where a site helped or hurt most, and what its spatial maps look at

Shape letters: N images, L sites.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dreal_timm.audit.auditor import Auditor
from dreal_timm.audit.images import NumberedImages
from dreal_timm.audit.loader import LoaderImages
from dreal_timm.audit.result import MARGIN, Audit

__all__ = ['Examples', 'collect_examples', 'extremes', 'most_telling', 'telling_numbers']

_FILE = 'examples.safetensors'
_SIDE, _EACH, _SITES, _SHOWN = 96, 3, 32, 4


@dataclass(frozen=True)
class Examples:
    """Example images.

    Attributes:
        pictures: Small pictures, (H, W, 3) uint8, by the number of the image in the data set.
        shown: Images whose spatial maps are kept, (n, H, W, 3) uint8; none where the network has no spatial site.
        maps: Their maps, (n, h, w), by the names of the sites.
    """
    pictures: Mapping[int, np.ndarray]
    shown: np.ndarray
    maps: Mapping[str, torch.Tensor]

    def save(self, directory: Path) -> None:
        """Write them to a folder that exists."""
        tensors = {f'picture/{number}': torch.from_numpy(picture) for number, picture in self.pictures.items()}
        tensors.update({f'map/{name}': attention for name, attention in self.maps.items()})
        tensors['shown'] = torch.from_numpy(self.shown)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / _FILE)

    @classmethod
    def load(cls, directory: str | Path) -> 'Examples':
        """Read what `save` wrote; a folder without examples has none."""
        path = Path(directory) / _FILE
        if not path.is_file():
            return cls({}, np.zeros((0, 1, 1, 3), dtype=np.uint8), {})
        tensors = load_file(path)
        pictures, maps = {}, {}
        for name, tensor in tensors.items():
            kind, _, key = name.partition('/')
            if kind == 'picture':
                pictures[int(key)] = tensor.numpy()
            elif kind == 'map':
                maps[key] = tensor
        return cls(pictures, tensors['shown'].numpy(), maps)


def extremes(audit: Audit, name: str, count: int = _EACH) -> tuple[list[int], list[int]]:
    """Return the rows of the images whose class a site makes most, and least, likely, by the change of probability.

    Images whose log-likelihood changes by no more than a pass that changes nothing would change it are none of them.

    Args:
        audit: The audit.
        name: Name of the site.
        count: Most images to return of each.
    """
    column = audit.column(name)
    gain = audit.log_p.double().exp() - audit.mean_log_p[:, column].double().exp()
    gain[audit.gain[:, column].abs() <= max(MARGIN, audit.noise()['log_likelihood_gain'])] = 0
    order = gain.argsort(descending=True).tolist()
    helped = [row for row in order[:count] if gain[row] > 0]
    hurt = [row for row in reversed(order[-count:]) if gain[row] < 0]
    return helped, hurt


def most_telling(audit: Audit, count: int = _SITES) -> list[str]:
    """Return the names of the sites whose mean gain of log-likelihood is largest, either way, in order of depth."""
    chosen = set(audit.gain.double().mean(0).abs().topk(min(count, len(audit.names))).indices.tolist())
    return [name for index, name in enumerate(audit.names) if index in chosen]


def _picture(pixels: torch.Tensor, config: Mapping[str, Any], side: int | None = None) -> np.ndarray:
    """Image as the network sees it, (H, W, 3) uint8, without its normalisation, of at most so many pixels."""
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    pixels = pixels.cpu().float() if len(pixels) in (1, 3) else pixels[:1].cpu().float()
    if len(mean) == 1 or len(mean) == len(pixels):
        pixels = pixels * std + mean
    else:
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-12)
    array = (pixels.clamp(0, 1) * 255).round().byte()
    array = array.expand(3, -1, -1)
    image = Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())
    if side is not None:
        image.thumbnail((side, side))
    return np.array(image)


def _telling_rows(audit: Audit) -> list[int]:
    return list(dict.fromkeys(row for name in most_telling(audit) for some in extremes(audit, name) for row in some))


def telling_numbers(audit: Audit) -> list[int]:
    """Return the numbers of the images that `collect_examples` looks at."""
    return [int(audit.number[row]) for row in [*_telling_rows(audit), *_spread(audit, _SHOWN)]]


def collect_examples(
        audit: Audit,
        auditor: Auditor,
        images: NumberedImages | LoaderImages,
        device: torch.device,
) -> Examples:
    """Look at the images again that say most.

    Args:
        audit: The audit.
        auditor: What it was measured with.
        images: The images.
        device: Device of the network.
    """
    numbers = [int(audit.number[row]) for row in _telling_rows(audit)]
    pictures = {number: _picture(images[number][0], images.data_config, _SIDE) for number in numbers}
    spatial = [site for site in auditor.sites if site.kind == 'spatial']
    if not spatial:
        return Examples(pictures, np.zeros((0, 1, 1, 3), dtype=np.uint8), {})
    shown = _spread(audit, _SHOWN)
    items = [images[int(audit.number[row])] for row in shown]
    seen = auditor.see(torch.stack([item[0] for item in items]).to(device), audit.target[shown].to(device))
    maps = {site.name: seen.maps[site.name].reshape(len(shown), *site.size).float().cpu() for site in spatial}
    return Examples(pictures, np.stack([_picture(item[0], images.data_config) for item in items]), maps)


def _spread(audit: Audit, count: int) -> list[int]:
    """Rows of images of different classes, evenly over the data set, of those that are right where there are some."""
    rows: Sequence[int] = audit.right.nonzero().squeeze(1).tolist() or range(len(audit.right))
    classes = {int(audit.target[row]): row for row in reversed(rows)}
    first = [classes[label] for label in sorted(classes)]
    return [first[i * len(first) // count] for i in range(count)] if len(first) >= count else first
