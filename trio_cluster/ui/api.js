// Requests to the node. The key is kept here, in memory, and nowhere else: closing or loading the page forgets it.

/** An error that the node has answered, or that it could not be reached (status 0). */
export class ApiError extends Error {
  constructor(status, code, message, requestId = "") {
    super(message);
    this.status = status;
    this.code = code;
    this.requestId = requestId;
  }
}

// Where the node's API begins: the page is below it, also behind a proxy that serves the node below a path of its own.
const ROOT = new URL("../", document.baseURI);

// Clocks that differ by less than this, in seconds, are taken to be equal.
const LEAST_SKEW = 30;

export class Api {
  #key;
  /** Is called when the node no longer takes the key: when it refuses to show something. */
  onrefused = () => {};
  // Seconds that the node's clock is ahead of the browser's, as far as is known.
  #ahead = 0;

  constructor(key = "") {
    this.#key = key;
  }

  get hasKey() {
    return this.#key !== "";
  }

  /** The time by the node's clock, in milliseconds since the epoch: the browser's clock may be wrong. */
  get now() {
    return Date.now() + this.#ahead * 1000;
  }

  /** The address to give to clients, without a slash at its end. */
  get base() {
    return ROOT.href.replace(/\/$/, "");
  }

  /**
   * Send a request, and return its response once it has begun.
   *
   * @param {string} path below the node's address, such as "v1/models".
   * @param {object} options `method`; `body`: an object is sent as JSON, a FormData as it is; `headers`; `signal`.
   * @throws {ApiError} the node answered with an error, or cannot be reached.
   * @throws {DOMException} AbortError: `signal` was aborted.
   */
  async send(path, { method, body, headers = {}, signal } = {}) {
    const sent = { ...headers };
    if (this.#key) {
      // Headers cannot have such characters: fetch would fail as if there were no node.
      if (!/^[\x20-\x7e\xa0-\xff]+$/.test(this.#key)) throw new ApiError(401, "invalid_api_key", "This key is not valid");
      sent.authorization = `Bearer ${this.#key}`;
    }
    if (body !== undefined && !(body instanceof FormData)) {
      sent["content-type"] = "application/json";
      body = JSON.stringify(body);
    }
    let response;
    try {
      response = await fetch(new URL(path, ROOT), {
        method: method ?? (body === undefined ? "GET" : "POST"), body, headers: sent, signal,
        credentials: "omit", cache: "no-store", redirect: "error",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "unreachable", "The node cannot be reached");
    }
    this.#readClock(response);
    if (!response.ok) {
      const error = await readError(response);
      // What is sent to a model may be refused by the server behind it; and a conversation stays where it is.
      if (error.status === 401 && body === undefined && method === undefined) this.onrefused();
      throw error;
    }
    return response;
  }

  #readClock(response) {
    const ahead = (Date.parse(response.headers.get("date")) - Date.now()) / 1000;
    // The header has whole seconds, and took some time to arrive: less than this says nothing.
    if (Number.isFinite(ahead)) this.#ahead = Math.abs(ahead) > LEAST_SKEW ? ahead : 0;
  }

  /** Send a request, and return the JSON of its answer. See {@link Api#send}. */
  async json(path, options) {
    return (await this.send(path, options)).json();
  }

  /**
   * Yield the events of a stream as `{event, data}`; `data` is text. The stream is closed when the loop is left.
   * See {@link Api#send}.
   */
  async *events(path, options) {
    const response = await this.send(path, options);
    yield* readEvents(response);
  }
}

/** Yield the server-sent events of a response. See {@link Api#events}. */
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  // What has come of a line that is not over. A line may have millions of characters, in many pieces.
  let rest = [];
  let event = "message";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = value.split("\n");
      const last = lines.pop();
      if (lines.length > 0) {
        lines[0] = rest.join("") + lines[0];
        rest = [];
      }
      rest.push(last);
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line === "") {
          if (data.length) yield { event, data: data.join("\n") };
          event = "message";
          data = [];
        } else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line.startsWith("event:")) event = line.slice(6).trim();
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "connection_lost", "The connection was lost");
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function readError(response) {
  const requestId = response.headers.get("x-request-id") ?? "";
  try {
    const { error } = await response.json();
    return new ApiError(response.status, error.code ?? error.type, error.message, requestId);
  } catch {
    return new ApiError(response.status, "unknown", `The node answered with status ${response.status}`, requestId);
  }
}
