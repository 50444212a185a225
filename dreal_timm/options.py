"""Options: the fields of a dataclass, each with its default, the values that it accepts and what it means"""
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

__all__ = ['Option', 'check_options', 'convert', 'option', 'options_of']


def _bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ('true', 'false', 'yes', 'no', 'on', 'off'):
        return value.lower() in ('true', 'yes', 'on')
    if not isinstance(value, bool):
        raise ValueError
    return value


def _int(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _str(value: Any) -> str:
    if value is None or isinstance(value, (bool, dict, list)):
        raise ValueError
    return str(value)


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return dict(value)


def _rotate(value: Any) -> str | int:
    return value if value in ('epoch', 'step') else _int(value)


def _list(of: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    def convert_list(value: Any) -> list[Any]:
        return [of(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    return convert_list


# by annotation, without `None`
_TYPES: dict[Any, tuple[str, Callable[[Any], Any], str]] = {
    bool: ('bool', _bool, 'true or false'),
    int: ('int', _int, 'a whole number'),
    float: ('float', _float, 'a number'),
    str: ('str', _str, 'a text'),
    dict[str, Any]: ('dict', _dict, 'a mapping'),
    list[int]: ('ints', _list(_int), 'a list of whole numbers'),
    list[float]: ('floats', _list(_float), 'a list of numbers'),
    list[str]: ('strs', _list(_str), 'a list of texts'),
    str | int: ('rotate', _rotate, "'epoch', 'step' or a whole number"),
}
_CONVERSIONS = {name: (function, expected) for name, function, expected in _TYPES.values()}


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: Name of the field.
        type: Name of its type: 'bool', 'int', 'float', 'str', 'dict', 'ints', 'floats', 'strs' or 'rotate'.
        default: Its value where none is given.
        help: What it means.
        nullable: Whether None is a value of its own.
        minimum: Smallest number that is accepted.
        maximum: Largest number that is accepted.
        length: Number of values of a list.
        choices: The texts that are accepted, where not every one is.
    """
    name: str
    type: str
    default: Any
    help: str
    nullable: bool = False
    minimum: float | None = None
    maximum: float | None = None
    length: int | None = None
    choices: tuple[str, ...] = ()


def option(default: Any, help: str, **limits: Any) -> Any:
    """Return a field of a dataclass of options.

    Args:
        default: Its default; a list or mapping is copied.
        help: What it means.
        **limits: `minimum`, `maximum`, `length` or `choices`, see `Option`.
    """
    metadata = {'help': help, **limits}
    if isinstance(default, (dict, list)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(cls: type) -> list[Option]:
    """Return the options of a dataclass, those of its bases first; fields that are no options are left out."""
    hints = get_type_hints(cls)
    return [_option(each, hints[each.name]) for each in fields(cls) if 'help' in each.metadata]


def _option(each: Field[Any], hint: Any) -> Option:
    members = get_args(hint) if NoneType in get_args(hint) else ()
    if members:
        rest = [member for member in members if member is not NoneType]
        hint = rest[0]
        for member in rest[1:]:
            hint = hint | member
    default = each.default if each.default_factory is MISSING else each.default_factory()
    return Option(each.name, _TYPES[hint][0], default, nullable=bool(members), **each.metadata)


def convert(option: Option, value: Any, where: str = '') -> Any:
    """Return the value in the type of the option; texts that are numbers (YAML reads 1e-4 as text) become numbers.

    Args:
        option: The option.
        value: A value for it.
        where: What stands before its name in an error, such as 'dreal.'.

    Raises:
        ValueError: The value has another type, or is not accepted.
    """
    if value is None and (option.nullable or option.default is None):
        return None
    function, expected = _CONVERSIONS[option.type]
    try:
        converted = function(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f'{where}{option.name}: expected {expected}, got {value!r}.') from None
    values = converted if isinstance(converted, list) else [converted]
    problem = ''
    if option.length is not None and len(values) != option.length:
        problem = f'expected {option.length} values'
    elif option.minimum is not None and not all(
            isinstance(number, str) or number >= option.minimum for number in values):
        problem = f'must be {option.minimum} or more'
    elif option.maximum is not None and not all(number <= option.maximum for number in values):
        problem = f'must be {option.maximum} or less'
    elif option.choices and converted not in option.choices:
        accepted = [*map(repr, option.choices), *(['None'] if option.nullable else [])]
        problem = f'expected one of {", ".join(accepted)}'
    if problem:
        raise ValueError(f'{where}{option.name}: {problem}, got {value!r}.')
    return converted


def check_options(instance: Any, where: str = '') -> None:
    """Convert the values of a dataclass of options in place, to be called by its `__post_init__`.

    Raises:
        ValueError: A value has another type, or is not accepted.
    """
    for each in options_of(type(instance)):
        object.__setattr__(instance, each.name, convert(each, getattr(instance, each.name), where))
