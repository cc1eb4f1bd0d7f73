"""The playground: a form for each kind of model, and answers that never look finished if they are not."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CHROMIUM
from watched import Watched, open_page, wait_until
from web_cluster import WebCluster, open_web_cluster

Open = Callable[..., Watched]


def _chat(cluster: WebCluster, watched: Open, model: str, **options: Any) -> Any:
    page = watched(f"{cluster.page}#playground", **options).page
    page.get_by_label("Model", exact=True).select_option(model)
    return page


def _say(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def _image(folder: Path) -> Path:
    path = folder / "dot.png"
    path.write_bytes(
        base64.b64decode(
            "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
        )
    )
    return path


def _duration(player: Any) -> float:
    """Return how long a player's sound is, as soon as it is known."""
    return float(
        player.evaluate(
            """async (audio) => {
              if (!audio.readyState) await new Promise((resolve) => audio.addEventListener("loadedmetadata", resolve));
              return audio.duration;
            }"""
        )
    )


def test_a_conversation_has_several_turns(cluster: WebCluster, watched: Open) -> None:
    page = _chat(cluster, watched, "echo")
    _say(page, "think about two words")
    answer = page.get_by_role("article", name="Answer of echo")
    answer.get_by_text(" in all").wait_for()
    assert answer.locator(".prose").last.inner_text().strip() == "think about two words"
    assert answer.get_attribute("aria-busy") == "false"
    # Reasoning is folded as soon as the answer itself begins.
    assert not answer.get_by_text("I shall repeat it.").is_visible()
    answer.get_by_text("Reasoning").click()
    answer.get_by_text("I shall repeat it.").wait_for()
    assert re.match(r"req_", answer.get_by_role("link").inner_text())
    sent = _body_of(page, lambda: _say(page, "and more"))
    assert [each["role"] for each in sent["messages"]] == ["user", "assistant", "user"]
    assert sent["stream_options"] == {"include_usage": True}


def _body_of(page: Any, act: Callable[[], None], path: str = "**/v1/chat/completions") -> Any:
    with page.expect_request(path) as caught:
        act()
    return caught.value.post_data_json


def test_stopping_ends_the_work_on_the_worker(cluster: WebCluster, watched: Open) -> None:
    page = _chat(cluster, watched, "slow")
    _say(page, "go on")
    answer = page.get_by_role("article", name="Answer of slow")
    answer.get_by_text("tick tick tick").wait_for()
    assert answer.get_attribute("aria-busy") == "true"
    assert not cluster.cancelled.is_set()
    page.get_by_role("button", name="Stop").click()
    assert cluster.cancelled.wait(10)
    assert cluster.stopped == ["go on"]
    answer.get_by_text("Stopped here: the answer is not complete.").wait_for()
    page.get_by_role("button", name="Send", exact=True).wait_for()


def test_escape_stops(cluster: WebCluster, watched: Open) -> None:
    page = _chat(cluster, watched, "slow")
    _say(page, "go on")
    page.get_by_text("tick tick tick").wait_for()
    page.keyboard.press("Escape")
    assert cluster.cancelled.wait(10)
    page.get_by_role("status").get_by_text("The answer was stopped").wait_for(state="attached")


def test_signing_out_ends_what_runs(cluster: WebCluster, watched: Open) -> None:
    page = _chat(cluster, watched, "slow")
    _say(page, "go on")
    page.get_by_text("tick tick tick").wait_for()
    page.get_by_role("button", name="Sign in").click()
    assert cluster.cancelled.wait(10)


def test_an_answer_goes_on_while_another_view_is_looked_at(cluster: WebCluster, watched: Open) -> None:
    page = _chat(cluster, watched, "slow")
    _say(page, "go on")
    page.get_by_text("tick tick tick").wait_for()
    page.get_by_role("link", name="Models").click()
    page.get_by_role("heading", level=1, name="Models").wait_for()
    page.get_by_role("link", name="Playground").click()
    page.get_by_text(re.compile("(tick ){20}")).wait_for()
    assert not cluster.cancelled.is_set()
    page.keyboard.press("Escape")
    assert cluster.cancelled.wait(10)


def test_an_answer_that_fails_in_the_middle_is_marked(cluster: WebCluster, watched: Open) -> None:
    page = _chat(cluster, watched, "broken")
    _say(page, "hello")
    answer = page.get_by_role("article", name="Answer of broken")
    answer.get_by_text("The answer failed in the middle: The battery is empty").wait_for()
    answer.get_by_text("Failed", exact=True).wait_for()
    assert answer.get_by_text("This was").is_visible()
    assert "battery_empty" in answer.locator(".measures").first.inner_text()
    page.get_by_role("status").get_by_text("The answer failed").wait_for(state="attached")
    # What failed is no part of the conversation.
    sent = _body_of(page, lambda: _say(page, "again"))
    assert [each["role"] for each in sent["messages"]] == ["user", "user"]


def test_a_stream_that_is_cut_is_marked(cluster: WebCluster, watched: Open) -> None:
    page = _chat(cluster, watched, "echo")
    chunk = 'data: {"choices": [{"index": 0, "delta": {"content": "half of it"}}]}\n\n'
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, headers={"content-type": "text/event-stream"}, body=chunk),
    )
    _say(page, "hello")
    page.get_by_text("The stream ended before the answer was complete").wait_for()
    assert page.get_by_text("half of it").is_visible()


def test_an_answer_that_an_operator_cancels_is_marked(cluster: WebCluster, watched: Open) -> None:
    page = _chat(cluster, watched, "slow")
    _say(page, "go on")
    page.get_by_text("tick tick tick").wait_for()
    (call,) = page.request.get(f"{cluster.url}/cluster/calls").json()["calls"]
    page.request.post(f"{cluster.url}/cluster/calls/{call['request_id']}/cancel", data={"reason": "Too long"})
    answer = page.get_by_role("article", name="Answer of slow")
    answer.get_by_text("The answer failed in the middle: ").wait_for()
    assert "Too long" in answer.locator(".failure").inner_text()
    assert "cancelled" in answer.locator(".failure").inner_text()
    # Its story is a click away.
    answer.get_by_role("link", name=call["request_id"]).click()
    page.get_by_role("heading", level=1, name="Requests").wait_for()


def test_of_several_answers_the_first_is_shown(cluster: WebCluster, watched: Open) -> None:
    page = _chat(cluster, watched, "echo")
    page.get_by_label("More fields of the request, as JSON").fill('{"n": 2}')
    events = [{"choices": [{"index": index, "delta": {"content": f"{index} "}}]} for index in (0, 1, 0, 1)]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    headers = {"content-type": "text/event-stream"}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, headers=headers, body=body))
    _say(page, "hello")
    page.get_by_text(" in all").wait_for()
    assert page.locator(".answer .prose").inner_text().strip() == "0 0"


def test_a_refusal_shows_message_code_and_id(cluster: WebCluster, watched: Open) -> None:
    page = _chat(cluster, watched, "echo", expected=[400])
    page.get_by_label("More fields of the request, as JSON").fill('{"temperature": 7}')
    _say(page, "hello")
    failed = page.locator(".failure")
    failed.get_by_text("The request failed: ").wait_for()
    text = failed.inner_text()
    assert "temperature" in text
    assert "status 400" in text
    assert "req_" in text
    page.get_by_label("More fields of the request, as JSON").fill("{no json")
    _say(page, "hello")
    page.get_by_role("alert").get_by_text("More fields: this is not JSON").wait_for()


def test_questions_are_edited_and_answers_made_again(cluster: WebCluster, watched: Open) -> None:
    page = _chat(cluster, watched, "echo")
    _say(page, "first words")
    answers = page.get_by_role("article", name="Answer of echo")
    answers.get_by_text(" in all").wait_for()
    _say(page, "second words")
    answers.nth(1).get_by_text(" in all").wait_for()
    page.get_by_role("button", name="Edit your message").first.click()
    page.get_by_role("article", name="Your message").get_by_role("textbox").fill("other words")
    page.keyboard.press("Enter")
    answers.get_by_text("other words").wait_for()
    assert answers.count() == 1
    sent = _body_of(page, lambda: page.get_by_role("button", name="Try again").click())
    assert sent["messages"] == [{"role": "user", "content": "other words"}]
    page.get_by_role("button", name="New conversation").click()
    assert page.get_by_role("article").count() == 0


def test_an_answer_stays_if_the_settings_to_make_it_again_are_wrong(
    cluster: WebCluster, watched: Open
) -> None:
    page = _chat(cluster, watched, "echo")
    _say(page, "first words")
    answers = page.get_by_role("article", name="Answer of echo")
    answers.get_by_text(" in all").wait_for()
    page.get_by_label("More fields of the request").fill("{")
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("More fields: this is not JSON").wait_for()
    assert answers.count() == 1
    page.get_by_role("button", name="Edit your message").click()
    question = page.get_by_role("article", name="Your message").get_by_role("textbox")
    question.fill("other words")
    question.press("Enter")
    assert answers.get_by_text("first words").count() == 1
    assert question.input_value() == "other words"


def test_a_picture_that_is_read_after_the_message_was_sent_is_for_the_next_one(
    cluster: WebCluster, watched: Open, tmp_path: Path
) -> None:
    page = _chat(cluster, watched, "echo")
    page.evaluate(
        """() => {
          const read = FileReader.prototype.readAsDataURL;
          FileReader.prototype.readAsDataURL = function (file) { window.goOn = () => read.call(this, file); };
        }"""
    )
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add pictures").click()
    chooser.value.set_files(_image(tmp_path))
    wait_until(page, "window.goOn !== undefined")
    _say(page, "what is it")
    page.evaluate("window.goOn()")
    page.get_by_role("img", name="Picture 1 to send").wait_for()


def test_the_command_for_a_model_with_routes_of_its_own_is_safe_to_paste(
    cluster: WebCluster, watched: Open
) -> None:
    models = {"data": [{"id": "it's", "kind": "custom"}]}
    page = watched(
        f"{cluster.page}#playground",
        prepare=lambda page: page.route("**/v1/models", lambda route: route.fulfill(json=models)),
    ).page
    assert page.locator(".snippet").inner_text().strip().endswith("""-d '{"model":"it'\\''s"}'""")


def test_tools_are_called_and_answered_by_hand(cluster: WebCluster, watched: Open) -> None:
    page = _chat(cluster, watched, "tools")
    page.get_by_role("button", name="Insert an example").click()
    _say(page, "How is the weather?")
    page.get_by_role("heading", name="Calls get_weather").wait_for()
    assert '"city": "Bonn"' in page.locator(".call pre").inner_text()
    page.get_by_label("Result of get_weather").fill("sunny")
    page.get_by_role("button", name="Send the result").click()
    page.get_by_text("The tool says: sunny").wait_for()
    page.get_by_text("5 tokens, prompt 20").nth(1).wait_for()


def test_pictures_are_sent_to_models_that_see(cluster: WebCluster, watched: Open, tmp_path: Path) -> None:
    page = _chat(cluster, watched, "slow")
    assert not page.get_by_role("button", name="Add pictures").is_visible()
    page.get_by_label("Model", exact=True).select_option("echo")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add pictures").click()
    chooser.value.set_files(_image(tmp_path))
    page.get_by_role("img", name="Picture 1 to send").wait_for()
    sent = _body_of(page, lambda: _say(page, "what is it"))
    assert sent["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
    page.get_by_text("what is it picture").wait_for()
    # From the clipboard, too.
    page.evaluate(
        """() => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array([1])], "a.png", {type: "image/png"}));
          const event = new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true});
          document.getElementById("chat-message").dispatchEvent(event);
        }"""
    )
    page.get_by_role("img", name="Picture 1 to send").wait_for()


def test_code_is_a_block_wherever_the_pieces_are_cut(cluster: WebCluster, watched: Open) -> None:
    page = _chat(cluster, watched, "echo")
    text = "One.\nTwo.\n\n```python\na = '<b>'\n\n    b\n```\n`inline` three\n~~~\nopen"
    shown = page.evaluate(
        """async (text) => {
          const { Prose } = await import("./views/playground/prose.js");
          const results = [];
          for (const size of [1, 2, 3, 7, text.length]) {
            const prose = new Prose();
            for (let at = 0; at < text.length; at += size) prose.append(text.slice(at, at + size));
            prose.end();
            const shown = [...prose.element.querySelectorAll("p, code")];
            results.push(shown.map((each) => `${each.tagName}:${each.textContent}`));
          }
          return results;
        }""",
        text,
    )
    assert shown == [["P:One.\nTwo.", "CODE:a = '<b>'\n\n    b", "P:`inline` three", "CODE:open"]] * 5


def test_speech_is_played(cluster: WebCluster, watched: Open) -> None:
    page = watched(f"{cluster.page}#playground/speech").page
    page.get_by_role("button", name="Speak").click()
    player = page.get_by_label("The speech")
    player.wait_for()
    assert _duration(player) == pytest.approx(0.1, abs=0.02)


def test_a_file_is_transcribed(cluster: WebCluster, watched: Open, tmp_path: Path) -> None:
    page = watched(f"{cluster.page}#playground/transcription").page
    sound = tmp_path / "sound.wav"
    sound.write_bytes(b"RIFF" + bytes(1000))
    page.get_by_role("button", name="Transcribe").click()
    page.locator(".failure").get_by_text("Choose a file, or record something, first").wait_for()
    page.get_by_label("Audio file").set_input_files(sound)
    page.get_by_role("button", name="Transcribe").click()
    page.get_by_text("1004 bytes were said").wait_for()


@pytest.fixture
def with_microphone(browser: Any) -> Iterator[Any]:
    """A browser with a microphone that beeps."""
    flags = ["--no-sandbox", "--disable-gpu", "--use-fake-device-for-media-stream"]
    opened = browser.browser_type.launch(executable_path=CHROMIUM, args=flags)
    yield opened
    opened.close()


def test_the_microphone_is_transcribed(cluster: WebCluster, with_microphone: Any) -> None:
    seen = open_page(with_microphone, f"{cluster.page}#playground/transcription", permissions=["microphone"])
    page = seen.page
    page.get_by_role("button", name="Record").click()
    page.get_by_text(re.compile(r"Stop recording \([1-9.]")).click()
    page.get_by_text("Recorded at").wait_for()
    assert _duration(page.get_by_label("What is sent")) > 0.3
    page.get_by_role("button", name="Transcribe").click()
    page.get_by_text("bytes were said").wait_for()
    assert seen.problems == []


def test_a_microphone_that_may_not_be_used_is_explained(cluster: WebCluster, watched: Open) -> None:
    page = watched(f"{cluster.page}#playground/transcription").page
    page.evaluate(
        "() => { navigator.mediaDevices.getUserMedia = "
        "async () => { throw new DOMException('', 'NotAllowedError'); }; }"
    )
    page.get_by_role("button", name="Record").click()
    page.get_by_text("This page may not use the microphone").wait_for()
    page.evaluate("Object.defineProperty(navigator, 'mediaDevices', {value: undefined})")
    page.evaluate("Object.defineProperty(window, 'isSecureContext', {value: false})")
    page.get_by_role("button", name="Record").click()
    page.get_by_text("Browsers give the microphone only to pages over HTTPS").wait_for()


def test_a_microphone_that_is_allowed_after_signing_out_is_given_back(
    cluster: WebCluster, watched: Open
) -> None:
    page = watched(f"{cluster.page}#playground/transcription").page
    page.evaluate(
        """() => {
          navigator.mediaDevices.getUserMedia = () => new Promise((resolve) => {
            window.allow = () => {
              window.stream = new AudioContext().createMediaStreamDestination().stream;
              resolve(window.stream);
            };
          });
        }"""
    )
    page.get_by_role("button", name="Record").click()
    page.get_by_role("button", name="Sign in").click()
    page.evaluate("window.allow()")
    wait_until(page, "window.stream.getTracks().every((track) => track.readyState === 'ended')")


def test_pictures_are_made_and_changed(cluster: WebCluster, watched: Open, tmp_path: Path) -> None:
    page = watched(f"{cluster.page}#playground/images").page
    page.get_by_label("Prompt").fill("a red dot")
    page.get_by_label("How many").fill("2")
    page.get_by_role("button", name="Make").click()
    pictures = page.get_by_role("img", name="a red dot")
    pictures.nth(1).wait_for()
    assert pictures.first.evaluate("picture => picture.naturalWidth") == 1
    with page.expect_download() as download:
        page.get_by_role("link", name="Save picture 2").click()
    assert download.value.suggested_filename == "picture-2.png"
    page.get_by_role("link", name="Changing pictures").click()
    page.get_by_label("Pictures").set_input_files(_image(tmp_path))
    page.get_by_label("Prompt").fill("make it blue")
    page.get_by_role("button", name="Change").click()
    page.get_by_role("img", name="make it blue").wait_for()


def test_embeddings_are_compared(cluster: WebCluster, watched: Open) -> None:
    page = watched(f"{cluster.page}#playground/embeddings").page
    page.get_by_label("Texts, one per line").fill("aaa\nbbb\n\naaa")
    page.get_by_role("button", name="Compare").click()
    rows = page.locator(".similarities tbody tr")
    rows.nth(2).wait_for()
    # (3, 3, 1) and (3, 0, 1).
    assert rows.nth(0).locator("td").all_inner_texts() == ["1.000", "0.725", "1.000"]


def test_documents_are_ranked_and_texts_judged(cluster: WebCluster, watched: Open) -> None:
    page = watched(f"{cluster.page}#playground/order").page
    page.get_by_label("Documents, one per line").fill("short\na longer one")
    page.get_by_role("button", name="Rank").click()
    page.get_by_role("row", name="1 12.0000 a longer one").wait_for()
    page.get_by_role("link", name="Moderation").click()
    page.get_by_label("Texts, one per line").fill("a fight\npeace")
    page.get_by_role("button", name="Judge").click()
    page.get_by_text("not flagged").wait_for()
    assert page.locator("caption").all_inner_texts() == ["a fight flagged", "peace not flagged"]


def test_without_models_the_page_explains_what_to_do(tmp_path: Path, watched: Open) -> None:
    with open_web_cluster(tmp_path, serve=False) as cluster:
        page = watched(f"{cluster.page}#playground").page
        page.get_by_role("heading", name="No models yet").wait_for()
        assert "trio-cluster worker 127.0.0.1" in page.locator("pre").inner_text()
        cluster.start_worker("w2")
        try:
            page.get_by_role("button", name="Look again").click()
            page.get_by_label("Message", exact=True).wait_for()
        finally:
            cluster.stop_worker("w2")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_narrow_screens(cluster: WebCluster, watched: Open, scheme: str) -> None:
    page = _chat(cluster, watched, "echo", width=400, scheme=scheme)
    _say(page, "word " * 100 + "x" * 300)
    page.get_by_text(" in all").wait_for()
    assert page.evaluate("document.scrollingElement.scrollWidth") == 400
