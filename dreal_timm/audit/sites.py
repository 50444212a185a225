"""The attention sites of a network as a table: what would be judged, by which critic"""
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dreal_timm.attention.sites import Group, Site, attention_parameters, find_sites, group_sites
from dreal_timm.critic import RecurrentCritic
from dreal_timm.utils.terminal import text_table

__all__ = ['SiteRow', 'describe_sites', 'format_sites']


@dataclass(frozen=True)
class SiteRow:
    """One attention site.

    Attributes:
        site: Name of the site, see `dreal_timm.attention.sites.Site`.
        attention: Class of its module.
        kind: What its map has a weight for.
        size: Size of its map, without the batch.
        group: Group of sites that one critic judges.
        parameters: Number of its attention parameters; those that two sites of a module share count for both.
        critic: Number of parameters of its group's critic, with the default options.
    """
    site: str
    attention: str
    kind: str
    size: tuple[int, ...]
    group: str
    parameters: int
    critic: int


def _row(model: nn.Module, group: Group, site: Site, critic: int) -> SiteRow:
    parameters = sum(p.numel() for p in attention_parameters(model, [site]).values())
    attention = type(model.get_submodule(site.module)).__name__
    return SiteRow(site.name, attention, site.kind, site.size, group.name, parameters, critic)


def describe_sites(model: nn.Module, input_size: Sequence[int] | None = None) -> list[SiteRow]:
    """List the attention sites of a network in the order in which a forward pass reaches them.

    Args:
        model: A timm model, or any model that takes one image tensor; it may be on the meta device.
        input_size: (C, H, W) of the images. None takes it from a timm model's config.
    """
    sites = find_sites(model, input_size)
    rows = {}
    for group in group_sites(sites):
        critic = sum(p.numel() for p in RecurrentCritic(group.judged_size, device='meta').parameters())
        rows.update({site.name: _row(model, group, site, critic) for site in group.sites})
    return [rows[site.name] for site in sites]


def format_sites(rows: Sequence[SiteRow]) -> str:
    """Return the sites as a text table, with sums below it; attention parameters that sites share count once there."""
    table = [('site', 'class', 'kind', 'map', 'group', 'parameters', 'critic')]
    table += [
        (row.site, row.attention, row.kind, ' x '.join(map(str, row.size)), row.group, f'{row.parameters:,}',
         f'{row.critic:,}')
        for row in rows
    ]
    critics = {row.group: row.critic for row in rows}
    return '\n'.join([
        *text_table(table, left=5),
        f'{len(rows)} sites in {len(critics)} groups; critics: {sum(critics.values()):,} parameters'])
