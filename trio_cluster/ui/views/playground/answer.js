// One answer of a chat model: its request, and how it is shown while it comes and when it is over.

import { copyButton, el, fill, icon, setText } from "../../dom.js";
import { plural, seconds } from "../../format.js";
import { failure, field, readChunks, requestLink, send } from "./parts.js";
import { Prose } from "./prose.js";


const BADGES = { failed: ["bad", "Failed"], stopped: ["warn", "Stopped"], length: ["warn", "Cut off: its longest length is reached"] };

/**
 * Attributes: `element`; `text`, `reasoning`; `calls`: `[{id, name, arguments, result}]`; `state`: "running", "done",
 * "stopped" or "failed". An answer that failed or was stopped is marked as such, whatever had come of it.
 */
export class Answer {
  #page;
  #model;
  #abort = new AbortController();
  #prose = new Prose();
  #thoughts = null;
  #requestId = "";
  #worker = "";
  #usage = null;
  #reason = "";
  #began = performance.now();
  #first = null;
  #ended = null;

  /** `actions`: `retry(answer)`, `results(answer)`: the calls have results. */
  constructor(page, model, actions) {
    this.#page = page;
    this.#model = model;
    this.actions = actions;
    this.calls = [];
    this.state = "running";
    this.badge = el("span.badge", { hidden: true });
    this.waiting = el("p.waiting", {}, "Waiting for the first token");
    this.thinking = el("div.thinking");
    this.called = el("div.calls");
    this.ending = el("div");
    this.foot = el("div.answer-foot");
    this.element = el(
      "article.turn.answer",
      { "aria-label": `Answer of ${model}`, "aria-busy": true },
      el("header", {}, el("strong", {}, model), this.badge),
      this.thinking,
      this.#prose.element,
      this.waiting,
      this.called,
      this.ending,
      this.foot,
    );
  }

  get text() {
    return this.#prose.text;
  }

  get reasoning() {
    return this.#thoughts?.prose.text ?? "";
  }

  stop() {
    this.#abort.abort();
  }

  /**
   * Send the request, and show the answer. It ends in one of the states; nothing is thrown.
   *
   * @param {object} body of the request.
   * @param {Function} grown is called when there is more to see.
   */
  async run(body, grown) {
    const signal = AbortSignal.any([this.#abort.signal, this.#page.signal]);
    try {
      const sent = await send(this.#page, "v1/chat/completions", { body, signal });
      this.#requestId = sent.requestId;
      this.#worker = sent.worker;
      if (sent.response.headers.get("content-type")?.startsWith("text/event-stream")) {
        await this.#readStream(sent.response, grown);
      } else this.#takeWhole(await sent.response.json());
      this.#end("done");
    } catch (error) {
      this.#requestId ||= error.requestId ?? "";
      if (error.name === "AbortError") this.#end("stopped");
      else this.#end("failed", error);
    }
    grown();
  }

  async #readStream(response, grown) {
    let finished = false;
    for await (const chunk of readChunks(response, this.#requestId)) {
      if (chunk === null) finished = true;
      else this.#take(chunk);
      grown();
    }
    if (!finished) {
      throw Object.assign(new Error("The stream ended before the answer was complete"), {
        code: "cut", requestId: this.#requestId,
      });
    }
  }

  #take(chunk) {
    if (chunk.usage) this.#usage = chunk.usage;
    // Of several answers (`n`), the first is shown.
    const choice = chunk.choices?.find((each) => (each.index ?? 0) === 0);
    if (choice === undefined) return;
    if (choice.finish_reason) this.#reason = choice.finish_reason;
    if (choice.delta) this.#show(choice.delta);
  }

  #takeWhole(answer) {
    this.#usage = answer.usage;
    const choice = answer.choices[0];
    this.#reason = choice.finish_reason;
    this.#show(choice.message);
    this.#first = null;
  }

  #show(delta) {
    const thought = delta.reasoning_content ?? delta.reasoning;
    const text = (delta.content ?? "") + (delta.refusal ?? "");
    if (!thought && !text && !delta.tool_calls?.length) return;
    this.#first ??= performance.now();
    this.waiting.remove();
    if (thought) this.#think(thought);
    if (text) {
      if (this.#thoughts?.end === null) this.#endThoughts();
      this.#prose.append(text);
    }
    for (const [position, call] of (delta.tool_calls ?? []).entries()) this.#addCall(call.index ?? position, call);
  }

  #think(text) {
    if (this.#thoughts === null) {
      const prose = new Prose();
      const summary = el("summary", {}, "Reasoning");
      fill(this.thinking, el("details", { open: true }, summary, prose.element));
      this.#thoughts = { prose, summary, began: performance.now(), end: null };
    }
    this.#thoughts.prose.append(text);
  }

  #endThoughts() {
    const thoughts = this.#thoughts;
    thoughts.prose.end();
    thoughts.end = performance.now();
    const took = (thoughts.end - thoughts.began) / 1000;
    setText(thoughts.summary, took < 0.1 ? "Reasoning" : `Reasoning, ${seconds(took)}`);
    if (this.state === "running") this.thinking.firstChild.open = false;
  }

  #addCall(index, piece) {
    let call = this.calls[index];
    if (call === undefined) {
      const code = el("code");
      call = this.calls[index] = { id: "", name: "", arguments: "", result: null, code };
      call.element = el("div.call", {}, el("h2"), el("pre.block", { tabIndex: 0 }, code));
      this.called.append(call.element);
    }
    call.id ||= piece.id ?? "";
    call.name ||= piece.function?.name ?? "";
    call.arguments += piece.function?.arguments ?? "";
    setText(call.element.firstChild, `Calls ${call.name}`);
    setText(call.code, call.arguments);
  }

  #end(state, error = null) {
    this.state = state;
    this.#ended = performance.now();
    this.#prose.end();
    if (this.#thoughts?.end === null) this.#endThoughts();
    this.waiting.remove();
    this.element.setAttribute("aria-busy", "false");
    this.element.classList.add(state);
    const badge = BADGES[state === "done" ? this.#reason : state];
    if (badge) {
      this.badge.hidden = false;
      this.badge.classList.add(badge[0]);
      setText(this.badge, badge[1]);
    }
    if (state === "failed") {
      const what = this.text || this.calls.length ? "The answer failed in the middle" : "The request failed";
      fill(this.ending, failure(this.#page, error, what));
    } else if (state === "stopped") {
      fill(this.ending, el("p.stopped-note", {}, this.text ? "Stopped here: the answer is not complete." : "Stopped before anything came."));
    } else if (!this.text && !this.calls.length) {
      fill(this.ending, el("p.quiet", {}, "The answer is empty."));
    }
    this.calls = this.calls.filter(Boolean);
    if (state === "done" && this.calls.length) this.#askForResults();
    for (const call of this.calls) setText(call.code, pretty(call.arguments));
    this.#showFoot();
  }

  /** The outcome in one sentence, for screen readers. */
  get announcement() {
    if (this.state === "failed") return "The answer failed";
    if (this.state === "stopped") return "The answer was stopped";
    if (this.calls.length) return `The model calls ${plural(this.calls.length, "tool")}`;
    return "The answer is complete";
  }

  #showFoot() {
    const total = (this.#ended - this.#began) / 1000;
    const parts = [];
    if (this.#first !== null) parts.push(`first token after ${seconds((this.#first - this.#began) / 1000)}`);
    parts.push(`${seconds(total)} in all`);
    const { prompt_tokens: read, completion_tokens: written, prompt_tokens_details: details } = this.#usage ?? {};
    if (read || written) {
      const cached = details?.cached_tokens ? `, ${details.cached_tokens} from the cache` : "";
      parts.push(`${written} tokens, prompt ${read}${cached}`);
      const time = this.#first === null ? 0 : (this.#ended - this.#first) / 1000;
      if (written > 1 && time > 0.05) parts.push(`${((written - 1) / time).toFixed(1)} tokens/s`);
    } else if (this.state === "done") parts.push("tokens not reported");
    if (this.#worker) parts.push(`worker ${this.#worker}`);
    const facts = parts.flatMap((part, index) => (index ? [" · ", part] : [part]));
    // An error shows it already.
    if (this.#requestId && this.state !== "failed") facts.push(" · ", requestLink(this.#page, this.#requestId));
    fill(
      this.foot,
      el("p.measures", {}, facts),
      el(
        "div.tools",
        {},
        this.text && copyButton(() => this.text, "Copy the answer"),
        el(
          "button.icon-button",
          { type: "button", "aria-label": "Try again", title: "Try again", onclick: () => this.actions.retry(this) },
          icon("retry"),
        ),
      ),
    );
  }

  #askForResults() {
    for (const call of this.calls) {
      call.field = el("textarea.mono", { rows: 2, spellcheck: false });
      call.element.append(field(`Result of ${call.name}`, call.field));
    }
    this.sendResults = el(
      "button.small.primary",
      { type: "button", onclick: () => this.actions.results(this) },
      this.calls.length > 1 ? "Send the results" : "Send the result",
    );
    this.called.append(this.sendResults);
  }

  /** Whether the model waits for results of its calls. */
  get waitsForResults() {
    return this.state === "done" && this.calls.some((call) => call.result === null);
  }

  /** Take the results as they are in their fields. */
  takeResults() {
    for (const call of this.calls) {
      call.result = call.field.value;
      call.field.readOnly = true;
    }
    this.sendResults.remove();
  }

  /** The messages that this answer is in the requests that follow. */
  messages() {
    const calls = this.state === "done" ? this.calls : [];
    if (this.state === "failed" || (!this.text && !calls.length)) return [];
    const message = { role: "assistant", content: this.text || null };
    if (calls.length) {
      message.tool_calls = calls.map((call) => ({
        id: call.id, type: "function", function: { name: call.name, arguments: call.arguments },
      }));
    }
    return [message, ...calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: call.result ?? "" }))];
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
