"""Fills the template of the page with content, style and scripts. The page loads nothing."""

import base64
import hashlib
import re
from importlib import metadata
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from tunebench.record import Record
from tunebench.report.html.charts import chart_script, charts
from tunebench.report.html.content import HEADLINE, SORT_KEYS, Content, content_of
from tunebench.report.html.words import Words

FOLDER = Path(__file__).parent


def page_of(records: list[Record], language: str = "en") -> str:
    """The page of these records as HTML, in one of words.LANGUAGES. Records must not be empty."""
    words = Words(language)
    content = content_of(records, words)
    scripts = [_for_html((FOLDER / "page.js").read_text(encoding="utf-8")), _for_html(chart_script())]
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Fields of work keep their order: the page names the first ones that differ.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters["code"] = _with_code
    return environment.get_template("page.html.jinja").render(
        content=content,
        runs=len(records),
        data=content.data() | {"words": words.own, "charts": charts(words)},
        records=base64.b64encode(content.packed_records()).decode(),
        ratios=base64.b64encode(content.packed_ratios()).decode(),
        words=words,
        columns=[(column.title, words.heading(column.title)) for column in HEADLINE],
        numeric=set(SORT_KEYS),
        style=Markup((FOLDER / "style.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        # The browser runs these scripts alone, and connects to nothing, whatever a record's texts hold.
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        "script-src " + " ".join(map(_digest, scripts)),
        versions=f"tunebench {metadata.version('tunebench')}",
        choices=_choices(content),
    )


def _choices(content: Content) -> dict[str, list[str]]:
    """The values that the filters offer, in the order of the rows."""
    lines = content.lines
    found = {
        "model": [line.row.model for line in lines],
        "method": [line.data["method"] for line in lines],
        "setup": [setup for line in lines for setup in line.data["setups"]],
        "status": [end for line in lines for end in line.ends],
        "significance": [line.kind for line in lines],
    }
    return {name: list(dict.fromkeys(values)) for name, values in found.items()}


def _with_code(text: str) -> Markup:
    """A text as HTML in which what stands between backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _for_html(script: str) -> str:
    """A script that an HTML parser reads to its end: `</script` and `<!--` in its strings are written apart."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
