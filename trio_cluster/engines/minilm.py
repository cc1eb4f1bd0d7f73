"""``minilm``: sentence embeddings with all-MiniLM-L6-v2, or another BERT-like model in the ONNX format.

Texts are processed in batches of ``batch``; a vector is the mean over the tokens of its text, scaled to length 1. A
running batch can be interrupted from another thread (onnxruntime checks a flag between two nodes of the network), so a
cancelled request stops within milliseconds.

A text that is longer than the model can take is refused by default, as the OpenAI API does: half a text has another
meaning, and the client would not notice. ``long_texts=cut`` embeds its beginning, and ``long_texts=average`` all of it:
the text is split into windows of ``max_tokens`` tokens without overlap, and its vector is the mean of their vectors,
weighted by the tokens in them and scaled to length 1 again (the method of the OpenAI cookbook, "Embedding texts that
are longer than the model's maximum context length"). The usage counts the tokens that the model has read, which include
those that begin and end each window.

Token ids are refused, because clients that send them use the vocabulary of another model.
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

from ._engine import LoadingEngine, Option, ServedModel, boolean, not_loaded, text, whole_number
from ._pinned_weights import WEIGHTS
from ._threads import Outlet, ThreadStream
from ._weights import ensure_weights

__all__ = ["MiniLM", "engine"]

_FILES: Final = ("model.onnx", "tokenizer.json")

_LONG_TEXTS: Final = ("refuse", "cut", "average")


def _long_texts(value: str) -> str:
    if value not in _LONG_TEXTS:
        raise ValueError(f"expected {', '.join(_LONG_TEXTS[:-1])} or {_LONG_TEXTS[-1]}, got '{value}'")
    return value


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
        "long_texts": Option(
            _long_texts, "refuse", "longer texts: refuse, cut, or average (the mean over windows)"
        ),
        "truncate": Option(boolean, False, "an earlier name for long_texts=cut"),
    }

    def check(self, argument: str, options: Mapping[str, Any]) -> None:
        """See :meth:`Engine.check`."""
        if options["truncate"] and options["long_texts"] == "average":
            raise ValueError("truncate=yes means long_texts=cut; leave it out for long_texts=average")
        missing = [name for name in _FILES if not (Path(argument) / name).is_file()] if argument else []
        if missing:
            raise ValueError(f"'{argument}' is not the folder of a model: it lacks {', '.join(missing)}")

    async def prepare(self, argument: str, options: Mapping[str, Any]) -> str:
        """See :meth:`LoadingEngine.prepare`."""
        return argument or str(await ensure_weights(WEIGHTS["minilm"]))

    @contextmanager
    def open(self, argument: str, options: Mapping[str, Any]) -> Iterator[ServedModel]:
        """See :meth:`LoadingEngine.open`."""
        loaded = MiniLM.load(Path(argument).resolve(), options)
        yield attrs.evolve(self.describe(argument, options), handler=loaded.embed)

    def describe(self, argument: str, options: Mapping[str, Any]) -> ServedModel:
        """See :meth:`LoadingEngine.describe`."""
        folder = Path(argument).resolve()
        is_demo = folder.name == WEIGHTS["minilm"].folder_name
        return ServedModel(
            options["name"] or ("all-MiniLM-L6-v2" if is_demo else folder.name), "embedding", not_loaded
        )


engine = _MiniLM()


@attrs.frozen(eq=False)
class MiniLM:
    """A loaded model."""

    _session: Any
    _tokenizer: Any
    _slots: Slots
    _batch: int
    _max_tokens: int
    _averages: bool

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
        long_texts = "cut" if options["truncate"] else options["long_texts"]
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            # These replace settings in the file. Padding is done per batch, in `_embedding_work`. A tokenizer that
            # truncates gives the rest of the text in further windows.
            tokenizer.no_padding()
            if long_texts == "refuse":
                tokenizer.no_truncation()
            else:
                tokenizer.enable_truncation(options["max_tokens"], stride=0)
            session = onnxruntime.InferenceSession(
                str(folder / "model.onnx"), settings, providers=["CPUExecutionProvider"]
            )
        # Both libraries raise plain Exception.
        except Exception as error:
            raise ClusterError(f"cannot load the embedding model in '{folder}': {error}") from error
        slots = Slots(options["parallel"])
        return cls(
            session, tokenizer, slots, options["batch"], options["max_tokens"], long_texts == "average"
        )

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
        texts = [each for each in inputs if isinstance(each, str)]
        if len(texts) != len(inputs):
            raise InvalidRequest(
                "This model has a vocabulary of its own and takes no token ids; send the text"
                " (in LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))",
                param="input",
                code="unsupported_value",
            )
        import numpy as np
        import onnxruntime

        wanted = {each.name for each in self._session.get_inputs()}

        def work(outlet: Outlet[tuple[Any, int]]) -> None:
            # All texts are tokenized first, so that a request is refused before any of it has been computed.
            windows: list[list[int]] = []
            # How many windows each text has.
            counts: list[int] = []
            for first in range(0, len(texts), self._batch):
                if outlet.closed():
                    return
                for each in self._tokenizer.encode_batch(texts[first : first + self._batch]):
                    found = self._windows(each, len(counts))
                    windows += found
                    counts.append(len(found))
            mean = _WindowMean(counts)
            tokens = 0
            for first in range(0, len(windows), self._batch):
                group = windows[first : first + self._batch]
                lengths = np.array([len(each) for each in group], np.int64)
                ids = np.zeros((len(group), int(lengths.max())), np.int64)
                for row, each_ids in enumerate(group):
                    ids[row, : len(each_ids)] = each_ids
                mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
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
                vectors = (hidden * mask[..., None]).sum(1) / lengths[:, None]
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                tokens += int(lengths.sum())
                complete = mean.add(vectors, lengths)
                # A batch may consist of windows of one text, which is not complete yet.
                if complete:
                    if not outlet.put((np.stack(complete).astype(np.float32), tokens)):
                        return
                    tokens = 0
                elif outlet.closed():
                    return

        return work

    def _windows(self, encoding: Any, index: int) -> list[list[int]]:
        """Return the token ids of each window of a text that is embedded; refuse a text that is too long."""
        if len(encoding.ids) > self._max_tokens:
            raise InvalidRequest(
                f"Input {index} has {len(encoding.ids)} tokens; this model takes up to {self._max_tokens},"
                " so shorten it",
                param="input",
                code="context_length_exceeded",
            )
        rest = encoding.overflowing if self._averages else ()
        return [list(each.ids) for each in (encoding, *rest)]


class _WindowMean:
    """Combines the vectors of consecutive windows into one vector for each text.

    Args:
        counts: how many windows each text has, in order; 1 at least.
    """

    def __init__(self, counts: list[int]) -> None:
        self._counts = iter(counts)
        # Windows of the current text that are still missing, and the weighted sum of those that have come.
        self._missing = 0
        self._sum: Any = None

    def add(self, vectors: Any, weights: Any) -> list[Any]:
        """Take the next windows.

        Args:
            vectors: their vectors, of length 1, in the shape (windows, dimensions).
            weights: the tokens of each.

        Returns:
            The vectors of the texts that are complete with them.
        """
        import numpy as np

        complete = []
        for vector, weight in zip(vectors, weights, strict=True):
            if self._missing == 0:
                self._missing = next(self._counts)
                if self._missing == 1:
                    # A text in one window keeps its vector, to the last bit.
                    self._missing = 0
                    complete.append(vector)
                    continue
                self._sum = np.zeros_like(vector)
            self._sum = self._sum + vector * weight
            self._missing -= 1
            if self._missing == 0:
                complete.append(self._sum / np.linalg.norm(self._sum))
        return complete
