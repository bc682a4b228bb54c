"""Reports: tables and one page from the files of runs. Reads rows and predictions; needs neither torch nor a model."""

from maple.report.collect import collect
from maple.report.page import Chapter, Opening, ThumbnailLoader
from maple.report.tables import Table, cost_tables
from maple.report.write import FORMATS, Report, write_report

__all__ = [
    "FORMATS",
    "Chapter",
    "Opening",
    "Report",
    "Table",
    "ThumbnailLoader",
    "collect",
    "cost_tables",
    "write_report",
]
