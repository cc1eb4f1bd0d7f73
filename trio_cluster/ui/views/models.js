// The models: what they are, where they run, how quick they are, and what is to be done so that they do.

import { el, empty, factList, fill, setText, snippet, toast } from "../dom.js";
import { count, placeOf, plural } from "../format.js";
import { keyed } from "../keyed.js";

const KINDS = {
  chat: "chat", embedding: "embeddings", asr: "transcription", tts: "speech", image_generation: "pictures", image_edit: "editing pictures",
  rerank: "ranking", moderation: "moderation", custom: "custom", any: "all routes",
};
const TONES = { ready: "good", starting: "accent", cold: "", failed: "bad" };
// Milliseconds between two looks at the list, for keys that get no events.
const INTERVAL = 10_000;

export function mount(root, page) {
  const { live, api } = page;
  const filter = el("input", { type: "search", "aria-label": "Filter the models", placeholder: "Filter: name, kind, worker, state", oninput: paint });
  const toolbar = el("div.toolbar", {}, filter);
  const list = el("ul.cards.plain-list");
  const none = el("div");
  const aliases = el("tbody");
  const table = el(
    "div.table",
    { hidden: true },
    el("table", {}, el("caption", {}, "Aliases"), el("thead", {}, el("tr", {}, el("th", {}, "Name"), el("th", {}, "Stands for"))), aliases),
  );
  const show = keyed(list, (model) => model.id, (model) => makeCard(page, model.id));
  const showAliases = keyed(aliases, (alias) => alias.id, makeAlias);
  const gone = new AbortController();
  let timer = 0;
  let listed = null;
  const trouble = el("p.error", { role: "status" });
  root.append(trouble, toolbar, list, none, table);

  function paint() {
    const all = live === null ? listed ?? [] : [...live.models.values()];
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const models = all
      .filter((model) => model.alias_of === undefined && matches(model, words))
      .sort((one, other) => one.id.localeCompare(other.id));
    show(models);
    const names = new Map();
    for (const model of all) {
      if (model.alias_of !== undefined) names.set(model.id, model);
      for (const alias of model.aliases ?? []) names.set(alias.id, alias);
    }
    showAliases([...names.values()].sort((one, other) => one.id.localeCompare(other.id)));
    table.hidden = names.size === 0;
    toolbar.hidden = all.length === 0;
    const waiting = live === null ? listed === null : live.state === "connecting";
    showNone(models.length > 0 ? "" : all.length > 0 ? "filtered" : waiting ? "connecting" : "none");
  }

  function showNone(what) {
    if (none.dataset.what === what) return;
    none.dataset.what = what;
    fill(none);
    if (what === "connecting") none.append(empty("Connecting …"));
    if (what === "filtered") none.append(empty("No model matches the filter"));
    if (what === "none") none.append(live === null ? empty("There is no model that this key may use", el("p", {}, "Ask the operator of this server.")) : howToRegister(page));
  }

  async function look() {
    try {
      listed = (await api.json("v1/models", { signal: gone.signal })).data;
      setText(trouble, "");
      paint();
    } catch (error) {
      if (error.name === "AbortError") return;
      setText(trouble, `${error.message}: what is shown may be old. It is tried again every ${INTERVAL / 1000} s.`);
    }
    if (!gone.signal.aborted) timer = setTimeout(look, INTERVAL);
  }

  if (live === null) look();
  live?.addEventListener("change", paint);
  paint();
  return () => {
    clearTimeout(timer);
    gone.abort();
    live?.removeEventListener("change", paint);
  };
}

function matches(model, words) {
  if (words.length === 0) return true;
  const nodes = (model.replicas ?? []).map((replica) => placeOf(replica.node));
  const text = [model.id, model.kind, KINDS[model.kind], model.state, ...nodes].join(" ").toLowerCase();
  return words.every((word) => text.includes(word));
}

function makeCard(page, id) {
  const state = el("span.badge");
  const kind = el("span.badge");
  const why = el("p.bad.trouble");
  const facts = factList("numbers");
  const replicas = el("ul.replicas", { "aria-label": "Replicas" });
  const showReplicas = keyed(replicas, (replica) => replica.node, makeReplica);
  const load = el("button.small", { type: "button", onclick: () => act(load, "load", "is loaded") }, "Load");
  const unload = el("button.small", { type: "button", onclick: () => act(unload, "unload", "is unloaded") }, "Unload");
  const buttons = el("div.row", {}, load, unload);
  const element = el(
    "li.card.model",
    {},
    el("div.row.apart", {}, el("div.row.grow.title", {}, el("h2.ellipsis", { title: id }, id), kind, state), buttons),
    why,
    facts.element,
    replicas,
  );

  async function act(button, what, done) {
    button.disabled = true;
    button.setAttribute("aria-busy", "true");
    try {
      await page.api.send(`cluster/models/${encodeURIComponent(id)}/${what}`, { body: {} });
      toast(`${id} ${done}`);
    } catch (error) {
      toast(error.message, "error");
    }
    button.disabled = false;
    button.removeAttribute("aria-busy");
  }

  return {
    element,
    update(model) {
      const vision = model.capabilities?.vision ? " with images" : "";
      setText(kind, (KINDS[model.kind] ?? model.kind) + vision);
      setText(state, model.state);
      state.className = `badge ${TONES[model.state] ?? ""}`;
      setText(why, model.why ?? "");
      if (model.replicas !== undefined) {
        // Of one replica it is beside the replica.
        facts.set("In flight", model.replicas.length > 1 ? count(model.in_flight) : "");
        facts.set("Speed", model.tokens_per_second === null ? "" : `${model.tokens_per_second} tokens/s`);
        const share = model.prompt_tokens > 0 ? Math.round((100 * model.cached_tokens) / model.prompt_tokens) : null;
        facts.set("Prompts found in caches", share === null ? "" : `${share} %`);
      }
      facts.set("Context", model.context_window ? `${count(model.context_window)} tokens` : "");
      facts.set("Longest answer", model.max_output_tokens ? `${count(model.max_output_tokens)} tokens` : "");
      if (model.trio_cluster_via?.length > 1) facts.set("Through", plural(model.trio_cluster_via.length - 1, "other cluster"));
      const found = model.replicas ?? [];
      const onDemand = found.filter((replica) => replica.on_demand);
      showReplicas(found);
      load.hidden = !onDemand.some((replica) => replica.available && replica.state !== "ready");
      unload.hidden = !onDemand.some((replica) => replica.state === "ready" || replica.state === "starting");
      buttons.hidden = load.hidden && unload.hidden;
    },
  };
}

function makeReplica() {
  const dot = el("span.dot", { "aria-hidden": "true" });
  const name = el("span.ellipsis.name");
  const state = el("span.quiet");
  const speed = el("span.quiet.number");
  const flight = el("span.quiet.number");
  const element = el("li", {}, dot, name, state, flight, speed);
  return {
    element,
    update(replica) {
      setText(name, placeOf(replica.node));
      const shown = replica.available ? replica.state : `${replica.state}, takes no requests`;
      setText(state, replica.why ? `${shown}: ${replica.why}` : shown);
      const tones = { ready: "good", starting: "warn", failed: "bad" };
      dot.className = `dot ${replica.available ? tones[replica.state] ?? "" : "warn"}`;
      setText(flight, `${count(replica.in_flight)} in flight`);
      setText(speed, replica.tokens_per_second === null ? "" : `${replica.tokens_per_second} tokens/s`);
    },
  };
}

function makeAlias({ id }) {
  const target = el("td");
  return {
    element: el("tr", {}, el("td.mono", {}, id), target),
    update: ({ alias_of: what }) => setText(target, standsFor(what)),
  };
}

/** Return what an alias stands for: a name, names of which the first that answers is used, or names with shares. */
function standsFor(what) {
  if (typeof what === "string") return what;
  if (Array.isArray(what)) return what.join(", then ");
  const total = Object.values(what).reduce((sum, share) => sum + share, 0);
  return Object.entries(what).map(([name, share]) => `${name} (${Math.round((100 * share) / total)} %)`).join(", ");
}

function howToRegister(page) {
  const parts = [
    el("p", {}, "A model is there as soon as a worker has registered it. With a ready-made engine and no code:"),
    snippet("trio-cluster worker HOST PORT --serve llama:smollm2"),
    el("p", {}, "Or write a handler, in models.py:"),
    snippet(
      "from trio_cluster import ClusterServer\n\nserver = ClusterServer()\n\n@server.chat(\"echo\")\nasync def echo(request):\n    for word in request.messages[-1][\"content\"].split():\n        yield word + \" \"",
    ),
    el("p", {}, "and have a worker serve it:"),
    snippet("trio-cluster worker HOST PORT --app models:server"),
  ];
  if (page.session.mode !== "standalone") {
    parts.push(el("p", {}, el("a", { href: "#workers" }, "The commands with this server's address"), " are in the view of the workers."));
  }
  return empty("No model is registered", ...parts);
}
