"""Recipes: where they are found, and how one becomes a configuration"""
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml

import dreal_timm
from dreal_timm.errors import nearest, reason
from dreal_timm.options import convert, options_of
from dreal_timm.train.settings import LEFT, NOT_SUPPORTED, DrealBlock, TrainConfig, blocks_of, dotted_options

__all__ = ['find_recipe', 'list_recipes', 'load_config', 'read_recipe', 'to_dict']

_Block = TypeVar('_Block')
_BLOCKS = {'dreal', *blocks_of(DrealBlock)}  # which may stand without a key in them
_MOVED = {
    **{f'dreal.{key.name}': name for name, key in dotted_options(DrealBlock, 'dreal.').items()
       if name.count('.') == 2 and key.name != 'private'},
    'dreal.push_private': 'dreal.hub.private',
}


def _recipe_dir() -> Path:
    package = Path(dreal_timm.__file__).parent
    installed = package / 'recipes'  # in a wheel
    return installed if installed.is_dir() else package.parent / 'recipes'  # in a checkout


def list_recipes() -> dict[str, Path]:
    """Return the recipes of the package by their names."""
    return {path.stem: path for path in sorted(_recipe_dir().glob('*.yaml'))}


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe, given as a path or as the name of one of ours.

    Raises:
        FileNotFoundError: There is none.
    """
    if Path(name).is_file():
        return Path(name)
    recipes = list_recipes()
    if str(name) in recipes:
        return recipes[str(name)]
    raise FileNotFoundError(
        f"No recipe '{name}'{nearest(str(name), recipes)}: neither a file nor one of {', '.join(recipes)}.")


class _SettingError(yaml.constructor.ConstructorError):
    """A key that stands twice, or has no value."""


class _Loader(yaml.SafeLoader):
    """YAML's, which takes the last of two keys of one name, and nothing for null, without these two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, value in node.value:
            name = getattr(key, 'value', None)
            if isinstance(name, str) and name in seen and key.tag != 'tag:yaml.org,2002:merge':
                raise _SettingError(problem=f"key '{name}' stands twice", problem_mark=key.start_mark)
            seen.add(name if isinstance(name, str) else None)
            if isinstance(value, yaml.ScalarNode) and value.value == '' and value.style is None and name not in _BLOCKS:
                raise _SettingError(
                    problem=f"key '{name}' has no value: write null, or '' for an empty text",
                    problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _load(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Raises:
        ValueError: It is no YAML file of keys and values, or a key stands twice or has no value; with the line.
    """
    try:
        values = _load(path.read_text(encoding='utf-8'))
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is no YAML file: {str(error).splitlines()[0]}') from None
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        where = '' if mark is None else f', line {mark.line + 1}'
        why = getattr(error, 'problem', None) or reason(error)
        raise ValueError(f'{path}{where}: {why}.') from None
    if not isinstance(values, dict):
        raise ValueError(f'{path} holds no keys and values.')
    return values


def _parse(text: str, setting: str) -> Any:
    try:
        return _load(text)
    except _SettingError as error:
        raise ValueError(f"'{setting}': {error.problem}.") from None
    except yaml.YAMLError:
        return text


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """['dreal.enabled=false', 'epochs=3'] -> {'dreal': {'enabled': False}, 'epochs': 3}."""
    values: dict[str, Any] = {}
    known = dotted_options()
    for override in overrides:
        name, equals, text = override.partition('=')
        if not equals or not name:
            raise ValueError(f"Expected key=value, got '{override}'.")
        if name.startswith('dreal.'):
            _check_moved([name.removeprefix('dreal.')])
        is_text = name in known and known[name].type == 'str'
        if not text.strip() and not is_text:
            raise ValueError(f"'{override}' has no value; {name}=null is the default.")
        value = text if is_text and text != 'null' else _parse(text, override)
        *parents, leaf = name.split('.')
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"'{override}': {parent} is given a value of its own as well.")
        target[leaf] = value
    return values


def _merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in override.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _asks_for_nothing(value: Any) -> bool:
    return value is None or value is False or value in ('', [], {})


def _check_moved(names: Iterable[str]) -> None:
    """Raise a ValueError about all keys of `dreal:` that stand elsewhere now."""
    names = list(names)
    moved = [f"Key 'dreal.{name}' moved to {_MOVED[f'dreal.{name}']}." for name in names if f'dreal.{name}' in _MOVED]
    left = [f"Key 'dreal.{name}' left the product; benchmarks/study has it." for name in names if name in LEFT]
    if moved or left:
        raise ValueError(' '.join([*moved, *left]))


def _check_keys(values: Any, cls: type, where: str = '', lenient: bool = False) -> None:
    """Raise a ValueError about a key that a block, or a block in it, does not have."""
    if not isinstance(values, dict):
        raise ValueError(f'{where[:-1]}: expected a mapping, got {values!r}.')
    blocks = blocks_of(cls)
    known = [*(each.name for each in options_of(cls)), *blocks]
    for name, value in values.items():
        if name in blocks:
            _check_keys({} if value is None else value, blocks[name], f'{where}{name}.')
        # timm writes all of its keys into args.yaml: those without a value, or with timm's own, ask for nothing
        if name in known or (lenient and _asks_for_nothing(value)):
            continue
        if where == 'dreal.':
            _check_moved(values)
        if not where and name in NOT_SUPPORTED:
            default, instead = NOT_SUPPORTED[name]
            if value == default:
                continue
            raise ValueError(f"Key '{name}' of timm's train.py is not supported (got {value!r}): {instead}.")
        raise ValueError(f"Unknown key '{where}{name}'{nearest(str(name), known)}.")


def _build(cls: type[_Block], values: Mapping[str, Any], where: str = '') -> _Block:
    given = {}
    for each in options_of(cls):
        value = values.get(each.name, each.default)
        given[each.name] = convert(each, each.default if value is None and not each.nullable else value, where)
    for name, block in blocks_of(cls).items():
        given[name] = _build(block, values.get(name) or {}, f'{where}{name}.')
    try:
        return cls(**given)
    except ValueError as error:  # options that contradict each other
        raise ValueError(f'{where}{error}') from None


def load_config(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the configuration of a recipe: every key with its value, DREAL's own as `config.dreal`.

    Args:
        recipe: File or name of a recipe, or its keys and values.
        overrides: Further 'key=value' settings, such as 'epochs=3' or 'dreal.enabled=false'.

    Raises:
        FileNotFoundError: No such recipe.
        ValueError: A key is unknown, stands twice or has no value, or a value has the wrong type.
    """
    if isinstance(recipe, Mapping):
        values: Any = dict(recipe)
    else:
        values = read_recipe(find_recipe(recipe))
    settings = _parse_overrides(overrides)
    _check_keys(settings, TrainConfig)
    values = _merge(values, settings)
    data = values.pop('data', None)  # timm's train.py has both, and this one first
    if data is not None:
        values['data_dir'] = values.get('data_dir') or data
    _check_keys(values, TrainConfig, lenient=True)
    return _build(TrainConfig, values)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as plain keys and values, as `load_config` takes them."""
    return asdict(config)
