"""What timm's reader of webdataset shards needs to be exact: every image counted once, the same order after a resume"""
from typing import Any

__all__ = ['check_shards', 'count_once', 'restart']


def check_shards(dataset: Any, processes: int, workers: int) -> None:
    """Raise a ValueError if a stream has fewer shards than readers: one would have nothing to read, and others wait.

    Args:
        dataset: A data set of timm.
        processes: Number of training processes.
        workers: Loader processes of each; 0 reads in the process itself.
    """
    shards = getattr(getattr(getattr(dataset, 'reader', None), 'split_info', None), 'filenames', None)
    readers = processes * max(workers, 1)
    if shards is not None and len(shards) < readers:
        raise ValueError(
            f'workers: {readers} readers ({processes} processes with {max(workers, 1)} each) for {len(shards)} shards: '
            'take fewer workers, or cut the data into more shards.'
        )


class _CountOnce:
    """Sets the reader up, and lets it end where its own shards end.

    With several processes timm fills their shares up to one size, by repeating images; an evaluation needs no such
    thing, since its processes meet only at its end.
    """

    def __init__(self, reader: Any):
        self.reader = reader

    def __call__(self) -> None:
        type(self.reader)._lazy_init(self.reader)
        self.reader.dist_num_replicas = 1


def count_once(dataset: Any) -> None:
    """Let processes that share a validation stream see each of its images once."""
    dataset.reader._lazy_init = _CountOnce(dataset.reader)


def restart(dataset: Any, epoch: int) -> None:
    """Let the order of a stream that is read in the process itself depend on its seed and the epoch alone.

    Its shuffle buffer would go on from epoch to epoch, and a resumed run see another order. Loader processes are
    started and seeded with each epoch; they carry nothing.
    """
    reader: Any = getattr(dataset, 'reader', None)
    if hasattr(reader, '_lazy_init') and hasattr(reader, 'split_info'):
        reader.ds = None
        reader.worker_seed = reader.common_seed + epoch
