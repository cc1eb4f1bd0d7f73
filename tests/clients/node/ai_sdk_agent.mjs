// An agent of the Vercel AI SDK: a model, a tool and a second turn, by each of its providers; it tells what became of
// that, as JSON.
//
// Arguments: the folder in which the packages are installed, the base URL of the server, a model, and a question.
// `steps` are the texts of the first turn, `second` that of the turn that follows it, `thrown` is what was thrown.

import { createRequire } from "node:module";

const [folder, baseURL, model, question] = process.argv.slice(2);
const require = createRequire(`${folder}/`);
const { generateText, stepCountIs, tool } = require("ai");
const { createOpenAI } = require("@ai-sdk/openai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { z } = require("zod");

globalThis.AI_SDK_LOG_WARNINGS = false;
const openai = createOpenAI({ baseURL, apiKey: "a-key" });
const compatible = createOpenAICompatible({ name: "cluster", baseURL, apiKey: "a-key" });
const inputSchema = z.object({ city: z.string() });
const tools = {
  temperature: tool({ inputSchema, execute: async ({ city }) => `21 degrees in ${city}` }),
  time: tool({ inputSchema, execute: async ({ city }) => `9 o'clock in ${city}` }),
};
const ways = {
  "openai default": [openai(model), {}],
  "openai previousResponseId": [openai(model), {}],
  "openai store=false": [openai(model), { openai: { store: false } }],
  "openai.chat": [openai.chat(model), {}],
  "compatible": [compatible(model), {}],
};

const outcomes = {};
for (const [way, [languageModel, providerOptions]] of Object.entries(ways)) {
  const outcome = { text: null, steps: 0, second: null, thrown: null };
  const settings = {
    model: languageModel,
    tools,
    providerOptions,
    maxRetries: 0,
    stopWhen: stepCountIs(5),
  };
  try {
    const messages = [{ role: "user", content: question }];
    const first = await generateText({ ...settings, messages });
    outcome.text = first.text;
    outcome.steps = first.steps.length;
    const thanks = { role: "user", content: "Thanks." };
    if (way === "openai previousResponseId") {
      const previousResponseId = first.providerMetadata.openai.responseId;
      settings.providerOptions = { openai: { previousResponseId } };
      outcome.second = (await generateText({ ...settings, messages: [thanks] })).text;
    } else {
      messages.push(...first.response.messages, thanks);
      outcome.second = (await generateText({ ...settings, messages })).text;
    }
  } catch (error) {
    outcome.thrown = { name: error.name, message: error.message };
  }
  outcomes[way] = outcome;
}
console.log(JSON.stringify(outcomes));
