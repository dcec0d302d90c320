"""Draws rows as an SVG: the paired bars of both sides' rates.

The same rows give the same bytes on every machine: no size or place depends on a font.
"""

import html
from collections.abc import Sequence
from typing import Any

from tunebench.frameworks import FRAMEWORKS
from tunebench.report.identity import METHODS
from tunebench.report.markdown import figure
from tunebench.report.pairing import SIDES, Row
from tunebench.report.stats import mean_interval
from tunebench.report.tables import verdict_on

COLOURS = {"paddle": "#2457c5", "torch": "#d9501e"}
TEXT, GRID, PAPER = "#1f2328", "#d8dee4", "#ffffff"
LABEL = "slice(split(datum.label, '\\n'), 1)"  # Vega's expression for the lines of a row's label
FONT = "Helvetica, Arial, sans-serif"
WIDTH, ROW_HEIGHT = 560, 44  # pixels of the plot and of one row of it
MARGIN = {"left": 270, "right": 20, "top": 52, "bottom": 34}
EDGE = 12  # pixels from the picture's left edge to its title
ROOM = 1.2  # the axis's length ÷ the longest bar: room for the bar's label


def picture(rows: Sequence[Row], title: str, caveat: str) -> str:
    """The rows as an SVG with a title and a line below it. Readers of screens get `description` of the rows.

    A line across a bar's end is the 95% interval of the rate, where the side has several rounds.
    """
    import altair  # only here: these imports take a second
    import vl_convert

    # The number keeps rows of one name apart. It is no part of the label.
    bars = [_bar(row, side) | {"row": f"{i}\n{_label(row)}"} for i, row in enumerate(rows) for side in SIDES]
    longest = max((bar["end"] for bar in bars), default=1)
    scale = altair.Scale(domain=[0, longest * ROOM], nice=False)
    axis: dict[str, Any] = {"domain": False, "ticks": False, "labelOverlap": False}
    rate = altair.X("rate:Q", title=None, scale=scale, axis=altair.Axis(grid=True, tickCount=6, **axis))
    place: dict[str, Any] = {
        "y": altair.Y("row:N", sort=None, title=None, axis=altair.Axis(labelExpr=LABEL, **axis)),
        "yOffset": altair.YOffset("side:N", sort=list(SIDES)),
    }
    base = altair.Chart(altair.Data(values=bars)).encode(**place)
    colour = altair.Color("side:N", scale=altair.Scale(domain=list(SIDES), range=[COLOURS[side] for side in SIDES]))
    layers = [
        base.mark_bar().encode(x=rate, color=colour.legend(None)),
        base.mark_text(align="left", dx=6).encode(x="end:Q", text="text:N"),
        base.mark_rule(strokeWidth=1.5).encode(x="low:Q", x2="high:Q").transform_filter("isValid(datum.low)"),
    ]
    caveat += " Percentages: Paddle ÷ Torch - 1."
    caveat += " Lines: 95% intervals." * any(bar["low"] is not None for bar in bars)
    chart = altair.layer(*layers).properties(
        width=WIDTH,
        height=ROW_HEIGHT * len(rows),
        padding=MARGIN,
        autosize="none",
        background=PAPER,
        title=altair.Title(title, subtitle=caveat, anchor="start", frame="group", dx=EDGE - MARGIN["left"]),
    )
    svg = vl_convert.vegalite_to_svg(chart.configure(**_style()).to_dict())
    return _described(svg, title, f"{caveat} {description(rows)}")


def description(rows: Sequence[Row]) -> str:
    """The rows in words, for those who cannot see the picture."""
    return " ".join(
        f"{_name(row)}: {', '.join(_text(row, side) for side in SIDES)}; {verdict_on(row)}." for row in rows
    )


def _bar(row: Row, side: str) -> dict[str, Any]:
    """One side's bar. A side without a rate has none, but a label."""
    rate = getattr(row, f"{side}_effective_tokens_per_second")
    spread, runs = getattr(row, f"{side}_spread"), row.rounds or getattr(row, f"{side}_runs")
    low, high = mean_interval(rate, spread, runs) if rate and spread is not None else (None, None)
    return {"side": side, "text": _text(row, side), "rate": rate, "low": low, "high": high, "end": high or rate or 0}


def _name(row: Row) -> str:
    return f"{row.model} {METHODS[row.method]}, batch {row.batch_size}, {row.paddle_setup}"


def _label(row: Row) -> str:
    return f"{_name(row)}\n{verdict_on(row)}"


def _text(row: Row, side: str) -> str:
    rate = getattr(row, f"{side}_effective_tokens_per_second")
    text = f"{rate:.0f}" if rate else figure(None, getattr(row, f"{side}_status"))
    return f"{FRAMEWORKS[side].title} {text}"


def _style() -> dict[str, Any]:
    return {
        "aria": False,  # the picture as a whole has a description
        "font": FONT,
        "view": {"stroke": None},
        "axis": {"labelColor": TEXT, "gridColor": GRID, "labelFontSize": 11, "labelLimit": 0},
        "text": {"color": TEXT, "fontSize": 11},
        "rule": {"color": TEXT},
        "title": {"color": TEXT, "subtitleColor": TEXT, "fontSize": 14, "subtitleFontSize": 11},
    }


def _described(svg: str, title: str, text: str) -> str:
    """The SVG with a title and a description, which readers of screens read in place of its parts."""
    start, rest = svg.split(">", 1)
    about = f'<title id="title">{html.escape(title)}</title><desc id="about">{html.escape(text)}</desc>'
    return f'{start} role="img" aria-labelledby="title about">{about}{rest}\n'
