"""Deep reinforced attention learning (DREAL) for timm. Importing the package registers its models with timm."""
from . import models as models
from .attention import MapReader as MapReader
from .attention import find_sites as find_sites
from .attention import register_attention as register_attention
from .critic import Critic as Critic
from .task import DrealTask as DrealTask
from .version import __version__ as __version__
