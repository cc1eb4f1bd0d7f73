// Text to speech, and speech to text.

import { copyButton, el, fill, icon, setText } from "../../dom.js";
import { bytes, clock, seconds } from "../../format.js";
import { choice, facts, field, readChunks, requestForm, send } from "./parts.js";
import { Recorder } from "./recorder.js";


const TYPES = {
  "audio/mpeg": "mp3", "audio/wav": "wav", "audio/x-wav": "wav", "audio/wave": "wav", "audio/ogg": "opus", "audio/opus": "opus",
  "audio/flac": "flac", "audio/aac": "aac",
};

/** A text that becomes speech. */
export function createSpeech(page) {
  let model = null;
  let url = "";
  const input = el("textarea", { rows: 4, required: true, maxLength: 4096, value: "The quick brown fox jumps over the lazy dog." });
  const voice = el("input", { value: "alloy", required: true, spellcheck: false });
  // WAV first: every model here can give it, and every browser plays it.
  const format = choice(["wav", "mp3", "opus", "aac", "flac", "pcm"]);
  const speed = el("input", { type: "number", min: 0.25, max: 4, step: 0.05, value: 1, required: true });
  const instructions = el("input", { placeholder: "none" });

  const { element, stop, form } = requestForm(page, {
    controls: [
      field("Text", input),
      el("div.fields", {}, field("Voice", voice), field("Format", format), field("Speed", speed),
        field("How it should sound", instructions)),
    ],
    action: "Speak",
    onclear: release,
    run: async (signal) => {
      const began = performance.now();
      const body = {
        model: model.id, input: input.value, voice: voice.value, response_format: format.value,
      };
      if (speed.valueAsNumber !== 1) body.speed = speed.valueAsNumber;
      if (instructions.value) body.instructions = instructions.value;
      const { response, ...sent } = await send(page, "v1/audio/speech", { body, signal });
      const begun = (performance.now() - began) / 1000;
      const sound = await response.blob();
      const took = (performance.now() - began) / 1000;
      url = URL.createObjectURL(sound);
      const type = sound.type.split(";")[0];
      const player = el("audio", { controls: true, src: url, autoplay: true, "aria-label": "The speech" });
      const raw = format.value === "pcm" && !TYPES[type];
      return [
        raw ? el("p", {}, "These are raw samples, which browsers do not play. Choose WAV to hear them.") : player,
        el("p", {}, el("a", { href: url, download: `speech.${TYPES[type] ?? format.value}` }, "Save the file"), ` (${type}, ${bytes(sound.size)})`),
        facts(page, { ...sent, took }, `first sound after ${seconds(begun)}`),
      ];
    },
  });

  function release() {
    if (url) URL.revokeObjectURL(url);
    url = "";
  }

  return { element, stop, focus: () => form.querySelector("textarea").focus({ preventScroll: true }), choose: (chosen) => (model = chosen) };
}

/** Speech, of a file or of the microphone, that becomes text. */
export function createTranscription(page) {
  let model = null;
  let recorded = null;
  let url = "";
  let timer = 0;
  const recorder = new Recorder();
  page.signal.addEventListener("abort", () => recorder.stop());
  const file = el("input", { type: "file", accept: "audio/*,video/*" });
  const record = el("button", { type: "button", onclick: toggle }, icon("microphone"), " ", el("span", {}, "Record"));
  const state = el("p", { role: "status" });
  const player = el("div.player");
  const task = choice([["transcriptions", "As it was said"], ["translations", "In English"]]);
  const format = choice([["text", "Text"], ["verbose_json", "Text with times"], ["srt", "Subtitles (SRT)"], ["vtt", "Subtitles (WebVTT)"]]);
  const language = el("input", { placeholder: "found out by the model", maxLength: 16, spellcheck: false });
  const prompt = el("input", { placeholder: "none" });

  file.addEventListener("change", () => {
    recorded = null;
    show(file.files[0] ?? null);
  });

  async function toggle() {
    if (recorder.running) {
      recorder.stop();
      return;
    }
    setText(state, "");
    state.className = "";
    let sound;
    try {
      const { done } = await recorder.start();
      const began = performance.now();
      setText(record.querySelector("span"), "Stop recording");
      record.classList.add("danger");
      setText(state, "Recording");
      timer = setInterval(() => setText(record.querySelector("span"), `Stop recording (${seconds((performance.now() - began) / 1000)})`), 500);
      sound = await done;
    } catch (error) {
      if (error.name === "AbortError") return;
      setText(state, error.message);
      state.className = "error";
      return;
    } finally {
      clearInterval(timer);
      setText(record.querySelector("span"), "Record");
      record.classList.remove("danger");
    }
    recorded = sound;
    file.value = "";
    show(sound);
  }

  function show(sound) {
    if (url) URL.revokeObjectURL(url);
    url = "";
    fill(player);
    setText(state, "");
    if (sound === null) return;
    url = URL.createObjectURL(sound);
    setText(state, recorded === null ? "" : `Recorded at ${clock(Date.now() / 1000)}, ${bytes(sound.size)}`);
    fill(player, el("audio", { controls: true, src: url, "aria-label": "What is sent" }));
  }

  const { element, stop, form } = requestForm(page, {
    controls: [
      el("div.fields", {}, field("Audio file", file), el("div.field", {}, el("span.label", {}, "Or the microphone"), el("div", {}, record))),
      state,
      player,
      el("div.fields", {}, field("Text", task), field("Answer", format), field("Language", language, "A code such as en or de"),
        field("What the speech continues", prompt)),
    ],
    action: "Transcribe",
    run: async (signal, showNow) => {
      const sound = recorded ?? file.files[0];
      if (!sound) throw new Error("Choose a file, or record something, first");
      const form = new FormData();
      form.append("model", model.id);
      const translates = task.value === "translations";
      if (language.value && !translates) form.append("language", language.value);
      if (prompt.value) form.append("prompt", prompt.value);
      const streams = format.value === "text" && !translates;
      form.append("response_format", format.value === "text" ? "json" : format.value);
      if (streams) form.append("stream", "true");
      form.append("file", sound, sound.name ?? "recording.wav");
      const began = performance.now();
      const { response, ...sent } = await send(page, `v1/audio/${task.value}`, { body: form, signal });
      const took = () => (performance.now() - began) / 1000;
      if (response.headers.get("content-type")?.startsWith("text/event-stream")) {
        const text = await readTranscript(response, sent.requestId, showNow);
        return [result(text), facts(page, { ...sent, took: took() })];
      }
      if (format.value === "srt" || format.value === "vtt") {
        const text = await response.text();
        return [el("pre.block", { tabIndex: 0 }, text), copyButton(() => text, "Copy the subtitles"), facts(page, { ...sent, took: took() })];
      }
      const answer = await response.json();
      return [
        result(answer.text),
        answer.segments?.length > 0 && segments(answer.segments),
        facts(page, { ...sent, took: took() }, answer.duration && `${seconds(Number(answer.duration))} of speech`, answer.language),
      ].filter(Boolean);
    },
  });

  return {
    element,
    stop: () => (stop(), recorder.stop()),
    focus: () => form.querySelector("input").focus({ preventScroll: true }),
    choose: (chosen) => (model = chosen),
  };
}

async function readTranscript(response, requestId, show) {
  const shown = el("p.said");
  show(shown);
  let text = "";
  let finished = false;
  for await (const chunk of readChunks(response, requestId)) {
    if (chunk?.type === "transcript.text.delta") shown.append(chunk.delta);
    else if (chunk?.type === "transcript.text.done") {
      text = chunk.text;
      finished = true;
    }
  }
  if (!finished) throw Object.assign(new Error("The stream ended before the answer was complete"), { code: "cut", requestId });
  return text;
}

function result(text) {
  if (!text) return el("p.quiet", {}, "Nothing was understood.");
  return el("div.card.result", {}, el("p.said", {}, text), copyButton(() => text, "Copy the text"));
}

function segments(list) {
  return el("div.table", { tabIndex: 0, role: "region", "aria-label": "Segments" },
    el("table", {},
      el("thead", {}, el("tr", {}, el("th.number", {}, "From"), el("th.number", {}, "To"), el("th", {}, "Text"))),
      el("tbody", {}, list.map((each) => el("tr", {}, el("td.number", {}, seconds(each.start)), el("td.number", {}, seconds(each.end)), el("td", {}, each.text.trim()))))));
}
