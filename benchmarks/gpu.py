"""Everything of this package that a GPU may change, in one command that needs no network and ends in time

    python benchmarks/gpu.py                             # on a GPU
    python benchmarks/gpu.py --small --device cpu        # does the command itself work?

Parts run in the order of their worth, each in a process of its own with a share of the time, so that one that crashes,
hangs or runs out of memory is told and the next one starts. Each writes what it found to JSON row by row: a call that
is killed leaves what was done. The table at the end names what was wrong and what was left out; `gpu_report.py` makes a
section of docs/performance.md of the JSON. `gpu_wheels.py` makes a folder of wheels for a machine that lacks packages.

Exit code: 0 all was run and right, 1 something was wrong, 2 nothing could be run, 3 nothing was wrong and something was
left out.
"""
import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_parts.record import write_json
from gpu_parts.table import PARTS, Part, choose

ROOT = Path(__file__).resolve().parent.parent
_SHORTEST = 8.0  # seconds that are worth starting a part


def environment(site: str) -> dict[str, str]:
    """Return the environment of a part: it imports this clone, the tests' slow versions, and what the wheels hold."""
    paths = [site, str(ROOT), str(ROOT / 'benchmarks'), str(ROOT / 'tests'), os.environ.get('PYTHONPATH', '')]
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths)), 'PYTHONUNBUFFERED': '1'}


def look(site: str) -> dict[str, Any]:
    """Return versions, what is missing, and the device."""
    found = subprocess.run(
        [sys.executable, '-m', 'gpu_parts.machine'], env=environment(site), capture_output=True, text=True)
    if found.returncode:
        sys.exit(f'gpu.py: error: this Python cannot say what it has:\n{found.stderr[-2000:]}')
    return json.loads(found.stdout)


def canonical(name: str) -> str:
    """Return the name of a package as the index writes it."""
    return re.sub(r'[-_.]+', '-', name).lower()


def unpack(wheels: Path, site: str, missing: Sequence[str]) -> None:
    """Unpack the wheels of missing packages, and of all that is not installed: a wheel is an archive of its modules."""
    from importlib import metadata
    for wheel in sorted(wheels.glob('*.whl')):
        name = canonical(wheel.name.split('-')[0])
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
        else:
            if name not in {canonical(each) for each in missing}:
                continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def stop(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_part(part: Part, path: Path, seconds: float, args: argparse.Namespace, site: str) -> dict[str, Any]:
    """Run a part for so many seconds at most; return its entry of the JSON."""
    command = [
        sys.executable, '-m', 'gpu_parts', part.name, '--device', args.device, '--output', str(path),
        '--seconds', f'{seconds:.1f}', *(['--small'] if args.small else [])]
    started = time.monotonic()
    with tempfile.TemporaryFile('w+') as errors:
        process = subprocess.Popen(
            command, env=environment(site), stderr=errors, start_new_session=True, cwd=tempfile.gettempdir())
        try:
            code: int | None = process.wait(timeout=seconds + 2)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
        errors.seek(0)
        tail = errors.read()[-3000:]
    entry = json.loads(path.read_text(encoding='utf-8'))['parts'][part.name]
    hung = code is None or (code and 'Timeout (' in tail)
    entry['status'] = 'ended' if code == 0 else 'hung, or took too long' if hung else f'crashed (exit code {code})'
    entry['seconds'] = round(time.monotonic() - started, 1)
    if code != 0:
        entry['errors'] = tail
        print(tail, file=sys.stderr)
    return entry


def judge(part: Part, entry: dict[str, Any], args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return in words what of a part was wrong, and what was left out."""
    if entry['status'].startswith('left out'):
        return [], [f"{part.name}: {entry['status'].removeprefix('left out: ')}"]
    wrong, left = [], []
    for row in entry['rows']:
        name = f"{part.name} {row['name']}"
        if 'absent' in row:
            left.append(f"{name}: {row['absent']}")
        elif 'error' in row:
            wrong.append(f"{name}: {row['error']}")
        elif row['ok'] is False:
            wrong.append(f"{name}: {row['value']} is more than {row['limit']}")
    missing = set(part.rows(args.device, args.small)) - {row['name'] for row in entry['rows']}
    if entry['status'] != 'ended':
        wrong.append(f"{part.name}: {entry['status']}")
    if missing:  # a part that ends without a word about a row has not done it
        named = f"{part.name}: {', '.join(sorted(missing)[:4])}{' and more' if len(missing) > 4 else ''}"
        (wrong if entry['status'] == 'ended' else left).append(f'{named} not reported')
    return wrong, left


def show(entries: dict[str, dict[str, Any]], verdicts: dict[str, tuple[list[str], list[str]]], seconds: float) -> None:
    """Print the table."""
    print(f"\n{'part':22} {'right':>9} {'measured':>9} {'seconds':>8}")
    for name, entry in entries.items():
        rows = entry['rows']
        checks = [row for row in rows if row.get('ok') is not None]
        right = f"{sum(row['ok'] for row in checks)} of {len(checks)}"
        measured = sum('ok' in row and row['ok'] is None for row in rows)
        ended = '' if entry['status'] == 'ended' else f"  {entry['status']}"
        print(f"{name:22} {right:>9} {measured:>9} {entry.get('seconds', 0):>8}{ended}")
    for title, index in (('wrong', 0), ('left out', 1)):
        found = [text for verdict in verdicts.values() for text in verdict[index]]
        print(f"{title}: {len(found) or 'nothing'}")
        for text in found:
            print(f'  {text}')
    print(f'{seconds:.0f} seconds', flush=True)


def run_all(parts: list[Part], args: argparse.Namespace, machine: dict[str, Any], site: str, ends: float) -> int:
    """Run the parts one after the other; return the exit code."""
    header = {
        'command': shlex.join(['python', *sys.argv]), 'machine': machine['machine'], 'cuda': machine['cuda'],
        'versions': machine['versions'], 'commit': machine['commit'], 'device': args.device, 'small': args.small,
        'date': time.strftime('%Y-%m-%d'),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    contents: dict[str, dict[str, Any]] = {part.file: {**header, 'parts': {}} for part in parts}
    entries: dict[str, dict[str, Any]] = {}
    verdicts: dict[str, tuple[list[str], list[str]]] = {}
    started, stopped = time.monotonic(), False
    for index, part in enumerate(parts):
        path, content = args.output / part.file, contents[part.file]
        content['parts'][part.name] = {'status': 'left out: stopped before its end', 'rows': []}
        write_json(path, content)
        left = ends - time.monotonic()
        # what a part does not use is shared by those after it
        seconds = left * part.seconds / sum(each.seconds for each in parts[index:])
        lacking = [name for name in part.needs if name in machine['missing']]
        if stopped or lacking or seconds < _SHORTEST:
            why = 'stopped' if stopped else f"needs {', '.join(lacking)}" if lacking else 'no time was left'
            entry = {'status': f'left out: {why}', 'rows': []}
        else:
            print(f'{part.name} ({seconds:.0f} s)', flush=True)
            try:
                entry = run_part(part, path, seconds - 2, args, site)
            except KeyboardInterrupt:
                stopped = True
                entry = json.loads(path.read_text(encoding='utf-8'))['parts'][part.name]
        content['parts'][part.name] = entries[part.name] = entry
        write_json(path, content)
        verdicts[part.name] = judge(part, entry, args)
    show(entries, verdicts, time.monotonic() - started)
    if any(wrong for wrong, _ in verdicts.values()):
        return 1
    return 3 if any(left for _, left in verdicts.values()) else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=ROOT / 'output' / 'gpu', help='folder of the JSON (output/gpu)')
    parser.add_argument('--minutes', type=float, default=8, help='it ends within them (8)')
    parser.add_argument('--small', action='store_true', help='small networks: tries the command, measures nothing')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda', help='cuda or cpu (cuda)')
    parser.add_argument('--wheels', type=Path, help='folder with wheels of what this Python lacks')
    parser.add_argument(
        '--parts', nargs='+', metavar='PART',
        help=f"some of {', '.join(part.name for part in PARTS)}; right is all four of its")
    args = parser.parse_args()
    ends = time.monotonic() + 60 * args.minutes - 5
    try:
        parts = choose(args.parts)
    except ValueError as error:
        parser.error(str(error))
    if args.minutes <= 0:
        parser.error('--minutes must be above 0')
    if args.wheels is not None and not list(args.wheels.glob('*.whl')):
        parser.error(f'--wheels: no wheel in {args.wheels}')
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as site:
        machine = look(site)
        if args.wheels is not None:
            unpack(args.wheels, site, list(machine['missing']))
            machine = look(site)
        print(f"{machine['machine']}; " + ', '.join(f'{name} {text}' for name, text in machine['versions'].items()))
        for name, problem in machine['missing'].items():
            print(f'missing: {name} ({problem})', flush=True)
        needed = [name for name in machine['missing'] if not any(name in part.needs for part in PARTS)]
        if needed:
            parser.error(f"{', '.join(needed)}: install them, or give a folder of wheels (--wheels, gpu_wheels.py)")
        if args.device == 'cuda' and not machine['cuda']:
            parser.error('there is no CUDA device; --small --device cpu tries the command without one')
        sys.exit(run_all(parts, args, machine, site, ends))


if __name__ == '__main__':
    main()
