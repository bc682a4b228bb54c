"""Reports: tables and one page from the files of runs. Reads rows and predictions; needs neither torch nor a model."""

from maple.report.collect import collect
from maple.report.cost_tables import cost_tables
from maple.report.costs import FOLDER as COSTS
from maple.report.page import Picture
from maple.report.records import Collection, CostRow
from maple.report.tables import Table
from maple.report.write import FORMATS, Report, write_report

__all__ = [
    "COSTS",
    "FORMATS",
    "Collection",
    "CostRow",
    "Picture",
    "Report",
    "Table",
    "collect",
    "cost_tables",
    "write_report",
]
