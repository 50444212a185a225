"""Names of files on a terminal: control characters are seen, and do nothing"""
import json
import logging

import pytest

from dreal_timm.cli import main
from dreal_timm.errors import WeightsError, one_line, printable

NAME = 'a\x1b[31mb\x07\x9bc\u202ed\udcff'
SHOWN = r'a\x1b[31mb\x07\x9bc\u202ed\udcff'


def test_printable():
    """What a terminal shows stays, as accents and emoji do; all else is its escape, but for what is kept."""
    assert printable(NAME) == SHOWN
    assert printable('Zürich 東京 \U0001f600') == 'Zürich 東京 \U0001f600'
    assert printable('a\nb\tc\r') == r'a\nb\tc\r'
    assert printable('a\nb\tc\r', keep='\n\t') == 'a\nb\tc\\r'


@pytest.mark.parametrize('error', [ValueError, WeightsError, KeyError, RuntimeError, FileNotFoundError])
def test_one_line(error):
    """An error is a line of visible characters, of whatever class it is."""
    line = one_line(error(f"No file '{NAME}'.\nSee there."))
    assert line.isprintable() and SHOWN in line.replace('\\\\', '\\')


def test_commands(tmp_path, capsys, monkeypatch):
    """Names of files are seen in errors, in what is printed, and in messages."""
    name = NAME.removesuffix('\udcff')
    folder = tmp_path / name
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps({'architecture': name}))
    assert main(['inspect', str(folder)]) == 2
    assert main(['recipes', '--copy', 'quickstart', '--to', str(folder)]) == 0
    handlers = logging.getLogger().handlers
    monkeypatch.setattr(logging.getLogger(), 'handlers', [])  # those of pytest
    main(['recipes'])
    logging.getLogger('dreal_timm.data').warning('unreadable: %s\nand another', name)
    logging.getLogger().handlers = handlers
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert SHOWN.removesuffix(r'\udcff') in text
        assert all(line.isprintable() for line in text.splitlines())
    assert shown.err.endswith('\nand another\n')
