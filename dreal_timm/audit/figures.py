"""Pictures of audits, as functions that return a matplotlib figure

They touch neither pyplot nor any global setting. Text and axes are drawn in `INK`, so that a page can give them its own
colour.
"""
import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dreal_timm.attention.readers import map_size
from dreal_timm.audit.calibration import reliability
from dreal_timm.audit.result import Audit

__all__ = [
    'INK', 'channel_attention', 'gain_along_depth', 'reliability_diagram', 'reward_distribution', 'spatial_attention',
    'training_curves',
]

INK = '#57606a'
COLORS = ('#0f7ea8', '#d1661f', '#2e8540', '#8250b3')
_PERCENTILES = (5, 25, 50, 75, 95)


def _figure(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout='constrained')
    figure.patch.set_alpha(0)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.patch.set_alpha(0)
        axis.tick_params(which='both', colors=INK, labelsize=8)
        for side, spine in axis.spines.items():
            spine.set_color(INK)
            spine.set_visible(side in ('left', 'bottom'))
        for text in (axis.xaxis.label, axis.yaxis.label):
            text.set_color(INK)
            text.set_fontsize(9)
    return figure, axes


def _title(axis: Axes, text: str) -> None:
    axis.set_title(text, color=INK, fontsize=9)


def _legend(axis: Axes, **options: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8, labelcolor=INK, **options)


def _per_channel(audit: Audit, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of a map over images, by channel, averaged over positions."""
    row, statistics = audit.sites[audit.column(name)], audit.maps[name]
    size = map_size(row.kind, statistics.mean.shape)
    mean, variance = (
        tensor.reshape(size).flatten(1).mean(1) if len(size) > 1 else tensor.reshape(size)
        for tensor in (statistics.mean, statistics.variance)
    )
    return mean.numpy(), variance.numpy()


def _last_of_each_group(audit: Audit) -> list[str]:
    """The last site of each group whose maps have weights for channels."""
    last = {row.group: row.site for row in audit.sites if row.kind != 'spatial'}
    return list(last.values())


def channel_attention(audits: Mapping[str, Audit], sites: Sequence[str] | None = None) -> Figure:
    """Return the attention of each channel: its mean over the images, in a band of three variances (Fig. 2).

    Args:
        audits: Audits by the names they get, a row each: before and after reinforcement, say.
        sites: Names of the sites, a column each, which all audits have. None takes the last one of each group.

    Raises:
        ValueError: There is no such site.
    """
    names = _last_of_each_group(next(iter(audits.values()))) if sites is None else list(sites)
    if not names:
        raise ValueError('No site has a weight for each channel.')
    figure, axes = _figure(
        len(audits), len(names), max(6.0, 2.6 * len(names)), 0.8 + 1.7 * len(audits), sharex='col', sharey='col')
    for row, (label, audit) in enumerate(audits.items()):
        own = (label if len(label) <= 24 else f'{label[:21]}...') if len(audits) > 1 else 'attention'
        for column, name in enumerate(names):
            mean, variance = _per_channel(audit, name)
            axis, channels = axes[row, column], np.arange(len(mean))
            color = COLORS[row % len(COLORS)]
            axis.fill_between(channels, mean - 3 * variance, mean + 3 * variance, color=color, alpha=0.35, lw=0)
            axis.plot(channels, mean, color=color, lw=0.8)
            _title(axis, name if row == 0 else '')
            axis.set_xlabel('channel' if row == len(audits) - 1 else '')
            axis.set_ylabel(own if column == 0 else '')
            axis.margins(x=0)
    return figure


def gain_along_depth(summaries: Mapping[str, Mapping[str, Any]], key: str = 'reward') -> Figure:
    """Return what each site is worth, in the order of depth, with its interval; points that are findings are filled.

    Args:
        summaries: What `summarize` returned, by the names that the networks get. Of a single one, the gain against the
            mean map of the data set is drawn as well.
        key: What of it: 'reward', 'top1_gain', 'log_likelihood_gain', or the same with 'constant_'.
    """
    labels = {
        'reward': 'mean reward', 'top1_gain': 'top-1 gain, points', 'log_likelihood_gain': 'log-likelihood gain, nats'}
    names = list(dict.fromkeys(row['site'] for summary in summaries.values() for row in summary['sites']))
    figure, axes = _figure(1, 1, 7.2, max(2.4, 0.8 + 0.24 * len(names)))
    axis = axes[0, 0]
    axis.axvline(0, color=INK, lw=0.8, ls=':')
    series = []
    for label, summary in summaries.items():
        rows = {row['site']: row for row in summary['sites']}
        if len(summaries) > 1 or key.startswith('constant_'):
            series.append((label, rows, key))
        else:
            series.append(('against its own mean', rows, key))
            series.append(("against the data set's mean map", rows, f'constant_{key}'))
    for index, (label, rows, one) in enumerate(series):
        known = [(place, rows[name]) for place, name in enumerate(names) if rows.get(name, {}).get(one) is not None]
        middle = np.array([row[one] for _, row in known])
        bars = np.abs(np.array([[row[f'{one}_low'], row[f'{one}_high']] for _, row in known]).T - middle)
        shift = (index - (len(series) - 1) / 2) * 0.3
        style: dict[str, Any] = dict(marker='os'[index % 2], ms=3.5, color=COLORS[index % len(COLORS)])
        axis.errorbar(
            middle, [place + shift for place, _ in known], xerr=bars, ls='', lw=1.2, mfc='none', label=label, **style)
        findings = [(place + shift, row[one]) for place, row in known if row[f'{one}_finding']]
        axis.plot([value for _, value in findings], [place for place, _ in findings], ls='', **style)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel(labels[key.removeprefix('constant_')])
    _legend(axis, loc='best')
    return figure


def reward_distribution(audits: Mapping[str, Audit]) -> Figure:
    """Return the distribution of the rewards of each site over the images that the network gets right.

    Boxes are quartiles, whiskers the 5th and the 95th percentile.

    Args:
        audits: Audits by the names they get.
    """
    names = list(dict.fromkeys(name for audit in audits.values() for name in audit.names))
    figure, axes = _figure(1, 1, 7.2, max(2.4, 0.8 + 0.24 * len(names)))
    axis = axes[0, 0]
    axis.axvline(0, color=INK, lw=0.8, ls=':')
    for index, (label, audit) in enumerate(audits.items()):
        rewards = audit.rewards()[audit.right]
        color, boxes, places = COLORS[index % len(COLORS)], [], []
        for place, name in enumerate(names):
            if name in audit.names and len(rewards):
                low, first, middle, third, high = np.percentile(rewards[:, audit.column(name)].numpy(), _PERCENTILES)
                boxes.append(dict(whislo=low, q1=first, med=middle, q3=third, whishi=high, fliers=[]))
                places.append(place + (index - (len(audits) - 1) / 2) * 0.35)
        if not boxes:
            continue
        line = dict(color=color, lw=1)
        axis.bxp(
            boxes, positions=places, widths=0.6 / len(audits), orientation='horizontal', showfliers=False,
            boxprops=line, whiskerprops=line, capprops=line, medianprops=dict(color=color, lw=2))
        axis.plot([], [], color=color, label=label)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel('reward of images that are classified correctly')
    if len(audits) > 1:
        _legend(axis, loc='best')
    return figure


def reliability_diagram(audit: Audit, columns: int = 4) -> Figure:
    """Return, for each site, the mean reward of the images against the critic's judgement of them, in tenths.

    Args:
        audit: An audit of a network with its critic.
        columns: Plots side by side.

    Raises:
        ValueError: There was no critic.
    """
    if audit.quality is None:
        raise ValueError('The audit was made without a critic: there is no judgement to compare with the rewards.')
    rows = math.ceil(len(audit.names) / columns)
    columns = min(columns, len(audit.names))
    figure, axes = _figure(rows, columns, max(4.0, 1.9 * columns), 0.4 + 1.9 * rows)
    for index, axis in enumerate(axes.flat):
        if index >= len(audit.names):
            axis.set_visible(False)
            continue
        points = np.array(reliability(audit, audit.names[index]))
        ends = [min(points[:, 0].min(), points[:, 2].min()), max(points[:, 0].max(), points[:, 3].max())]
        axis.plot(ends, ends, color=INK, lw=0.8, ls=':')
        axis.errorbar(
            points[:, 0], points[:, 1], yerr=np.abs(points[:, 2:].T - points[:, 1]), fmt='o', ms=3, lw=1,
            color=COLORS[0])
        _title(axis, audit.names[index])
        axis.set_xlabel('Q' if index >= len(audit.names) - columns else '')
        axis.set_ylabel('R' if index % columns == 0 else '')
    return figure


def spatial_attention(images: Sequence[np.ndarray], maps: Sequence[Mapping[str, torch.Tensor]]) -> Figure:
    """Return images, a row each, and beside them their maps of spatial sites, laid over them.

    Args:
        images: Images (H, W, 3), uint8.
        maps: For each image its maps by the names of their sites, (h, w), all of the same sites.
    """
    names = list(maps[0])
    figure, axes = _figure(len(images), 1 + len(names), 1.4 * (1 + len(names)), 0.3 + 1.5 * len(images))
    for row, (image, own) in enumerate(zip(images, maps, strict=True)):
        height, width = image.shape[:2]
        for column, axis in enumerate(axes[row]):
            axis.set_axis_off()
            axis.imshow(image, extent=(0, width, height, 0), interpolation='nearest')
            if column:
                name = names[column - 1]
                axis.imshow(
                    own[name].numpy(), extent=(0, width, height, 0), cmap='magma', alpha=0.6, interpolation='bilinear')
            if row == 0:
                axis.set_title('image' if column == 0 else names[column - 1], color=INK, fontsize=6)
    return figure


def training_curves(run: str | Path) -> Figure:
    """Return reward, quality and critic error over the epochs of a run.

    Args:
        run: Folder of a reinforced run, or its `summary.csv`.

    Raises:
        FileNotFoundError: There is no such run.
        ValueError: It was not a reinforced one.
    """
    path = Path(run) / 'summary.csv' if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise FileNotFoundError(f"No summary.csv in '{run}': it is not the folder of a run.")
    with path.open(encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))
    if not rows or 'train_reward' not in rows[0]:
        raise ValueError(f"'{run}' is not a reinforced run: its summary.csv has no rewards.")
    epochs = [int(row['epoch']) + 1 for row in rows]

    def curve(key: str) -> list[float]:
        return [float(row[key] or 'nan') for row in rows]

    groups = [key.partition('/')[2] for key in rows[0] if key.startswith('train_reward_correct/')]
    figure, axes = _figure(1, 3, 10.6, 2.8)
    for axis, title in zip(axes[0], ('reward and quality', 'reward of right images', 'critic error'), strict=True):
        _title(axis, title)
        axis.set_xlabel('epoch')
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for key, color in zip(('reward', 'quality'), COLORS, strict=False):
        axes[0, 0].plot(epochs, curve(f'train_{key}'), color=color, lw=1.4, label=key, marker='.')
    _legend(axes[0, 0], loc='best')
    for index, group in enumerate(groups):
        style = dict(lw=1, color=COLORS[index % len(COLORS)], ls=('-', '--', ':', '-.')[index // len(COLORS) % 4])
        axes[0, 1].plot(epochs, curve(f'train_reward_correct/{group}'), label=group, **style)
        axes[0, 2].plot(epochs, curve(f'train_critic_error/{group}'), label=group, **style)
    axes[0, 1].axhline(0, color=INK, lw=0.8, ls=':')
    axes[0, 2].set_ylim(bottom=0)
    figure.legend(
        *axes[0, 2].get_legend_handles_labels(), loc='outside right upper', frameon=False, fontsize=8, labelcolor=INK)
    return figure
