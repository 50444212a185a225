"""Deep reinforced attention learning (DREAL) for timm. Importing the package registers its models with timm."""
from . import models as models
from .attention import find_sites as find_sites
from .critic import Critic as Critic
from .readers import Reader as Reader
from .readers import register_attention as register_attention
from .task import DrealTask as DrealTask
from .version import __version__ as __version__
