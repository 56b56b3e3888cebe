"""From what a person asks for to a result: the request, the trainings, the comparison of what they left."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f3rm_verify import presets
from f3rm_verify.errors import UsageError
from f3rm_verify.ns_train import METHOD_NAME, TrainingRequest, find_ns_train, method_provider, refuse_owned_options
from f3rm_verify.run_dir import RunDir
from f3rm_verify.runner import Training, Trainings, run_trainings
from f3rm_verify.shared_data import shared_data
from f3rm_verify.training_log import last_lines, told_reason

if TYPE_CHECKING:
    from f3rm_verify.assets import Assets
    from f3rm_verify.baseline import Baseline
    from f3rm_verify.difference import Result
    from f3rm_verify.policy import Policy

Watch = Callable[[Sequence[Training]], None]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the trainings left: the runs by side, and in sentences what went wrong.

    `missing` are the sides that left nothing, and `interrupted` says that somebody stopped the trainings. `told` is
    what to show at once, with the end of a log where one helps.
    """

    runs: Mapping[str, RunDir]
    missing: tuple[str, ...]
    trouble: tuple[str, ...]
    told: str | None
    interrupted: bool
    output: Path

    @property
    def nothing_to_compare(self) -> str | None:
        """Why there is no run to compare, or nothing to compare it with; None where there is."""
        candidates = [side for side in self.runs if side not in ("reference", "control")]
        if candidates and "reference" not in self.missing:
            return None
        return f"There is nothing to compare: the {self.missing[0]} run left nothing in {self.output}."


def training_request(
    arguments: tuple[str, ...] = (),
    *,
    output_dir: Path,
    seed: int | None = None,
    iters: int | None = None,
    data: Path | None = None,
    method: str | None = None,
    load_config: Path | None = None,
    preset: str | None = None,
    ns_train: Path | None = None,
    own_arguments: tuple[str, ...] = (),
    stall_timeout: float = 600.0,
    render_budget: float = 4.0,
    jobs: int = 1,
    cost_steps: int | None = None,
    cost_only: tuple[str, ...] = (),
    snapshot_every: int | None = None,
    trace: str = "steps",
) -> TrainingRequest:
    """What to train, in a fresh directory in `output_dir`; None stands for the default, by whatever it depends on.

    `arguments` go to ns-train; `render_budget` is in GiB. Raises UsageError, before anything is written, for what
    cannot work.
    """
    from f3rm_verify.saved_config import read_saved_config

    refuse_owned_options(arguments)
    saved = None if load_config is None else read_saved_config(load_config)
    if saved is not None:
        if method not in (None, saved.method):
            raise UsageError(f"--method {method} is not that of --load-config, {saved.method}; leave one of them out.")
        method, data = saved.method, data or saved.existing_data()
    seed = (saved.seed if saved else 42) if seed is None else seed
    iters, method = iters or (saved.iters if saved else 1000), method or "f3rm"
    _refuse_nonsense(data, method, {"stall-timeout": stall_timeout, "render-budget": render_budget})
    ns_train = find_ns_train(ns_train)
    provider = method_provider(ns_train, method) if saved is None else saved.foreign_provider
    ours = method == "f3rm" and provider is None and saved is None
    if preset is not None and saved is not None:
        raise UsageError(
            "--preset cannot be given with --load-config, which has its size; change it by options after --."
        )
    if preset == "small" and not ours:
        raise UsageError(
            f"--preset small is a size of f3rm-verify's own f3rm; shrink {provider or 'nerfstudio'}'s {method} by "
            "options after --."
        )
    small = (preset or ("small" if data is None and ours else "full")) == "small"
    output = fresh_directory(output_dir)
    return TrainingRequest(
        seed=seed,
        iters=iters,
        data=(data or _built_in_scene(output)).resolve(),
        method=method,
        output=output.resolve(),
        ns_train=ns_train,
        ns_train_args=(*(presets.SMALL if small else ()), *own_arguments, *arguments),
        stall_timeout=stall_timeout,
        render_budget=int(render_budget * 2**30),
        jobs=jobs,
        load_config=None if load_config is None else load_config.resolve(),
        foreign=provider is not None,
        cost_steps=cost_steps,
        cost_only=cost_only,
        snapshot_every=snapshot_every,
        trace=trace,
    )


def sides_of(seed: int, *, runs: int = 2, control: bool = False) -> dict[str, int]:
    """The sides of a verification with their seeds, the reference first and the control, which must differ, last."""
    sides = {"reference": seed, "candidate": seed} | {f"candidate-{i}": seed for i in range(2, runs)}
    return {**sides, "control": (seed + 1) % 2**32} if control else sides


def train(request: TrainingRequest, sides: Mapping[str, int], *, watch: Watch, fresh: bool = False) -> Trained:
    """Trains every side on the same data; `fresh` lets each extract its features."""
    with shared_data(request, sides, foreign=request.foreign, fresh=fresh, watch=watch) as (viewed, changed):
        ended = run_trainings(viewed, sides, watch=watch)
    runs = {training.side: RunDir(training.directory) for training in ended.trainings if training.directory}
    sentence, told = what_went_wrong(ended)
    return Trained(
        runs=runs,
        missing=tuple(side for side in sides if side not in runs),
        trouble=(*([sentence] if sentence else []), *changed),
        told=told,
        interrupted=ended.interruption is not None,
        output=request.output,
    )


def compare_trained(trained: Trained, *, policy: Policy, reproduce: str = "", assets: Assets | None = None) -> Result:
    """The result over all that was trained, which must be something: see `Trained.nothing_to_compare`."""
    from f3rm_verify.compare_runs import compare_runs

    candidates = {side: run for side, run in trained.runs.items() if side not in ("reference", "control")}
    return compare_runs(
        trained.runs["reference"],
        candidates,
        policy=policy,
        control=trained.runs.get("control"),
        reproduce=reproduce,
        trouble=[*trained.trouble, *(f"the {side} run never began" for side in trained.missing)],
        assets=assets,
    )


def baseline_request(
    baseline: Baseline, *, data: Path | None = None, load_config: Path | None = None, **options: Any
) -> TrainingRequest:
    """The training that a baseline was recorded from, again; `options` are those of `training_request`.

    `data` and `load_config` are needed where the file does not say where they are. Raises UsageError without them.
    """
    request = baseline.request
    data = data or baseline.data
    if data is None and not request["built_in_scene"] and load_config is None:
        raise UsageError(f"{baseline.path} does not say where its data lies; give --data.")
    if (load_config is None) != (request["load_config"] is None):
        raise UsageError(
            f"{baseline.path} was recorded with"
            + ("out --load-config; leave it out." if load_config else " a saved configuration; give --load-config.")
        )
    return training_request(
        tuple(request["arguments"]),
        method=request["method"],
        seed=request["seed"],
        iters=request["iters"],
        data=data,
        load_config=load_config,
        preset=None if load_config else "full",  # its options are among the arguments
        trace=baseline.trace_mode,
        **options,
    )


def compare_with_baseline(
    baseline: Baseline,
    candidate: RunDir,
    *,
    reproduce: str = "",
    trouble: Sequence[str] = (),
    assets: Assets | None = None,
) -> Result:
    """What differs between a run and a baseline; inconclusive where they were made under other conditions."""
    from f3rm_verify.compare_baseline import changed_settings, not_comparable
    from f3rm_verify.compare_runs import compare_runs
    from f3rm_verify.difference import Outcome

    result = compare_runs(
        baseline.run,
        {"candidate": candidate},
        policy=baseline.policy,
        reproduce=reproduce,
        trouble=trouble,
        assets=assets,
    )
    why = not_comparable(result.root)
    if why:
        more = [f"and {len(why) - 5} more conditions differ"] if len(why) > 5 else []
        reasons = [*(f"not comparable with the baseline: {reason}" for reason in why[:5]), *more]
        return dataclasses.replace(
            result, outcome=Outcome.INCONCLUSIVE, first_divergence=None, reasons=(*reasons, *result.reasons)
        )
    changed = changed_settings(result.root)
    if result.first_divergence is None or not changed:
        return result
    first = dataclasses.replace(
        result.first_divergence,
        cause=f"the settings were changed since the baseline was recorded: {'; '.join(changed[:3])}",
        remedy="Change them back; or, where the new result is meant, record the baseline again.",
        evidence=(*result.first_divergence.evidence, *(f"setting {setting}" for setting in changed[3:8])),
    )
    return dataclasses.replace(result, first_divergence=first)


def what_went_wrong(ended: Trainings) -> tuple[str | None, str | None]:
    """Why the trainings ended early in one sentence, and the same with the last log lines of the one that failed."""
    failed = ended.failed
    if failed is not None and failed.failure is not None:
        if told_reason(failed.log) is not None:  # the failure says it
            return failed.failure, f"{failed.failure} Its log is {failed.log}."
        return failed.failure, f"{failed.failure}\nThe end of its log, {failed.log}:\n{last_lines(failed.log)}"
    if ended.interruption is not None:
        return ended.interruption, f"{ended.interruption} What they left is kept and compared."
    return None, None


def _refuse_nonsense(data: Path | None, method: str, numbers: Mapping[str, float]) -> None:
    if not re.fullmatch(METHOD_NAME, method):
        raise UsageError(f"--method {method!r} is not a name that a method can have.")
    if data is not None and not data.exists():
        raise UsageError(f"--data {data} does not exist; give a dataset in a format that nerfstudio reads.")
    for name, value in numbers.items():
        if value != value:
            raise UsageError(f"--{name} is not a number; give one.")


def fresh_directory(parent: Path) -> Path:
    """A new directory in `parent`, named by the time; a run never mixes with another's evidence."""
    stamp = time.strftime("%Y-%m-%d_%H%M%S")
    for name in (stamp, *(f"{stamp}-{i}" for i in range(2, 1000))):
        try:
            (parent / name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"--output-dir {parent} cannot be written to ({error.strerror}).") from error
        return parent / name
    raise UsageError(f"--output-dir {parent} holds a thousand runs of this second; give another one.")


def _built_in_scene(output: Path) -> Path:
    from f3rm_verify.scene import SCENE_NAME, write_scene

    return write_scene(output / SCENE_NAME)
