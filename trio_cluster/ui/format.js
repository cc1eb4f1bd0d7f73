// Numbers and names for people.

/** Seconds as 42 ms, 0.42 s, 12.3 s, 4 min 5 s, 2 h 3 min, 3 d 4 h. */
export function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value > 0 && value < 0.1) return `${Math.max(1, Math.round(value * 1000))} ms`;
  if (value < 10) return `${Math.max(0, value).toFixed(value < 1 ? 2 : 1)} s`;
  if (value < 60) return `${Math.round(value)} s`;
  const whole = Math.round(value);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

/** A time that runs, in seconds: 4.2 s, 42 s, 4:05, 2:03:04. What is below 0 is 0. */
export function stopwatch(value) {
  if (!(value >= 60)) return seconds(value >= 0.1 ? value : 0).replace(/(\.\d)\d /, "$1 ");
  const whole = Math.floor(value);
  const two = (number) => String(number).padStart(2, "0");
  const minutes = Math.floor(whole / 60) % 60;
  return whole < 3600 ? `${minutes}:${two(whole % 60)}` : `${Math.floor(whole / 3600)}:${two(minutes)}:${two(whole % 60)}`;
}

/** A count as 950, 12.3 k, 4.5 M. */
export function count(value) {
  if (!Number.isFinite(value)) return "–";
  for (const [size, unit] of [[1e9, " G"], [1e6, " M"], [1e3, " k"]]) {
    if (Math.abs(value) >= size) return `${(value / size).toPrecision(3)}${unit}`;
  }
  return String(Math.round(value));
}

/** Bytes as 950 B, 12.3 kB, 4.5 MB. */
export function bytes(value) {
  const text = count(value);
  return text.includes(" ") ? `${text}B` : `${text} B`;
}

/** Tokens that were not counted, but reckoned from bytes: ≈ 950 tok, ≈ 12.3 k tok. */
export function tokens(value) {
  return `≈ ${count(value)} tok`;
}

/** A time of the day, in the browser's time zone. */
export function clock(epoch) {
  return new Date(epoch * 1000).toLocaleTimeString();
}

/** `1 worker`, `3 workers`. */
export function plural(number, word, words = `${word}s`) {
  return `${number} ${number === 1 ? word : words}`;
}

/** The name of a worker; or in words, that it is the node that is asked. */
export function placeOf(node) {
  return node === "local" ? "this node" : node;
}
