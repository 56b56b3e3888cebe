"""What is known about a divergence, and what the rules for its cause find in that. Pure functions over plain data."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

#: Stages whose values come from arithmetic on what the earlier stages gave.
ARITHMETIC = frozenset({"forward", "loss", "grad", "params"})
#: What image files, their order and the features reach first.
FROM_DATA = frozenset({"init", "batch", "eval"})
_EXTENSIONS = ("gsplat", "nerfacc", "tinycudann")
#: Operators whose CPU kernels add floats across threads without an order, unless deterministic algorithms are on.
_ACCUMULATING = ("*index_put*", "*index_add*", "*scatter_add*", "*scatter_reduce*", "*index_backward*", "*put_*")
_FRESH_MEMORY = ("*::empty*", "*::new_empty*", "*::resize*")
MODE = "deterministic algorithms"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known about a divergence; empty where nothing is.

    `proven` are the stages of that step (and `init`) that were recorded and are equal; `also` what else differs first
    in the same stage of the same step. `conditions` maps what differs in setup and seeding log to a sentence. `claims`
    holds what each side's seeding log observed, by claim. `phase` is the part of a step that left the generators in
    states that differ first (batch, forward, backward, optimizer, callbacks, evaluation, checkpoint, viewer, between
    steps); `also_after` are those that did in the same step. `clock` and `entropy_of_steps` are places in the code that
    read a clock or the system's entropy while training, `outside_of_setup` those that read either while it was built,
    None where nobody looked. `operator`, `module` and `repeats` come from executing
    the step again: `repeats` is whether one process that repeats it from one state gives one result, None where nobody
    tried.
    """

    stage: str | None = None
    subject: str = ""
    step: int | None = None
    last_equal_step: int | None = None
    also: tuple[str, ...] = ()
    traced: bool = False
    proven: frozenset[str] = frozenset()
    conditions: Mapping[str, str] = field(default_factory=dict)
    claims: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})
    failing: frozenset[str] = frozenset()
    device: str | None = None
    threads: int | None = None
    encodings: frozenset[str] = frozenset()
    extensions: frozenset[str] = frozenset()
    viewer: bool = False
    feature_sources: tuple[str | None, str | None] = (None, None)
    phase: str | None = None
    also_after: tuple[str, ...] = ()
    clock: tuple[str, ...] = ()
    outside_of_setup: tuple[str, ...] | None = None
    entropy_of_steps: tuple[str, ...] = ()
    operator: str | None = None
    module: str | None = None
    repeats: bool | None = None

    @property
    def from_the_start(self) -> bool:
        """Whether nothing before it is known to be equal, so that what happened before the first step counts."""
        return self.last_equal_step is None

    @property
    def after_equal_inputs(self) -> bool:
        """Whether the generators and the batch of this step are proven equal, so that its own work made it differ."""
        return self.traced and {"rng", "batch"} <= self.proven


# What the rules ask for. Each gives the evidence in words, or None.


def _listed(items: Iterable[str], limit: int = 3) -> str:
    items = list(items)
    more = f"; and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more


def differing(*patterns: str, stages: frozenset[str] | None = None) -> Callable[[Evidence], str | None]:
    """A rule that needs a recorded condition to differ, and what broke to be in a stage that it reaches."""

    def find(evidence: Evidence) -> str | None:
        if evidence.traced and stages is not None and evidence.stage not in stages:
            return None
        return condition(evidence, *patterns)

    return find


def condition(evidence: Evidence, *patterns: str) -> str | None:
    """What differs among the conditions whose names match a pattern, in words."""
    names = [
        name
        for name in evidence.conditions
        if any(fnmatch.fnmatchcase(name.casefold(), pattern.casefold()) for pattern in patterns)
    ]
    return _listed(f"{name}: {evidence.conditions[name]}" for name in names) if names else None


def _observed(evidence: Evidence, claim: str) -> set[str]:
    """What both sides observed for a claim, whenever they looked."""
    return {
        text
        for side in evidence.claims
        for name, text in side.items()
        if name == claim or name.startswith(f"{claim}, ")
    }


def off(evidence: Evidence) -> bool:
    """Whether torch's deterministic algorithms were seen to be off, on either side and at any time."""
    return "off" in _observed(evidence, MODE)


def _without_deterministic_kernels(evidence: Evidence) -> str | None:
    """Why operations without an order of their own were allowed."""
    if off(evidence):
        return "torch's deterministic algorithms were off"
    met = [text for text in _observed(evidence, "operations without a deterministic implementation") if text != "none"]
    if met:
        return f"torch met operations without a deterministic implementation: {_listed(sorted(met))}"
    grids = [
        text for text in _observed(evidence, "gradients of the hash grids") if text.startswith("not the same bits")
    ]
    return f"the seeding log saw gradients of hash grids with {grids[0]}" if grids else None


def _is_operator(evidence: Evidence, *patterns: str) -> bool:
    return evidence.operator is not None and any(fnmatch.fnmatchcase(evidence.operator, p) for p in patterns)


def _at(evidence: Evidence) -> str:
    where = f" in {evidence.module}" if evidence.module else ""
    return f"{evidence.operator}{where} gets equal inputs and gives different outputs"


def uninitialised(evidence: Evidence) -> str | None:
    """An operator that hands out fresh memory, seen to differ."""
    return f"{evidence.operator} gives memory as it was" if _is_operator(evidence, *_FRESH_MEMORY) else None


def extension_at_work(evidence: Evidence) -> str | None:
    """An operator of an extension, seen to differ."""
    operator = (evidence.operator or "").casefold()
    named = [name for name in _EXTENSIONS if name in operator or (name == "tinycudann" and "tcnn" in operator)]
    return _at(evidence) if named else None


def accumulation_shown(evidence: Evidence) -> str | None:
    """An operator that adds floats across CPU threads, seen to differ."""
    if evidence.device == "cpu" and (evidence.threads or 2) > 1 and _is_operator(evidence, *_ACCUMULATING):
        return None if evidence.repeats is True else f"{_at(evidence)}, on {evidence.threads or 'several'} threads"
    return None


def kernel_shown(evidence: Evidence) -> str | None:
    """An operator that gave several results in one process, from one state."""
    own = evidence.operator is not None and not _is_operator(evidence, *_FRESH_MEMORY)
    if own and evidence.repeats is False:
        return f"{_at(evidence)}; one process that repeats the step from one state gets several results"
    return None


def _generators(evidence: Evidence) -> str | None:
    """The generators that differ, and since when; None where something else came first."""
    if not evidence.traced or evidence.stage != "rng":
        return None
    if evidence.from_the_start and evidence.phase is None:
        return f"generator states differ before the first step ({_names(evidence)})"
    after = f"after {evidence.phase} in" if evidence.phase else "before"
    return f"generator states differ first {after} step {evidence.step} ({_names(evidence)})"


def _names(evidence: Evidence) -> str:
    names = list(dict.fromkeys((evidence.subject, *evidence.also)))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def drew_in(*phases: str) -> Callable[[Evidence], str | None]:
    """A rule that needs generators to differ first after one of these phases."""
    return lambda evidence: _generators(evidence) if evidence.phase in phases else None


def evaluation_drew(evidence: Evidence) -> str | None:
    """Generators that differ after an evaluation, or between steps where these have other intervals."""
    states = _generators(evidence)
    changed = condition(evidence, "config.yml / steps_per_eval*")
    if states and changed and _between_steps(evidence):
        return f"{states}; {changed}"
    drew = evidence.phase or next((phase for phase in evidence.also_after), None)
    if not (evidence.traced and evidence.stage in ("rng", "eval") and drew == "evaluation"):
        return None
    more = f"; {changed}" if changed else ""
    return f"what the evaluation at step {evidence.step} left in the generators differs, or only one side had it{more}"


def viewer_drew(evidence: Evidence) -> str | None:
    """Generators that differ after the viewer, or between steps while it was on."""
    states = _generators(evidence)
    seen = evidence.phase == "viewer" or (evidence.viewer and _between_steps(evidence))
    return f"{states}; the viewer was on" if states and seen else None


def _between_steps(evidence: Evidence) -> bool:
    """Whether what drew stood outside of what a step itself does."""
    return evidence.phase == "between steps" or (evidence.phase is None and not evidence.from_the_start)


def _before_the_first_step(evidence: Evidence) -> bool:
    """Whether initial values, or the generators that the first step finds, came first."""
    at_start = evidence.stage in ("init", "rng") and evidence.from_the_start
    return evidence.traced and at_start and evidence.phase is None


def _cache_sources(evidence: Evidence) -> str | None:
    first, second = evidence.feature_sources
    if first == second or not (first and second):
        return None
    return f"features from {first} in the reference, from {second} in the candidate"


def extraction_drew(evidence: Evidence) -> str | None:
    """Features that only one side had to extract, and generators that differ when everything is built."""
    states = evidence.conditions.get("generators at step 0")
    return _cache_sources(evidence) if states and _before_the_first_step(evidence) else None


def unseeded(evidence: Evidence) -> str | None:
    """Generators or initial values that differ, and generators that do not follow the seed."""
    streams = [name for name in evidence.failing if "generator" in name or name.endswith(" random")]
    if not _before_the_first_step(evidence) or not streams:
        return None
    return f"does not hold in the seeding log: {_listed(sorted(streams))}"


def drawn_while_building(evidence: Evidence) -> str | None:
    """Generators that were seeded alike, and differ when everything is built."""
    states = evidence.conditions.get("generators at step 0")
    return f"generators at step 0: {states}" if _before_the_first_step(evidence) and states else None


def user_code_drew(evidence: Evidence) -> str | None:
    """Generators that differ after callbacks, or outside of what a step does."""
    own = evidence.phase in ("callbacks", "checkpoint") or _between_steps(evidence)
    return _generators(evidence) if own else None


def unfilled(evidence: Evidence) -> str | None:
    """Initial values that differ, given by no generator and nothing outside, where fresh memory was not filled."""
    outside = evidence.outside_of_setup
    if outside is None or outside or not _values_besides_generators(evidence):
        return None
    unfilled = off(evidence) or any("as it was" in text for text in _observed(evidence, "uninitialised memory"))
    return f"initial values differ ({_names(evidence)}), and fresh memory was not filled" if unfilled else None


def own_randomness(evidence: Evidence) -> str | None:
    """Initial values that differ although the generators were left in the same state."""
    if not _values_besides_generators(evidence):
        return None
    outside = evidence.outside_of_setup
    where = f"; a clock or the system's entropy is read in {_listed(outside)}" if outside else ""
    return f"initial values differ ({_names(evidence)}), and every generator is in the same state{where}"


def _values_besides_generators(evidence: Evidence) -> bool:
    states = [side.get("generators at step 0") for side in evidence.claims]
    return evidence.traced and evidence.stage == "init" and states[0] is not None and states[0] == states[1]


def entropy_in_steps(evidence: Evidence) -> str | None:
    """Places that read the system's entropy while training."""
    inside = evidence.traced and evidence.stage in {*ARITHMETIC, "batch", "rng"}
    return (
        f"the system's entropy is read in {_listed(evidence.entropy_of_steps)}"
        if inside and evidence.entropy_of_steps
        else None
    )


def clock(evidence: Evidence) -> str | None:
    """Places that read a clock while training."""
    inside = evidence.traced and evidence.stage in {*ARITHMETIC, "batch", "rng", "schedule"}
    return f"a clock is read in {_listed(evidence.clock)}" if inside and evidence.clock else None


def hash_order(evidence: Evidence) -> str | None:
    """A hash seed that was not fixed, and a stage where no unordered addition can be meant."""
    free = free_hash_seed(evidence)
    # One process that repeats the step gets one result where none of them shows.
    races = _without_deterministic_kernels(evidence) and evidence.threads != 1 and evidence.repeats is not True
    reached = evidence.stage in ("init", "loss") or (evidence.stage in ARITHMETIC and not races)
    outside = evidence.outside_of_setup if evidence.stage == "init" else evidence.clock or evidence.entropy_of_steps
    if not (free and evidence.traced and reached) or outside or evidence.repeats is False:
        return None
    return f"the hash seed was {free}"


def free_hash_seed(evidence: Evidence) -> str | None:
    """What was observed of a hash seed that nobody fixed."""
    seen = _observed(evidence, "PYTHONHASHSEED")
    return next((text for text in sorted(seen) if text.startswith(("random", "another hash seed"))), None)


def worker_made(evidence: Evidence) -> str | None:
    """A batch that differs, made in another process."""
    processes = [
        text for text in _observed(evidence, "data workers") if "worker process" in text and text[:1].isdigit()
    ]
    found = other_batch(evidence)
    return f"{found}; it came from {processes[0]}" if found and processes else None


def workers(evidence: Evidence) -> str | None:
    """A batch that differs, and workers that are not seeded or not read in order."""
    if other_batch(evidence) is None:
        return None
    loose = [
        text for text in _observed(evidence, "data workers") if "not seeded" in text or "not read in order" in text
    ]
    return f"data workers: {loose[0]}" if loose else None


def cpu_accumulation(evidence: Evidence) -> str | None:
    """Gradients that differ first, on several CPU threads, with unordered additions allowed."""
    allowed = _without_deterministic_kernels(evidence)
    several = evidence.device == "cpu" and (evidence.threads or 1) > 1
    if evidence.repeats is True or not (allowed and several and evidence.after_equal_inputs):
        return None
    if evidence.stage != "grad" or not {"forward", "loss"} & evidence.proven:
        return None
    return f"first in the backward pass, everything before it equal, {evidence.threads} threads, and {allowed}"


def cuda_accumulation(evidence: Evidence) -> str | None:
    """Gradients that differ first on a GPU, with unordered additions allowed."""
    allowed = _without_deterministic_kernels(evidence)
    on_gpu = evidence.device is not None and evidence.device.startswith("cuda")
    if evidence.repeats is True or not (
        allowed and on_gpu and evidence.after_equal_inputs and evidence.stage == "grad"
    ):
        return None
    return f"first in the backward pass on a GPU, everything before it equal, and {allowed}"


def extension_atomics(evidence: Evidence) -> str | None:
    """Outputs or gradients that differ first on a GPU, in a model with extensions."""
    on_gpu = evidence.device is not None and evidence.device.startswith("cuda")
    atomics = any("atomics, in any order" in text for text in _observed(evidence, "tiny-cuda-nn's backward"))
    used = sorted({*evidence.extensions, *(["tinycudann"] if atomics or "tcnn" in evidence.encodings else [])})
    if evidence.repeats is True or not (on_gpu and used and evidence.after_equal_inputs):
        return None
    if evidence.stage not in ("forward", "grad"):
        return None
    return f"first in stage {evidence.stage} on a GPU, everything before it equal, and the model uses {', '.join(used)}"


def benchmarked(evidence: Evidence) -> str | None:
    """Outputs or gradients that differ first on a GPU, with kernels chosen by their speed."""
    on_gpu = evidence.device is not None and evidence.device.startswith("cuda")
    chosen = "True" in _observed(evidence, "cuDNN benchmark")
    if not (on_gpu and chosen and evidence.after_equal_inputs and evidence.stage in ("forward", "grad")):
        return None
    return "cuDNN benchmark was on"


def scaler(evidence: Evidence) -> str | None:
    """A gradient scaler that differs first."""
    names = (evidence.subject, *evidence.also)
    if not (evidence.traced and evidence.stage == "schedule" and any("scale" in name.casefold() for name in names)):
        return None
    return f"{evidence.subject} differs after step {evidence.step}, and everything before it is equal"


def learning_rate(evidence: Evidence) -> str | None:
    """Learning rates that differ first."""
    if not (evidence.traced and evidence.stage == "schedule") or scaler(evidence):
        return None
    return f"{evidence.subject} differs after step {evidence.step}, and everything before it is equal"


def other_batch(evidence: Evidence) -> str | None:
    """A batch that differs, made with equal generators."""
    if not (evidence.traced and evidence.stage == "batch" and "rng" in evidence.proven):
        return None
    return f"the batch of step {evidence.step} differs ({_names(evidence)}), and every generator was in the same state"


def written_elsewhere(evidence: Evidence) -> str | None:
    """Parameters or optimizer state that differ, and gradients that do not."""
    if not (evidence.traced and evidence.stage == "params" and "grad" in evidence.proven):
        return None
    return f"{evidence.subject} differs after step {evidence.step}, and all gradients of that step are equal"


def evaluation(evidence: Evidence) -> str | None:
    """An evaluation that differs after an equal training."""
    if not (evidence.traced and evidence.stage == "eval"):
        return None
    return f"{evidence.subject} differs in the evaluation at step {evidence.step}, and the training before it is equal"
