"""Attention maps: where a network computes them, and how to read and to replace them"""
from .readers import MapReader as MapReader
from .readers import register_attention as register_attention
from .sites import Group as Group
from .sites import Site as Site
from .sites import attention_parameters as attention_parameters
from .sites import find_sites as find_sites
from .sites import group_sites as group_sites
