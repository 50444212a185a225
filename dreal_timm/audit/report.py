"""The report of an audit, or of two: one page that needs nothing but itself"""
import base64
import html
import io
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dreal_timm.audit import figures
from dreal_timm.audit.examples import Examples, extremes, most_telling
from dreal_timm.audit.result import Audit
from dreal_timm.audit.summary import COLUMNS, caution

__all__ = ['draw_figures', 'write_report']

_TITLES = {
    'channel_attention': (
        'Attention of each channel',
        'Mean over the images, in a band of three variances, of the last site of each group.'),
    'reward': (
        'What each site is worth along depth',
        'Mean reward of the images that are classified correctly, with its bootstrap interval. Right of zero the map '
        'helps; hollow points are no findings.'),
    'top1_gain': (
        'Top-1 that each site brings',
        'Accuracy with the map less accuracy with it replaced, over all images, with its bootstrap interval. Hollow '
        'points are no findings.'),
    'reward_distribution': (
        'Distribution of the rewards',
        'Quartiles, and 5th to 95th percentile, over the images that are classified correctly.'),
    'spatial_attention': (
        'Maps over images',
        'Spatial maps laid over the images that they were computed from; each map has a scale of its own.'),
    'reliability': (
        "The critic's judgement against the reward",
        'Each point is a tenth of the images; a critic that is right on average lies on the dotted line.'),
    'training_curves': (
        'The training',
        'Reward, judgement and error of the critic over the epochs of the run.'),
}


def draw_figures(
        audits: Mapping[str, Audit],
        summaries: Mapping[str, Mapping[str, Any]],
        examples: Mapping[str, Examples],
        runs: Sequence[str] = (),
) -> dict[str, Figure]:
    """Return the figures that can be drawn of some audits, by name.

    Args:
        audits: Audits, by the names of their networks.
        summaries: Their summaries.
        examples: Their example images.
        runs: Folders of reinforced runs, for their training curves.
    """
    drawn: dict[str, Figure] = {
        'reward': figures.gain_along_depth(summaries),
        'top1_gain': figures.gain_along_depth(summaries, 'top1_gain'),
        'reward_distribution': figures.reward_distribution(audits),
    }
    shared = [set(audit.names) for audit in audits.values()]
    first = next(iter(audits.values()))
    groups = {row.group: row.site for row in first.sites if row.kind != 'spatial'}
    columns = [name for name in groups.values() if all(name in names for names in shared)]
    if columns:
        drawn = {'channel_attention': figures.channel_attention(audits, columns), **drawn}
    several = len(audits) > 1
    for label, audit in audits.items():
        suffix = f' {label}' if several else ''
        own = examples[label]
        if own.maps:
            maps = [{name: attention[i] for name, attention in own.maps.items()} for i in range(len(own.shown))]
            drawn[f'spatial_attention{suffix}'] = figures.spatial_attention(list(own.shown), maps)
        if audit.quality is not None and len(audit.number) > 1:
            drawn[f'reliability{suffix}'] = figures.reliability_diagram(audit)
    for run in runs:
        drawn[f'training_curves{f" {run}" if several else ""}'] = figures.training_curves(run)
    return drawn


def _svg(figure: Figure, name: str, text: str) -> str:
    """Figure as inline SVG whose ink has the colour of the text around it."""
    buffer = io.StringIO()
    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': name, 'font.family': 'sans-serif'}):
        figure.savefig(buffer, format='svg', metadata={'Date': None}, dpi=150)
    svg = buffer.getvalue()
    svg = svg[svg.index('<svg'):].replace(figures.INK, 'currentColor')
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" LABEL>', svg, count=1)
    slug = re.sub(r'\W+', '-', name)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{slug}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf'\g<1>{slug}-', svg)
    return svg.replace('LABEL', f'aria-label="{html.escape(text)}"', 1)


def _image(picture: np.ndarray, text: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, 'PNG')
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(text)}">'


def _figures(drawn: Mapping[str, Figure]) -> str:
    parts = []
    for name, figure in drawn.items():
        kind, _, label = name.partition(' ')
        title, text = _TITLES[kind]
        title = html.escape(f'{title}: {label}' if label else title)
        parts.append(
            f'<h2>{title}</h2><figure><div class="scroll">{_svg(figure, name, f"{title}. {text}")}</div>'
            f'<figcaption>{html.escape(text)}</figcaption></figure>')
    return '\n'.join(parts)


def _sign(value: int) -> str:
    return 'up' if value > 0 else 'down' if value < 0 else ''


def _number(key: str, digits: int, sign: bool = True) -> Callable[[Mapping[str, Any]], str]:
    def cell(row: Mapping[str, Any]) -> str:
        value = row.get(key)
        if value is None:
            return '<td data-value="">-</td>'
        text = format(value, f'{"+" if sign else ""}.{digits}f')
        low, high = row.get(f'{key}_low'), row.get(f'{key}_high')
        interval = '' if low is None or high is None else f' <small>{low:.{digits}f} to {high:.{digits}f}</small>'
        colour = _sign(row.get(f'{key}_finding', 0))
        return f'<td data-value="{value}"><span class="{colour}">{text}</span>{interval}</td>'
    return cell


def _share(key: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(row: Mapping[str, Any]) -> str:
        value = row[key]
        return '<td data-value="">-</td>' if value is None else f'<td data-value="{value}">{value:.0%}</td>'
    return cell


def _text(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f'<td>{html.escape(str(row[key]))}</td>'


def _count(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f'<td data-value="{row[key]}">{row[key]:,}</td>'


def _columns(with_critic: bool) -> dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]]:
    """Head of each column: what it says, and its cell."""
    columns = {
        'site': ('name of the site', _text('site')),
        'kind': ('what the map has a weight for', _text('kind')),
        'reward': (COLUMNS['reward'], _number('reward', 4)),
        'top-1': (COLUMNS['top1_gain'], _number('top1_gain', 2)),
        'log p': (COLUMNS['log_likelihood_gain'], _number('log_likelihood_gain', 4)),
        'top-1, constant': (COLUMNS['constant_top1_gain'], _number('constant_top1_gain', 2)),
        'log p, constant': (COLUMNS['constant_log_likelihood_gain'], _number('constant_log_likelihood_gain', 4)),
        'helps': (COLUMNS['helps'], _share('helps')),
        'hurts': (COLUMNS['hurts'], _share('hurts')),
        'saved': (COLUMNS['saved'], _count('saved')),
        'lost': (COLUMNS['lost'], _count('lost')),
        'spread': (COLUMNS['map_spread'], _number('map_spread', 3, sign=False)),
        'input': (COLUMNS['map_input_share'], _share('map_input_share')),
        'parameters': ('attention parameters of the module', _count('parameters')),
    }
    if with_critic:
        columns['Q'] = ("mean of the critic's judgement", _number('quality', 3))
        columns['rank corr.'] = (
            "Spearman's correlation of judgement and reward over right images", _number('rank_correlation', 2))
    return columns


def _table(summary: Mapping[str, Any]) -> str:
    columns = _columns(any('quality' in row for row in summary['sites']))
    heads = ''.join(
        f'<th scope="col"><button title="{html.escape(text)}">{html.escape(name)}</button></th>'
        for name, (text, _) in columns.items()
    )
    rows = ''.join('<tr>' + ''.join(cell(row) for _, cell in columns.values()) + '</tr>' for row in summary['sites'])
    meanings = ''.join(
        f'<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>' for name, (text, _) in columns.items())
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        '</div>'
        f'<details><summary>What the columns mean</summary><dl>{meanings}</dl></details>'
    )


def _examples(audit: Audit, examples: Examples) -> str:
    names = audit.provenance.get('label_names')
    parts = []
    for site in most_telling(audit):
        column, cards = audit.column(site), []
        for word, rows in zip(('helped', 'hurt'), extremes(audit, site), strict=True):
            for row in rows:
                number, target = int(audit.number[row]), int(audit.target[row])
                if number not in examples.pictures:
                    continue
                label = names[target] if names else f'class {target}'
                with_map, without = (float(p.exp()) for p in (audit.log_p[row], audit.mean_log_p[row, column]))
                text = f'Image {number}, {label}: {word} by {site}, probability {without:.2f} to {with_map:.2f}'
                cards.append(
                    f'<figure>{_image(examples.pictures[number], text)}<figcaption>{html.escape(label)}, image {number}'
                    f'<br><span class="{"up" if word == "helped" else "down"}">{word}: {without:.2f} &rarr; '
                    f'{with_map:.2f}</span></figcaption></figure>')
        if cards:
            shown = f'<div class="examples">{"".join(cards)}</div>'
            parts.append(f'<details><summary>{html.escape(site)}</summary>{shown}</details>')
    return '\n'.join(parts)


def _provenance(audit: Audit, command: Sequence[str]) -> str:
    rows: dict[str, Any] = {'command': shlex.join(command), **audit.provenance}
    for names in ('label_names', 'class_names'):
        rows.pop(names, None)
    rows.update({f'{name} version': version for name, version in rows.pop('versions', {}).items()})
    if isinstance(rows.get('sites'), list):
        rows['sites'] = len(rows['sites'])
    shown = ''.join(
        f'<dt>{html.escape(key.replace("_", " "))}</dt><dd>{html.escape(str(value))}</dd>'
        for key, value in rows.items() if value not in (None, '')
    )
    unreadable = ''
    if audit.unreadable:
        unreadable = f'<p>Images that could not be read: {html.escape(", ".join(audit.unreadable[:20]))}</p>'
    return f'<dl>{shown}</dl>{unreadable}'


def _headline(label: str, summary: Mapping[str, Any]) -> str:
    network, rows = summary['network'], summary['sites']
    useful = sum(row['reward_finding'] > 0 for row in rows)
    harmful = sum(row['reward_finding'] < 0 for row in rows)
    constant = sum(row['constant_reward_finding'] > 0 for row in rows)
    unread = f' {network["unreadable"]} images could not be read.' if network['unreadable'] else ''
    few = caution(network['right'])
    return (
        f'<p><strong>{html.escape(label)}</strong>: {network["images"]:,} images, top-1 {network["top1"]:.2f} %, wrong '
        f'{network["wrong"]:.2f} %.{unread} Of {len(rows)} attention sites, {useful} raise the probability of the true '
        f'class over what their mean would give, and {harmful} lower it (interval of the mean reward clear of zero, '
        f'reward beyond the floor of {network["floor"]["reward"]:.1g}); {constant} raise it '
        f'over what the constant mean map of the data set would give.</p>'
        + (f'<p><strong>{few}</strong></p>' if few else '')
    )


def write_report(
        path: Path,
        audits: Mapping[str, Audit],
        summaries: Mapping[str, Mapping[str, Any]],
        examples: Mapping[str, Examples],
        drawn: Mapping[str, Figure],
        command: Sequence[str] = (),
        paired: str = '',
) -> None:
    """Write the report.

    Args:
        path: File to write.
        audits: Audits, by the names of their networks.
        summaries: Their summaries.
        examples: Their example images.
        drawn: What `draw_figures` returned.
        command: Command that made it.
        paired: What is to be said of the networks together, as HTML.
    """
    title = 'What attention is worth: ' + ' and '.join(audits)
    several = len(audits) > 1
    body = [f'<h1>{html.escape(title)}</h1>']
    body += [_headline(label, summaries[label]) for label in audits]
    body.append(paired)
    for label in audits:
        body.append(f'<h2>Sites{html.escape(f": {label}") if several else ""}</h2>{_table(summaries[label])}')
    body.append(_figures(drawn))
    for label, audit in audits.items():
        suffix = html.escape(f': {label}') if several else ''
        shown = _examples(audit, examples[label])
        if shown:
            body.append(
                f'<h2>Images where a site helped or hurt most{suffix}</h2><p class="dim">Probability of the true class '
                f'with the mean in place of the map &rarr; with the map.</p>{shown}')
        body.append(f'<h2>Where the numbers come from{suffix}</h2>{_provenance(audit, command)}')
    page = Template((files('dreal_timm.audit') / 'page.html').read_text(encoding='utf-8'))
    path.write_text(page.substitute(title=html.escape(title), body='\n'.join(body)), encoding='utf-8')
