// The workers: what each does and did lately, and what an operator may have it do.

import { ask, el, empty, fill, openDialog, setText, snippet, toast } from "../dom.js";
import { count, plural, seconds } from "../format.js";
import { keyed } from "../keyed.js";
import { MINUTES, sparkline } from "../loads.js";

const STATES = {
  ok: ["ok", "good"],
  busy: ["all slots taken", "warn"],
  stalled: ["stalled", "bad"],
  draining: ["draining", "warn"],
  suspended: ["connection cut", "bad"],
  asleep: ["asleep", ""],
  waking: ["waking", "accent"],
};
const ADMITTED = { certificate: "by its certificate", token: "by the cluster token", open: "without a token" };
// The node stands in for a worker that sleeps, under the worker's name with this behind it.
const ASLEEP = ", asleep";
// Models of a worker that are shown; the view of the models has all of them, and a filter.
const MODELS_SHOWN = 40;
// Lags below this, in seconds, are those of every event loop.
const LEAST_LAG = 0.05;

export function mount(root, page) {
  const { live } = page;
  const tiles = ["Workers", "Slots taken", "Waiting", "Asleep"].map((name) => {
    const value = el("span.value", {}, "–");
    return { value, element: el("div.tile", {}, value, el("span.name", {}, name)) };
  });
  const adding = el("button", { type: "button", onclick: () => openDialog("Add a worker", howToAdd(page), { wide: true }) }, "Add a worker");
  const overview = el("div", {}, el("div.tiles", {}, tiles.map((tile) => tile.element)), el("div.toolbar", {}, adding));
  const list = el("ul.cards.plain-list");
  const none = el("div");
  const show = keyed(list, (worker) => worker.id, (worker) => makeCard(page, worker.id));
  root.append(overview, list, none);

  function paint() {
    const workers = [...live.workers.values()].sort((one, other) => isAway(one) - isAway(other) || one.id.localeCompare(other.id));
    const there = workers.filter((worker) => !isAway(worker));
    const sum = (name) => there.reduce((total, worker) => total + worker[name], 0);
    setText(tiles[0].value, there.length);
    setText(tiles[1].value, `${count(sum("running"))} of ${count(sum("capacity"))}`);
    setText(tiles[2].value, count(sum("waiting")));
    setText(tiles[3].value, workers.length - there.length);
    tiles[3].element.hidden = workers.length === there.length;
    overview.hidden = workers.length === 0;
    show(workers);
    showNone(workers.length);
  }

  function showNone(number) {
    const what = number > 0 ? "" : live.state === "connecting" ? "connecting" : "none";
    if (none.dataset.what === what) return;
    none.dataset.what = what;
    if (what === "") fill(none);
    else if (what === "connecting") fill(none, empty("Connecting …"));
    else if (page.session.mode === "standalone") {
      fill(none, empty("This node works alone", el("p", {}, "It serves its models itself, and has no workers. To use several machines, start a master instead:"), snippet("trio-cluster master 8080")));
    } else fill(none, empty("No worker is connected", howToAdd(page)));
  }

  const ticks = setInterval(() => document.hidden || paint(), 1000);
  live.addEventListener("change", paint);
  paint();
  return () => {
    clearInterval(ticks);
    live.removeEventListener("change", paint);
  };
}

function isAway(worker) {
  return worker.state === "asleep" || worker.state === "waking";
}

function makeCard(page, id) {
  const { api, live, session } = page;
  let current;
  const badge = el("span.badge");
  const about = el("p.quiet.about");
  const trouble = el("p.bad.trouble");
  const meter = el("span");
  const slots = el("span.slots");
  const chart = sparkline();
  const load = el(
    "div.load",
    {},
    el("div.grow", {}, el("p.nowrap", {}, slots), el("div.meter", { "aria-hidden": "true" }, meter)),
    el("div.trend", {}, chart.element, el("span.quiet", { "aria-hidden": "true" }, `last ${MINUTES} min`)),
  );
  const facts = el("p.quiet.small-facts");
  const models = el("ul.chips", { "aria-label": "Models" });
  const showModels = keyed(models, (model) => model.name, makeChip);
  const more = el("a.quiet", { href: "#models" });
  const heading = el("h2.ellipsis", { title: id }, id);
  const drain = el("button.small", { type: "button", onclick: doDrain }, "Drain");
  const revoke = el("button.small", { type: "button", onclick: doRevoke }, "Revoke");
  const wake = el("button.small", { type: "button", onclick: doWake }, "Wake");
  const element = el(
    "li.card.worker",
    {},
    el("div.row.apart", {}, el("div.row.grow.title", {}, heading, badge), el("div.row", {}, wake, drain, revoke)),
    about,
    trouble,
    load,
    facts,
    models,
    more,
  );

  async function doDrain() {
    const sure = await ask(
      `Drain ${id}?`,
      "It takes no new requests, finishes those that it has, and stops. It has to be started again on its machine.",
      "Drain",
    );
    if (sure) await act(drain, `cluster/workers/${encodeURIComponent(id)}/drain`, {}, `${id} drains`);
  }

  async function doRevoke() {
    const sure = await ask(
      `Revoke ${id}?`,
      "Its connection is ended at once, with all that it answers, and its certificate is refused for ever. It can come back only with a new invitation.",
      "Revoke",
    );
    if (sure) await act(revoke, `cluster/workers/${encodeURIComponent(id)}/revoke`, {}, `The certificate of ${id} is refused from now on`);
  }

  async function doWake() {
    const model = encodeURIComponent(current.models[0]);
    await act(wake, `cluster/models/${model}/load`, { worker: id + ASLEEP }, `${id} is awake`);
  }

  async function act(button, path, body, done) {
    button.disabled = true;
    try {
      await api.send(path, { body });
      toast(done);
    } catch (error) {
      toast(error.message, "error");
    }
    button.disabled = false;
  }

  return {
    element,
    update(worker) {
      current = worker;
      const [text, tone] = STATES[worker.state] ?? [worker.state, ""];
      const away = isAway(worker);
      setText(badge, text);
      badge.className = `badge ${tone}`;
      element.classList.toggle("away", away);
      setText(about, away ? awayText(worker) : aboutText(worker, live.now));
      setText(trouble, worker.stalled);
      load.hidden = facts.hidden = away;
      setText(slots, `${worker.running} of ${plural(worker.capacity, "slot")} taken`);
      meter.style.width = `${worker.capacity ? Math.min(100, (100 * worker.running) / worker.capacity) : 0}%`;
      chart.draw(page.loads.of(id));
      setText(facts, factsOf(worker));
      const served = worker.models.map((name) => ({ name, state: worker.model_states[name], why: worker.ejected[name] }));
      // Those that are left alone are shown in any case.
      if (served.length > MODELS_SHOWN) served.sort((one, other) => Boolean(other.why) - Boolean(one.why));
      showModels(served.slice(0, MODELS_SHOWN));
      const left = served.length - MODELS_SHOWN;
      more.hidden = left <= 0;
      setText(more, left > 0 ? `and ${left} more ${left === 1 ? "model" : "models"}` : "");
      wake.hidden = worker.state !== "asleep" || worker.models.length === 0;
      drain.hidden = away || worker.draining;
      // Only a certificate can be refused: whoever has the token of the cluster may connect again.
      revoke.hidden = session.role !== "admin" || worker.admitted !== "certificate";
    },
  };
}

function awayText(worker) {
  if (worker.state === "waking") return `Its machine is being woken; ${plural(worker.in_flight, "request waits", "requests wait")} for it.`;
  return "Its machine sleeps. A request for a model that only it has wakes it.";
}

function aboutText(worker, now) {
  const parts = [worker.address];
  if (worker.version) parts.push(`version ${worker.version}`);
  if (worker.connected_since !== null) parts.push(`connected for ${seconds(Math.max(0, now - worker.connected_since))}`);
  if (worker.admitted !== null) parts.push(`admitted ${ADMITTED[worker.admitted] ?? worker.admitted}`);
  return parts.join(" · ");
}

function factsOf(worker) {
  const waiting = Object.entries(worker.waiting_by).map(([name, number]) => `${name || "without a key"} ${number}`);
  const parts = [
    worker.waiting ? `${worker.waiting} waiting${waiting.length ? ` (${waiting.join(", ")})` : ""}` : "none waiting",
    `${worker.in_flight} in flight from here`,
  ];
  if (worker.in_flight_elsewhere) parts.push(`${worker.in_flight_elsewhere} from other masters`);
  parts.push(worker.lag < LEAST_LAG ? "no lag" : `lag ${worker.lag.toFixed(1)} s`);
  return parts.join(" · ");
}

function makeChip({ name }) {
  const text = el("span.ellipsis", {}, name);
  const note = el("span.note");
  const element = el("li.chip", {}, text, note);
  return {
    element,
    update({ state, why }) {
      const tone = why ? "bad" : state === "starting" ? "accent" : "";
      const classes = `chip ${tone}`.trim();
      if (element.className !== classes) element.className = classes;
      setText(note, why ? "left alone" : state ?? "");
      const title = why ? `${name} is left alone for a while, since it keeps failing here: ${why}` : name;
      if (element.title !== title) element.title = title;
    },
  };
}

/** Return what explains how a worker is added, with commands for this node's address. */
function howToAdd(page) {
  const { hostname, protocol, port } = new URL(page.api.base);
  const api = `${hostname} ${port || (protocol === "https:" ? 443 : 80)}`;
  const local = ["localhost", "127.0.0.1", "[::1]"].includes(hostname);
  const tls = protocol === "https:";
  const join = tls ? "trio-cluster worker --join TOKEN" : `trio-cluster worker ${api}`;
  const parts = [];
  if (tls) {
    parts.push(
      el("p", {}, "Each worker joins with an invitation of its own. Make one, and use it within an hour:"),
      page.session.role === "admin" ? invitation(page) : snippet(`trio-cluster invite ${page.api.base}`),
    );
  }
  parts.push(
    el("p", {}, "On the other machine, in a checkout of trio_cluster, with a small model to begin with:"),
    snippet(`pip install '.[llama]'\n${join} --serve llama:smollm2 --name NAME`),
    el("p", {}, "With a server that already runs there (vLLM, llama.cpp, Ollama and others with an OpenAI API):"),
    snippet(`${join} --serve openai:http://127.0.0.1:8000/v1 --name NAME`),
    el("p", {}, "With handlers of your own, in models.py:"),
    snippet(`${join} --app models:server --name NAME`),
  );
  if (local) parts.push(el("p.hint", {}, `${hostname} is this machine only. On others, write its name or its address instead; the master has to listen there.`));
  if (!tls) parts.push(el("p.hint", {}, "If the master has a cluster token, set TRIO_CLUSTER_CLUSTER_TOKEN on the other machine, too. Behind a proxy, write the address of the master itself."));
  return el("div.how-to", {}, parts);
}

/** Return a button that makes an invitation, and shows the command to join with. */
function invitation(page) {
  const made = el("div", { role: "status" });
  const button = el(
    "button.primary",
    {
      type: "button",
      onclick: async () => {
        button.disabled = true;
        try {
          const { command } = await page.api.json("cluster/invites", { body: {} });
          fill(made, snippet(command));
        } catch (error) {
          fill(made, el("p.error", {}, error.message));
        }
        button.disabled = false;
      },
    },
    "Make an invitation",
  );
  return el("div.invitation", {}, button, made);
}
