"""What attention does in a network: which sites it has, and what each of them is worth

What measures and draws needs the extra `audit` and is imported on first use; the list of sites needs no extra.
"""
from importlib import import_module
from typing import Any

from .sites import SiteRow as SiteRow
from .sites import describe_sites as describe_sites
from .sites import format_sites as format_sites

_LAZY = {
    'Audit': 'result', 'Auditor': 'auditor', 'audit': 'run', 'audit_model': 'command', 'audit_network': 'command',
    'bootstrap': 'intervals', 'channel_attention': 'figures', 'compare_audits': 'compare', 'compare_models': 'compare',
    'format_comparison': 'compare', 'format_summary': 'summary', 'gain_along_depth': 'figures',
    'load_critic': 'calibration', 'reliability_diagram': 'figures', 'reward_distribution': 'figures',
    'spatial_attention': 'figures', 'summarize': 'summary', 'training_curves': 'figures',
}


__all__ = [
    'Audit', 'Auditor', 'SiteRow', 'audit', 'audit_model', 'audit_network', 'bootstrap', 'channel_attention',
    'compare_audits', 'compare_models', 'describe_sites', 'format_comparison', 'format_sites', 'format_summary',
    'gain_along_depth', 'load_critic', 'reliability_diagram', 'reward_distribution', 'spatial_attention', 'summarize',
    'training_curves',
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_LAZY[name]}', __package__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
