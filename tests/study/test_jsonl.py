"""Runs in lines: several processes add to one file, and half a line is no run"""
from multiprocessing import get_context

import pytest
from study import jsonl


def add_lines(path, writer):
    for number in range(50):
        jsonl.append(path, {'writer': writer, 'number': number, 'padding': 'x' * 3000})


def test_processes_add_lines_together(tmp_path):
    """Four processes that add to one file lose no run, and leave each in one piece."""
    path = tmp_path / 'new' / 'runs.jsonl'
    processes = [get_context('fork').Process(target=add_lines, args=(path, writer)) for writer in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = [(run['writer'], run['number']) for run in jsonl.read(path)]
    assert sorted(found) == [(writer, number) for writer in range(4) for number in range(50)]


def test_half_a_line(tmp_path):
    """What a killed process left at the end is no run, and goes when the next one is added; one within is an error."""
    path = tmp_path / 'runs.jsonl'
    assert jsonl.read(path) == []
    jsonl.append(path, {'seed': 0})
    with path.open('a') as file:
        file.write('{"seed": 1, "top')
    assert jsonl.read(path) == [{'seed': 0}]
    jsonl.append(path, {'seed': 2})
    assert path.read_text() == '{"seed": 0}\n{"seed": 2}\n'
    path.write_text('{"seed": 3\n{"seed": 4}\n')
    with pytest.raises(ValueError, match='delimiter'):
        jsonl.read(path)
