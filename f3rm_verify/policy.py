"""What a verdict requires, within which limits a difference is accepted, and what is ignored, each with its reason."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from f3rm_verify.bits import ValueLimits
from f3rm_verify.difference import ARTEFACTS, CONDITIONS, Difference, Verdict, worst
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
#: What every policy ignores, by artefact.
IGNORED: Mapping[str, Mapping[str, str]] = {"curves": IGNORED_TAGS, "metrics": IGNORED_METRICS}
#: Where limits can be set. Setup and seeding are conditions, and a trace is of digests, which know only equal.
LIMITED = ("curves", "metrics", "checkpoints", "renders")
#: Where things can be ignored.
IGNORABLE = ("setup", *LIMITED)
#: What stands for the source of a policy that no file says.
DEFAULT = "default: identical bit by bit"
#: Why a trace that differs is no difference where limits are set.
TRACE_WITH_LIMITS = "digests know only equal; the policy's limits decide over what came out"


@dataclass(frozen=True, kw_only=True)
class Limit(ValueLimits):
    """How far whatever `pattern` matches may differ; every limit that is given must hold.

    The limits of values (`absolute`, `relative`, `ulps`) are alternatives for each value. `pixels` is the share of
    pixels that may break them, from 0 to 1; given alone, the share that may differ at all. `psnr` is the least that
    two pictures must have between them, in dB.
    """

    pattern: str
    pixels: float | None = None
    psnr: float | None = None

    @property
    def of_values(self) -> bool:
        """Whether single values are judged."""
        return any(limit is not None for limit in (self.absolute, self.relative, self.ulps, self.pixels))

    def accepts(self, *, outside: float, psnr: float | None = None) -> bool:
        """Whether a difference is within the limits: `outside` is the share of pixels or values that break them."""
        accepted = [outside <= (self.pixels or 0.0)] if self.of_values else []
        if self.psnr is not None:
            accepted.append(psnr is not None and psnr >= self.psnr)
        return bool(accepted) and all(accepted)

    def __str__(self) -> str:
        return f"{self.pattern}: {', '.join(f'{key} {value:g}' for key, value in self.numbers().items())}"

    def numbers(self) -> dict[str, float]:
        """The limits that are set."""
        fields = dataclasses.asdict(self)
        return {key: value for key, value in fields.items() if key != "pattern" and value is not None}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """`required`: artefacts that must be there and identical; None means: whatever either side has.

    `flip` asks for FLIP of renders that differ.
    `ignored` are reasons by pattern by artefact. `limits` are by artefact, and the first that matches counts. `source`
    says where the policy was read, None where it is a command's own.
    """

    required: tuple[str, ...] | None = None
    ignored: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: {k: dict(v) for k, v in IGNORED.items()})
    limits: Mapping[str, tuple[Limit, ...]] = field(default_factory=dict)
    flip: bool = False
    source: str | None = None

    def without(self, artefact: str) -> Policy:
        """This policy, not requiring an artefact."""
        required = None if self.required is None else tuple(name for name in self.required if name != artefact)
        return dataclasses.replace(self, required=required)

    def check(self) -> None:
        """Raises UsageError for a policy that no training could fail, or that nothing here can carry out."""
        if self.flip and find_spec("flip_evaluator") is None:
            raise UsageError('FLIP needs a package that is not installed; install it: pip install "f3rm-verify[flip]".')
        if self.required is not None:
            unknown = sorted(set(self.required) - set(ARTEFACTS))
            if unknown:
                raise UsageError(f"The policy requires {', '.join(unknown)}; there are only {', '.join(ARTEFACTS)}.")
            if not set(self.required) - set(CONDITIONS):
                raise UsageError("The policy requires nothing that a training puts out; require at least its curves.")
        for patterns in self.ignored.values():
            for pattern in patterns:
                if not pattern.strip("*?/"):
                    raise UsageError(f"The policy ignores everything, by the pattern {pattern!r}; name what to ignore.")
        for limit in (limit for limits in self.limits.values() for limit in limits):
            _check_limit(limit)

    def limit(self, artefact: str, *names: str) -> Limit | None:
        """The limit of what has one of these names in an artefact, None where it must be identical."""
        limits = self.limits.get(artefact, ())
        return next((limit for limit in limits for name in names if fnmatch.fnmatchcase(name, limit.pattern)), None)

    def reason_to_ignore(self, artefact: str, name: str) -> str | None:
        """Why what is called `name` in an artefact is ignored, None where it is not."""
        return reason_to_ignore(name, self.ignored.get(artefact, {}))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the result file."""
        return {
            "flip": self.flip,
            "source": self.source or DEFAULT,
            "required": None if self.required is None else list(self.required),
            "ignored": {artefact: dict(patterns) for artefact, patterns in self.ignored.items()},
            "limits": {
                artefact: {limit.pattern: limit.numbers() for limit in limits}
                for artefact, limits in self.limits.items()
            },
        }


def _check_limit(limit: Limit) -> None:
    """Raises UsageError for a limit that is no number, or that accepts everything."""
    numbers = limit.numbers()
    if not numbers:
        raise UsageError(f"The policy sets no limit for {limit.pattern!r}; give one, or leave the pattern out.")
    for key, value in numbers.items():
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"The policy's limit {key} of {limit.pattern!r} is {value}; give a number from 0 on.")
    too_much = {
        "relative": (1, "accepts values of any size"),
        "pixels": (1, "accepts any picture of the same size"),
        "ulps": (2**31, "accepts any float32"),
    }
    for key, (bound, why) in too_much.items():
        if numbers.get(key, 0) >= bound:
            where = f"The policy's limit {key} of {limit.pattern!r}"
            raise UsageError(f"{where} is {numbers[key]:g}, which {why}; give less than {bound}.")
    if numbers.get("psnr", 1) == 0:
        raise UsageError(f"The policy's limit psnr of {limit.pattern!r} is 0 dB, which accepts noise; give more.")


#: What `run` requires; with `--trace off` all but the trace.
RUN_POLICY = Policy(required=ARTEFACTS)
DIFF_POLICY = Policy(required=None)


def judge(limit: Limit | None, *, outside: float, psnr: float | None = None) -> tuple[Verdict, str]:
    """The verdict over something that differs, and what to say of the limit; see `Limit.accepts`."""
    if limit is None:
        return Verdict.DIFFERENT, ""
    if limit.accepts(outside=outside, psnr=psnr):
        return Verdict.WITHIN_TOLERANCE, f"; within the limits of {limit}"
    return Verdict.DIFFERENT, f"; beyond the limits of {limit}"


def reason_to_ignore(name: str, patterns: Mapping[str, str]) -> str | None:
    """Why `name` is ignored, None where it is not."""
    return next((reason for pattern, reason in patterns.items() if fnmatch.fnmatchcase(name, pattern)), None)


def without_ignored(node: Difference, patterns: Mapping[str, str], path: str = "") -> Difference:
    """The tree with what the patterns match as ignored leaves; what is called `path/...` is matched by `path/*`, too.

    A node of which nothing is left is unreadable, as everywhere.
    """
    if not patterns or not node.children:
        return node
    children = []
    for child in node.children:
        name = f"{path}{child.name}"
        inside = f"{name}/" if child.children else name
        reason = reason_to_ignore(name, patterns) or reason_to_ignore(inside, patterns)
        if reason is None:
            children.append(without_ignored(child, patterns, inside))
        else:
            found = "" if child.verdict is Verdict.IDENTICAL else f"; {child.summary}"
            measures = {**child.measures, "reason": reason}
            children.append(
                Difference(
                    name=child.name,
                    artefact=child.artefact,
                    verdict=Verdict.IGNORED,
                    summary=f"{reason}{found}",
                    measures=measures,
                )
            )
    if tuple(children) == node.children:
        return node
    return Difference.group(name=node.name, artefact=node.artefact, children=children, measures=node.measures)


def unused_patterns(policy: Policy, nodes: Iterable[Difference]) -> list[str]:
    """What a policy's file says of these artefacts that matched nothing in them: "limits.curves: 'Train Los*'"."""
    names: dict[str, set[str]] = {}
    for artefact in nodes:
        found = names.setdefault(artefact.name, set())
        for path, node in artefact.walk():
            found |= {node.name, "/".join(path[1:]), "/".join((*path[1:], ""))}
    said = [(f"limits.{name}", name, limit.pattern) for name, limits in policy.limits.items() for limit in limits]
    for name, patterns in policy.ignored.items():
        said += [(f"ignore.{name}", name, key) for key in patterns if key not in IGNORED.get(name, {})]
    return [
        f"{where}: {pattern!r}"
        for where, name, pattern in said
        if name in names and not fnmatch.filter(names[name], pattern)
    ]


def informational(node: Difference, reason: str) -> Difference:
    """The tree with every difference in it shown, but ignored for a reason; what is missing or unreadable stays so."""
    if node.verdict is not Verdict.DIFFERENT:
        return node
    children = tuple(informational(child, reason) for child in node.children)
    left = worst(child.verdict for child in children)
    return dataclasses.replace(
        node,
        verdict=left if left in (Verdict.MISSING, Verdict.UNREADABLE) else Verdict.IGNORED,
        measures={**node.measures, "reason": reason},
        children=children,
    )
