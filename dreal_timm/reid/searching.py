"""Looking for images like a query in a folder of one's own, without identities"""
import logging
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from timm.data import resolve_model_data_config

from dreal_timm.hub import read_network
from dreal_timm.reid.evaluation import extract_features, feature_loader
from dreal_timm.reid.files import file_key, image_files
from dreal_timm.reid.images import check_images, why_broken
from dreal_timm.reid.layouts import ReidImage
from dreal_timm.reid.metrics import distance_blocks
from dreal_timm.reid.pictures import Ranking
from dreal_timm.utils.transfer import pick_device

__all__ = ['search']

_logger = logging.getLogger(__name__)


def _images(places: Sequence[str | Path], what: str) -> list[Path]:
    paths: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"{what}: no file or folder '{place}'.")
        if not place.is_dir():
            paths.append(place)
            continue
        # a file that has several paths by links counts once, by one that is no link where there is one
        once: dict[Hashable, Path] = {}
        for path in sorted(image_files(place, deep=True), key=lambda path: path.is_symlink()):
            once.setdefault(file_key(path), path)
        paths += sorted(once.values())
    if not paths:
        raise FileNotFoundError(f"{what}: no image in {', '.join(map(str, places))}.")
    return paths


def _readable(paths: Sequence[Path], workers: int = 4) -> list[Path]:
    """Those that can be read; the others are named once."""
    with ThreadPoolExecutor(workers) as pool:
        reasons = list(pool.map(why_broken, paths))
    broken = [f"'{path}' {reason}" for path, reason in zip(paths, reasons, strict=True) if reason]
    if broken:
        more = f', and {len(broken) - 1:,} more' if len(broken) > 1 else ''
        _logger.warning(f'gallery: left out: {broken[0]}{more}')
    return [path for path, reason in zip(paths, reasons, strict=True) if not reason]


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
        gallery: A folder, which is searched with all that is in it, or a file. What cannot be read is left out, which
            is said.
        top: Length of a list.
        metric: 'cosine' or 'euclidean' (squared).
        flip: Whether features are means with those of the mirror image.
        batch_size: Images a step.
        workers: Loader processes.
        device: Device; None takes an accelerator where there is one.

    Raises:
        FileNotFoundError: The network, a query or the gallery is missing.
        ValueError: A query cannot be read, or nothing of the gallery; no such model.
        WeightsError: The weights cannot be had.
    """
    query_paths, gallery_paths = _images(queries, 'query'), _images([gallery], 'gallery')
    check_images([ReidImage(path, 0, 0) for path in query_paths], whole=True)
    gallery_paths = _readable(gallery_paths)
    if not gallery_paths:
        raise ValueError(f"gallery: no image in {gallery} can be read.")
    images = [ReidImage(path, 0, 0) for path in (*query_paths, *gallery_paths)]
    network: Any = read_network(model)
    where = pick_device(device)
    loader = feature_loader(images, resolve_model_data_config(network), where, batch_size, workers)
    features = extract_features(network.to(where), loader, where, flip)
    query, rest = features.split([len(query_paths), len(gallery_paths)])
    rankings: list[Ranking] = []
    for block in distance_blocks(query, rest, metric):
        distances, order = block.topk(min(top, len(gallery_paths)), dim=1, largest=False)
        for near, places in zip(distances.tolist(), order.tolist(), strict=True):
            rankings.append(Ranking(query_paths[len(rankings)], [gallery_paths[place] for place in places], near))
    return rankings
