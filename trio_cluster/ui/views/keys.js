// Keys and usage: what is used, by whom, and what they may use.

import { ask, el, empty, fill, snippet, toast } from "../dom.js";
import { count } from "../format.js";
import { openKeyForm, openRotation } from "./keys/form.js";
import { createUsage } from "./keys/usage.js";
import { failure } from "./playground/parts.js";

const REFRESH = 20_000;
const MANY = 8;
const PERIODS = { day: "today", week: "this week", month: "this month" };

export function mount(root, page) {
  const admin = page.session.role === "admin";
  const usage = createUsage(page);
  const keys = admin ? createKeys(page, refresh) : null;
  let left = false;

  async function refresh() {
    try {
      await Promise.all([usage.load(), keys?.load()]);
    } catch (error) {
      if (!left) showError(error);
      return;
    }
    if (!left && !usage.element.isConnected) fill(root, keys?.element, usage.element);
  }

  function showError(error) {
    const again = el("button", { type: "button", onclick: refresh }, "Look again");
    if (error.code === "no_database") fill(root, withoutDatabase(again));
    // What is shown is old, and the frame says why.
    else if (error.status !== 0 || !usage.element.isConnected) fill(root, failure(page, error, "Keys and usage cannot be shown"), again);
  }

  fill(root, el("p.quiet", { role: "status" }, "Loading"));
  refresh();
  const timer = setInterval(() => {
    const busy = document.hidden || document.querySelector("dialog[open]") !== null || root.contains(document.activeElement);
    if (!busy) refresh();
  }, REFRESH);
  return () => {
    left = true;
    clearInterval(timer);
  };
}

function withoutDatabase(again) {
  return empty(
    "This node keeps no keys and no usage",
    el("p", {}, "It has no database. Start it with a directory for its state, in which it keeps one:"),
    snippet("trio-cluster master --state-dir ~/trio-cluster"),
    el("p", {}, "Or with a PostgreSQL database, which several masters can share:"),
    snippet("export TRIO_CLUSTER_DATABASE=postgresql://cluster:secret@db.lan/cluster"),
    again,
  );
}

/** Return `{element, load()}` of the list of keys. */
function createKeys(page, changed) {
  let keys = [];
  let used = new Map();
  let spent = new Map();
  let number = 0;
  const search = el("input", { type: "search", placeholder: "Find a key", "aria-label": "Find a key", oninput: () => show(), hidden: true });
  const create = el("button.primary", { type: "button", onclick: () => openKeyForm(page, null, changed) }, "New key");
  const list = el("div");
  const element = el("section", { "aria-labelledby": "keys-title" },
    el("div.row.apart", {}, el("h2", { id: "keys-title" }, "Keys"), create),
    search,
    list);

  async function load() {
    const mine = ++number;
    const { data } = await page.api.json("cluster/keys");
    const periods = new Set(data.map((key) => key.budget?.per).filter(Boolean));
    const sums = async (since) => {
      const rows = (await page.api.json(`cluster/usage?group_by=key&since=${since.toISOString().slice(0, 10)}`)).data;
      return new Map(rows.map((row) => [row.key, row]));
    };
    const [month, ...each] = await Promise.all([
      sums(new Date(page.api.now - 29 * 86_400_000)),
      ...[...periods].map(async (per) => [per, await sums(beginning(per, page.api.now))]),
    ]);
    // What was asked for later has come before: this is older.
    if (mine !== number) return;
    keys = data.toSorted((a, b) => a.name.localeCompare(b.name));
    used = month;
    spent = new Map(each);
    show();
  }

  function show() {
    search.hidden = keys.length < MANY;
    const wanted = search.value.trim().toLowerCase();
    const shown = keys.filter((key) => key.name.toLowerCase().includes(wanted));
    if (!keys.length) {
      fill(list, noKeys(page));
      return;
    }
    fill(
      list,
      el("div.table.stacks", { tabIndex: 0, role: "region", "aria-label": "Keys" },
        el("table", {},
          el("thead", {}, el("tr", {}, ["Name", "May use", "Limits", "Budget", "30 days"].map((title) => el("th", { scope: "col" }, title)), el("th", { scope: "col" }, el("span.hidden-label", {}, "Actions")))),
          el("tbody", {}, shown.map(row)))),
      !shown.length && el("p.quiet", {}, "No key has such a name."),
    );
  }

  function row(key) {
    const expired = key.expires_at !== null && Date.parse(key.expires_at) <= page.api.now;
    const sum = used.get(key.name);
    const cell = (title, ...content) => el("td", { "data-title": title }, ...content);
    return el("tr", {},
      el("th", { scope: "row" },
        el("span.key-name", {}, key.name), " ",
        key.role !== "inference" && el("span.badge.accent", {}, key.role),
        key.disabled && el("span.badge.warn", {}, "disabled"),
        expired && el("span.badge.bad", {}, "expired"),
        key.name === page.session.name && el("span.badge", {}, "yours"),
        key.expires_at && !expired && el("p.hint", {}, `until ${new Date(key.expires_at).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" })}`)),
      cell("May use", key.models.length ? key.models.join(", ") : el("span.quiet.limit", {}, "all models")),
      cell("Limits", limits(key)),
      cell("Budget", budget(key)),
      cell("30 days", sum ? [el("div.limit", {}, `${count(sum.prompt_tokens + sum.completion_tokens)} tokens`), el("p.hint.limit", {}, sum.requests === 1 ? "1 request" : `${count(sum.requests)} requests`)] : el("span.quiet", {}, "not used")),
      el("td.key-actions", {}, actions(key)));
  }

  function actions(key) {
    const button = (text, action, kind = "") =>
      el("button.small", { type: "button", class: kind, "aria-label": `${text} ${key.name}`, onclick: action }, text);
    return el("div.row", {},
      button("Change", () => openKeyForm(page, key, changed)),
      button("Rotate", () => openRotation(page, key, changed)),
      button(key.disabled ? "Enable" : "Disable", () => disable(key)),
      button("Revoke", () => revoke(key), "danger"));
  }

  async function disable(key) {
    const yours = key.name === page.session.name ? " It is the key that you are signed in with." : "";
    if (!key.disabled && !(await ask(`Disable ${key.name}?`, `Its requests are refused until it is enabled again.${yours}`, "Disable"))) return;
    await act(key, { method: "PATCH", body: { disabled: !key.disabled } }, key.disabled ? "works again" : "is refused from now on");
  }

  async function revoke(key) {
    const yours = key.name === page.session.name ? " It is the key that you are signed in with." : "";
    if (!(await ask(`Revoke ${key.name}?`, `The key is refused from now on, and cannot be had back. Its usage stays.${yours}`, "Revoke"))) return;
    await act(key, { method: "DELETE" }, "was revoked");
  }

  async function act(key, options, done) {
    try {
      await page.api.send(`cluster/keys/${encodeURIComponent(key.name)}`, options);
      toast(`${key.name} ${done}`);
    } catch (error) {
      toast(`${key.name}: ${error.message}`, "error");
    }
    await changed();
    create.focus();
  }

  function budget(key) {
    if (key.budget === null) return el("span.quiet", {}, "no budget");
    const { tokens, per } = key.budget;
    const sum = spent.get(per)?.get(key.name);
    const value = sum ? sum.prompt_tokens + sum.completion_tokens : 0;
    const share = Math.min(1, value / tokens);
    const level = share >= 1 ? "bad" : share >= 0.8 ? "warn" : "";
    const bar = el("span");
    bar.style.width = `${share * 100}%`;
    const text = `${count(value)} of ${count(tokens)} tokens ${PERIODS[per]}`;
    return el("div.budget", {}, el("span", { class: level }, text),
      el("div.meter", { class: level, role: "meter", "aria-label": `Budget of ${key.name}`, "aria-valuemin": 0, "aria-valuemax": tokens, "aria-valuenow": Math.min(value, tokens), "aria-valuetext": text }, bar));
  }

  return { element, load };
}

function limits(key) {
  const parts = [
    key.requests_per_minute !== null && `${key.requests_per_minute.toLocaleString()} requests/min`,
    key.tokens_per_minute !== null && `${count(key.tokens_per_minute)} tokens/min`,
    key.max_concurrency !== null && `${key.max_concurrency} at once`,
    key.priority !== "normal" && `${key.priority} priority`,
    key.weight !== 1 && `weight ${key.weight}`,
  ].filter(Boolean);
  return parts.length ? parts.map((part) => el("div.limit", {}, part)) : el("span.quiet", {}, "none");
}

function noKeys(page) {
  return empty(
    "No keys",
    page.session.requires_key
      ? el("p", {}, "Only the keys of the options are valid. Make a key for each person and program: each has limits and usage of its own, and can be revoked alone.")
      : el("p", {}, "Requests need no key: all who reach this node may use it. Make a key for each person and program. The first one, which should be an admin's, ends that."),
  );
}

/** Return when the period of a budget that `time` is in has begun: in UTC, weeks begin on Monday. */
function beginning(per, time) {
  const now = new Date(time);
  const [year, month, day] = [now.getUTCFullYear(), now.getUTCMonth(), now.getUTCDate()];
  if (per === "month") return new Date(Date.UTC(year, month, 1));
  return new Date(Date.UTC(year, month, per === "week" ? day - ((now.getUTCDay() + 6) % 7) : day));
}
