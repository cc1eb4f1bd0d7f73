// The official Node client of the Messages API, asked one thing after the other; it tells what became of each, as JSON.
//
// Arguments: the folder in which the package is installed, the base URL of the server, and the orders, a JSON list.
// An order has the method (`create`, `stream`, `count_tokens`), the body, and settings of the client.

import { createRequire } from "node:module";

const [folder, baseURL, orders] = process.argv.slice(2);
const require = createRequire(`${folder}/`);
const { Anthropic } = require("@anthropic-ai/sdk");

function described(error) {
  return {
    name: error.constructor.name,
    status: error.status ?? null,
    type: error.error?.error?.type ?? null,
    message: String(error.message),
    has_request_id: Boolean(error.requestID ?? error.error?.request_id),
  };
}

async function ask({ method, body, client: settings }) {
  const { messages } = new Anthropic({ baseURL, maxRetries: 0, apiKey: "a-key", ...settings });
  const texts = [];
  try {
    if (method === "stream") {
      const stream = messages.stream(body);
      stream.on("text", (text) => texts.push(text));
      return { value: await stream.finalMessage(), texts };
    }
    const value = await (method === "create" ? messages.create(body) : messages.countTokens(body));
    return { value, has_request_id: Boolean(value._request_id) };
  } catch (error) {
    return { error: described(error), texts };
  }
}

const outcomes = [];
for (const order of JSON.parse(orders)) {
  outcomes.push(await ask(order));
}
console.log(JSON.stringify(outcomes));
