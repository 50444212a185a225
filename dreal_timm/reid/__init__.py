"""Person re-identification: data sets and their check, P x K batches, retrieval metrics and re-ranking"""
from .checking import Check as Check
from .checking import check_reid as check_reid
from .checking import unanswered as unanswered
from .layouts import ReidData as ReidData
from .layouts import ReidImage as ReidImage
from .layouts import open_reid as open_reid
from .metrics import Retrieval as Retrieval
from .metrics import pool_queries as pool_queries
from .metrics import retrieve as retrieve
from .metrics import score as score
from .reranking import rerank as rerank
from .sampling import PKSampler as PKSampler
