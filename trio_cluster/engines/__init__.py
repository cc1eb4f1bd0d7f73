"""Ready-made handlers for real engines, each an optional extra, and the contract for more of them."""

from ._engine import (
    GROUP,
    Engine,
    LoadingEngine,
    ModelServer,
    Option,
    ServedModel,
    ServeSpec,
    boolean,
    fraction,
    loaded,
    not_loaded,
    parse_serve,
    read_serve,
    serve_engine,
    serve_on_demand,
    size,
    text,
    whole_number,
)
from ._threads import Outlet, ThreadStream
from .audio.container import AudioEncoder, decode_audio

__all__ = [
    "GROUP",
    "AudioEncoder",
    "Engine",
    "LoadingEngine",
    "ModelServer",
    "Option",
    "Outlet",
    "ServeSpec",
    "ServedModel",
    "ThreadStream",
    "boolean",
    "decode_audio",
    "fraction",
    "loaded",
    "not_loaded",
    "parse_serve",
    "read_serve",
    "serve_engine",
    "serve_on_demand",
    "size",
    "text",
    "whole_number",
]
