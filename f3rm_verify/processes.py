"""Process groups and signals: how a launcher ends what it started, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_POLL_SECONDS = 0.02
#: How long the leader of a group may take to end itself before the group is killed.
_GRACE_SECONDS = 5.0
#: How long to wait until the killed are gone.
_KILL_SECONDS = 5.0


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has ended; where the system can, without reaping it."""
    if sys.platform == "linux" and process.returncode is None:
        try:
            return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            pass
    return process.poll() is not None


def ask_groups_to_end(leaders: Sequence[subprocess.Popen[bytes]]) -> None:
    """Asks all groups at once, and returns when their leaders have ended or have had their time."""
    for leader in leaders:
        _signal_group(leader.pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    while not all(has_ended(leader) for leader in leaders) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def end_group(leader: subprocess.Popen[bytes]) -> int | None:
    """Kills what is left of the leader's process group, also workers of a dead leader, and waits until it is gone.

    The leader is reaped only afterwards: until then its number is nobody else's. Returns its exit code, None where
    it could not be killed (its driver or its disk hangs).
    """
    _signal_group(leader.pid, signal.SIGKILL)
    try:
        code = leader.wait(_KILL_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    deadline = time.monotonic() + _KILL_SECONDS
    while group_lives(leader.pid) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return code


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False  # nobody is left in it
    return True


def group_lives(group: int) -> bool:
    """Whether anybody in the group still runs; the dead whom nobody has reaped do not count."""
    if not _signal_group(group, 0):
        return False
    stats = list(Path("/proc").glob("[0-9]*/stat"))
    return not stats or any(_lives_in(stat, group) for stat in stats)


def _lives_in(stat: Path, group: int) -> bool:
    """Whether the process of this /proc/PID/stat is in the group and no zombie."""
    try:
        state, _, its_group = stat.read_text("utf8", "replace").rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return False  # it ended while we looked
    return int(its_group) == group and state not in "ZX"


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Notes Ctrl-C, SIGTERM and a closed terminal in the list that it yields, instead of dying of them.

    Nothing is raised from a handler: an exception between starting a process and taking note of it would lose it. A
    signal that is ignored stays ignored (nohup).
    """
    seen: list[signal.Signals] = []

    def note(number: int, _: FrameType | None) -> None:
        seen.append(signal.Signals(number))

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
        yield seen
    finally:
        for stopped, previous in before.items():
            signal.signal(stopped, signal.SIG_DFL if previous is None else previous)
