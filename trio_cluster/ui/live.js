// The state of the cluster, as /cluster/events tells it: the requests that run, the workers and the models.

import { readEvents } from "./api.js";

const KINDS = ["requests", "workers", "models"];
const FIRST_WAIT = 0.5;
const LONGEST_WAIT = 10;
// The node sends something every ten seconds at least. After twice that, and some time for the way, it is gone.
const SILENCE = 25;

/**
 * Follows the events. Dispatches `change` after each update (the node sends at most four in a second), and `state`
 * when the connection is there, lost, or about to be tried again.
 *
 * Attributes: `requests`, `workers`, `models`: maps from ids to items; `state`: "connecting", "live" or "lost";
 * `retryAt`: when it is tried again, as `Date.now()` counts; `error`: why it was lost; `updatedAt`; `now`: the time by
 * the node's clock, in seconds since the epoch, to compare the times of items with.
 */
export class Live extends EventTarget {
  #api;
  #abort = null;
  #skew = 0;

  constructor(api) {
    super();
    this.#api = api;
    for (const kind of KINDS) this[kind] = new Map();
    this.state = "connecting";
    this.retryAt = 0;
    this.error = null;
    this.updatedAt = 0;
  }

  get now() {
    return Date.now() / 1000 + this.#skew;
  }

  start() {
    this.#abort = new AbortController();
    this.#run(this.#abort.signal);
  }

  stop() {
    this.#abort?.abort();
  }

  async #run(signal) {
    let wait = FIRST_WAIT;
    while (!signal.aborted) {
      try {
        await this.#follow(signal, () => (wait = FIRST_WAIT));
        this.error = null;
      } catch (error) {
        this.error = error;
      }
      if (signal.aborted) return;
      this.retryAt = Date.now() + wait * 1000;
      this.#become("lost");
      await pause(wait, signal);
      wait = Math.min(LONGEST_WAIT, wait * 2);
    }
  }

  async #follow(signal, connected) {
    const silence = new AbortController();
    const abort = () => silence.abort();
    signal.addEventListener("abort", abort);
    let timer = setTimeout(abort, SILENCE * 1000);
    try {
      const response = await this.#api.send("cluster/events", { signal: silence.signal });
      // A proxy may take unknown headers out; the other one has whole seconds only.
      const time = response.headers.get("x-trio-cluster-time") ?? this.#api.now / 1000;
      this.#skew = Number(time) - Date.now() / 1000;
      for await (const part of parts(response, () => {
        clearTimeout(timer);
        timer = setTimeout(abort, SILENCE * 1000);
      })) {
        this.#apply(part.event, JSON.parse(part.data));
        if (part.event === "snapshot") {
          connected();
          this.#become("live");
        }
        this.updatedAt = Date.now();
        this.dispatchEvent(new Event("change"));
      }
    } finally {
      clearTimeout(timer);
      signal.removeEventListener("abort", abort);
      silence.abort();
    }
  }

  #apply(event, data) {
    for (const kind of KINDS) {
      if (event === "snapshot") this[kind] = new Map((data[kind] ?? []).map((item) => [String(item.id), item]));
      else if (event === "upsert") for (const item of data[kind] ?? []) this[kind].set(String(item.id), item);
      else if (event === "remove") for (const id of data[kind] ?? []) this[kind].delete(String(id));
    }
  }

  #become(state) {
    this.state = state;
    this.dispatchEvent(new Event("state"));
  }
}

/** Wait for some seconds; for less if `signal` is aborted, or the browser is online again. */
async function pause(wait, signal) {
  const over = new AbortController();
  let timer;
  await new Promise((resolve) => {
    timer = setTimeout(resolve, wait * 1000);
    signal.addEventListener("abort", resolve, { signal: over.signal });
    window.addEventListener("online", resolve, { signal: over.signal });
  });
  clearTimeout(timer);
  // Takes both listeners away: a node may be away for days.
  over.abort();
}

// Comments count as signs of life, so the bytes are watched, and not only the events.
async function* parts(response, alive) {
  const watched = response.body.pipeThrough(
    new TransformStream({
      transform(chunk, controller) {
        alive();
        controller.enqueue(chunk);
      },
    }),
  );
  yield* readEvents({ body: watched });
}
