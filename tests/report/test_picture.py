"""The picture of README's rows: bars as long as the rates, readable without eyes, the same bytes on every machine."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from tunebench.report import picture as module
from tunebench.report.documents import series
from tunebench.report.pairing import LIKE_FOR_LIKE, join
from tunebench.report.picture import COLOURS, picture

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def rows():
    """The rows of measured suites, by suite: `cpu` has one round, `quick` four."""
    found = {suite: records for machine, suite, records in series() if machine == "20261128-epyc-2-cores"}
    return {
        suite: [row for row in join(found[suite]) if row.compared == LIKE_FOR_LIKE][:4] for suite in ("cpu", "quick")
    }


def bars(svg, side):
    """The lengths of a side's bars in pixels, from the top."""
    found = [path.get("d") for path in svg.iter(f"{SVG}path") if path.get("fill") == COLOURS[side]]
    return [float(path.partition("h")[2].partition("v")[0]) for path in found]


def test_bars_are_as_long_as_the_rates(rows):
    svg = ET.fromstring(picture(rows["quick"], "title", "caveat"))
    paddle, torch = (
        [getattr(row, f"{side}_effective_tokens_per_second") for row in rows["quick"]] for side in ("paddle", "torch")
    )
    scale = bars(svg, "paddle")[0] / paddle[0]
    assert bars(svg, "paddle") == pytest.approx([rate * scale for rate in paddle], abs=0.01)
    assert bars(svg, "torch") == pytest.approx([rate * scale for rate in torch], abs=0.01)
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert {f"Torch {rate:.0f}" for rate in torch} <= set(texts)


def test_rows_of_several_rounds_have_intervals(rows):
    once, often = (picture(rows[suite], "title", "caveat") for suite in ("cpu", "quick"))
    assert "95% intervals" not in once
    assert "95% intervals" in often
    count = [svg.count('stroke-width="1.5"') for svg in (once, often)]
    assert count == [0, 2 * len(rows["quick"])]


def test_readers_of_screens_get_the_rows(rows):
    svg = ET.fromstring(picture(rows["cpu"], "rates & <more>", "on a machine"))
    assert svg.get("role") == "img"
    title, about = svg[0], svg[1]
    assert svg.get("aria-labelledby").split() == [title.get("id"), about.get("id")]
    assert title.text == "rates & <more>"
    assert about.text.startswith("on a machine")
    for row in rows["cpu"]:
        assert f"{row.model} " in about.text
        assert f"Paddle {row.paddle_effective_tokens_per_second:.0f}" in about.text


def test_a_side_without_a_rate_has_its_status(rows):
    lost = replace(
        rows["cpu"][0], paddle_effective_tokens_per_second=None, paddle_status="oom", speedup=None, interval=None
    )
    svg = ET.fromstring(picture([lost, rows["cpu"][1]], "title", "caveat"))
    assert "Paddle OOM" in [text.text for text in svg.iter(f"{SVG}text")]
    assert len(bars(svg, "torch")) == 2


def test_no_place_depends_on_the_fonts_of_the_machine(rows, monkeypatch):
    drawn = picture(rows["cpu"], "title", "caveat")
    assert len(drawn.encode()) < 16_000
    monkeypatch.setattr(module, "FONT", "monospace")
    other = picture(rows["cpu"], "title", "caveat")
    assert "monospace" in other
    assert other.replace("monospace", "Helvetica, Arial, sans-serif") == drawn
