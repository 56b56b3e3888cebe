"""How a training process ends for a reason that a person can mend; the launcher finds the sentence in its log."""

from __future__ import annotations

import sys
from typing import NoReturn


def refuse(sentence: str) -> NoReturn:
    """Ends the process with one sentence. No exception: nerfstudio would swallow it, or print a stack of frames."""
    print(f"f3rm-verify: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)
