"""Coverage-guided fuzzing with atheris: ``python tests/fuzz TARGET [SECONDS]``; ``nox -s fuzz`` runs all targets.

A target is a module of this folder with a function ``check``, which raises an exception for an input that is a finding,
and a list of ``SEEDS`` to begin with. New inputs that reach new code are kept in ``build/fuzz/TARGET``, where the next
run begins, and findings beside them, as ``build/fuzz/TARGET-crash-...``. ``python tests/fuzz TARGET --replay FILE``
repeats one, without atheris. Mended, it is added to the ``FINDINGS`` of its target, which the tests check each time.

What costs too much CPU time here may only do so since every branch is counted. So it is repeated in a process without
that, and only what is too slow there is a finding.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

TARGETS: Final = ("http", "websocket", "messages", "sessions", "requests")
#: Bytes of an input, without repetitions.
_INPUT_MAX: Final = 8192
_MEMORY_MAX: Final = 2048  # MiB
#: Seconds that one input may take, all checks included, before it counts as a hang.
_HANG: Final = 60

_FOLDER: Final = Path(__file__).resolve().parent


def _module(target: str) -> Any:
    # The folder with what tests share.
    sys.path[:0] = [str(_FOLDER), str(_FOLDER.parent)]
    return importlib.import_module(f"fuzz_{target}")


def _replay(target: str, file: Path) -> None:
    _module(target).check(file.read_bytes())


def _confirmed(target: str, data: bytes) -> bool:
    """Return whether an input is a finding in a process that counts no branches."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        replay = [sys.executable, str(_FOLDER), target, "--replay", file.name]
        return subprocess.run(replay, capture_output=True, check=False).returncode != 0


def _checked(target: str, check: Callable[[bytes], None]) -> Callable[[bytes], None]:
    from fuzz_input import Slowdown, TooSlow

    def check_one(data: bytes) -> None:
        try:
            check(data)
        except TooSlow:
            if _confirmed(target, data):
                raise
            Slowdown.factor *= 1.25

    return check_one


def _fuzz(target: str, seconds: int, folder: Path) -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed (it has wheels for some versions of Python and of Linux only)")

    with atheris.instrument_imports(include=["trio_cluster"]):
        module = _module(target)
    corpus = folder / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate([*module.SEEDS, *module.FINDINGS]):
        (corpus / f"seed-{number}").write_bytes(data)
    arguments = [
        sys.argv[0],
        str(corpus),
        f"-max_total_time={seconds}",
        f"-max_len={_INPUT_MAX}",
        f"-rss_limit_mb={_MEMORY_MAX}",
        f"-timeout={_HANG}",
        # Large inputs are rare, then.
        "-entropic_scale_per_exec_time=1",
        "-print_final_stats=1",
        f"-artifact_prefix={folder}/{target}-",
    ]
    print(f"fuzz: {target}, {seconds} s, from {time.strftime('%H:%M:%S')}", flush=True)
    atheris.Setup(arguments, _checked(target, module.check))
    atheris.Fuzz()


def main() -> None:
    """Run one target."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__.partition(":")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("seconds", type=int, nargs="?", default=180)
    parser.add_argument("--replay", type=Path, metavar="FILE", help="check one input, without atheris")
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"), help="for inputs and findings")
    arguments = parser.parse_args()
    if arguments.replay is not None:
        _replay(arguments.target, arguments.replay)
    else:
        _fuzz(arguments.target, arguments.seconds, arguments.folder)


if __name__ == "__main__":
    main()
