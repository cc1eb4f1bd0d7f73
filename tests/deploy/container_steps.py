"""The steps of a Containerfile, read, and run one by one where there is no container engine.

Theory of operation
===================

A stage is a folder, the upper one of an overlay over this machine's own root; so this machine, with the Python that
runs the tests, plays the base image. RUN is a process in namespaces of its own, whose root is that overlay; COPY writes
into the folder. A container is the same with what an engine does at its start: the overlay is read-only, the process is
number 1 of its PID namespace, it has the user and the environment of the image and no capability, and a network of its
own. So what depends on the kernel is as in a container: who may write where, which signals process 1 gets, what a name
of a network is. What is not tried is the base image itself: its programs and libraries.

This takes root.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import patience

__all__ = [
    "Image",
    "Network",
    "Step",
    "build",
    "ignored",
    "open_network",
    "parse_containerfile",
    "run_container",
    "why_not",
]

_KEYWORDS = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "STOPSIGNAL", "USER", "WORKDIR",
}  # fmt: skip
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@attrs.frozen
class Step:
    """One instruction.

    Attributes:
        keyword: in capitals.
        options: what stands before the arguments as ``--name=value``.
        words: the arguments: of the JSON form as they are, of RUN in the form of the shell one word, otherwise those
            that a shell would see.
        line: where it begins.
    """

    keyword: str
    options: dict[str, str]
    words: list[str]
    line: int


@attrs.define
class Image:
    """A stage that was built.

    Attributes:
        files: what differs from the base.
        environment: of its processes.
        arguments: of the build, as far as the stage has named them.
        user: uid and gid.
        directory: in which processes start.
        entrypoint: begins the command.
        command: the rest, unless a container has another one.
        health: the options of the health check and its command.
        stop_signal: ends the process.
        ports: that are exposed.
    """

    files: Path
    environment: dict[str, str] = attrs.field(factory=lambda: {"PATH": _PATH})
    arguments: dict[str, str] = attrs.field(factory=dict)
    user: tuple[int, int] = (0, 0)
    directory: str = "/"
    entrypoint: list[str] = attrs.field(factory=list)
    command: list[str] = attrs.field(factory=list)
    health: tuple[dict[str, str], list[str]] | None = None
    stop_signal: str = "SIGTERM"
    ports: list[int] = attrs.field(factory=list)


def parse_containerfile(text: str) -> list[Step]:
    """Return the instructions of a Containerfile.

    Raises:
        ValueError: there is something in it that is not understood.
    """
    steps = []
    pending = ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (not line.strip() and not pending):
            continue
        if not pending:
            begin = number
        if line.endswith("\\"):
            pending += line[:-1] + " "
            continue
        steps.append(_parse_step(pending + line, begin))
        pending = ""
    if pending:
        raise ValueError(f"line {begin}: it does not end")
    return steps


def _parse_step(text: str, line: int) -> Step:
    keyword, _, rest = text.strip().partition(" ")
    keyword, rest = keyword.upper(), rest.strip()
    if keyword not in _KEYWORDS:
        raise ValueError(f"line {line}: {keyword} is not understood")
    options = {}
    while found := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
        options[found[1]] = found[2]
        rest = rest[found.end() :]
    if keyword == "HEALTHCHECK":
        word, _, rest = rest.partition(" ")
        if word != "CMD":
            raise ValueError(f"line {line}: HEALTHCHECK {word}")
        rest = rest.strip()
    if rest.startswith("["):
        words = json.loads(rest)
    elif keyword == "RUN":
        words = [rest]
    elif keyword in ("CMD", "ENTRYPOINT", "HEALTHCHECK"):
        raise ValueError(f"line {line}: the form of the shell gives signals to a shell")
    else:
        words = shlex.split(rest)
    return Step(keyword, options, words, line)


def ignored(path: str, patterns: Sequence[str]) -> bool:
    """Return whether a file of the context is left out by a ``.dockerignore``: the last pattern that fits decides."""
    left_out = False
    parents = [path, *map(str, Path(path).parents)][:-1]
    for pattern in patterns:
        pattern = pattern.strip()
        if not pattern or pattern.startswith("#"):
            continue
        wanted = pattern.startswith("!")
        pattern = pattern.removeprefix("!").strip("/")
        anywhere = pattern.startswith("**/")
        for each in parents:
            name = each.rsplit("/", 1)[-1] if anywhere else each
            pure = pattern.removeprefix("**/")
            if name.count("/") == pure.count("/") and fnmatch.fnmatchcase(name, pure):
                left_out = not wanted
                break
    return left_out


def why_not() -> str | None:
    """Return why steps cannot be run here, or ``None``."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "the steps of a Containerfile are run by root, on Linux"
    missing = [
        name for name in ("unshare", "nsenter", "setpriv", "chroot", "ip") if shutil.which(name) is None
    ]
    if missing:
        return f"{', '.join(missing)} is not installed"
    if subprocess.run(
        ["unshare", "--mount", "--pid", "--net", "--fork", "true"], capture_output=True
    ).returncode:
        return "this system lets even root have no namespaces"
    return None


def build(
    steps: Sequence[Step], context: Path, ignore: Sequence[str], place: Path, arguments: Mapping[str, str]
) -> Image:
    """Run the steps, and return the last stage.

    Args:
        steps: of the Containerfile.
        context: the folder that COPY takes files from.
        ignore: the patterns of its ``.dockerignore``.
        place: an empty folder.
        arguments: those of ``--build-arg``.
    """
    images: dict[str, Image] = {}
    given: dict[str, str] = {}
    image: Image | None = None
    for step in steps:
        if image is None and step.keyword not in ("ARG", "FROM"):
            raise ValueError(f"line {step.line}: {step.keyword} before FROM")
        if step.keyword == "FROM":
            name = step.words[2] if len(step.words) == 3 else str(len(images))
            image = images[name] = Image(_new_stage(place / name))
        elif step.keyword == "ARG":
            name, _, value = step.words[0].partition("=")
            (given if image is None else image.arguments)[name] = arguments.get(name, value)
        else:
            assert image is not None
            _take(step, image, images, context, ignore)
    assert image is not None
    return image


def _new_stage(folder: Path) -> Path:
    """Return the files of a new stage: the Python of the tests is to be one for every user."""
    files = folder / "files"
    files.mkdir(parents=True)
    for parent in reversed(Path(sys.base_prefix).resolve().parents):
        if parent.stat().st_mode & 0o055 != 0o055:
            (files / parent.relative_to("/")).mkdir(parents=True, exist_ok=True)
            (files / parent.relative_to("/")).chmod(0o755)
    return files


def _take(
    step: Step, image: Image, images: Mapping[str, Image], context: Path, ignore: Sequence[str]
) -> None:
    environment = {**image.arguments, **image.environment}
    words = [string.Template(word).safe_substitute(environment) for word in step.words]
    match step.keyword:
        case "ENV":
            image.environment |= dict(word.split("=", 1) for word in words)
        case "WORKDIR":
            image.directory = words[0]
            (image.files / words[0].lstrip("/")).mkdir(parents=True, exist_ok=True)
        case "USER":
            uid, gid = words[0].split(":")
            image.user = int(uid), int(gid)
        case "EXPOSE":
            image.ports = [int(word) for word in words]
        case "STOPSIGNAL":
            image.stop_signal = words[0]
        case "ENTRYPOINT":
            image.entrypoint = step.words
        case "CMD":
            image.command = step.words
        case "HEALTHCHECK":
            image.health = step.options, step.words
        case "COPY":
            _copy(step, words, image, images, context, ignore)
        case "RUN":
            command = step.words if len(step.words) > 1 else ["/bin/sh", "-c", step.words[0]]
            pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
            ran = subprocess.run(
                _inside(image, command, {**pip, **environment, "HOME": "/root"}),
                capture_output=True,
                text=True,
                timeout=1200,
            )
            if ran.returncode:
                raise AssertionError(f"line {step.line}: {step.words[0]}\n{ran.stdout}{ran.stderr}")


def _copy(
    step: Step,
    words: Sequence[str],
    image: Image,
    images: Mapping[str, Image],
    context: Path,
    ignore: Sequence[str],
) -> None:
    *sources, target = words
    place = image.files / os.path.join(image.directory, target).lstrip("/")
    for source in sources:
        if (stage := step.options.get("from")) is not None:
            origin = images[stage].files / source.lstrip("/")
            left_out = None
        else:
            origin = context / source

            def left_out(folder: str, names: list[str]) -> list[str]:
                inside = Path(folder).relative_to(context)
                return [name for name in names if ignored(str(inside / name), ignore)]

            assert not ignored(os.path.normpath(source), ignore), f"{source} is not in the context"
        if origin.is_dir():
            shutil.copytree(origin, place, symlinks=True, ignore=left_out, dirs_exist_ok=True)
        else:
            into = place / origin.name if target.endswith("/") else place
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(origin, into)


def _inside(
    image: Image,
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    binds: Mapping[str, Path] | None = None,
    tmpfs: Sequence[str] = ("/tmp",),
    as_container: bool = False,
    network: Network | None = None,
) -> list[str]:
    """Return a command that runs another one with the files of an image as its root.

    Args:
        image: the image.
        command: what is run.
        environment: its whole environment.
        binds: files and folders of this machine, by where they are mounted.
        tmpfs: where empty file systems are mounted.
        as_container: as the user of the image, read-only, and without capabilities.
        network: whose network it has; ``None``: that of this process.
    """
    top, upper = image.files.parent, image.files
    if as_container:
        # Mount points are made in it before it is read-only, and an upper folder has one overlay at a time.
        top = Path(tempfile.mkdtemp(dir=top))
        upper = top / "files"
        subprocess.run(["cp", "-al", image.files, upper], check=True)
    for name in ("work", "root"):
        (top / name).mkdir(exist_ok=True)
    root = top / "root"
    lines = [
        "set -eu",
        f"mount -t overlay overlay -o lowerdir=/,upperdir={upper},workdir={top / 'work'} {root}",
        f"mount -t proc proc {root}/proc",
        f"mount --rbind /dev {root}/dev",
    ]
    # This machine's own files are no part of the image.
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {root}{folder}" for folder in ("/home", "/tmp", "/run")]
    lines += [f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp"] if "/tmp" in tmpfs else []
    # As in the images of Python: it is in /usr/local.
    if sys.base_prefix not in ("/usr", "/usr/local"):
        lines.append(f"mount --bind {sys.base_prefix} {root}/usr/local")
    for target, source in (binds or {}).items():
        make = "mkdir -p" if source.is_dir() else "touch"
        lines.append(f"mkdir -p {root}{Path(target).parent}")
        lines.append(f"{make} {root}{target}")
        lines.append(f"mount --bind {source} {root}{target}")
    words = ["env", "-i", *(f"{name}={value}" for name, value in environment.items()), *command]
    if as_container:
        lines.append(f"mount -o remount,ro {root}")
        uid, gid = image.user
        words = [
            "setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs", "--bounding-set=-all",
            "--inh-caps=-all", "--ambient-caps=-all", "--", *words,
        ]  # fmt: skip
    shell = f"cd {image.directory} && exec {shlex.join(words)}"
    lines.append(f"exec chroot {root} /bin/sh -c {shlex.quote(shell)}")
    namespaces = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
    script = [*namespaces, "/bin/sh", "-c", "\n".join(lines)]
    return script if network is None else [*network.enter, *script]


@attrs.frozen
class Network:
    """A network with nothing but the loopback interface, which several containers share.

    Attributes:
        enter: the beginning of a command that runs another one in it.
    """

    enter: tuple[str, ...]


@contextlib.contextmanager
def open_network() -> Iterator[Network]:
    """Have a network for the length of a block."""
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"up\n"
        try:
            yield Network(("nsenter", f"--net=/proc/{holder.pid}/ns/net"))
        finally:
            holder.kill()


@attrs.define
class Container:
    """A container that runs.

    Attributes:
        pid: of its first process, as this machine sees it.
    """

    image: Image
    environment: Mapping[str, str]
    pid: int
    _process: subprocess.Popen[str]

    def execute(self, command: Sequence[str], *, user: tuple[int, int] | None = None) -> tuple[int, str]:
        """Run a command in it, as ``docker exec`` does; return the exit code and what it has printed."""
        uid, gid = user or self.image.user
        ran = subprocess.run(
            [
                "nsenter", f"--target={self.pid}", "--mount", "--net", "--pid", "--root", "--wd=/", "setpriv",
                f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs", "--bounding-set=-all", "--",
                "env", "-i", *(f"{name}={value}" for name, value in self.environment.items()), *command,
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )  # fmt: skip
        return ran.returncode, ran.stdout + ran.stderr

    def wait_until_healthy(self, command: Sequence[str], seconds: float = 60.0) -> None:
        """Run its health check until it succeeds."""
        watch = patience.Stopwatch()
        while (ran := self.execute(command))[0]:
            if self._process.poll() is not None:
                raise AssertionError(f"it has ended: {self.stop()}")
            assert watch.counted < seconds, ran
            time.sleep(0.2)

    def signal(self) -> None:
        """Send the image's signal for stopping to process 1."""
        os.kill(self.pid, getattr(signal, self.image.stop_signal))

    def stop(self, grace: float = 30.0) -> tuple[int, str]:
        """Wait until it has ended; return the exit code and the log.

        Raises:
            subprocess.TimeoutExpired: it has not ended in time.
        """
        out, _ = self._process.communicate(timeout=grace)
        return self._process.returncode, out


@contextlib.contextmanager
def run_container(
    image: Image,
    network: Network,
    *,
    command: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
    binds: Mapping[str, Path] | None = None,
    tmpfs: Sequence[str] = ("/tmp",),
) -> Iterator[Container]:
    """Run a container for the length of a block.

    Args:
        image: what is in it.
        network: whose network it has.
        command: in the place of the image's CMD.
        environment: in addition to the image's.
        binds: files and folders of this machine, by where they are mounted.
        tmpfs: where empty file systems are mounted.
    """
    given = {**image.environment, **(environment or {})}
    words = [*image.entrypoint, *(image.command if command is None else command)]
    process = subprocess.Popen(
        _inside(image, words, given, binds=binds, tmpfs=tmpfs, as_container=True, network=network),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield Container(image, given, _first_process(process), process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _first_process(outer: subprocess.Popen[str]) -> int:
    """Return the number that the first process of a PID namespace has on this machine."""
    watch = patience.Stopwatch()
    while watch.counted < 20 and outer.poll() is None:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.05)
    raise AssertionError(f"the container has not started: {outer.communicate()[0]}")
