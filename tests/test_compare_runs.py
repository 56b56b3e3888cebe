from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import (
    EVAL,
    IMAGES,
    LOSS,
    PSNR,
    STEPS,
    TENSOR,
    FakeRun,
    artefacts,
    claim,
    compare,
    compare_fakes,
    leaves,
    plain_run,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from f3rm_verify import compare_runs as module
from f3rm_verify.causes import RULES
from f3rm_verify.compare_runs import compare_runs
from f3rm_verify.difference import ARTEFACTS, Difference, Outcome, Result, Verdict
from f3rm_verify.errors import UnreadableError, UsageError
from f3rm_verify.policy import DIFF_POLICY, IGNORED_TAGS, RUN_POLICY, Policy
from f3rm_verify.run_dir import CHECKPOINTS, CONFIG, MANIFEST, METRICS, RENDERS, SEEDING, TRACE, TRACE_RECORDS, RunDir

Change = Callable[[FakeRun], Any]
NAN = float("nan")
LAST = STEPS - 1


def changed(change: Change, run: FakeRun | None = None) -> FakeRun:
    run = run or FakeRun()
    change(run)
    return run


def nothing(_: FakeRun) -> None:
    pass


class TestReproducible:
    @pytest.mark.parametrize("policy", [RUN_POLICY, DIFF_POLICY])
    def test_two_equal_runs_are(self, tmp_path: Path, policy: Policy) -> None:
        result = compare_fakes(tmp_path, FakeRun(), FakeRun(), policy=policy)
        assert (result.outcome, result.reasons) == (Outcome.REPRODUCIBLE, ())
        assert artefacts(result) == dict.fromkeys(ARTEFACTS, "identical")
        assert (result.pairs, result.steps, result.not_recorded) == (1, STEPS, ())
        assert set(leaves(result, "ignored")) == {"curves/Train Rays / Sec", "metrics/mean/lpips"}

    def test_two_plain_runs_are_in_curves_and_checkpoints(self, tmp_path: Path) -> None:
        result = compare_fakes(tmp_path, plain_run(), plain_run())
        assert result.outcome is Outcome.REPRODUCIBLE
        assert result.not_recorded == ("seeding", "trace", "metrics", "renders")
        assert artefacts(result) == dict.fromkeys(["setup", "curves", "checkpoints"], "identical")

    def test_plain_runs_are_not_enough_for_run(self, tmp_path: Path) -> None:
        result = compare_fakes(tmp_path, plain_run(), plain_run(), policy=RUN_POLICY)
        assert result.outcome is Outcome.INCONCLUSIVE
        assert "metrics: unreadable (neither side recorded it)" in result.reasons

    def test_places_and_times_may_differ(self, tmp_path: Path) -> None:
        def moved(run: FakeRun) -> None:
            run.config |= {"data": "elsewhere", "timestamp": "now", "output_dir": "out", "experiment_name": "x"}
            run.manifest["environment"]["variables"] |= {"OMP_WAIT_POLICY": "PASSIVE"}

        result = compare_fakes(tmp_path, FakeRun(), changed(moved))
        assert result.outcome is Outcome.REPRODUCIBLE
        assert "setup/config.yml/data" in leaves(result, "ignored")

    def test_logging_every_tenth_step_is_enough(self, tmp_path: Path) -> None:
        def sparse(run: FakeRun) -> FakeRun:
            run.config["logging"]["steps_per_log"] = 4
            run.scalars = {LOSS: {0: 1.0, 4: 0.5, 8: 0.25}}
            return run

        for number, make in enumerate((FakeRun, plain_run)):
            result = compare_fakes(tmp_path / str(number), sparse(make()), sparse(make()))
            assert (result.outcome, result.steps) == (Outcome.REPRODUCIBLE, STEPS), result.reasons

    def test_runs_that_went_on_from_a_checkpoint(self, tmp_path: Path) -> None:
        def resumed(run: FakeRun) -> FakeRun:
            run.config["load_dir"] = "earlier/nerfstudio_models"
            run.scalars = {LOSS: {step + 20: 1 / (step + 1) for step in range(STEPS)}}
            run.checkpoints = {20 + LAST: run.checkpoints[LAST]}
            run.manifest["completion"]["first_step"] = 20
            return run

        for number, make in enumerate((FakeRun, plain_run)):
            result = compare_fakes(tmp_path / str(number), resumed(make()), resumed(make()))
            assert (result.outcome, result.steps) == (Outcome.REPRODUCIBLE, STEPS), result.reasons
            assert result.reference["started_from"] == "earlier/nerfstudio_models"

    def test_describes_both_runs(self, tmp_path: Path) -> None:
        result = compare_fakes(tmp_path, FakeRun(), plain_run())
        assert result.reference | {"run_id": None, "implementation": None} == {
            "directory": str(tmp_path / "reference"),
            "run_id": None,
            "method": "f3rm",
            "implementation": None,
            "seed": 42,
            "rank": 0,
            "ranks": 1,
            "threads": 2,
            "device": "cpu",
            "load_config": None,
            "started_from": None,
            "steps": STEPS,
            "completed": True,
            "peak_rss_bytes": None,
        }
        assert (result.candidate["seed"], result.candidate["threads"], result.candidate["run_id"]) == (42, None, None)
        assert result.seeding["reference"][0] == claim("PYTHONHASHSEED", "42")
        assert result.seeding["candidate"] == []


def flip_tensor_bit(run: FakeRun) -> None:
    run.checkpoints[LAST]["pipeline"][TENSOR].view(np.int32)[2, 1] ^= 1


def flip_pixel_bit(run: FakeRun) -> None:
    run.renders[IMAGES[1]]["depth"].view(np.int32)[3, 4, 0] ^= 1


def flip_scalar_bit(run: FakeRun) -> None:
    run.scalars[PSNR][7] = float(np.nextafter(np.float32(run.scalars[PSNR][7]), np.float32(2)))


def change_metric_digit(run: FakeRun) -> None:
    run.metrics["images"][IMAGES[0]]["ssim"] += 2**-53


ONE_FAULT: dict[str, Change] = {
    f"checkpoints/step-{LAST:09d}/pipeline/{TENSOR}": flip_tensor_bit,
    f"renders/{IMAGES[1]}/depth": flip_pixel_bit,
    f"curves/{PSNR}": flip_scalar_bit,
    f"metrics/images/{IMAGES[0]}/ssim": change_metric_digit,
}


class TestDiverged:
    @pytest.mark.parametrize("path", ONE_FAULT)
    def test_one_fault_is_one_node_and_the_rest_is_identical(self, tmp_path: Path, path: str) -> None:
        equal = compare_fakes(tmp_path / "equal", FakeRun(), FakeRun())
        result = compare_fakes(tmp_path / "faulty", FakeRun(), changed(ONE_FAULT[path]))
        assert (result.outcome, leaves(result, "different")) == (Outcome.DIVERGED, [path])
        assert leaves(result, "missing", "unreadable") == []
        assert leaves(result, "identical") == [name for name in leaves(equal, "identical") if name != path]
        assert leaves(result, "ignored") == leaves(equal, "ignored")
        assert result.reasons == (f"there are differences in {path.split('/')[0]}",)

    @pytest.mark.parametrize("path", ONE_FAULT)
    def test_also_in_a_copy(self, tmp_path: Path, path: str) -> None:
        identity = {"run_id": "one", "nonce": "one"}
        runs = FakeRun(), changed(ONE_FAULT[path])
        for run in runs:
            run.manifest |= identity
        result = compare_fakes(tmp_path, *runs)
        assert (result.outcome, leaves(result, "different")) == (Outcome.DIVERGED, [path])
        assert any("one is a copy of the other" in reason for reason in result.reasons)

    def test_a_byte_of_a_copied_checkpoint_file(self, tmp_path: Path) -> None:
        reference = FakeRun().write(tmp_path / "reference")
        candidate = RunDir(shutil.copytree(reference.path, tmp_path / "copy"))
        (file,) = candidate.checkpoints.values()
        content = bytearray(file.read_bytes())
        weight = FakeRun().checkpoints[LAST]["pipeline"][TENSOR].tobytes()
        content[content.index(weight) + 4] ^= 1
        file.write_bytes(content)
        result = compare(reference, candidate)
        assert result.outcome is Outcome.DIVERGED
        assert leaves(result, "different") == [f"checkpoints/step-{LAST:09d}/pipeline/{TENSOR}"]

    def test_wins_over_everything_that_is_inconclusive(self, tmp_path: Path) -> None:
        def broken(run: FakeRun) -> None:
            run.metrics = "{"
            run.manifest |= {"completion": None, "parameters": {"before": "1", "after": None}}
            run.renders = {}
            flip_scalar_bit(run)

        result = compare_fakes(tmp_path, FakeRun(), changed(broken), policy=RUN_POLICY)
        assert result.outcome is Outcome.DIVERGED
        assert artefacts(result)["metrics"] == "unreadable"
        assert any("completion record" in reason for reason in result.reasons)

    def test_wins_over_trouble_and_over_a_control_that_does_not_differ(self, tmp_path: Path) -> None:
        runs = [run.write(tmp_path / str(i)) for i, run in enumerate((FakeRun(), changed(flip_scalar_bit), FakeRun()))]
        result = compare_runs(
            runs[0], {"candidate": runs[1]}, policy=RUN_POLICY, control=runs[2], trouble=["It rained."]
        )
        assert result.outcome is Outcome.DIVERGED
        assert result.reasons[0] == "It rained."
        assert len(result.reasons) == 3

    def test_other_method(self, tmp_path: Path) -> None:
        def other(run: FakeRun) -> None:
            run.config["method_name"] = run.manifest["method"] = "nerfacto"
            run.scalars["Train Loss Dict/other"] = run.scalars.pop(PSNR)
            run.checkpoints[LAST]["pipeline"]["_model.other"] = run.checkpoints[LAST]["pipeline"].pop(TENSOR)
            run.scalars[LOSS] = dict.fromkeys(range(STEPS), 2.0)

        result = compare_fakes(tmp_path, FakeRun(), changed(other))
        assert result.outcome is Outcome.DIVERGED
        assert result.first_divergence is not None
        assert "f3rm in the reference, nerfacto in the candidate" in result.first_divergence.cause
        assert f"curves/{PSNR}" in leaves(result, "missing")

    def test_other_rank(self, tmp_path: Path) -> None:
        def second(run: FakeRun) -> None:
            run.manifest |= {"rank": 1, "seed": 42}
            flip_scalar_bit(run)

        result = compare_fakes(tmp_path, FakeRun(), changed(second))
        assert result.outcome is Outcome.DIVERGED
        assert result.first_divergence is not None
        assert "rank: 0 in the reference, 1 in the candidate" in result.first_divergence.cause


def unfinished(run: FakeRun, steps: int = 6) -> FakeRun:
    """`run` as it is when it was killed after `steps` steps, or after its last one."""
    run.scalars = {tag: {s: v for s, v in values.items() if s < steps} for tag, values in run.scalars.items()}
    run.checkpoints = {4: run.checkpoints[LAST]}
    run.manifest |= {"completion": None, "parameters": {"before": "11", "after": None}}
    run.metrics, run.renders = None, {}
    return run


def no_moments(run: FakeRun) -> None:
    state = run.checkpoints[LAST]["optimizers"]["fields"]["state"][0]
    state["exp_avg"][:] = state["exp_avg_sq"][:] = 0


def zero_steps(run: FakeRun) -> None:
    run.config["max_num_iterations"] = 0
    run.manifest["completion"]["steps"] = 0
    run.scalars, run.checkpoints = {}, {}


#: What both sides are, equal evidence of which says nothing; and a part of the reason.
BOTH: dict[str, tuple[Change, str]] = {
    "no completion record": (unfinished, "completion record"),
    "killed during evaluation": (lambda run: setattr(run, "metrics", None), "did not finish its evaluation"),
    "a record of fewer steps than the curve": (lambda run: run.manifest["completion"].update(steps=5), "says that it"),
    "a record of more steps than the curve": (lambda run: run.manifest["completion"].update(steps=50), "says that it"),
    "a record that begins elsewhere": (lambda run: run.manifest["completion"].update(first_step=5), "says that it"),
    "a record of text": (lambda run: run.manifest["completion"].update(steps="x"), "record is broken"),
    "a record of true": (lambda run: run.manifest["completion"].update(steps=True), "record is broken"),
    "a record that is none": (lambda run: run.manifest.update(completion=[STEPS]), "record is broken"),
    "zero steps": (zero_steps, "did not a single step"),
    "no loss curve": (lambda run: run.scalars.pop(LOSS), "it has no loss curve"),
    "no last checkpoint": (
        lambda run: run.checkpoints.update({3: run.checkpoints.pop(LAST)}),
        f"no checkpoint of its last step, {LAST}",
    ),
    "NaN losses": (lambda run: run.scalars.update({LOSS: dict.fromkeys(range(STEPS), NAN)}), "all its losses are NaN"),
    "parameters that never change": (
        lambda run: run.manifest.update(parameters={"before": "1", "after": "1"}),
        "its parameters never changed",
    ),
    "no digests of parameters": (lambda run: run.manifest.update(parameters=None), "no digests of its parameters"),
    "no gradients": (no_moments, "never saw a gradient"),
    "no config": (lambda run: setattr(run, "config", None), "setup: missing (config.yml: not in the reference and not"),
    "no metrics and no renders": (lambda run: (setattr(run, "metrics", None), run.renders.clear()), "metrics: unread"),
    "no seeding log": (lambda run: setattr(run, "seeding", None), "seeding: unreadable (neither side recorded it)"),
    "no claims": (lambda run: run.seeding.update(entries=[]), "seeding: unreadable (nothing was compared)"),
    "no curves": (lambda run: run.scalars.clear(), "curves: unreadable (neither side recorded it)"),
    "no checkpoints": (lambda run: run.checkpoints.clear(), "checkpoints: unreadable (neither side recorded it)"),
    "environment not recorded": (lambda run: run.manifest.update(environment=3), "setup: missing (environment.python"),
    "data not recorded": (lambda run: run.manifest.pop("data"), "setup: missing (data.files: not in the reference"),
    "LPIPS without a value": (
        lambda run: run.metrics.update(unavailable={}) or run.metrics["mean"].update(lpips=None),
        "metrics: missing (mean / lpips",
    ),
}

#: The same for plain runs.
BOTH_PLAIN: dict[str, tuple[Change, str]] = {
    "unfinished": (unfinished, f"no checkpoint of its last step, {LAST} (its loss curve ends at step 5)"),
    "the last checkpoint, but not the last steps": (
        lambda run: run.scalars.update({LOSS: {0: 1.0, 1: 0.5}}),
        f"says that it did steps 0 to {LAST}, but its loss curve has 0 to 1",
    ),
    "more steps than the curve": (
        lambda run: run.config.update(max_num_iterations=50) or run.checkpoints.update({49: run.checkpoints.pop(LAST)}),
        "says that it did steps 0 to 49, but its loss curve has 0 to 9",
    ),
    "a checkpoint after the last step": (
        lambda run: run.checkpoints.update({30: run.checkpoints[LAST]}),
        "no checkpoint of its last step, 9",
    ),
    "no config": (lambda run: setattr(run, "config", None), "its config.yml or its loss curve is missing"),
    "zero steps": (zero_steps, "cannot be seen to have completed"),
    "a wrong number of steps": (lambda run: run.config.update(max_num_iterations="x"), "cannot be seen"),
    "resumed at a step that is not known": (
        lambda run: run.config.update(load_dir="x") or run.scalars.update({LOSS: {4: 1.0, 8: 0.5}}),
        "no checkpoint of its last step, 13",
    ),
    "NaN losses": (lambda run: run.scalars.update({LOSS: dict.fromkeys(range(STEPS), NAN)}), "all its losses are NaN"),
    "no gradients": (no_moments, "never saw a gradient"),
    "no curves": (lambda run: run.scalars.clear(), "curves: unreadable (neither side recorded it)"),
    "no checkpoints": (lambda run: run.checkpoints.clear(), "checkpoints: unreadable (neither side recorded it)"),
    "only a speed": (
        lambda run: setattr(run, "scalars", {"Train Rays / Sec": {0: 1.0}}),
        "curves: unreadable (everything here is ignored)",
    ),
}

#: What only the candidate is.
ONE_SIDE: dict[str, tuple[Change, str]] = {
    "unfinished": (unfinished, "the candidate did not complete"),
    "without renders": (lambda run: run.renders.clear(), "renders: missing"),
    "without one render": (lambda run: run.renders.pop(IMAGES[0]), f"renders: missing ({IMAGES[0]}"),
    "without metrics": (lambda run: setattr(run, "metrics", None), "metrics: missing"),
    "without a metric": (lambda run: run.metrics["mean"].pop("psnr"), "metrics: missing (mean / psnr"),
    "without a seeding log": (lambda run: setattr(run, "seeding", None), "seeding: missing (PYTHONHASHSEED"),
    "without curves": (lambda run: run.scalars.clear(), "curves: missing"),
    "without a tag": (lambda run: run.scalars.pop(EVAL), "curves: missing (Eval Loss"),
    "without checkpoints": (lambda run: run.checkpoints.clear(), "checkpoints: missing"),
    "with one more checkpoint": (
        lambda run: run.checkpoints.update({3: copy.deepcopy(run.checkpoints[LAST])}),
        "checkpoints: missing (step-000000003",
    ),
    "without a tensor": (lambda run: run.checkpoints[LAST]["pipeline"].pop(TENSOR), "checkpoints: missing (step-"),
    "without a config": (lambda run: setattr(run, "config", None), "setup: missing (config.yml: not in the candidate)"),
    "LPIPS unavailable for another reason": (
        lambda run: run.metrics.update(unavailable={"lpips": "no network"}),
        "metrics: missing (mean / lpips",
    ),
}

#: Conditions in which the candidate differs, and nothing else; and a part of the reason.
CONDITIONS: dict[str, tuple[Change, str]] = {
    "seed": (lambda run: run.manifest.update(seed=43), "seed: 42 in the reference, 43 in the candidate"),
    "seed in the config": (lambda run: run.config["machine"].update(seed=43), "machine.seed: 42"),
    "data": (lambda run: run.manifest["data"]["files"].update({"images/frame_1.png": "zz"}), "aa in the reference, zz"),
    "one more image": (lambda run: run.manifest["data"]["files"].update(new="zz"), "new: not in the reference"),
    "features": (lambda run: run.manifest["data"]["features"].update(digest="zz"), "digest: cc in the reference"),
    "commit": (lambda run: run.manifest["environment"]["git"].update(commit="1" * 40), "environment.git / commit"),
    "package": (lambda run: run.manifest["environment"]["packages"].update(torch="2.16.0"), "torch: 2.15.0"),
    "hardware": (lambda run: run.manifest["environment"]["hardware"].update(cpu="another"), "cpu: a processor"),
    "threads": (lambda run: run.manifest["environment"]["threads"].update(intra_op=1), "intra_op: 2"),
    "variable": (lambda run: run.manifest["environment"]["variables"].update(TCNN_SEED="1"), "TCNN_SEED: not in"),
    "encoding": (lambda run: run.manifest["encodings"].update({"field.position_encoding": "tcnn"}), "tcnn in the cand"),
    "implementation": (lambda run: run.manifest["implementation"].update(model="other"), "implementation / model"),
    "config": (lambda run: run.config.update(mixed_precision=True), "mixed_precision: not in the reference"),
    "claim": (lambda run: run.seeding.update(entries=[claim("PYTHONHASHSEED", "random", "fails")]), "random (fails)"),
    "type of a value": (lambda run: run.config["logging"].update(steps_per_log=True), "1 in the reference, True in"),
}


class TestInconclusive:
    @pytest.mark.parametrize("case", BOTH)
    def test_both_sides_alike(self, tmp_path: Path, case: str) -> None:
        change, reason = BOTH[case]
        result = compare_fakes(tmp_path, changed(change), changed(change), policy=RUN_POLICY)
        assert result.outcome is Outcome.INCONCLUSIVE
        assert any(reason in found for found in result.reasons), result.reasons

    @pytest.mark.parametrize("case", BOTH_PLAIN)
    def test_both_plain_sides_alike(self, tmp_path: Path, case: str) -> None:
        change, reason = BOTH_PLAIN[case]
        result = compare_fakes(tmp_path, changed(change, plain_run()), changed(change, plain_run()))
        assert result.outcome is Outcome.INCONCLUSIVE
        assert any(reason in found for found in result.reasons), result.reasons

    @pytest.mark.parametrize("policy", [RUN_POLICY, DIFF_POLICY])
    @pytest.mark.parametrize("case", ONE_SIDE)
    def test_one_side(self, tmp_path: Path, case: str, policy: Policy) -> None:
        change, reason = ONE_SIDE[case]
        result = compare_fakes(tmp_path, FakeRun(), changed(change), policy=policy)
        assert result.outcome is Outcome.INCONCLUSIVE
        assert any(reason in found for found in result.reasons), result.reasons

    @pytest.mark.parametrize("case", CONDITIONS)
    def test_conditions_differ_and_nothing_else(self, tmp_path: Path, case: str) -> None:
        change, reason = CONDITIONS[case]
        result = compare_fakes(tmp_path, FakeRun(), changed(change))
        assert result.outcome is Outcome.INCONCLUSIVE
        (found,) = result.reasons
        assert "different conditions, and yet nothing else differs" in found
        assert reason in found

    @pytest.mark.parametrize("case", CONDITIONS)
    def test_conditions_differ_and_something_else(self, tmp_path: Path, case: str) -> None:
        change, reason = CONDITIONS[case]
        result = compare_fakes(tmp_path, FakeRun(), changed(flip_tensor_bit, changed(change)))
        assert result.outcome is Outcome.DIVERGED
        assert result.first_divergence is not None
        assert result.first_divergence.cause.removeprefix("likely ").partition(": ")[0] in {rule.name for rule in RULES}
        assert reason in result.first_divergence.cause

    def test_equal_prefixes_of_different_length(self, tmp_path: Path) -> None:
        def short(run: FakeRun) -> None:
            unfinished(run, 6)
            run.config["max_num_iterations"] = 5
            run.scalars = {tag: {s: v for s, v in values.items() if s < 5} for tag, values in run.scalars.items()}

        result = compare_fakes(tmp_path, plain_run(), changed(short, plain_run()))
        assert result.outcome is Outcome.INCONCLUSIVE
        assert "the reference did 10 steps, the candidate 5" in result.reasons

    def test_plain_against_ours(self, tmp_path: Path) -> None:
        result = compare_fakes(tmp_path, FakeRun(), plain_run())
        assert result.outcome is Outcome.INCONCLUSIVE
        assert artefacts(result) == {
            "setup": "missing",
            "seeding": "missing",
            "trace": "missing",
            "curves": "identical",
            "metrics": "missing",
            "checkpoints": "identical",
            "renders": "missing",
        }
        assert "setup: missing (verify/manifest.json: not in the candidate)" in result.reasons

    def test_directories_with_nothing_in_them(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        for policy in (RUN_POLICY, DIFF_POLICY):
            assert compare(RunDir(tmp_path / "a"), RunDir(tmp_path / "b"), policy=policy).outcome.exit_code == 3

    def test_trouble_of_the_launcher(self, tmp_path: Path) -> None:
        result = compare_fakes(tmp_path, FakeRun(), FakeRun(), trouble=["The candidate training was stopped."])
        assert (result.outcome, result.reasons) == (Outcome.INCONCLUSIVE, ("The candidate training was stopped.",))

    def test_nothing_to_compare_is_wrong_usage(self, tmp_path: Path) -> None:
        reference = FakeRun().write(tmp_path / "reference")
        with pytest.raises(UsageError, match="no candidate"):
            compare_runs(reference, {}, policy=RUN_POLICY)
        with pytest.raises(UsageError, match="colours cannot be compared; there are setup, seeding"):
            compare_runs(reference, {"candidate": reference}, policy=RUN_POLICY, only=["colours"])


def remove_identity(run: RunDir, *keys: str) -> None:
    """Edits what identifies a run in its manifest."""
    data = json.loads((run.path / MANIFEST).read_text("utf8"))
    (run.path / MANIFEST).write_text(json.dumps(data | dict.fromkeys(keys, "edited")), "utf8")


class TestOneRun:
    """A run says nothing about another run, however it comes to be on both sides."""

    @pytest.fixture(params=[FakeRun, plain_run])
    def run(self, request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
        made: RunDir = request.param().write(tmp_path / "run")
        return made

    def inconclusive(self, reference: RunDir, candidate: RunDir) -> tuple[str, ...]:
        result = compare(reference, candidate)
        assert result.outcome is Outcome.INCONCLUSIVE
        return result.reasons

    def test_one_directory(self, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "link").symlink_to(run.path)
        monkeypatch.chdir(tmp_path)
        names = ("run/", "./run", "../" + tmp_path.name + "/run", str(tmp_path / "link"), str(run.path))
        for name in names:
            assert self.inconclusive(run, RunDir.open(Path(name))) == ("both sides are one directory",)

    def test_a_copy(self, run: RunDir, tmp_path: Path) -> None:
        (reason,) = self.inconclusive(run, RunDir(shutil.copytree(run.path, tmp_path / "copy")))
        assert "one is a copy of the other" in reason

    def test_a_copy_with_other_identities(self, tmp_path: Path) -> None:
        run = FakeRun().write(tmp_path / "run")
        identities: tuple[str, ...] = ()
        for key in ("run_id", "nonce", "start", "nothing else"):
            copied = RunDir(shutil.copytree(run.path, tmp_path / f"without {key}"))
            remove_identity(copied, *identities)
            (reason,) = self.inconclusive(run, copied)
            assert "one is a copy of the other" in reason
            identities += (key,)

    def test_a_copy_without_its_manifest(self, tmp_path: Path) -> None:
        run = FakeRun().write(tmp_path / "run")
        copied = RunDir(shutil.copytree(run.path, tmp_path / "copy"))
        (copied.path / MANIFEST).unlink()
        assert "both sides logged at the same instants: one is a copy of the other" in self.inconclusive(run, copied)

    def test_two_copies_without_evidence(self, tmp_path: Path) -> None:
        run = FakeRun().write(tmp_path / "run")
        copied = RunDir(shutil.copytree(run.path, tmp_path / "copy"))
        for side in (run, copied):
            shutil.rmtree(side.path / "verify")
        (reason,) = self.inconclusive(RunDir(run.path), copied)
        assert "logged at the same instants" in reason

    def test_hard_links(self, run: RunDir, tmp_path: Path) -> None:
        copied = RunDir(shutil.copytree(run.path, tmp_path / "copy", copy_function=os.link))
        (copied.path / CONFIG).unlink()
        shutil.copy(run.path / CONFIG, copied.path / CONFIG)
        if (copied.path / MANIFEST).exists():
            (copied.path / MANIFEST).unlink()
            shutil.copy(run.path / MANIFEST, copied.path / MANIFEST)
            remove_identity(copied, "run_id", "nonce", "start")
        assert self.inconclusive(run, copied) == ("both sides have the same files on disk (links)",)

    def test_a_hard_linked_checkpoint_alone(self, tmp_path: Path) -> None:
        first, second = FakeRun().write(tmp_path / "first"), FakeRun().write(tmp_path / "second")
        (ours,), (theirs,) = first.checkpoints.values(), second.checkpoints.values()
        theirs.unlink()
        os.link(ours, theirs)
        assert self.inconclusive(first, second) == ("both sides have the same files on disk (links)",)

    def test_a_symbolic_link_to_the_checkpoints_of_the_other(self, tmp_path: Path) -> None:
        first, second = plain_run().write(tmp_path / "first"), plain_run().write(tmp_path / "second")
        shutil.rmtree(second.path / CHECKPOINTS)
        (second.path / CHECKPOINTS).symlink_to(first.path / CHECKPOINTS)
        assert any("leads out of the run directory" in reason for reason in self.inconclusive(first, second))

    def test_two_candidates(self, tmp_path: Path) -> None:
        reference, one = FakeRun().write(tmp_path / "reference"), FakeRun().write(tmp_path / "one")
        two = RunDir(shutil.copytree(one.path, tmp_path / "two"))
        result = compare_runs(reference, {"one": one, "two": two}, policy=RUN_POLICY)
        assert result.outcome is Outcome.INCONCLUSIVE
        assert result.reasons[0].startswith("one and two are one run: both sides have the run id")


class TestOnly:
    @pytest.mark.parametrize("path", ONE_FAULT)
    def test_exactly_what_is_named(self, tmp_path: Path, path: str) -> None:
        artefact = path.split("/")[0]
        others = [name for name in ("curves", "metrics", "checkpoints", "renders") if name != artefact]
        faulty = changed(ONE_FAULT[path])
        result = compare_fakes(tmp_path / "others", FakeRun(), faulty, only=others)
        assert result.outcome is Outcome.REPRODUCIBLE
        assert list(artefacts(result)) == others
        result = compare_fakes(tmp_path / "it", FakeRun(), faulty, only=[artefact])
        assert result.outcome is Outcome.DIVERGED
        assert artefacts(result) == {artefact: "different"}

    def test_in_causal_order(self, tmp_path: Path) -> None:
        result = compare_fakes(tmp_path, FakeRun(), FakeRun(), only=["renders", "curves", "setup", "curves"])
        assert list(artefacts(result)) == ["setup", "curves", "renders"]
        assert result.policy["only"] == ["renders", "curves", "setup", "curves"]
        assert result.not_recorded == ()

    @pytest.mark.parametrize("artefact", ["seeding", "trace", "metrics", "renders"])
    def test_what_neither_side_has(self, tmp_path: Path, artefact: str) -> None:
        result = compare_fakes(tmp_path, plain_run(), plain_run(), only=[artefact, "curves"])
        assert result.outcome is Outcome.INCONCLUSIVE
        assert result.reasons == (f"{artefact}: unreadable (neither side recorded it)",)
        assert result.not_recorded == (artefact,)

    def test_conditions_alone(self, tmp_path: Path) -> None:
        other = changed(lambda run: run.manifest.update(seed=43))
        assert compare_fakes(tmp_path / "1", FakeRun(), FakeRun(), only=["setup"]).outcome is Outcome.REPRODUCIBLE
        result = compare_fakes(tmp_path / "2", FakeRun(), other, only=["setup", "seeding"])
        assert result.outcome is Outcome.DIVERGED
        assert result.first_divergence is not None
        assert (result.first_divergence.step, result.first_divergence.subject) == (None, "setup/seed")
        assert compare_fakes(tmp_path / "3", FakeRun(), other, only=["seeding"]).outcome is Outcome.REPRODUCIBLE

    def test_conditions_that_were_not_named_still_explain(self, tmp_path: Path) -> None:
        other = changed(flip_tensor_bit, changed(lambda run: run.manifest.update(seed=43)))
        result = compare_fakes(tmp_path, FakeRun(), other, only=["checkpoints"])
        assert list(artefacts(result)) == ["checkpoints"]
        assert result.first_divergence is not None
        assert "seed: 42 in the reference, 43" in result.first_divergence.cause

    @pytest.mark.parametrize("artefact", ["setup", "curves", "checkpoints"])
    def test_an_unfinished_run_stays_inconclusive(self, tmp_path: Path, artefact: str) -> None:
        result = compare_fakes(tmp_path, unfinished(FakeRun()), unfinished(FakeRun()), only=[artefact])
        assert result.outcome is Outcome.INCONCLUSIVE


class TestTolerance:
    @pytest.fixture
    def tolerant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Curves that differ within a limit that somebody set."""
        leaf = Difference(name=LOSS, artefact="curves", verdict=Verdict.WITHIN_TOLERANCE, summary="1 ulp of 2")
        node = Difference.group(name="curves", artefact="curves", children=[leaf])
        monkeypatch.setattr(module, "compare_curves", lambda *_, **__: node)

    @pytest.mark.usefixtures("tolerant")
    def test_is_a_pass_of_its_own(self, tmp_path: Path) -> None:
        result = compare_fakes(tmp_path, FakeRun(), FakeRun(), policy=RUN_POLICY)
        assert (result.outcome, result.outcome.exit_code) == (Outcome.WITHIN_TOLERANCE, 0)

    @pytest.mark.usefixtures("tolerant")
    def test_is_worse_than_missing_and_different(self, tmp_path: Path) -> None:
        missing = changed(lambda run: run.renders.clear())
        assert compare_fakes(tmp_path / "1", FakeRun(), missing).outcome is Outcome.INCONCLUSIVE
        assert compare_fakes(tmp_path / "2", FakeRun(), changed(flip_tensor_bit)).outcome is Outcome.DIVERGED

    def test_an_ignored_artefact_is_no_pass(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        node = Difference(name="curves", artefact="curves", verdict=Verdict.IGNORED, summary="why not")
        monkeypatch.setattr(module, "compare_curves", lambda *_, **__: node)
        result = compare_fakes(tmp_path, FakeRun(), FakeRun(), policy=RUN_POLICY)
        assert result.reasons == ("curves: ignored (why not)",)


class TestSeveralCandidates:
    def compare(self, tmp_path: Path, *candidates: FakeRun, **options: Any) -> Result:
        reference = FakeRun().write(tmp_path / "reference")
        runs = {f"c{i}": run.write(tmp_path / f"c{i}") for i, run in enumerate(candidates)}
        return compare_runs(reference, runs, policy=options.pop("policy", RUN_POLICY), **options)

    def test_all_equal(self, tmp_path: Path) -> None:
        result = self.compare(tmp_path, FakeRun(), FakeRun(), FakeRun())
        assert (result.outcome, result.pairs) == (Outcome.REPRODUCIBLE, 3)
        assert [node.name for node in result.root.children] == ["c0", "c1", "c2"]
        assert len(result.candidates) == 3

    def test_the_worst_wins(self, tmp_path: Path) -> None:
        result = self.compare(tmp_path, FakeRun(), unfinished(FakeRun()))
        assert result.outcome is Outcome.INCONCLUSIVE
        assert all(reason.startswith("c1: ") for reason in result.reasons)
        result = self.compare(tmp_path / "2", changed(flip_pixel_bit), unfinished(FakeRun()), FakeRun())
        assert result.outcome is Outcome.DIVERGED
        assert result.candidate["directory"].endswith("c0")
        assert result.reasons[0] == "c0: there are differences in renders"

    def test_the_earliest_divergence_is_the_first(self, tmp_path: Path) -> None:
        result = self.compare(
            tmp_path,
            changed(flip_pixel_bit),
            changed(flip_scalar_bit),
            changed(lambda run: run.scalars[LOSS].update({2: 9.0})),
        )
        assert result.first_divergence is not None
        assert (result.first_divergence.step, result.first_divergence.subject) == (2, LOSS)
        assert result.candidate["directory"].endswith("c2")

    def test_not_recorded_is_what_no_pair_recorded(self, tmp_path: Path) -> None:
        reference = plain_run().write(tmp_path / "reference")
        runs = {"a": plain_run().write(tmp_path / "a"), "b": FakeRun().write(tmp_path / "b")}
        result = compare_runs(reference, runs, policy=DIFF_POLICY)
        assert result.not_recorded == ()
        assert result.outcome is Outcome.INCONCLUSIVE


class TestControl:
    def compare(self, tmp_path: Path, control: FakeRun) -> Result:
        runs = [run.write(tmp_path / str(i)) for i, run in enumerate((FakeRun(), FakeRun(), control))]
        return compare_runs(runs[0], {"candidate": runs[1]}, policy=RUN_POLICY, control=runs[2])

    @staticmethod
    def with_seed(seed: object) -> FakeRun:
        return changed(lambda run: run.manifest.update(seed=seed))

    def test_that_differs(self, tmp_path: Path) -> None:
        result = self.compare(tmp_path, changed(flip_scalar_bit, self.with_seed(43)))
        assert result.outcome is Outcome.REPRODUCIBLE
        assert result.control == {
            "seed": 43,
            "directory": str(tmp_path / "2"),
            "differs": True,
            "verdict": "different",
            "summary": "differs in curves",
        }

    def test_that_differs_in_its_setup_alone(self, tmp_path: Path) -> None:
        result = self.compare(tmp_path, self.with_seed(43))
        assert result.outcome is Outcome.INCONCLUSIVE
        (reason,) = result.reasons
        assert reason.startswith("the control run with seed 43 does not differ: this training ignores its seed")
        assert result.control is not None and result.control["verdict"] == "inconclusive"

    @pytest.mark.parametrize("seed", [42, None, "43"])
    def test_with_no_other_seed_shows_nothing(self, tmp_path: Path, seed: object) -> None:
        result = self.compare(tmp_path, changed(flip_scalar_bit, self.with_seed(seed)))
        assert result.outcome is Outcome.INCONCLUSIVE
        assert result.control is not None
        assert (result.control["differs"], result.control["verdict"]) == (False, "inconclusive")

    def test_that_left_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        runs = [FakeRun().write(tmp_path / str(i)) for i in range(2)]
        control = RunDir(tmp_path / "empty")
        result = compare_runs(runs[0], {"candidate": runs[1]}, policy=RUN_POLICY, control=control)
        assert result.outcome is Outcome.INCONCLUSIVE


#: Content of one file of the candidate that is broken, with its artefact.
BROKEN: dict[str, tuple[str, str, bytes]] = {
    "manifest, empty": ("setup", MANIFEST, b""),
    "manifest, truncated": ("setup", MANIFEST, b'{"schema_version": 1, "run_id": "a'),
    "manifest, a list": ("setup", MANIFEST, b"[]"),
    "manifest, null": ("setup", MANIFEST, b"null"),
    "manifest, empty object": ("setup", MANIFEST, b"{}"),
    "manifest, of the future": ("setup", MANIFEST, b'{"schema_version": 2}'),
    "manifest, no UTF-8": ("setup", MANIFEST, b"\xff\xfe{}"),
    "manifest, too deep": ("setup", MANIFEST, b"[" * 100_000),
    "seeding, truncated": ("seeding", SEEDING, b'{"entries": ['),
    "seeding, null": ("seeding", SEEDING, b"null"),
    "seeding, no entries": ("seeding", SEEDING, b"{}"),
    "seeding, entries of text": ("seeding", SEEDING, b'{"entries": "abc"}'),
    "seeding, entries of numbers": ("seeding", SEEDING, b'{"entries": [1, 2]}'),
    "seeding, a claim that is none": ("seeding", SEEDING, b'{"entries": [{"claim": ["x"], "observed": {}}]}'),
    "seeding, one claim twice": ("seeding", SEEDING, json.dumps({"entries": [claim("a", "b")] * 2}).encode()),
    "trace, empty": ("trace", TRACE, b""),
    "trace, of the future": ("trace", TRACE, b'{"schema_version": 2}'),
    "trace, no names": ("trace", TRACE, b'{"schema_version": 1, "subjects": 3}'),
    "trace, other names": (
        "trace",
        TRACE,
        b'{"schema_version": 1, "subjects": [{"stage": "x", "name": [], "kind": 3}]}',
    ),
    "trace records, damaged": ("trace", TRACE_RECORDS, b"0123456789abcdef" * 4),
    "metrics, truncated": ("metrics", METRICS, b'{"split": "val", "im'),
    "metrics, a list": ("metrics", METRICS, b"[]"),
    "metrics, null": ("metrics", METRICS, b"null"),
    "metrics, wrong types": ("metrics", METRICS, b'{"split": 3, "images": [], "mean": 3, "unavailable": 1}'),
    "config, empty": ("setup", CONFIG, b""),
    "config, no YAML": ("setup", CONFIG, b"a: [1"),
    "config, hostile": ("setup", CONFIG, b'a: &a ["x"]\n' + b"b: !!python/object/apply:os.system ['touch pwned']\n- x"),
    "config, a list": ("setup", CONFIG, b"- 1\n- 2\n"),
    "checkpoint, empty": ("checkpoints", f"{CHECKPOINTS}/step-{LAST:09d}.ckpt", b""),
    "checkpoint, truncated": ("checkpoints", f"{CHECKPOINTS}/step-{LAST:09d}.ckpt", b"PK\x03\x04" + b"\0" * 64),
    "render, truncated": ("renders", f"{RENDERS}/{IMAGES[0]}/rgb.npy", b"\x93NUMPY\x01\x00v\x00{'descr'"),
}


class TestBrokenEvidence:
    """A broken file is an unreadable node of its artefact, and the others are compared."""

    @pytest.mark.parametrize("both", [False, True])
    @pytest.mark.parametrize("case", BROKEN)
    def test_is_an_unreadable_node(self, tmp_path: Path, case: str, both: bool) -> None:
        artefact, name, content = BROKEN[case]
        runs = FakeRun().write(tmp_path / "reference"), FakeRun().write(tmp_path / "candidate")
        for run in runs[0 if both else 1 :]:
            (run.path / name).write_bytes(content)
        result = compare(*(RunDir(run.path) for run in runs))
        assert result.outcome is Outcome.INCONCLUSIVE
        assert artefacts(result) == {**dict.fromkeys(ARTEFACTS, "identical"), artefact: "unreadable"}
        assert any(reason.startswith(f"{artefact}: unreadable (") for reason in result.reasons)
        assert not (tmp_path / "pwned").exists()

    def test_the_side_is_named(self, tmp_path: Path) -> None:
        runs = (
            FakeRun().write(tmp_path / "reference"),
            changed(lambda run: setattr(run, "manifest", "{")).write(tmp_path / "candidate"),
        )
        result = compare(*runs)
        (node,) = (node for _, node in result.root.leaves() if node.verdict is Verdict.UNREADABLE)
        assert node.name == MANIFEST
        assert node.summary.startswith("candidate: verify/manifest.json: not readable as JSON (Expecting")
        assert "the candidate cannot be seen to have completed: its manifest or its" in result.reasons[0]

    @pytest.mark.parametrize(
        "content",
        [
            {"environment": 3},
            {"environment": {"threads": 3, "packages": [], "variables": "x", "hardware": None}},
            {"completion": {"steps": "x"}},
            {"completion": {"first_step": -1, "steps": 10}},
            {"completion": 3},
            {"run_id": ["a"], "nonce": {}, "start": "soon"},
            {"implementation": ["a"], "method": 3, "seed": "x", "rank": {}},
            {"seed": 10**400},
            {"data": {"files": [1, 2], "features": 1}},
            {"parameters": {"before": ["a"], "after": 3}},
            {"environment": {"git": {"commit": {"a": {"b": [[[[]]]]}}}}},
        ],
    )
    def test_wrong_types_in_the_manifest(self, tmp_path: Path, content: dict[str, Any]) -> None:
        result = compare_fakes(tmp_path, FakeRun(), changed(lambda run: run.manifest.update(content)))
        assert result.outcome.exit_code in (3, 0)
        assert (result.outcome.exit_code == 0) == ("run_id" in content)

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_anything_in_the_manifest(self, tmp_path: Path, data: st.DataObject) -> None:
        values = st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
            max_leaves=5,
        )
        manifest = FakeRun().manifest
        part: dict[str, Any] = manifest
        for _ in range(data.draw(st.integers(0, 2))):
            part = data.draw(st.sampled_from([value for value in part.values() if isinstance(value, dict)] or [part]))
        key = data.draw(st.sampled_from([key for key in part if key != "schema_version"]))
        before, part[key] = part[key], data.draw(values)
        folder = tmp_path / data.draw(st.uuids().map(str))
        changed_run = FakeRun(manifest=manifest, renders={}, metrics=None)
        result = compare_fakes(folder, FakeRun(renders={}, metrics=None), changed_run)
        shutil.rmtree(folder)
        assert result.outcome.exit_code in (0, 3)
        if json.dumps(before) != json.dumps(part[key]) and result.outcome.exit_code == 0:
            # The words of the command hold each side's own folder: what they ask for is compared in the configuration.
            assert key in ("OMP_NUM_THREADS", "argv") or part is manifest.get("parameters"), key

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(start=st.integers(0, 1500), length=st.integers(1, 40), filler=st.binary(max_size=3))
    def test_any_damage_to_the_manifest(self, tmp_path: Path, start: int, length: int, filler: bytes) -> None:
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        runs = [FakeRun(renders={}, metrics=None).write(folder / side) for side in ("reference", "candidate")]
        content = (runs[1].path / MANIFEST).read_bytes()
        (runs[1].path / MANIFEST).write_bytes(content[:start] + filler + content[start + length :])
        result = compare(*runs)
        assert result.outcome.exit_code in (0, 3)
        assert {artefacts(result)[name] for name in ("curves", "checkpoints")} == {"identical"}

    def test_a_file_that_goes_away_while_it_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for error in (UnreadableError("curves: gone."), OSError("gone")):

            def fail(*_: Any, error: Exception = error, **__: Any) -> Difference:
                raise error

            monkeypatch.setattr(module, "compare_curves", fail)
            result = compare_fakes(tmp_path / type(error).__name__, FakeRun(), FakeRun())
            assert (artefacts(result)["curves"], result.outcome) == ("unreadable", Outcome.INCONCLUSIVE)
            assert artefacts(result)["checkpoints"] == "identical"

    @pytest.mark.parametrize("both", [False, True])
    def test_links_are_never_compared_as_nothing(self, tmp_path: Path, both: bool) -> None:
        (tmp_path / "outside").mkdir()
        np.save(tmp_path / "outside" / "rgb.npy", np.zeros((2, 2), np.float32))
        runs = FakeRun().write(tmp_path / "reference"), FakeRun().write(tmp_path / "candidate")
        for run in runs[0 if both else 1 :]:
            (run.path / RENDERS / "eval_0002").symlink_to(tmp_path / "outside")
        result = compare(*runs)
        assert result.outcome is Outcome.INCONCLUSIVE
        assert artefacts(result)["renders"] == "unreadable"


def test_a_policy_reaches_the_comparators(tmp_path: Path) -> None:
    policy = dataclasses.replace(RUN_POLICY, ignored={"curves": {**IGNORED_TAGS, PSNR: "a test"}})
    result = compare_fakes(tmp_path, FakeRun(), changed(flip_scalar_bit), policy=policy)
    assert result.outcome is Outcome.REPRODUCIBLE
    assert f"curves/{PSNR}" in leaves(result, "ignored")
    assert result.policy["ignored"]["curves"][PSNR] == "a test"


def test_a_policy_that_nothing_could_fail_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="requires nothing that a training puts out"):
        compare_fakes(tmp_path, FakeRun(), FakeRun(), policy=Policy(required=()))
