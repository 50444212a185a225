"""Numbers of identities and cameras by what data sets call them"""
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

__all__ = ['check_spelling', 'numbers_of', 'read_number']


def read_number(name: str) -> int | None:
    """A number as it stands in a table, which some write as 7.0; None for a name."""
    match = re.fullmatch(r'(-?\d{1,18})(?:\.0*)?', name)
    return None if match is None else int(match[1])


def _meaning(name: str) -> str:
    """What other spellings of a name or a number have in common with it."""
    number = read_number(name)
    if number is not None:
        return str(number)
    digits = re.fullmatch(r'0*(\d+)(?:\.0*)?', name)  # beyond an integer of 64 bits
    return digits[1] if digits else unicodedata.normalize('NFC', name)


def check_spelling(names: Iterable[str], what: str, root: Path) -> None:
    """Raise a ValueError if one number, or one name, is written in two ways: are 7 and 007 one person or two?"""
    known: dict[str, str] = {}
    for name in sorted(set(names)):
        first = known.setdefault(_meaning(name), name)
        if first != name:
            raise ValueError(
                f"'{root}': {what} {first!a} is also written {name!a}: write what is one in one way, and "
                'give what is not another name.')


def numbers_of(names: set[str], first: int, reserved: tuple[int, ...] = ()) -> dict[str, int]:
    """The number of each name: its own where all are numbers; among names, only of those that are reserved."""
    read = {name: read_number(name) for name in names}
    if all(number is not None for number in read.values()):
        return {name: number for name, number in read.items() if number is not None}
    known = {name: number for name, number in read.items() if number in reserved and number is not None}
    others = sorted(names - known.keys())
    return {**known, **{name: number for number, name in enumerate(others, first)}}
