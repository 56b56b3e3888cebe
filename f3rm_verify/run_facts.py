"""What a run directory shows about the run as a whole: which it is, whether it completed, whether it trained."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from f3rm_verify.compare_checkpoints import nothing_trained
from f3rm_verify.compare_curves import all_nan_losses, observed_steps
from f3rm_verify.errors import UnreadableError
from f3rm_verify.run_dir import RunDir

T = TypeVar("T")

#: Entries of the manifest that no two runs share.
_IDENTITIES = {"run_id": "run id", "nonce": "nonce", "start": "start time"}


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """`steps` is how many steps were done, as observed; None where nothing shows it.

    `incomplete` and `untrained` say why the run cannot be seen to have completed, or to have trained anything; None
    where it can. `ranks` is how many trained together. `started_from` is the checkpoint or folder that it went on from.
    """

    run: RunDir
    manifest: Mapping[str, Any]
    method: str | None
    implementation: Mapping[str, Any] | None
    seed: int | None
    rank: int
    ranks: int
    threads: int | None
    device: str | None
    started_from: str | None
    steps: int | None
    incomplete: str | None
    untrained: str | None

    def describe(self) -> dict[str, Any]:
        """Plain data for the result file."""
        return {
            "directory": str(self.run.path),
            "run_id": _text(self.manifest.get("run_id")),
            "method": self.method,
            "implementation": None if self.implementation is None else dict(self.implementation),
            "seed": self.seed,
            "rank": self.rank,
            "ranks": self.ranks,
            "threads": self.threads,
            "device": self.device,
            "load_config": _text(_mapping(self.manifest.get("load_config")).get("path")),
            "started_from": self.started_from,
            "steps": self.steps,
            "completed": self.incomplete is None,
            "peak_rss_bytes": _count(_mapping(self.manifest.get("memory")).get("peak_rss_bytes")),
        }


def facts_of(run: RunDir) -> RunFacts:
    """Reads what `run` shows about itself; what is unreadable, or of another type than ours, counts as not shown."""
    manifest = _mapping(_or_none(lambda: run.manifest))
    config = _mapping(_or_none(lambda: run.config))
    machine = _mapping(config.get("machine"))
    implementation = manifest.get("implementation")
    steps, incomplete = _completion(run, config)
    seed = manifest.get("seed") if manifest else machine.get("seed")
    return RunFacts(
        run=run,
        manifest=manifest,
        method=_text(manifest.get("method")) or _text(config.get("method_name")),
        implementation=implementation if _is_table_of_texts(implementation) else None,
        seed=_integer(seed),
        rank=_count(manifest.get("rank")) or 0,
        ranks=_count(manifest.get("world_size")) or 1,
        threads=_count(_mapping(_mapping(manifest.get("environment")).get("threads")).get("intra_op")),
        device=_text(machine.get("device_type")),
        started_from=_started_from(config),
        steps=steps,
        incomplete=incomplete,
        untrained="did not a single step" if steps == 0 else _untrained(run, manifest, complete=incomplete is None),
    )


def is_one_run(reference: RunFacts, candidate: RunFacts) -> str | None:
    """Why the two sides are one and the same run (a link, a copy), None where they are two."""
    first, second = reference.run, candidate.run
    if first.path.resolve() == second.path.resolve():
        return "both sides are one directory"
    for key, name in _IDENTITIES.items():
        value = reference.manifest.get(key)
        if value is not None and value == candidate.manifest.get(key):
            return f"both sides have the {name} {str(value)[:80]}: one is a copy of the other"
    if _inodes(first) & _inodes(second):
        return "both sides have the same files on disk (links)"
    identities = [_or_none(lambda run=run: run.events.identity) for run in (first, second)]  # type: ignore[misc]
    if identities[0] and identities[0] == identities[1]:
        return "both sides logged at the same instants: one is a copy of the other"
    return None


def _inodes(run: RunDir) -> set[tuple[int, int]]:
    """Device and inode of everything that the training wrote."""
    evidence: Iterable[Callable[[], Iterable[Path]]] = (
        lambda: run.event_files,
        lambda: run.checkpoints.values(),
        lambda: run.renders.values(),
    )
    found = [path for look in evidence for path in _or_none(look) or ()]
    return set(_stated(found))


def _stated(paths: Iterable[Path]) -> Iterator[tuple[int, int]]:
    for path in paths:
        with suppress(OSError):  # gone, or not ours to look at: the comparators report that
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                yield status.st_dev, status.st_ino


def _completion(run: RunDir, config: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """Steps done, and why the run is incomplete.

    Our trainer leaves a completion record, ns-train a checkpoint of its last step; the loss curve has to bear it out.
    The exit code says nothing: it is 0 after Ctrl-C.
    """
    observed = _or_none(lambda: observed_steps(run))
    seen = None if observed is None else observed[1] - observed[0] + 1
    try:
        manifest = run.manifest
        done = _plain_steps(run, config, observed) if manifest is None else _recorded_steps(manifest, observed)
    except UnreadableError:
        done = "cannot be seen to have completed: its manifest or its checkpoints are unreadable"
    if isinstance(done, str):
        return seen, done
    first, steps = done
    contradiction = _contradiction(run, observed, first, first + steps - 1, config)
    return (steps, None) if contradiction is None else (seen, contradiction)


def _recorded_steps(manifest: Mapping[str, Any], observed: tuple[int, int] | None) -> tuple[int, int] | str:
    """First step and number of steps by the completion record of our trainer, or why that shows no completion."""
    completion = manifest.get("completion")
    if completion is None:
        return f"did not complete: it left no completion record{_so_far(observed)}"
    first, steps = (_count(_mapping(completion).get(key)) for key in ("first_step", "steps"))
    if first is None or steps is None:
        return "cannot be seen to have completed: its completion record is broken"
    return first, steps


def _plain_steps(run: RunDir, config: Mapping[str, Any], observed: tuple[int, int] | None) -> tuple[int, int] | str:
    """The same of a run of ns-train, which does max_num_iterations steps from where it starts, and then saves."""
    wanted, last = _count(config.get("max_num_iterations")), max(run.checkpoints, default=None)
    if not wanted or observed is None:
        return "cannot be seen to have completed: its config.yml or its loss curve is missing"
    # Where it starts is not recorded if it went on from a checkpoint, and only to be seen where that step was logged.
    first = observed[0] if _started_from(config) else 0
    if last != first + wanted - 1:
        return f"did not complete: it has no checkpoint of its last step, {first + wanted - 1}{_so_far(observed)}"
    return first, wanted


def _contradiction(
    run: RunDir, observed: tuple[int, int] | None, first: int, last: int, config: Mapping[str, Any]
) -> str | None:
    """What speaks against the run having done the steps `first` to `last`, and all that comes after them."""
    interval = _count(_mapping(config.get("logging")).get("steps_per_log")) or 1
    if observed is None:
        if last >= first and _or_none(lambda: run.event_files) != ():
            return "cannot be seen to have completed: it has no loss curve"
    elif not (first <= observed[0] < first + interval and last - interval < observed[1] <= last):
        return f"says that it did steps {first} to {last}, but its loss curve has {observed[0]} to {observed[1]}"
    saved = max(_or_none(lambda: run.checkpoints) or {}, default=last)
    if saved != last:
        return f"has no checkpoint of its last step, {last}, but one of step {saved}"
    return _or_none(lambda: _unfinished_evaluation(run))


def _unfinished_evaluation(run: RunDir) -> str | None:
    """Our trainer renders image by image, and writes the metrics of all of them at the end."""
    rendered = {Path(name).parts[0] for name in run.renders}
    measured = set(_mapping(_mapping(run.metrics).get("images")))
    if run.manifest is None or not rendered or rendered == measured:
        return None
    return f"did not finish its evaluation: it rendered {len(rendered)} images and has metrics of {len(measured)}"


def _so_far(observed: tuple[int, int] | None) -> str:
    return "" if observed is None else f" (its loss curve ends at step {observed[1]})"


def _started_from(config: Mapping[str, Any]) -> str | None:
    return _text(config.get("load_dir")) or _text(config.get("load_checkpoint"))


def _untrained(run: RunDir, manifest: Mapping[str, Any], *, complete: bool) -> str | None:
    if manifest and complete:
        parameters = _mapping(manifest.get("parameters"))
        before, after = (_text(parameters.get(key)) for key in ("before", "after"))
        if before is None or after is None:
            return "cannot be seen to have trained: its manifest has no digests of its parameters"
        if before == after:
            return "trained nothing: its parameters never changed"
    if nothing_trained(run):
        return "trained nothing: its optimizers never saw a gradient"
    if _or_none(lambda: all_nan_losses(run)):
        return "trained nothing: all its losses are NaN"
    return None


def _or_none(read: Callable[[], T]) -> T | None:
    """What `read` gives, None where it is unreadable: the comparators report that."""
    try:
        return read()
    except UnreadableError:
        return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _integer(value: Any) -> int | None:
    """An integer that is no boolean and that JSON can hold everywhere."""
    return value if type(value) is int and abs(value) < 2**64 else None


def _count(value: Any) -> int | None:
    number = _integer(value)
    return number if number is not None and number >= 0 else None


def _is_table_of_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(item, str) for item in value.values())
