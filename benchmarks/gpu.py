"""Everything of this package that a GPU may change, in one command that needs no network and ends in time

    python benchmarks/gpu.py                             # on a GPU
    python benchmarks/gpu.py --small --device cpu        # does the command itself work?

Parts run most important first, each in a process of its own with a share of the time, so that one that crashes, hangs
or runs out of memory is reported and the next one starts. Those that measure no time run side by side where there are
enough cores: they wait for Python more than for the GPU. Each writes what it finds to NAME.json
row by row: a call that is stopped leaves what was done. The table at the end names what was wrong and what was left
out; what takes too long is left out, and a cost is never wrong. `gpu_report.py` makes a section of docs/performance.md
of the JSON. `gpu_wheels.py` makes a folder of wheels for a machine that lacks packages.

Exit code: 0 all was run and right, 1 something was wrong, 2 nothing could be run, 3 nothing was wrong and something was
left out.
"""
import argparse
import contextlib
import fcntl
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_parts.record import write_json
from gpu_parts.table import PARTS, Part, choose

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results' / 'gpu'
_SHORTEST = 10.0  # seconds that are worth starting a part
_STOPPED = 'left out: stopped before its end'


def environment(site: str) -> dict[str, str]:
    """Return the environment of a part: it imports this clone, the tests' slow versions, and what the wheels hold."""
    paths = [site, str(ROOT), str(ROOT / 'benchmarks'), str(ROOT / 'tests'), os.environ.get('PYTHONPATH', '')]
    return {
        **os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths)), 'PYTHONUNBUFFERED': '1',
        'HF_HUB_OFFLINE': '1', 'GLOO_SOCKET_IFNAME': 'lo', 'NCCL_SOCKET_IFNAME': 'lo'}


def look(site: str) -> dict[str, Any]:
    """Return versions, what is missing, and the device; raise a ValueError where this Python cannot say it."""
    try:
        found = subprocess.run(
            [sys.executable, '-m', 'gpu_parts.machine'], env=environment(site), cwd=site, capture_output=True,
            text=True, errors='replace', timeout=120)
        return json.loads(found.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise ValueError('this Python does not say in two minutes what it has: torch, or the GPU, hangs') from None
    except (ValueError, IndexError):
        raise ValueError(f'this Python cannot say what it has:\n{found.stderr[-2000:]}') from None


def canonical(name: str) -> str:
    """Return the name of a package as the index writes it."""
    return re.sub(r'[-_.]+', '-', name).lower()


def unpack(wheels: Path, site: str, missing: Sequence[str]) -> None:
    """Unpack the wheels of missing packages, and of what is not installed, on which those may depend.

    A wheel is an archive of modules: those that were built for another Python are told when they are imported.

    Raises:
        ValueError: A wheel is broken.
    """
    from importlib import metadata
    wanted = {canonical(each) for each in missing}
    for wheel in sorted(wheels.glob('*.whl')):
        name = canonical(wheel.name.split('-')[0])
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            wanted.add(name)
        if name in wanted:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(site)
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(f'{wheel} cannot be unpacked: {error}') from None


def stop(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Running:
    """A part in a process of its own, which writes its rows to a file."""

    def __init__(self, part: Part, path: Path, ends: float, args: argparse.Namespace, site: str):
        self.part, self.path, self.ends = part, path, ends
        command = [
            sys.executable, '-m', 'gpu_parts', part.name, '--device', args.device, '--output', str(path),
            '--ends', f'{ends:.1f}', *(['--small'] if args.small else [])]
        self.started, self.before = time.monotonic(), json.loads(path.read_text(encoding='utf-8'))
        self.errors = tempfile.TemporaryFile('w+', errors='replace')  # noqa: SIM115 (closed when the part has ended)
        self.process = subprocess.Popen(
            command, env=environment(site), stderr=self.errors, start_new_session=True, cwd=site)

    @property
    def over(self) -> bool:
        """Whether it has ended, or should have."""
        return self.process.poll() is not None or time.monotonic() >= self.ends

    def content(self) -> dict[str, Any]:
        """Return the content of its JSON as it is now."""
        with contextlib.suppress(OSError, ValueError):  # a full disk, or another's hand
            return json.loads(self.path.read_text(encoding='utf-8'))
        return self.before

    def stop(self) -> dict[str, Any]:
        """End it; return the content of its JSON, with the seconds that it took."""
        stop(self.process)
        return {**self.content(), 'seconds': round(time.monotonic() - self.started, 1)}

    def finish(self) -> dict[str, Any]:
        """End it where it has not; return the content of its JSON, with how it ended."""
        code = self.process.poll()
        content = self.stop()
        with self.errors:
            self.errors.seek(0)
            said = self.errors.read()
        late = code is None or (code != 0 and 'Timeout (' in said)
        content['status'] = 'ended' if code == 0 else 'left out: did not end in time' if late else f'crashed ({code})'
        if code != 0:
            content['errors'] = said[-3000:]
            print(said[-3000:], file=sys.stderr)
        return content


def run_together(
        parts: Sequence[Part],
        ends: float,
        args: argparse.Namespace,
        site: str,
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Run parts side by side until `ends` (time.monotonic) at most.

    Returns:
        The content of the JSON of each, and whether a KeyboardInterrupt ended them.
    """
    print(f"{', '.join(part.name for part in parts)} ({ends - time.monotonic():.0f} s)", flush=True)
    running = [Running(part, args.output / f'{part.name}.json', ends, args, site) for part in parts]
    done: dict[str, dict[str, Any]] = {}
    try:
        while len(done) < len(running):
            time.sleep(0.05)
            done.update({each.part.name: each.finish() for each in running if each.part.name not in done and each.over})
    except KeyboardInterrupt:
        return {each.part.name: each.stop() for each in running} | done, True
    return done, False


def judge(part: Part, content: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return in words what of a part was wrong, and what was left out."""
    wrong, left, status = list[str](), list[str](), content['status']
    for row in content['rows']:
        name = f"{part.name} {row['name']}"
        if 'absent' in row:
            left.append(f"{name}: {row['absent']}")
        elif 'error' in row:
            wrong.append(f"{name}: {row['error']}")
        elif row['ok'] is False:
            facts = ''.join(f'; {key} {row[key]}' for key in ('where', 'left') if row.get(key))
            wrong.append(f"{name}: {row['value']}, limit {row['limit']}{facts}")
    missing = set(part.rows(content['device'], content['small'])) - {row['name'] for row in content['rows']}
    if status.startswith('left out: '):
        left.append(f"{part.name}: {status.removeprefix('left out: ')}")
    elif status != 'ended':
        wrong.append(f'{part.name}: {status}')
    if (missing and content['rows']) or (status == 'ended' and missing):
        named = f"{part.name}: {', '.join(sorted(missing)[:4])}{' and more' if len(missing) > 4 else ''}"
        # a part that ends without a word about a row has not done it
        (wrong if status == 'ended' else left).append(f'{named} not reported')
    return wrong, left


def show(contents: Mapping[str, Mapping[str, Any]], verdicts: Mapping[str, tuple[list[str], list[str]]]) -> None:
    """Print the table."""
    print(f"\n{'part':22} {'right':>9} {'measured':>9} {'seconds':>8}")
    for name, content in contents.items():
        rows = content['rows']
        checks = [row for row in rows if row.get('ok') is not None]
        right = f"{sum(row['ok'] for row in checks)} of {len(checks)}"
        measured = sum('ok' in row and row['ok'] is None for row in rows)
        ended = '' if content['status'] == 'ended' else f"  {content['status']}"
        print(f"{name:22} {right:>9} {measured:>9} {content.get('seconds', ''):>8}{ended}")
    for title, index in (('wrong', 0), ('left out', 1)):
        found = [text for verdict in verdicts.values() for text in verdict[index]]
        print(f"{title}: {len(found) or 'nothing'}")
        for text in found:
            print(f'  {text}')


def stages(parts: Sequence[Part]) -> list[list[Part]]:
    """Return the parts that run side by side: those that measure no time, where each has two cores."""
    beside = [part for part in parts if not part.alone]
    together = [beside] if 2 * len(beside) <= (os.cpu_count() or 1) else [[part] for part in beside]
    return [stage for stage in together if stage] + [[part] for part in parts if part.alone]


def weight(stage: Sequence[Part]) -> int:
    """Return the seconds that a stage takes, by estimate."""
    return max(part.weight for part in stage)


def run_all(parts: list[Part], args: argparse.Namespace, machine: Mapping[str, Any], site: str, ends: float) -> int:
    """Run the parts one after the other; return the exit code."""
    header = {
        'command': shlex.join(['python', *sys.argv]), 'machine': machine['machine'], 'cuda': machine['cuda'],
        'versions': machine['versions'], 'commit': machine['commit'], 'device': args.device, 'small': args.small,
        'date': time.strftime('%Y-%m-%d'), 'status': _STOPPED,
    }
    contents: dict[str, dict[str, Any]] = {}
    started, stopped, todo = time.monotonic(), False, stages(parts)
    while todo:
        stage, now = todo[0], time.monotonic()
        # what a stage does not use is shared by those after it
        seconds = (ends - now) * weight(stage) / sum(map(weight, todo))
        ready = []
        for part in todo.pop(0):
            lacking = [name for name in part.needs if name in machine['missing']]
            contents[part.name] = {**header, 'rows': []}
            if stopped or lacking or seconds < _SHORTEST:
                why = 'stopped' if stopped else f"needs {', '.join(lacking)}" if lacking else 'no time was left'
                contents[part.name]['status'] = f'left out: {why}'
            else:
                ready.append(part)
            write_json(args.output / f'{part.name}.json', contents[part.name])
        if ready:
            done, stopped = run_together(ready, now + seconds, args, site)
            for name, content in done.items():
                write_json(args.output / f'{name}.json', content)
            contents.update(done)
    verdicts = {part.name: judge(part, contents[part.name]) for part in parts}
    show(contents, verdicts)
    print(f'{time.monotonic() - started:.0f} seconds, JSON in {args.output}', flush=True)
    if any(wrong for wrong, _ in verdicts.values()):
        return 1
    return 3 if any(left for _, left in verdicts.values()) else 0


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the checked command line, with the parts that were chosen and a folder that can be written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--output', type=Path,
        help='folder of the JSON (benchmarks/results/gpu of this clone, output/gpu with --small)')
    parser.add_argument('--minutes', type=float, default=12, help='time limit of the whole call (12)')
    parser.add_argument('--small', action='store_true', help='small networks, to try the command: numbers mean nothing')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda', help='cpu goes with --small')
    parser.add_argument('--wheels', type=Path, help='folder with wheels of what this Python lacks')
    parser.add_argument(
        '--parts', nargs='+', metavar='PART',
        help=f"some of {' '.join(part.name for part in PARTS)}; `right` and `cost` are all of theirs")
    args = parser.parse_args()
    try:
        args.parts = [part for part in choose(args.parts) if part.rows(args.device, args.small)]
    except ValueError as error:
        parser.error(str(error))
    if not 0.2 <= args.minutes <= 1440:
        parser.error(f'--minutes must lie between 0.2 and 1440, got {args.minutes}')
    if args.device == 'cpu' and not args.small:
        parser.error('--device cpu takes --small: the full size takes hours there')
    if args.wheels is not None and not list(args.wheels.glob('*.whl')):
        parser.error(f'--wheels: no wheel in {args.wheels}')
    args.output = (args.output or (ROOT / 'output' / 'gpu' if args.small else RESULTS)).resolve()
    return parser, args


def main() -> None:
    parser, args = parse()
    ends = time.monotonic() + 60 * args.minutes - 4
    with tempfile.TemporaryDirectory() as site:
        try:
            machine = look(site)
            if args.wheels is not None:
                unpack(args.wheels, site, list(machine['missing']))
                machine = look(site)
        except ValueError as error:
            parser.error(str(error))
        print(f"{machine['machine']}; " + ', '.join(f'{name} {text}' for name, text in machine['versions'].items()))
        for name, problem in machine['missing'].items():
            print(f'missing: {name} ({problem})', flush=True)
        needed = [name for name in machine['missing'] if not any(name in part.needs for part in PARTS)]
        if needed:
            parser.error(f"{', '.join(needed)}: install them, or give a folder of wheels (--wheels, gpu_wheels.py)")
        if args.device == 'cuda' and not machine['cuda']:
            parser.error('there is no CUDA device; --small --device cpu tries the command without one')
        try:
            args.output.mkdir(parents=True, exist_ok=True)
            lock = open(args.output / '.lock', 'w')  # noqa: SIM115 (held until the end)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            parser.error(f'--output: {args.output} cannot be written, or another call writes there ({error})')
        try:
            code = run_all(args.parts, args, machine, site, ends)
        finally:
            (args.output / '.lock').unlink(missing_ok=True)
        sys.exit(code)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
