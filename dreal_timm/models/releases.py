"""Reinforced networks that were trained and exported with this package: one table of what they are

Weights are looked for in a checkout first (`hub_cards/MODEL.TAG/`), and else in the repository of the Hub that the
table names, at the commit that it names.
"""
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ['RELEASES', 'Release', 'find_release']

_STAGED = Path(__file__).parents[2] / 'hub_cards'


@dataclass(frozen=True)
class Release:
    """A network with weights.

    Attributes:
        model: Name of the model.
        tag: 'dreal_' and the data that it was trained on.
        sha256: Of the file `model.safetensors`.
        metrics: Top-1 and top-5 accuracy in percent, on the validation split.
        license: Of the weights.
        data_license: Of the data.
        cfg: What timm's config tells beside this: classes, input, preprocessing.
        hub_id: Repository on the Hub; empty where there is none yet.
        revision: Commit in it.
    """
    model: str
    tag: str
    sha256: str
    metrics: Mapping[str, float]
    license: str
    data_license: str
    cfg: Mapping[str, Any]
    hub_id: str = ''
    revision: str = ''

    @property
    def name(self) -> str:
        """Name with the tag, as `timm.create_model` takes it."""
        return f'{self.model}.{self.tag}'

    @property
    def file(self) -> Path:
        """The weights in a checkout, whether they are there or not."""
        return _STAGED / self.name / 'model.safetensors'

    def source(self) -> dict[str, str]:
        """Return where timm finds the weights, in the words of its config; empty where there are none."""
        if self.file.is_file():
            return {'file': str(self.file)}
        return {'hf_hub_id': f'{self.hub_id}@{self.revision}'} if self.hub_id else {}


    def check(self, path: str | Path) -> None:
        """Raise a RuntimeError if a file is not the one that was released."""
        if hashlib.sha256(Path(path).read_bytes()).hexdigest() != self.sha256:
            raise RuntimeError(f'{self.name}: wrong SHA-256, it is not what was released; restore it: {path}')


RELEASES: tuple[Release, ...] = (
    Release(
        model='dreal_se_resnet18', tag='dreal_fashion_mnist',
        sha256='cc08ddfe84675983efbddab7cd41432884dad9b724a9c9b154a65c5009648304',
        metrics={'top1': 90.22, 'top5': 99.82},
        license='apache-2.0', data_license='MIT',
        cfg={
            'num_classes': 10, 'input_size': (1, 32, 32), 'pool_size': (1, 1), 'crop_pct': 1.0,
            'interpolation': 'bilinear', 'mean': (0.286,), 'std': (0.353,),
            'description': 'Reinforced for 5 epochs on Fashion-MNIST; weights in float16.',
            'label_names': (
                'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
                'Ankle boot',
            ),
        },
    ),
)


def find_release(name: str) -> Release | None:
    """Return the release of a model's name with its tag, or None."""
    return next((release for release in RELEASES if release.name == name), None)
