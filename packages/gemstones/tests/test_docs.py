"""What the README and the page on the published fits say is what the records hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourfold_gemstones import tables
from fourfold_parallel.common.records import read_record

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


def test_certificates_are_as_the_page_says() -> None:
    """The sentence under "Certificate", and the number in the title of the first section."""
    events = read_record(PACKAGE / "results" / "published.jsonl").of("refit")
    two = [event for event in events if event.number("terms") == 2]
    assert (len(events), len(two)) == (42, 32)
    assert all(event.number("starts") == 24 for event in events)
    assert min(event.number("agreeing") for event in events) >= 15
    assert min(event.number("agreeing") for event in two) >= 23
    steepest = sorted(events, key=lambda event: event.number("relative_gradient"))
    assert steepest[-1].values["frame"] == "hot_100b+_512x"
    assert steepest[-1].number("relative_gradient") < 2e-4
    assert steepest[-2].number("relative_gradient") < 2e-6
    floorless = [event for event in events if event.values["at_bound"]]
    assert {event.number("terms") for event in floorless} == {3}
    far = tables.above_optimum(read_record(PACKAGE / "results" / "published.jsonl"))
    assert len(far) == 13
    assert sum(event.number("delta") == 1e-4 for event in far) == 12


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(ValueError, match="no table 'prices'"):
        tables.filled("<!-- table: prices -->\n<!-- end -->", {"slopes": ""})
