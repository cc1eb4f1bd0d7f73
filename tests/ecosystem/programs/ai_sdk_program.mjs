// The AI SDK: node ai_sdk_program.mjs URL FEATURE. ECOSYSTEM_FOLDER names the folder in which it is installed.

import { createRequire } from "node:module";

const [baseURL, feature] = process.argv.slice(2);
const require = createRequire(`${process.env.ECOSYSTEM_FOLDER}/`);
const { embedMany, generateObject, generateText, stepCountIs, streamText, tool } = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { z } = require("zod");

globalThis.AI_SDK_LOG_WARNINGS = false;
const provider = createOpenAICompatible({ name: "cluster", baseURL, apiKey: "a-key", supportsStructuredOutputs: true });
const settings = { model: provider("concierge"), maxRetries: 0 };
const temperature = tool({
  description: "Return the temperature in a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `21 degrees in ${city}`,
});
const features = {
  async chat() {
    return (await generateText({ ...settings, prompt: "Hello?" })).text;
  },
  async stream() {
    const pieces = [];
    for await (const piece of streamText({ ...settings, prompt: "Hello?" }).textStream) pieces.push(piece);
    return pieces;
  },
  async tools() {
    const prompt = "What is it like in Kyoto?";
    return (await generateText({ ...settings, prompt, tools: { temperature }, stopWhen: stepCountIs(3) })).text;
  },
  async structured() {
    const schema = z.object({ city: z.string(), degrees: z.number() });
    return (await generateObject({ ...settings, schema, prompt: "What is it like in Kyoto?" })).object;
  },
  async embeddings() {
    return (await embedMany({ model: provider.embeddingModel("vectors"), values: ["a", "bcd"] })).embeddings;
  },
};
console.log(JSON.stringify(await features[feature]()));
