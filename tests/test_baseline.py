"""Baselines: what is recorded, that every change of a run shows, and that nothing else does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import (
    GRAD,
    IMAGES,
    INIT,
    LOSS,
    PSNR,
    RATE,
    RNG,
    STEPS,
    TENSOR,
    FakeRun,
    FakeTrace,
    _manifest,
    claim,
    plain_run,
    run_of_ranks,
)

from f3rm_verify.baseline import Baseline, make_baseline, read_baseline, write_baseline
from f3rm_verify.difference import Outcome, Result
from f3rm_verify.errors import UsageError
from f3rm_verify.policy import DIFF_POLICY, RUN_POLICY, Limit, Policy
from f3rm_verify.run_dir import RunDir
from f3rm_verify.verification import compare_with_baseline


def record(folder: Path, run: FakeRun, *, policy: Policy = RUN_POLICY, runs: int = 2) -> Baseline:
    file = folder / "baseline.json"
    write_baseline(file, make_baseline(run.write(folder / "recorded"), file, policy=policy, runs=runs))
    return read_baseline(file)


def check(folder: Path, recorded: FakeRun, run: FakeRun, *, policy: Policy = RUN_POLICY) -> Result:
    result = compare_with_baseline(record(folder, recorded, policy=policy), run.write(folder / "run"))
    assert (result.first_divergence is None) == (result.outcome is not Outcome.DIVERGED)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert Result.from_dict(data).to_dict() == data
    return result


def changed(change: Callable[[FakeRun], object], run: FakeRun | None = None) -> FakeRun:
    run = run or FakeRun()
    change(run)
    return run


def differing(result: Result) -> list[str]:
    found = ((path, node.verdict.value) for path, node in result.root.leaves())
    return ["/".join(path[1:]) for path, verdict in found if verdict == "different"]


def flip(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array with the last bit of its last value flipped."""
    array = array.copy()
    array.reshape(-1).view(np.uint32)[-1] ^= 1
    return array


def flip_number(value: float) -> float:
    return float(flip(np.array([value], np.float32))[0])


def environment(*keys: str, value: Any) -> Callable[[FakeRun], None]:
    def change(run: FakeRun) -> None:
        table = run.manifest["environment"]
        for key in keys[:-1]:
            table = table[key]
        table[keys[-1]] = value

    return change


class TestTheSame:
    def test_an_equal_run_is_reproducible(self, tmp_path: Path) -> None:
        result = check(tmp_path, FakeRun(), FakeRun())
        assert result.outcome is Outcome.REPRODUCIBLE
        assert {node.name for node in result.root.children} == set(RUN_POLICY.required or ())
        assert {node.verdict.value for node in result.root.children} == {"identical"}
        assert result.reference["directory"].endswith("baseline.json")
        assert result.steps == STEPS

    def test_so_is_one_of_several_ranks(self, tmp_path: Path) -> None:
        result = check(tmp_path, run_of_ranks(), run_of_ranks())
        assert result.outcome is Outcome.REPRODUCIBLE
        assert {"rank 1", "rank 2"} <= {node.name for node in result.root.children}

    @pytest.mark.parametrize(
        "change",
        [
            environment("platform", value="Linux-5.4.0-other"),
            environment("hardware", "cores", value=64),
            environment("git", value={"commit": "1" * 40, "dirty": True}),
            environment("packages", "rich", value="1"),
            environment("variables", "OMP_WAIT_POLICY", value="ACTIVE"),
            environment("variables", "CUDA_VISIBLE_DEVICES", value="3"),
            environment("executable", value="elsewhere/python"),
            lambda run: run.manifest.update(pid=1, start=2.5, nonce="other", torch_initial_seed=1),
            lambda run: run.manifest["argv"].__setitem__(3, "elsewhere"),
            lambda run: run.manifest["data"].update(folder="elsewhere"),
            lambda run: run.config.update(output_dir="elsewhere", timestamp="candidate", data="elsewhere"),
        ],
    )
    def test_what_does_not_matter_is_not_compared(self, tmp_path: Path, change: Callable[[FakeRun], object]) -> None:
        assert check(tmp_path, FakeRun(), changed(change)).outcome is Outcome.REPRODUCIBLE

    def test_settings_that_changed_nothing_are_named(self, tmp_path: Path) -> None:
        result = check(tmp_path, FakeRun(), changed(lambda run: run.config.update(new_setting=1)))
        assert result.outcome is Outcome.REPRODUCIBLE
        ignored = [node for path, node in result.root.leaves() if path[-1] == "new_setting"]
        assert ignored[0].summary.startswith("part of what is checked")


def _flip_parameter(run: FakeRun) -> None:
    tree = run.checkpoints[STEPS - 1]["pipeline"]
    tree[TENSOR] = flip(tree[TENSOR])


def _flip_moment(run: FakeRun) -> None:
    moments = run.checkpoints[STEPS - 1]["optimizers"]["fields"]["state"][0]
    moments["exp_avg"] = flip(moments["exp_avg"])


def _change_lr(run: FakeRun) -> None:
    run.checkpoints[STEPS - 1]["optimizers"]["fields"]["param_groups"][0]["lr"] = np.nextafter(0.01, 1).item()


def _flip_render(run: FakeRun, name: str) -> None:
    for outputs in run.renders.values():
        if name in outputs:
            outputs[name] = flip(outputs[name])


def _change_metric(run: FakeRun) -> None:
    run.metrics["images"][IMAGES[1]]["ssim"] = np.nextafter(0.875, 0).item()


def _trace(run: FakeRun) -> FakeTrace:
    assert run.trace is not None
    return run.trace


CHANGES: dict[str, tuple[Callable[[FakeRun], object], str]] = {
    "the loss of a step": (
        lambda run: run.scalars[LOSS].update({4: flip_number(run.scalars[LOSS][4])}),
        f"curves/{LOSS}",
    ),
    "another curve": (lambda run: run.scalars[PSNR].update({7: flip_number(run.scalars[PSNR][7])}), f"curves/{PSNR}"),
    "a gradient": (lambda run: _trace(run).steps[3].update({GRAD: 5}), "trace/grad/all records"),
    "what a training starts from": (lambda run: _trace(run).before.update({INIT: 8}), "trace/init/all records"),
    "a generator that is looked at once more": (
        lambda run: _trace(run).steps[3].pop(RNG),
        "trace/rng/all records",
    ),
    "a parameter": (_flip_parameter, f"checkpoints/step-{STEPS - 1:09d}/pipeline/{TENSOR}"),
    "a moment": (_flip_moment, f"checkpoints/step-{STEPS - 1:09d}/optimizers/fields/state/0/exp_avg"),
    "a scalar": (_change_lr, f"checkpoints/step-{STEPS - 1:09d}/optimizers/fields/param_groups/[0]/lr"),
    "a picture": (lambda run: _flip_render(run, "rgb"), f"renders/{IMAGES[0]}/rgb"),
    "features": (lambda run: _flip_render(run, "feature"), f"renders/{IMAGES[0]}/feature.bands"),
    "a depth": (lambda run: _flip_render(run, "depth"), f"renders/{IMAGES[1]}/depth"),
    "a metric": (_change_metric, f"metrics/images/{IMAGES[1]}/ssim"),
}


class TestChanges:
    @pytest.mark.parametrize("what", CHANGES)
    def test_one_flipped_bit_is_named(self, tmp_path: Path, what: str) -> None:
        change, path = CHANGES[what]
        result = check(tmp_path, FakeRun(), changed(change))
        assert result.outcome is Outcome.DIVERGED
        assert differing(result) == [path]

    def test_a_curve_names_its_step_and_values(self, tmp_path: Path) -> None:
        result = check(tmp_path, FakeRun(), changed(CHANGES["the loss of a step"][0]))
        assert result.first_divergence is not None
        assert (result.first_divergence.step, result.first_divergence.last_equal_step) == (4, 3)
        assert result.first_divergence.subject == LOSS
        leaf = next(node for path, node in result.root.leaves() if path[-1] == LOSS)
        assert leaf.measures["max_ulp"] == 1

    def test_one_of_a_rank_above_the_first(self, tmp_path: Path) -> None:
        run = run_of_ranks()
        run.ranks[2].scalars[LOSS][3] = flip_number(run.ranks[2].scalars[LOSS][3])
        result = check(tmp_path, run_of_ranks(), run)
        assert result.outcome is Outcome.DIVERGED
        assert differing(result) == [f"rank 2/curves/{LOSS}"]
        assert result.first_divergence is not None and result.first_divergence.rank == 2

    def test_long_curves_are_kept_as_digests_but_for_the_loss(self, tmp_path: Path) -> None:
        def run(at: int | None = None) -> FakeRun:
            steps = 8_000
            tags = {
                tag: {step: float(np.float32(step / 7)) for step in range(steps)} for tag in (LOSS, PSNR, RATE, "z")
            }
            if at is not None:
                tags["z"][at] = flip_number(tags["z"][at])
            manifest = _manifest() | {"completion": {"first_step": 0, "steps": steps}}
            checkpoints = {steps - 1: FakeRun().checkpoints[STEPS - 1]}
            return FakeRun(scalars=tags, manifest=manifest, checkpoints=checkpoints, trace=None)

        baseline = record(tmp_path, run(), policy=RUN_POLICY.without("trace"))
        assert baseline.path.stat().st_size < 200_000
        events = baseline.run.events
        assert set(events.scalars) == {LOSS, PSNR, RATE} and set(events.blobs) == {"z"}
        assert compare_with_baseline(baseline, run().write(tmp_path / "same")).outcome is Outcome.REPRODUCIBLE
        result = compare_with_baseline(baseline, run(at=5_000).write(tmp_path / "other"))
        assert result.outcome is Outcome.DIVERGED
        assert differing(result) == ["curves/z"]
        assert result.first_divergence is not None
        assert result.first_divergence.step == 5_000 - 5_000 % 125

    def test_a_trace_names_step_and_stage(self, tmp_path: Path) -> None:
        result = check(tmp_path, FakeRun(), changed(CHANGES["a gradient"][0]))
        first = result.first_divergence
        assert first is not None
        assert (first.step, first.last_equal_step, first.stage, first.subject) == (3, 2, "grad", "all records")

    def test_of_a_long_trace_some_steps_are_taken_together(self, tmp_path: Path) -> None:
        steps = 4_000

        def run(at: int | None = None) -> FakeRun:
            trace = FakeTrace(steps={step: {GRAD: step, RNG: 2**64 - 1 - step} for step in range(steps)})
            if at is not None:
                trace.steps[at][GRAD] ^= 1
            scalars = {LOSS: {step: float(np.float32(step / 7)) for step in range(steps)}}
            manifest = _manifest() | {"completion": {"first_step": 0, "steps": steps}}
            checkpoints = {steps - 1: FakeRun().checkpoints[STEPS - 1]}
            return FakeRun(trace=trace, scalars=scalars, manifest=manifest, checkpoints=checkpoints)

        baseline = record(tmp_path, run())
        assert baseline.path.stat().st_size < 100_000
        assert compare_with_baseline(baseline, run().write(tmp_path / "same")).outcome is Outcome.REPRODUCIBLE
        first = compare_with_baseline(baseline, run(at=3_001).write(tmp_path / "other")).first_divergence
        assert first is not None
        assert (first.step, first.last_equal_step, first.stage) == (3_000, 2_997, "grad")

    def test_an_earlier_checkpoint_is_one_digest(self, tmp_path: Path) -> None:
        def run() -> FakeRun:
            return changed(lambda run: run.checkpoints.update({4: FakeRun().checkpoints[STEPS - 1]}))

        other = run()
        other.checkpoints[4]["pipeline"][TENSOR] = flip(other.checkpoints[4]["pipeline"][TENSOR])
        result = check(tmp_path, run(), other)
        assert differing(result) == ["checkpoints/step-000000004/(everything)"]

    def test_changed_settings_are_the_cause(self, tmp_path: Path) -> None:
        def change(run: FakeRun) -> None:
            run.config["lr"] = 0.02
            _flip_parameter(run)

        recorded = changed(lambda run: run.config.update(lr=0.01))
        result = check(tmp_path, recorded, changed(change))
        assert result.first_divergence is not None
        assert "lr: 0.01 in the baseline, 0.02 in the run" in result.first_divergence.cause


class TestNotComparable:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (environment("python", value="3.12.1"), "environment / python: 3.11 in the baseline, 3.12 in the run"),
            (environment("platform", value="Darwin-23-arm64"), "environment / platform"),
            (environment("packages", "torch", value="2.16"), "environment / packages.torch: 2.15.0 in the baseline"),
            (environment("packages", "numpy", value="1.26"), "environment / packages.numpy"),
            (environment("packages", "tinycudann", value="1"), "environment / packages.tinycudann: nothing"),
            (environment("hardware", "cpu", value="another"), "environment / hardware.cpu"),
            (environment("hardware", "cpu_flags", value="avx2"), "environment / hardware.cpu_flags"),
            (environment("hardware", "gpus", value=["a GPU"]), "environment / hardware.gpus"),
            (environment("hardware", "cuda", value="12.4"), "environment / hardware.cuda"),
            (environment("hardware", "driver", value="550"), "environment / hardware.driver"),
            (environment("threads", "intra_op", value=1), "environment / threads.intra_op: 2 in the baseline, 1"),
            (environment("variables", "MKL_CBWR", value="AVX2"), "environment / variables.MKL_CBWR"),
            (
                lambda run: run.manifest["encodings"].update({"field.position_encoding": "tcnn"}),
                "environment / encodings",
            ),
            (lambda run: run.manifest["implementation"].update(model="m.M"), "environment / implementation.model"),
            (lambda run: run.manifest.update(seed=43), "request / seed: 42 in the baseline, 43 in the run"),
            (lambda run: run.manifest.update(method="nerfacto"), "request / method"),
            (lambda run: run.manifest["argv"].append("--b"), "request / arguments"),
            (lambda run: run.manifest.update(load_config={"digest": "1"}), "request / load_config"),
            (lambda run: run.manifest["data"]["files"].update({"transforms.json": "bc"}), "data / files"),
            (lambda run: run.manifest["data"]["files"].pop("images/frame_1.png"), "data / files"),
            (lambda run: run.manifest["data"].update(features={"digest": "cd"}), "data / features"),
            (lambda run: run.seeding["entries"].append(claim("libraries", "AVX512")), "environment / libraries"),
        ],
    )
    @pytest.mark.parametrize("differs", [False, True])
    def test_other_conditions_are_named(
        self, tmp_path: Path, change: Callable[[FakeRun], object], named: str, differs: bool
    ) -> None:
        run = changed(change, changed(_flip_parameter) if differs else FakeRun())
        result = check(tmp_path, FakeRun(), run)
        assert result.outcome is Outcome.INCONCLUSIVE
        assert any(reason.startswith(f"not comparable with the baseline: {named}") for reason in result.reasons)

    def test_a_plain_run(self, tmp_path: Path) -> None:
        assert check(tmp_path, FakeRun(), plain_run()).outcome is Outcome.INCONCLUSIVE

    def test_an_incomplete_run(self, tmp_path: Path) -> None:
        result = check(tmp_path, FakeRun(), changed(lambda run: run.manifest.update(completion=None)))
        assert result.outcome is Outcome.INCONCLUSIVE
        assert "the candidate did not complete" in " ".join(result.reasons)

    def test_a_run_that_trained_nothing(self, tmp_path: Path) -> None:
        result = check(tmp_path, FakeRun(), changed(lambda run: run.manifest["parameters"].update(after="11")))
        assert result.outcome is Outcome.INCONCLUSIVE

    @pytest.mark.parametrize("what", ["trace", "scalars", "checkpoints", "metrics", "renders", "seeding"])
    def test_a_run_without_an_artefact(self, tmp_path: Path, what: str) -> None:
        empty = None if what in ("trace", "metrics", "seeding") else {}
        result = check(tmp_path, FakeRun(), changed(lambda run: setattr(run, what, empty)))
        assert result.outcome is Outcome.INCONCLUSIVE

    def test_the_recorded_run_itself(self, tmp_path: Path) -> None:
        result = compare_with_baseline(record(tmp_path, FakeRun()), RunDir(tmp_path / "recorded"))
        assert result.outcome is Outcome.INCONCLUSIVE
        assert "one is a copy of the other" in " ".join(result.reasons)

    def test_what_one_file_breaks_is_unreadable_and_the_rest_is_compared(self, tmp_path: Path) -> None:
        baseline, run = record(tmp_path, FakeRun()), changed(_change_metric).write(tmp_path / "run")
        (events,) = run.event_files
        events.write_bytes(events.read_bytes()[:-5])
        result = compare_with_baseline(baseline, run)
        assert result.outcome is Outcome.DIVERGED
        assert any(
            "events.out" in path[-1] for path, node in result.root.leaves() if node.verdict.value == "unreadable"
        )
        assert differing(result) == [CHANGES["a metric"][1]]


class TestLimits:
    POLICY = Policy(
        required=RUN_POLICY.required,
        limits={
            "curves": (Limit(pattern="*", relative=1e-3),),
            "metrics": (Limit(pattern="*", absolute=0.1),),
            "checkpoints": (Limit(pattern="*weight", absolute=0.1),),
        },
    )

    @pytest.mark.parametrize(("change", "code"), [("the loss of a step", 0), ("a metric", 0), ("a moment", 1)])
    def test_they_are_kept_and_applied(self, tmp_path: Path, change: str, code: int) -> None:
        result = check(tmp_path, FakeRun(), changed(CHANGES[change][0]), policy=self.POLICY)
        assert result.outcome.exit_code == code
        assert code or result.outcome is Outcome.WITHIN_TOLERANCE

    def test_a_digest_within_a_limit_cannot_be_judged(self, tmp_path: Path) -> None:
        result = check(tmp_path, FakeRun(), changed(_flip_parameter), policy=self.POLICY)
        assert result.outcome is Outcome.INCONCLUSIVE
        assert "no limit can be applied" in " ".join(result.reasons)

    def test_what_is_ignored_is_not_in_the_file(self, tmp_path: Path) -> None:
        policy = Policy(ignored={"curves": {PSNR: "noise"}, "metrics": {"ssim": "noise"}})
        baseline = record(tmp_path, FakeRun(), policy=policy)
        assert PSNR not in baseline.run.events.scalars
        result = compare_with_baseline(baseline, changed(CHANGES["another curve"][0]).write(tmp_path / "run"))
        assert result.outcome is Outcome.REPRODUCIBLE


class TestFile:
    def test_it_is_small_sorted_and_names_no_place_and_no_time(self, tmp_path: Path) -> None:
        baseline = record(tmp_path, FakeRun())
        text = baseline.path.read_text("ascii")
        data = json.loads(text)
        assert text == json.dumps(data, indent=1, sort_keys=True) + "\n"
        assert str(tmp_path) not in text and "start" not in text
        other = tmp_path / "again"
        other.mkdir()
        again = record(other, FakeRun()).path.read_text()
        different = [a for a, b in zip(text.splitlines(), again.splitlines(), strict=True) if a != b]
        assert [line.split(":")[0].strip(' "') for line in different] == ["digest", "run_id"]

    def test_metrics_are_there_in_decimal_and_bits(self, tmp_path: Path) -> None:
        metrics = json.loads(record(tmp_path, FakeRun()).path.read_text())["artefacts"]["metrics"]
        assert metrics["mean"] == {"psnr": "21.0 0x4035000000000000", "ssim": "0.8125 0x3fea000000000000"}

    @pytest.mark.parametrize(
        "change",
        [
            lambda data: data["request"].update(seed=43),
            lambda data: data["artefacts"]["metrics"]["mean"].update(psnr="22.0 0x4036000000000000"),
            lambda data: data["artefacts"].update(renders={}),
            lambda data: data["policy"].update(required=["curves"]),
            lambda data: data["environment"]["packages"].pop("torch"),
            lambda data: data.update(more=1),
        ],
    )
    def test_an_edit_is_refused(self, tmp_path: Path, change: Callable[[Any], object]) -> None:
        path = record(tmp_path, FakeRun()).path
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        with pytest.raises(UsageError, match="changed after it was recorded"):
            read_baseline(path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda data: data.clear(),
            lambda data: data.update(schema_version=2),
            lambda data: data["artefacts"].update(trace=None, curves={}, metrics=None, checkpoints={}, renders={}),
            lambda data: data["artefacts"].update(trace={}),
            lambda data: data["artefacts"]["trace"].update(together=0),
            lambda data: data["artefacts"]["trace"].update(stages={"sleep": {"steps": [1], "digests": "AAAAAAAAAAA="}}),
            lambda data: data["artefacts"]["trace"]["before"].update(digests={"init": "f" * 17}),
            lambda data: data["artefacts"].update(curves=[]),
            lambda data: data["artefacts"]["curves"][LOSS].update(values="AAAA"),
            lambda data: data["artefacts"]["curves"][LOSS].update(values="no base64!"),
            lambda data: data["artefacts"]["curves"][LOSS].update(dtype="object"),
            lambda data: data["artefacts"]["curves"][LOSS].update(steps={"first": 0, "count": 10**15, "every": 1}),
            lambda data: data["artefacts"]["curves"][LOSS].update(steps=["a"]),
            lambda data: data["artefacts"]["curves"][LOSS].update(records=[[1]]),
            lambda data: data["artefacts"]["metrics"]["mean"].update(psnr="22.0"),
            lambda data: data["artefacts"]["metrics"]["mean"].update(psnr=22.0),
            lambda data: data["artefacts"]["checkpoints"].update({"step-1": {"x": 1}}),
            lambda data: data["artefacts"]["checkpoints"].update({"elsewhere": {"x": "1"}}),
            lambda data: data["artefacts"].update(ranks={"x": {}}),
            lambda data: data["artefacts"]["seeding"].update({"claim": ["only one"]}),
            lambda data: data["run"].update(runs=0),
            lambda data: data["run"].pop("parameters"),
            lambda data: data["request"].update(seed=-1),
            lambda data: data["request"].update(iters=True),
            lambda data: data["request"].update(arguments=[1]),
            lambda data: data["request"].update(data=1),
            lambda data: data.update(environment=[]),
            lambda data: data["policy"].update(required=["everything"]),
            lambda data: data["policy"].update(required=["setup"]),
            lambda data: data["policy"]["ignore"].update(curves={"*": "all"}),
        ],
    )
    def test_what_is_none_is_refused_in_a_sentence(
        self, tmp_path: Path, change: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = record(tmp_path, FakeRun()).path
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        monkeypatch.setattr("f3rm_verify.baseline._digest", lambda _: data.get("digest"))
        with pytest.raises(UsageError) as caught:
            read_baseline(path)
        assert "baseline.json" in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": ' * 100_000, "\xff", '{"schema_version": 1}'])
    def test_other_files_are_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "b.json"
        path.write_text(text, "latin1")
        with pytest.raises(UsageError, match=r"is no baseline"):
            read_baseline(path)

    def test_missing_files_and_folders(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="baseline record"):
            read_baseline(tmp_path / "absent")
        with pytest.raises(UsageError, match="not a regular file"):
            read_baseline(tmp_path)
        with pytest.raises(UsageError, match="cannot be written|no plain file"):
            write_baseline(tmp_path, {})


class TestRecording:
    @pytest.mark.parametrize(
        ("run", "why"),
        [
            (plain_run(), "has no manifest"),
            (
                FakeRun(trace=None, scalars={}, checkpoints={}, metrics=None, renders={}),
                "nothing that a training puts out",
            ),
            (changed(lambda run: run.manifest.update(data={})), "no digests of its data"),
            (FakeRun(metrics={"images": {"a": {"psnr": "x"}}}), "cannot be recorded"),
            (FakeRun(seeding={"entries": [1]}), "cannot be recorded"),
        ],
    )
    def test_what_cannot_be_compared_is_not_recorded(self, tmp_path: Path, run: FakeRun, why: str) -> None:
        with pytest.raises(UsageError, match=why):
            make_baseline(run.write(tmp_path / "run"), tmp_path / "b.json", policy=DIFF_POLICY, runs=2)

    def test_data_beside_the_file_is_named_by_its_relative_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        run = FakeRun().write(tmp_path / "run")
        for data, expected in ((Path("scenes/garden"), "../scenes/garden"), (Path("/elsewhere"), None)):
            file = Path("tests/b.json")
            write_baseline(file, make_baseline(run, file, policy=RUN_POLICY, runs=2, data=data))
            assert read_baseline(file).request["data"] == expected


def _leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    return [path] if items is None else [leaf for key, value in items for leaf in _leaves(value, (*path, key))]


def test_everything_that_is_recorded_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value of a baseline, changed on its own and the digest with it, ends the agreement or is refused."""
    path = record(tmp_path, run_of_ranks(2)).path
    run = run_of_ranks(2).write(tmp_path / "run")
    document = json.loads(path.read_text())
    monkeypatch.setattr("f3rm_verify.baseline._digest", lambda _: document["digest"])
    parts = ("artefacts", "environment", "data", "request")
    leaves = [leaf for leaf in _leaves(document) if leaf[0] in parts]
    assert len(leaves) > 100
    unseen = []
    for leaf in leaves:
        changed_document = json.loads(path.read_text())
        container = changed_document
        for key in leaf[:-1]:
            container = container[key]
        value = container[leaf[-1]]
        container[leaf[-1]] = {str: f"{value}0", int: 1 if value == 0 else 0, bool: not value}.get(type(value), "0")
        other = tmp_path / "other.json"
        other.write_text(json.dumps(changed_document))
        try:
            outcome = compare_with_baseline(read_baseline(other), run).outcome
        except UsageError:
            continue
        if outcome is Outcome.REPRODUCIBLE:
            unseen.append("/".join(map(str, leaf)))
    # Where the data lies, and which number the state before the first step gets, are no evidence.
    assert set(unseen) == {
        "artefacts/trace/before/step",
        "artefacts/ranks/1/trace/before/step",
        "request/built_in_scene",
        "request/data",
    }
