"""rest: evaluation and re-ranking of re-identification at the size of Market-1501, and the audit of a ResNet-50"""
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import reid_evaluation
import timm
import torch

import dreal_timm  # noqa: F401
from dreal_timm.audit import audit
from dreal_timm.reid import rerank, retrieve, score
from gpu_parts.record import Record

__all__ = ['main']

POINTS = 0.02  # of rank-1 and mAP, percent: a distance may be rounded to the other side of another


def _seconds(device: torch.device, function: Callable[[], Any]) -> tuple[Any, float]:
    def wait() -> None:
        if device.type == 'cuda':
            torch.cuda.synchronize()

    wait()
    started = time.perf_counter()
    result = function()
    wait()
    return result, time.perf_counter() - started


class Ranking:
    """Features, identities and cameras, junk left out."""

    def __init__(self, small: bool):
        if small:
            reid_evaluation.QUERIES, reid_evaluation.GALLERY, reid_evaluation.JUNK = 200, 4000, 200
            reid_evaluation.IDENTITIES = 60
        (self.query, gallery), pids, camids = reid_evaluation.draw(*((64, 1.0) if small else (2048, 2.5)))
        valid = pids[1] >= 0
        self.gallery = gallery[valid]
        self.labels = pids[0], pids[1][valid], camids[0], camids[1][valid]

    def measure(self, way: str, device: torch.device) -> tuple[dict[str, float], float]:
        """Return the metrics, and the seconds of the second of two times."""
        query, gallery = self.query.to(device), self.gallery.to(device)
        of_query, of_gallery, seen_query, seen_gallery = (tensor.to(device) for tensor in self.labels)
        labels = of_query, of_gallery, seen_query, seen_gallery

        def rank() -> dict[str, float]:
            if way == 'evaluation':
                return retrieve(query, gallery, *labels).summary((1,))
            return score(rerank(query, gallery), *labels).summary((1,))

        if device.type == 'cuda':  # what is built at first has no part in it
            rank()
        return _seconds(device, rank)

    def check(self, record: Record, way: str, device: torch.device) -> None:
        found, seconds = self.measure(way, device)
        expected, on_cpu = self.measure(way, torch.device('cpu'))
        record.near(
            f'reid.{way}', max(abs(found[name] - expected[name]) for name in ('rank1', 'mAP')), POINTS,
            seconds=seconds, cpu_seconds=on_cpu, mAP=found['mAP'], gallery=len(self.gallery))


def measure_audit(record: Record, device: torch.device, small: bool) -> None:
    """Images a second of an audit, of images that are on the device."""
    size, batch = (32, 8) if small else (224, 128)
    torch.manual_seed(0)
    model = timm.create_model(f'dreal_se_resnet{18 if small else 50}').to(device)
    loader = [(torch.randn(batch, 3, size, size, device=device), torch.randint(1000, (batch,), device=device))]
    options: dict[str, Any] = {'input_size': (3, size, size)}
    audit(model, loader, **options)
    found, seconds = _seconds(device, lambda: audit(model, loader * (1 if small else 3), **options))
    count = len(found.number)
    if not found.log_p.isfinite().all() or count != batch * (1 if small else 3):
        raise AssertionError(f'{count} images')
    record.add('audit.images', ok=None, images_s=round(count / seconds, 1), sites=len(found.sites), batch=batch)


def main(record: Record, device: torch.device, small: bool) -> None:
    record.run('audit.images', partial(measure_audit, record, device, small))
    ranking = Ranking(small)
    for way, seconds in (('evaluation', 4), ('reranking', 12)):
        record.run(f'reid.{way}', partial(ranking.check, record, way, device), seconds=1 if small else seconds)
