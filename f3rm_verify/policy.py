"""Which artefacts a verdict requires, and what is ignored, each with its reason."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from f3rm_verify.difference import ARTEFACTS, CONDITIONS
from f3rm_verify.errors import UsageError

#: TensorBoard tags that differ between two equal trainings by nature (patterns as in fnmatch).
IGNORED_TAGS: Mapping[str, str] = {
    "*(time)*": "a duration",
    "*Rays / Sec*": "a speed",
    "*num_rays_per_sec*": "a speed",
    "*fps*": "a speed",
    "*Memory (MB)*": "memory use",
    "config/*": "the configuration as text; setup compares it as data",
}
#: Metrics of an evaluation that differ by nature.
IGNORED_METRICS: Mapping[str, str] = {"num_rays_per_sec*": "a speed", "fps*": "a speed"}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """`required`: artefacts that must be there and identical; None means: whatever either side has."""

    required: tuple[str, ...] | None = None
    ignored_tags: Mapping[str, str] = field(default_factory=lambda: dict(IGNORED_TAGS))
    ignored_metrics: Mapping[str, str] = field(default_factory=lambda: dict(IGNORED_METRICS))

    def check(self) -> None:
        """Raises UsageError for a policy that no training could fail."""
        if self.required is not None:
            unknown = sorted(set(self.required) - set(ARTEFACTS))
            if unknown:
                raise UsageError(f"The policy requires {', '.join(unknown)}; there are only {', '.join(ARTEFACTS)}.")
            if not set(self.required) - set(CONDITIONS):
                raise UsageError("The policy requires nothing that a training puts out; require at least its curves.")
        for patterns in (self.ignored_tags, self.ignored_metrics):
            for pattern in patterns:
                if not pattern.strip("*"):
                    raise UsageError(f"The policy ignores everything, by the pattern {pattern!r}; name what to ignore.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the result file."""
        return {
            "required": None if self.required is None else list(self.required),
            "ignored_tags": dict(self.ignored_tags),
            "ignored_metrics": dict(self.ignored_metrics),
        }


#: What `run` requires. The trace comes with the flight recorder.
RUN_POLICY = Policy(required=tuple(name for name in ARTEFACTS if name != "trace"))
DIFF_POLICY = Policy(required=None)


def reason_to_ignore(name: str, patterns: Mapping[str, str]) -> str | None:
    """Why `name` is ignored, None where it is not."""
    return next((reason for pattern, reason in patterns.items() if fnmatch.fnmatchcase(name, pattern)), None)
