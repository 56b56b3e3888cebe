"""Ends a training and everything it started when its launcher is gone, however that ended."""

from __future__ import annotations

import os
import signal
import threading

#: A file descriptor whose other end only the launcher holds: it reads as closed when the launcher is gone.
LIFELINE_VARIABLE = "F3RM_VERIFY_LIFELINE"


def watch_launcher() -> None:
    """Starts a daemon thread that kills this process group when the launcher's end of the lifeline closes.

    Does nothing in a process that was not launched by us, or is not the leader of its group (a rank, a worker: they
    belong to a group that is killed as a whole).
    """
    descriptor = os.environ.get(LIFELINE_VARIABLE, "")
    if not descriptor.isdigit() or os.getpgrp() != os.getpid():
        return

    def wait() -> None:
        try:
            while os.read(int(descriptor), 1):
                continue
        except OSError:
            return  # no such descriptor: not our launcher's child after all
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, name="f3rm-verify-lifeline", daemon=True).start()
