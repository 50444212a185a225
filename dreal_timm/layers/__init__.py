from .bam import BamModule as BamModule
from .srm import SrmModule as SrmModule
