"""What makes a node a service of its machine: units of systemd, and property lists of launchd.

Theory of operation
===================

:class:`Service` says what is to run, and everything here turns it into the text of files. Nothing is read or written.

*The master of systemd* has its ports in a unit of their own (``.socket``), so that they stay open while the service is
restarted: clients that connect meanwhile wait. Its reload is ``trio-cluster replace``: a new process takes the place of
the running one. That is what an administrator wants of a reload, since it takes everything that a start would take (a
new version, the file of options, certificates) without refusing or cutting a request, or nothing of it: if the new
process fails, the old one goes on, and the reload has failed. What ``trio-cluster reload`` does is less, since TLS,
engines and a new version need a restart; it is still there, and needs no unit. A worker, and a master of several
processes, cannot be taken over; their reload is SIGHUP, which reads the file of options, if there is one.

*Stopping* is ``KillMode=mixed``: SIGTERM for the main process only, which finishes its requests. The model servers
below it are needed for that.

*The watchdog* is served by the event loop (``net/service_manager.py``). On a node with models, a handler may block the
loop for as long as a model may be silent; so it is longer than that there.

*The sandbox* takes away what a node does not need; ``systemd-analyze security`` says what that is worth. Models need
more than a master without any: devices for GPUs, memory that is written and executed for just-in-time compilers, and
what there is in ``/proc``. A user's service manager cannot give most of it, so units for it have only what it can.

*Secrets* are never in a unit, which everybody may read. Each is in a file for its owner only, which systemd passes on
as a credential. It is named by ``${CREDENTIALS_DIRECTORY}`` in the command, so that a version of systemd that does not
know credentials starts no node without a key.
"""

from __future__ import annotations

import hashlib
import math
import plistlib
import re
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import attrs

from ..net.sockets import shown_address

__all__ = ["Service", "is_as_written", "launchd_plist", "systemd_units", "with_checksum"]

#: Seconds that a node may need to end, beside those for its requests.
_END_TIME: Final = 15

#: What is taken from every node of the system's manager.
_SANDBOX: Final = """\
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
PrivateMounts=yes
PrivateTmp=yes
PrivateUsers=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
KeyringMode=private
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM
UMask=0077
LimitCORE=0
"""

#: What the manager of a user can do.
_USER_SANDBOX: Final = """\
NoNewPrivileges=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
UMask=0077
LimitCORE=0
"""

_NO_MODELS: Final = """\
# Without models there are no devices to reach, no code is made at run time, and /proc is not read.
PrivateDevices=yes
DevicePolicy=closed
MemoryDenyWriteExecute=yes
ProcSubset=pid
"""

_MODELS: Final = """\
# For GPUs. A line whose device is not there does nothing. A driver that is loaded later than this service (NVIDIA
# loads nvidia-uvm at the first use) is found after `nvidia-modprobe -u -c 0` at boot, or after a restart. Take out
# what is not needed; without a GPU, put PrivateDevices=yes in the place of all.
DevicePolicy=closed
DeviceAllow=char-nvidia* rw
DeviceAllow=/dev/kfd rw
DeviceAllow=char-drm rw
# AMD and Intel: SupplementaryGroups=render video
# Just-in-time compilers of models write code and run it: MemoryDenyWriteExecute= must stay off.
# The machine's memory is read in /proc: ProcSubset= must stay off.
"""


@attrs.frozen(kw_only=True)
class Service:
    """A node as a service."""

    name: str
    """of the units"""
    node: Literal["master", "worker"]
    program: Sequence[str]
    """what stands in front of the arguments of the node"""
    arguments: Sequence[str]
    """without secrets"""
    made_by: str
    """the command that writes the files, for people"""
    secrets: Mapping[str, str] = attrs.field(factory=dict)
    """the files with secrets, by the name of the option"""
    join_file: str | None = None
    """a file ``JOIN=TOKEN`` with the invitation of a worker"""
    is_user: bool = False
    """for the manager of a user, and not of the system"""
    run_as: str | None = None
    """the user; ``None``: one that is made for it"""
    has_models: bool = True
    """whether this process may have models of its own"""
    can_be_replaced: bool = False
    """whether another process can take its place"""
    has_config: bool = False
    """whether there is a file of options to read again"""
    listens: Sequence[tuple[str, int]] = ()
    """the addresses of a master"""
    port: int = 0
    """of the API of a master"""
    state_dir: str | None = None
    """that the user has named; ``None``: the service has one of its own"""
    directory: str | None = None
    """in which it runs"""
    shows_home: bool = False
    """whether something that it needs is in somebody's home directory"""
    drain_timeout: float = 30.0
    watchdog: float | None = None
    """seconds; ``None``: none"""
    has_guardian: bool = False
    """whether a second process tells the masters when this one dies"""


def with_checksum(text: str, made_by: str, *, xml: bool = False) -> str:
    """Return the text of a file with a heading that says where it is from, and whether it was changed."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    lines = [
        f"Written by: {' '.join(made_by.split())}",
        f"If this file is changed, it is not written again without --force. {digest}",
    ]
    if xml:
        # Two dashes may not be in a comment.
        head = "".join(f"<!-- {line.replace('--', '- -')} -->\n" for line in lines)
        declaration, rest = text.split("\n", 1)
        return f"{declaration}\n{head}{rest}"
    return "".join(f"# {line}\n" for line in lines) + text


def is_as_written(text: str) -> bool:
    """Tell whether a file is one of ours that was not changed since."""
    found = re.search(r"^(?:#|<!--) If this file is changed, .*? ([0-9a-f]{32})(?: -->)?$", text, re.M)
    if found is None:
        return False
    lines = text.splitlines(keepends=True)
    own = ("# Written by: ", "# If this file is changed", "<!-- Written by: ", "<!-- If this file is changed")
    rest = "".join(line for line in lines if not line.startswith(own))
    return hashlib.sha256(rest.encode()).hexdigest()[:32] == found[1]


def systemd_units(service: Service) -> dict[str, str]:
    """Return the units of a service: the text of each by its name."""
    units = {f"{service.name}.service": _service_unit(service)}
    if service.listens:
        units[f"{service.name}.socket"] = _socket_unit(service)
    return {name: with_checksum(text, service.made_by) for name, text in units.items()}


def _socket_unit(service: Service) -> str:
    addresses = "".join(f"ListenStream={shown_address(*address)}\n" for address in service.listens)
    return f"""\
[Unit]
Description=Ports of trio_cluster, {service.name}

[Socket]
{addresses}BindIPv6Only=ipv6-only
FreeBind=yes
Backlog=4096

[Install]
WantedBy=sockets.target
"""


def _service_unit(service: Service) -> str:
    name = service.name
    arguments = [*service.arguments]
    state = f"%S/{name}" if service.state_dir is None else service.state_dir
    arguments += ["--state-dir", state]
    words = [_quoted(word) for word in (*service.program, service.node)]
    # What systemd itself fills in is not quoted by us.
    words += [word if word == f"%S/{name}" else _quoted(word) for word in arguments]
    for option, file in service.secrets.items():
        # A user's own manager has nothing to pass on: the file is the user's.
        given = _quoted(file) if service.is_user else f"${{CREDENTIALS_DIRECTORY}}/{option}"
        words += [f"--{option.replace('_', '-')}-file", given]
    if service.join_file is not None:
        words += ["--join", "${JOIN}"]
    unit = ["[Unit]", f"Description=trio_cluster {service.node}, {name}"]
    unit += ["After=network-online.target", "Wants=network-online.target"]
    if service.listens:
        unit += [f"Requires={name}.socket", f"After={name}.socket"]
    # One that fails tries again for ever, every few seconds: what it needs may be away for hours. But a connection to
    # its ports starts it again at once, however it has failed.
    limit = (
        ["StartLimitIntervalSec=60", "StartLimitBurst=25"] if service.listens else ["StartLimitIntervalSec=0"]
    )
    unit += limit
    lines = ["", "[Service]", "Type=notify", "NotifyAccess=main", f"ExecStart={' '.join(words)}"]
    if service.can_be_replaced:
        program = " ".join(map(_quoted, service.program))
        shown = state if service.state_dir is None else _quoted(state)
        lines += [
            "# A new process takes the place of this one, without a gap. To read the file of options only:",
            "# trio-cluster reload, or systemctl kill -s HUP --kill-whom=main.",
            f"ExecReload={program} replace {service.port} --state-dir {shown}",
        ]
    elif service.has_config:
        lines += ["ExecReload=/bin/kill -HUP $MAINPID"]
    if service.has_guardian:
        # $MAINPID is not set if it is the end of the process that stops the service.
        lines += [
            "# A worker that dies has a guardian, which tells the masters. It has a moment before it is killed.",
            "ExecStop=/bin/sh -c 'test -n \"$$MAINPID\" || sleep 1'",
        ]
    lines += ["Restart=on-failure", "RestartSec=3"]
    lines += ["# Wrong usage, which does not get right by itself.", "RestartPreventExitStatus=2"]
    lines += ["TimeoutStartSec=15min", f"TimeoutStopSec={_seconds(service.drain_timeout + _END_TIME)}"]
    if service.watchdog is not None:
        lines += [f"WatchdogSec={_seconds(service.watchdog)}"]
    lines += ["# The programs of models are needed until their requests are done.", "KillMode=mixed"]
    if service.has_models:
        lines += [
            "# A program of a model that runs out of memory is not the end of the node.",
            "OOMPolicy=continue",
        ]
    lines += ["LimitNOFILE=65536"]
    lines += ["# A stuck process that is ended writes down where it was.", "Environment=PYTHONFAULTHANDLER=1"]
    if service.directory is not None:
        lines += [f"WorkingDirectory={_path(service.directory)}"]
    if not service.is_user:
        lines += [f"LoadCredential={option}:{_path(file)}" for option, file in service.secrets.items()]
    if service.join_file is not None:
        lines += [f"EnvironmentFile={_path(service.join_file)}"]
    if service.state_dir is None:
        lines += [f"StateDirectory={name}", "StateDirectoryMode=0700"]
    elif not service.is_user:
        lines += [f"ReadWritePaths={_path(service.state_dir)}"]
    if service.has_models:
        lines += [f"CacheDirectory={name}", f"Environment=TRIO_CLUSTER_CACHE=%C/{name}"]
        if not service.is_user:
            lines += [f"Environment=HOME=%C/{name} XDG_CACHE_HOME=%C/{name}"]
    lines += [""]
    if service.is_user:
        lines += _USER_SANDBOX.splitlines()
    else:
        lines += ["DynamicUser=yes"] if service.run_as is None else [f"User={service.run_as}"]
        lines += [f"ProtectHome={'read-only' if service.shows_home else 'yes'}"]
        lines += _SANDBOX.splitlines()
        lines += (_MODELS if service.has_models else _NO_MODELS).splitlines()
    target = "default.target" if service.is_user else "multi-user.target"
    return "\n".join([*unit, *lines, "", "[Install]", f"WantedBy={target}", ""])


def launchd_plist(service: Service, log: str) -> str:
    """Return the property list of a service.

    Args:
        service: what is to run.
        log: the file for its log.
    """
    command = [*service.program, service.node, *service.arguments]
    for option, file in service.secrets.items():
        command += [f"--{option.replace('_', '-')}-file", file]
    if service.state_dir is not None:
        command += ["--state-dir", service.state_dir]
    content: dict[str, object] = {
        "Label": service.name,
        "ProgramArguments": command,
        "RunAtLoad": True,
        # Started again unless it has ended as it was asked to.
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 5,
        "ExitTimeOut": math.ceil(min(service.drain_timeout, 86_400) + _END_TIME),
        # Neither slowed down nor put to sleep, as background processes are.
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"NumberOfFiles": 65536},
        "HardResourceLimits": {"NumberOfFiles": 65536},
        "Umask": 0o77,
        "EnvironmentVariables": {"PYTHONFAULTHANDLER": "1"},
        "StandardErrorPath": log,
        "StandardOutPath": log,
    }
    if service.run_as is not None:
        content["UserName"] = service.run_as
    if service.directory is not None:
        content["WorkingDirectory"] = service.directory
    return with_checksum(plistlib.dumps(content, sort_keys=False).decode(), service.made_by, xml=True)


def _seconds(seconds: float) -> str:
    return "infinity" if math.isinf(seconds) else str(math.ceil(seconds))


def _quoted(word: str) -> str:
    """Return a word of a command of systemd: ``%`` and ``$`` mean themselves."""
    word = word.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[\w@%+=:,./$-]+", word, re.ASCII):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def _path(path: str) -> str:
    """Return a path as a value of systemd."""
    return path.replace("%", "%%")
