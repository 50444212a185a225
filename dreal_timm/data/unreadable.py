"""Images that cannot be read: timm skips them with their index, this adds the file"""
import logging
from typing import Any

__all__ = ['AskedReader', 'name_unreadable']

_logger = logging.getLogger('timm.data.dataset')
_last_read = ''


class AskedReader:
    """A reader of timm that remembers which image was asked of it last; timm asks for the next if one is broken."""

    def __init__(self, reader: Any):
        self.reader = reader
        self.last = -1

    def __getitem__(self, index: int) -> Any:
        self.last = index
        return self.reader[index]

    def __len__(self) -> int:
        return len(self.reader)

    def __getattr__(self, name: str) -> Any:
        if name == 'reader':  # while it is unpickled in a loader process
            raise AttributeError(name)
        return getattr(self.reader, name)


class _NamingReader(AskedReader):
    """One that remembers the file as well, for a log that knows no reader; a process reads one at a time."""

    def __getitem__(self, index: int) -> Any:
        global _last_read
        _last_read = self.reader.filename(index, absolute=True)
        return super().__getitem__(index)


def _add_file(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if message.startswith('Skipped sample') and _last_read and _last_read not in message:
        record.msg, record.args = f'{message} [{_last_read}]', None
    return True


def name_unreadable(dataset: Any) -> None:
    """Let timm's warning about an image of this data set that it skips name the file, in loader processes as well."""
    reader = getattr(dataset, 'reader', None)
    if hasattr(reader, '__getitem__') and hasattr(reader, 'samples'):  # files, not streams
        dataset.reader = _NamingReader(reader)
        if _add_file not in _logger.filters:
            _logger.addFilter(_add_file)
