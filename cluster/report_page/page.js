"use strict";
// The page's data are values of cluster/report.py and cluster/report_rollouts.py; all text of theirs goes in as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const names = data.runs.map((run) => run.name);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

function table(caption, heads, rows) {
  const cell = (value) => element("td", { text: show(value), class: typeof value === "number" ? "number" : null });
  const body = rows.map((row) => element("tr", {}, ...row.map(cell)));
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col", text })));
  return element("table", {}, element("caption", { class: "soft", text: caption }), element("thead", {}, head), element("tbody", {}, ...body));
}

const show = (value) => value === null || value === undefined ? "-" : typeof value === "number" ? String(Number(value.toPrecision(5))) : String(value);
const options = (select, pairs) => select.replaceChildren(...pairs.map(([value, text]) => element("option", { value, text })));
const unique = (values) => [...new Set(values)];

// ---- light and dark

const theme = byId("theme");
function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  theme.textContent = dark ? "Light" : "Dark";
  theme.setAttribute("aria-label", dark ? "Change to light colours" : "Change to dark colours");
  drawn.forEach((draw) => draw());
}
const drawn = new Map();  // what has been drawn, and how to draw it again in other colours
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function plot(place, traces, layout) {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line") };
  Plotly.react(place, traces, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--text"), size: 12 }, margin: { l: 45, r: 10, t: 8, b: 25 },
    hovermode: "x unified", hoverlabel: { bgcolor: colour("--back"), font: { color: colour("--text") } }, legend: { orientation: "h", y: -0.1, font: { size: 11 } },
    ...layout, xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, automargin: true, ...layout.yaxis },
  }, { responsive: true, displaylogo: false, displayModeBar: false });
}

// ---- curves

function smoothed(values, weight) {
  let average = values[0], total = 1;
  return values.map((value, i) => {
    if (i) { average = weight * average + value; total = weight * total + 1; }
    return average / total;
  });
}

function label(series) {
  const short = series.name.replace(/^(reward\/term\/weighted_|reward\/term\/|seconds\/|learner\/|failures\/|groups\/|mismatch\/)/, "");
  return series.run ? `${short} (${names[series.run]})` : short;
}

const hues = ["#3f7fd6", "#e07b1a", "#2e9e5b", "#c4403f", "#8a63c9", "#8c6d46", "#d063a8", "#7a7f87", "#9a9a1e", "#1d9cb5"];

function drawChart(place, chart) {
  const weight = Number(byId("smoothing").value), order = unique(chart.series.map((s) => s.name));
  const traces = chart.series.map((s) => {
    const heldOut = s.name.startsWith("eval/"), hue = hues[order.indexOf(s.name) % hues.length];
    const common = { name: label(s), legendgroup: s.name, showlegend: chart.series.find((first) => first.name === s.name) === s, x: s.x, y: weight && !heldOut && !chart.stacked ? smoothed(s.y, weight) : s.y };
    if (chart.stacked && names.length === 1) return { ...common, type: "scatter", mode: "lines", stackgroup: "one", line: { width: 0.5, color: hue } };
    const mode = heldOut || s.x.length === 1 ? "lines+markers" : "lines";
    return { ...common, type: "scatter", mode, line: { color: hue, width: heldOut ? 2.5 : 1.5, dash: s.run ? "dot" : "solid" } };
  });
  place.style.height = `${14 + 1.2 * Math.ceil(order.length / 2)}rem`;
  plot(place, traces, { showlegend: traces.length > 1 });
}

function numbersOf(chart) {
  const steps = unique(chart.series.flatMap((s) => s.x)).sort((a, b) => a - b), every = Math.ceil(steps.length / 25);
  const kept = steps.filter((_, i) => i % every === 0 || i === steps.length - 1);
  const at = chart.series.map((s) => new Map(s.x.map((x, i) => [x, s.y[i]])));
  return table(`${chart.title}: ${kept.length} of ${steps.length} steps`, ["step", ...chart.series.map(label)], kept.map((x) => [x, ...at.map((values) => values.get(x) ?? null)]));
}

function chartFigure(chart) {
  const place = element("div", { class: "plot", "aria-hidden": "true" });
  const numbers = element("details", {}, element("summary", { text: "Numbers" }));
  numbers.addEventListener("toggle", () => { if (numbers.open && numbers.children.length === 1) numbers.append(numbersOf(chart)); });
  const figure = element("figure", {}, element("h3", { text: chart.title }), element("figcaption", { text: chart.about }), place, numbers);
  const draw = () => drawChart(place, chart);
  // Drawn when it comes into view: all of them at once take a phone seconds.
  new IntersectionObserver((entries, watcher) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    watcher.disconnect();
    drawn.set(chart, draw);
    draw();
  }, { rootMargin: "300px" }).observe(figure);
  return figure;
}

byId("curves-about").textContent = "By step. Thick lines with dots are held-out evaluations." + (names.length > 1 ? ` Solid: ${names[0]}; dotted: ${names[1]}.` : "");
const others = data.charts.filter((chart) => chart.other);
byId("charts").append(...data.charts.filter((chart) => !chart.other).map(chartFigure));
options(byId("other"), [["", `choose one of ${others.length}`], ...others.map((chart, i) => [i, chart.title])]);
byId("other").addEventListener("change", (event) => {
  if (event.target.value !== "") byId("charts").prepend(chartFigure(others[event.target.value]));
});
byId("smoothing").addEventListener("change", () => drawn.forEach((draw) => draw()));

const run = data.runs[0];
byId("summary").textContent = data.runs.map((r) => `${r.name}: ${r.steps} steps, ${r.state}, begun ${r.environment.started_at}`).join("; ") + (run.environment.hardware ? `; ${hardware(run.environment.hardware)}` : "");
function hardware(h) {
  return `${h.cores} cores, ${h.ram_gib} GiB of RAM, ` + (h.cuda_devices ? `${h.cuda_devices} GPUs of ${h.cuda_memory_gib} GiB` : "no GPU");
}

// ---- rollouts

const all = data.groups.flatMap((group) => group.rollouts.map((rollout) => ({ group, rollout })));
const termNames = unique(all.flatMap(({ rollout }) => Object.keys(rollout.terms))), numberNames = unique(all.flatMap(({ rollout }) => Object.keys(rollout.numbers)));
const numberOf = ({ rollout }, name) => name === "reward" ? rollout.reward : name in rollout.numbers ? rollout.numbers[name] : name === "length" ? rollout.length : rollout.terms[name] ?? null;
const PAGE = 100;
let found = [], shown = 0, chosen = null;

byId("rollouts-about").textContent = all.length
  ? `${all.length} rollouts of ${data.groups.length} groups, evenly over the steps` + (names.length > 1 ? `, of ${run.name}. ` : ". ") + (data.tokens ? "" : "The policy's tokenizer was not found, so tokens are not told apart.")
  : "This run keeps no rollouts.";
byId("filter").hidden = !all.length;
options(byId("step"), [["", "all"], ...unique(data.groups.map((g) => g.step)).map((s) => [s, s])]);
options(byId("class"), [["", "all"], ...unique(data.groups.map((g) => g.class).filter(Boolean)).sort().map((c) => [c, c])]);
options(byId("number"), ["reward", ...numberNames, "length", ...termNames].map((n) => [n, n]));

function filter() {
  const value = (id) => byId(id).value, bound = (id, missing) => value(id) === "" ? missing : Number(value(id));
  const number = value("number"), least = bound("least", -Infinity), most = bound("most", Infinity), words = value("text").toLowerCase();
  const bounded = least > -Infinity || most < Infinity;
  found = all.filter((one) => {
    const x = numberOf(one, number);
    return (value("step") === "" || one.group.step === Number(value("step"))) && (value("class") === "" || one.group.class === value("class"))
      && (!bounded || (x !== null && x >= least && x <= most))
      && (!words || `${one.group.query}\n${one.rollout.tokens.map((t) => t[0]).join("")}`.toLowerCase().includes(words));
  });
  const sign = { rising: 1, falling: -1 }[value("order")];
  if (sign) found.sort((a, b) => sign * ((numberOf(a, number) ?? Infinity * sign) - (numberOf(b, number) ?? Infinity * sign)));
  byId("found").textContent = `${found.length} of ${all.length} rollouts`;
  byId("list").replaceChildren();
  shown = 0;
  more();
  if (found.length && !found.includes(chosen)) choose(found[0]);
}

function more() {
  const number = byId("number").value;
  byId("list").append(...found.slice(shown, shown + PAGE).map((one) => {
    const { group, rollout } = one;
    const about = `step ${group.step}, group ${group.group}, no. ${rollout.index}: ${number} ${show(numberOf(one, number))}` + (rollout.valid ? "" : ", not scored");
    const button = element("button", { type: "button", "aria-current": String(one === chosen) }, group.query, element("span", { class: "what", text: about }));
    button.addEventListener("click", () => choose(one));
    return element("li", {}, button);
  }));
  shown = Math.min(found.length, shown + PAGE);
  byId("more").hidden = shown === found.length;
}

function choose(one, focus = false) {
  chosen = one;
  const at = found.indexOf(one);
  while (at >= shown) more();
  [...byId("list").children].forEach((item, i) => item.firstChild.setAttribute("aria-current", String(i === at)));
  if (focus) byId("list").children[at].firstChild.focus();
  byId("detail").replaceChildren(...detail(one));
}

const objectColour = (n) => data.colours[n % data.colours.length];

function picture(group, rollout) {
  if (!group.image) return element("p", { text: `The frames cannot be read any more: ${group.unread}` });
  const [height, width] = group.hw, unit = Math.max(width, height) / 320, ns = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(ns, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-hidden", "true");
  const draw = (tag, attributes) => {
    const made = document.createElementNS(ns, tag);
    Object.entries({ fill: "none", ...attributes }).forEach(([name, value]) => made.setAttribute(name, value));
    svg.append(made);
  };
  // Each line twice: white below, so that it can be seen on any ground.
  const twice = (tag, attributes, stroke) => [["#fff", 3.2], [stroke, 1.7]].forEach(([c, w]) => draw(tag, { ...attributes, stroke: c, "stroke-width": w * unit }));
  rollout.objects.forEach((object, n) => {
    const [x1, y1, x2, y2] = object.box;
    if (object.box.length) twice("rect", { x: x1, y: y1, width: Math.max(0, x2 - x1), height: Math.max(0, y2 - y1) }, objectColour(n));
    object.points.forEach(([x, y]) => draw("circle", { cx: x, cy: y, r: 3.5 * unit, fill: objectColour(n), stroke: "#fff", "stroke-width": unit }));
    object.negative.forEach(([x, y]) => twice("path", { d: `M${x - 3 * unit},${y - 3 * unit}l${6 * unit},${6 * unit}m0,${-6 * unit}l${-6 * unit},${6 * unit}` }, objectColour(n)));
  });
  const said = rollout.objects.length ? `The policy names ${rollout.objects.length} object${rollout.objects.length > 1 ? "s" : ""}.` : "The policy names no object.";
  const frame = element("div", { class: "frame" }, element("img", { src: group.image, alt: `Frame ${group.target} of ${group.video}. ${said}` }));
  if (rollout.masks) frame.append(element("img", { src: rollout.masks, alt: "", class: "masks" }));
  frame.append(svg);
  return frame;
}

function key(rollout) {
  const items = rollout.objects.map((object, n) => element("span", {}, element("span", { class: "swatch", style: `background:${objectColour(n)}` }), `object ${n + 1} `));
  const about = "box, point (dot), negative point (cross)" + (rollout.masks ? ", mask" : "; its masks were not kept");
  return element("p", { class: "soft" }, ...items, about);
}

function saidText(rollout) {
  return element("p", { class: "said" }, ...rollout.tokens.map(([text, logprob]) => {
    if (logprob === null) return text;
    const p = Math.exp(logprob);
    if (p > 0.98) return text;
    return element("span", { text, title: `p = ${p.toPrecision(2)}, log p = ${logprob}`, style: `background:rgba(var(--unsure),${(0.65 * Math.min(1, -logprob / 3) + 0.1).toFixed(2)})` });
  }));
}

function detail({ group, rollout }) {
  const at = found.findIndex((one) => one.rollout === rollout), turn = (text, to) => {
    const button = element("button", { type: "button", text, disabled: !found[to] });
    button.addEventListener("click", () => { choose(found[to]); byId("detail").querySelectorAll(".turn button")[to > at ? 1 : 0].focus(); });
    return button;
  };
  const facts = [
    ["reward", rollout.reward], ["before the length penalty", rollout.terms.original], ["advantage", rollout.advantage], ...Object.entries(rollout.numbers), ["tokens", rollout.length], ["ended by", rollout.finish],
    ["weights of version (tokens)", rollout.versions.map(([v, n]) => `${v} (${n})`).join(", ")], ["difficulty", group.difficulty === null ? group.class : `${show(group.difficulty)} (${group.class})`],
    ["episode", group.episode], ["target frame", group.target],
  ];
  if (!rollout.valid) facts.unshift(["not scored", rollout.failure]);
  const terms = Object.keys(rollout.terms).filter((n) => !n.startsWith("weighted_") && !["original", "length_penalty"].includes(n));
  const breakdown = terms.map((n) => [n, rollout.terms[n], rollout.terms[`weighted_${n}`] ?? null]);
  const others = group.rollouts.length > 1 ? element("p", { class: "turn" }, "The group: ", ...group.rollouts.map((other) => {
    const button = element("button", { type: "button", text: `${other.index}: ${show(other.reward)}`, "aria-pressed": String(other === rollout) });
    button.addEventListener("click", () => { byId("detail").replaceChildren(...detail({ group, rollout: other })); byId("detail").querySelector("[aria-pressed=true]").focus(); });
    return button;
  })) : "";
  return [
    element("p", { class: "turn" }, turn("Previous", at - 1), turn("Next", at + 1), `step ${group.step}, group ${group.group}, no. ${rollout.index}`),
    element("h3", { text: group.query }), picture(group, rollout), group.image ? key(rollout) : "",
    element("div", { class: "shown" }, ...group.shown.map(([t, image]) => element("figure", {}, element("img", { src: image, alt: `Frame ${t}, shown to the policy` }), element("figcaption", { text: `frame ${t}` })))),
    element("h3", { text: "Answer" }), saidText(rollout),
    data.tokens ? element("p", { class: "soft", text: "Coloured: tokens that the policy was unsure of, the more the less likely." }) : "", others,
    element("div", { class: "tables" }, table("Reward, term by term", ["term", "value", "counts"], breakdown), table("About it", ["what", "value"], facts)),
  ];
}

byId("filter").addEventListener("input", filter);
byId("filter").addEventListener("submit", (event) => event.preventDefault());
byId("more").addEventListener("click", more);
byId("list").addEventListener("keydown", (event) => {
  const move = { ArrowDown: 1, ArrowUp: -1 }[event.key], next = move && found[found.indexOf(chosen) + move];
  if (next) { event.preventDefault(); choose(next, true); }
});
if (all.length) filter();

// ---- timeline

const steps = data.timeline;
byId("timeline").hidden = !steps.length;
options(byId("timeline-step"), steps.map((s, i) => [i, `${s.step} (${show(s.seconds)} s)`]));

function drawTimeline() {
  const step = steps[byId("timeline-step").value], place = byId("timeline-chart");
  const tracks = unique(step.spans.map((s) => s[0])).sort((a, b) => (b === "loop") - (a === "loop") || a.localeCompare(b)).reverse(), kinds = unique(step.spans.map((s) => s[1]));
  const traces = kinds.map((kind, k) => {
    const mine = step.spans.filter((s) => s[1] === kind);
    return {
      type: "bar", orientation: "h", name: kind, y: mine.map((s) => s[0]), base: mine.map((s) => s[2]), x: mine.map((s) => s[3]), width: 0.7, opacity: 0.75,
      marker: { color: hues[k % hues.length], line: { color: colour("--back"), width: 0.5 } }, customdata: mine.map((s) => [s[2], s[4]]),
      hovertemplate: "%{y}: " + kind.replace(/%/g, "") + "<br>%{x:.3f} s, from %{customdata[0]:.3f} s<br>%{customdata[1]}<extra></extra>",
    };
  });
  place.style.height = `${8 + 2.2 * tracks.length}rem`;
  plot(place, traces, { barmode: "overlay", hovermode: "closest", xaxis: { ticksuffix: " s", range: [0, step.seconds] }, yaxis: { categoryorder: "array", categoryarray: tracks } });
  const sums = new Map();
  step.spans.forEach(([track, kind, , seconds]) => { const [count, total] = sums.get(`${track}\n${kind}`) ?? [0, 0]; sums.set(`${track}\n${kind}`, [count + 1, total + seconds]); });
  const rows = [...sums].map(([name, [count, total]]) => [...name.split("\n"), count, total]).sort((a, b) => b[3] - a[3]);
  byId("timeline-numbers").replaceChildren(byId("timeline-numbers").firstElementChild, table(`Step ${step.step}, ${show(step.seconds)} s`, ["part", "work", "times", "seconds"], rows));
}
byId("timeline-step").addEventListener("change", drawTimeline);
byId("timeline-chart").setAttribute("aria-hidden", "true");

// ---- settings

const folded = (title, ...content) => element("details", {}, element("summary", { text: title }), ...content);
if (data.runs.length > 1) {
  const rows = data.differences;
  byId("settings-content").append(rows.length ? table("Settings that differ", ["setting", ...names], rows) : element("p", { text: "Both runs have the same settings." }));
}
for (const one of data.runs) {
  const of = data.runs.length > 1 ? ` of ${one.name}` : "", e = one.environment;
  const facts = [["command", (e.command_line ?? []).join(" ")], ["begun", e.started_at], ["python", e.python], ["platform", e.platform], ["commit", e.git ? e.git.commit + (e.git.changed ? " (changed)" : "") : null], ...Object.entries(e.packages ?? {}), ...Object.entries(e.environment ?? {})];
  byId("settings-content").append(folded(`Environment${of}`, table("Environment", ["what", "value"], facts)), folded(`Configuration${of}`, element("pre", { tabindex: "0", text: one.config })));
  if (one.resumes.length) byId("settings-content").append(folded(`Resumed${of}: ${one.resumes.length} times`, table("Resumes", ["when", "settings changed"], one.resumes.map((r) => [r.started_at, JSON.stringify(r.changed)]))));
}

theme.addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
if (steps.length) drawn.set("timeline", drawTimeline);
setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
