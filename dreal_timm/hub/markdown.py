"""Values of files in the text of a card: what they say, and no markup of their own"""
import re
from typing import Any

from dreal_timm.errors import printable

__all__ = ['code', 'escape', 'plain']

_LONGEST = 300  # characters of a value
_CODE = str.maketrans({'`': "'", '|': r'\|', '<': '&lt;', '>': '&gt;'})
_ENTITIES = str.maketrans({'&': '&amp;', '<': '&lt;', '>': '&gt;'})


def plain(value: Any) -> str:
    """Return a value as a line of visible characters."""
    return printable(' '.join(str(value)[:_LONGEST].split()))


def code(value: Any) -> str:
    """Return a value as a span of code, for Markdown."""
    return f"`{plain(value).translate(_CODE) or ' '}`"


def escape(value: Any) -> str:
    """Return a value for Markdown, cells of tables included, where it stands for itself: no HTML, emphasis or link."""
    text = plain(value)
    if re.search(r'://|www\.|@', text):  # what renderers turn into a link, escaped or not
        return code(value)
    text = re.sub(r'([\\`*\[\]#!|~{}$])', r'\\\1', text.translate(_ENTITIES))
    return re.sub(r'(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])', r'\\_', text)
