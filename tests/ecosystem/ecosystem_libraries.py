"""The libraries, and where they are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import attrs

__all__ = ["ECOSYSTEM_FOLDER", "LIBRARIES", "PROGRAMS", "Library"]

#: The environment variable that names the folder in which ``nox -s ecosystem`` has installed them.
ECOSYSTEM_FOLDER: Final = "ECOSYSTEM_FOLDER"

PROGRAMS: Final = Path(__file__).parent / "programs"


@attrs.frozen
class Library:
    """One of them.

    Attributes:
        name: what it is called in the tests; its program is ``NAME_program``.
        title: what it is called in the table.
        package: what is looked for in the folder: a distribution for Python, or a package for Node.
        environment: the folder in the folder in which it is.
        lacks: the features that it does not have, or that cannot be seen.
    """

    name: str
    title: str
    package: str
    environment: str = "main"
    lacks: frozenset[str] = frozenset()


LIBRARIES: Final = (
    Library("ai_sdk", "Vercel AI SDK", "ai", "node_modules"),
    Library("langchain", "LangChain", "langchain_openai"),
    Library("llama_index", "LlamaIndex", "llama_index_llms_openai_like", "llama_index"),
    Library("openai_agents", "OpenAI Agents SDK", "openai_agents", lacks=frozenset({"embeddings"})),
    Library("pydantic_ai", "pydantic-ai", "pydantic_ai_slim"),
    Library("litellm", "LiteLLM SDK", "litellm"),
    Library("llm", "llm", "llm", lacks=frozenset({"embeddings"})),
)
