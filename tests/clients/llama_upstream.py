"""llama.cpp's own HTTP server as a process, which says where it listens and ends with its standard input.

python llama_upstream.py MODEL.gguf [--slots N] [--context TOKENS] [--batch TOKENS] [--longest TOKENS]
"""

from __future__ import annotations

import argparse
import sys

import xllamacpp


def main() -> None:
    """Load the model, and serve it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024, help="of each slot")
    # A prompt is given up between two batches, so they are small.
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--longest", type=int, default=-1, help="how long an answer may be; -1: as it likes")
    arguments = parser.parse_args()
    parameters = xllamacpp.CommonParams()
    parameters.model.path = arguments.model
    parameters.model_alias = {"smollm2"}
    parameters.n_parallel = arguments.slots
    parameters.n_ctx = arguments.slots * arguments.context
    parameters.n_batch = parameters.n_ubatch = arguments.batch
    parameters.n_predict = arguments.longest
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.endpoint_slots = True
    parameters.warmup = False
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()


main()
