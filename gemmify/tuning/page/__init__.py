"""The report of a tuning log: one HTML page that needs no network. `data` says what is shown, the rest how.

    html = page(collect(records, counts))

The page is made from the records alone. It holds no link, no font and no script from elsewhere, and opens from a file.
"""

from .data import Page, collect
from .html import page

__all__ = ["Page", "collect", "page"]
