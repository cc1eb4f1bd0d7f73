"""An agent of the OpenAI Agents SDK: a model, two tools and a second turn; it tells what became of that, as JSON.

Arguments: the base URL of the server, a model, and a question. There is one outcome for each way of going on: by the id
of the last response (``previous_response_id``), by a conversation that the server keeps (``conversation``), and with
everything sent again (``input``).
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import agents
import openai


@agents.function_tool
def temperature(city: str) -> str:
    """Tell the temperature of a city."""
    return f"21 degrees in {city}"


@agents.function_tool
def time(city: str) -> str:
    """Tell the time in a city."""
    return f"9 o'clock in {city}"


async def main(url: str, model: str, question: str) -> None:
    """Run the agent in each way."""
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=url, api_key="a-key", max_retries=0)
    answering = agents.OpenAIResponsesModel(model=model, openai_client=client)
    agent = agents.Agent(name="guide", instructions="Be kind.", model=answering, tools=[temperature, time])
    run = agents.Runner.run
    outcomes: dict[str, Any] = {}
    for streamed in (False, True):

        async def turn(
            said: Any, streamed: bool = streamed, **fields: Any
        ) -> agents.RunResult | agents.RunResultStreaming:
            if not streamed:
                return await run(agent, said, **fields)
            running = agents.Runner.run_streamed(agent, said, **fields)
            async for _ in running.stream_events():
                pass
            return running

        name = " streamed" if streamed else ""
        first = await turn(question, auto_previous_response_id=True)
        second = await turn("Thanks.", previous_response_id=first.last_response_id)
        outcomes["previous_response_id" + name] = [first.final_output, second.final_output]
        conversation = await client.conversations.create()
        first = await turn(question, conversation_id=conversation.id)
        second = await turn("Thanks.", conversation_id=conversation.id)
        outcomes["conversation" + name] = [first.final_output, second.final_output]
        session = agents.OpenAIConversationsSession(openai_client=client)
        first = await turn(question, session=session)
        second = await turn("Thanks.", session=session)
        outcomes["session" + name] = [first.final_output, second.final_output]
        first = await turn(question)
        second = await turn([*first.to_input_list(), {"role": "user", "content": "Thanks."}])
        outcomes["input" + name] = [first.final_output, second.final_output]
    await client.close()
    print(json.dumps(outcomes))


asyncio.run(main(*sys.argv[1:4]))
