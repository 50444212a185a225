"""Evaluation of re-identification: features of a network, and how well the gallery answers the queries

Shapes: N images, C features.
"""
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.data import create_loader, resolve_model_data_config
from torch import nn

from dreal_timm.hub import read_network
from dreal_timm.hub.results import flat_settings, run_settings, training_record, training_settings
from dreal_timm.models.reid import drop_identities
from dreal_timm.provenance import preprocessing_of, versions, weights_digest
from dreal_timm.reid.checking import unanswered
from dreal_timm.reid.images import ReidSet, check_images
from dreal_timm.reid.layouts import ReidData, ReidImage, open_reid, origin
from dreal_timm.reid.metrics import CAMERA_RULES, distance_blocks, pool_queries, score
from dreal_timm.reid.reranking import Reranking, rerank
from dreal_timm.utils.transfer import pick_device

__all__ = [
    'check_answers',
    'check_apart',
    'check_reranked',
    'embed',
    'evaluate_features',
    'evaluate_network',
    'evaluate_reid',
    'extract_features',
    'feature_loader',
    'open_checked',
    'pooled_queries',
    'record_of',
    'settings_of',
]


def embed(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Return embeddings, (N, C): after the neck of `dreal_reid`, the pooled features of any other network of timm.

    Args:
        model: The network.
        images: Images, (N, channels, H, W).
    """
    embeddings: torch.Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return embeddings


@torch.inference_mode()
def extract_features(
        model: nn.Module,
        loader: Any,
        device: torch.device,
        flip: bool = True,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        channels_last: bool = False,
) -> torch.Tensor:
    """Return the features of all images of a loader, (N, C) float32.

    The model is put into evaluation mode and stays there.

    Args:
        model: The network.
        loader: Loader of (images, anything).
        device: Device of the network.
        flip: Whether features are the mean of those of the image and of its mirror image.
        autocast: Makes the context of a forward pass.
        channels_last: Whether the images are in channels-last layout.

    Raises:
        FloatingPointError: Features are not finite.
    """
    model.eval()
    batches = []
    for images, _ in loader:
        images = images.to(device)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast():
            features = embed(model, images).float()
            if flip:
                features = (features + embed(model, images.flip(-1)).float()) / 2
        batches.append(features)
    features = torch.cat(batches)
    if not features.norm(dim=1).isfinite().all():  # a length beyond float32 would make a cosine of 0 with all
        raise FloatingPointError(
            'The network gives features that are not finite: it has diverged, or its weights are broken.')
    return features


def check_apart(features: torch.Tensor, metric: str = 'cosine') -> None:
    """Raise a FloatingPointError if features, (N, C), cannot be ranked, so that the order of the files would decide."""
    broken = ''
    if len(features) > 1 and (features == features[0]).all():
        broken = f'all {len(features):,} images the same features'
    elif metric == 'cosine' and (zero := int((features.norm(dim=1) < 1e-12).sum())):
        broken = f'{zero:,} of {len(features):,} images features of zero, whose cosine is not known'
    if broken:
        raise FloatingPointError(f'The network gives {broken}: it has collapsed, or its weights are broken.')


def feature_loader(
        images: Sequence[ReidImage],
        preprocessing: Mapping[str, Any],
        device: torch.device,
        batch_size: int = 128,
        workers: int = 2,
        **kwargs: Any,
) -> Any:
    """Return timm's loader of these images in their order.

    Args:
        images: The images.
        preprocessing: 'input_size', 'interpolation', 'mean', 'std', 'crop_pct' and 'crop_mode' of the network.
        device: Device of the batches.
        batch_size: Images a batch.
        workers: Loader processes.
        **kwargs: Further arguments of `timm.data.create_loader`.
    """
    dataset = ReidSet(images, channels=preprocessing['input_size'][0])
    return create_loader(
        dataset, batch_size=batch_size, num_workers=workers, device=device, persistent_workers=False,
        **preprocessing_of(preprocessing), **kwargs)


def check_answers(data: ReidData, camera_rule: str = 'exclude') -> None:
    """Raise a ValueError if no image of the gallery answers any query, so that there is nothing to measure."""
    if len(unanswered(data, camera_rule)) < len(data.query):
        return
    hint = ''
    if camera_rule == 'exclude' and len(unanswered(data, 'ignore')) < len(data.query):
        hint = ": answers are of the query's own camera alone, which the rule 'ignore' lets count"
    raise ValueError(f"'{data.root}': no image of the gallery answers any of the {len(data.query):,} queries{hint}.")


def _pids(images: Sequence[ReidImage], device: torch.device) -> torch.Tensor:
    return torch.tensor([image.pid for image in images], dtype=torch.int64, device=device)


def _origins(data: ReidData, queries: Sequence[ReidImage], rule: str, device: torch.device) -> list[torch.Tensor]:
    """Numbers of what an answer must not share with its query, of queries and gallery: cameras or files."""
    number: dict[Any, int] = {}
    return [
        torch.tensor([number.setdefault(origin(image, rule), len(number)) for image in images], device=device)
        for images in (queries, data.gallery)]


def pooled_queries(
        query: torch.Tensor,
        data: ReidData,
        extra: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return one query for each identity and camera (multi query): the mean of their features, and both numbers.

    Args:
        query: Features of the queries, (Q, C).
        data: The data set that they are of.
        extra: Features of `data.extra`, which take the place of the queries of their identities and cameras.
    """
    images, features = data.query, query
    if extra is not None:
        covered = {(image.pid, image.camid) for image in data.extra}
        rest = [i for i, image in enumerate(data.query) if (image.pid, image.camid) not in covered]
        images = [*data.extra, *(data.query[i] for i in rest)]
        features = torch.cat([extra, query[torch.tensor(rest, dtype=torch.int64, device=query.device)]])
    camids = torch.tensor([image.camid for image in images], dtype=torch.int64, device=query.device)
    return pool_queries(features, _pids(images, query.device), camids)


def evaluate_features(
        query: torch.Tensor,
        gallery: torch.Tensor,
        data: ReidData,
        metric: str = 'cosine',
        camera_rule: str = 'exclude',
        reranked: bool = False,
        extra: torch.Tensor | None = None,
        multi_query: bool = False,
        **reranking: Any,
) -> dict[str, float]:
    """Return 'mAP', 'rank1', 'rank5', 'rank10', 'rank20', 'mINP' (percent), 'queries' and 'skipped'.

    Args:
        query: Features of the queries, (Q, C).
        gallery: Features of the gallery, (G, C).
        data: The data set that they are of.
        metric: 'cosine' or 'euclidean'.
        camera_rule: 'exclude' or 'ignore', see `score`; with the latter a query's own file in the gallery is left out.
        reranked: Whether the ranking is that of k-reciprocal re-ranking by this metric.
        extra: Features of `data.extra`, for multi query.
        multi_query: One query for each identity and camera, see `pooled_queries`.
        **reranking: k1, k2 and weight of re-ranking, see `rerank`.

    Raises:
        ValueError: Unknown metric or rule; too few images for k1.
    """
    gallery_pids = _pids(data.gallery, query.device)
    if camera_rule not in CAMERA_RULES:
        raise ValueError(f"camera_rule must be one of {', '.join(CAMERA_RULES)}, got '{camera_rule}'.")
    if multi_query:
        query, pids, camids = pooled_queries(query, data, extra)
        known = torch.tensor([image.camid for image in data.gallery], dtype=torch.int64, device=query.device)
        if camera_rule == 'ignore':  # the files of a pooled query are left out, as if each pooled query were a camera
            pooled = {pair: i for i, pair in enumerate(zip(pids.tolist(), camids.tolist(), strict=True))}
            own = {image.path: pooled[image.pid, image.camid] for image in (*data.query, *data.extra)
                   if (image.pid, image.camid) in pooled}
            camids = torch.arange(len(pids), device=query.device)
            known = torch.tensor([own.get(image.path, -1) for image in data.gallery], device=query.device)
    else:
        pids = _pids(data.query, query.device)
        # with 'ignore' it is the query's own file that is left out, as if each file were a camera
        camids, known = _origins(data, data.query, camera_rule, query.device)
    ranked = rerank(query, gallery, metric=metric, **reranking) if reranked else distance_blocks(query, gallery, metric)
    metrics = score(ranked, pids, gallery_pids, camids, known).summary()
    return {'mAP': metrics.pop('mAP'), **metrics}


def check_reranked(data: ReidData, multi_query: bool = False, **reranking: Any) -> None:
    """Raise a ValueError if a data set cannot be re-ranked by these numbers, see `rerank`."""
    queries = len({(image.pid, image.camid) for image in data.query}) if multi_query else len(data.query)
    Reranking(**reranking).check(queries + len(data.gallery))


def evaluate_network(
        network: nn.Module,
        data: ReidData,
        metric: str = 'cosine',
        camera_rule: str = 'exclude',
        flip: bool = True,
        reranked: bool = False,
        multi_query: bool = False,
        batch_size: int = 128,
        workers: int = 2,
        device: torch.device | str | None = None,
        **reranking: Any,
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Evaluate a network that is built already; results are those of `evaluate_reid`.

    Args:
        network: A network of timm, which is moved to the device and put into evaluation mode. An embedding network
            loses its classifier.
        data: The data set, from `open_checked`.
        metric: 'cosine' or 'euclidean'.
        camera_rule: 'exclude' or 'ignore', see `evaluate_features`.
        flip: Whether features are means with those of the mirror image.
        reranked: Whether the ranking is that of k-reciprocal re-ranking.
        multi_query: One query for each identity and camera, see `pooled_queries`.
        batch_size: Images a step.
        workers: Loader processes.
        device: Device; None takes an accelerator where there is one.
        **reranking: k1, k2 and weight of re-ranking, see `rerank`.

    Returns:
        Results, and the features of queries and gallery.
    """
    model: Any = network
    extra_images = data.extra if multi_query else []
    images = [*data.query, *data.gallery, *extra_images]
    if reranked:
        check_reranked(data, multi_query, **reranking)
    drop_identities(model)
    digest = weights_digest(model.state_dict())
    preprocessing = resolve_model_data_config(model)
    where = pick_device(device)
    loader = feature_loader(images, preprocessing, where, batch_size, workers)
    features = extract_features(model.to(where), loader, where, flip)
    check_apart(features, metric)
    query, gallery, extra = features.split([len(data.query), len(data.gallery), len(extra_images)])
    metrics = evaluate_features(
        query, gallery, data, metric, camera_rule, reranked, extra if extra_images else None, multi_query, **reranking)
    if not metrics['queries']:
        raise ValueError(f"'{data.root}': no image of the gallery answers any of the queries, of which each is pooled.")
    results = {
        'architecture': model.pretrained_cfg['architecture'], 'weights_sha256': digest,
        'dataset': f'reid/{data.layout}', 'split': 'query', 'samples': len(data.query) + len(data.gallery),
        'settings': {
            'metric': metric, 'camera_rule': camera_rule, 'flip': flip, 'rerank': reranked,
            **(Reranking(**reranking).settings() if reranked else {}), 'multi_query': multi_query},
        **metrics,
        'preprocessing': preprocessing_of(preprocessing), 'versions': versions(),
    }
    return results, query, gallery


def evaluate_reid(
        model: str | Path,
        directory: str | Path,
        layout: str = '',
        **options: Any,
) -> tuple[dict[str, Any], ReidData, torch.Tensor, torch.Tensor]:
    """Evaluate a network on a data set, its own or another (cross-domain).

    Args:
        model: Folder of a run (its best checkpoint; the moving average where there is one), an exported folder,
            'hf-hub:USER/NAME', or the name of a model of timm.
        directory: Folder of the data set, or its table.
        layout: Name of the layout; empty looks what it is.
        **options: See `evaluate_network`.

    Returns:
        Results ('model', 'data', 'architecture', 'weights_sha256', 'dataset', 'split', 'samples', 'settings', the
        metrics of `evaluate_features`, 'preprocessing', 'versions', and of an exported folder 'training' and 'run'),
        the data set, and the features of queries and gallery, (Q, C) and (G, C).

    Raises:
        FileNotFoundError: The network or the data is missing.
        ValueError: No such model or layout; an image that cannot be read; no query has an answer.
        FloatingPointError: Features are not finite, or all the same.
        WeightsError: The weights cannot be had.
    """
    data = open_checked(directory, layout, options.get('camera_rule', 'exclude'))
    results, query, gallery = evaluate_network(read_network(model), data, **options)
    return record_of(model, directory, results), data, query, gallery


def open_checked(directory: str | Path, layout: str = '', camera_rule: str = 'exclude') -> ReidData:
    """Open a data set, and raise a ValueError where nothing in it can be measured or the header of an image is broken.

    Args:
        directory: Its folder, or a table.
        layout: Name of the layout; empty looks what it is.
        camera_rule: 'exclude' or 'ignore'.
    """
    data = open_reid(directory, layout)
    check_answers(data, camera_rule)
    check_images([*data.query, *data.gallery, *data.extra])
    return data


def record_of(model: str | Path, directory: str | Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return results with the names of network and data, and with what its folder tells of the training."""
    return {
        'model': str(model), 'data': str(directory), **results,
        'training': training_settings(Path(model)), 'run': training_record(Path(model))}


def settings_of(model: str | Path) -> dict[str, Any]:
    """Return how a run, or what was exported of it, evaluates: 'metric', 'camera_rule', 'flip'; {} if it is not known.

    Args:
        model: Folder of a run, a checkpoint in it, or an exported folder.
    """
    flat = flat_settings(run_settings(Path(model)) or {})
    names = {'metric': 'dist_metric', 'camera_rule': 'camera_rule', 'flip': 'flip_test'}
    given = {name: flat[f'dreal.reid.{key}'] for name, key in names.items() if f'dreal.reid.{key}' in flat}
    return given if flat.get('dreal.task') == 'reid' else {}
