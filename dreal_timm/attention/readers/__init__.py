"""Readers: how to read the attention map of each class of modules that is recognised"""
from .reader import KINDS, MapReader, map_size
from .table import READERS, WITHOUT_MAP, readers_of, register_attention, unread, without_sites

__all__ = [
    'KINDS', 'READERS', 'WITHOUT_MAP', 'MapReader', 'map_size', 'readers_of', 'register_attention', 'unread',
    'without_sites',
]
