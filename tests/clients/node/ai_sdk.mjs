// The Vercel AI SDK, asked one question by each of its providers; it tells what became of them, as JSON.
//
// Arguments: the folder in which the packages are installed, the base URL of the server, and a model. The model is
// asked for a stream, as programs do it: `text` is what came, `reason` the finish reason, `errors` the error parts of
// the full stream, and `thrown` what awaiting the whole text threw. `plain` is what a program sees that reads nothing
// but the text of the stream: that text, what reading it threw, and what `onError` was told.

import { createRequire } from "node:module";

const [folder, baseURL, model, settings = "{}"] = process.argv.slice(2);
const require = createRequire(`${folder}/`);
const { streamText } = require("ai");
const { createOpenAI } = require("@ai-sdk/openai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");

globalThis.AI_SDK_LOG_WARNINGS = false;
const openai = createOpenAI({ baseURL, apiKey: "a-key" });
const compatible = createOpenAICompatible({ name: "cluster", baseURL, apiKey: "a-key" });
const ways = {
  "openai.chat": openai.chat(model),
  "openai.completion": openai.completion(model),
  "openai.responses": openai.responses(model),
  "compatible.chat": compatible.chatModel(model),
  "compatible.completion": compatible.completionModel(model),
};

// The body is changed as the server's models want to be told what to do.
function told(fetched) {
  return async (url, init) =>
    fetched(url, { ...init, body: JSON.stringify({ ...JSON.parse(init.body), ...JSON.parse(settings) }) });
}

globalThis.fetch = told(globalThis.fetch);

function described(error) {
  return { name: error?.name ?? typeof error, message: String(error?.message ?? JSON.stringify(error)) };
}

const outcomes = {};
for (const [way, languageModel] of Object.entries(ways)) {
  const outcome = { text: "", errors: [], reason: null, thrown: null };
  const result = streamText({ model: languageModel, prompt: "hi", maxRetries: 0, onError() {} });
  try {
    for await (const part of result.fullStream) {
      if (part.type === "text-delta") {
        outcome.text += part.text;
      } else if (part.type === "error") {
        outcome.errors.push(described(part.error));
      } else if (part.type === "finish") {
        outcome.reason = part.finishReason;
      }
    }
    await result.text;
  } catch (error) {
    outcome.thrown = described(error);
  }
  const plain = { text: "", thrown: null, told: [] };
  const told = (event) => plain.told.push(described(event.error));
  try {
    const asked = streamText({ model: languageModel, prompt: "hi", maxRetries: 0, onError: told });
    for await (const text of asked.textStream) {
      plain.text += text;
    }
  } catch (error) {
    plain.thrown = described(error);
  }
  outcomes[way] = { ...outcome, plain };
}
console.log(JSON.stringify(outcomes));
