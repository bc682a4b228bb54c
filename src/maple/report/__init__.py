"""Reports: tables and one page from the files of runs. Reads rows and predictions; needs neither torch nor a model."""

from maple.report.collect import collect
from maple.report.page import Picture
from maple.report.records import Collection
from maple.report.tables import Table
from maple.report.write import FORMATS, Report, write_report

__all__ = ["FORMATS", "Collection", "Picture", "Report", "Table", "collect", "write_report"]
