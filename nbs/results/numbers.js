// The table of every number: filters, sorting, and a link to where each comes from. Reads numbers-data.js.
(function () {
  "use strict";
  const data = window.recnbNumbers, table = document.getElementById("numbers");
  if (!data || !table) return;

  const shown = ["method", "value", "interval", "metric", "dataset", "model", "kind", "settings", "group", "against", "n", "seed"];
  const numeric = new Set(["value", "n", "seed"]), text = new Set(data.text_fields);
  const rows = data.rows.map(function (packed) {
    const row = {};
    data.fields.forEach(function (name, i) { row[name] = text.has(name) ? data.texts[packed[i]] : packed[i]; });
    row.title = data.titles[row.dataset] || row.dataset;
    row.search = [row.method, row.model, row.settings, row.group, row.against, row.metric, row.title].join(" ").toLowerCase();
    return row;
  });
  const slug = function (x) { return x.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, ""); };

  // what a reader may choose; `about` stands for groups and paired tests
  const choices = {
    task: { label: "task", names: { poi: "next place", rating: "ratings" } },
    dataset: { label: "dataset", names: data.titles },
    method: { label: "method" },
    model: { label: "model" },
    metric: { label: "metric" },
    kind: { label: "kind" },
    split: { label: "split" },
    about: { label: "about", names: { whole: "all instances", groups: "groups of instances", tests: "paired tests" } },
  };
  const about = function (row) { return row.against ? "tests" : row.group ? "groups" : "whole"; };
  const valueOf = function (row, name) { return name === "about" ? about(row) : row[name]; };

  const start = { split: "test", about: "whole" };
  let state = Object.assign({ sort: "", down: "", limit: 100 }, start);
  const known = Object.keys(choices).concat(["text", "from", "run", "sort", "down"]);

  function readAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    if (!Array.from(asked.keys()).some(function (k) { return known.includes(k); })) return;
    state = { sort: "", down: "", limit: 100 };
    asked.forEach(function (value, name) { if (known.includes(name)) state[name] = value; });
  }
  function writeAddress() {
    const kept = new URLSearchParams();
    known.forEach(function (name) { if (state[name]) kept.set(name, state[name]); });
    history.replaceState(null, "", "#" + kept.toString());
  }

  function fits(row, but) {
    const words = (state.text || "").toLowerCase().split(/\s+/).filter(Boolean);
    if (state.from && slug(row.where.replace(/\.json$/, "")) !== state.from.replace(/-json$/, "")) return false;
    if (state.run && row.where.split("/")[1] !== state.run) return false;
    return words.every(function (w) { return row.search.includes(w); }) && Object.keys(choices).every(function (name) {
      return name === but || !state[name] || valueOf(row, name) === state[name];
    });
  }

  // without a column chosen: by dataset, metric, and best first (errors, minutes: least)
  const least = /^(MAE|RMSE|minutes|parameters|seconds|tokens)|p$/;
  function compare(a, b) {
    const by = state.sort, sign = state.down ? -1 : 1;
    if (by) {
      const x = by === "dataset" ? a.title : a[by], y = by === "dataset" ? b.title : b[by];
      if (x === null || x === "") return y === null || y === "" ? 0 : 1;
      if (y === null || y === "") return -1;
      return sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y)));
    }
    const places = Object.keys(data.titles);
    return a.task.localeCompare(b.task) || places.indexOf(a.dataset) - places.indexOf(b.dataset) ||
      (a.metric !== data.headline[a.task]) - (b.metric !== data.headline[b.task]) || a.metric.localeCompare(b.metric) ||
      (least.test(a.metric) ? a.value - b.value : b.value - a.value);
  }

  function make(tag, attributes, content) {
    const e = document.createElement(tag);
    Object.entries(attributes || {}).forEach(function (x) { e.setAttribute(x[0], x[1]); });
    if (content !== undefined) e.textContent = content;
    return e;
  }
  function write(x) {
    if (x === null || x === undefined || x === "") return "";
    return typeof x === "number" ? x.toLocaleString("en") : x;
  }
  function writeValue(row) {
    const x = row.value;
    if (x === null) return "–";
    if (row.metric === "parameters") return x.toLocaleString("en");
    return / p$/.test(row.metric) && x < 0.00005 ? "< 0.0001" : x.toFixed(row.metric === "minutes" ? 1 : 4);
  }

  const box = document.getElementById("filter"), selects = {};
  function build() {
    Object.keys(choices).forEach(function (name) {
      const label = make("label", {}, choices[name].label + " ");
      const select = selects[name] = make("select", { class: "form-select form-select-sm", id: "filter-" + name });
      select.addEventListener("change", function () { state[name] = select.value; state.limit = 100; show(); });
      label.append(select);
      box.append(label);
    });
    const label = make("label", {}, "search ");
    const input = make("input", { type: "search", class: "form-control form-control-sm", id: "filter-text", autocomplete: "off" });
    input.addEventListener("input", function () { state.text = input.value; state.limit = 100; show(); });
    label.append(input);
    const all = make("button", { type: "button", class: "btn btn-sm recnb-button" }, "Everything");
    all.addEventListener("click", function () { state = { sort: "", down: "", limit: 100 }; show(); });
    const again = make("button", { type: "button", class: "btn btn-sm recnb-button" }, "Reset");
    again.addEventListener("click", function () { state = Object.assign({ sort: "", down: "", limit: 100 }, start); show(); });
    const buttons = make("span", { class: "buttons" });
    buttons.append(again, all);
    box.append(label, buttons);
    box.hidden = false;
    const heads = table.tHead.rows[0].cells;
    shown.forEach(function (name, i) {
      const button = make("button", { type: "button" }, heads[i].textContent);
      button.addEventListener("click", function () {
        state.down = state.sort === name ? (state.down ? "" : "1") : numeric.has(name) ? "1" : "";
        state.sort = name;
        show();
      });
      heads[i].replaceChildren(button);
    });
    document.getElementById("more").addEventListener("click", function () { state.limit += 400; show(); });
  }

  function fillSelects() {
    Object.keys(choices).forEach(function (name) {
      const counts = new Map(), select = selects[name], names = choices[name].names || {};
      rows.forEach(function (row) { if (fits(row, name)) { const v = valueOf(row, name); counts.set(v, (counts.get(v) || 0) + 1); } });
      if (state[name] && !counts.has(state[name])) counts.set(state[name], 0);
      const options = [make("option", { value: "" }, "any")];
      const order = Object.keys(names), place = function (v) { const i = order.indexOf(v); return i < 0 ? order.length : i; };
      Array.from(counts.keys()).filter(Boolean)
        .sort(function (a, b) { return place(a) - place(b) || a.localeCompare(b); })
        .forEach(function (v) { options.push(make("option", { value: v }, (names[v] || v) + " (" + counts.get(v) + ")")); });
      select.replaceChildren.apply(select, options);
      select.value = state[name] || "";
    });
    const input = document.getElementById("filter-text");
    if (input.value !== (state.text || "")) input.value = state.text || "";
  }

  function show() {
    const found = rows.filter(function (row) { return fits(row); }).sort(compare);
    const body = table.tBodies[0], out = document.createDocumentFragment();
    found.slice(0, state.limit).forEach(function (row) {
      const tr = make("tr");
      shown.forEach(function (name) {
        const td = make("td", numeric.has(name) ? { class: "n" } : {});
        if (name === "value") {
          td.append(make("a", { href: data.pages[row.where], title: row.where }, writeValue(row)));
        } else td.textContent = name === "dataset" ? row.title.split(" (")[0] : name === "seed" ? (row.seed === null ? "" : row.seed) : write(row[name]);
        tr.append(td);
      });
      out.append(tr);
    });
    body.replaceChildren(out);
    const parts = [found.length.toLocaleString("en") + " of " + rows.length.toLocaleString("en") + " numbers"];
    if (found.length > state.limit) parts.push("the first " + state.limit + " are shown");
    if (state.from || state.run) parts.push("of one run alone; “Everything” shows all");
    document.getElementById("count").textContent = parts.join("; ") + ".";
    document.getElementById("more").hidden = found.length <= state.limit;
    Array.from(table.tHead.rows[0].cells).forEach(function (th, i) {
      if (state.sort === shown[i]) th.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    });
    fillSelects();
    writeAddress();
  }

  readAddress();
  build();
  show();
  window.addEventListener("hashchange", function () { readAddress(); show(); });
})();
