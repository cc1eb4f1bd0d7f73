// The story of one request: what happened when, and why. It grows while the request runs.

import { el, empty, factList, fill, setText, toast } from "../dom.js";
import { bytes, placeOf, seconds } from "../format.js";

// Milliseconds between two looks at a request that runs.
const INTERVAL = 1000;

const TONES = { running: "accent", completed: "good", cancelled: "warn", timed_out: "bad", worker_lost: "bad", failed: "bad", refused: "bad" };
const OUTCOMES = {
  running: "running", completed: "completed", cancelled: "cancelled", timed_out: "timed out", worker_lost: "worker lost", failed: "failed",
  refused: "refused",
};
const KINDS = { first: "First attempt", retry: "Retry", hedge: "Second attempt beside it", next_name: "Next name" };
// The parts of an attempt, in their order.
const PARTS = [
  { id: "queued", title: "in the queue" },
  { id: "cold", title: "for the model to start" },
  { id: "first", title: "for the first output" },
  { id: "rest", title: "for the rest of the output" },
  { id: "held", title: "held back, since the client was slow to read" },
];

/** Show the story of a request, like a view; see app.js. */
export function mountStory(root, page, id) {
  const gone = new AbortController();
  let timer = 0;
  let body = null;

  const back = el("button.small", { type: "button", onclick: () => page.go("requests") }, "All requests");
  const outcome = el("span.badge", { role: "status" });
  const cancel = el("button.small", { type: "button", onclick: stop, hidden: true }, "Cancel");
  const problem = el("p.error", { role: "alert" });
  const content = el("div");
  const heading = el("h2.mono.story-id", { tabIndex: -1 }, id);
  root.append(el("div.story-head", {}, back, heading, outcome, cancel), problem, content);
  heading.focus({ preventScroll: true });

  async function stop() {
    cancel.disabled = true;
    try {
      await page.api.send(`cluster/calls/${encodeURIComponent(id)}/cancel`, { body: {} });
      toast(`${id} was cancelled`);
    } catch (error) {
      toast(error.message, "error");
    }
    cancel.disabled = false;
    look();
  }

  async function look() {
    clearTimeout(timer);
    let running = true;
    try {
      const story = await page.api.json(`cluster/requests/${encodeURIComponent(id)}`, { signal: gone.signal });
      setText(problem, "");
      body ??= makeBody(content);
      body(story);
      running = story.outcome === "running";
      setText(outcome, OUTCOMES[story.outcome] ?? story.outcome);
      outcome.className = `badge ${TONES[story.outcome] ?? ""}`;
      cancel.hidden = !running;
    } catch (error) {
      if (error.name === "AbortError") return;
      cancel.hidden = true;
      if (error.status === 404) {
        running = false;
        if (body === null) fill(content, unknown(id));
        else setText(problem, "The node does not know this request any more. This is what it was when it did.");
      } else setText(problem, `${error.message}. This is what was known before.`);
    }
    if (running && !gone.signal.aborted) timer = setTimeout(look, INTERVAL);
  }

  function escape(event) {
    if (event.key === "Escape" && document.querySelector("dialog[open]") === null) page.go("requests");
  }

  document.addEventListener("keydown", escape);
  look();
  return () => {
    document.removeEventListener("keydown", escape);
    clearTimeout(timer);
    gone.abort();
  };
}

function unknown(id) {
  return empty(
    "No request of this id is known",
    el("p", {}, "The node remembers the requests that run and the last 10 000 that are over, since it was started. The id is in the header x-request-id of each response, and in the node's log: ", el("code", {}, id)),
  );
}

/** Make what shows a story in an element; return what brings it up to date. What has not changed stays as it is. */
function makeBody(content) {
  const why = el("p.story-why");
  const facts = factList();
  const attempts = el("div.attempts");
  const steps = el("ol.steps");
  const made = [];
  fill(content, el("div.card", {}, why, facts.element), el("h2", {}, "Attempts"), attempts, el("h2", {}, "What happened"), el("div.card", {}, steps));

  return (story) => {
    const running = story.outcome === "running";
    setText(why, sentence(running ? story.steps.at(-1).text : story.why));
    facts.set("Longest", story.slowest);
    facts.set("Runs for", running ? seconds(story.seconds) : "");
    facts.set("Took", running ? "" : seconds(story.seconds));
    facts.set("Arrived", new Date(story.began).toLocaleString([], { dateStyle: "medium", timeStyle: "medium" }));
    facts.set("Model", story.model);
    facts.set("Key", story.key);
    facts.set("Client", story.client);
    facts.set("Path", story.path);
    facts.set("Status", story.status ? String(story.status) : "");
    facts.set("Ended by", running ? "" : story.by);
    facts.set("Earlier", story.earlier ? `${story.earlier} with the same id` : "");

    if (story.attempts.length === 0 && made.length === 0) fill(attempts, el("p.quiet", {}, "There was none: it was not sent to a model."));
    else if (made.length === 0) fill(attempts);
    story.attempts.forEach((attempt, index) => {
      if (made[index] === undefined) {
        made[index] = makeAttempt();
        attempts.append(made[index].element);
      }
      made[index].update(attempt, index, story);
    });

    const scale = Math.max(story.seconds, 1e-6);
    story.steps.forEach((step, index) => {
      const item = steps.children[index] ?? steps.appendChild(makeStep());
      const before = index > 0 ? story.steps[index - 1].at : 0;
      const [at, after, text] = item.children;
      setText(at, offset(step.at));
      setText(after, step.at - before < 0.0005 ? "" : `+${seconds(step.at - before)}`);
      after.classList.toggle("long", step.at - before >= 0.25 * scale && step.at - before > 0.05);
      setText(text.firstChild, sentence(step.text));
      setText(text.lastChild, step.node ? `by the clock of ${step.node}` : "");
    });
    while (steps.children.length > story.steps.length) steps.lastChild.remove();
  };
}

function makeStep() {
  return el("li", {}, el("span.at.number"), el("span.after.number"), el("span.what", {}, el("span"), el("span.quiet.by")));
}

function makeAttempt() {
  const title = el("h3");
  const why = el("p");
  const bar = el("div.bar", { "aria-hidden": "true" });
  const parts = Object.fromEntries(PARTS.map((part) => [part.id, el(`span.part.${part.id}`)]));
  bar.append(...Object.values(parts));
  const legend = el("ul.legend");
  const lines = Object.fromEntries(PARTS.map((part) => [part.id, el("li")]));
  legend.append(...Object.values(lines));
  const facts = el("p.quiet.attempt-facts");
  const error = el("p.error");
  const body = el("tbody");
  const table = el(
    "div.table",
    // On narrow screens it is scrolled, also by keyboard.
    { hidden: true, role: "region", "aria-label": "Replicas among which was chosen", tabIndex: 0 },
    el("table", {}, el("caption", {}, "Replicas among which was chosen"),
      el("thead", {}, el("tr", {}, el("th", {}, "Worker"), el("th.number", {}, "Expected to have answered in"), el("th.number", {}, "Of the prompt in its cache"), el("th", {}, "Chosen"))),
      body),
  );
  const element = el("div.card", {}, title, why, bar, legend, facts, error, table);
  return {
    element,
    update(attempt, index, story) {
      setText(title, `${KINDS[attempt.kind] ?? attempt.kind}: ${placeOf(attempt.node)}, ${attempt.model}`);
      setText(why, attempt.candidates.length ? "" : sentence(attempt.why));
      const times = partsOf(attempt, story);
      const total = Math.max(1e-9, Object.values(times).reduce((sum, each) => sum + each, 0));
      for (const { id, title: name } of PARTS) {
        const share = (100 * times[id]) / total;
        parts[id].style.width = `${share}%`;
        lines[id].className = id;
        lines[id].hidden = times[id] < 0.001;
        setText(lines[id], `${seconds(times[id])} ${name}`);
      }
      setText(facts, factsOf(attempt));
      setText(error, attempt.error ? `It failed: ${attempt.error}` : "");
      if (attempt.candidates.length && body.children.length === 0) {
        table.hidden = false;
        for (const each of attempt.candidates) {
          const cached = attempt.prompt_bytes ? `${bytes(each.cached_bytes)} of ${bytes(attempt.prompt_bytes)}` : "–";
          body.append(
            el("tr", {}, el("td", {}, placeOf(each.node)), el("td.number", {}, seconds(each.cost)), el("td.number", {}, cached), el("td", {}, each.chosen ? "yes" : "")),
          );
        }
      }
    },
  };
}

/** Return the seconds of the parts of an attempt, up to now if it runs. */
function partsOf(attempt, story) {
  const end = attempt.ended ?? story.seconds;
  const first = attempt.first_output ?? end;
  const queued = attempt.queued_for;
  const cold = attempt.cold_for;
  return {
    queued,
    cold,
    first: Math.max(0, first - attempt.opened - queued - cold),
    rest: Math.max(0, end - first - attempt.held_back),
    held: attempt.held_back,
  };
}

function factsOf(attempt) {
  const parts = [];
  if (attempt.prompt_tokens !== undefined) {
    const cached = attempt.cached_tokens ? ` (${attempt.cached_tokens} from the cache)` : "";
    parts.push(`${attempt.prompt_tokens} tokens read${cached}, ${attempt.completion_tokens} written`);
    const took = (attempt.ended ?? 0) - (attempt.first_output ?? 0);
    if (attempt.completion_tokens > 1 && took > 0.01) parts.push(`${((attempt.completion_tokens - 1) / took).toPrecision(3)} tokens per second`);
  }
  parts.push(`${bytes(attempt.delivered_bytes)} delivered`);
  return parts.join(" · ");
}

/** Seconds since the request arrived, all with the same number of digits. */
function offset(at) {
  return at < 100 ? `${at.toFixed(3)} s` : seconds(at);
}

function sentence(text) {
  return text ? text[0].toUpperCase() + text.slice(1) : "";
}
