"""Which class of a data set is which output of a network: decided in one place, by names wherever there are names"""
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

__all__ = [
    'ClassesError', 'Match', 'class_names', 'index_names', 'match_classes', 'names_of_config', 'network_names',
    'relabel', 'same_name',
]


class ClassesError(ValueError):
    """Names of classes do not tell which output each of them is."""


@dataclass(frozen=True)
class Match:
    """How the classes of a data set were found among the outputs of a network.

    Attributes:
        by: 'name', 'order' or 'map' (a class map).
        outputs: Output of each class of the data set; None where class i is output i.
        absent: Number of outputs that no class of the data set has.
    """
    by: str
    outputs: tuple[int, ...] | None = None
    absent: int = 0

    def summary(self) -> dict[str, Any]:
        """Return what results say of it."""
        return {'by': self.by, 'absent': self.absent}


def same_name(name: Any) -> str:
    """Return a name as it is compared: accents have one form."""
    return unicodedata.normalize('NFC', str(name))  # file systems differ in it


def index_names(known: Mapping[Any, Any]) -> list[str]:
    """Return names in the order of their indices: several of one index joined with a comma, 'class N' for none."""
    joined: dict[int, str] = {}
    for name, index in known.items():
        joined[int(index)] = f'{joined[int(index)]}, {name}' if int(index) in joined else str(name)
    return [joined.get(index, f'class {index}') for index in range(max(joined) + 1)]


def class_names(dataset: Any) -> list[str] | None:
    """Return the names of a data set's classes in the order of their indices, where it knows them.

    Classes that a class map gives one index are joined with a comma; one that it leaves out is 'class N'.
    """
    if dataset is None:
        return None
    reader = getattr(dataset, 'reader', None)
    synsets = getattr(dataset, 'wnids', None)  # torchvision's ImageNet, whose class_to_idx has several names a class
    if synsets:
        return [str(name) for name in synsets]
    known = (
        getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)  # of tars
        or getattr(dataset, 'class_to_idx', None))
    if not isinstance(known, Mapping) or not known:
        return None
    return index_names(known)


def names_of_config(config: Mapping[str, Any]) -> list[str] | None:
    """Return the names of a network's classes in the order of its outputs, where its config has them."""
    names = config.get('label_names')
    if isinstance(names, Mapping):
        try:
            names = [names[key] for key in sorted(names, key=int)]
        except (TypeError, ValueError):
            return None
    return [str(name) for name in names] if isinstance(names, list | tuple) and names else None


def network_names(model: Any) -> list[list[str]]:
    """Return what the classes of a network may be called: its own names, or ImageNet's synsets and descriptions."""
    own = names_of_config(model.pretrained_cfg)
    if own is not None:
        return [own]
    subset = infer_imagenet_subset(model)
    if subset is None:
        return []
    info = ImageNetInfo(subset)
    return [list(info.label_names()), info.label_descriptions()]


def _unique(names: Sequence[str]) -> dict[str, int]:
    """Index of each name that is there once."""
    indices: dict[str, int] = {}
    for index, name in enumerate(map(same_name, names)):
        indices[name] = -1 if name in indices else index
    return {name: index for name, index in indices.items() if index >= 0}


def _by_names(names: Sequence[str], outputs: Mapping[str, int], num_classes: int, by: str) -> Match:
    indices = tuple(outputs[same_name(name)] for name in names)
    return Match(by, None if indices == tuple(range(len(names))) else indices, num_classes - len(set(indices)))


def match_classes(
        names: Sequence[str] | None,
        known: Sequence[Sequence[str]],
        num_classes: int,
        class_map: Mapping[str, int] | None = None,
        by_order: bool = False,
        hint: str = 'name the index of each class with --class-map FILE, or take them in order with --classes-by-order',
) -> Match:
    """Return which output of a network each class of a data set is.

    By the class map where there is one. By name where all names of the data set are among the network's, which may have
    more. By order where one side has no names and the other not another number of classes, or where it is asked for.

    Args:
        names: Names of the data set's classes in the order of their indices; None where it has none.
        known: Names of the network's classes in the order of its outputs, in each way that they may be called.
        num_classes: Outputs of the network.
        class_map: Output of each class by its name.
        by_order: Take classes in their order.
        hint: What to do about an error.

    Raises:
        ClassesError: Neither is possible.
    """
    if class_map is not None:
        if names is None:
            raise ClassesError('class_map: the data set has no names of classes to map.')
        outputs = {same_name(name): index for name, index in class_map.items()}
        missing = [name for name in names if same_name(name) not in outputs]
        if missing:
            raise ClassesError(f"class_map: it does not name {', '.join(missing[:3])}.")
        return _by_names(names, outputs, num_classes, 'map')
    if by_order or names is None or not known:
        if names is not None and len(names) != num_classes:
            raise ClassesError(
                f'The data set has {len(names)} classes ({", ".join(names[:3])}, ...), the model {num_classes}, and '
                f'their names do not tell which is which: {hint.partition(", or ")[0]}.')
        return Match('order')
    for scheme in known:
        outputs = _unique(scheme)
        if all(same_name(name) in outputs for name in names):
            return _by_names(names, outputs, num_classes, 'name')
    outputs = _unique(known[0])
    strange = [name for name in names if same_name(name) not in outputs]
    raise ClassesError(
        f'{len(strange)} of the {len(names)} classes of the data set ({", ".join(strange[:3])}) are none of the '
        f'network ({", ".join(map(str, known[0][:3]))}, ...): {hint}.')


class _Label:
    """The output of a class; refuses one that the network does not have, before a loss on a GPU dies of it."""

    def __init__(self, num_classes: int, outputs: Sequence[int] | None, inner: Any):
        self.num_classes = num_classes
        self.outputs = outputs
        self.inner = inner

    def __call__(self, target: Any) -> Any:
        target = target if self.inner is None else self.inner(target)
        if isinstance(target, str):
            raise ValueError(f"Label '{target}' is a text: class_map=FILE gives each of them its number.")
        if self.outputs is not None and 0 <= int(target) < len(self.outputs):
            target = self.outputs[int(target)]
        if not 0 <= int(target) < self.num_classes:
            raise ValueError(
                f'Label {int(target)} is outside of the {self.num_classes} classes of the model: set num_classes.')
        return target


def relabel(dataset: Any, num_classes: int, match: Match | None = None) -> None:
    """Let a data set give outputs of a network for its classes, and refuse labels that the network has no output for.

    Args:
        dataset: One of timm or torchvision.
        num_classes: Outputs of the network.
        match: Which output each class is; None are the same numbers.
    """
    if not hasattr(dataset, 'target_transform'):
        return
    inner = dataset.target_transform
    if isinstance(inner, _Label):  # once more, of the same data set
        inner = inner.inner
    dataset.target_transform = _Label(num_classes, None if match is None else match.outputs, inner)
