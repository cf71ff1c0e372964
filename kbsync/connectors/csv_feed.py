"""The `csv` connector: a feed (see `feed.py`) that is a table with a header.

    type: csv
    location: star-catalog.csv
    columns: {subject: name, object: constellation}
    delimiter: ";"                  # default: found by the header

Values stay strings. A wrong encoding, quoting or header fails the run; a row of the wrong width goes to quarantine.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kbsync.connectors.feed import FeedConnector, FeedOptions
from kbsync.connectors.table import Table

__all__ = ["CsvConnector", "CsvOptions"]


class CsvOptions(FeedOptions):
    """The keys of a `type: csv` source."""

    delimiter: Annotated[str, Field(pattern=r"^([^\w\"\s]|\t)$")] | None = None
    """One character; default: found by the header."""


class CsvConnector(FeedConnector):
    """Reads a CSV feed."""

    Options = CsvOptions
    options: CsvOptions
    accept = "text/csv, text/plain;q=0.9, */*;q=0.1"
    content_types = (
        "application/csv",
        "application/vnd.ms-excel",
        "text/csv",
        "text/plain",
        "text/tab-separated-values",
    )

    def records(self, body: bytes) -> Table:
        """The table that the body is, read once to its end. Raises BadTable where it is none."""
        table = Table(body, self.options.wanted(), delimiter=self.options.delimiter)
        for _ in table:
            pass
        return table
