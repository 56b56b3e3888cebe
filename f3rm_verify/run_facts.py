"""What a run directory shows about the run as a whole: which it is, whether it completed, whether it trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from f3rm_verify.compare_checkpoints import nothing_trained
from f3rm_verify.compare_curves import all_nan_losses, observed_steps
from f3rm_verify.errors import UnreadableError
from f3rm_verify.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """`steps` is how many steps were done, as observed; None where nothing shows it.

    `incomplete` and `untrained` say why the run did not complete or trained nothing, None where it did.
    """

    run: RunDir
    run_id: str | None
    method: str | None
    implementation: Mapping[str, Any] | None
    seed: int | None
    rank: int
    threads: int | None
    device: str | None
    steps: int | None
    incomplete: str | None
    untrained: str | None

    def describe(self) -> dict[str, Any]:
        """Plain data for the result file."""
        return {
            "directory": str(self.run.path),
            "run_id": self.run_id,
            "method": self.method,
            "implementation": None if self.implementation is None else dict(self.implementation),
            "seed": self.seed,
            "rank": self.rank,
            "threads": self.threads,
            "device": self.device,
            "steps": self.steps,
            "completed": self.incomplete is None,
        }


def facts_of(run: RunDir) -> RunFacts:
    """Reads what `run` shows about itself; what is unreadable counts as not shown."""
    manifest = _or_none(lambda: run.manifest) or {}
    config = _or_none(lambda: run.config)
    config = config if isinstance(config, dict) else {}
    steps, incomplete = _completion(run, manifest, config)
    environment = manifest.get("environment")
    threads = environment.get("threads", {}).get("intra_op") if isinstance(environment, dict) else None
    machine = config.get("machine")
    machine = machine if isinstance(machine, dict) else {}
    return RunFacts(
        run=run,
        run_id=manifest.get("run_id"),
        method=manifest.get("method") or config.get("method_name"),
        implementation=manifest.get("implementation"),
        seed=manifest.get("seed", machine.get("seed")),
        rank=manifest.get("rank", 0),
        threads=threads,
        device=machine.get("device_type"),
        steps=steps,
        incomplete=incomplete,
        untrained=_untrained(run, manifest),
    )


def is_one_run(reference: RunFacts, candidate: RunFacts) -> str | None:
    """Why the two sides are one and the same run (a link, a copy), None where they are two."""
    first, second = reference.run, candidate.run
    if first.path.resolve() == second.path.resolve():
        return "both sides are one directory"
    if reference.run_id is not None and reference.run_id == candidate.run_id:
        return f"both sides have the run id {reference.run_id}: one is a copy of the other"
    for name, files in (("event files", lambda run: run.event_files), ("checkpoints", lambda run: run.checkpoints)):
        if _shared_files(_paths(files, first), _paths(files, second)):
            return f"both sides have the same {name} on disk (a link)"
    identities = [_or_none(lambda run=run: run.events.identity if run.event_files else ()) for run in (first, second)]
    if identities[0] and identities[0] == identities[1]:
        return "both sides logged at the same instants: one is a copy of the other"
    return None


def _paths(files: Any, run: RunDir) -> list[Any]:
    found = _or_none(lambda: files(run)) or ()
    return list(found.values() if isinstance(found, Mapping) else found)


def _shared_files(first: list[Any], second: list[Any]) -> bool:
    """Whether a file of one side is a file of the other, by device and inode."""
    inodes = [{(path.stat().st_dev, path.stat().st_ino) for path in paths if path.is_file()} for paths in (first, second)]
    return bool(inodes[0] & inodes[1])


def _completion(
    run: RunDir, manifest: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[int | None, str | None]:
    """Steps done and why the run is incomplete. Ours leaves a completion record; ns-train a checkpoint of its last step.

    The exit code says nothing: ns-train returns 0 after Ctrl-C.
    """
    observed = _or_none(lambda: observed_steps(run))
    seen = None if observed is None else observed[1] - observed[0] + 1
    if manifest:
        completion = manifest.get("completion")
        if not isinstance(completion, dict):
            return seen, f"did not complete: it left no completion record{_so_far(seen)}"
        steps = completion.get("steps")
        if seen is not None and seen != steps:
            return seen, f"says that it did {steps} steps, but its loss curve has {seen}"
        return steps, None
    wanted = config.get("max_num_iterations")
    checkpoints = _or_none(lambda: run.checkpoints) or {}
    if not isinstance(wanted, int) or observed is None:
        return seen, "cannot be seen to have completed: its config.yml or its loss curve is missing"
    last = observed[0] + wanted - 1
    if last not in checkpoints:
        return seen, f"did not complete: it has no checkpoint of its last step, {last}{_so_far(seen)}"
    return wanted, None


def _so_far(seen: int | None) -> str:
    return "" if seen is None else f" ({seen} steps are in its loss curve)"


def _untrained(run: RunDir, manifest: Mapping[str, Any]) -> str | None:
    parameters = manifest.get("parameters")
    if isinstance(parameters, dict) and parameters.get("after") is not None:
        if parameters.get("before") == parameters["after"]:
            return "its parameters never changed"
    elif _or_none(lambda: nothing_trained(run)):
        return "its optimizers never saw a gradient"
    if _or_none(lambda: all_nan_losses(run)):
        return "all its losses are NaN"
    return None


def _or_none(read: Any) -> Any:
    """What `read` gives, None where it is unreadable: the comparators report that."""
    try:
        return read()
    except UnreadableError:
        return None
