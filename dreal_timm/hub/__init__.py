"""Weights of networks: exported as folders, and started from those of others"""
from .backbone import Backbone as Backbone
from .backbone import load_backbone as load_backbone
from .backbone import open_gates as open_gates
from .export import export as export
from .run import export_run as export_run
