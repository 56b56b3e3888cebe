"""Ends a training and everything it started when its launcher is gone, however that ended."""

from __future__ import annotations

import os
import signal
import threading

from f3rm_verify import launch_variables

_THREAD = "f3rm-verify-lifeline"


def lifeline_value(descriptor: int) -> str:
    """What the launcher puts into the variable for the pipe end that its child inherits."""
    return f"{descriptor}:{os.fstat(descriptor).st_ino}"


def watch_launcher() -> None:
    """Starts a daemon thread that kills this process group when the launcher's end of the lifeline closes.

    Does nothing in a process that was not launched by us, or is not the leader of its group (a rank, a worker: they
    belong to a group that is killed as a whole), or is watching already.
    """
    descriptor = _descriptor(os.environ.get(launch_variables.LIFELINE, ""))
    if descriptor is None or os.getpgrp() != os.getpid():
        return
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        return
    threading.Thread(target=_wait, args=(descriptor,), name=_THREAD, daemon=True).start()


def _descriptor(value: str) -> int | None:
    """The descriptor that `value` names, None where it is not our launcher's pipe."""
    try:
        descriptor, inode = map(int, value.split(":"))
        return descriptor if os.fstat(descriptor).st_ino == inode else None
    except (ValueError, OSError, OverflowError):
        return None


def _wait(descriptor: int) -> None:
    try:
        while os.read(descriptor, 1):
            continue
    except OSError:
        return  # closed under us, by somebody who closes every descriptor
    os.killpg(os.getpgrp(), signal.SIGKILL)
