"""The figures of an audit: what each attention module is worth, with intervals

Shape letters: N images, L sites.
"""
import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dreal_timm.audit.calibration import calibrate
from dreal_timm.audit.intervals import bootstrap
from dreal_timm.audit.result import MARGIN, Audit
from dreal_timm.utils.terminal import text_table

__all__ = ['COLUMNS', 'caution', 'format_summary', 'summarize', 'write_csv']

_FEW = 100  # right images

COLUMNS = {
    'reward': 'mean of 1 - p(replaced) / p over the images that the network gets right (Eq. 1), clamped to [-1, 1]',
    'top1_gain': 'top-1 with the map less top-1 with its mean in its place, over all images, percentage points',
    'log_likelihood_gain': 'the same of the mean log-likelihood of the true class, nats',
    'constant_reward': 'as reward, against the mean map of the data set in place of the map',
    'constant_top1_gain': 'as top1_gain, against the mean map of the data set',
    'constant_log_likelihood_gain': 'as log_likelihood_gain, against the mean map of the data set',
    'helps': 'share of the images whose class is likelier with the map than with its mean, by more than the margin',
    'hurts': 'share of the images whose class is less likely with the map than with its mean, by more than the margin',
    'saved': 'number of images that are right with the map and wrong with its mean',
    'lost': 'number of images that are wrong with the map and right with its mean',
    'map_mean': 'mean of the map over images and positions',
    'map_spread': "standard deviation of an image's map over its positions, averaged over the images",
    'map_input_share': "share of the map's variance that depends on the image; 0 is the same map for all of them",
}


def _number(value: torch.Tensor | float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _gains(audit: Audit, replaced: str, settings: Mapping[str, Any]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Rewards and gains against one replacement, each as mean, low and high, (L,)."""
    log_p = getattr(audit, f'{replaced}_log_p')
    right = audit.right[:, None]
    options = {key: settings[key] for key in ('resamples', 'level', 'seed')}
    change = audit.log_p[:, None] - log_p
    rewards = (-torch.expm1(-change.double())).clamp(-1, 1)
    points = 100 * (right.double() - getattr(audit, f'{replaced}_right').double())
    prefix = '' if replaced == 'mean' else f'{replaced}_'
    return {
        f'{prefix}reward': bootstrap(rewards, audit.right, **options),
        f'{prefix}top1_gain': bootstrap(points, **options),
        f'{prefix}log_likelihood_gain': bootstrap(change, **options),
    }


def _finding(value: float, low: float, high: float, floor: float) -> int:
    """Return the sign of an effect that is beyond the floor and whose interval excludes 0, else 0."""
    return (value > 0) - (value < 0) if abs(value) > floor and low * high > 0 else 0


def _row(
        audit: Audit,
        name: str,
        gains: Mapping[str, tuple[torch.Tensor, ...]],
        floor: Mapping[str, float],
) -> dict[str, Any]:
    """The figures of a site."""
    index, row = audit.column(name), audit.row(name)
    for key, columns in gains.items():
        value, low, high = (float(column[index]) for column in columns)
        row.update({key: _number(value), f'{key}_low': _number(low), f'{key}_high': _number(high)})
        row[f'{key}_finding'] = _finding(value, low, high, floor[key.removeprefix('constant_')])
    gain, margin = audit.gain[:, index], floor['log_likelihood_gain']
    statistics = audit.maps[name]
    row.update({
        'helps': (gain > margin).double().mean().item(),
        'hurts': (gain < -margin).double().mean().item(),
        'saved': int((audit.right & ~audit.mean_right[:, index]).sum()),
        'lost': int((~audit.right & audit.mean_right[:, index]).sum()),
        'map_mean': statistics.mean.mean().item(),
        'map_spread': statistics.spread,
        'map_input_share': _number(statistics.input_share),
    })
    if audit.quality is not None:
        row.update({key: _number(value) for key, value in calibrate(audit, name).items()})
    return row


def caution(right: int) -> str:
    """Return a warning where few right images stand behind the numbers, else nothing."""
    if right >= _FEW:
        return ''
    return f'Only {right} right images stand behind these numbers: below {_FEW}, take no interval at its word.'


def summarize(
        audit: Audit,
        resamples: int = 1000,
        level: float = 0.95,
        seed: int = 0,
        margin: float = MARGIN,
) -> dict[str, Any]:
    """Return the figures of an audit, as plain values for JSON; what is not known is None.

    Args:
        audit: The audit.
        resamples: Number of bootstrap resamples.
        level: Share of the resamples that an interval holds.
        seed: Seed of the resamples.
        margin: Change of the log-likelihood, nats, below which a map neither helps nor hurts, and of a reward or a
            log-likelihood below which it is no finding. Where the null pass of the audit moves them by more (in low
            precision; in float32 it is by a hundredth of the default), that is the floor.

    Returns:
        Dictionary containing:
            - 'settings': The arguments
            - 'network': 'images', 'right' and 'unreadable' (numbers), 'top1' and 'wrong' (percent), 'log_likelihood'
                (mean, nats), and 'floor', which a 'reward', 'top1_gain' or 'log_likelihood_gain' must exceed
            - 'sites': For each site what `describe_sites` says of it, the `COLUMNS`; of those with an interval '_low'
                and '_high', and '_finding': 1 or -1, the sign of an effect whose interval excludes 0 and that exceeds
                the floor, else 0; and 'quality', 'rank_correlation', 'rank_correlation_all' where there was a critic
    """
    settings: dict[str, Any] = dict(resamples=resamples, level=level, seed=seed, margin=margin)
    gains = {**_gains(audit, 'mean', settings), **_gains(audit, 'constant', settings)}
    floor = {key: max(value, 0.0 if key == 'top1_gain' else margin) for key, value in audit.noise().items()}
    top1 = 100 * audit.right.double().mean().item()
    return {
        'settings': settings,
        'network': {
            'images': len(audit.number),
            'right': int(audit.right.sum()),
            'unreadable': len(audit.unreadable),
            'top1': top1,
            'wrong': 100 - top1,
            'log_likelihood': audit.log_p.double().mean().item(),
            'floor': floor,
        },
        'sites': [_row(audit, name, gains, floor) for name in audit.names],
    }


def write_csv(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the rows of the sites as a table."""
    rows = [{**row, 'size': 'x'.join(map(str, row['size']))} for row in summary['sites']]
    with path.open('w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def format_summary(summary: Mapping[str, Any]) -> str:
    """Return the figures as a text table; 'finding' tells of rewards, see `summarize`."""
    network = summary['network']
    level = f"{100 * summary['settings']['level']:.0f}% interval"
    table = [('site', 'reward', level, 'finding', 'top-1', 'log p', 'against constant', 'helps', 'hurts', 'input')]
    for row in summary['sites']:
        share = row['map_input_share']
        table.append((
            row['site'],
            _format(row['reward'], '+.4f'),
            f"{_format(row['reward_low'], '+.4f')} to {_format(row['reward_high'], '+.4f')}",
            {1: 'raises', -1: 'lowers', 0: ''}[row['reward_finding']],
            f"{row['top1_gain']:+.2f}",
            f"{row['log_likelihood_gain']:+.4f}",
            f"{row['constant_log_likelihood_gain']:+.4f}",
            f"{row['helps']:.0%}",
            f"{row['hurts']:.0%}",
            '' if share is None else f'{share:.0%}',
        ))
    return '\n'.join([
        f"{network['images']:,} images, top-1 {network['top1']:.2f} % (wrong: {network['wrong']:.2f} %), mean "
        f"log-likelihood {network['log_likelihood']:.4f}",
        *text_table(table),
        *filter(None, [caution(network['right'])]),
    ])


def _format(value: float | None, spec: str) -> str:
    return '-' if value is None else format(value, spec)
