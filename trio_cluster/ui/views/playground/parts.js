// What the forms of the playground have in common: fields, errors, and a request that can be stopped.

import { readEvents } from "../../api.js";
import { append, el, fill, setText } from "../../dom.js";
import { seconds } from "../../format.js";

let fields = 0;

/** Return a control with its label above it, and a hint below it that screen readers read with it. */
export function field(label, control, hint = "") {
  const id = `field-${++fields}`;
  control.id = id;
  const text = hint && el("p.hint", { id: `${id}-hint` }, hint);
  if (hint) control.setAttribute("aria-describedby", `${id}-hint`);
  return el("div.field", {}, el("label", { for: id }, label), control, text);
}

/** Return a `select` of `[value, text]` or of texts. */
export function choice(options, props = {}) {
  const pairs = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  return el("select", props, pairs.map(([value, text]) => el("option", { value }, text)));
}

/** Return the lines of a field that are not empty. */
export function lines(control) {
  return control.value.split("\n").map((line) => line.trim()).filter(Boolean);
}

/** Return the id of a request: for operators, as a link to its story. */
export function requestLink(page, id) {
  if (page.live === null) return el("code.id", {}, id);
  return el("a.id.mono", { href: `#requests/${encodeURIComponent(id)}`, title: "The story of this request" }, id);
}

/** Return an error with all that helps to find its cause. */
export function failure(page, error, title = "It failed") {
  const known = [error.status ? `status ${error.status}` : "", error.code ?? ""].filter(Boolean).join(", ");
  return el(
    "div.failure",
    {},
    el("p", {}, el("strong", {}, `${title}: `), error.message),
    (known || error.requestId) &&
      el("p.measures", {}, known, known && error.requestId && " · ", error.requestId && requestLink(page, error.requestId)),
  );
}

/** Send a request. Returns `{response, requestId, worker}`; see `Api.send`. */
export async function send(page, path, options) {
  const response = await page.api.send(path, options);
  const header = response.headers.get("x-trio-cluster-worker") ?? "";
  let worker = header;
  try {
    worker = decodeURIComponent(header);
  } catch {
    // Not percent-encoded: the name is shown as it came.
  }
  return { response, worker, requestId: response.headers.get("x-request-id") ?? "" };
}

/** Yield the JSON of the events of a stream, up to `[DONE]`. An event with an error is thrown. */
export async function* readChunks(response, requestId) {
  for await (const { data } of readEvents(response)) {
    // Not the end of the loop: that would close the connection before the server has ended the answer.
    if (data === "[DONE]") {
      yield null;
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw answered(chunk.error, requestId);
    yield chunk;
  }
}

/** Return the error that an event of a stream tells. */
function answered(error, requestId) {
  const made = new Error(error.message ?? "The answer failed");
  return Object.assign(made, { status: 0, code: error.code ?? error.type ?? "", requestId });
}

/** Return a response's footer: how long it took, which worker answered, and the request's id. */
export function facts(page, { requestId, worker, took }, ...more) {
  const parts = [...more, seconds(took), worker && `worker ${worker}`, requestId && requestLink(page, requestId)].filter(Boolean);
  return el("p.measures", {}, parts.flatMap((part, index) => (index ? [" · ", part] : [part])));
}

/**
 * Return a form that sends a request and shows its result: `{element, stop, form}`.
 *
 * @param {object} page
 * @param {object} options `controls`: what is in the form; `action`: the word on its button; `run(signal, show)` sends
 *     the request and returns what is shown, and `show(...nodes)` shows something before; `onclear` is called when an
 *     old result goes.
 */
export function requestForm(page, { controls, action, run, onclear = () => {} }) {
  const output = el("div.output");
  const announcer = el("p.hidden-label", { role: "status" });
  const button = el("button.primary", { type: "submit", title: "Ctrl+Enter" }, action);
  const halt = el("button", { type: "button", hidden: true, onclick: stop }, "Stop");
  const clock = el("span.quiet.clock", { "aria-hidden": "true" });
  let abort = null;

  async function submit(event) {
    event.preventDefault();
    if (abort !== null) return;
    const mine = (abort = new AbortController());
    page.signal.addEventListener("abort", stop, { once: true });
    const began = performance.now();
    const timer = setInterval(() => setText(clock, seconds((performance.now() - began) / 1000)), 100);
    button.disabled = true;
    halt.hidden = false;
    setText(announcer, "Sent");
    output.setAttribute("aria-busy", "true");
    onclear();
    fill(output);
    try {
      const shown = await run(mine.signal, (...nodes) => fill(output, ...nodes));
      fill(output, ...shown);
      setText(announcer, "The answer is complete");
    } catch (error) {
      const stopped = error.name === "AbortError";
      append(output, [stopped ? el("p.stopped-note", {}, "Stopped.") : failure(page, error)]);
      setText(announcer, stopped ? "Stopped" : `It failed: ${error.message}`);
    } finally {
      clearInterval(timer);
      page.signal.removeEventListener("abort", stop);
      abort = null;
      button.disabled = false;
      halt.hidden = true;
      setText(clock, "");
      output.removeAttribute("aria-busy");
    }
  }

  function stop() {
    abort?.abort();
  }

  const form = el(
    "form.card.request",
    {
      onsubmit: submit,
      onkeydown: (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
      },
    },
    controls,
    el("div.row", {}, button, halt, clock),
  );
  return { element: el("div.task", {}, form, output, announcer), stop, form };
}
