"""Makes a saved config.yml look as if it came from before this package."""

from __future__ import annotations

import re
from pathlib import Path

_OURS = re.compile(r"^(?:enable_comprehensive_seeding|encoding|print_seed_info|seed_\w+): .*\n", re.MULTILINE)


def as_from_before(config: Path, **changes: str) -> str:
    """The text of one that our trainer wrote, with nerfstudio's own trainer; `changes` are of top-level values."""
    text = _OURS.sub("", config.read_text("utf8"))
    for ours, theirs in (("f3rm_verify.f3rm.trainer.F3RMTrainer", "nerfstudio.engine.trainer.Trainer"),):
        text = text.replace(f"{ours}Config\n", f"{theirs}Config\n").replace(f"{ours} ''", f"{theirs} ''")
    for name, value in changes.items():
        text, found = re.subn(rf"^{name}: .*$", f"{name}: {value}", text, flags=re.MULTILINE)
        text += "" if found else f"{name}: {value}\n"
    return text
