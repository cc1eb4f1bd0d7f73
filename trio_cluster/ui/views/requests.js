// The requests that run, as a tree: client, request, attempt, worker. A click shows the story of one.

import { el, empty, setText, snippet, toast } from "../dom.js";
import { bytes, count, placeOf, stopwatch, tokens } from "../format.js";
import { RowList, cell } from "../rows.js";
import { shell } from "./connect/clients.js";
import { mountStory } from "./story.js";

// The least time between two updates of what is shown, in milliseconds.
const INTERVAL = 250;
// The share that the newest measurement has in a rate.
const NEWEST = 0.4;
// Seconds without a change after which a rate is nothing, whatever it was. A busy node looks every few seconds.
const SILENCE = 6;

const GROUPS = [
  { id: "key", title: "Client", of: (request) => clientOf(request) },
  { id: "node", title: "Worker", of: (request) => placeOf(request.node) || "No worker yet" },
  { id: "model", title: "Model", of: (request) => nameOf(request) || "Not known yet" },
  { id: "none", title: "Nothing", of: null },
];
const COLUMNS = [
  { title: "Request", class: "c-name" },
  { title: "Model", class: "c-model" },
  { title: "Client", class: "c-from" },
  { title: "Worker", class: "c-node" },
  { title: "State", class: "c-state" },
  { title: "Age", class: "c-age number" },
  { title: "Output", class: "c-output number" },
  { title: "Per second", class: "c-rate number" },
  { title: "Time left", class: "c-left number" },
  { title: "Cancel", class: "c-do", hidden: true },
];
const ATTEMPTS = { first: "first attempt", retry: "retry", hedge: "second attempt beside it", next_name: "next name" };

// What is to be found again when the user comes back from a story.
const kept = { filter: "", group: "key", folded: new Map(), place: null };

export function mount(root, page) {
  return page.args[0] ? mountStory(root, page, page.args[0]) : mountList(root, page);
}

function mountList(root, page) {
  const { live } = page;
  const entries = new Map();
  let shown = [];
  let paintedAt = 0;
  let timer = 0;

  const tiles = ["Running", "Waiting", "Output per second", "Clients"].map((name) => {
    const value = el("span.value", {}, "–");
    return { value, element: el("div.tile", {}, value, el("span.name", {}, name)) };
  });
  const filter = el("input", {
    type: "search", "aria-label": "Filter the requests", placeholder: "Filter: id, model, client, worker, state", value: kept.filter,
    oninput: () => ((kept.filter = filter.value), paint()),
  });
  const grouping = el(
    "select",
    { onchange: () => ((kept.group = grouping.value), paint()) },
    GROUPS.map((group) => el("option", { value: group.id, selected: group.id === kept.group }, group.title)),
  );
  const found = el("p.quiet.found", { role: "status" });
  const wanted = el("input", {
    type: "search", "aria-label": "Find a request by its id", placeholder: "Find a request by its id", spellcheck: false, autocomplete: "off",
    required: true,
  });
  const finding = el(
    "form.finding",
    {
      onsubmit: (event) => {
        event.preventDefault();
        if (wanted.value.trim()) open(wanted.value.trim());
      },
    },
    wanted,
    el("button", { type: "submit" }, "Find"),
  );
  const list = new RowList({
    label: "Requests that run",
    columns: COLUMNS,
    make: (kind) => ({ group: groupRow, request: requestRow, attempt: attemptRow })[kind](),
    open: (item) => (item.kind === "group" ? toggle(item) : open(item.request.request_id)),
    toggle,
  });
  const none = el("div");
  root.append(
    el("div.tiles", {}, tiles.map((tile) => tile.element)),
    el(
      "div.toolbar",
      {},
      filter,
      el("label.plain", {}, "Group by", grouping),
      finding,
    ),
    found,
    list.element,
    none,
  );

  /** Return how many tokens so many bytes of a model's answer are, about; infinity: its tokens have no known size. */
  function tokensIn(size, model) {
    if (size === 0) return 0;
    const each = live.models.get(model)?.bytes_per_token;
    return each ? size / each : Infinity;
  }

  /** Return bytes of an answer in tokens, if that is known, or as bytes. */
  function outputOf(size, model) {
    const found = tokensIn(size, model);
    return Number.isFinite(found) ? tokens(found) : bytes(size);
  }

  function open(id) {
    kept.place = list.place;
    page.go("requests", id);
  }

  function toggle(item) {
    kept.folded.set(item.key, Boolean(item.expanded));
    paint();
  }

  function soon() {
    if (timer === 0 && !document.hidden) timer = setTimeout(paint, Math.max(0, paintedAt + INTERVAL - performance.now()));
  }

  function paint() {
    clearTimeout(timer);
    timer = 0;
    paintedAt = performance.now();
    update(entries, live, paintedAt / 1000);
    const words = kept.filter.toLowerCase().split(/\s+/).filter(Boolean);
    const matching = [];
    let waiting = 0;
    let rate = 0;
    let tokenRate = 0;
    const clients = new Set();
    for (const entry of entries.values()) {
      if (entry.waits) waiting++;
      rate += entry.rate;
      tokenRate += tokensIn(entry.rate, entry.request.model);
      clients.add(entry.client);
      if (words.length === 0 || matches(entry, words)) matching.push(entry);
    }
    setText(tiles[0].value, count(entries.size - waiting));
    setText(tiles[1].value, count(waiting));
    // Tokens, as long as each stream is of a model whose tokens have a known size.
    setText(tiles[2].value, rate > 0 && Number.isFinite(tokenRate) ? tokens(tokenRate) : bytes(rate));
    setText(tiles[3].value, count(clients.size));
    setText(found, words.length ? `${matching.length} of ${entries.size} match` : "");
    shown = rows(matching, GROUPS.find((group) => group.id === kept.group).of);
    list.element.hidden = shown.length === 0;
    // Below a client there is no need to repeat it.
    list.element.classList.toggle("by-client", kept.group === "key");
    list.show(shown);
    showNone(entries.size, shown.length);
  }

  function showNone(total, matching) {
    const what = matching > 0 ? "" : live.state === "connecting" ? "connecting" : total > 0 ? "filtered" : "none";
    if (none.dataset.what === what) return;
    none.dataset.what = what;
    none.replaceChildren();
    if (what === "connecting") none.append(empty("Connecting …"));
    if (what === "filtered") none.append(empty("No request matches the filter"));
    if (what === "none") none.append(
      empty(
        "No request runs",
        el("p", {}, "A request is shown here while it runs, with what it waits for. Send one to see it:"),
        snippet(example(page, live)),
        el("p", {}, "What has become of one that is over is found by its id, which is in the header x-request-id of its response."),
      ),
    );
  }

  // Ages and times left change when nothing else does.
  const ticks = setInterval(() => document.hidden || list.render(), 1000);
  live.addEventListener("change", soon);
  document.addEventListener("visibilitychange", soon);
  paint();
  if (kept.place !== null) {
    list.restore(kept.place, true);
    kept.place = null;
  }
  return () => {
    clearInterval(ticks);
    clearTimeout(timer);
    live.removeEventListener("change", soon);
    document.removeEventListener("visibilitychange", soon);
    list.close();
  };

  // The rows

  function groupRow() {
    const name = el("span.ellipsis");
    const sums = el("span.quiet.nowrap");
    const rate = el("span.quiet.nowrap.rate");
    const twisty = el("span.twisty", { "aria-hidden": "true" });
    const only = cell("div.c-group", twisty, name, sums, rate);
    only.setAttribute("aria-colspan", COLUMNS.length);
    return {
      element: el("div.line.group", {}, only),
      update(item) {
        setText(name, item.name);
        let waiting = 0;
        let total = 0;
        let totalTokens = 0;
        for (const entry of item.entries) {
          if (entry.waits) waiting++;
          total += entry.rate;
          totalTokens += tokensIn(entry.rate, entry.request.model);
        }
        setText(sums, `${item.entries.length - waiting} running${waiting ? ` · ${waiting} waiting` : ""}`);
        setText(rate, total >= 1 ? `· ${Number.isFinite(totalTokens) ? tokens(totalTokens) : bytes(total)}/s` : "");
      },
    };
  }

  function requestRow() {
    const id = el("span.mono.ellipsis");
    const twisty = el("span.twisty", { "aria-hidden": "true" });
    const cells = commonCells(cell("div.c-name", twisty, id));
    const button = el("button.small", { type: "button", onclick: () => cancel(page, current) }, "Cancel");
    let current;
    const element = el("div.line.request", {}, ...cells.elements, cell("div.c-do", button));
    return {
      element,
      update(entry, tabIndex) {
        current = entry;
        const { request } = entry;
        setText(id, request.request_id);
        setTitle(id, request.request_id);
        cells.update({
          model: nameOf(request),
          serving: request.model,
          title: request.alias ? `${request.alias}, which is ${request.model}` : request.model,
          from: entry.client,
          node: placeOf(request.node),
          request,
          began: request.began,
          delivered: request.delivered,
          state: entry.cancelling ? "cancelling" : stateOf(request, live.now),
          tone: entry.waits ? "warn" : request.phase === "stopping" ? "" : "good",
          rate: entry.rate > 0 ? outputOf(entry.rate, request.model) : "",
          left: request.deadline === null ? "" : stopwatch(request.deadline - live.now),
        });
        button.tabIndex = tabIndex;
        button.setAttribute("aria-disabled", entry.cancelling);
      },
    };
  }

  function attemptRow() {
    const name = el("span.ellipsis");
    const cells = commonCells(cell("div.c-name", name));
    return {
      element: el("div.line.attempt", {}, ...cells.elements, cell("div.c-do")),
      update({ attempt }) {
        setText(name, `${attempt.attempt}. ${ATTEMPTS[attempt.kind] ?? attempt.kind}`);
        cells.update({
          model: attempt.model,
          serving: attempt.model,
          title: attempt.model,
          from: "",
          node: placeOf(attempt.node),
          began: attempt.began,
          delivered: attempt.delivered,
          state: attempt.error ? `failed: ${attempt.error}` : stateOf(attempt, live.now),
          tone: attempt.error ? "bad" : attempt.phase === "over" ? "" : waits(attempt) ? "warn" : "good",
          rate: "",
          left: "",
        });
      },
    };
  }

  /** The cells that requests and attempts have in common. */
  function commonCells(first) {
    const texts = Object.fromEntries(["model", "from", "node", "state", "age", "output", "rate", "left"].map((name) => [name, el("span.ellipsis")]));
    const dot = el("span.dot", { "aria-hidden": "true" });
    return {
      elements: [
        first,
        ...Object.entries(texts).map(([name, text]) =>
          cell(`div.c-${name}${["age", "output", "rate", "left"].includes(name) ? ".number" : ""}`, name === "state" && dot, text),
        ),
      ],
      update(values) {
        setText(texts.model, values.model);
        setTitle(texts.model, values.title);
        setText(texts.from, values.from);
        setText(texts.node, values.node);
        setTitle(texts.node, values.node);
        setText(texts.state, values.state);
        setTitle(texts.state, values.state);
        setText(texts.age, stopwatch(live.now - values.began));
        setText(texts.output, values.delivered > 0 ? outputOf(values.delivered, values.serving) : "");
        setText(texts.rate, values.rate);
        setText(texts.left, values.left);
        const tone = `dot ${values.tone}`;
        if (dot.className !== tone) dot.className = tone;
      },
    };
  }
}

/** Bring what is kept of each request up to date. */
function update(entries, live, now) {
  for (const [id, request] of live.requests) {
    const entry = entries.get(id);
    if (entry === undefined) {
      const made = { key: `r${id}`, kind: "request", level: 1, expanded: undefined, rate: 0, at: now, cancelling: false };
      entries.set(id, made);
      read(made, request);
    } else if (entry.request !== request) {
      const per = Math.max(0, request.delivered - entry.request.delivered) / Math.max(0.1, now - entry.at);
      entry.rate = entry.rate > 0 ? entry.rate + NEWEST * (per - entry.rate) : per;
      entry.at = now;
      read(entry, request);
    } else if (now - entry.at > SILENCE) entry.rate = 0;
  }
  if (entries.size > live.requests.size) {
    for (const id of entries.keys()) if (!live.requests.has(id)) entries.delete(id);
  }
}

function read(entry, request) {
  entry.request = request;
  entry.waits = waits(request);
  entry.client = clientOf(request);
  entry.text = null;
}

/** Whether a request has all of some words, which are in lower case. */
function matches(entry, words) {
  const { request } = entry;
  // Made when there is a filter, and kept until the request changes.
  entry.text ??= [
    request.request_id, request.model, request.alias, request.key, request.client, placeOf(request.node), request.phase, request.waits_for,
  ].join(" ").toLowerCase();
  return words.every((word) => entry.text.includes(word));
}

/** Return the items of the list: groups, requests and attempts in the order of the tree. */
function rows(matching, groupOf) {
  if (groupOf === null) return matching.flatMap((entry) => branch(entry, 1));
  const groups = new Map();
  for (const entry of matching) {
    const name = groupOf(entry.request);
    let group = groups.get(name);
    if (group === undefined) {
      const key = `g${name}`;
      groups.set(name, (group = { key, kind: "group", level: 1, expanded: !kept.folded.get(key), name, entries: [] }));
    }
    group.entries.push(entry);
  }
  const items = [];
  for (const group of [...groups.values()].sort((one, other) => one.name.localeCompare(other.name))) {
    items.push(group);
    if (group.expanded) for (const entry of group.entries) items.push(...branch(entry, 2));
  }
  return items;
}

/** Return a request and those of its attempts that are shown. One that has several shows them unless it is folded. */
function branch(entry, level) {
  const calls = entry.request.calls;
  entry.level = level;
  entry.expanded = undefined;
  if (calls.length === 0) return [entry];
  entry.expanded = kept.folded.has(entry.key) ? !kept.folded.get(entry.key) : calls.length > 1;
  if (!entry.expanded) return [entry];
  return [
    entry,
    ...calls.map((attempt) => ({
      key: `${entry.key}/${attempt.attempt}`, kind: "attempt", level: level + 1, expanded: undefined, attempt, request: entry.request,
    })),
  ];
}

async function cancel(page, entry) {
  if (entry.cancelling) return;
  entry.cancelling = true;
  const id = entry.request.request_id;
  try {
    await page.api.send(`cluster/calls/${encodeURIComponent(id)}/cancel`, { body: {} });
    toast(`${id} was cancelled`);
  } catch (error) {
    entry.cancelling = false;
    toast(error.message, "error");
  }
}

/** Whether a request or an attempt waits for something else than the output of its model, or for an answer to begin. */
function waits({ phase, waits_for: what }) {
  if (phase === "admitting" || phase === "uploading" || phase === "queued") return true;
  return phase === "waiting" && what !== "";
}

function stateOf({ phase, waits_for: what, ready_at: readyAt }, now) {
  // What is done for it: starting a model, waking a machine, waiting for memory.
  if (/^\w+ing /.test(what)) return readyAt ? `${what}, about ${Math.max(1, Math.round(readyAt - now))} s` : what;
  const waiting = what ? `waits for ${what}` : "";
  if (phase === "queued") return waiting || "queued";
  if (phase === "waiting") return waiting || "waits for output";
  return waiting ? `${phase}: ${waiting}` : phase;
}

function nameOf(request) {
  return request.alias || request.model;
}

function clientOf(request) {
  return request.key || request.client.replace(/:\d+$/, "") || "A client";
}

function setTitle(element, text) {
  if (element.title !== text) element.title = text;
}

function example(page, live) {
  const model = [...live.models.values()].find((each) => each.kind === "chat")?.id ?? "MODEL";
  const body = JSON.stringify({ model, stream: true, messages: [{ role: "user", content: "Hello" }] });
  return [
    `curl -N ${page.api.base}/v1/chat/completions`,
    page.api.hasKey && '  -H "Authorization: Bearer $KEY"',
    '  -H "Content-Type: application/json"',
    `  -d ${shell(body)}`,
  ].filter(Boolean).join(" \\\n");
}
