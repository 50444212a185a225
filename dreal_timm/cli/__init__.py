"""The command line, `dreal-timm`"""
from .main import main as main
