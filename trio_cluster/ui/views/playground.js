// The playground: a form for each kind of model.

import { el, empty, fill, setText, snippet } from "../dom.js";
import { shell } from "./connect/clients.js";
import { showModels, tabStrip } from "./model_tabs.js";
import { createChat } from "./playground/chat.js";
import { createImages } from "./playground/images.js";
import { createSpeech, createTranscription } from "./playground/audio.js";
import { createEmbeddings, createModeration, createRanking } from "./playground/scores.js";

// Models of kind "any" stand for a server behind them, which may answer all of these.
const TASKS = [
  { id: "chat", title: "Chat", kind: "chat", create: createChat },
  { id: "speech", title: "Speech", kind: "tts", create: createSpeech },
  { id: "transcription", title: "Transcription", kind: "asr", create: createTranscription },
  { id: "images", title: "Pictures", kind: "image_generation", create: (page) => createImages(page) },
  { id: "edits", title: "Changing pictures", kind: "image_edit", create: (page) => createImages(page, true) },
  { id: "embeddings", title: "Embeddings", kind: "embedding", create: createEmbeddings },
  { id: "ranking", title: "Ranking", kind: "rerank", create: createRanking },
  { id: "moderation", title: "Moderation", kind: "moderation", create: createModeration },
  { id: "routes", title: "Other routes", kind: "custom", create: createRoutes },
];

// What a user has begun stays when another view is looked at, for as long as the same key is signed in.
const kept = new WeakMap();

/** `#playground/TASK/MODEL`, or `#playground/MODEL`. */
export function mount(root, page) {
  const tasks = kept.get(page.api) ?? new Map();
  kept.set(page.api, tasks);
  let shown = null;
  const gone = new AbortController();

  function escape(event) {
    if (event.key === "Escape" && document.querySelector("dialog[open]") === null) shown?.stop();
  }

  function show(models, again) {
    if (models.length === 0) {
      fill(root, noModels(page, again()));
      return;
    }
    const fitting = (task) => models.filter((model) => model.kind === task.kind || (model.kind === "any" && task.kind !== "custom"));
    const offered = TASKS.filter((task) => fitting(task).length);
    const [first, second] = page.args;
    const named = models.find((model) => model.id === (second ?? first));
    const task =
      offered.find((each) => each.id === first) ??
      offered.find((each) => named !== undefined && fitting(each).includes(named)) ??
      offered.find((each) => each.id === tasks.last) ??
      offered[0];
    const choices = fitting(task);
    const state = tasks.get(task.id) ?? { ...task.create(page), model: "" };
    tasks.set(task.id, state);
    tasks.last = task.id;
    shown = state;
    const chosen = choices.find((model) => model.id === named?.id) ?? choices.find((model) => model.id === state.model) ?? choices[0];
    const note = el("p.hint.note");
    const select = el(
      "select",
      { id: "playground-model", onchange: () => choose(choices.find((model) => model.id === select.value)) },
      choices.map((model) => el("option", { value: model.id }, model.id)),
    );

    function choose(model) {
      state.model = model.id;
      state.choose(model);
      const aliases = [model.alias_of].flat().filter((each) => each !== undefined);
      const facts = [
        aliases.length && `stands for ${aliases.map((each) => (typeof each === "object" ? Object.keys(each).join(", ") : each)).join(", ")}`,
        model.context_window && `${model.context_window} tokens of context`,
        model.capabilities?.vision && "sees pictures",
        model.state === "cold" && "not loaded: the first request waits until it is",
        model.state === "starting" && "is being loaded",
      ].filter(Boolean);
      setText(note, facts.join(" · "));
    }

    select.value = chosen.id;
    choose(chosen);
    const tabs = tabStrip("Tasks", "playground", offered, task);
    fill(
      root,
      tabs.element,
      el("div.toolbar", {}, el("label", { for: "playground-model" }, "Model"), select, note),
      state.element,
    );
    tabs.scroll();
    // On a screen to touch, the keyboard would cover half of the page.
    if (matchMedia("(pointer: fine)").matches) state.focus();
  }

  document.addEventListener("keydown", escape);
  showModels(root, page, gone.signal, show);
  return () => {
    gone.abort();
    document.removeEventListener("keydown", escape);
  };
}

function noModels(page, again) {
  if (page.session.name && page.live === null) {
    return empty("No models", el("p", {}, "None is served, or your key allows none of those that are. An operator can tell which."), again);
  }
  const { protocol, hostname, port } = location;
  const serve = "--serve openai:http://127.0.0.1:11434/v1";
  return empty(
    "No models yet",
    el("p", {}, "The node serves no model. Start a worker that has one, for instance the models of an Ollama on its machine."),
    protocol === "https:"
      ? [
        el("p", {}, "On the machine of the master, this prints a token with which a worker may join:"),
        snippet("trio-cluster invite"),
        el("p", {}, "On the machine of the worker:"),
        snippet(`trio-cluster worker --join TOKEN ${serve}`),
      ]
      : snippet(`trio-cluster worker ${hostname} ${port || 80} ${serve}`),
    again,
  );
}

/** Models with routes of their own: only their authors know what these take, so there is no form. */
function createRoutes(page) {
  const element = el("div.card");
  return {
    element,
    stop() {},
    focus() {},
    choose(model) {
      fill(
        element,
        el("p", {}, "This model answers routes of its own, and the page does not know what they take. A request to one has a field ", el("code", {}, "model"), ":"),
        snippet(`curl ${page.api.base}/v1/ROUTE -H "Authorization: Bearer $OPENAI_API_KEY" -H "Content-Type: application/json" -d ${shell(JSON.stringify({ model: model.id }))}`),
      );
    },
  };
}
