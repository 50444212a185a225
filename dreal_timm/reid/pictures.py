"""Pictures of ranked lists: a query, and what the gallery has that is most like it"""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from dreal_timm.data.images import read_image
from dreal_timm.reid.layouts import DISTRACTOR, ReidData, ReidImage, origin
from dreal_timm.reid.metrics import distance_blocks
from dreal_timm.reid.reranking import rerank

__all__ = ['Ranking', 'check_kind', 'draw_rankings', 'rank_queries']

_KINDS = ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.pdf')
_BORDER, _GAP, _HEIGHT = 4, 6, 128
_RIGHT, _WRONG, _PLAIN = (0, 150, 60), (205, 20, 20), (90, 90, 90)


@dataclass(frozen=True)
class Ranking:
    """The head of a ranked list.

    Attributes:
        query: File of the query.
        found: Files of the gallery, the most similar first.
        distances: Their distances.
        right: Which of them are of the query's identity; None where identities are not known.
    """
    query: Path
    found: Sequence[Path]
    distances: Sequence[float]
    right: Sequence[bool] | None = None


def rank_queries(
        query: torch.Tensor,
        gallery: torch.Tensor,
        data: ReidData,
        numbers: Sequence[int],
        top: int = 10,
        metric: str = 'cosine',
        camera_rule: str = 'exclude',
        reranked: bool = False,
        **reranking: Any,
) -> list[Ranking]:
    """Return the heads of the ranked lists of some queries.

    Args:
        query: Features of the queries, (Q, C).
        gallery: Features of the gallery, (G, C).
        data: The data set that they are of.
        numbers: Numbers of these queries.
        top: Length of a list.
        metric: 'cosine' or 'euclidean'.
        camera_rule: 'exclude' leaves out the gallery's images of the query's identity and camera, 'ignore' the query's
            own file.
        reranked: Whether the lists are those of k-reciprocal re-ranking, which looks at all queries.
        **reranking: k1, k2 and weight of re-ranking, see `rerank`.
    """
    chosen = torch.as_tensor(numbers, device=query.device)
    if reranked:
        rows = torch.empty(len(chosen), len(gallery), device=query.device, dtype=query.dtype)
        start = 0
        for block in rerank(query, gallery, metric=metric, **reranking):
            inside = (chosen >= start) & (chosen < start + len(block))
            rows[inside] = block[chosen[inside] - start]
            start += len(block)
    else:
        rows = torch.cat(list(distance_blocks(query[chosen], gallery, metric)))
    lists = []
    for number, row in zip(numbers, rows, strict=True):
        own = data.query[number]
        head: list[tuple[ReidImage, float]] = []
        values, order = row.sort(stable=True)
        for distance, place in zip(values.tolist(), order.tolist(), strict=True):
            image = data.gallery[place]
            if image.pid == own.pid and origin(image, camera_rule) == origin(own, camera_rule):
                continue
            head.append((image, distance))
            if len(head) == top:
                break
        lists.append(Ranking(
            own.path, [image.path for image, _ in head], [distance for _, distance in head],
            [image.pid == own.pid != DISTRACTOR for image, _ in head]))
    return lists


def check_kind(path: str | Path) -> None:
    """Raise a ValueError if the name of a file tells no kind of image that is written."""
    if Path(path).suffix.lower() not in _KINDS:
        raise ValueError(f"'{path}': its name must end with one of {', '.join(_KINDS)}.")


def _tile(path: Path, colour: tuple[int, int, int], crossed: bool, width: int) -> Image.Image:
    """An image in a frame; one that is wrong has a cross in its corner too, for those who see no red."""
    image = read_image(path, 'RGB').resize((width, _HEIGHT), Image.Resampling.BICUBIC)
    tile = Image.new('RGB', (width + 2 * _BORDER, _HEIGHT + 2 * _BORDER), colour)
    tile.paste(image, (_BORDER, _BORDER))
    if crossed:
        draw = ImageDraw.Draw(tile)
        left, size = tile.width - 18, 12
        draw.rectangle((left - 3, 3, left + size + 3, size + 9), fill=colour)
        for x, y in ((left, left + size), (left + size, left)):
            draw.line((x, 6, y, 6 + size), fill='white', width=2)
    return tile


def draw_rankings(rankings: Sequence[Ranking], path: str | Path) -> Path:
    """Draw a row for each query: the query, a gap, and its list; right in green, wrong in red and crossed.

    Args:
        rankings: The lists.
        path: File to write, of a kind that its name tells.

    Raises:
        ValueError: There are no lists, or the name tells no kind of image.
    """
    path = Path(path)
    if not rankings:
        raise ValueError('There is no ranked list to draw.')
    check_kind(path)
    with Image.open(rankings[0].query) as first:
        width = max(_HEIGHT // 4, min(2 * _HEIGHT, round(_HEIGHT * first.width / first.height)))
    cell, row = width + 2 * _BORDER + _GAP, _HEIGHT + 2 * _BORDER + _GAP
    most = max(len(ranking.found) for ranking in rankings)
    sheet = Image.new('RGB', (_GAP + (most + 1) * cell + 2 * _GAP, _GAP + len(rankings) * row), 'white')
    for number, ranking in enumerate(rankings):
        top = _GAP + number * row
        sheet.paste(_tile(ranking.query, _PLAIN, False, width), (_GAP, top))
        for place, found in enumerate(ranking.found):
            right = None if ranking.right is None else ranking.right[place]
            colour = _PLAIN if right is None else _RIGHT if right else _WRONG
            sheet.paste(_tile(found, colour, right is False, width), (_GAP + (place + 1) * cell + 2 * _GAP, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
