"""A model for llama.cpp, made on the spot: two layers of random weights, with single bytes as tokens.

Its output is noise; everything around it is real.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_tiny_model"]


def write_tiny_model(path: Path, *, context: int = 2048, reads: int | None = None) -> None:
    """Write the model to a file; needs gguf.

    Args:
        path: the file.
        context: how many tokens a prompt and its answer may have.
        reads: how many characters of each message are in the prompt; ``None``: all.
    """
    import gguf
    import numpy as np

    width, layers, heads, feed = 64, 2, 4, 128
    alphabet = [chr(c) if 33 <= c <= 126 or 161 <= c <= 172 or 174 <= c <= 255 else None for c in range(256)]
    # The byte-level alphabet: bytes that are not printable are represented by the code points from 256 on.
    unseen = iter(range(256, 512))
    tokens = [each or chr(next(unseen)) for each in alphabet] + ["<|end|>"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL])
    writer.add_token_merges([f"{tokens[97]} {tokens[98]}"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(256)
    content = "m['content']" if reads is None else f"(m['content'] or '')[:{reads}]"
    writer.add_chat_template(
        f"{{% for m in messages %}}{{{{ m['role'] }}}}: {{{{ {content} }}}}\n{{% endfor %}}assistant:"
    )
    random = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.3).astype(np.float32))

    tensor("token_embd.weight", len(tokens), width)
    tensor("output_norm.weight", width)
    tensor("output.weight", len(tokens), width)
    for layer in range(layers):
        for name, shape in {
            "attn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (width, width),
            "attn_v": (width, width),
            "attn_output": (width, width),
            "ffn_norm": (width,),
            "ffn_gate": (feed, width),
            "ffn_up": (feed, width),
            "ffn_down": (width, feed),
        }.items():
            tensor(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
