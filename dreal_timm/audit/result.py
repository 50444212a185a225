"""The result of an audit: what was measured of each image, from which all figures are computed

Shape letters: N images, L sites.
"""
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dreal_timm.audit.maps import MapStatistics
from dreal_timm.audit.parts import write_json
from dreal_timm.audit.sites import SiteRow
from dreal_timm.reward import reward

__all__ = ['MARGIN', 'SCHEMA_VERSION', 'Audit']

SCHEMA_VERSION = 1
MARGIN = 1e-4  # nats, or of a reward: what is smaller is not worth telling

_FILE = 'audit.json'


@dataclass(frozen=True)
class Audit:
    """What was measured.

    Attributes:
        sites: The sites, in the order in which a forward pass reaches them.
        number: Number of each image in the data set, (N,).
        target: Its class, (N,).
        log_p: Log-probability of its class, (N,).
        right: Whether its class wins or ties, (N,) bool.
        mean_log_p: The log-probability with the map of each site replaced by its mean, (N, L).
        mean_right: Whether the class wins or ties then, (N, L) bool.
        constant_log_p: The log-probability with the map of each site replaced by its mean over the data set, (N, L).
        constant_right: Whether the class wins or ties then, (N, L) bool.
        quality: The critic's judgement, (N, L); None where there was no critic.
        maps: Statistics of the maps of each site, by its name.
        provenance: Where the numbers come from: model, data, versions, settings.
        unreadable: Names of the images that could not be read, and are not among the N.
        null_log_p: The log-probability in a pass that changes nothing but roundings at each site, (N, L); NaN for
            images that were not passed so. None in an audit of an earlier version.
        null_right: Whether the class wins or ties then, (N, L) bool.
    """
    sites: Sequence[SiteRow]
    number: torch.Tensor
    target: torch.Tensor
    log_p: torch.Tensor
    right: torch.Tensor
    mean_log_p: torch.Tensor
    mean_right: torch.Tensor
    constant_log_p: torch.Tensor
    constant_right: torch.Tensor
    quality: torch.Tensor | None
    maps: Mapping[str, MapStatistics]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    unreadable: Sequence[str] = ()
    null_log_p: torch.Tensor | None = None
    null_right: torch.Tensor | None = None

    @property
    def names(self) -> list[str]:
        """Names of the sites."""
        return [row.site for row in self.sites]

    def column(self, name: str) -> int:
        """Return the column of a site."""
        return self.names.index(name)

    @property
    def gain(self) -> torch.Tensor:
        """What each map adds to the log-likelihood of each image, over its own mean, (N, L), nats."""
        return self.log_p[:, None] - self.mean_log_p

    @property
    def constant_gain(self) -> torch.Tensor:
        """What each map adds to the log-likelihood of each image, over the data set's mean map, (N, L), nats."""
        return self.log_p[:, None] - self.constant_log_p

    def noise(self) -> dict[str, float]:
        """Return what a pass that changes nothing moves the numbers of an image by, at the site where it is most.

        Returns:
            Dictionary with 'log_likelihood_gain' (nats) and 'reward', over the images that are right: root mean squares
            over the images of the null pass; and 'top1_gain', the percentage of them that it makes right or wrong. Each
            is 0 where there was no null pass.
        """
        if self.null_log_p is None or self.null_right is None:
            return dict.fromkeys(('reward', 'top1_gain', 'log_likelihood_gain'), 0.0)
        passed = ~self.null_log_p.isnan().any(dim=1)
        moved = (self.null_log_p - self.log_p[:, None])[passed].double()
        right = self.right[passed]

        def most(values: torch.Tensor) -> float:
            return values.mean(dim=0).max().item() if len(values) else 0.0

        return {
            'reward': most(torch.expm1(moved[right]).square()) ** 0.5,
            'top1_gain': most(100 * (self.null_right[passed] != right[:, None]).double()),
            'log_likelihood_gain': most(moved.square()) ** 0.5,
        }

    def rewards(self, gamma: float = 1.0, clip: float | None = 1.0) -> torch.Tensor:
        """Return the reward of each image and site, (N, L), see `dreal_timm.reward.reward`."""
        return reward(-self.gain, self.right, gamma, clip)

    def save(self, directory: Path, summary: Mapping[str, Any]) -> None:
        """Write what was measured, and what was made of it, to a folder that exists.

        Args:
            directory: The folder.
            summary: What `summarize` returned, for `audit.json`.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / 'samples.safetensors')
        save_file(
            {f'{site}/{name}': getattr(self.maps[site], name).contiguous()
             for site in self.names for name in ('mean', 'variance')},
            directory / 'maps.safetensors',
        )
        content = {
            'schema_version': SCHEMA_VERSION,
            'provenance': dict(self.provenance),
            'unreadable': list(self.unreadable),
            **summary,
        }
        write_json(directory / _FILE, content)

    @classmethod
    def load(cls, directory: str | Path) -> 'Audit':
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: The folder holds no finished audit.
            ValueError: It is of a later version of this package.
        """
        directory = Path(directory)
        if not (directory / _FILE).is_file():
            raise FileNotFoundError(f"'{directory}' holds no finished audit ({_FILE}).")
        content = json.loads((directory / _FILE).read_text(encoding='utf-8'))
        if content['schema_version'] != SCHEMA_VERSION:
            raise ValueError(
                f"'{directory}' has schema version {content['schema_version']}, this package reads {SCHEMA_VERSION}.")
        sites, maps = [], {}
        tensors = load_file(directory / 'maps.safetensors')
        for row in content['sites']:
            own = {key: row[key] for key in SiteRow.__dataclass_fields__}
            sites.append(SiteRow(**{**own, 'size': tuple(row['size'])}))
            share = row['map_input_share']
            maps[row['site']] = MapStatistics(
                tensors[f"{row['site']}/mean"], tensors[f"{row['site']}/variance"], row['map_spread'],
                float('nan') if share is None else share)
        samples = load_file(directory / 'samples.safetensors')
        return cls(
            sites=sites, maps=maps, provenance=content['provenance'], unreadable=content['unreadable'],
            **{name: samples.get(name) for name in _TENSORS},  # type: ignore[arg-type]
        )

    def row(self, name: str) -> dict[str, Any]:
        """Return what is known of a site itself."""
        return asdict(self.sites[self.column(name)])


_TENSORS = (
    'number', 'target', 'log_p', 'right', 'mean_log_p', 'mean_right', 'constant_log_p', 'constant_right', 'quality',
    'null_log_p', 'null_right')
