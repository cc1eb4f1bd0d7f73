"""A machine that gets another address: the kernel says so, and a connection that has fallen silent is left at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

PROGRAM = Path(__file__).with_name("moving_machine.py")


def test_a_new_address_makes_a_worker_try_a_second_connection() -> None:
    if os.geteuid() or not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("network namespaces need root, and the programs `unshare` and `ip`")
    if subprocess.run(["unshare", "-n", "ip", "link"], capture_output=True).returncode:
        pytest.skip("this machine has no network namespaces for us")
    command = ["unshare", "-n", sys.executable, str(PROGRAM)]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TRIO_CLUSTER_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
    assert (done.stdout, done.stderr) == ("before\nafter 2\n", "")
