"""llama.cpp's own HTTP server as a process, which says where it listens and ends with its standard input.

python llama_upstream.py MODEL.gguf
"""

from __future__ import annotations

import sys

import xllamacpp


def main(path: str) -> None:
    """Load the model, and serve it."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.model_alias = {"smollm2"}
    parameters.n_parallel = 4
    parameters.n_ctx = 4 * 1024
    # A prompt is given up between two batches, so they are small.
    parameters.n_batch = parameters.n_ubatch = 64
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.endpoint_slots = True
    parameters.warmup = False
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()


main(sys.argv[1])
