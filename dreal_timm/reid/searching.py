"""Looking for images like a query in a folder of one's own, without identities"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_model_data_config

from dreal_timm.hub import read_network
from dreal_timm.reid.evaluation import extract_features, feature_loader
from dreal_timm.reid.images import check_headers
from dreal_timm.reid.layouts import ReidImage
from dreal_timm.reid.metrics import distance_blocks
from dreal_timm.reid.pictures import Ranking

__all__ = ['search']


def _found(places: Sequence[str | Path], what: str) -> list[Path]:
    known = Image.registered_extensions()
    paths: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"{what}: no file or folder '{place}'.")
        inside = sorted(place.rglob('*')) if place.is_dir() else [place]
        paths += [path for path in inside if not place.is_dir() or (path.is_file() and path.suffix.lower() in known)]
    if not paths:
        raise FileNotFoundError(f"{what}: no image in {', '.join(map(str, places))}.")
    return paths


def search(
        model: str | Path,
        queries: Sequence[str | Path],
        gallery: str | Path,
        top: int = 10,
        metric: str = 'cosine',
        flip: bool = True,
        batch_size: int = 128,
        workers: int = 2,
        device: str | None = None,
) -> list[Ranking]:
    """Return for each query the images of a folder that are most like it, the most similar first.

    Args:
        model: As `evaluate_reid` takes it.
        queries: Files, or folders of them.
        gallery: A folder, which is searched with all that is in it, or a file.
        top: Length of a list.
        metric: 'cosine' or 'euclidean' (squared).
        flip: Whether features are means with those of the mirror image.
        batch_size: Images a step.
        workers: Loader processes.
        device: Device; None takes an accelerator where there is one.

    Raises:
        FileNotFoundError: The network, a query or the gallery is missing.
        ValueError: An image cannot be read; no such model.
        WeightsError: The weights cannot be had.
    """
    asked, known = _found(queries, 'query'), _found([gallery], 'gallery')
    images = [ReidImage(path, 0, 0) for path in (*asked, *known)]
    check_headers(images)
    network: Any = read_network(model)
    where = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    loader = feature_loader(images, resolve_model_data_config(network), where, batch_size, workers)
    features = extract_features(network.to(where), loader, where, flip)
    query, rest = features.split([len(asked), len(known)])
    rankings: list[Ranking] = []
    for block in distance_blocks(query, rest, metric):
        distances, order = block.topk(min(top, len(known)), dim=1, largest=False)
        for near, places in zip(distances.tolist(), order.tolist(), strict=True):
            rankings.append(Ranking(asked[len(rankings)], [known[place] for place in places], near))
    return rankings
