"use strict";
(() => {
  const byId = (id) => document.getElementById(id);

  // Tables: a click on a column's head sorts by it, missing values last.
  for (const head of document.querySelectorAll("th.sorts")) {
    head.addEventListener("click", () => {
      const body = head.closest("table").tBodies[0];
      const column = head.cellIndex;
      const down = head.dataset.down !== "1";
      head.dataset.down = down ? "1" : "0";
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const difference = Number.isNaN(+x) || Number.isNaN(+y) ? x.localeCompare(y) : x - y;
        return down ? -difference : difference;
      };
      body.append(...[...body.rows].sort(order));
    });
  }

  // Predictions.
  const data = byId("predictions-data");
  if (!data) return;
  const runs = JSON.parse(data.textContent);
  const PAGE = 30;
  const fields = ["run", "other", "lm", "filter", "search"].map((name) => byId(name));
  const [run, other, lm, filter, search] = fields;
  let shown = PAGE;

  const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });
  runs.forEach((entry, i) => {
    run.append(option(i, entry.label));
    other.append(option(i, entry.label));
  });
  other.hidden = runs.length < 2;
  for (const name of new Set(runs.flatMap((entry) => entry.lms))) lm.append(option(name, name));

  const right = (row, name, kind) => row?.answers[name]?.[kind]?.[1];
  // Whether a row passes, for one LM; `twin` is the same question in the other run.
  const FILTERS = {
    all: () => true,
    latent_right: (row, name) => right(row, name, "latent") === true,
    latent_wrong: (row, name) => right(row, name, "latent") === false,
    latent_only: (row, name) => right(row, name, "latent") === true && right(row, name, "text") === false,
    text_only: (row, name) => right(row, name, "latent") === false && right(row, name, "text") === true,
    both_wrong: (row, name) => right(row, name, "latent") === false && right(row, name, "text") === false,
    won: (row, name, twin) => right(row, name, "latent") === true && right(twin, name, "latent") === false,
    lost: (row, name, twin) => right(row, name, "latent") === false && right(twin, name, "latent") === true,
  };

  const element = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  const addAnswers = (table, row, label) => {
    for (const [name, kinds] of Object.entries(row.answers)) {
      if (lm.value && name !== lm.value) continue;
      for (const [kind, [text, isRight]] of Object.entries(kinds)) {
        const line = table.insertRow();
        line.append(element("td", label ? `${label}: ${name}` : name), element("td", kind));
        line.append(element("td", text || "(empty)", isRight ? "right" : "wrong"));
      }
    }
  };

  const card = (row, twin) => {
    const made = element("div", undefined, "card");
    made.append(element("strong", row.question), element("div", "gold: " + row.golds.join(" | "), "note"));
    const table = element("table");
    addAnswers(table, row, twin && runs[run.value].label);
    if (twin) addAnswers(table, twin, runs[other.value].label);
    const details = element("details");
    details.append(element("summary", "prompt"), element("pre", row.context));
    made.append(table, details);
    return made;
  };

  const update = () => {
    const rows = runs[run.value]?.rows ?? [];
    const twins = new Map((runs[other.value]?.rows ?? []).map((row) => [row.id, row]));
    const words = search.value.toLowerCase();
    const names = lm.value ? [lm.value] : runs[run.value]?.lms ?? [];
    const found = rows.filter((row) =>
      names.some((name) => FILTERS[filter.value](row, name, twins.get(row.id))) &&
      (!words || JSON.stringify([row.question, row.context, row.golds, row.answers]).toLowerCase().includes(words)));
    byId("count").textContent = `${found.length} of ${rows.length} questions`;
    byId("cards").replaceChildren(...found.slice(0, shown).map((row) => card(row, twins.get(row.id))));
    byId("more").hidden = found.length <= shown;
    const state = Object.fromEntries(fields.map((field) => [field.id, field.value]));
    history.replaceState(null, "", "#predictions?" + new URLSearchParams(state));
  };

  // The hash keeps the choice over a reload (a watched page reloads itself).
  for (const [name, value] of new URLSearchParams(location.hash.split("?")[1] ?? "")) {
    const field = byId(name);
    if (fields.includes(field)) field.value = value;
    if (field?.tagName === "SELECT" && field.selectedIndex < 0) field.selectedIndex = 0;
  }
  for (const field of fields) field.addEventListener("input", () => { shown = PAGE; update(); });
  byId("more").addEventListener("click", () => { shown += PAGE; update(); });
  update();
})();
