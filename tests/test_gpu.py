"""benchmarks/gpu.py: its part `right` as tests on a GPU, and the command itself in its small mode on the CPU"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gpu
import gpu_floors
import gpu_report
import pytest
import torch
from gpu_parts import loop
from gpu_parts.machine import numbers
from gpu_parts.record import Late, Record, write_json
from gpu_parts.table import PARTS, REQUIRED, choose

ROOT = Path(__file__).parent.parent


def command(output, *options, root=ROOT):
    return [sys.executable, str(root / 'benchmarks' / 'gpu.py'), '--output', str(output), *options]


def run(output, *options, root=ROOT):
    return subprocess.run(command(output, *options, root=root), capture_output=True, text=True)


def copy_of_the_tree(path, changes):
    """The files that the command needs, some of their lines changed."""
    for folder, pattern in (('dreal_timm', '**/*.py'), ('benchmarks', '**/*.py'), ('tests', '*.py'), ('recipes', '*')):
        for file in (ROOT / folder).glob(pattern):
            target = path / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    for name, old, new in changes:
        text = (path / name).read_text()
        assert text.count(old) == 1
        (path / name).write_text(text.replace(old, new))
    return path


def found_in(output):
    return {file.stem: json.loads(file.read_text()) for file in output.glob('*.json')}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device')
@pytest.mark.parametrize('part', [part.name for part in PARTS if part.name.startswith('right.')])
def test_right(part, tmp_path):
    """Rewards, gradients, masks and traces on a GPU."""
    done = run(tmp_path, '--parts', part, '--minutes', '4')
    print(done.stdout, done.stderr)
    assert done.returncode == 0


def test_small_mode_runs_every_part(tmp_path):
    """Everything is there and right; the JSON says where it was measured, and the table comes last."""
    output = tmp_path / 'out'
    done = run(output, '--small', '--device', 'cpu', '--minutes', '12')
    assert done.returncode == 0, done.stdout + done.stderr
    found = found_in(output)
    checks = {
        'right.float32': 33, 'right.bfloat16': 7, 'right.float16': 9, 'right.compiled': 2, 'right.distributed': 4,
        'loop': 0, 'cost.eager': 0, 'runs': 4, 'rest': 2}
    assert set(found) == set(checks)
    for part in PARTS[:-1]:
        content = found[part.name]
        assert content['status'] == 'ended'
        assert sorted(row['name'] for row in content['rows']) == sorted(part.rows('cpu', True))
        checked = [row for row in content['rows'] if row['ok'] is not None]
        assert all(row['value'] <= row['limit'] for row in checked)
        assert len(checked) == checks[part.name]
        assert content['versions']['torch'] == torch.__version__
        assert content['small'] is True and content['device'] == 'cpu'
    assert 'wrong: nothing\nleft out: nothing\n' in done.stdout.split('\npart ')[-1]
    rates = {row['name']: row['images_s'] for row in found['loop']['rows']}
    assert set(rates) == {f'{kind}.images' for kind in ('timm', 'plain', 'taylor', 'split', 'exact')}
    assert all(rate > 0 for rate in rates.values())
    ratios = {row['name']: row['ratio'] for row in found['cost.eager']['rows']}
    assert ratios['se.100%.plain'] == 1
    assert all(ratio > 0 for ratio in ratios.values())
    assert not (output / '.lock').exists()


def test_what_is_broken_is_found(tmp_path):
    """A reward, a mask and a gradient that are wrong end with exit code 1, and the row of each says so, no other's."""
    alone = ('benchmarks/gpu_parts/table.py', "ATTENTION = ('se', 'cbam', 'srm')", "ATTENTION = ('se',)")
    root = copy_of_the_tree(tmp_path / 'tree', [
        ('dreal_timm/reward.py', '-torch.expm1(change)', '-torch.expm1(change / 2)'),
        ('dreal_timm/replay/random_masks.py', 'self.mask = self.draw(ones)', 'self.mask = ones'),
        ('dreal_timm/trainable.py', '{name: parameter.detach() for', '{name: parameter for'), alone])
    done = run(tmp_path / 'out', '--parts', 'right.float32', '--small', '--device', 'cpu', root=root)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = {row['name']: row for row in found_in(tmp_path / 'out')['right.float32']['rows']}
    for wrong in ('se.reward.exact', 'se.dropout.exact', 'se.gradient.critic'):
        assert rows[wrong]['ok'] is False
        assert f'right.float32 {wrong}: ' in done.stdout.split('\nwrong: ')[-1]
    for right in ('se.trace', 'se.gradient.backbone'):
        assert rows[right]['ok'] is True


def test_parts_that_crash_hang_or_do_nothing(tmp_path):
    """Each is told, the next one starts, and the call ends in time with exit code 1; nothing it started is left."""
    changes = [
        ('benchmarks/gpu_parts/loop.py', 'def main(record: Record, device: torch.device, small: bool) -> None:\n',
         'def main(record: Record, device: torch.device, small: bool) -> None:\n'
         '    import os\n    record.add("timm.images", ok=None, images_s=1.0)\n    os.abort()\n'),
        ('benchmarks/gpu_parts/runs.py', 'def main(record: Record, device: torch.device, small: bool) -> None:\n',
         'def main(record: Record, device: torch.device, small: bool) -> None:\n'
         '    child = subprocess.Popen(["sleep", "600"])\n    print("child", child.pid, flush=True)\n'
         '    time.sleep(600)\n'),
        ('benchmarks/gpu_parts/rest.py', 'def main(record: Record, device: torch.device, small: bool) -> None:\n',
         'def main(record: Record, device: torch.device, small: bool) -> None:\n    return\n'),
    ]
    root = copy_of_the_tree(tmp_path / 'tree', changes)
    started = time.monotonic()
    done = run(tmp_path / 'out', '--parts', 'loop', 'runs', 'rest', '--small', '--device', 'cpu', '--minutes', '0.9',
               root=root)
    assert time.monotonic() - started < 54
    assert done.returncode == 1
    found = found_in(tmp_path / 'out')
    assert found['loop']['status'] == 'crashed (-6)'
    assert [row['name'] for row in found['loop']['rows']] == ['timm.images']
    assert found['runs']['status'] == 'left out: did not end in time'
    assert 'runs.py' in found['runs']['errors']  # where it hung
    assert found['rest']['status'] == 'ended' and found['rest']['rows'] == []
    assert 'rest: audit.images, reid.evaluation, reid.reranking not reported' in done.stdout
    pid = re.search(r'child (\d+)', done.stdout).group(1)
    status = Path('/proc', pid, 'status')
    assert not status.exists() or 'zombie' in status.read_text()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_a_call_that_is_stopped_leaves_what_was_done(tmp_path, number):
    """Rows that were found are in the JSON; with SIGTERM the table is printed too."""
    process = subprocess.Popen(
        command(tmp_path, '--parts', 'right.float32', 'rest', '--small', '--device', 'cpu'), stdout=subprocess.PIPE,
        text=True)
    file, rows = tmp_path / 'right.float32.json', []
    while len(rows) < 3:
        assert process.poll() is None
        time.sleep(0.05)
        if file.exists():
            rows = json.loads(file.read_text())['rows']
    process.send_signal(number)
    said = process.communicate()[0]
    found = found_in(tmp_path)['right.float32']
    assert found['status'] == 'left out: stopped before its end'
    assert found['rows'][:3] == rows[:3] and all(row['ok'] for row in found['rows'])
    if number == signal.SIGTERM:
        assert process.returncode == 3
        assert 'right.float32: stopped before its end' in said and 'rest: stopped' in said
        assert found_in(tmp_path)['rest']['status'] == 'left out: stopped'


@pytest.mark.parametrize(('options', 'said'), [
    (['--parts', 'nonsense'], "no part 'nonsense'"),
    (['--minutes', '0'], '--minutes'),
    (['--minutes', 'nan'], '--minutes'),
    (['--device', 'cpu'], '--small'),
    (['--wheels', '/nowhere'], 'no wheel'),
    *([] if torch.cuda.is_available() else [([], 'no CUDA device')]),
])
def test_wrong_use(tmp_path, options, said):
    """Nothing is run or written, and the exit code is 2."""
    done = run(tmp_path / 'out', *options)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / 'out').exists()


def test_a_package_that_is_missing_is_named_and_taken_from_a_wheel(tmp_path):
    """Without it nothing starts; a wheel of it is unpacked, one of what is there is not."""
    (tmp_path / 'hidden').mkdir()
    (tmp_path / 'hidden' / 'sitecustomize.py').write_text(
        'import importlib.metadata as m\nfind = m.version\n'
        'def version(name):\n    if name == "timm":\n        return "1.0.1"\n    return find(name)\n'
        'm.version = version\n')
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path / 'hidden')}
    done = subprocess.run(
        command(tmp_path / 'out', '--small', '--device', 'cpu'), env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert 'missing: timm (1.0.1 is older than 1.0.31)' in done.stdout
    wheels = tmp_path / 'wheels'
    wheels.mkdir()
    for name in ('timm-9.9-py3-none-any.whl', 'torch-9.9-py3-none-any.whl', 'No_Such.Thing-1.0-py3-none-any.whl'):
        with zipfile.ZipFile(wheels / name, 'w') as archive:
            archive.writestr(f"{name.split('-')[0]}/__init__.py", 'version = 9\n')
    gpu.unpack(wheels, str(tmp_path / 'site'), ['timm'])
    assert sorted(path.name for path in (tmp_path / 'site').iterdir()) == ['No_Such.Thing', 'timm']


def test_required_packages_are_those_of_the_project():
    """What the command asks for is what pyproject.toml asks for, with the same oldest versions."""
    text = (ROOT / 'pyproject.toml').read_text()
    lists = re.search(r'^dependencies = \[(.*?)^\]', text, re.DOTALL | re.MULTILINE).group(1)
    lists += re.search(r'^train = \[(.*?)\]', text, re.MULTILINE).group(1)
    wanted = dict(re.findall(r'"([\w-]+)(?:>=([\d.]+))?"', lists))
    assert {name: oldest or '' for name, oldest in REQUIRED.items() if name != 'scipy'} == wanted


def test_versions_are_compared_as_numbers():
    """What follows a plus or stands behind a number does not count."""
    assert numbers('2.11.0+cu130') == (2, 11, 0) > numbers('2.4')
    assert numbers('1.0.31.dev0') == (1, 0, 31)
    assert numbers('2.10.0rc1') > numbers('2.9')


def test_parts_that_measure_no_time_run_side_by_side(monkeypatch):
    """Where each has two cores; what measures time runs alone."""
    monkeypatch.setattr(os, 'cpu_count', lambda: 16)
    names = [[part.name for part in stage] for stage in gpu.stages(PARTS)]
    assert names == [[part.name for part in PARTS[:5]], *([part.name] for part in PARTS[5:])]
    monkeypatch.setattr(os, 'cpu_count', lambda: 8)
    assert all(len(stage) == 1 for stage in gpu.stages(PARTS))


def test_the_images_of_the_loop_suffice_for_its_batch(tmp_path):
    """The loop at its full size finds as many images as a batch of its recipe has."""
    batch = torch.zeros(256, 3, 32, 32), torch.zeros(256, dtype=torch.long)
    loop.prepare(str(tmp_path), 256)
    run = loop.start('taylor', str(tmp_path), loop.Batches(batch, 2), True, torch.device('cpu'))
    assert run.config.batch_size == 256


def test_choice_of_parts():
    """'right' names its five parts, and the order stays that of their worth."""
    assert [part.name for part in choose(['cost', 'right'])] == [
        *(part.name for part in PARTS[:5]), 'cost.eager', 'cost.compiled']
    assert choose(None) == list(PARTS)


class TestRecord:
    @pytest.fixture
    def record(self, tmp_path):
        write_json(tmp_path / 'a.json', {'status': 'running', 'rows': []})
        return Record(tmp_path / 'a.json', time.monotonic() + 100)

    def test_an_exception_becomes_rows(self, record):
        """What a function did not report is an error, and the file has every row."""

        def fails():
            record.near('one', 0.5, 1.0)
            raise ValueError('two lines\nof text')

        record.run(['one', 'two'], fails)
        record.run('three', lambda: None)
        content = json.loads(record.path.read_text())
        assert content['status'] == 'running'
        assert 'raise ValueError' in content['rows'][1].pop('traceback')
        assert content['rows'] == [
            {'name': 'one', 'value': 0.5, 'limit': 1.0, 'ok': True},
            {'name': 'two', 'error': 'ValueError: two lines of text', 'ok': False},
            {'name': 'three', 'error': 'reported nothing', 'ok': False},
        ]

    def test_no_number_is_no_success(self, record):
        """NaN and infinity are more than any limit."""
        for value in (float('nan'), float('inf'), 1.1):
            record.near('one', value, 1.0)
        assert [row['ok'] for row in record.rows] == [False] * 3
        json.loads(record.path.read_text(), parse_constant=lambda text: pytest.fail(text))

    def test_without_time_nothing_is_called(self, record):
        def late():
            raise Late

        record.run('one', lambda: pytest.fail('called'), seconds=101)
        record.run('two', late)
        assert record.rows == [{'name': name, 'absent': 'no time was left'} for name in ('one', 'two')]


def test_documents_say_what_the_results_say():
    """The section of docs/performance.md and the paragraph of the README are made from the committed JSON."""
    contents = gpu_report.read(gpu_report.RESULTS)
    for name, text in (('docs/performance.md', gpu_report.section(contents)),
                       ('README.md', gpu_report.paragraph(contents))):
        assert f'{gpu_report.BEGIN}\n{text}\n{gpu_report.END}' in (ROOT / name).read_text(encoding='utf-8')


def test_report(tmp_path):
    """Ratios, floors, missed figures and what was wrong or left out are told; results of the small mode are refused."""
    timed = dict(ok=None, batch=256, images_s=1000.4, rounds=3)
    rows = [
        {'name': 'se.100%.plain', **timed, 'ratio': 1.0, 'least': 1.0, 'most': 1.0, 'floor': 1.0, 'peak_mib': 20000,
         'memory_ratio': 1.0, 'memory_reached': True},
        {'name': 'se.100%.exact', **timed, 'ratio': 1.5, 'least': 1.375, 'most': 1.625, 'floor': 1.625,
         'memory_ratio': 1.125, 'memory_reached': False, 'target': 1.7875, 'reached': True},
        {'name': 'se.100%.split', **timed, 'ratio': 1.5, 'least': 1.25, 'most': 1.75, 'floor': 1.125,
         'memory_ratio': 1.03125, 'memory_reached': True, 'target': 1.2375, 'reached': False},
        {'name': 'se.100%.taylor', **timed, 'ratio': 1.25, 'least': 1.25, 'most': 1.25, 'rounds': 1, 'floor': 1.0,
         'memory_ratio': 1.0, 'memory_reached': True},
        {'name': 'se.split.profile', 'ok': None, 'milliseconds': {'aten::conv': 12.5}},
    ]
    checks = [
        {'name': 'se.null', 'value': 2e-5, 'limit': 1e-4, 'ok': True},
        {'name': 'se.trace', 'value': 3, 'limit': 0, 'ok': False, 'left': ['exact: bn1.running_mean']},
        {'name': 'se.reward.exact', 'error': 'ValueError: no', 'ok': False},
    ]
    header = dict(
        command='python gpu.py', machine='Some Card; a CPU', cuda='Some Card', commit='abc', date='2026-01-01',
        versions=dict(python='3.12.1', torch='2.11.0', timm='1.0.31'), device='cuda', small=False, status='ended')
    write_json(tmp_path / 'right.float32.json', header | {'rows': checks})
    write_json(tmp_path / 'cost.eager.json', header | {'rows': rows})
    # stopped after a check that failed: it is wrong all the same
    write_json(tmp_path / 'rest.json', header | {'rows': checks[1:2], 'status': 'left out: stopped before its end'})
    contents = gpu_report.read(tmp_path)
    text = gpu_report.section(contents)
    assert text.count('Some Card; a CPU; python 3.12.1, torch 2.11.0, timm 1.0.31; commit abc, 2026-01-01.') == 1
    assert '| right.float32 | 1 of 3 | `se.null`: 2.0e-05, limit 1e-04 |' in text
    assert '| SE-ResNet-50, 256 images | 100% | 1,000 | 1.50 (1.38 to 1.62), floor 1.62 | ' \
           '1.50 (1.25 to 1.75), floor 1.12, missed 1.24 | 1.25 |' in text
    assert '| SE, peak memory | | 20,000 MiB | 1.12, missed 1.05 | 1.03 | 1.00 |' in text
    assert '- `se.split` misses its figure. More a step than plain training: `aten::conv` +12.5 ms.' in text
    assert "- right.float32 se.trace: 3, limit 0; left ['exact: bn1.running_mean']\n" in text
    assert '- right.float32 se.reward.exact: ValueError: no\n' in text
    assert "- rest se.trace: 3, limit 0; left ['exact: bn1.running_mean']\n" in text
    assert '- rest: stopped before its end' in text and '- right.compiled: not run' in text
    paragraph = gpu_report.paragraph(contents)
    assert 'On a GPU (Some Card)' in paragraph and '1 of 4 checks hold' in paragraph
    for wrong in ({'small': True}, {'device': 'cpu'}):
        write_json(tmp_path / 'rest.json', header | {'rows': []} | wrong)
        with pytest.raises(ValueError, match='small mode'):
            gpu_report.read(tmp_path)
    for text in ('{"small": fal', '[]', '{}'):
        (tmp_path / 'rest.json').write_text(text)
        with pytest.raises(ValueError, match='is not of gpu'):
            gpu_report.read(tmp_path)


def test_floors():
    """`taylor` costs least and `exact` most; what `exact` adds follows the share of right samples."""
    for attention in ('se', 'cbam', 'srm'):
        taylor, split, exact = (gpu_floors.read(attention, probe, 1.0) for probe in ('taylor', 'split', 'exact'))
        assert 1 <= taylor < 1.02 < split < exact < 3.5
        assert gpu_floors.read(attention, 'exact', 0.5) == pytest.approx((1 + exact) / 2)
        assert gpu_floors.read(attention, 'split', 0.5) == split
        assert gpu_floors.read(attention, 'plain', 0.5) == 1


def test_relative_output_and_modules_of_others(tmp_path):
    """A relative folder is that of the caller, and modules there, or in the folder of temporary files, are not ours."""
    (tmp_path / 'timm.py').write_text('raise RuntimeError("not ours")\n')
    (tmp_path / 'gpu_parts.py').write_text('raise RuntimeError("not ours")\n')
    done = subprocess.run(
        command('some/where', '--parts', 'loop', '--small', '--device', 'cpu', '--minutes', '2'), cwd=tmp_path,
        env={**os.environ, 'TMPDIR': str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert found_in(tmp_path / 'some' / 'where')['loop']['status'] == 'ended'
