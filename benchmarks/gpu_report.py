"""What `gpu.py` found, in words: the section of docs/performance.md and the paragraph of the README, from its JSON

    python benchmarks/gpu_report.py                      # writes both from benchmarks/results/gpu
    python benchmarks/gpu_report.py DIR --print          # prints the section of any folder

Both stand between two comments. Without JSON they say that nothing was run.
"""
import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu import ROOT, judge
from gpu_parts.table import ATTENTION, PARTS, PROBES, SHARES

RESULTS = ROOT / 'benchmarks' / 'results' / 'gpu'
BEGIN, END = '<!-- made by benchmarks/gpu_report.py -->', '<!-- end -->'
NAMES = {'se': 'SE', 'cbam': 'CBAM', 'srm': 'SRM'}
Rows = Mapping[str, Mapping[str, Any]]


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the content of each JSON file by the name of the part's file.

    Raises:
        ValueError: It is not of a GPU, or of the small mode, whose numbers mean nothing.
    """
    files = dict.fromkeys(part.file for part in PARTS)
    found = {
        name: json.loads((folder / name).read_text(encoding='utf-8')) for name in files if (folder / name).is_file()}
    for name, content in found.items():
        if content['small'] or content['device'] != 'cuda':
            raise ValueError(f'{folder / name} is of {content["device"]}, small={content["small"]}: a GPU is needed')
    return found


def measured(entry: Mapping[str, Any]) -> Rows:
    """Return the rows that were measured or checked, by name."""
    return {row['name']: row for row in entry['rows'] if 'ok' in row and 'error' not in row}


def checked(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows that hold or do not, errors among them."""
    return [row for row in entry['rows'] if row.get('ok') is not None]


def right_table(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield from ('| | checks that hold | nearest to its limit |', '|---|---:|---|')
    for name, entry in entries.items():
        checks = checked(entry)
        if not checks:
            continue
        held = f"{sum(row['ok'] for row in checks)} of {len(checks)}"
        numbers = [row for row in checks if isinstance(row.get('value'), float) and row['limit'] > 0]
        near = max(numbers, key=lambda row: row['value'] / row['limit'], default=None)
        shown = '' if near is None else f"`{near['name']}`: {near['value']:.1e}, limit {near['limit']:.0e}"
        yield f'| {name} | {held} | {shown} |'


def _ratio(row: Mapping[str, Any] | None, floor: bool) -> str:
    if row is None:
        return ''
    text = f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
    text += f", floor {row['floor']:.2f}" if floor and 'floor' in row else ''
    return f"{text}, missed {row['target']:.2f}" if row.get('reached') is False else text


def cost_table(rows: Rows) -> Iterator[str]:
    yield from (
        '| | right | plain, images/s | `exact` | `split` | `taylor` |', '|---|---:|---:|---|---|---|')
    kinds = [(f'{each}.eager', f'{NAMES[each]}-ResNet-50', share) for each in ATTENTION for share in SHARES]
    for prefix, name, share in [*kinds, ('se.compiled', 'SE-ResNet-50, compiled', 1.0)]:
        found = {probe: rows.get(f'{prefix}.{share:.0%}.{probe}') for probe in ('plain', *PROBES)}
        plain = found.pop('plain')
        if plain is None:
            continue
        cells = [_ratio(row, floor=probe != 'taylor') for probe, row in found.items()]
        yield f"| {name}, {plain['batch']} images | {share:.0%} | {plain['images_s']:,.0f} | {' | '.join(cells)} |"
    for attention in ATTENTION:
        memory = {probe: rows.get(f'{attention}.eager.100%.{probe}', {}).get('memory_ratio') for probe in PROBES}
        if None not in memory.values():
            plain = rows[f'{attention}.eager.100%.plain']
            cells = [f'{memory[probe]:.2f}' for probe in PROBES]
            yield f"| {NAMES[attention]}, peak memory | | {plain['peak_mib']:,.0f} MiB | {' | '.join(cells)} |"


def profiles(rows: Rows) -> Iterator[str]:
    for name, row in rows.items():
        if 'profile' in row:
            most = ', '.join(f'`{key}` {value:+.1f} ms' for key, value in list(row['profile'].items())[:5])
            yield f'- `{name}` misses its figure; operations that take most beside plain training: {most}.'


def loop_table(rows: Rows) -> Iterator[str]:
    yield from ('| | images/s | over timm\'s order of calls | idle | host syncs a step |', '|---|---:|---:|---:|---:|')
    for kind in ('timm', 'plain', *reversed(PROBES)):
        images = rows.get(f'{kind}.images')
        if images is None:
            continue
        over = f"{images['over_timm']:.2f}" if 'over_timm' in images else ''
        idle, syncs = rows.get(f'{kind}.idle'), rows.get(f'{kind}.syncs')
        share = '' if idle is None else f"{100 * idle['share']:.0f} %"
        yield f"| {kind} | {images['images_s']:,.0f} | {over} | {share} | {'' if syncs is None else syncs['value']} |"


def run_lines(rows: Rows) -> Iterator[str]:
    if 'quickstart' in rows:
        row = rows['quickstart']
        yield f"- `make quickstart` with `amp_dtype={row['amp']}`: {row['top1']:.2f} % top-1 in {row['seconds']:.0f} s."
    if 'resume' in rows:
        row = rows['resume']
        equal = 'to the bit' if row['ok'] else f"not: {row['where']} differs"
        named = ', '.join(f'`{name}`' for name in row['not_deterministic']) or 'none'
        yield f'- A kill and a resume end where an uninterrupted run does, {equal}; kernels without a deterministic ' \
              f'form: {named}.'
    if 'audit' in rows:
        row = rows['audit']
        yield f"- The audit of that network is the CPU's to {row['value']:.1e} in log-probability " \
              f"({row['images']} images)."


def rest_lines(rows: Rows) -> Iterator[str]:
    for way, what in (('evaluation', 'evaluation'), ('reranking', 're-ranking')):
        row = rows.get(f'reid.{way}')
        if row is not None:
            yield f"- Re-identification's {what}, {row['gallery']:,} images in the gallery: {row['seconds']:.2f} s " \
                  f"({row['cpu_seconds']:.2f} s on the CPU beside it); rank-1 and mAP differ by {row['value']:.3f} " \
                  'points.'
    if 'audit.images' in rows:
        row = rows['audit.images']
        yield f"- Audit of an SE-ResNet-50 at 224 pixels, {row['sites']} sites: {row['images_s']:,.0f} images/s."


SECTIONS: tuple[tuple[str, str, Callable[[Rows], Iterator[str]]], ...] = (
    ('cost', 'A step over a plain one, bfloat16, channels-last, 224 pixels; least and most in brackets:', cost_table),
    ('cost', '', profiles),
    ('loop', 'The train loop on tensors that are on the device, SE-ResNet-50:', loop_table),
    ('runs', '', run_lines),
    ('rest', '', rest_lines),
)


def verdict(contents: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[str], int, int]:
    """Return what was wrong, what was left out, and how many checks hold of how many."""
    wrong, left, held, total = list[str](), list[str](), 0, 0
    for part in PARTS:
        content = contents.get(part.file, {'parts': {}})
        entry = content['parts'].get(part.name)
        if entry is None:
            left.append(f'{part.name}: not run')
            continue
        args = argparse.Namespace(device=content['device'], small=content['small'])
        found = judge(part, entry, args)
        wrong, left = wrong + found[0], left + found[1]
        checks = checked(entry)
        held, total = held + sum(row['ok'] for row in checks), total + len(checks)
    return wrong, left, held, total


def section(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the section in Markdown."""
    if not contents:
        return 'Nothing has been run on a GPU yet.'
    blocks = []
    for content in contents.values():
        versions = ', '.join(f'{name} {content["versions"][name]}' for name in ('python', 'torch', 'timm'))
        where = f"{content['machine']}; {versions}; commit {content['commit']}; {content['date']}"
        blocks += [f"`{content['command']}`: {where}."] if f"`{content['command']}`: {where}." not in blocks else []
    entries = {name: entry for content in contents.values() for name, entry in content['parts'].items()}
    blocks.append('\n'.join(right_table(entries)))
    for name, title, lines in SECTIONS:
        found = list(lines(measured(entries[name]))) if name in entries else []
        if len(found) > (2 if title else 0):
            blocks += [title] * bool(title) + ['\n'.join(found)]
    wrong, left, _, _ = verdict(contents)
    for title, texts in (('Wrong', wrong), ('Left out', left)):
        listed = '\n'.join([f'{title}:', '', *(f'- {text}' for text in texts)])
        blocks.append(listed if texts else f'{title}: nothing.')
    return '\n\n'.join(blocks)


def paragraph(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what the README says of it."""
    where = '[docs/performance.md](docs/performance.md#on-a-gpu)'
    if not contents:
        return (
            'Nothing was run on a GPU: neither float16 with its loss scaler there, nor synchronised batch norm, NCCL,\n'
            "cuDNN's LSTM or Triton. `python benchmarks/gpu.py` does all of that in eight minutes; its small mode was\n"
            f'run on the CPU. {where} says what it looks at.')
    wrong, left, held, total = verdict(contents)
    cards = ', '.join(sorted({content['cuda'] or 'CPU' for content in contents.values()}))
    return (
        f'On a GPU ({cards}), by `python benchmarks/gpu.py`: {held} of {total} checks hold, {len(wrong)} things were\n'
        f'wrong and {len(left)} left out; {where} has what, and what a step costs there.')


def put(path: Path, text: str) -> None:
    """Put a text between the comments of a file."""
    before, _, rest = path.read_text(encoding='utf-8').partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        sys.exit(f'gpu_report.py: error: {path} has no place for it, between "{BEGIN}" and "{END}"')
    path.write_text(f'{before}{BEGIN}\n{text}\n{END}{after}', encoding='utf-8')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', type=Path, default=RESULTS, help='JSON of gpu.py (benchmarks/results/gpu)')
    parser.add_argument('--print', action='store_true', help='print the section, write nothing')
    args = parser.parse_args()
    try:
        contents = read(args.folder)
    except ValueError as error:
        parser.error(str(error))
    if args.print:
        print(section(contents))
        return
    put(ROOT / 'docs' / 'performance.md', section(contents))
    put(ROOT / 'README.md', paragraph(contents))


if __name__ == '__main__':
    main()
