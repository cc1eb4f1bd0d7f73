// What to paste for each client. The configurations are those of docs/clients.md, which is run against this server.

const KEY = "YOUR_KEY";
const CHAT = ["chat", "any"];

/** Return a word for a POSIX shell. */
export function shell(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

// JSON's strings are strings of Python, JavaScript, TOML and YAML, too.
const quote = JSON.stringify;

const exports = (pairs) => pairs.map(([name, value]) => `export ${name}=${shell(value)}`).join("\n");

function curl({ base, needsKey }, path, body) {
  return [
    `curl ${shell(`${base}/v1/${path}`)}`,
    needsKey && '  -H "Authorization: Bearer $OPENAI_API_KEY"',
    ...body,
  ].filter(Boolean).join(" \\\n");
}

const asJson = (value) => ['  -H "Content-Type: application/json"', `  -d ${shell(JSON.stringify(value))}`];
const form = (pairs) => pairs.map(([name, value]) => `  -F ${shell(`${name}=${value}`)}`);

const CURL = {
  chat: (at, model) => curl(at, "chat/completions", asJson({ model, messages: [{ role: "user", content: "Hello" }] })),
  embedding: (at, model) => curl(at, "embeddings", asJson({ model, input: ["first text", "second text"] })),
  tts: (at, model) => `${curl(at, "audio/speech", asJson({ model, voice: "alloy", input: "Hello", response_format: "wav" }))} \\\n  -o speech.wav`,
  asr: (at, model) => curl(at, "audio/transcriptions", form([["model", model], ["file", "@speech.wav"]])),
  image_generation: (at, model) => curl(at, "images/generations", asJson({ model, prompt: "a red boat", size: "auto" })),
  image_edit: (at, model) => curl(at, "images/edits", form([["model", model], ["prompt", "make it blue"], ["image", "@picture.png"]])),
  rerank: (at, model) => curl(at, "rerank", asJson({ model, query: "a question", documents: ["one text", "another text"] })),
  moderation: (at, model) => curl(at, "moderations", asJson({ model, input: "some text" })),
};

const PYTHON = {
  chat: (model) => `stream = client.chat.completions.create(
    model=${model}, messages=[{"role": "user", "content": "Hello"}], stream=True
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)`,
  embedding: (model) => `answer = client.embeddings.create(model=${model}, input=["first text", "second text"])
print(len(answer.data[0].embedding))`,
  tts: (model) => `with client.audio.speech.with_streaming_response.create(
    model=${model}, voice="alloy", input="Hello", response_format="wav"
) as response:
    response.stream_to_file("speech.wav")`,
  asr: (model) => `with open("speech.wav", "rb") as file:
    print(client.audio.transcriptions.create(model=${model}, file=file).text)`,
  image_generation: (model) => `import base64
from pathlib import Path

answer = client.images.generate(model=${model}, prompt="a red boat")
Path("boat.png").write_bytes(base64.b64decode(answer.data[0].b64_json))`,
  image_edit: (model) => `import base64
from pathlib import Path

with open("picture.png", "rb") as file:
    answer = client.images.edit(model=${model}, image=file, prompt="make it blue")
Path("blue.png").write_bytes(base64.b64decode(answer.data[0].b64_json))`,
  moderation: (model) => `print(client.moderations.create(model=${model}, input="some text").results[0].flagged)`,
};

const NODE = {
  chat: (model) => `const stream = await client.chat.completions.create({
  model: ${model}, messages: [{ role: "user", content: "Hello" }], stream: true,
});
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");`,
  embedding: (model) => `const answer = await client.embeddings.create({ model: ${model}, input: ["first text", "second text"] });
console.log(answer.data[0].embedding.length);`,
  tts: (model) => `import { writeFile } from "node:fs/promises";

const answer = await client.audio.speech.create({ model: ${model}, voice: "alloy", input: "Hello", response_format: "wav" });
await writeFile("speech.wav", Buffer.from(await answer.arrayBuffer()));`,
  asr: (model) => `import { createReadStream } from "node:fs";

const answer = await client.audio.transcriptions.create({ model: ${model}, file: createReadStream("speech.wav") });
console.log(answer.text);`,
  image_generation: (model) => `import { writeFile } from "node:fs/promises";

const answer = await client.images.generate({ model: ${model}, prompt: "a red boat" });
await writeFile("boat.png", Buffer.from(answer.data[0].b64_json, "base64"));`,
  image_edit: (model) => `import { createReadStream } from "node:fs";
import { writeFile } from "node:fs/promises";

const answer = await client.images.edit({
  model: ${model}, image: createReadStream("picture.png"), prompt: "make it blue",
});
await writeFile("blue.png", Buffer.from(answer.data[0].b64_json, "base64"));`,
  moderation: (model) => `const answer = await client.moderations.create({ model: ${model}, input: "some text" });
console.log(answer.results[0].flagged);`,
};

for (const table of [CURL, PYTHON, NODE]) table.any = table.chat;

/*
 * Each client has `id`, `title`, `kinds` of models that it can use, and `steps(at, model)`: a list of
 * `{text, code, file}`. `at` is `{base, needsKey}`; `model` is an entry of /v1/models.
 */
export const CLIENTS = [
  {
    id: "curl",
    title: "curl",
    kinds: Object.keys(CURL),
    steps: (at, model) => [
      at.needsKey && { text: "Once in a terminal, with your key:", code: exports([["OPENAI_API_KEY", KEY]]) },
      { text: at.needsKey ? "Then:" : "In a terminal:", code: CURL[model.kind](at, model.id) },
    ],
  },
  {
    id: "python",
    title: "Python",
    kinds: Object.keys(PYTHON),
    steps: (at, model) => [
      { text: "The official client:", code: "pip install openai" },
      {
        text: at.needsKey ? "It takes the key from OPENAI_API_KEY if you leave api_key out:" : "Without a key on the server, any text does as one:",
        code: `from openai import OpenAI

client = OpenAI(base_url=${quote(`${at.base}/v1`)}, api_key=${quote(KEY)})
${PYTHON[model.kind](quote(model.id))}`,
      },
    ],
  },
  {
    id: "node",
    title: "Node",
    kinds: Object.keys(NODE),
    steps: (at, model) => [
      { text: "The official client:", code: "npm install openai" },
      {
        text: at.needsKey ? "It takes the key from OPENAI_API_KEY if you leave apiKey out:" : "Without a key on the server, any text does as one:",
        file: "client.mjs",
        code: `import OpenAI from "openai";

const client = new OpenAI({ baseURL: ${quote(`${at.base}/v1`)}, apiKey: ${quote(KEY)} });
${NODE[model.kind](quote(model.id))}`,
      },
    ],
  },
  {
    id: "codex",
    title: "Codex",
    kinds: CHAT,
    steps: (at, model) => [
      {
        file: "~/.codex/config.toml",
        code: `model = ${quote(model.id)}
model_provider = "cluster"

[model_providers.cluster]
name = "cluster"
base_url = ${quote(`${at.base}/v1`)}
wire_api = "responses"${at.needsKey ? '\nenv_key = "CLUSTER_KEY"' : ""}`,
      },
      { text: "In a terminal:", code: `${at.needsKey ? `${exports([["CLUSTER_KEY", KEY]])}\n` : ""}codex` },
      { text: "Its warning about missing model metadata does no harm." },
    ],
  },
  {
    id: "claude-code",
    title: "Claude Code",
    kinds: CHAT,
    steps: (at, model) => [
      {
        text: "In a terminal. The address has no /v1:",
        code: `${exports([
          ["ANTHROPIC_BASE_URL", at.base],
          ["ANTHROPIC_AUTH_TOKEN", KEY],
          ["ANTHROPIC_MODEL", model.id],
          ["ANTHROPIC_DEFAULT_HAIKU_MODEL", model.id],
          ["CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"],
          ["DISABLE_AUTOUPDATER", "1"],
          ["ENABLE_TOOL_SEARCH", "false"],
        ])}\nclaude`,
      },
      { text: "The fourth line is its model for small tasks in the background, which may be a smaller one. The last three keep it from other machines, and declare the tools of MCP servers from the beginning." },
    ],
  },
  {
    id: "opencode",
    title: "opencode",
    kinds: CHAT,
    steps: (at, model) => [
      {
        file: "~/.config/opencode/opencode.json",
        code: JSON.stringify(
          {
            $schema: "https://opencode.ai/config.json",
            model: `cluster/${model.id}`,
            small_model: `cluster/${model.id}`,
            provider: {
              cluster: {
                npm: "@ai-sdk/openai-compatible",
                name: "cluster",
                options: { baseURL: `${at.base}/v1`, apiKey: KEY },
                models: {
                  [model.id]: { limit: { context: model.context_window ?? 32768, output: model.max_output_tokens ?? 4096 } },
                },
              },
            },
          },
          null,
          2,
        ),
      },
      model.context_window === undefined && { text: "The server does not know the model's context: set the limits to those of your model." },
      { text: "It does not ask for the list of models: each one that you want to use has to be named." },
    ],
  },
  {
    id: "open-webui",
    title: "Open WebUI",
    kinds: CHAT,
    steps: (at) => [
      {
        text: "It lists all models by itself. In a terminal:",
        code: `${exports([["ENABLE_OLLAMA_API", "False"], ["OPENAI_API_BASE_URL", `${at.base}/v1`], ["OPENAI_API_KEY", KEY]])}\nopen-webui serve`,
      },
      {
        text: "Or in a container, in which 127.0.0.1 would be the container itself:",
        code: `docker run -d -p 3000:8080 -e ENABLE_OLLAMA_API=False -e OPENAI_API_BASE_URL=${shell(`${at.base}/v1`)} \\
  -e OPENAI_API_KEY=${KEY} -v open-webui:/app/backend/data ghcr.io/open-webui/open-webui:main`,
      },
    ],
  },
];
