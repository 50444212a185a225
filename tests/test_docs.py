"""What the documents show runs, and what they list is so"""
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import timm
import torch
from reid.pictures import market

from dreal_timm.attention.readers import READERS
from dreal_timm.config import DrealConfig
from dreal_timm.hub import export
from dreal_timm.train.settings import list_keys

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf'```{language}\n(.*?)```', text, flags=re.DOTALL)


def test_loop_of_the_readme(tmp_path, monkeypatch):
    """The plain loop of the first screen trains, and saves a network without a critic."""
    monkeypatch.chdir(tmp_path)
    loader = [(torch.randn(4, 3, 64, 64), torch.randint(10, (4,)))]
    exec(blocks(README, 'python')[0], {'epochs': 2, 'loader': loader})
    state = torch.load('model.pth', weights_only=True)
    assert state
    assert not any('critic' in name for name in state)


def test_eight_lines_of_the_readme(tmp_path):
    """Each line of the section Share runs as it stands: train, export, push (dry run), load.

    What stands for `dreal-timm` trains a quarter of the channels for four epochs, which learns digits as well.
    """
    small = '"model_kwargs={zero_init_last: false, channels: [16, 32, 64, 128]}" epochs=4'
    section = README[README.index('## Share'):]
    lines = blocks(section, 'bash')[0].splitlines()
    assert len(lines) == 8
    if tuple(int(part) for part in torch.__version__.split('.')[:2]) < (2, 6):
        lines = [line for line in lines if '--format onnx' not in line]
    commands = tmp_path / 'bin'
    commands.mkdir()
    for name, script in (
            ('dreal-timm', f'test "$1" != train || set -- "$@" {small}\nexec {sys.executable} -m dreal_timm "$@"'),
            ('python', f'exec {sys.executable} "$@"')):
        (commands / name).write_text(f'#!/bin/sh\n{script}\n')
        (commands / name).chmod(0o755)
    paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = {
        **os.environ, 'PATH': f"{commands}{os.pathsep}{os.environ['PATH']}", 'PYTHONPATH': os.pathsep.join(paths),
        'HF_HUB_OFFLINE': '1'}
    printed = []
    for line in lines:
        done = subprocess.run(
            ['sh', '-c', line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stderr[-1000:])
        printed.append(done.stdout)
    assert 'nothing was sent' in printed[5]
    assert printed[6] == '10 classes\n'
    card = (tmp_path / 'weights' / 'README.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| (?:this network|plain, the same settings) \| (\d+\.\d+) ', card, re.MULTILINE)
    assert len(rows) == 2
    assert min(map(float, rows)) > 95


def test_example_of_another_attention(capsys):
    """The example of docs/method.md registers a class and finds its site."""
    before = dict(READERS)
    try:
        exec(blocks((ROOT / 'docs' / 'method.md').read_text(encoding='utf-8'), 'python')[0], {})
    finally:
        READERS.clear()
        READERS.update(before)
    assert "Site(name='1', kind='channel'" in capsys.readouterr().out


def test_table_of_the_readme(monkeypatch, capsys):
    """The table of models is what its command prints."""
    monkeypatch.setattr(sys, 'argv', ['benchmarks/model_table.py'])
    runpy.run_path(str(ROOT / 'benchmarks' / 'model_table.py'), run_name='__main__')
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    assert len(rows) == 17
    assert [row for row in rows if row not in README] == []


def test_list_of_options():
    """docs/options.md lists what `dreal-timm recipes --keys` prints: every key, with its default and its meaning."""
    assert blocks((ROOT / 'docs' / 'options.md').read_text(encoding='utf-8'), 'text') == ['\n'.join(list_keys()) + '\n']


def test_options_of_the_readme():
    """The options that the README names are there, with these defaults."""
    options = README[README.index('### Options'):README.index('## What it costs')]
    rows = re.findall(r'^\| `(\w+)` \| `?([\w.]+)`? \|', options, re.MULTILINE)
    assert len(rows) == 6
    for name, default in rows:
        assert str(getattr(DrealConfig(), name)) == default
    assert 'dreal.enabled=false' in README


def test_files_that_are_named_exist():
    """Every file and link that the documents name is there."""
    for path in [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]:
        text = path.read_text(encoding='utf-8')
        for link in re.findall(r'\]\((?!http)([^)#]+)\)', text) + re.findall(r'python (benchmarks/[\w/]+\.py)', text):
            assert (path.parent / link).exists() or (ROOT / link).exists(), link


def test_no_placeholder_is_left():
    """No word that stands for a number to come is left in the documents."""
    for path in [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]:
        assert not re.search(r'\b(TABLE|COST|QUICK|FASHION|TODO|TBD)\b', path.read_text(encoding='utf-8')), path


def test_every_test_says_its_rule():
    """Every test has a docstring."""
    for path in (ROOT / 'tests').rglob('test_*.py'):
        for body in re.findall(r'^def test_\w+\(.*?\):\n(.*)$', path.read_text(encoding='utf-8'), flags=re.MULTILINE):
            assert body.strip().startswith('"""'), (path.name, body)


def test_python_of_the_reid_document(tmp_path, monkeypatch):
    """The lines from Python run as they stand, on a small data set and without pretrained weights."""
    text = (ROOT / 'docs' / 'reid.md').read_text(encoding='utf-8')
    market(tmp_path / 'market1501', {
        'bounding_box_train': [(pid, 1, 1) for pid in range(100, 116)], 'query': [(1, 1, 1)],
        'bounding_box_test': [(1, 2, 2), (3, 1, 2)]})
    model = timm.create_model('dreal_reid', backbone='test_resnet')
    export(model, tmp_path / 'output' / 'train' / 'market')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('dreal_timm.hub.load_backbone', lambda model, source: model.layer1.get_submodule('0'))
    names = {
        'query': torch.randn(5, 8), 'gallery': torch.randn(30, 8), 'query_pids': torch.arange(5) % 3,
        'gallery_pids': torch.arange(30) % 3, 'query_camids': torch.zeros(5, dtype=torch.int64),
        'gallery_camids': torch.ones(30, dtype=torch.int64)}
    exec(blocks(text, 'python')[0], names)
    assert names['results']['queries'] == 1
    assert names['criterion'].triplet.margin == 0.5
    assert len(names['sampler']) == 1
