"""The page in headless Chromium: rows, filters, baseline, fragment, CSV, charts, contrast, and no network."""

import base64
import csv
import gzip
import io
import json
import os
import re
import shutil
import time

import pytest
from pages import UNKIND, mixed_records
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from tunebench.record import Record, parse_record
from tunebench.report.html.content import Content, content_of
from tunebench.report.html.page import page_of
from tunebench.report.html.words import Words

pytestmark = pytest.mark.frameworks  # a browser sees no difference between the environments

# The lowest contrast of all texts that are seen, by WCAG 2: of a text's colour and the nearest opaque background.
CONTRAST = """
const part = (value) => { value /= 255; return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4; };
const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const colour = numbers(getComputedStyle(element).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
    if (colour[3] > 0) throw new Error(`half transparent: ${colour}`);
  }
  throw new Error("no background");
};
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let text; (text = walk.nextNode());) {
  const element = text.parentElement;
  if (!text.data.trim() || element.closest("script, style, noscript, title, desc")) continue;
  if (!element.getClientRects().length) continue;
  const style = getComputedStyle(element);
  const ends = [numbers(element instanceof SVGElement ? style.fill : style.color), behind(element)].map(light).sort();
  found.push([(Math.max(...ends) + 0.05) / (Math.min(...ends) + 0.05), text.data.trim().slice(0, 40)]);
}
found.sort((a, b) => a[0] - b[0]);
return [found.length, ...found.slice(0, 3)];
"""


class Browser:
    """A headless Chromium that downloads to `downloads`, and the page it shows."""

    def __init__(self, driver: webdriver.Chrome, page, downloads) -> None:
        self.driver, self.page, self.downloads = driver, page, downloads

    def open(self, fragment: str = "", width: int = 1400, scheme: str = "light") -> None:
        """Opens the page anew with this fragment."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        self.driver.get("about:blank")
        self.driver.get(f"{self.page.as_uri()}#{fragment}")
        self.wait(lambda: self.run("return document.documentElement.dataset.ready"))

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition, seconds: float = 20):
        return WebDriverWait(self.driver, seconds).until(lambda _: condition())

    def all(self, selector: str):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def shown(self) -> list[str]:
        """The keys of the rows that are seen, in their order."""
        return self.run(
            "return [...document.querySelectorAll('tr[data-row]')].filter(line => line.getClientRects().length)"
            ".map(line => line.dataset.row)"
        )

    def choose(self, name: str, value: str) -> None:
        self.run("document.getElementById('filter-box').open = true")
        Select(self.one(f"select[name={name}]")).select_by_value(value)

    def fragment(self) -> str:
        return self.driver.current_url.partition("#")[2]

    def texts(self, key: str, kind: str) -> list[str]:
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)",
            f"tr[data-row='{key}'] {kind}",
        )

    def tables(self, selector: str) -> list[list[list[str]]]:
        """The texts of these tables, by line and cell."""
        return self.run(
            "return [...document.querySelectorAll(arguments[0])]"
            ".map(table => [...table.rows].map(line => [...line.cells].map(cell => cell.textContent)))",
            selector,
        )

    def csv(self) -> list[dict[str, str]]:
        """Presses the button of the CSV and reads the file."""
        file = self.downloads / "report.csv"
        file.unlink(missing_ok=True)
        self.run("document.getElementById('filter-box').open = true")
        self.one("#csv").click()
        self.wait(file.exists)
        return list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))))


def chromium() -> tuple[str, str]:
    """The browser and its driver. Without them the test fails in CI, and is skipped elsewhere."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if browser and driver:
        return browser, driver
    missing = "Chromium or its chromedriver is not on the path: apt-get install chromium chromium-driver"
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Real records of two machines, some edited to every kind of end."""
    return mixed_records()


@pytest.fixture(scope="module")
def content(records) -> Content:
    """What the page shows of them."""
    return content_of(records, Words("en"))


@pytest.fixture(scope="module")
def session(records, tmp_path_factory):
    """A browser with the page of these records. At the end: no error in its console, no request to a network."""
    browser, driver = chromium()
    folder = tmp_path_factory.mktemp("page")
    for language in ("en", "zh"):
        (folder / f"{language}.html").write_text(page_of(records, language), encoding="utf-8")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("headless=new", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={folder / 'profile'}"):
        options.add_argument(f"--{argument}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses root otherwise
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield Browser(running, folder / "en.html", folder)
        messages = [json.loads(entry["message"])["message"] for entry in running.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        asked = [each["request"]["url"] for each in sent if not each["documentURL"].startswith("chrome:")]
        assert asked
        assert {url.partition(":")[0] for url in asked} <= {"file", "about", "blob", "data"}
        assert running.get_log("browser") == []
    finally:
        running.quit()


def key_of(content: Content, **wanted) -> str:
    """The key of the first row with these values in the data of the page."""
    return next(
        row["id"] for row in content.data()["rows"] if all(row[name] == value for name, value in wanted.items())
    )


@pytest.mark.parametrize("width", [360, 1400])
def test_every_row_is_shown_and_the_page_does_not_scroll_sideways(session, content, width):
    session.open(width=width)
    assert session.shown() == [line.key for line in content.lines]
    assert session.run("return document.documentElement.scrollWidth") <= width
    lines = {line.key: line for line in content.lines}
    for key, line in lines.items():
        assert session.texts(key, ".verdict") == [line.verdict]
    # The speedup is seen without scrolling the table, on a phone too.
    for cell in session.all("tr[data-row] .verdict")[:4]:
        assert cell.rect["x"] + 60 < width


def other_machine(content):
    """The key of the second machine."""
    return next(machine.key for machine in content.machines if machine.name.startswith("Other CPU"))


def test_each_filter_shows_its_rows_and_stands_in_the_fragment(session, content):
    rows = content.data()["rows"]
    for name, field, value in (
        ("machine", "machine", other_machine(content)),
        ("model", "model", "bloom-tiny"),
        ("method", "method", "LoRA"),
        ("setup", "setups", "ZeRO 3, fp32"),
        ("status", "ends", "oom"),
        ("status", "ends", "disturbed"),
        ("significance", "kind", "unclear"),
    ):
        session.open()
        session.choose(name, value)
        wanted = [r["id"] for r in rows if (value in r[field] if isinstance(r[field], list) else r[field] == value)]
        assert 0 < len(wanted) < len(rows)
        assert session.shown() == wanted, (name, value)
        given = session.fragment()
        session.open(given)
        assert session.shown() == wanted
        assert session.one(f"select[name={name}]").get_property("value") == value
        assert session.one("#shown").text == f"{len(wanted)} of {len(rows)} rows shown"
    session.one("button[type=reset]").click()
    assert session.shown() == [row["id"] for row in rows]
    assert session.fragment() == ""


def test_rows_that_ended_otherwise_say_so(session, content):
    session.open()
    for line in content.lines:
        (status,) = session.texts(line.key, "td.status")
        assert status == line.status
    seen = " ".join(line.status for line in content.lines)
    for words in ("out of memory", "unsupported", "failed", "timed out", "disturbed by other programs"):
        assert words in seen
    # Words tell how a row ended, and a colour of its own makes the others stand out.
    colours: dict[bool, set[str]] = {True: set(), False: set()}
    for line in content.lines:
        cell = session.one(f"tr[data-row='{line.key}'] td.status")
        colours[line.ends == ["ok"]].add(cell.value_of_css_property("color"))
    assert len(colours[True]) == len(colours[False]) == 1
    assert colours[True] != colours[False]
    (verdict,) = session.texts(key_of(content, model=UNKIND), ".verdict")
    assert verdict.startswith("disturbed: ")
    session.open(f"model={UNKIND}")
    session.wait(lambda: session.run("return document.querySelector('figure .extent').textContent"))
    assert "Rows without a comparison are not drawn: 1." in session.one("figure[data-chart=rates] .extent").text
    assert not session.all("section:not([hidden]) figure[data-chart] svg")


def test_sorting_by_a_heading_with_the_keyboard(session, content):
    session.open(f"machine={other_machine(content)}")
    rates = {line.key: line.row.torch_effective_tokens_per_second for line in content.lines}
    button = session.one("section:not([hidden]) th[data-column='Torch Effective Tokens/s'] button")
    for sign, said in ((1, "ascending"), (-1, "descending")):
        button.send_keys(Keys.ENTER)
        assert session.shown() == sorted(session.shown(), key=lambda key: sign * rates[key])
        assert session.one("section:not([hidden]) th[aria-sort]").get_attribute("aria-sort") == said
    assert "sort=-Torch+Effective+Tokens%2Fs" in session.fragment()
    order = session.shown()
    session.open(session.fragment())
    assert session.shown() == order


def test_a_baseline_gives_signed_percents_for_the_same_work_alone(session, content):
    rows = content.data()["rows"]
    base = next(r for r in rows if r["model"] == "llama-tiny" and "ZeRO 3, fp32" in r["setups"] and r["kind"] == "one")
    session.open()
    assert not session.one(".against").is_displayed()
    session.choose("base", base["id"])
    session.wait(lambda: session.one("#baseline").is_displayed())
    assert f"base={base['id']}" in session.fragment()
    assert session.one("#baseline").text.startswith(f"Baseline: row {base['number']}.")
    compared = 0
    for row in rows:
        for side, text in enumerate(session.texts(row["id"], "td.against")):
            own = row["cells"][side]
            ratio = None if own is None else content.ratios[own].get(base["cells"][side])
            if row is base:
                assert text == "baseline"
            elif row["machine"] != base["machine"]:
                assert text == "not comparable: another machine"
            elif ratio and "text" in ratio:
                assert text == ratio["text"]
                assert text[0] in "+-"
                rate = [r["rates"][side] for r in (row, base)]
                assert float(text.split("%")[0]) / 100 == pytest.approx(rate[0] / rate[1] - 1, abs=0.006)
                compared += 1
            else:
                assert text.startswith("not comparable: "), text
    assert compared == 4  # MP 4 and ZeRO 2, on both sides
    other = next(r for r in rows if r["model"] == "bloom-tiny" and r["machine"] == base["machine"])
    assert session.texts(other["id"], "td.against")[0].startswith("not comparable: other work (")
    assert "model" in session.texts(other["id"], "td.against")[0]


def test_the_csv_has_what_is_shown(session, content):
    lines = {line.key: line for line in content.lines}
    session.open("method=LoRA&sort=-Speedup")
    shown, rows = session.shown(), session.csv()
    assert len(rows) == len(shown) > 3
    for key, row in zip(shown, rows, strict=True):
        assert row["Model"] == lines[key].row.model
        assert row["Speedup"] == lines[key].verdict
        assert row["Note"] == (lines[key].row.note or "")
        assert row["Status"] == lines[key].status
        assert (row["Row"], row["Method"]) == (str(lines[key].number), "LoRA")
    assert "Paddle to baseline" not in rows[0]
    session.choose("base", shown[0])
    session.wait(lambda: session.one("#baseline").is_displayed())
    assert session.csv()[0]["Paddle to baseline"] == "baseline"


def test_a_row_opens_to_its_runs(session, content):
    line = next(line for line in content.lines if line.kind == "slower" and line.row.rounds >= 4)
    session.open()
    button = session.one(f"tr[data-row='{line.key}'] button.open")
    assert button.get_attribute("aria-expanded") == "false"
    button.send_keys(Keys.ENTER)
    session.wait(lambda: len(session.all(".detail figure svg")) == 3)
    assert session.fragment() == f"open={line.key}"
    assert button.get_attribute("aria-expanded") == "true"
    assert session.driver.switch_to.active_element == button
    for picture in session.all(".detail svg, figure[data-chart] svg"):
        assert picture.get_attribute("role") == "img"
        for relation in ("aria-labelledby", "aria-describedby"):
            (named,) = session.all(f"[id='{picture.get_attribute(relation)}']")
            assert named.get_attribute("textContent").strip()
    runs = [content.records[run["record"]] for cell in line.cells for run in content.cells[cell]["runs"]]
    texts = session.run("return [...document.querySelectorAll('.detail pre.record')].map(e => e.textContent)")
    assert [parse_record(text.encode()) for text in texts] == runs
    commands = session.run("return [...document.querySelectorAll('.detail pre.command')].map(e => e.textContent)")
    assert commands[0].startswith(f"python3 paddle/{runs[0].argv[0]} --")
    tables = session.tables(".detail table")
    steps, losses = (t for t in tables if t[0][0] == "Step")
    assert len(steps) == len(losses) == 1 + len(runs[0].steps.seconds)
    assert float(steps[3][1]) == pytest.approx(runs[0].steps.seconds[2], rel=1e-4)
    assert float(losses[3][1]) == pytest.approx(runs[0].steps.loss[2], rel=1e-4)
    fields = {cells[0]: cells[1:] for t in tables for cells in t}
    assert fields["Padding share (timed steps)"][0] == f"{content.cells[line.cells[0]]['padding']:.1%}"
    assert fields["versions.torch"] == ["", "2.13.0+cpu"]
    button.send_keys(Keys.ENTER)
    assert session.fragment() == ""
    assert not session.all(".detail")


def test_a_failed_row_opens_to_its_reason_and_log(session, content):
    key = next(line.key for line in content.lines if "failed" in line.ends)
    session.open(f"open={key}")
    session.wait(lambda: session.all(".detail pre.record"))
    text = session.run("return document.querySelector('.detail').textContent")
    assert "failed: ended by failed" in text
    assert f"{UNKIND} said nothing more" in text
    assert not session.all("img")


PROFILE = {
    "steps": 3,
    "ranks": [
        {
            "seconds": 2.0,
            "shares": {
                "computing": 0.5,
                "communication_alone": 0.1,
                "communication_hidden": 0.05,
                "copies": 0.05,
                "waiting_for_host": 0.2,
                "idle": 0.1,
            },
            "kinds": {"matrix products": 0.8, "attention": 0.2},
            "longest": [{"name": "aten::mm", "kind": "matrix products", "seconds": 0.75, "calls": 90.0}],
            "memory": [[0.0, 0], [1.0, 1000]],
            "trace": "rank0.json.gz",
        }
    ],
}


def test_a_profile_shows_where_the_time_went(session, content):
    """On the page of records with a profile. The page reads it from the record's JSON."""
    line = next(line for line in content.lines if line.kind == "slower")
    run = content.cells[line.cells[0]]["runs"][0]["record"]
    own = session.page
    text = own.read_text(encoding="utf-8")
    packed = re.search(r'id="records">([^<]*)<', text)[1]
    records = gzip.decompress(base64.b64decode(packed)).decode().split("\n")
    changed = json.loads(records[run]) | {"profile": PROFILE}
    if "profile" in Record.model_fields:
        Record.model_validate({name: value for name, value in changed.items() if name != "sha256"})
    records[run] = json.dumps(changed)
    again = base64.b64encode(gzip.compress("\n".join(records).encode())).decode()
    session.page = own.with_name("profiled.html")
    session.page.write_text(text.replace(packed, again), encoding="utf-8")
    try:
        session.open(f"open={line.key}")
        session.wait(lambda: len(session.all(".detail figure svg")) == 4)
        assert "Where the time went" in session.one(".detail").text
        tables = session.tables(".detail table")
        shares, kinds, longest = (t for t in tables if t[0][1] in ("computing", "matrix products", "Kernel"))
        assert shares[1][1:] == ["50.0%", "10.0%", "5.0%", "5.0%", "20.0%", "10.0%"]
        assert kinds == [["Run", "matrix products", "attention"], [shares[1][0], "0.8", "0.2"]]
        assert longest[1][1:] == ["aten::mm", "matrix products", "0.75", "90"]
        assert len(session.all(".detail figure:last-of-type svg .mark-rect path")) >= 6
    finally:
        session.page = own


def test_charts_are_drawn_from_the_shown_rows(session, content):
    session.open(f"machine={other_machine(content)}")
    figures = session.all("section:not([hidden]) figure[data-chart]")
    session.run("arguments[0].scrollIntoView()", figures[0])
    session.wait(lambda: len(session.all("section:not([hidden]) figure[data-chart] svg")) == 2)
    rows = [line for line in content.lines if line.data["model"] and line.key in session.shown()]
    numbers = session.tables("section:not([hidden]) .numbers table")
    assert [cells[1] for cells in numbers[1][1:]] == [line.verdict for line in rows]
    assert len(numbers[0]) == 1 + 2 * len(rows)
    first = rows[0].data
    assert [float(text) for text in numbers[0][1][2:]] == pytest.approx(
        [first["rates"][0], *first["intervals"][0]], abs=0.01
    )
    bars = session.all("section:not([hidden]) figure[data-chart=rates] svg .mark-rect path")
    assert len(bars) >= 2 * len(rows)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_texts_have_a_contrast_of_at_least_4_5(session, content, scheme, width):
    base = content.lines[0].key
    session.open(f"open={base}&base={base}", width=width, scheme=scheme)
    session.wait(lambda: len(session.all(".detail figure svg")) == 3)
    session.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    session.run("document.querySelectorAll('figure[data-chart]').forEach(f => f.scrollIntoView())")
    session.wait(lambda: len(session.all("figure[data-chart] svg")) >= 2)
    count, *lowest = session.run(CONTRAST)
    assert count > 500
    assert lowest[0][0] >= 4.5, lowest
    assert lowest[0][0] < 21


def test_in_chinese(session):
    own, session.page = session.page, session.page.with_name("zh.html")
    try:
        session.open("status=oom", width=360)
        assert session.one("html").get_attribute("lang") == "zh-CN"
        assert session.one("h1").text == "Paddle 与 Torch 微调速度对比"
        assert "内存不足" in session.one("tr[data-row]:not([hidden]) td.status").get_attribute("textContent")
        assert session.run("return document.documentElement.scrollWidth") <= 360
    finally:
        session.page = own


def test_a_fragment_of_another_page_does_no_harm(session, content):
    session.open("model=nowhere&open=1,2&base=x&sort=Nothing&machine=%00")
    assert session.shown() == [line.key for line in content.lines]
    time.sleep(0.1)
    assert not session.all(".detail")
