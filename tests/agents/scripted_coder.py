"""A model that edits a file as it was told to, with the tools that its agent offers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final, TypeAlias

import attrs
import trio

from trio_cluster import ApiError, ChatRequest, OutputChunk

__all__ = ["ScriptedCoder", "ToolUse", "tool_names"]

#: The name of a tool, and the arguments.
ToolUse: TypeAlias = tuple[str, dict[str, Any]]

#: The length of the pieces in which arguments come.
PIECE: Final = 7


def tool_names(request: ChatRequest) -> list[str]:
    """Return the names of the functions that a request offers."""
    return [tool["function"]["name"] for tool in request.tools or () if tool.get("type") == "function"]


def text_of(message: dict[str, Any]) -> str:
    """Return the text of a message."""
    content = message.get("content")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())


@attrs.define
class ScriptedCoder:
    """The model. What it does next depends only on the request, as that of a real model does.

    Attributes:
        turns: the tools that are used in each turn; for an agent without tools, what is said in it.
        silence: seconds before the first output of the first request, and again after it.
        failures: how many streams are still to fail after their first words.
        requests: all that the model was asked by the agent's main loop.
        side_requests: all that it was asked besides: for the title of a session, the message of a commit.
    """

    turns: list[list[ToolUse]] | list[str]
    silence: float = 0
    failures: int = 0
    requests: list[ChatRequest] = attrs.field(factory=list)
    side_requests: list[ChatRequest] = attrs.field(factory=list)

    async def answer(self, request: ChatRequest) -> AsyncIterator[Any]:
        """Be the handler."""
        spoken = isinstance(self.turns[0], str)
        if not request.stream if spoken else not request.tools:
            self.side_requests.append(request)
            yield "Change the greeting"
            yield OutputChunk.usage(10, 3)
            return
        self.requests.append(request)
        silence, self.silence = self.silence, 0
        await trio.sleep(silence)
        if self.failures:
            self.failures -= 1
            yield "Well, "
            raise ApiError(500, "the model broke")
        for chunk in self._say(request) if spoken else self._use_tools(request):
            yield chunk
            await trio.sleep(silence)
            silence = 0
        yield OutputChunk.usage(1000, 50)

    def _say(self, request: ChatRequest) -> Iterator[Any]:
        # Agents without tools give examples in the form of earlier turns; only the model's own are counted.
        own = {text.strip() for text in self.turns if isinstance(text, str)}
        said = sum(
            message["role"] == "assistant" and text_of(message).strip() in own for message in request.messages
        )
        text = self.turns[min(said, len(self.turns) - 1)]
        assert isinstance(text, str)
        yield text[:PIECE]
        yield text[PIECE:]

    def _use_tools(self, request: ChatRequest) -> Iterator[Any]:
        results = [text_of(message) for message in request.messages if message["role"] == "tool"]
        done = 0
        for turn in self.turns:
            assert not isinstance(turn, str)
            if len(results) < done + len(turn):
                break
            done += len(turn)
        else:
            yield OutputChunk.reasoning("That is all.")
            yield "Done. "
            yield f"The last tool said: {results[-1]}"
            return
        yield OutputChunk.reasoning("Let me use a tool.")
        for index, (tool, arguments) in enumerate(turn):
            assert tool in tool_names(request), f"there is no {tool} among {tool_names(request)}"
            text = json.dumps(arguments)
            yield OutputChunk.tool_call(tool, text[:PIECE], id=f"call_{done}_{index}", index=index)
            for start in range(PIECE, len(text), PIECE):
                yield OutputChunk.tool_call(tool, text[start : start + PIECE], index=index)
