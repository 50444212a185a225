from .bam import BamModule as BamModule
from .gem import GemPool as GemPool
from .srm import SrmModule as SrmModule
