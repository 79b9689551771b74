"""Reads docs/protocol.md: its sections and tables."""

from __future__ import annotations

import re
from pathlib import Path

TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text("utf-8")
Row = dict[str, str]


def section(title: str) -> str:
    """The text under a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section {title}"
    return found[1]


def tables(text: str) -> list[list[Row]]:
    """Every table of a text, each row by the head of its columns."""
    found: list[list[Row]] = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        head, rule, *rows = lines
        assert set("".join(rule)) <= set("-"), f"a table without a head: {head}"
        assert all(len(row) == len(head) for row in rows), f"a row of another length: {head}"
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def table(title: str, first: str) -> list[Row]:
    """The rows of the tables of a section whose first column has that head."""
    rows = [row for rows in tables(section(title)) for row in rows if next(iter(row)) == first]
    assert rows, f"no table {first} in {title}"
    return rows


def coded(cell: str) -> list[str]:
    """What stands in backquotes."""
    return re.findall(r"`([^`]+)`", cell)
