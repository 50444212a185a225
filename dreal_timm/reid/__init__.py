"""Person re-identification: retrieval metrics"""
from .metrics import Retrieval as Retrieval
from .metrics import pool_queries as pool_queries
from .metrics import retrieve as retrieve
from .metrics import score as score
