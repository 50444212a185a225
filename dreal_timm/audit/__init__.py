"""What attention does in a network: which sites it has"""
from .sites import SiteRow as SiteRow
from .sites import describe_sites as describe_sites
from .sites import format_sites as format_sites
