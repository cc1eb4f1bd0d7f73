"""The hibari engine: formats, sentences and refusals, with a fake voice."""

from __future__ import annotations

import io
import sys
import wave
from typing import Any

import pytest
import trio
from recording_provider import RecordingProvider

np = pytest.importorskip("numpy")

from trio_cluster.engines.hibari import Speaker  # noqa: E402
from trio_cluster.errors import ApiError  # noqa: E402
from trio_cluster.local.slots import Slots  # noqa: E402
from trio_cluster.openai import TTSRequest  # noqa: E402


class FakeVoice:
    """A voice that takes a tenth of a second per sentence, divided by the speed."""

    sample_rate = 24_000

    def __init__(self) -> None:
        self.spoken: list[str] = []

    def phonemize(self, text: str) -> list[str]:
        return [each.strip() for each in text.split(".") if each.strip()]

    def from_phonemes(self, phonemes: str, speed: float, seed: int) -> Any:
        self.spoken.append(phonemes)
        return np.full(int(2400 / speed), 0.5, np.float32)


def speaker(default_format: str = "wav") -> Speaker:
    return Speaker(FakeVoice(), Slots(1), default_format)


async def say(text: str = "One. Two.", **fields: Any) -> tuple[list[bytes], str]:
    request = TTSRequest(model="h", **({"input": text, "voice": "alloy"} | fields))
    output = RecordingProvider()
    await speaker().speak(request, output)
    (mime_type,) = {chunk.mime_type for chunk in output.pieces}
    return output.values("audio"), mime_type


async def test_each_sentence_is_sent_by_itself() -> None:
    pieces, _ = await say("One. Two. Three.")
    assert [len(piece) for piece in pieces] == [44 + 4800, 4800, 4800]


async def test_the_format_is_wav_if_the_client_sets_none() -> None:
    pieces, mime_type = await say()
    assert mime_type == "audio/wav"
    assert pieces[0][:4] == b"RIFF"
    with wave.open(io.BytesIO(b"".join(pieces))) as opened:
        assert opened.getframerate() == 24_000
        assert len(opened.readframes(opened.getnframes())) == 2 * 4800


async def test_a_single_sentence_states_its_length_and_several_cannot() -> None:
    (whole,), _ = await say("One.")
    assert int.from_bytes(whole[40:44], "little") == len(whole) - 44
    pieces, _ = await say("One. Two.")
    assert pieces[0][40:44] == b"\xff\xff\xff\xff"


async def test_pcm_has_samples_and_no_header() -> None:
    pieces, mime_type = await say(response_format="pcm", raw={"response_format": "pcm"})
    assert mime_type == "audio/pcm"
    assert pieces[0] == np.full(2400, 16383, "<i2").tobytes()


@pytest.mark.parametrize("wanted", ["mp3", "opus", "aac", "flac"])
async def test_a_format_without_an_encoder_is_refused(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ApiError, match=f"has the formats wav and pcm, not {wanted}") as caught:
        await say(response_format=wanted, raw={"response_format": wanted})
    assert (caught.value.status, caught.value.param) == (400, "response_format")


async def test_speed_changes_the_length() -> None:
    (whole,), _ = await say("One.", speed=2.0)
    assert len(whole) == 44 + 2400


async def test_a_text_that_cannot_be_spoken_is_refused() -> None:
    with pytest.raises(ApiError, match="no words in the input") as caught:
        await say(" . ")
    assert caught.value.param == "input"


async def test_a_cancelled_request_stops_after_its_sentence() -> None:
    model, output = speaker(), RecordingProvider()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(model.speak, TTSRequest(model="h", input="Word. " * 500, voice="x"), output)
        await output.first.wait()
        nursery.cancel_scope.cancel()
    assert len(model._voice.spoken) < 20
    assert model._slots.running == 0
