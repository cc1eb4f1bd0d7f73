// The official Node client as a process that is told what to ask, one JSON object a line.
//
// What it is told and what it tells is described in client_drivers.py; driver.py is the same for Python. The
// client is looked for in the folder that is the only argument.

import { AsyncLocalStorage } from "node:async_hooks";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const require = createRequire(`${process.argv[2]}/`);
const { OpenAI, toFile } = require("openai");
const { VERSION } = require("openai/version");

const attempts = new AsyncLocalStorage();
const clients = new Map();
const calls = new Map();

function tell(id, members) {
  process.stdout.write(JSON.stringify({ id, ...members }) + "\n");
}

function notedFetch(url, init) {
  // Before its first form, the client tries out what fetch makes of a data URL.
  if (!String(url).startsWith("data:")) {
    attempts.getStore().push(performance.now() / 1000);
  }
  return fetch(url, init);
}

function clientFor({ base_url, api_key, max_retries, timeout }) {
  const key = JSON.stringify([base_url, api_key, max_retries, timeout]);
  if (!clients.has(key)) {
    clients.set(
      key,
      new OpenAI({
        baseURL: base_url,
        apiKey: api_key,
        maxRetries: max_retries,
        timeout: timeout * 1000,
        fetch: notedFetch,
        logLevel: "off",
      }),
    );
  }
  return clients.get(key);
}

// Make a file of what stands for one.
async function readValue(value) {
  if (Array.isArray(value)) {
    return Promise.all(value.map(readValue));
  }
  if (value !== null && typeof value === "object" && "$file" in value) {
    return toFile(Buffer.from(value.base64, "base64"), value.$file, { type: value.type });
  }
  return value;
}

async function readBody(body) {
  const pairs = Object.entries(body).map(async ([name, value]) => [name, await readValue(value)]);
  return Object.fromEntries(await Promise.all(pairs));
}

async function ask(id, order, signal) {
  const client = clientFor(order.client);
  const names = order.method.split(".");
  const last = names.pop();
  const owner = names.reduce((found, name) => found[name], client);
  const body = await readBody(order.body);
  const options = { headers: order.headers, signal };
  let left = order.take;

  // Tell one event, and return whether that was the last that is wanted.
  function event(value) {
    tell(id, { event: value, complaints: [] });
    return left !== null && --left === 0;
  }

  if (last === "get" || last === "post") {
    const given = last === "post" ? { body, ...options } : options;
    return { value: await owner[last](...order.positional, given) };
  }

  const given = Object.keys(body).length > 0 || order.positional.length === 0 ? [body] : [];
  if (order.as_pieces) {
    const response = await owner[last](...order.positional, ...given, options);
    const pieces = [];
    for await (const piece of response.body) {
      pieces.push(piece);
      if (event(piece.length)) {
        break;
      }
    }
    return {
      value: Buffer.concat(pieces).toString("base64"),
      type: response.headers.get("content-type"),
    };
  }

  if (last === "stream") {
    const stream = owner.stream(...order.positional, body, options);
    const final = order.method.startsWith("responses") ? "finalResponse" : "finalChatCompletion";
    return { value: await stream[final]() };
  }

  if (last === "list") {
    const found = [];
    for await (const each of owner.list(...order.positional, body, options)) {
      found.push(each);
    }
    return { value: found };
  }

  const promise = owner[last](...order.positional, ...given, options);
  const { data: value, request_id } = await promise.withResponse();
  if (value instanceof Response) {
    return {
      value: Buffer.from(await value.arrayBuffer()).toString("base64"),
      type: value.headers.get("content-type"),
    };
  }
  if (body.stream) {
    for await (const each of value) {
      if (event(each)) {
        break;
      }
    }
    return { value: null, request_id };
  }
  return { value, request_id };
}

function described(error) {
  return {
    class: error.constructor.name,
    is_api_error: error instanceof OpenAI.APIError,
    message: `${error.message}${error.cause ? `: ${error.cause.message ?? error.cause}` : ""}`,
    status: error.status ?? null,
    code: error.code ?? null,
    type: error.type ?? null,
    param: error.param ?? null,
    request_id: error.requestID ?? null,
  };
}

async function answer(id, order) {
  const controller = new AbortController();
  calls.set(id, controller);
  const began = [];
  const outcome = await attempts.run(began, async () => {
    try {
      return await ask(id, order, controller.signal);
    } catch (error) {
      return { error: described(error) };
    }
  });
  calls.delete(id);
  if (controller.signal.aborted) {
    // A stream that is aborted just ends; who has aborted it knows.
    outcome.error = { class: "aborted", is_api_error: false, message: "" };
  }
  tell(id, { end: true, attempts: began.map((at) => at - began[0]), ...outcome });
}

for await (const line of createInterface({ input: process.stdin })) {
  const order = JSON.parse(line);
  if (order.do === "ask") {
    answer(order.id, order);
  } else if (order.do === "abort") {
    calls.get(order.id)?.abort();
  } else {
    clients.clear();
    tell(order.id, { end: true, value: VERSION, attempts: [] });
  }
}
