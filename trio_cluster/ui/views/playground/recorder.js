// The microphone. What is recorded becomes a WAV file: what browsers record (WebM, MP4) is not read by every model.

const RATE = 16000;

export class Recorder {
  // Ends what was begun; null: nothing was.
  #end = null;

  /** Whether it records, or waits for the user to allow that. */
  get running() {
    return this.#end !== null;
  }

  /**
   * Begin to record; not to be called while it is `running`. Returns `{done}` as soon as it records; `done` is a promise
   * of the WAV file, which is there when the recorder has been stopped.
   *
   * @throws {Error} with a message for the user: there is no microphone, or it may not be used.
   * @throws {DOMException} AbortError: it was stopped before it recorded.
   */
  async start() {
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new Error(
        window.isSecureContext
          ? "This browser does not let pages record sound"
          : "Browsers give the microphone only to pages over HTTPS, or from this machine itself (http://localhost). " +
            "Open the page so, or choose a file.",
      );
    }
    const waiting = new AbortController();
    this.#end = () => waiting.abort();
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    } catch (error) {
      this.#end = null;
      waiting.signal.throwIfAborted();
      throw new Error(
        {
          NotAllowedError: "This page may not use the microphone: allow it in the browser, beside the address",
          NotFoundError: "There is no microphone",
          NotReadableError: "The microphone is in use by another program",
        }[error.name] ?? `The microphone cannot be used: ${error.message}`,
      );
    }
    const release = () => {
      this.#end = null;
      for (const track of stream.getTracks()) track.stop();
    };
    if (waiting.signal.aborted) {
      release();
      throw waiting.signal.reason;
    }
    try {
      return this.#record(stream, release);
    } catch (error) {
      release();
      throw error;
    }
  }

  #record(stream, release) {
    const pieces = [];
    const recorder = new MediaRecorder(stream);
    const done = new Promise((resolve, reject) => {
      recorder.addEventListener("dataavailable", (event) => pieces.push(event.data));
      recorder.addEventListener("stop", () => {
        release();
        toWav(new Blob(pieces, { type: recorder.mimeType })).then(resolve, reject);
      });
    });
    recorder.start();
    this.#end = () => recorder.state === "recording" && recorder.stop();
    return { done };
  }

  stop() {
    this.#end?.();
  }
}

/** Return a recording as a WAV file: one channel of 16-bit samples. */
async function toWav(recording) {
  const context = new OfflineAudioContext(1, 1, RATE);
  const sound = await context.decodeAudioData(await recording.arrayBuffer());
  const mixer = new OfflineAudioContext(1, Math.max(1, sound.length), RATE);
  const source = new AudioBufferSourceNode(mixer, { buffer: sound });
  source.connect(mixer.destination);
  source.start();
  const samples = (await mixer.startRendering()).getChannelData(0);
  const file = new DataView(new ArrayBuffer(44 + samples.length * 2));
  const text = (at, word) => [...word].forEach((letter, index) => file.setUint8(at + index, letter.charCodeAt(0)));
  text(0, "RIFF");
  file.setUint32(4, 36 + samples.length * 2, true);
  text(8, "WAVEfmt ");
  file.setUint32(16, 16, true);
  file.setUint16(20, 1, true);
  file.setUint16(22, 1, true);
  file.setUint32(24, RATE, true);
  file.setUint32(28, RATE * 2, true);
  file.setUint16(32, 2, true);
  file.setUint16(34, 16, true);
  text(36, "data");
  file.setUint32(40, samples.length * 2, true);
  samples.forEach((sample, index) => {
    const value = Math.max(-1, Math.min(1, sample));
    file.setInt16(44 + index * 2, value < 0 ? value * 0x8000 : value * 0x7fff, true);
  });
  return new File([file.buffer], "recording.wav", { type: "audio/wav" });
}
