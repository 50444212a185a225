"""What the config of an exported folder, or of a repository of the Hub, may ask of a network: its shape, and no more

timm hands the arguments that a config names to the network's function as if they came from Python. Those that fetch an
address or open a path are for Python alone.
"""
from collections.abc import Mapping
from typing import Any

__all__ = ['FETCHING', 'check_arguments', 'check_source']

_SOURCES = ('local-dir', 'hf-hub')
# arguments of timm's factory and builder that name weights or how they are loaded, with what asks for nothing
FETCHING: dict[str, tuple[Any, ...]] = {
    'pretrained': (None, False),
    'pretrained_cfg': (None,),
    'pretrained_cfg_overlay': (None,),
    'pretrained_strict': (None, True),
    'pretrained_filter_fn': (None,),
    'pretrained_model_args': (None,),
    'checkpoint_path': (None,),
    'cache_dir': (None,),
    'device': (None,),  # where and as what a network is built is the caller's
    'dtype': (None,),
}


def check_arguments(arguments: Any) -> None:
    """Raise a ValueError if arguments that a config names, at any depth, fetch or open anything.

    Args:
        arguments: What `json` makes of them.
    """
    waiting = [arguments]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (list, tuple)):
            waiting += value
        if not isinstance(value, Mapping):
            continue
        waiting += value.values()
        for key, given in value.items():
            if key in FETCHING and not any(given is nothing for nothing in FETCHING[key]):
                raise ValueError(
                    f'the config sets {key}, which is for Python alone: a config may not fetch or open anything.')
            if key == 'backbone' and given is not None and (
                    not isinstance(given, str) or any(sign in given for sign in ':/\\')):
                raise ValueError(
                    f'the config names the backbone {str(given)[:60]!r}, which is no name of a timm model: a config '
                    'may not fetch or open anything.')


def check_source(arguments: Mapping[str, Any]) -> None:
    """Check what timm passes to a model's function where the network comes from a folder or the Hub.

    Arguments that are given in Python are not looked at.

    Args:
        arguments: Keyword arguments of the function.

    Raises:
        ValueError: The config fetches or opens something; or it names two numbers of classes, of which timm would
            build one and drop the classifier for the other.
    """
    config: Any = arguments.get('pretrained_cfg')
    values = config if isinstance(config, Mapping) else getattr(config, '__dict__', {})
    if values.get('source') not in _SOURCES:
        return
    saved = arguments.get('pretrained_model_args') or {}
    check_arguments(saved)
    classes = values.get('num_classes', 1000)  # timm's own where there is none
    if saved.get('num_classes', classes) != classes:
        raise ValueError(
            f"the config names {saved['num_classes']} classes in model_args and {classes} beside them: "
            'the classifier would start at random.')
