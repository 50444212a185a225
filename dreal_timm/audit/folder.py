"""An audit in steps that are kept on the disk, shared by several processes"""
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from dreal_timm.audit.auditor import Auditor
from dreal_timm.audit.images import NumberedImages, batches, draw_numbers
from dreal_timm.audit.maps import MapSums
from dreal_timm.audit.parts import Parts, cut
from dreal_timm.audit.result import Audit
from dreal_timm.audit.run import Batches, first_pass, result, second_pass
from dreal_timm.audit.sites import describe_sites
from dreal_timm.audit.subject import Subject
from dreal_timm.provenance import versions, weights_digest
from dreal_timm.utils.transfer import pick_device

__all__ = ['audit_folder', 'processes', 'remove_parts']

_SAMPLES = (
    'number', 'target', 'log_p', 'right', 'mean_log_p', 'mean_right', 'quality', 'null_log_p', 'null_right')


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """Yield rank and number of the processes that `torchrun` started; a lone process needs nothing to be set up."""
    count = int(os.environ.get('WORLD_SIZE', 1))
    if count == 1:
        yield 0, 1
        return
    if not dist.is_initialized():
        dist.init_process_group('gloo', timeout=timedelta(days=1))  # they wait for each other's parts
    yield dist.get_rank(), count
    dist.barrier()


def _own_device(device: torch.device | None) -> torch.device:
    """Return the device of this process: of several GPUs, each process of a machine takes one."""
    device = pick_device(device)
    if device.type == 'cuda' and device.index is None:
        return torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count())
    return device


def _sums(tensors: Mapping[str, torch.Tensor]) -> MapSums:
    """Sums of maps out of a part."""
    fields: dict[str, dict[str, torch.Tensor]] = {'total': {}, 'squares': {}, 'spreads': {}}
    for key, tensor in tensors.items():
        field, slash, site = key.partition('/')
        if slash:
            fields[field][site] = tensor
    return MapSums(int(tensors['count']), **fields)


def _tensors(sums: MapSums) -> dict[str, torch.Tensor]:
    fields = {'total': sums.total, 'squares': sums.squares, 'spreads': sums.spreads}
    tensors = {f'{field}/{site}': tensor for field, values in fields.items() for site, tensor in values.items()}
    return {**tensors, 'count': torch.tensor(sums.count)}


class _Pass:
    """One of the two passes of this process over its parts of the images, with a progress bar."""

    def __init__(self, name: str, parts: Parts, numbers: Sequence[Sequence[int]], rank: int, count: int):
        self.name = name
        self.parts = parts
        mine = [index for index in range(len(numbers)) if index % count == rank]
        self.left = [index for index in mine if not parts.done(name, index)]
        self.numbers = [numbers[index] for index in self.left]
        total = sum(len(numbers[index]) for index in mine)
        self.bar = tqdm(
            total=total, initial=total - sum(map(len, self.numbers)), desc=f'audit, {name} pass', unit='img',
            disable=rank > 0)

    def run(
            self,
            images: NumberedImages,
            batch_size: int,
            workers: int,
            device: torch.device,
            measure: Callable[[Batches], Mapping[str, torch.Tensor]],
    ) -> None:
        loaded = batches(images, self.numbers, batch_size, workers, device)
        with self.bar:
            for index, batch in zip(self.left, loaded, strict=True):
                self.parts.save(self.name, index, measure(self._counted(batch)))

    def _counted(self, batch: Batches) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for one in batch:
            yield one
            self.bar.update(len(one[2]))


def _gather(parts: Parts, count: int) -> tuple[dict[str, torch.Tensor], MapSums]:
    """Join what the first pass wrote, in the order of the images."""
    sums, samples = MapSums(), []
    for index in range(count):
        tensors = parts.load('first', index)
        sums.merge(_sums(tensors))
        if tensors['count']:
            samples.append(tensors)
    names = [name for name in _SAMPLES if samples and name in samples[0]]
    return {name: torch.cat([tensors[name] for tensors in samples]) for name in names}, sums


def audit_folder(
        subject: Subject,
        images: NumberedImages,
        directory: Path,
        sites: Sequence[str] | None = None,
        input_size: Sequence[int] | None = None,
        num_samples: int | None = None,
        batch_size: int = 128,
        workers: int = 2,
        device: torch.device | None = None,
        seed: int = 0,
        provenance: Mapping[str, Any] | None = None,
) -> tuple[Audit, Auditor] | None:
    """Audit a network on a data set, in steps that are kept in `directory`/parts until they are removed.

    Where processes were started by `torchrun`, each does its share.

    Args:
        subject: The network.
        images: The images.
        directory: Folder of the audit.
        sites: Names of the sites to audit, or of modules that contain them; None are all.
        input_size: (C, H, W) of the images; None is the model's own.
        num_samples: Number of images, drawn at random; None are all.
        batch_size: Images a batch.
        workers: Loader processes.
        device: Device; None takes an accelerator where there is one.
        seed: Seed of the draw of images.
        provenance: What else is to be said of where the numbers come from.

    Returns:
        The result and what it was measured with, on the process of rank 0; None on others.

    Raises:
        ValueError: The model has no site or none of such a name, or the folder holds parts of another audit.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size must be 1 or more, got {batch_size}.')
    begun = time.time()
    model = subject.model
    with processes() as (rank, count):
        device = _own_device(device)
        rows = describe_sites(model, input_size)
        critic = None if subject.critic is None else subject.critic.to(device)
        auditor = Auditor(model.to(device), sites, input_size, critic)
        numbers = cut(draw_numbers(len(images), num_samples, seed))
        settings = {
            'weights': subject.weights, 'critic': critic is not None,
            'critic_sha256': None if critic is None else weights_digest(critic.state_dict()),
            'images': len(images), 'part': len(numbers[0]),
            'num_samples': sum(map(len, numbers)), 'seed': seed, 'sites': [site.name for site in auditor.sites],
            'input_size': None if input_size is None else list(input_size), **(provenance or {}),
        }
        parts = Parts(directory / 'parts', settings)
        if rank == 0:
            parts.begin()
        if count > 1:
            dist.barrier()

        def first(batch: Batches) -> dict[str, torch.Tensor]:
            samples, sums = first_pass(auditor, batch)
            return {**samples, **_tensors(sums)}

        _Pass('first', parts, numbers, rank, count).run(images, batch_size, workers, device, first)
        if count > 1:
            dist.barrier()
        samples, sums = _gather(parts, len(numbers))
        means = sums.means() if sums.count else {}
        _Pass('second', parts, numbers, rank, count).run(
            images, batch_size, workers, device, lambda batch: second_pass(auditor, batch, means))
        if count > 1:
            dist.barrier()
    if rank:
        return None
    constant = [part for index in range(len(numbers)) if (part := parts.load('second', index))]
    for name in ('constant_log_p', 'constant_right'):
        samples[name] = torch.cat([part[name] for part in constant])
    read = set(samples['number'].tolist())
    audited = result(
        auditor, samples, sums, rows=rows,
        unreadable=[images.filename(number) for part in numbers for number in part if number not in read],
        provenance={
            'model': subject.name, 'checkpoint': subject.checkpoint, **settings,
            'label_names': subject.model.pretrained_cfg.get('label_names'), 'class_names': images.class_names(),
            'seconds': round(time.time() - begun, 1), 'processes': count, 'device': str(device),
            'versions': versions(python=True),
        },
    )
    return audited, auditor


def remove_parts(directory: Path) -> None:
    """Remove the steps of a finished audit."""
    shutil.rmtree(directory / 'parts', ignore_errors=True)
