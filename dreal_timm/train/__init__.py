"""Training from recipes. Accelerate lives here and nowhere else: `pip install "dreal_timm[train]"`."""
from .config import find_recipe as find_recipe
from .config import list_recipes as list_recipes
from .config import load_config as load_config
from .evaluate import evaluate as evaluate
from .runner import describe as describe
from .runner import run as run
