"""What nerfstudio loads when it looks for methods. Never raises, and yields to another installed provider of `f3rm`.

nerfstudio loads entry points outside any `try`, so one that raises breaks every `ns-*` command. Of two that give one
method name, the one that comes later in the iteration of a set wins, which depends on the hash seed: so where another
package provides `f3rm`, this entry point gives nerfstudio that package's own method, and it does not matter who wins.
"""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

METHOD = "f3rm"
GROUP = "nerfstudio.method_configs"
#: Our own name in the group; unlike `f3rm`, so that it never hides another package's entry point of that name.
ENTRY_POINT = "f3rm-verify-f3rm"


def other_provider() -> Any:
    """Another installed package's specification of the method `f3rm`, None where there is none that can be loaded."""
    points = sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name != METHOD, point.name))
    for point in points:
        if point.name == ENTRY_POINT:
            continue
        try:
            specification = point.load()
        except (Exception, SystemExit):  # another package's failure is nerfstudio's to report
            continue
        if getattr(getattr(specification, "config", None), "method_name", None) == METHOD:
            return specification
    return None


def discover() -> Any:
    """The specification of `f3rm`: another package's where one is installed, else ours, else None."""
    try:
        other = other_provider()
        if other is not None:
            return other
        from f3rm_verify.f3rm.f3rm_config import f3rm_method
    except (Exception, SystemExit) as error:
        # Without the training extra, or with a nerfstudio that our model does not know, there is no method of ours.
        _say(f"f3rm-verify: its method f3rm is not available here ({type(error).__name__}: {error}).")
        return None
    return f3rm_method


def _say(line: str) -> None:
    """On standard error, which can show every character, and where nothing that reads our output trips over it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass  # it is closed


method = discover()
