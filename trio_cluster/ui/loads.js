// How busy the workers were over the last minutes, as far as this page has seen it.

import { svg } from "./dom.js";

// Seconds between two samples, and how many are kept.
const EVERY = 2;
const KEPT = 150;
export const MINUTES = (EVERY * KEPT) / 60;

const WIDTH = KEPT - 1;
const HEIGHT = 40;

/** Takes samples of the workers' slots for as long as the page is open, whichever view is shown. */
export class Loads {
  #live;
  #timer;
  #samples = new Map();

  constructor(live) {
    this.#live = live;
    this.#timer = setInterval(() => this.#sample(), EVERY * 1000);
  }

  stop() {
    clearInterval(this.#timer);
  }

  /** Return the samples of a worker, oldest first: what of its slots was taken, from 0 to 1; null: not known. */
  of(id) {
    return this.#samples.get(id) ?? [];
  }

  #sample() {
    const seen = this.#live.state === "live" ? this.#live.workers : new Map();
    for (const id of seen.keys()) if (!this.#samples.has(id)) this.#samples.set(id, []);
    for (const [id, samples] of this.#samples) {
      const worker = seen.get(id);
      samples.push(worker?.capacity ? Math.min(1, worker.running / worker.capacity) : null);
      if (samples.length > KEPT) samples.shift();
      if (samples.every((sample) => sample === null)) this.#samples.delete(id);
    }
  }
}

/** Return a small chart of samples, and the function that draws it anew. The newest sample is at the right. */
export function sparkline() {
  const area = svg("path", { class: "area" });
  const line = svg("path", { class: "curve", "vector-effect": "non-scaling-stroke" });
  const element = svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "sparkline", role: "img", "aria-label": "" },
    area,
    line,
  );
  return {
    element,
    draw(samples) {
      const known = samples.filter((sample) => sample !== null);
      const label = known.length
        ? `Slots taken over the last ${MINUTES} minutes: now ${percent(known.at(-1))}, at most ${percent(Math.max(...known))}`
        : "Slots taken: nothing was measured yet";
      if (element.getAttribute("aria-label") !== label) element.setAttribute("aria-label", label);
      let curve = "";
      let filled = "";
      let start = null;
      const offset = KEPT - samples.length;
      samples.forEach((sample, index) => {
        const x = offset + index;
        if (sample === null) {
          if (start !== null) filled += `V${HEIGHT}H${start}Z`;
          start = null;
          return;
        }
        const y = (1 + (1 - sample) * (HEIGHT - 2)).toFixed(1);
        const first = start === null;
        curve += first ? `M${x} ${y}` : `L${x} ${y}`;
        filled += first ? `M${x} ${HEIGHT}L${x} ${y}` : `L${x} ${y}`;
        if (first) start = x;
      });
      if (start !== null) filled += `V${HEIGHT}H${start}Z`;
      line.setAttribute("d", curve);
      area.setAttribute("d", filled);
    },
  };
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}
