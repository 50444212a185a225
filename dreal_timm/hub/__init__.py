"""Weights of networks: exported as folders, loaded with errors that say what to do, and started from those of others"""
from dreal_timm.errors import WeightsError as WeightsError
from dreal_timm.provenance import weights_digest as weights_digest

from .backbone import Backbone as Backbone
from .backbone import load_backbone as load_backbone
from .backbone import open_gates as open_gates
from .card import write_card as write_card
from .export import describe_network as describe_network
from .export import export as export
from .formats import export_format as export_format
from .loading import load as load
from .run import export_run as export_run
from .run import read_network as read_network
from .upload import prepare as prepare
from .upload import push as push
