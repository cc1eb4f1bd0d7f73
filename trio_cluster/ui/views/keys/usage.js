// Requests and tokens by day, of this key or of all.

import { el, fill, setText } from "../../dom.js";
import { count, plural } from "../../format.js";
import { choice, failure } from "../playground/parts.js";
import { chart, lastDays, series } from "./chart.js";

const MEASURES = {
  tokens: ["Tokens", (row) => row.prompt_tokens + row.completion_tokens],
  requests: ["Requests", (row) => row.requests],
  failed: ["Failed requests", (row) => row.failed],
};
const SUMS = ["requests", "completed", "failed", "cancelled", "prompt_tokens", "completion_tokens", "cached_tokens", "usage_unknown"];

/** Return `{element, load()}`; errors of `load` are thrown, unless it was called again meanwhile. */
export function createUsage(page) {
  const operates = page.session.role !== "inference";
  const own = page.session.name ? `Of the key ${page.session.name}` : "Without a key";
  // On the machine of the node, an admin may be without a key where all others need one.
  const hasOwn = page.session.name !== "" || !page.session.requires_key;
  const whose = choice([operates && ["all", "Of all keys"], hasOwn && ["own", own]].filter(Boolean), { "aria-label": "Whose usage" });
  const group = choice([["model", "by model"], ["key", "by key"], ["worker", "by worker"]], { "aria-label": "Grouped" });
  const measure = choice(Object.entries(MEASURES).map(([id, [title]]) => [id, title]), { "aria-label": "What is counted" });
  const span = choice([["7", "7 days"], ["30", "30 days"], ["90", "90 days"]], { "aria-label": "For how long", value: "30" });
  span.value = "30";
  const note = el("p.hint");
  const output = el("div");
  const element = el(
    "section",
    { "aria-labelledby": "usage-title" },
    el("h2", { id: "usage-title" }, "Usage"),
    el("div.toolbar", {}, operates && hasOwn && whose, measure, group, span),
    output,
    note,
  );
  let number = 0;

  async function load() {
    const mine = ++number;
    const by = whose.value === "own" && group.value === "key" ? "model" : group.value;
    const days = lastDays(Number(span.value), page.api.now);
    const path = whose.value === "own" ? "v1/usage" : "cluster/usage";
    let data;
    try {
      ({ data } = await page.api.json(`${path}?group_by=${by},day&since=${days[0]}`));
    } catch (error) {
      if (mine === number) throw error;
      return;
    }
    if (mine === number) show(data, by, days);
  }

  function show(rows, by, days) {
    const [title, value] = MEASURES[measure.value];
    const label = by === "key" ? keyLabel : (name) => name;
    const sums = new Map();
    const all = Object.fromEntries(SUMS.map((name) => [name, 0]));
    for (const row of rows) {
      if (!sums.has(row[by])) sums.set(row[by], Object.fromEntries(SUMS.map((name) => [name, 0])));
      for (const name of SUMS) {
        sums.get(row[by])[name] += row[name];
        all[name] += row[name];
      }
    }
    const groups = [...sums].sort(([, a], [, b]) => b.prompt_tokens + b.completion_tokens - a.prompt_tokens - a.completion_tokens || b.requests - a.requests);
    setText(note, all.usage_unknown ? `Of ${plural(all.usage_unknown, "request")}, the tokens are not known, and are not counted.` : "");
    if (!rows.length) {
      fill(output, el("div.card", {}, el("p.quiet", {}, `No requests in ${days.length} days.`)));
      return;
    }
    const opened = output.querySelector("details")?.open;
    fill(
      output,
      el("div.tiles", {},
        tile("Requests", all.requests), tile("Failed", all.failed, all.failed ? "bad" : ""), tile("Cancelled", all.cancelled),
        tile("Prompt tokens", all.prompt_tokens), tile("From caches", all.cached_tokens), tile("Completion tokens", all.completion_tokens)),
      el("div.card", {}, chart(days, series(rows, by, value), title, label)),
      el("div.table.sums", { tabIndex: 0, role: "region", "aria-label": "Sums" },
        el("table", {},
          el("thead", {}, el("tr", {}, el("th", { scope: "col" }, { model: "Model", key: "Key", worker: "Worker" }[by]),
            ["Requests", "Failed", "Cancelled", "Prompt", "Cached", "Completion"].map((name) => el("th.number", { scope: "col" }, name)))),
          el("tbody", {}, groups.map(([name, sum]) =>
            el("tr", {}, el("th", { scope: "row" }, label(name)),
              ["requests", "failed", "cancelled", "prompt_tokens", "cached_tokens", "completion_tokens"].map((field) =>
                el("td.number", { class: field === "failed" && sum.failed ? "bad" : "" }, sum[field].toLocaleString()))))))),
    );
    if (opened) output.querySelector("details").open = true;
  }

  for (const control of [whose, group, measure, span]) {
    control.addEventListener("change", () => load().catch((error) => fill(output, failure(page, error, "The usage cannot be shown"))));
  }
  return { element, load };
}

/** Return the name of a key in a report. */
export function keyLabel(name) {
  return name || "(no key)";
}

function tile(name, value, kind = "") {
  return el("div.tile", {}, el("span.value", { class: kind, title: value.toLocaleString() }, count(value)), el("span.name", {}, name));
}
