"""The charts of the page as Vega-Lite specifications. The page's script gives each the data named `rows`.

It also sets the height of charts that have a row for each label.

Colours are variables of style.css, so that a chart follows light, dark and print.
"""

import functools
from typing import Any

import altair as alt
import vl_convert

from tunebench.report.html.words import Words

Chart = alt.LayerChart | alt.FacetChart
SIDES = ["Paddle", "Torch"]
COLOURS = alt.Scale(domain=SIDES, range=["var(--paddle)", "var(--torch)"])
DASHES = alt.Scale(domain=SIDES, range=[[1, 0], [5, 4]])
WIDTHS = alt.Scale(domain=SIDES, range=[4.5, 1.8])  # equal curves of both sides stay visible
# The shares of a profile, in the order of tunebench/record.py.
PARTS = ("computing", "communication_alone", "communication_hidden", "copies", "waiting_for_host", "idle")
ROWS = alt.NamedData(name="rows")


@functools.cache
def chart_script() -> str:
    """The script that draws Vega-Lite: it defines vegaEmbed, and loads nothing."""
    version = alt.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)


def charts(words: Words) -> dict[str, dict[str, Any]]:
    """Each chart's specification, by name. The titles of axes are in the page's language."""
    made = {
        "rates": _rates(words),
        "speedups": _speedups(words),
        "steps": _curves("seconds", words.say("seconds"), words, from_zero=True),
        "loss": _curves("loss", words.say("loss"), words, from_zero=False),
        "memory": _memory(words),
        "profile": _profile(words),
    }
    return {name: _finished(chart).to_dict() for name, chart in made.items()}


def _finished(chart: Chart) -> Chart:
    ink, line = "var(--ink)", "var(--line)"
    return (
        chart.properties(width="container")
        .configure(background="transparent", font="system-ui, sans-serif")
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=ink,
            titleColor=ink,
            domainColor=line,
            tickColor=line,
            gridColor=line,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            labelLimit=260,
        )
        .configure_legend(labelColor=ink, titleColor=ink, orient="top", title=None, labelFontSize=12)
    )


def _label_axis() -> alt.Y:
    return alt.Y("label:N", sort=None, title=None, axis=alt.Axis(ticks=False, domain=False, labelPadding=6))


def _rates(words: Words) -> Chart:
    side = alt.YOffset("side:N", scale=alt.Scale(domain=SIDES))
    base = alt.Chart(ROWS).encode(y=_label_axis(), yOffset=side)
    bars = base.mark_bar().encode(
        x=alt.X("rate:Q", title=words.say("rates_title")), color=alt.Color("side:N", scale=COLOURS)
    )
    intervals = base.mark_rule(color="var(--ink)", strokeWidth=1.5).encode(x="low:Q", x2="high:Q")
    return alt.layer(bars, intervals)


def _speedups(words: Words) -> Chart:
    base = alt.Chart(ROWS).encode(y=_label_axis())
    percent = alt.X("speedup:Q", title=words.say("speedup"), axis=alt.Axis(format="+.0%"))
    noise = base.mark_bar(color="var(--band)", height=16, clip=True).encode(x=alt.X("noise_low:Q"), x2="noise_high:Q")
    zero = alt.Chart(ROWS).mark_rule(color="var(--ink)").encode(x=alt.datum(0))
    intervals = base.mark_rule(color="var(--ink)", strokeWidth=2, clip=True).encode(x="low:Q", x2="high:Q")
    shape = alt.Fill(
        "rounds:N", scale=alt.Scale(domain=["one", "more"], range=["var(--page)", "var(--ink)"]), legend=None
    )
    points = base.mark_point(size=70, stroke="var(--ink)", strokeWidth=2, opacity=1).encode(x=percent, fill=shape)
    return alt.layer(noise, zero, intervals, points)


def _curves(field: str, title: str, words: Words, from_zero: bool) -> Chart:
    lines = (
        alt.Chart(ROWS)
        .mark_line(opacity=1)
        .encode(
            x=alt.X(
                "step:Q",
                title=words.say("step"),
                scale=alt.Scale(zero=False, nice=False),
                axis=alt.Axis(tickMinStep=1, format="d"),
            ),
            y=alt.Y(f"{field}:Q", title=title, scale=alt.Scale(zero=from_zero)),
            color=alt.Color("side:N", scale=COLOURS),
            strokeWidth=alt.StrokeWidth("side:O", scale=WIDTHS),
            strokeDash=alt.StrokeDash("side:N", scale=DASHES),
            detail="run:N",
        )
    )
    warm = alt.Chart(ROWS).mark_rule(color="var(--ink)", strokeDash=[3, 3]).encode(x="max(timed_from):Q")
    return alt.layer(lines, warm).properties(height=220)


def _memory(words: Words) -> Chart:
    base = alt.Chart(ROWS).encode(y=_label_axis())
    bars = base.mark_bar(height=12).encode(
        x=alt.X("measured:Q", title="GB", axis=alt.Axis(tickCount=6)), color=alt.Color("side:N", scale=COLOURS)
    )
    ticks = base.mark_tick(color="var(--ink)", thickness=3, size=16).encode(x="predicted:Q")
    return alt.layer(bars, ticks)


def _profile(words: Words) -> Chart:
    names = [words.say(f"share_{part}") for part in PARTS]
    bars = (
        alt.Chart(ROWS)
        .mark_bar(height=16)
        .encode(
            x=alt.X(
                "share:Q",
                title=words.say("share"),
                axis=alt.Axis(format=".0%", tickCount=5),
                scale=alt.Scale(domain=[0, 1]),
            ),
            y=_label_axis(),
            color=alt.Color(
                "part:N",
                scale=alt.Scale(domain=names, range=[f"var(--part{i})" for i in range(len(PARTS))]),
                legend=alt.Legend(columns=2, labelLimit=300),
            ),
            order="place:Q",
        )
    )
    return alt.layer(bars)
