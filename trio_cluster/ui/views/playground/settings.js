// The settings of the chat, and the fields of a request that they become.

import { el } from "../../dom.js";
import { choice, field } from "./parts.js";

const EXAMPLE = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Return the weather in a city.",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

/** A setting that cannot be sent: `control` is where. */
export class SettingError extends Error {
  constructor(control, message) {
    super(message);
    this.control = control;
  }
}

/**
 * Return `{element, system(), request()}`: the system prompt, and the fields of a chat request. `request` throws
 * {@link SettingError}. Fields that are left empty are not sent: the model's own defaults hold.
 */
export function createSettings() {
  const system = el("textarea", { rows: 3 });
  const number = (props) => el("input", { type: "number", placeholder: "default", ...props });
  const numbers = {
    temperature: [number({ min: 0, max: 2, step: 0.1 }), "Temperature"],
    max_tokens: [number({ min: 1, step: 1 }), "Max. tokens"],
    top_p: [number({ min: 0, max: 1, step: 0.05 }), "Top p"],
    seed: [number({ step: 1 }), "Seed"],
  };
  const effort = choice([["", "default"], "none", "minimal", "low", "medium", "high"]);
  const stop = el("textarea", { rows: 2, spellcheck: false });
  const streamed = el("input", { type: "checkbox", checked: true });
  const tools = el("textarea.mono", { rows: 4, spellcheck: false });
  const toolChoice = choice([["", "auto"], ["required", "required"], ["none", "none"]]);
  const more = el("textarea.mono", { rows: 3, spellcheck: false, placeholder: '{"response_format": {"type": "json_object"}}' });
  const example = el(
    "button.small",
    { type: "button", onclick: () => (tools.value = JSON.stringify(EXAMPLE, null, 2)) },
    "Insert an example",
  );

  const element = el(
    "details.card.settings",
    { open: matchMedia("(min-width: 70rem)").matches },
    el("summary", {}, "Settings"),
    field("System prompt", system),
    el(
      "div.pairs",
      {},
      Object.values(numbers).map(([control, label]) => field(label, control)),
      field("Reasoning effort", effort),
      field("Use of tools", toolChoice),
    ),
    field("Tools, as JSON", tools, "A list of functions. You answer their calls by hand."),
    example,
    field("Stop at, one text per line", stop),
    field("More fields of the request, as JSON", more),
    el("label.plain", {}, streamed, "Stream the answer"),
  );

  function request() {
    const body = { stream: streamed.checked };
    if (streamed.checked) body.stream_options = { include_usage: true };
    for (const [name, [control, label]] of Object.entries(numbers)) {
      if (control.validity.badInput || !control.checkValidity()) {
        throw new SettingError(control, `${label}: ${control.validationMessage}`);
      }
      if (control.value !== "") body[name] = control.valueAsNumber;
    }
    if (effort.value) body.reasoning_effort = effort.value;
    const stops = stop.value.split("\n").filter(Boolean);
    if (stops.length) body.stop = stops;
    const given = parse(tools, "Tools", Array.isArray, "a list");
    if (given?.length) {
      body.tools = given;
      if (toolChoice.value) body.tool_choice = toolChoice.value;
    }
    const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
    return Object.assign(body, parse(more, "More fields", isObject, "an object") ?? {});
  }

  /** Open the settings at a wrong one. */
  function showError(error) {
    element.open = true;
    error.control.focus();
  }

  return { element, system: () => system.value.trim(), request, showError };
}

function parse(control, label, fits, expected) {
  if (control.value.trim() === "") return null;
  let value;
  try {
    value = JSON.parse(control.value);
  } catch (error) {
    throw new SettingError(control, `${label}: this is not JSON (${error.message})`);
  }
  if (!fits(value)) throw new SettingError(control, `${label}: expected ${expected}`);
  return value;
}
