"""What a key of a recipe is: a name, a type, a default, and the values that are accepted"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ['Key', 'convert']


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
    if isinstance(value, (bool, dict, list)):
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


_TYPES: dict[str, tuple[Callable[[Any], Any], str]] = {
    'bool': (_bool, 'true or false'),
    'int': (_int, 'a whole number'),
    'float': (_float, 'a number'),
    'str': (_str, 'a text'),
    'dict': (_dict, 'a mapping'),
    'ints': (_list(_int), 'a list of whole numbers'),
    'floats': (_list(_float), 'a list of numbers'),
    'strs': (_list(_str), 'a list of texts'),
    'rotate': (_rotate, "'epoch', 'step' or a whole number"),
}


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        name: The key.
        type: Its type, a name in the table of types.
        default: Its value where the recipe has none; None is allowed as a value where it is the default.
        help: What it means.
        nullable: Whether null is a value of its own, and not the default.
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


def convert(key: Key, value: Any, where: str = '') -> Any:
    """Return the value in the type of the key; texts that are numbers (YAML reads 1e-4 as text) become numbers.

    Raises:
        ValueError: The value has another type, or is not accepted.
    """
    if value is None and (key.default is None or key.nullable):
        return None
    function, expected = _TYPES[key.type]
    try:
        converted = function(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f'{where}{key.name}: expected {expected}, got {value!r}.') from None
    values = converted if isinstance(converted, list) else [converted]
    problem = ''
    if key.length is not None and len(values) != key.length:
        problem = f'expected {key.length} values'
    elif key.minimum is not None and not all(number >= key.minimum for number in values):
        problem = f'must be {key.minimum} or more'
    elif key.maximum is not None and not all(number <= key.maximum for number in values):
        problem = f'must be {key.maximum} or less'
    elif key.choices and converted not in key.choices:
        problem = f'expected one of {", ".join(repr(choice) for choice in key.choices)}'
    if problem:
        raise ValueError(f'{where}{key.name}: {problem}, got {value!r}.')
    return converted
