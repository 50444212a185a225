from .srm import SrmModule as SrmModule
