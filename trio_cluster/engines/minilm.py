"""``minilm``: sentence embeddings with all-MiniLM-L6-v2, or another BERT-like model in the ONNX format.

Texts are processed in batches of ``batch``; a vector is the mean over the tokens of its text, scaled to length 1. A
running batch can be interrupted from another thread (onnxruntime checks a flag between two nodes of the network), so a
cancelled request stops within milliseconds.

A text that is longer than the model can take is refused, as the OpenAI API does, unless ``truncate=yes``: half a text
has another meaning, and the client would not notice. Token ids are refused, because clients that send them use the
vocabulary of another model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

import attrs

from trio_cluster.errors import ClusterError, InvalidRequest
from trio_cluster.local.adapters import Provider
from trio_cluster.local.slots import Slots
from trio_cluster.openai import EmbeddingRequest, OutputChunk

from ._engine import LoadingEngine, Option, ServedModel, boolean, text, whole_number
from ._pinned_weights import WEIGHTS
from ._threads import Outlet, ThreadStream
from ._weights import ensure_weights

__all__ = ["MiniLM", "engine"]

_FILES: Final = ("model.onnx", "tokenizer.json")


class _MiniLM(LoadingEngine):
    summary = "embeddings: all-MiniLM-L6-v2 with onnxruntime"
    argument = "folder with model.onnx and tokenizer.json; all-MiniLM-L6-v2 by default"
    requires = ("onnxruntime", "tokenizers", "numpy")
    extra = "trio-cluster[minilm]"
    options: ClassVar[Mapping[str, Option]] = {
        "name": Option(text, None, "the model's name; all-MiniLM-L6-v2, or the folder's name"),
        "threads": Option(whole_number(1, 1024), 1, "threads for each batch"),
        "parallel": Option(whole_number(1, 64), 1, "batches at once"),
        "batch": Option(whole_number(1, 1024), 16, "texts in a batch"),
        "max_tokens": Option(whole_number(8, 512), 256, "tokens that a text may have"),
        "truncate": Option(boolean, False, "whether to cut longer texts instead of refusing them"),
    }

    def check(self, argument: str, options: Mapping[str, Any]) -> None:
        """See :meth:`Engine.check`."""
        missing = [name for name in _FILES if not (Path(argument) / name).is_file()] if argument else []
        if missing:
            raise ValueError(f"'{argument}' is not the folder of a model: it lacks {', '.join(missing)}")

    async def prepare(self, argument: str, options: Mapping[str, Any]) -> str:
        """See :meth:`LoadingEngine.prepare`."""
        return argument or str(await ensure_weights(WEIGHTS["minilm"]))

    @contextmanager
    def open(self, argument: str, options: Mapping[str, Any]) -> Iterator[ServedModel]:
        """See :meth:`LoadingEngine.open`."""
        folder = Path(argument).resolve()
        is_demo = folder.name == WEIGHTS["minilm"].folder_name
        name = options["name"] or ("all-MiniLM-L6-v2" if is_demo else folder.name)
        yield ServedModel(name, "embedding", MiniLM.load(folder, options).embed)


engine = _MiniLM()


@attrs.frozen(eq=False)
class MiniLM:
    """A loaded model."""

    _session: Any
    _tokenizer: Any
    _slots: Slots
    _batch: int
    _max_tokens: int
    _truncate: bool

    @classmethod
    def load(cls, folder: Path, options: Mapping[str, Any]) -> MiniLM:
        """Load a model. Blocks.

        Args:
            folder: the folder with ``model.onnx`` and ``tokenizer.json``.
            options: a value for every option of the engine.

        Raises:
            ClusterError: the files cannot be loaded.
        """
        import onnxruntime
        from tokenizers import Tokenizer

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = options["threads"]
        settings.log_severity_level = 3
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            # These replace settings in the file: the length is checked in `_fit`, and padding is per batch.
            tokenizer.no_truncation()
            tokenizer.enable_padding()
            session = onnxruntime.InferenceSession(
                str(folder / "model.onnx"), settings, providers=["CPUExecutionProvider"]
            )
        # Both libraries raise plain Exception.
        except Exception as error:
            raise ClusterError(f"cannot load the embedding model in '{folder}': {error}") from error
        slots = Slots(options["parallel"])
        return cls(session, tokenizer, slots, options["batch"], options["max_tokens"], options["truncate"])

    async def embed(self, request: EmbeddingRequest, provider: Provider) -> None:
        """Handle a request; the handler that is registered. Cancellation interrupts the current batch.

        Raises:
            InvalidRequest: an input is too long, or is not text.
        """
        tokens = 0
        async with ThreadStream(self._embedding_work(request.inputs), self._slots, name="minilm") as batches:
            async for vectors, count in batches:
                tokens += count
                await provider.push(OutputChunk.embeddings(vectors))
        await provider.push(OutputChunk.usage(tokens))

    def _embedding_work(
        self, inputs: list[str] | list[list[int]]
    ) -> Callable[[Outlet[tuple[Any, int]]], None]:
        """Return the work of one request: it puts the vectors of each batch, with the number of its tokens."""
        import numpy as np
        import onnxruntime

        texts = [each for each in inputs if isinstance(each, str)]
        if len(texts) != len(inputs):
            raise InvalidRequest(
                "This model has a vocabulary of its own and takes no token ids; send the text",
                param="input",
                code="unsupported_value",
            )
        wanted = {each.name for each in self._session.get_inputs()}

        def work(outlet: Outlet[tuple[Any, int]]) -> None:
            # All texts are tokenized first, so that a request is refused before any of it has been computed.
            encoded: list[tuple[list[int], list[int]]] = []
            for first in range(0, len(texts), self._batch):
                if outlet.closed():
                    return
                for each in self._tokenizer.encode_batch(texts[first : first + self._batch]):
                    encoded.append(self._fit(each, len(encoded)))
            for first in range(0, len(encoded), self._batch):
                group = encoded[first : first + self._batch]
                longest = max(len(ids) for ids, _ in group)
                ids = np.zeros((len(group), longest), np.int64)
                mask = np.zeros((len(group), longest), np.int64)
                for row, (each_ids, each_mask) in enumerate(group):
                    ids[row, : len(each_ids)] = each_ids
                    mask[row, : len(each_mask)] = each_mask
                feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
                run = onnxruntime.RunOptions()
                outlet.interrupt_with(partial(setattr, run, "terminate", True))
                try:
                    hidden = self._session.run(None, {k: v for k, v in feed.items() if k in wanted}, run)[0]
                except Exception:
                    # An interrupted run raises a plain Exception. The request is over, so it is dropped.
                    if outlet.closed():
                        return
                    raise
                vectors = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                if not outlet.put((vectors.astype(np.float32), int(mask.sum()))):
                    return

        return work

    def _fit(self, encoding: Any, index: int) -> tuple[list[int], list[int]]:
        """Return the ids and the mask of a text without its padding; refuse or truncate a text that is too long."""
        length = sum(encoding.attention_mask)
        if length > self._max_tokens:
            if not self._truncate:
                raise InvalidRequest(
                    f"Input {index} has {length} tokens; this model takes up to {self._max_tokens}, so shorten it",
                    param="input",
                    code="context_length_exceeded",
                )
            encoding.truncate(self._max_tokens)
            length = self._max_tokens
        ids = [token for token, kept in zip(encoding.ids, encoding.attention_mask, strict=True) if kept]
        return ids, [1] * length
