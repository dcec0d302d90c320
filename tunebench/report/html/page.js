"use strict";
// The page's own script: filters, order, baseline and open rows, all kept in the URL's fragment. It computes no
// statistics: every verdict is in the data. Records stay compressed until a row is opened, the ratios of rows until there
// is a baseline.
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const FILTERS = ["machine", "model", "method", "setup", "status", "significance"];
  const SIDES = ["Paddle", "Torch"];
  const MOST_DRAWN = 40; // rows of a chart
  const ROW_HEIGHTS = { rates: 24, speedups: 24, memory: 20, profile: 26 }; // pixels of a label
  const form = document.getElementById("filters");
  const byId = new Map(DATA.rows.map((row) => [row.id, row]));
  const say = (key, values = {}) => DATA.words[key].replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
  const place = new Intl.NumberFormat("en", { maximumSignificantDigits: 5, useGrouping: false });
  const figure = (value) => (value === null || value === undefined ? "" : place.format(value));
  const fixed = (value, digits) => (value === null || value === undefined ? "" : value.toFixed(digits));
  const percent = (value, digits = 1) =>
    value === null || value === undefined ? "" : `${value >= 0 ? "+" : ""}${(value * 100).toFixed(digits)}%`;

  // An element with attributes and children; texts become text, never markup.
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "onclick") element.addEventListener("click", value);
      else if (value !== false && value !== null) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  function table(columns, lines, caption) {
    return make(
      "table", {},
      make("caption", {}, caption),
      make("thead", {}, make("tr", {}, ...columns.map((column) => make("th", { scope: "col" }, column)))),
      make("tbody", {}, ...lines.map((line) =>
        make("tr", {}, ...line.map((text, i) => make(i ? "td" : "th", i ? {} : { scope: "row" }, String(text ?? "")))))),
    );
  }

  const scrolled = (label, content, kind = "scroll numbers") => make("div", { class: kind, tabindex: 0, role: "region", "aria-label": label }, content);
  const folded = (summary, content) => make("details", {}, make("summary", {}, summary), content);

  // What stands compressed in the page.

  const canUnpack = "DecompressionStream" in window;
  let ratios = null; // of each cell to others of the same work

  async function unpacked(id) {
    const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  // State: the values of the filters, the column that sorts, the baseline, the open rows.

  function readState() {
    const given = new URLSearchParams(location.hash.slice(1));
    const state = Object.fromEntries([...FILTERS, "base"].map((name) => [name, given.get(name) ?? ""]));
    for (const name of [...FILTERS, "base"]) {
      if (![...form.elements[name].options].some((option) => option.value === state[name])) state[name] = "";
    }
    if (!canUnpack) state.base = "";
    state.sort = given.get("sort") ?? "";
    state.open = (given.get("open") ?? "").split(",").filter((id) => byId.has(id));
    return state;
  }

  function writeState() {
    const kept = new URLSearchParams();
    for (const name of [...FILTERS, "base", "sort"]) if (state[name]) kept.set(name, state[name]);
    if (state.open.length) kept.set("open", state.open.join(","));
    const fragment = `#${kept}`;
    if (fragment !== (location.hash || "#")) location.replace(fragment);
  }

  let state = readState();

  // The table: which rows are shown, in which order, with which baseline.

  const lineOf = new Map();
  for (const line of document.querySelectorAll("tr[data-row]")) {
    const row = byId.get(line.dataset.row);
    lineOf.set(row.id, line);
    const cell = line.cells[0];
    const open = make("button", {
      type: "button", class: "open", "aria-expanded": "false", "aria-label": say("open_row", { number: row.number }),
      onclick: () => toggle(row.id),
    }, String(row.number));
    cell.replaceChildren(open);
  }

  for (const head of document.querySelectorAll("table.headline thead th")) {
    const title = head.textContent;
    const column = head.dataset.column;
    head.replaceChildren(make("button", { type: "button", title: say("sort_by", { column: title }), onclick: () => {
      state.sort = state.sort === column ? `-${column}` : state.sort === `-${column}` ? "" : column;
      apply();
    } }, title));
  }

  function passes(row) {
    return (!state.machine || row.machine === state.machine)
      && (!state.model || row.model === state.model)
      && (!state.method || row.method === state.method)
      && (!state.setup || row.setups.includes(state.setup))
      && (!state.status || row.ends.includes(state.status))
      && (!state.significance || row.kind === state.significance);
  }

  // The words for the part of the work that a field belongs to; the field itself where there are none.
  function partOfWork(field) {
    const known = ["plan", "model", "setup", "steps", "timed_from", "git", "hardware"].find((part) => field.startsWith(part));
    return known ? say(`work_${known}`) : field;
  }

  // What a row says to the baseline, for the side with this index: a text, and a number where there is one.
  function against(row, side) {
    const base = byId.get(state.base);
    if (row.id === base.id) return { text: say("is_baseline"), value: 0 };
    const refuse = (why) => ({ text: say("not_comparable", { why }), value: null, refused: true });
    if (row.machine !== base.machine) return refuse(say("other_machine"));
    const [mine, theirs] = [row, base].map((one) => (one.cells[side] === null ? null : DATA.cells[one.cells[side]]));
    if (!mine || !theirs || !mine.timed || !theirs.timed) return refuse(say("no_side"));
    if (row.cells[side] === base.cells[side]) return { text: say("is_baseline"), value: 0 };
    if (mine.work !== theirs.work) {
      const [ours, others] = [DATA.works[mine.work], DATA.works[theirs.work]];
      const fields = Object.keys({ ...ours, ...others }).filter((name) => JSON.stringify(ours[name]) !== JSON.stringify(others[name]));
      return refuse(say("other_work", { fields: [...new Set(fields.map(partOfWork))].join(", ") }));
    }
    const ratio = ratios[row.cells[side]][base.cells[side]];
    return ratio.refusal ? refuse(ratio.refusal) : ratio;
  }

  function showBaseline() {
    const base = byId.get(state.base);
    const told = document.getElementById("baseline");
    told.hidden = !base;
    told.textContent = base ? `${say("baseline_of", { number: base.number })} ${base.label}` : "";
    for (const cell of document.querySelectorAll(".against")) cell.hidden = !base;
    for (const [id, line] of lineOf) {
      line.classList.toggle("baseline", id === state.base);
      line.querySelectorAll("td.against").forEach((cell, side) => {
        if (!base) return cell.replaceChildren();
        const found = against(byId.get(id), side);
        cell.replaceChildren(found.refused ? make("span", { class: "refused" }, found.text) : found.text);
        cell.dataset.sort = found.value ?? "";
      });
    }
  }

  function sortKey(cell) {
    const key = cell.dataset.sort ?? cell.textContent;
    const number = Number(key);
    return key === "" ? null : Number.isNaN(number) ? key : number;
  }

  function compareKeys(a, b, sign) {
    if (a === null || b === null) return (a === null) - (b === null); // rows without a value come last
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    return sign * String(a).localeCompare(String(b), "en", { numeric: true });
  }

  function order() {
    const sign = state.sort.startsWith("-") ? -1 : 1;
    const column = state.sort.replace(/^-/, "");
    for (const own of document.querySelectorAll("table.headline")) {
      const heads = [...own.tHead.rows[0].cells];
      const at = heads.findIndex((head) => head.dataset.column === column);
      heads.forEach((head, i) => {
        if (i === at) head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        else head.removeAttribute("aria-sort");
      });
      const before = [...own.tBodies[0].rows].filter((line) => line.dataset.row);
      const lines = [...before].sort((a, b) => (at < 0 ? 0 : compareKeys(sortKey(a.cells[at]), sortKey(b.cells[at]), sign))
        || byId.get(a.dataset.row).number - byId.get(b.dataset.row).number);
      if (lines.every((line, i) => line === before[i])) continue; // a line that is moved loses the keyboard's focus
      for (const line of lines) {
        const opened = line.nextElementSibling?.classList.contains("details") ? line.nextElementSibling : null;
        own.tBodies[0].append(line, ...(opened ? [opened] : []));
      }
    }
  }

  const shownLines = (part) => [...part.querySelectorAll("tr[data-row]")].filter((line) => !line.hidden);

  // Shows what the state says. It ends when all is shown but charts and details.
  async function apply() {
    if (state.base) ratios ??= JSON.parse(await unpacked("ratios"));
    for (const name of [...FILTERS, "base"]) form.elements[name].value = state[name];
    let shown = 0;
    for (const [id, line] of lineOf) {
      line.hidden = !passes(byId.get(id));
      shown += !line.hidden;
    }
    for (const line of document.querySelectorAll("tr[data-model]")) {
      line.hidden = Boolean((state.model && line.dataset.model !== state.model) || (state.method && line.dataset.method !== state.method));
    }
    showBaseline();
    for (const [id, line] of lineOf) setOpen(id, line);
    order();
    for (const part of document.querySelectorAll("section.machine")) {
      const empty = part.querySelector("table.headline") && !shownLines(part).length;
      part.hidden = Boolean(empty || (state.machine && part.dataset.machine !== state.machine));
    }
    document.getElementById("nothing").hidden = shown > 0 || !DATA.rows.length;
    document.getElementById("shown").textContent = say("shown", { shown, total: DATA.rows.length });
    writeState();
    for (const drawn of document.querySelectorAll("figure[data-chart]")) waiting.observe(drawn);
    for (const drawn of document.querySelectorAll("figure[data-chart]")) if (drawn.dataset.near) drawOverview(drawn);
  }

  // Charts. Each is drawn when it comes near the window.

  const waiting = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      entry.target.dataset.near = "yes";
      waiting.unobserve(entry.target);
      drawOverview(entry.target);
    }
  }, { rootMargin: "300px" });

  let chartsMade = 0;
  // The charts' script stands below this one, so that the table is ready before it is read.
  const loaded = new Promise((resolve) => document.addEventListener("DOMContentLoaded", resolve));

  // The ends of the axis of speedups: every point and the noise, not every interval. One wide interval would hide the rest.
  function reach(rows) {
    const end = 1.25 * Math.max(0.08, ...rows.map((row) => Math.max(Math.abs(row.speedup), row.noise_high ?? 0)));
    return [Math.max(-1, -end), end];
  }

  async function draw(target, name, rows, title, description) {
    await loaded;
    const room = target.clientWidth;
    if (!room) return;
    const specification = structuredClone(DATA.charts[name]);
    specification.datasets = { rows };
    const labels = [...new Set(rows.map((row) => row.label))];
    if (name in ROW_HEIGHTS) specification.height = ROW_HEIGHTS[name] * labels.length;
    for (const { encoding } of specification.layer) {
      if (encoding.y?.field === "label") encoding.y.scale = { domain: labels }; // else each layer adds its own in its order
      if (encoding.x?.field === "speedup") encoding.x.scale = { domain: reach(rows) };
    }
    specification.config.axis.labelLimit = Math.max(110, Math.min(330, room * 0.42));
    const { view } = await window.vegaEmbed(target, specification, {
      actions: false, renderer: "svg", ast: true, tooltip: false, defaultStyle: false, mode: "vega-lite",
      logLevel: 1, // errors: a layer without values is none
    });
    const picture = view.container().querySelector("svg");
    chartsMade += 1;
    const [titleId, textId] = [`title-${chartsMade}`, `text-${chartsMade}`];
    const space = "http://www.w3.org/2000/svg";
    for (const [tag, id, text] of [["desc", textId, description], ["title", titleId, title]]) {
      const element = document.createElementNS(space, tag);
      element.id = id;
      element.textContent = text;
      picture.prepend(element);
    }
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-labelledby", titleId);
    picture.setAttribute("aria-describedby", textId);
    for (const inner of picture.querySelectorAll("[role]")) inner.removeAttribute("role");
  }

  function drawOverview(drawn) {
    const name = drawn.dataset.chart;
    const rows = shownLines(drawn.closest("section")).map((line) => byId.get(line.dataset.row));
    const known = rows.filter((row) => row.speedup !== null || (name === "rates" && row.ends.join() === "alone"));
    const some = known.slice(0, MOST_DRAWN);
    const data = name === "rates"
      ? some.flatMap((row) => SIDES.map((side, i) => ({
        label: row.label, number: row.number, side, rate: row.rates[i], low: row.intervals[i]?.[0] ?? null, high: row.intervals[i]?.[1] ?? null,
      })).filter((bar) => bar.rate !== null))
      : some.map((row) => ({
        label: row.label, number: row.number, speedup: row.speedup, low: row.interval?.[0] ?? null, high: row.interval?.[1] ?? null,
        noise_low: row.noise ? -row.noise : null, noise_high: row.noise, rounds: row.interval ? "more" : "one", verdict: row.verdict,
      }));
    const key = JSON.stringify(data) + drawn.clientWidth;
    if (drawn.dataset.drawn === key) return;
    drawn.dataset.drawn = key;
    const extent = [];
    if (known.length > some.length) extent.push(say("first_rows", { shown: some.length, total: known.length }));
    if (rows.length > known.length) extent.push(say("left_out", { count: rows.length - known.length }));
    drawn.querySelector(".extent").textContent = extent.join(" ");
    const numbers = name === "rates"
      ? table([say("row"), say("side"), say("rate"), say("low"), say("high")],
        data.map((bar) => [bar.label, bar.side, fixed(bar.rate, 2), fixed(bar.low, 2), fixed(bar.high, 2)]), say("rates_title"))
      : table([say("row"), say("speedup"), say("low"), say("high"), say("noise")],
        data.map((point) => [point.label, point.verdict, percent(point.low), percent(point.high), point.noise_high ? `±${(point.noise_high * 100).toFixed(1)}%` : ""]), say("speedups_title"));
    drawn.querySelector(".numbers").replaceChildren(numbers);
    const target = drawn.querySelector(".chart");
    if (data.length) draw(target, name, data, say(`${name}_title`), say(`${name}_desc`));
    else target.replaceChildren();
  }

  // The details of a row.

  let texts = null; // of the records, in the order of the data

  function toggle(id) {
    state.open = state.open.includes(id) ? state.open.filter((other) => other !== id) : [...state.open, id];
    apply();
  }

  function setOpen(id, line) {
    const wanted = state.open.includes(id) && !line.hidden;
    const next = line.nextElementSibling?.classList.contains("details") ? line.nextElementSibling : null;
    const button = line.querySelector("button.open");
    button.setAttribute("aria-expanded", String(wanted));
    if (!wanted) next?.remove();
    if (!wanted || next) return;
    const inside = make("div", { class: "detail", id: `detail-${id}` }, make("p", {}, say("loading")));
    line.after(make("tr", { class: "details" }, make("td", { colspan: line.cells.length }, inside)));
    button.setAttribute("aria-controls", inside.id);
    fill(inside, byId.get(id));
  }

  async function fill(inside, row) {
    if (!canUnpack) {
      inside.replaceChildren(make("p", {}, say("cannot_unpack")));
      return;
    }
    texts ??= (await unpacked("records")).split("\n");
    const runs = row.cells.flatMap((cell, side) => (cell === null ? [] : DATA.cells[cell].runs.map((run) => ({
      ...run, side: SIDES[side], text: texts[run.record], record: JSON.parse(texts[run.record]),
    }))));
    inside.replaceChildren(
      make("h3", {}, row.label),
      make("button", { type: "button", onclick: () => { state.base = row.id; apply(); } }, say("use_baseline", { number: row.number })),
      ...(row.note ? [make("p", { lang: "en" }, row.note)] : []),
      make("h3", {}, say("sides_heading")), bothSides(row, runs),
      ...curves(row, runs), ...memory(row, runs), ...profiles(runs),
      make("h3", {}, say("environment_heading")), environment(runs),
      make("h3", {}, say("runs_heading")), ...runs.map(oneRun),
    );
    for (const drawn of inside.querySelectorAll("figure")) drawn.draw();
  }

  function pictured(name, rows, numbers, caption = "") {
    const target = make("div", { class: "chart" });
    const drawn = make("figure", {},
      make("figcaption", {}, make("strong", {}, say(`${name}_title`)), `${say(`${name}_desc`)} ${caption}`), target,
      folded(say("chart_table"), scrolled(say("chart_table"), numbers)));
    drawn.draw = () => draw(target, name, rows, say(`${name}_title`), say(`${name}_desc`));
    return drawn;
  }

  function bothSides(row, runs) {
    const of = (what) => SIDES.map((_, side) => what(row.cells[side] === null ? null : DATA.cells[row.cells[side]], side));
    const interval = (side) => (row.intervals[side] ? row.intervals[side].map((end) => fixed(end, 2)).join(" – ") : "");
    const started = (side) => runs.filter((run) => run.side === SIDES[side]).map((run) => fixed(run.record.setup_seconds, 1)).join(", ");
    return scrolled(say("sides_heading"), table([say("field"), ...SIDES], [
      [say("setup"), ...of((cell) => cell?.setup)],
      [say("ended"), ...of((cell) => (cell ? cell.reasons.join("; ") || say("status_ok") : ""))],
      [say("runs"), ...of((cell) => cell?.runs.length)],
      [say("rate"), ...of((_, side) => fixed(row.rates[side], 2))],
      [say("rate_interval"), ...of((_, side) => interval(side))],
      [say("padding"), ...of((cell) => (cell && cell.padding !== null ? `${(cell.padding * 100).toFixed(1)}%` : ""))],
      [say("took"), ...of((cell) => (cell && cell.taken !== null ? `${(cell.taken * 100).toFixed(1)}%` : ""))],
      [say("setup_seconds"), ...of((_, side) => started(side))],
    ], row.verdict), "scroll");
  }

  function curves(row, runs) {
    const timed = runs.filter((run) => run.record.steps);
    if (!timed.length) return [make("p", {}, say("no_curves"))];
    const points = timed.flatMap((run) => run.record.steps.seconds.map((seconds, i) => ({
      run: run.name, side: run.side, step: i + 1, seconds, loss: run.record.steps.loss[i], timed_from: run.record.timed_from + 0.5,
    })));
    const longest = Math.max(...timed.map((run) => run.record.steps.seconds.length));
    const lines = (field) => Array.from({ length: longest }, (_, i) =>
      [i + 1, ...timed.map((run) => figure(run.record.steps[field][i]))]);
    const columns = [say("step"), ...timed.map((run) => run.name)];
    const apart = row.parity === null ? "" : say("parity", { value: row.parity.toExponential(0) });
    const made = [
      pictured("steps", points, table(columns, lines("seconds"), say("steps_title"))),
      pictured("loss", points, table(columns, lines("loss"), say("loss_title")), apart),
    ];
    return [make("div", { class: "charts" }, ...made)];
  }

  function memory(row, runs) {
    const peak = (run) => (run.record.peak_memory_bytes.length ? Math.max(...run.record.peak_memory_bytes) / 1e9 : null);
    const predicted = (run) => (run.record.predicted_peak_memory_bytes === null ? null : run.record.predicted_peak_memory_bytes / 1e9);
    const rows = runs.map((run) => ({ label: run.short, side: run.side, measured: peak(run), predicted: predicted(run) }));
    const known = rows.filter((one) => one.measured !== null || one.predicted !== null);
    const numbers = make("div", {},
      table([say("run"), say("measured"), say("predicted")], rows.map((one) => [one.label, figure(one.measured), figure(one.predicted)]), say("memory_title")),
      table([say("field"), ...SIDES], DATA.memory_columns.map((column, i) =>
        [column, ...row.cells.map((cell) => (cell === null ? "" : DATA.cells[cell].memory[i]))]), say("memory_title")));
    return known.length ? [pictured("memory", known, numbers)] : [];
  }

  // Where the time went, of runs with --profile: shares of the traced time, seconds by kind of kernel, longest kernels.
  function profiles(runs) {
    const ranks = runs.flatMap((run) => (run.record.profile?.ranks ?? []).map((rank, i, all) => (
      { ...rank, label: all.length > 1 ? `${run.short}, ${i}` : run.short })));
    if (!ranks.length) return [];
    const parts = Object.keys(ranks[0].shares);
    const kinds = [...new Set(ranks.flatMap((rank) => Object.keys(rank.kinds)))];
    const rows = ranks.flatMap((rank) => parts.map((part, i) => ({ label: rank.label, part: say(`share_${part}`), place: i, share: rank.shares[part] })));
    const numbers = make("div", {},
      table([say("run"), ...parts.map((part) => say(`share_${part}`))],
        ranks.map((rank) => [rank.label, ...parts.map((part) => `${(rank.shares[part] * 100).toFixed(1)}%`)]), say("profile_title")),
      table([say("run"), ...kinds], ranks.map((rank) => [rank.label, ...kinds.map((kind) => figure(rank.kinds[kind] ?? null))]), say("profile_kinds")),
      table([say("run"), say("kernel"), say("kind"), say("seconds"), say("calls")],
        ranks.flatMap((rank) => rank.longest.map((kernel) => [rank.label, kernel.name, kernel.kind, figure(kernel.seconds), figure(kernel.calls)])), say("profile_longest")));
    return [pictured("profile", rows, numbers)];
  }

  function flat(value, name = "", found = {}) {
    if (value !== null && typeof value === "object") for (const [key, inner] of Object.entries(value)) flat(inner, name ? `${name}.${key}` : key, found);
    else found[name] = value === null ? "" : String(value);
    return found;
  }

  function environment(runs) {
    const sides = SIDES.map((side) => {
      const run = runs.find((one) => one.side === side);
      return run ? flat({ git: run.record.git, hardware: run.record.hardware, versions: run.record.versions, setup: run.record.setup, kernels: run.record.kernels }) : null;
    });
    const fields = Object.keys({ ...sides[0], ...sides[1] }).filter((name) => sides.some((side) => side?.[name])).sort();
    const made = table([say("field"), ...SIDES], fields.map((name) => [name, ...sides.map((side) => side?.[name] ?? "")]), say("environment_heading"));
    if (sides[0] && sides[1]) {
      fields.forEach((name, i) => {
        if (name in sides[0] && name in sides[1] && sides[0][name] !== sides[1][name]) {
          const line = made.tBodies[0].rows[i];
          line.classList.add("differs");
          line.cells[0].append(` (${say("differs")})`);
        }
      });
    }
    return scrolled(say("environment_heading"), made);
  }

  function oneRun(run) {
    const file = `${run.side.toLowerCase()}-${run.record.started_at.replace(/[^\dT]/g, "")}.json`;
    return folded(run.name, make("div", {},
      make("p", {}, `${say("command")}:`), make("pre", { class: "command" }, run.command),
      run.record.log.length ? make("pre", {}, run.record.log.join("\n")) : null,
      make("p", {}, `${say("record")}: `, make("button", { type: "button", onclick: () => save(file, `${run.text}\n`, "application/json") }, say("save_record"))),
      make("pre", { class: "record", tabindex: 0 }, run.text)));
  }

  // Files.

  function save(name, text, type) {
    const address = URL.createObjectURL(new Blob([text], { type }));
    const link = make("a", { href: address, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  }

  // The shown rows with all their columns, those of the baseline only where there is one.
  function csv() {
    const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const lines = [];
    for (const part of document.querySelectorAll("section.machine:not([hidden])")) {
      const own = part.querySelector("table.headline");
      if (!own) continue;
      const kept = [...own.tHead.rows[0].cells].map((head, i) => ({ head, i })).filter(({ head }) => !head.hidden);
      if (!lines.length) lines.push([say("machine"), ...kept.map(({ head }) => head.textContent)]);
      for (const line of shownLines(part)) {
        const text = (cell) => (cell.matches("th") ? cell.firstChild : cell).textContent.trim();
        lines.push([part.querySelector("h2").textContent, ...kept.map(({ i }) => text(line.cells[i]))]);
      }
    }
    return lines.map((line) => line.map(quoted).join(",")).join("\n") + "\n";
  }

  if (!canUnpack) form.elements.base.disabled = true;
  form.addEventListener("change", (event) => {
    if (event.target.name in state) state[event.target.name] = event.target.value;
    apply();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    state = { ...Object.fromEntries([...FILTERS, "base", "sort"].map((name) => [name, ""])), open: [] };
    apply();
  });
  document.getElementById("csv").addEventListener("click", () => save("report.csv", csv(), "text/csv"));
  window.addEventListener("hashchange", () => {
    const found = readState();
    if (JSON.stringify(found) !== JSON.stringify(state)) {
      state = found;
      apply();
    }
  });

  const box = document.getElementById("filter-box");
  box.hidden = false;
  box.open = window.matchMedia("(min-width: 641px)").matches || location.hash.length > 1;
  apply().then(() => { document.documentElement.dataset.ready = String(Math.round(performance.now())); });
})();
