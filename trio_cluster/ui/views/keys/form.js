// Making and changing a key.

import { append, el, fill, openDialog, snippet } from "../../dom.js";
import { choice, failure, field } from "../playground/parts.js";

const ROLES = [
  ["inference", "inference: use models, see its own usage"],
  ["operator", "operator: also see and cancel requests, drain workers, see all usage"],
  ["admin", "admin: also keys, the audit log, and who belongs to the cluster"],
];

/**
 * Ask for a key's fields, and make or change it.
 *
 * @param {object} page
 * @param {object|null} key the entry of a key to change; null: a new one.
 * @param {Function} done is called when it is done.
 */
export function openKeyForm(page, key, done) {
  // The first key ends the time in which none is needed, for this page too.
  const first = key === null && !page.session.requires_key;
  const limit = (value) => el("input", { type: "number", min: 1, step: 1, placeholder: "no limit", value: value ?? "" });
  const controls = {
    name: el("input", { required: true, maxLength: 64, pattern: "[A-Za-z0-9][A-Za-z0-9._@+\\-]*", title: "Letters, digits and any of . _ @ + -", spellcheck: false, autocomplete: "off" }),
    role: choice(ROLES),
    models: el("input", { placeholder: "all", spellcheck: false, value: (key?.models ?? []).join(", ") }),
    requests_per_minute: limit(key?.requests_per_minute),
    tokens_per_minute: limit(key?.tokens_per_minute),
    max_concurrency: limit(key?.max_concurrency),
    priority: choice(["high", "normal", "low"]),
    weight: el("input", { type: "number", min: 0.001, max: 1000, step: "any", required: true, value: key?.weight ?? 1 }),
    expires_at: el("input", { type: "datetime-local", value: key?.expires_at ? toLocal(key.expires_at) : "" }),
  };
  const tokens = limit(key?.budget?.tokens);
  const per = choice([["day", "each day"], ["week", "each week"], ["month", "each month"]], { "aria-label": "Period of the budget" });
  controls.role.value = key?.role ?? (first ? "admin" : "inference");
  controls.priority.value = key?.priority ?? "normal";
  per.value = key?.budget?.per ?? "month";

  const number = (control) => (control.value === "" ? null : control.valueAsNumber);
  const readers = {
    role: () => controls.role.value,
    models: () => controls.models.value.split(",").map((each) => each.trim()).filter(Boolean),
    requests_per_minute: () => number(controls.requests_per_minute),
    tokens_per_minute: () => number(controls.tokens_per_minute),
    max_concurrency: () => number(controls.max_concurrency),
    budget: () => (tokens.value === "" ? null : { tokens: tokens.valueAsNumber, per: per.value }),
    priority: () => controls.priority.value,
    weight: () => controls.weight.valueAsNumber,
    expires_at: () => (controls.expires_at.value ? new Date(controls.expires_at.value).toISOString() : null),
  };
  const read = () => Object.fromEntries(Object.entries(readers).map(([name, reader]) => [name, reader()]));
  const before = read();

  const problem = el("div", { role: "alert" });
  const button = el("button.primary", { type: "submit" }, key === null ? "Create the key" : "Save");
  const budget = field("Budget, in tokens", tokens);
  const row = el("div.row.nowrap-row", {}, tokens, per);
  budget.append(row);
  const form = el(
    "form.key-form",
    { onsubmit: submit },
    first && el("p.key-warning", {}, "This node needs no key yet. As soon as this one is made, every request needs a key, for good; this page, too."),
    key === null && field("Name", controls.name, "Shown everywhere: whose key it is, or what for"),
    field("Role", controls.role),
    field("Models", controls.models, "Names with commas between them; * stands for anything, as in qwen*"),
    el("div.fields", {},
      field("Requests per minute", controls.requests_per_minute), field("Tokens per minute", controls.tokens_per_minute),
      field("Requests at the same time", controls.max_concurrency), budget,
      field("Priority", controls.priority), field("Weight", controls.weight, "Its share of busy models, relative to others")),
    field("Expires", controls.expires_at, "Empty: never. In the time zone of this browser"),
    problem,
    el("div.actions", {}, el("button", { type: "button", onclick: () => dialog.close() }, "Cancel"), button),
  );
  const dialog = openDialog(key === null ? "New key" : `Change ${key.name}`, [form], { wide: true });
  (key === null ? controls.name : controls.role).focus();

  async function submit(event) {
    event.preventDefault();
    button.disabled = true;
    fill(problem);
    const after = read();
    try {
      if (key === null) {
        const body = { name: controls.name.value };
        for (const [name, value] of Object.entries(after)) {
          if (value !== null && !(Array.isArray(value) && !value.length)) body[name] = value;
        }
        const made = await page.api.json("cluster/keys", { body });
        dialog.close();
        showNewKey(page, made, first);
      } else {
        const changed = Object.entries(after).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(before[name]));
        if (changed.length) {
          await page.api.json(`cluster/keys/${encodeURIComponent(key.name)}`, { method: "PATCH", body: Object.fromEntries(changed) });
        }
        dialog.close();
      }
      if (!first) done();
    } catch (error) {
      button.disabled = false;
      append(problem, failure(page, error, key === null ? "The key was not created" : "The key was not changed"));
      problem.scrollIntoView({ block: "nearest" });
    }
  }
}

/** Show a key that was made, this once. */
export function showNewKey(page, made, signsIn = false, old = "") {
  let next = "";
  const dialog = openDialog(
    `The key of ${made.name}`,
    [
      el("p", {}, "Copy it now: it is shown this once. The node keeps a digest of it, and cannot show it again."),
      el("div.new-key", {}, snippet(made.key, "Copy the key")),
      old && el("p", {}, old),
      signsIn && el("p", {}, "Requests need a key from now on. This page, too: it goes on with this key, or asks for another."),
      el(
        "div.actions",
        {},
        signsIn && el("button.primary", { type: "button", onclick: () => ((next = made.key), dialog.close()) }, "Sign in with this key"),
        el("button", { type: "button", class: signsIn ? "" : "primary", onclick: () => dialog.close() }, "Done"),
      ),
    ],
    { wide: true, stays: true, onclose: () => signsIn && page.signInAgain(next, "Sign in with a key that you have made.") },
  );
  dialog.querySelector(".new-key button").focus();
}

/** Ask how long the old key stays valid, and replace it. */
export function openRotation(page, key, done) {
  const grace = choice([["0", "not at all: it is refused at once"], ["3600", "for an hour"], ["86400", "for a day"], ["604800", "for a week"]]);
  const problem = el("div", { role: "alert" });
  const button = el("button.primary", { type: "submit" }, "Replace the key");
  const form = el(
    "form",
    {
      onsubmit: async (event) => {
        event.preventDefault();
        // Twice, the second new key would take the place of the first.
        button.disabled = true;
        fill(problem);
        try {
          const made = await page.api.json(`cluster/keys/${encodeURIComponent(key.name)}/rotate`, { body: { grace: Number(grace.value) } });
          dialog.close();
          const text = grace.value === "0" ? "The old key is refused from now on." : `The old key works ${grace.selectedOptions[0].text} beside it.`;
          showNewKey(page, made, false, text);
          done();
        } catch (error) {
          button.disabled = false;
          fill(problem, failure(page, error, "The key was not replaced"));
        }
      },
    },
    el("p", {}, "A new key takes its place, with the same name, limits and usage."),
    key.name === page.session.name && el("p.key-warning", {}, "This is the key that you are signed in with."),
    field("How long does the old key go on to work?", grace),
    problem,
    el("div.actions", {}, el("button", { type: "button", onclick: () => dialog.close() }, "Cancel"), button),
  );
  const dialog = openDialog(`Replace the key of ${key.name}`, [form]);
}

function toLocal(time) {
  const date = new Date(time);
  return new Date(date.getTime() - date.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
}
