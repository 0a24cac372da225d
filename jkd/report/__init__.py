"""What trainings left, side by side: a table for the terminal, JSON, a picture, and one HTML page that needs nothing else.

``read`` reads folders, ``compare`` puts seeds together; the rest shows what that gives. Neither jax nor a config file is run.
"""

from jkd.report.compare import Group, Row, Stat, compare
from jkd.report.page import page
from jkd.report.png import png
from jkd.report.records import Folder, Record, read
from jkd.report.text import as_json, table

__all__ = ["Folder", "Group", "Record", "Row", "Stat", "as_json", "compare", "page", "png", "read", "table"]
