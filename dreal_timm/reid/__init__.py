"""Person re-identification: retrieval metrics and re-ranking"""
from .metrics import Retrieval as Retrieval
from .metrics import pool_queries as pool_queries
from .metrics import retrieve as retrieve
from .metrics import score as score
from .reranking import rerank as rerank
