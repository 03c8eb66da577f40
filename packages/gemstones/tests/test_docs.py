"""What the README and the page on the published fits say is what the records hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourfold_gemstones import tables

PACKAGE = Path(__file__).parents[1]


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_tables_are_those_of_the_records(name: str) -> None:
    """Refresh with: python -m fourfold_gemstones.tables packages/gemstones."""
    text = (PACKAGE / name).read_text(encoding="utf-8")
    assert tables.filled(text, tables.tables(PACKAGE / "results")) == text


def test_the_readme_quotes_the_idea_file() -> None:
    readme = (PACKAGE / "README.md").read_text(encoding="utf-8")
    quoted = readme.split("```python\n")[1].split("```")[0]
    source = (PACKAGE / "src" / "fourfold_gemstones" / "laws.py").read_text(encoding="utf-8")
    assert quoted in source


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text = (PACKAGE / name).read_text(encoding="utf-8")
    links = [part.split(")")[0].split("#")[0] for part in text.split("](")[1:]]
    inside = [link for link in links if not link.startswith("http")]
    assert inside
    for link in inside:
        assert ((PACKAGE / name).parent / link).exists(), link


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(ValueError, match="no table 'prices'"):
        tables.filled("<!-- table: prices -->\n<!-- end -->", {"slopes": ""})
