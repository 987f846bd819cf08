"use strict";
// Draws the figures of a report: one call of Plotly for whatever theme, axis, menu and slider say.
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const root = document.documentElement;
  const state = { axis: "tokens", narrow: false };
  const cards = [];
  const AXES = { step: "optimizer step", tokens: "tokens", hours: "hours of training" };
  const MENU_SEPARATOR = "\u0000";

  // ---- colours -------------------------------------------------------------------------------------------------------
  const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  function color(text) {
    const [name, opacity] = text.split("/");
    const value = variable(name);
    return opacity ? value + Math.round(255 * opacity).toString(16).padStart(2, "0") : value;
  }
  const isPlain = (value) => typeof value === "number" || value === null;
  function themed(value) {
    if (typeof value === "string") return value.startsWith("--") ? color(value) : value;
    if (Array.isArray(value)) return value.every(isPlain) ? value : value.map(themed);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v)]));
    return value;
  }

  // ---- the horizontal axis -------------------------------------------------------------------------------------------
  function along(run, steps, axis) {
    const table = page.runs[run];
    if (axis === "step" || !table || !table[axis]) return steps; // not recorded
    const { step, [axis]: values } = table;
    let i = 0;
    return steps.map((x) => {
      while (i > 0 && step[i] > x) i--;
      while (i < step.length - 2 && step[i + 1] < x) i++;
      if (step.length < 2) return values[0];
      const part = (x - step[i]) / (step[i + 1] - step[i]);
      return values[i] + Math.min(Math.max(part, 0), 1) * (values[i + 1] - values[i]);
    });
  }

  // ---- figures -------------------------------------------------------------------------------------------------------
  const RATIO_TICKS = [[0.125, "⅛"], [0.25, "¼"], [0.5, "½"], [1, "even"], [2, "2×"], [4, "4×"], [8, "8×"]];
  function asRatio(trace, limit) {
    const z = trace.z.map((row) => row.map((v) => (v === null ? null : Math.log2(Math.max(v, 2 ** -limit)))));
    const shown = RATIO_TICKS.filter(([value]) => Math.abs(Math.log2(value)) <= limit);
    return {
      ...trace, z, customdata: trace.z, zmin: -limit, zmax: limit,
      colorscale: [[0, "--low"], [0.5, "--mid"], [1, "--high"]],
      colorbar: { tickvals: shown.map(([value]) => Math.log2(value)), ticktext: shown.map(([, text]) => text), ...thinBar() },
    };
  }
  // The same scale for all positions of a slider: as far as the view's loads go, between 2x and 8x.
  function ratioLimit(view) {
    let largest = 1;
    const traces = [...view.frames.flatMap((frame) => frame.traces), ...view.traces];
    for (const trace of traces) if (trace.ratio)
      for (const row of trace.z) for (const v of row) if (v !== null) largest = Math.max(largest, Math.abs(Math.log2(Math.max(v, 0.125))));
    return Math.min(Math.ceil(largest), 3);
  }
  const thinBar = () => ({ thickness: 10, outlinewidth: 0, len: 1, tickfont: { size: 11, color: "--muted" }, xpad: 6 });
  function prepared(trace, card) {
    const { run, ratio, ...rest } = trace;
    const made = ratio ? asRatio(rest, ratioLimit(card.view)) : { ...rest };
    if (card.hidden.has(trace.name)) made.visible = false;
    if (run !== undefined && made.x) Object.assign(made, { x: along(run, made.x, state.axis), cliponaxis: made.mode === "lines" });
    if (made.type === "heatmap" && !ratio) made.colorbar = { ...thinBar(), ...made.colorbar };
    return themed(made);
  }
  const farthest = (traces) => Math.max(...traces.filter((trace) => trace.run !== undefined).map((trace) => along(trace.run, trace.x.slice(-1), state.axis)[0]));
  const axisOf = (traces) => (traces.some(({ run }) => run !== undefined && page.runs[run][state.axis]) ? state.axis : "step");
  const follows = (traces) => traces.some((trace) => trace.run !== undefined);

  const heightOf = (spec) => (state.narrow ? Math.min(spec.height, 320) : spec.height);
  function layoutOf(spec, view, traces) {
    const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: "--muted" };
    const axis = { gridcolor: "--grid", zerolinecolor: "--line", linecolor: "--line", tickcolor: "--line", automargin: true, title: { standoff: 8, font }, tickfont: font };
    const given = merge(spec.layout, view.layout);
    const layout = {
      height: heightOf(spec), font, hovermode: "closest",
      paper_bgcolor: "--card", plot_bgcolor: "--card", margin: { t: 10, b: 40, l: 44, r: 12 },
      legend: { orientation: "h", y: -0.22, x: 0, yanchor: "top", font: { size: 12, color: "--ink" } },
      hoverlabel: { bgcolor: "--card", bordercolor: "--line", font: { ...font, color: "--ink" } },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", xaxis: axis, yaxis: axis,
    };
    const course = follows(traces) ? { xaxis: { title: { text: AXES[axisOf(traces)] }, range: [0, farthest(traces)] } } : {};
    layout.showlegend = false; // a legend in the plot would take the room of the lines: it stands below, in HTML
    if (labelled(spec, view)) layout.margin.r = 16 + 7 * Math.max(...ends(traces).map((trace) => trace.name.length));
    return themed(merge(layout, given, course));
  }
  function merge(...objects) {
    const out = {};
    for (const object of objects)
      for (const [key, value] of Object.entries(object || {})) {
        const both = value && typeof value === "object" && !Array.isArray(value) && out[key];
        out[key] = both ? merge(out[key], value) : value;
      }
    return out;
  }

  // Names at the ends of lines, moved apart where they would overlap.
  const ends = (traces) => traces.filter((trace) => trace.name && trace.showlegend !== false && trace.y && trace.y.length);
  const labelled = (spec, view) => spec.direct && !state.narrow && ends(view.traces).length > 1 && ends(view.traces).length <= 10;
  function endLabels(card, traces) {
    const { range, type } = card.plot.layout.yaxis;
    const height = card.plot._fullLayout._size.h;
    const place = (y) => ((type === "log" ? Math.log10(y) : y) - range[0]) / (range[1] - range[0]) * height;
    const last = (trace) => trace.y.filter((y) => y !== null).at(-1);
    const labels = ends(traces).map((trace) => ({ trace, at: place(last(trace)) })).filter(({ at }) => Number.isFinite(at));
    labels.sort((a, b) => a.at - b.at);
    const gap = 14;
    labels.forEach((label, i) => { label.to = i ? Math.max(label.at, labels[i - 1].to + gap) : Math.max(label.at, 4); });
    let over = labels.length ? labels.at(-1).to - (height - 4) : 0;
    for (let i = labels.length - 1; i >= 0 && over > 0; i--) {
      labels[i].to -= over;
      over = i ? Math.max(0, labels[i - 1].to + gap - labels[i].to) : 0;
    }
    return labels.map(({ trace, to }) => ({
      xref: "paper", yref: "paper", x: 1, y: Math.min(Math.max(to / height, 0), 1), xanchor: "left", yanchor: "middle", xshift: 6, showarrow: false,
      text: trace.name, font: { size: 12, color: color((trace.line || trace.marker).color) },
    }));
  }

  async function render(card) {
    const { spec, view } = card;
    const frame = view.frames.length ? view.frames[card.frame] : null;
    const traces = frame ? frame.traces : view.traces;
    if (frame) card.output.textContent = `${spec.slider} ${frame.label}`;
    const layout = layoutOf(spec, view, traces);
    layout.annotations = layout.annotations || [];
    await Plotly.react(card.plot, traces.map((trace) => prepared(trace, card)), layout, { displayModeBar: false, responsive: true });
    if (labelled(spec, view)) await Plotly.relayout(card.plot, { annotations: [...layout.annotations, ...endLabels(card, traces)] });
    legend(card, traces);
    card.node.dataset.drawn = card.node.dataset.drawn ? +card.node.dataset.drawn + 1 : 1;
  }
  const legendOf = (traces) => traces.filter((trace) => trace.showlegend !== false && trace.name && trace.type !== "heatmap");
  function legend(card, traces) {
    const named = labelled(card.spec, card.view) ? [] : legendOf(traces);
    card.legend.replaceChildren(...(named.length > 1 ? named : []).map((trace) => {
      const item = document.createElement("button");
      const swatch = document.createElement("i");
      swatch.style.background = color((trace.line || trace.marker).color.split("/")[0]);
      item.append(swatch, trace.name);
      item.setAttribute("aria-pressed", !card.hidden.has(trace.name));
      item.addEventListener("click", () => { if (!card.hidden.delete(trace.name)) card.hidden.add(trace.name); render(card); });
      return item;
    }));
  }
  const renderSoon = (card) => { if (card.seen) render(card); else card.stale = true; };
  const renderAll = (wanted = () => true) => cards.filter(wanted).forEach(renderSoon);

  // ---- menus, slider, export -----------------------------------------------------------------------------------------
  function choose(card) {
    const chosen = card.menus.map((menu) => menu.value);
    const view = card.spec.views.find((each) => each.labels.join(MENU_SEPARATOR) === chosen.join(MENU_SEPARATOR));
    if (!view) { // the second menu depends on the first: take what there is
      const first = card.spec.views.find((each) => each.labels[0] === chosen[0]);
      first.labels.forEach((label, i) => { card.menus[i].value = label; });
    }
    card.view = view || card.spec.views.find((each) => each.labels[0] === chosen[0]);
    card.menus.forEach((menu, i) => {
      const before = card.menus.slice(0, i).map((each) => each.value);
      for (const option of menu.options) {
        const path = [...before, option.value].join(MENU_SEPARATOR);
        option.hidden = option.disabled = !card.spec.views.some((each) => each.labels.slice(0, i + 1).join(MENU_SEPARATOR) === path);
      }
    });
    card.hidden.clear();
    setUpSlider(card);
    renderSoon(card);
  }
  function setUpSlider(card) {
    if (!card.slider) return;
    const count = card.view.frames.length;
    card.slider.max = Math.max(count - 1, 0);
    card.slider.parentElement.hidden = count < 2;
    card.frame = count - 1;
    card.slider.value = card.frame;
  }
  function csv({ spec, view }) {
    const cell = (value) => (value === null || value === undefined ? "" : /[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value);
    const lines = [];
    const each = (frame, traces) => traces.forEach((trace) => {
      if (trace.z) trace.z.forEach((row, i) => row.forEach((z, j) => lines.push([frame, trace.name || "", trace.x ? trace.x[j] : j, trace.y ? trace.y[i] : i, z])));
      else trace.x.forEach((x, i) => lines.push([frame, trace.name || "", x, trace.y[i], ...(trace.run === undefined ? [] : [along(trace.run, [x], "tokens")[0], along(trace.run, [x], "hours")[0]])]));
    });
    if (view.frames.length) view.frames.forEach((frame) => each(frame.label, frame.traces)); else each("", view.traces);
    const isMap = (view.frames.length ? view.frames[0].traces : view.traces).some((trace) => trace.z);
    const head = ["frame", "series", ...(isMap ? ["column", "row", "value"] : follows(view.traces) ? ["step", "value", "tokens", "hours"] : ["x", "y"])];
    return [head, ...lines].map((row) => row.map(cell).join(",")).join("\n") + "\n";
  }
  function download(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
  async function save(card, kind) {
    const name = `${page.name} ${[card.spec.title, ...card.view.labels].join(" ")}`.replace(/[^\w.-]+/g, "-").toLowerCase();
    if (kind === "csv") return download(`${name}.csv`, csv(card));
    if (!card.node.dataset.drawn) await render(card);
    const size = { width: card.plot.clientWidth, height: card.plot.clientHeight };
    const showlegend = !labelled(card.spec, card.view) && card.legend.childElementCount > 0;
    const figure = { data: card.plot.data, layout: { ...card.plot.layout, ...size, height: size.height + 70 * showlegend, showlegend } };
    return Plotly.downloadImage(figure, { format: kind, filename: name, ...size, height: figure.layout.height, scale: kind === "png" ? 2 : 1 });
  }

  function setUp(node) {
    const spec = page.figures[+node.dataset.figure];
    const card = { node, spec, plot: node.querySelector(".plot"), legend: node.querySelector(".legend"), hidden: new Set(), menus: [...node.querySelectorAll("select")], view: spec.views[0], frame: 0, seen: false };
    card.slider = node.querySelector("input[type=range]");
    card.output = node.querySelector("output");
    card.menus.forEach((menu, i) => {
      for (const label of new Set(spec.views.map((view) => view.labels[i]))) menu.add(new Option(label));
      menu.addEventListener("change", () => choose(card));
    });
    node.querySelectorAll("button[data-save]").forEach((button) => button.addEventListener("click", () => save(card, button.dataset.save)));
    if (card.slider) card.slider.addEventListener("input", () => { card.frame = +card.slider.value; render(card); });
    if (card.menus.length) choose(card); else setUpSlider(card);
    card.plot.style.minHeight = `${heightOf(spec)}px`;
    cards.push(card);
  }

  // ---- page ----------------------------------------------------------------------------------------------------------
  function setTheme(theme) {
    root.dataset.theme = theme;
    renderAll();
  }
  const system = matchMedia("(prefers-color-scheme: dark)");
  let picked = null;
  system.addEventListener("change", () => { if (!picked) setTheme(system.matches ? "dark" : "light"); });
  document.getElementById("theme").addEventListener("click", () => {
    picked = root.dataset.theme === "dark" ? "light" : "dark";
    setTheme(picked);
  });
  function setAxis(axis) {
    state.axis = axis;
    document.querySelectorAll(".axes button").forEach((button) => button.setAttribute("aria-pressed", button.dataset.axis === axis));
    renderAll((card) => follows(card.view.traces));
  }
  document.querySelectorAll(".axes button").forEach((button) => button.addEventListener("click", () => setAxis(button.dataset.axis)));

  const small = matchMedia("(max-width: 760px)");
  state.narrow = small.matches;
  small.addEventListener("change", () => { state.narrow = small.matches; renderAll(); cards.forEach((card) => { card.plot.style.minHeight = `${heightOf(card.spec)}px`; }); });
  document.querySelectorAll("figure[data-figure]").forEach(setUp);
  setAxis(page.axis);

  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      const card = cards.find((each) => each.node === target);
      if (isIntersecting && !card.seen) { card.seen = true; near.unobserve(target); render(card); }
    }
  }, { rootMargin: "600px" });
  cards.forEach((card) => near.observe(card.node));
  window.addEventListener("beforeprint", () => cards.forEach((card) => { card.seen = true; render(card); }));

  const links = [...document.querySelectorAll("nav a")];
  const where = () => {
    const sections = links.map((link) => document.querySelector(link.hash));
    const at = sections.findLastIndex((section) => section && section.getBoundingClientRect().top < 120);
    links.forEach((link, i) => link.classList.toggle("here", i === at));
  };
  document.addEventListener("scroll", where, { passive: true });
  where();
})();
