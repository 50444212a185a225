"""What docs and README say of the study is what its committed runs say"""
import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / 'benchmarks'))
import learning

ROOT = Path(__file__).parent.parent
TABLES = sorted((ROOT / 'benchmarks' / 'results' / 'learning').glob('*.json'))
DOCUMENTS = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def table_of(path):
    """A committed table as it is, and its rows by form and weight, computed again from its runs."""
    found = json.loads(path.read_text())
    settings = found['settings']
    seeds = range(settings['first_seed'], settings['first_seed'] + settings['seeds'])
    rows = learning.table(learning.read(path.with_suffix(''), settings, seeds))
    return found, {(row['form'], row['weight']): row for row in rows}


@pytest.mark.parametrize('path', TABLES, ids=lambda path: path.stem)
def test_a_table_is_that_of_its_runs(path):
    """Every row of a committed table is computed again from the files of its runs."""
    found, rows = table_of(path)
    assert len(found['rows']) == len(rows) > 1
    for row in found['rows']:
        again = rows[row['form'], row['weight']]
        assert row.keys() == again.keys()
        for key, value in row.items():
            assert value == (pytest.approx(again[key], rel=1e-9) if isinstance(value, float) else again[key]), key


def test_printed_lines_are_those_of_the_runs():
    """A block of a document that shows a study's command shows the lines that it prints."""
    known = {learning.tell(row).rstrip() for path in TABLES for row in table_of(path)[1].values()}
    shown = 0
    for document in DOCUMENTS:
        text = document.read_text()
        for block in re.findall(r'```\n\$ python benchmarks/learning.py .*?\n(.*?)```', text, re.DOTALL):
            lines = [line for line in block.splitlines() if re.search(r'% in +\d+ s, \d+ seeds', line)]
            assert lines, block
            assert not [line for line in lines if line not in known]
            shown += len(lines)
    assert shown


def test_tables_are_those_of_the_runs():
    """A difference to plain training in a table of a document is one of the runs, to its last digit."""
    known = {
        (row['form'], f"{row['minus_plain']:+.2f} +- {row['minus_plain_95']:.2f}")
        for path in TABLES for row in table_of(path)[1].values() if 'minus_plain' in row}
    text = (ROOT / 'docs' / 'evidence.md').read_text()
    told = re.findall(r'^\| `([^`]+)` \| ([+-]\d+\.\d\d \+- \d+\.\d\d) \|', text, re.MULTILINE)
    assert len(told) >= 20
    assert not [row for row in told if row not in known]


@pytest.mark.parametrize('document', ['README.md', 'docs/evidence.md'])
def test_the_answer_is_that_of_the_runs(document):
    """The table of the primary comparison, a row for each attention."""
    told = re.findall(r'^\| (SE|CBAM|SRM) \| (.*?) \|$', (ROOT / document).read_text(), re.MULTILINE)
    assert [attention for attention, _ in told] == ['SE', 'CBAM', 'SRM']
    for attention, cells in told:
        _, rows = table_of(ROOT / 'benchmarks' / 'results' / 'learning' / f'primary-{attention.lower()}.json')
        chosen = rows['direct-log-full', None]
        differences = [
            f"{chosen[f'minus_{other}']:+.2f} +- {chosen[f'minus_{other}_95']:.2f}" for other in ('plain', 'shuffled')]
        assert cells.split(' | ') == [f"{rows['plain', None]['top1']:.2f}", *differences, str(chosen['seeds'])]
