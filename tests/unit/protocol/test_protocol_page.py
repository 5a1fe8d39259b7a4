"""docs/protocol.md says what the code says."""

from __future__ import annotations

import re

from render import PAGE, PART, PARTS, ROOT, rendered


def test_every_table_and_diagram_of_the_page_is_the_codes() -> None:
    page = PAGE.read_text()
    assert rendered(page) == page, "run: python tests/unit/protocol/render.py"


def test_every_part_that_can_be_made_stands_in_the_page_once() -> None:
    assert sorted(found[2] for found in PART.finditer(PAGE.read_text())) == sorted(PARTS)


def test_files_that_the_page_names_are_there() -> None:
    named = re.findall(r"`((?:migrate|tests)/[\w./]+)`", PAGE.read_text())
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
