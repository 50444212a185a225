"""What is wrong with a data set of person re-identification, before any training finds out"""
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreal_timm.reid.images import why_broken
from dreal_timm.reid.layouts import DISTRACTOR, SPLITS, ReidData, ReidImage, origin

__all__ = ['Check', 'check_reid', 'unanswered']


@dataclass(frozen=True)
class Check:
    """What a data set is, and what was found.

    Attributes:
        data: The data set.
        counts: Identities, images and cameras of each split.
        problems: What will stop a training or falsify its numbers, a line each.
        details: All that the problems name the first few of, by 'unanswered', 'few_images', 'known_identities',
            'repeated', 'broken'.
    """
    data: ReidData
    counts: dict[str, dict[str, int]]
    problems: tuple[str, ...]
    details: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f'{self.data.root}: {self.data.layout}',
            f"{'split':10} {'identities':>10} {'images':>10} {'cameras':>8}"]
        lines += [
            f"{split:10} {row['identities']:10,} {row['images']:10,} {row['cameras']:8,}"
            for split, row in self.counts.items()]
        if self.data.junk:
            lines.append(f'{self.data.junk:,} images of identity -1 (junk) are left out')
        distractors = sum(image.pid == DISTRACTOR for image in self.data.gallery)
        if distractors:
            lines.append(f'{distractors:,} images of the gallery are distractors (identity 0)')
        if self.data.extra:
            lines.append(f'{len(self.data.extra):,} further images for multi query')
        lines += [f'note: {note}' for note in self.data.notes]
        return '\n'.join([*lines, *(f'problem: {problem}' for problem in self.problems or ())])


def unanswered(data: ReidData, camera_rule: str = 'exclude') -> list[ReidImage]:
    """Return the queries that no image of the gallery answers; distractors (identity 0) never do.

    Args:
        data: The data set.
        camera_rule: 'exclude' counts answers from another camera alone, 'ignore' all but the query's own file.
    """
    origins: dict[int, set[int | Path]] = {}
    for image in data.gallery:
        if image.pid != DISTRACTOR:
            origins.setdefault(image.pid, set()).add(origin(image, camera_rule))
    return [image for image in data.query if not origins.get(image.pid, set()) - {origin(image, camera_rule)}]


def _some(names: Sequence[Any], count: int = 3) -> str:
    more = f' and {len(names) - count:,} more' if len(names) > count else ''
    return ', '.join(map(str, names[:count])) + more


def _answers(data: ReidData, lost: Sequence[ReidImage], camera_rule: str) -> list[str]:
    """Problems of the queries, some of which are lost: nothing answers them."""
    problems = []
    cameras = {image.camid for image in (*data.query, *data.gallery)}
    if camera_rule == 'exclude' and len(cameras) == 1:
        problems.append('queries and gallery are of one camera, so that nothing answers: use --camera-rule ignore')
    elif lost:
        where = 'of another camera ' if camera_rule == 'exclude' else ''
        problems.append(
            f'{len(lost):,} of {len(data.query):,} queries have no image {where}in the gallery that answers, and are '
            f'left out of the numbers: {_some([image.path.name for image in lost])}')
    distractors = sum(image.pid == DISTRACTOR for image in data.query)
    if distractors:
        problems.append(
            f'{distractors:,} queries are of identity 0, which is that of distractors and answers nothing: count '
            'identities from 1')
    return problems


def _broken(data: ReidData, workers: int) -> list[str]:
    """Images that cannot be used, with the reason."""
    paths = list(dict.fromkeys(image.path for split in (*SPLITS, 'extra') for image in getattr(data, split)))
    with ThreadPoolExecutor(workers) as pool:
        reasons = pool.map(why_broken, paths)
        return [f'{path} ({reason})' for path, reason in zip(paths, reasons, strict=True) if reason]


def check_reid(
        data: ReidData,
        images_per_identity: int = 8,
        camera_rule: str = 'exclude',
        read_images: bool = True,
        workers: int = 4,
) -> Check:
    """Look for what users stumble over: queries that nothing answers, one camera, few images, known identities, files.

    Args:
        data: The data set.
        images_per_identity: Images that a batch has of each identity (K of P x K).
        camera_rule: The rule that it will be evaluated by, 'exclude' or 'ignore'.
        read_images: Whether to read every image.
        workers: Threads that read them.
    """
    counts = {
        split: {
            'identities': len(data.identities(split)), 'images': len(getattr(data, split)),
            'cameras': len({image.camid for image in getattr(data, split)})}
        for split in SPLITS}
    lost = unanswered(data, camera_rule)
    problems, details = _answers(data, lost, camera_rule), {'unanswered': [str(image.path) for image in lost]}
    sizes = Counter(image.pid for image in data.train)
    few = [data.names.get(pid, str(pid)) for pid in sorted(sizes) if sizes[pid] < images_per_identity]
    details['few_images'] = few
    if few:
        problems.append(
            f'{len(few):,} of {len(sizes):,} identities to train on have fewer than {images_per_identity} images, some '
            f'of which a batch then holds twice: {_some(few)}')
    tested = (set(data.identities('query')) | set(data.identities('gallery'))) - {DISTRACTOR}
    known = [data.names.get(pid, str(pid)) for pid in sorted(tested & sizes.keys())]
    details['known_identities'] = known
    if known:
        problems.append(
            f'{len(known):,} identities are in the training split and in the test: numbers will tell of known people: '
            f'{_some(known)}')
    seen = Counter(image.path for split in SPLITS for image in getattr(data, split))
    details['repeated'] = [str(path) for path, count in seen.items() if count > 1] + list(map(str, data.repeated))
    if details['repeated']:
        problems.append(
            f"{len(details['repeated']):,} files are listed more than once, in a split or in several: "
            f"{_some(details['repeated'])}")
    if read_images:
        details['broken'] = broken = _broken(data, workers)
        if broken:
            problems.append(f'{len(broken):,} images cannot be used: {_some(broken)}')
    return Check(data, counts, tuple(problems), details)
