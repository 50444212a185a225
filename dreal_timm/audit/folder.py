"""An audit in steps that are kept on the disk, shared by several processes"""
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from dreal_timm.audit.settings import AuditSettings
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


def _own_device(device: torch.device | str | None) -> torch.device:
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


@dataclass(frozen=True)
class _Share:
    """The parts of the images that this process, of so many, measures."""
    images: NumberedImages
    parts: Parts
    numbers: Sequence[Sequence[int]]  # of the images of each part
    rank: int
    count: int
    settings: AuditSettings
    device: torch.device

    def run(self, phase: str, measure: Callable[[Batches], Mapping[str, torch.Tensor]]) -> None:
        """Measure the parts that are not done, with a progress bar, and wait for the other processes."""
        own = range(self.rank, len(self.numbers), self.count)
        left = [index for index in own if not self.parts.done(phase, index)]
        numbers = [self.numbers[index] for index in left]
        total = sum(len(self.numbers[index]) for index in own)
        loaded = batches(self.images, numbers, self.settings.batch_size, self.settings.workers, self.device)
        with tqdm(
                total=total, initial=total - sum(map(len, numbers)), desc=f'audit, {phase} pass', unit='img',
                disable=self.rank > 0) as bar:
            for index, batch in zip(left, loaded, strict=True):
                self.parts.save(phase, index, measure(_counted(batch, bar)))
        self.wait()

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.count > 1:
            dist.barrier()


def _counted(batch: Batches, bar: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    for one in batch:
        yield one
        bar.update(len(one[2]))


def _measure(auditor: Auditor, share: _Share) -> tuple[dict[str, torch.Tensor], MapSums]:
    """Both passes over the images: what was measured of each, in their order, and sums of the maps."""
    def first(batch: Batches) -> dict[str, torch.Tensor]:
        samples, sums = first_pass(auditor, batch)
        return {**samples, **_tensors(sums)}

    share.run('first', first)
    samples, sums = _gather(share.parts, len(share.numbers))
    means = sums.means() if sums.count else {}
    share.run('second', lambda batch: second_pass(auditor, batch, means))
    if share.rank == 0:
        constant = [part for index in range(len(share.numbers)) if (part := share.parts.load('second', index))]
        for name in ('constant_log_p', 'constant_right'):
            samples[name] = torch.cat([part[name] for part in constant])
    return samples, sums


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
        settings: AuditSettings,
        provenance: Mapping[str, Any] | None = None,
) -> tuple[Audit, Auditor] | None:
    """Audit a network on a data set, in steps that are kept in `directory`/parts until they are removed.

    Where processes were started by `torchrun`, each does its share.

    Args:
        subject: The network.
        images: The images.
        directory: Folder of the audit.
        settings: Which of the images, and how.
        provenance: What else is to be said of where the numbers come from.

    Returns:
        The result and what it was measured with, on the process of rank 0; None on others.

    Raises:
        ValueError: The model has no site or none of such a name, or the folder holds parts of another audit.
    """
    if settings.batch_size < 1:
        raise ValueError(f'batch_size must be 1 or more, got {settings.batch_size}.')
    start, input_size = time.time(), settings.input_size
    with processes() as (rank, count):
        device = _own_device(settings.device)
        rows = describe_sites(subject.model, input_size)
        critic = None if subject.critic is None else subject.critic.to(device)
        auditor = Auditor(subject.model.to(device), settings.sites, input_size, critic)
        numbers = cut(draw_numbers(len(images), settings.num_samples, settings.seed))
        plan = {
            'weights': subject.weights, 'critic': critic is not None,
            'critic_sha256': None if critic is None else weights_digest(critic.state_dict()),
            'images': len(images), 'part': len(numbers[0]), 'num_samples': sum(map(len, numbers)),
            'seed': settings.seed, 'sites': [site.name for site in auditor.sites],
            'input_size': None if input_size is None else list(input_size), **(provenance or {}),
        }
        share = _Share(images, Parts(directory / 'parts', plan), numbers, rank, count, settings, device)
        if rank == 0:
            share.parts.begin()
        share.wait()
        samples, sums = _measure(auditor, share)
    if rank:
        return None
    read = set(samples['number'].tolist())
    audited = result(
        auditor, samples, sums, rows=rows,
        unreadable=[images.filename(number) for part in numbers for number in part if number not in read],
        provenance={
            'model': subject.name, 'checkpoint': subject.checkpoint, **plan,
            'label_names': subject.model.pretrained_cfg.get('label_names'), 'class_names': images.class_names(),
            'seconds': round(time.time() - start, 1), 'processes': count, 'device': str(device),
            'versions': versions(python=True),
        },
    )
    return audited, auditor


def remove_parts(directory: Path) -> None:
    """Remove the steps of a finished audit."""
    shutil.rmtree(directory / 'parts', ignore_errors=True)
