"""What `gpu.py` found, in words: the section of docs/performance.md and the paragraph of the README, from its JSON

    python benchmarks/gpu_report.py                      # writes both from benchmarks/results/gpu
    python benchmarks/gpu_report.py DIR --print          # prints the section of another folder

Both stand between two comments. Without JSON they say that nothing was run.
"""
import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu import RESULTS, ROOT, judge
from gpu_parts.table import PARTS, PROBES

BEGIN, END = '<!-- made by benchmarks/gpu_report.py -->', '<!-- end -->'
NAMES = {'se': 'SE', 'cbam': 'CBAM', 'srm': 'SRM'}
Rows = Mapping[str, Mapping[str, Any]]


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the content of the JSON of each part that was run, by the part's name.

    Raises:
        ValueError: It is not of gpu.py, not of a GPU, or of the small mode, whose numbers mean nothing.
    """
    found = {}
    for part in PARTS:
        path = folder / f'{part.name}.json'
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
            small, device = content['small'], content['device']
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path} is not of gpu.py: {error}') from None
        if small or device != 'cuda':
            raise ValueError(f'{path} is of the small mode, whose numbers mean nothing')
        found[part.name] = content
    return found


def measured(content: Mapping[str, Any]) -> Rows:
    """Return the rows that hold a value, by name."""
    return {row['name']: row for row in content['rows'] if 'ok' in row and 'error' not in row}


def checked(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows that hold or do not, errors among them."""
    return [row for row in content['rows'] if row.get('ok') is not None]


def right_table(contents: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield from ('| | checks that hold | nearest to its limit |', '|---|---:|---|')
    for name, content in contents.items():
        checks = checked(content)
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
    text = f"{row['ratio']:.2f}"
    if row['rounds'] > 1:
        text += f" ({row['least']:.2f} to {row['most']:.2f})"
    text += f", floor {row['floor']:.2f}" if floor else ''
    return f"{text}, missed {row['target']:.2f}" if row.get('reached') is False else text


def _memory(row: Mapping[str, Any]) -> str:
    return f"{row['memory_ratio']:.2f}" + ('' if row['memory_reached'] else ', missed 1.05')


def _costs(rows: Rows, suffix: str) -> Iterator[str]:
    pairs = dict.fromkeys(tuple(name.split('.')[:2]) for name in rows if 'ratio' in rows[name])
    for attention, share in pairs:
        found = {probe: rows.get(f'{attention}.{share}.{probe}') for probe in ('plain', *PROBES)}
        plain = found.pop('plain')
        if plain is None:
            continue
        cells = [_ratio(row, floor=probe != 'taylor') for probe, row in found.items()]
        name = f"{NAMES[attention]}-ResNet-50{suffix}, {plain['batch']} images"
        yield f"| {name} | {share} | {plain['images_s']:,.0f} | {' | '.join(cells)} |"
        if 'kernel_ratio' in plain:
            kernels = [f"{row['kernel_ratio']:.2f}, {row['launches']:.0f}" if row else '' for row in found.values()]
            yield f"| {NAMES[attention]}, kernels alone, launches | | {plain['launches']:.0f} | {' | '.join(kernels)} |"
        if share == '100%' and 'peak_mib' in plain:
            memory = [_memory(row) if row else '' for row in found.values()]
            yield f"| {NAMES[attention]}, peak memory | | {plain['peak_mib']:,.0f} MiB | {' | '.join(memory)} |"


def cost_table(rows: Rows) -> Iterator[str]:
    yield from ('| | right | plain, images/s | `exact` | `split` | `taylor` |', '|---|---:|---:|---|---|---|')
    yield from _costs(rows, '')


def compiled_table(rows: Rows) -> Iterator[str]:
    yield from ('| | right | plain, images/s | `exact` | `split` | `taylor` |', '|---|---:|---:|---|---|---|')
    yield from _costs(rows, ', compiled')


def profiles(rows: Rows) -> Iterator[str]:
    for name, row in rows.items():
        if 'milliseconds' in row:
            most = ', '.join(f'`{key}` {value:+.1f} ms' for key, value in list(row['milliseconds'].items())[:5])
            yield f"- `{name.removesuffix('.profile')}` misses its figure. More a step than plain training: {most}."


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
    ('cost.eager', 'Steps over plain ones, bfloat16, channels-last, 224 pixels; in brackets least and most:',
     cost_table),
    ('cost.eager', '', profiles),
    ('cost.compiled', 'The same, compiled:', compiled_table),
    ('loop', 'The train loop on tensors that are on the device, SE-ResNet-50, all samples right:', loop_table),
    ('runs', '', run_lines),
    ('rest', '', rest_lines),
)


def verdict(contents: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Return what was wrong, and what was left out."""
    wrong, left = list[str](), list[str]()
    for part in PARTS:
        if part.name not in contents:
            left.append(f'{part.name}: not run')
            continue
        found = judge(part, contents[part.name])
        wrong, left = wrong + found[0], left + found[1]
    return wrong, left


def together(left: Sequence[str]) -> Iterator[str]:
    """Yield what was left out, the rows of one part and one reason as one."""
    rows: dict[tuple[str, str], list[str]] = {}
    for text in left:
        name, _, reason = text.partition(': ')
        part, _, row = name.partition(' ')
        rows.setdefault((part, reason), []).append(row)
    for (part, reason), names in rows.items():
        named = f" {', '.join(names)}" if names != [''] else ''
        yield f'{part}{named}: {reason}'


def section(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the section in Markdown."""
    if not contents:
        return 'Nothing has been run on a GPU yet.'
    blocks = []
    for content in contents.values():
        versions = ', '.join(f'{name} {content["versions"][name]}' for name in ('python', 'torch', 'timm'))
        commit = f"commit {content['commit']}, " if content['commit'] else ''
        blocks.append(f"{content['machine']}; {versions}; {commit}{content['date']}.")
    blocks = [*dict.fromkeys(blocks), '\n'.join(right_table(contents))]
    for name, title, lines in SECTIONS:
        found = list(lines(measured(contents[name]))) if name in contents else []
        if len(found) > (2 if title else 0):  # more than the head of a table
            blocks += [title] * bool(title) + ['\n'.join(found)]
    wrong, left = verdict(contents)
    for title, texts in (('Wrong', wrong), ('Left out', list(together(left)))):
        listed = '\n'.join([f'{title}:', '', *(f'- {text}' for text in texts)])
        blocks.append(listed if texts else f'{title}: nothing.')
    return '\n\n'.join(blocks)


def paragraph(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what the README says of it."""
    where = '[docs/performance.md](docs/performance.md#on-a-gpu)'
    if not contents:
        return (
            'Nothing was run on a GPU: not float16 with a loss scaler, not synchronised batch norm, NCCL, the LSTM\n'
            'of cuDNN or Triton. `python benchmarks/gpu.py` is made to do all of that in one call; its small mode\n'
            f'was run on the CPU. {where} says what it looks at.')
    wrong, left = verdict(contents)
    checks = [row for content in contents.values() for row in checked(content)]
    cards = ', '.join(sorted({content['cuda'] for content in contents.values()}))
    held = f"{sum(row['ok'] for row in checks)} of {len(checks)} checks hold"
    return (
        f'On a GPU ({cards}), by `python benchmarks/gpu.py`: {held};\n'
        f'wrong: {len(wrong)}, left out: {len(left)}. {where} lists them, and what a step costs there.')


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
    if not contents and args.folder != RESULTS:
        parser.error(f'there is no JSON of gpu.py in {args.folder}')
    if args.print:
        print(section(contents))
        return
    for name, text in (('docs/performance.md', section(contents)), ('README.md', paragraph(contents))):
        put(ROOT / name, text)
        print(f'written: {name}')


if __name__ == '__main__':
    main()
