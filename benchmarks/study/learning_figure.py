"""Draw the tables of learning.py: differences of paired seeds and their 95% intervals, a block for each study

Filled: to plain training. Hollow: to the form's own control, whose rewards are shuffled.
"""
import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dreal_timm.audit.figures import COLORS, INK

if not __package__:  # a script's path begins with its own folder; that of the other benchmarks is one up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import report

# what a form is compared with: label, marker, colour, colour within, place beside the row
_MARKS = {
    'plain': ('minus plain', 'o', COLORS[0], COLORS[0], -0.14),
    'shuffled': ('minus its control, shuffled', 's', COLORS[1], 'none', 0.14),
}
_ROW = 0.2  # height, inches


def draw(studies: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Return the figure of some tables.

    Args:
        studies: Rows of `learning.table` by the title that they get; rows of `plain` itself have no difference, and
            are left out.
    """
    blocks = {title: [row for row in rows if 'minus_plain' in row] for title, rows in studies.items()}
    heights = [len(rows) + 1 for rows in blocks.values()]
    figure = Figure(figsize=(6.5, 0.7 + _ROW * sum(heights) + 0.15 * len(heights)), layout='constrained')
    figure.patch.set_alpha(0)
    axes = figure.subplots(len(blocks), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axis, (title, rows) in zip(axes, blocks.items(), strict=True):
        axis.patch.set_alpha(0)
        axis.axvline(0, color=INK, lw=0.8)
        for other, (label, marker, color, within, shift) in _MARKS.items():
            known = [(y, row) for y, row in enumerate(rows) if f'minus_{other}' in row]
            axis.errorbar(
                [row[f'minus_{other}'] for _, row in known], [y + shift for y, _ in known],
                xerr=[row[f'minus_{other}_95'] for _, row in known], fmt=marker, color=color, mfc=within, ms=3.5,
                lw=1.2, label=label)
        axis.set_yticks(range(len(rows)), [f"{row['form']}  ({row['seeds']})" for row in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_title(title, color=INK, fontsize=9, loc='left')
        axis.tick_params(colors=INK, labelsize=8)
        axis.grid(axis='x', color=INK, alpha=0.2, lw=0.6)
        for side, spine in axis.spines.items():
            spine.set_visible(side == 'bottom')
            spine.set_color(INK)
    axes[-1].set_xlabel('difference in top-1 accuracy, points (paired seeds in brackets)', color=INK, fontsize=9)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc='outside upper right', ncols=2, frameon=False, fontsize=8,
        labelcolor=INK)
    return figure


def title_of(settings: Mapping[str, Any]) -> str:
    """Say of a study's settings what was trained on what."""
    data = 'Fashion-MNIST' if settings['set'] == 'fashion' else 'letters, 100 classes'
    return (f"{settings['study']}: {settings['attention'].upper()}, {settings['images']:,} images of {data}, "
            f"{settings['epochs']} epochs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = {path.stem: path for path in sorted((report.RESULTS / 'learning').glob('*.json'))}
    parser.add_argument('studies', nargs='+', choices=tables, help='tables of benchmarks/results/learning')
    parser.add_argument('--output', type=Path, required=True, help='a PNG, SVG or PDF')
    args = parser.parse_args()
    studies = {}
    for name in args.studies:
        found = json.loads(tables[name].read_text())
        studies[title_of(found['settings'])] = found['rows']
    draw(studies).savefig(args.output, dpi=150)
    print(f'written: {args.output}')


if __name__ == '__main__':
    main()
