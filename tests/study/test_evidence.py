"""What docs and README say of the study is what its committed runs say"""
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
from study import jsonl, learning

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / 'benchmarks' / 'results'
TABLES = sorted((RESULTS / 'learning').glob('*.json'))
DOCUMENTS = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
EVIDENCE, PERFORMANCE = ((ROOT / 'docs' / name).read_text() for name in ('evidence.md', 'performance.md'))
# rows of the table of the signal, and what reward_signal.py calls them
SIGNAL = {
    'gain of a map, right images: mean': 'mean',
    'its standard deviation': 'sd',
    'share of its variance that belongs to the image, over augmented views': 'icc',
    "share of the reward's variance that right or wrong alone explains": 'penalty_share',
    'critic: R^2 over right images (a constant has 0)': 'critic_r2',
    'critic: rank correlation over right images': 'critic_rank',
    'critic: R^2 over all images': 'critic_r2_all',
}
DIRECTIONS = {
    'L_q': 'actor', 'a random direction': 'random', 'the first-order reward': 'direct', 'L_c': 'class',
    "that of the chosen form, all images' log-likelihood": 'log', 'the same, shuffled': 'shuffled'}


def runs_of(path, seeds=None):
    """The runs of a committed table, or those of some seeds."""
    return learning.read(path.with_suffix('.jsonl'), json.loads(path.read_text())['settings'], seeds)


def rows_of(path, seeds=None):
    """Rows of a committed table by form and weight, computed again from its runs, or from those of some seeds."""
    return {(row['form'], row['weight']): row for row in learning.table(runs_of(path, seeds))}


def signal_of(form, seed):
    """What the committed training of a form and a seed showed after its epochs."""
    trainings = jsonl.read(RESULTS / 'signal-fashion-se.jsonl')
    (rows,) = [t['rows'] for t in trainings if (t['settings']['form'], t['settings']['seed']) == (form, seed)]
    return rows


def table_of(command):
    """The committed table that a study's command writes."""
    words = shlex.split(command, comments=True)
    attention = words[words.index('--attention') + 1] if '--attention' in words else 'se'
    return RESULTS / 'learning' / f'{words[2]}-{attention}.json'


def seeds_of(command):
    """First and last seed that a command's table is of, where it says so."""
    found = re.search(r'--seed-range (\d+) (\d+)', command)
    return [int(number) for number in found.groups()] if found else None


def difference(row, other):
    """A difference as documents write it, or nothing where there is none."""
    return f"{row[f'minus_{other}']:+.2f} +- {row[f'minus_{other}_95']:.2f}" if f'minus_{other}' in row else ''


def cells_of(line):
    return [cell.strip() for cell in line.strip().strip('|').split('|')]


@pytest.mark.parametrize('path', TABLES, ids=lambda path: path.stem)
def test_a_table_is_that_of_its_runs(path):
    """Every row of a committed table is computed again from the lines of its runs."""
    found, rows = json.loads(path.read_text()), rows_of(path)
    assert len(found['rows']) == len(rows) > 1
    for row in found['rows']:
        again = rows[row['form'], row['weight']]
        assert row.keys() == again.keys()
        for key, value in row.items():
            assert value == (pytest.approx(again[key], rel=1e-9) if isinstance(value, float) else again[key]), key


def test_printed_lines_are_those_of_the_runs():
    """A block of a document that shows a study's command shows lines that this command prints."""
    shown = 0
    for document in DOCUMENTS:
        blocks = re.findall(
            r'```\n\$ (python benchmarks/study/learning.py .*?)\n(.*?)```', document.read_text(), re.DOTALL)
        for command, block in blocks:
            known = {learning.tell(row).rstrip() for row in rows_of(table_of(command), seeds_of(command)).values()}
            lines = [line for line in block.splitlines() if re.search(r'% in +\d+ s, \d+ seeds', line)]
            assert lines, block
            assert not [line for line in lines if line not in known]
            shown += len(lines)
    assert shown >= 15


def test_tables_of_forms_are_those_of_the_runs():
    """The tables of all forms, each below the command that prints it: every cell, and every form of the study."""
    parts = re.findall(
        r'^`(python benchmarks/study/learning\.py [^`]*)`.*\n\n((?:\|.*\n)+)', EVIDENCE, re.MULTILINE)
    assert parts
    for command, table in parts:
        rows = {form: row for (form, _), row in rows_of(table_of(command)).items()}
        order = [row['form'] for row in json.loads(table_of(command).read_text())['rows']]
        told = [cells_of(line) for line in table.splitlines()[2:]]
        assert [form for form, *_ in told] == [f'`{form}`' for form in order]
        for form, *cells in told:
            row = rows[form.strip('`')]
            assert cells == [
                difference(row, 'plain'), difference(row, 'shuffled'), f"{100 * row['saturated']:.0f}",
                f"{row['seconds']:.0f}"], form


def test_the_earlier_study_is_that_of_its_runs():
    """The differences of docs/performance.md, a row for each form and a column for each weight."""
    rows = rows_of(RESULTS / 'learning' / 'small-se.json')
    table = re.search(r'^\| \| seconds \| 0.03 .*\n.*\n((?:\|.*\n)+)', PERFORMANCE, re.MULTILINE)[1]
    forms = ('literal', 'split', 'taylor', 'taylor/shuffled')
    for form, line in zip(forms, table.splitlines(), strict=True):
        assert cells_of(line)[2:] == [difference(rows[form, weight], 'plain') for weight in (0.03, 0.1, 0.3, 1.0)]


@pytest.mark.parametrize('document', ['README.md', 'docs/evidence.md'])
def test_the_answer_is_that_of_the_runs(document):
    """The table that both begin with: the primary comparison, a row for each attention, and what stands beside it."""
    told = re.findall(r'^\| (SE|CBAM|SRM) \| `(.*?)`.*? \| (.*) \|$', (ROOT / document).read_text(), re.MULTILINE)
    assert [(attention, form) for attention, form, _ in told[:3]] == [
        (attention, 'direct-log-full') for attention in ('SE', 'CBAM', 'SRM')]
    assert len(told) == 6
    for attention, form, cells in told:
        row = rows_of(RESULTS / 'learning' / f'primary-{attention.lower()}.json')[form, None]
        assert cells_of(cells) == [difference(row, 'plain'), difference(row, 'shuffled'), str(row['seeds'])]


@pytest.mark.parametrize('document', ['README.md', 'docs/evidence.md'])
def test_what_is_said_of_all_images(document):
    """Both say what fresh seeds have, and what time is worth there."""
    fresh = rows_of(RESULTS / 'learning' / 'full-se.json')['direct-log-full', None]
    longer = rows_of(RESULTS / 'learning' / 'all-se.json')['plain*1.3', None]
    words = ' '.join((ROOT / document).read_text().split())
    assert f"With all 60,000 images it leans to a gain, {difference(fresh, 'plain')} to plain training and " \
           f"{difference(fresh, 'shuffled')} to its control ({fresh['seeds']} fresh seeds)" in words
    assert f"plain training with its time gains {difference(longer, 'plain')} ({longer['seeds']} seeds)" in words


def test_all_images_together():
    """The difference over the seeds of both studies of all images, which no command prints."""
    runs = [run for name in ('all-se', 'full-se') for run in runs_of(RESULTS / 'learning' / f'{name}.json')]
    row = next(row for row in learning.table(runs) if row['form'] == 'direct-log-full')
    assert f"the {row['minus_plain_seeds']} are at {difference(row, 'plain')} and {difference(row, 'shuffled')}" in (
        ' '.join(EVIDENCE.split()))


def test_tables_of_the_signal_are_those_of_its_trainings():
    """Every number of what the reward says and the critic knows, and of the steps along each direction."""
    commands = re.findall(r'^`python benchmarks/study/reward_signal.py --form (\S+)`', EVIDENCE, re.MULTILINE)
    parts = re.split(r'^`python benchmarks/study/reward_signal.py --form \S+`', EVIDENCE, flags=re.MULTILINE)[1:]
    assert commands[0] == 'split'
    numbers = 0
    for form, part in zip(commands, parts, strict=True):
        after = signal_of(form, 0)
        for line in part.split('\n#')[0].splitlines():
            label, *cells = cells_of(line)
            if label in SIGNAL:
                values = [[group[SIGNAL[label]]] for group in after[-1]['groups']]
                texts = [[cell] for cell in cells]
            elif label in DIRECTIONS and line.startswith('|'):
                values = [
                    [statistics.mean(push['steps'][DIRECTIONS[label]][where][key] for push in row['pushes'])
                     for row in after]
                    for key in ('gain', 'loss') for where in ('same', 'new')]
                texts = [cell.split(', ') for cell in cells]
            else:
                continue
            for told, true in zip(texts, values, strict=True):
                for text, value in zip(told, true, strict=True):
                    digits = len(text.partition('.')[2])
                    assert float(text) == pytest.approx(value, abs=0.501 * 10 ** -digits), (label, text)
                    numbers += 1
    assert numbers >= 28 + 6 * 12 + 16 + 6 * 12


def test_ranks_of_three_trainings_are_theirs():
    """How the critic of each form orders gains, a number for each of three seeds, also where p is held fixed."""
    keys = {
        'with the gain': 'critic_rank', 'p with the gain': 'p_rank', 'with the gain, given p': 'critic_rank_given_p'}
    told = re.findall(r'^\| `(\S+)`, ((?:p )?with the gain.*?) \| (.*) \|$', EVIDENCE, re.MULTILINE)
    assert sorted((form, label) for form, label, _ in told) == sorted(
        (form, label) for form in ('split', 'capacity-inputs-share') for label in keys)
    for form, label, cells in told:
        trainings = [signal_of(form, seed) for seed in range(3)]
        assert [rows[-1]['epoch'] for rows in trainings] == [5, 5, 5]
        groups = zip(*(rows[-1]['groups'] for rows in trainings), strict=True)
        assert cells_of(cells) == [', '.join(f'{group[keys[label]]:.2f}' for group in stage) for stage in groups]


def test_steps_of_three_trainings_are_theirs():
    """The gain in standard deviations before a step and how it changes, a number for each of three seeds."""
    told = re.findall(r'^\| `(\S+)`, (before a step|along .*?) \| (.*) \|$', EVIDENCE, re.MULTILINE)
    assert len(told) == 2 * 5
    for form, label, cells in told:
        trainings = [signal_of(form, seed) for seed in range(3)]
        for where, cell in zip(('same', 'new'), cells_of(cells), strict=True):
            texts = []
            for rows in trainings:
                pushes = rows[-1]['pushes']
                if label == 'before a step':
                    texts.append(f"{statistics.mean(push['before'][where]['scaled'] for push in pushes):.2f}")
                else:
                    steps = [push['steps'][DIRECTIONS[label.removeprefix('along ')]][where] for push in pushes]
                    texts.append(f"{statistics.mean(step['scaled'] for step in steps):+.3f}")
            assert cell == ', '.join(texts), (form, label)
