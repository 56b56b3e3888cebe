"""Each rule fires on its evidence, and on nothing less."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from f3rm_verify.cause_evidence import Evidence
from f3rm_verify.causes import RULES, Strength, diagnose, table

DOCS = Path(__file__).resolve().parents[1] / "docs"
SAME = {"generators at step 0": "python a, torch b"}
OFF = {"deterministic algorithms": "off", "deterministic algorithms, at step 0": "off"}
PROVEN = frozenset({"init", "rng", "batch", "forward", "loss"})
FREE = {"PYTHONHASHSEED": "random: the order of sets of strings differs from run to run"}

#: Of a divergence of each stage what the trace gives.
INIT: dict[str, Any] = {"traced": True, "stage": "init", "subject": "fields", "step": 0}
START: dict[str, Any] = {"traced": True, "stage": "rng", "subject": "torch cpu", "step": 0, "proven": {"init"}}
RNG: dict[str, Any] = {
    "traced": True,
    "stage": "rng",
    "subject": "torch cpu after X",
    "step": 4,
    "last_equal_step": 3,
    "proven": {"init"},
}
BATCH: dict[str, Any] = {**RNG, "stage": "batch", "subject": "image", "proven": {"init", "rng"}}
LOSS: dict[str, Any] = {**RNG, "stage": "loss", "subject": "rgb_loss", "proven": {"init", "rng", "batch", "forward"}}
GRAD: dict[str, Any] = {**RNG, "stage": "grad", "subject": "fields", "proven": PROVEN}
PARAMS: dict[str, Any] = {**GRAD, "stage": "params", "proven": PROVEN | {"grad"}}
SCHEDULE: dict[str, Any] = {**GRAD, "stage": "schedule", "subject": "learning rate fields"}
EVAL: dict[str, Any] = {**GRAD, "stage": "eval", "subject": "rays"}


def differs(*names: str) -> dict[str, Any]:
    return {"conditions": dict.fromkeys(names, "a in the reference, b in the candidate")}


def claims(**observed: str) -> dict[str, Any]:
    return {"claims": (observed, observed)}


#: Rule, the evidence that suffices for it, and which parts of it are needed each: without one, another rule or none.
CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("uninitialised memory", {**GRAD, "operator": "aten::empty_like"}, ("operator",)),
    (
        "atomics in a CUDA extension",
        {**GRAD, "operator": "_module_functionBackward tinycudann", "device": "cuda"},
        ("operator",),
    ),
    (
        "thread-order float accumulation on the CPU",
        {**GRAD, "operator": "aten::index_put_", "device": "cpu", "threads": 2},
        ("operator", "device"),
    ),
    ("a kernel that is not deterministic", {**GRAD, "operator": "aten::mm", "repeats": False}, ("operator", "repeats")),
    ("different seeds", {**INIT, **differs("seed", "config.yml / machine.seed")}, ("conditions",)),
    ("different seeds", differs("seed"), ("conditions",)),
    ("different image files", {**BATCH, **differs("data.files / images/1.png")}, ("conditions",)),
    ("different image files", {**BATCH, **differs("data.files / images/1.png", "data.order / train.0")}, ()),
    ("different order of the image files", {**BATCH, **differs("data.order / train.0")}, ("conditions",)),
    ("stale feature cache", {**BATCH, "subject": "feature", **differs("data.features / digest")}, ("conditions",)),
    (
        "cold and warm feature cache",
        {**INIT, "feature_sources": ("extracted", "cache"), **differs("generators at step 0")},
        ("feature_sources", "conditions", "traced", "stage"),
    ),
    ("different library versions or hardware", {**GRAD, **differs("environment.packages / torch")}, ("conditions",)),
    ("different thread counts", {**GRAD, **differs("environment.threads / intra_op")}, ("conditions",)),
    ("different TF32, cuDNN or determinism flags", {**GRAD, **differs("float32 precision")}, ("conditions",)),
    ("different TF32, cuDNN or determinism flags", {**GRAD, **differs("cuDNN benchmark")}, ("conditions",)),
    ("different mixed precision", {**LOSS, **differs("config.yml / mixed_precision")}, ("conditions",)),
    ("different mixed precision", {**SCHEDULE, **differs("config.yml / use_grad_scaler")}, ("conditions",)),
    ("different hash seeds", {**LOSS, **differs("environment.variables / PYTHONHASHSEED")}, ("conditions",)),
    ("the viewer drew from the training's generators", {**RNG, "phase": "viewer"}, ("phase", "traced", "stage")),
    (
        "the viewer drew from the training's generators",
        {**RNG, "phase": "between steps", "viewer": True},
        ("viewer", "traced", "stage"),
    ),
    ("an evaluation drew from the training's generators", {**EVAL, "phase": "evaluation"}, ("phase", "traced")),
    ("an evaluation drew from the training's generators", {**EVAL, "also_after": ("evaluation",)}, ("also_after",)),
    (
        "an evaluation drew from the training's generators",
        {**RNG, **differs("config.yml / steps_per_eval_batch")},
        ("conditions", "traced", "stage"),
    ),
    (
        "the loading of data drew another number of values",
        {**RNG, "phase": "batch"},
        ("phase", "traced", "stage"),
    ),
    ("the model drew another number of values", {**RNG, "phase": "forward"}, ("phase", "traced", "stage")),
    (
        "unseeded generators",
        {**START, "failing": {"torch CPU generator"}},
        ("failing", "traced", "stage"),
    ),
    (
        "different generator states before the first step",
        {**START, **differs("generators at step 0")},
        ("conditions", "traced", "stage"),
    ),
    ("user code drew from the training's generators", {**RNG, "phase": "callbacks"}, ("traced", "stage")),
    ("user code drew from the training's generators", {**RNG, "phase": "between steps"}, ("traced", "stage")),
    ("different code or configuration", {**GRAD, **differs("environment.git / commit")}, ("conditions",)),
    ("different code or configuration", {**SCHEDULE, **differs("config.yml / optimizers.x.lr")}, ("conditions",)),
    ("different conditions", {**RNG, "phase": "optimizer?", **differs("data.files / a.png")}, ("conditions",)),
    ("hash-order dependence", {**LOSS, **claims(**FREE)}, ("claims", "traced")),
    ("hash-order dependence", {**GRAD, **claims(**FREE)}, ("claims", "traced")),
    ("initial values that do not follow the seed", {**INIT, **claims(**SAME)}, ("claims", "traced", "stage")),
    (
        "uninitialised memory",
        {**INIT, "outside_of_setup": (), **claims(**SAME, **OFF)},
        ("claims", "outside_of_setup", "traced", "stage"),
    ),
    ("randomness that no seed reaches", {**LOSS, "entropy_of_steps": ("model.py:3 read",)}, ("entropy_of_steps",)),
    ("wall-clock dependence", {**LOSS, "clock": ("model.py:3 time",)}, ("clock", "traced", "stage")),
    ("wall-clock dependence", {**SCHEDULE, "subject": "learning rate x", "clock": ("m.py:3 time",)}, ("clock",)),
    (
        "a data worker made another batch",
        {**BATCH, **claims(**{"data workers": "1 worker process, seeded for each batch and read in order"})},
        ("claims", "proven", "traced"),
    ),
    (
        "a race between data workers",
        {**BATCH, **claims(**{"data workers": "2 worker processes, not read in order"})},
        ("claims", "proven", "traced"),
    ),
    (
        "atomics in a CUDA extension",
        {**GRAD, "device": "cuda", "extensions": {"gsplat"}},
        ("device", "extensions", "proven", "traced", "stage"),
    ),
    (
        "atomics in a CUDA extension",
        {**GRAD, "device": "cuda", "encodings": {"tcnn"}, **claims(**OFF)},
        ("device", "encodings", "proven"),
    ),
    (
        "atomics in CUDA kernels",
        {**GRAD, "device": "cuda", **claims(**OFF)},
        ("device", "claims", "proven", "traced", "stage"),
    ),
    (
        "thread-order float accumulation on the CPU",
        {**GRAD, "device": "cpu", "threads": 2, **claims(**OFF)},
        ("device", "threads", "claims", "proven", "traced", "stage"),
    ),
    (
        "kernels chosen by benchmark",
        {**GRAD, "device": "cuda", **claims(**{"cuDNN benchmark": "True"})},
        ("device", "claims", "proven", "traced", "stage"),
    ),
    ("the mixed-precision gradient scaler", {**SCHEDULE, "subject": "grad scaler"}, ("subject", "traced", "stage")),
    ("another learning-rate schedule", SCHEDULE, ("traced", "stage")),
    ("different data in the batch", BATCH, ("proven", "traced", "stage")),
    ("something besides the gradients changed the model", PARAMS, ("proven", "traced", "stage")),
    ("another evaluation", EVAL, ("traced", "stage")),
]


def evidence(given: dict[str, Any]) -> Evidence:
    sets = {key: frozenset(value) for key, value in given.items() if isinstance(value, set)}
    return Evidence(**{**given, **sets})


@pytest.mark.parametrize(("name", "given", "needed"), CASES)
def test_a_rule_fires_with_its_evidence(name: str, given: dict[str, Any], needed: tuple[str, ...]) -> None:
    found = diagnose(evidence(given))
    assert found.rule == name
    assert name in found.cause
    assert found.remedy


@pytest.mark.parametrize(
    ("name", "given", "part"), [(name, given, part) for name, given, needed in CASES for part in needed]
)
def test_a_rule_does_not_fire_without_a_needed_part(name: str, given: dict[str, Any], part: str) -> None:
    assert diagnose(evidence({key: value for key, value in given.items() if key != part})).rule != name


def test_every_rule_has_a_case() -> None:
    assert {name for name, _, _ in CASES} == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", ["uninitialised memory", "thread-order float accumulation on the CPU"])
def test_what_was_shown_beats_what_was_recorded(name: str) -> None:
    given = next(given for case, given, _ in CASES if case == name and "operator" in given)
    assert diagnose(evidence({**given, **differs("environment.packages / torch")})).rule == name


class TestNeighbours:
    """Evidence that is like that of a rule, and means something else."""

    def test_one_thread_adds_in_one_order(self) -> None:
        given = {**GRAD, "device": "cpu", "threads": 1, **claims(**OFF)}
        assert diagnose(evidence(given)).rule == "unknown"

    def test_deterministic_algorithms_on(self) -> None:
        given = {**GRAD, "device": "cpu", "threads": 2, **claims(**{"deterministic algorithms": "on"})}
        assert diagnose(evidence(given)).rule == "unknown"

    def test_a_step_that_repeats_in_one_process_is_no_race(self) -> None:
        given = {**GRAD, "device": "cpu", "threads": 2, "repeats": True, **claims(**OFF)}
        found = diagnose(evidence(given))
        assert found.rule == "unknown"
        assert "it is something that a process inherits" in found.cause
        assert "operations that add floats" not in found.cause

    def test_a_gradient_that_repeats_in_one_process_can_follow_the_hash_seed(self) -> None:
        given = {**GRAD, "device": "cpu", "threads": 2, "repeats": True, **claims(**FREE, **OFF)}
        assert diagnose(evidence(given)).rule == "hash-order dependence"

    def test_a_step_that_does_not_repeat_is_no_hash_order(self) -> None:
        assert diagnose(evidence({**LOSS, "repeats": False, **claims(**FREE)})).rule == "unknown"

    def test_a_gradient_that_races_is_not_blamed_on_the_hash_seed(self) -> None:
        given = {**GRAD, "device": "cpu", "threads": 2, **claims(**FREE, **OFF)}
        assert diagnose(evidence(given)).rule == "thread-order float accumulation on the CPU"

    def test_deterministic_algorithms_switched_off_on_the_way(self) -> None:
        observed = {"deterministic algorithms": "on", "deterministic algorithms, after training": "off"}
        given = {**GRAD, "device": "cpu", "threads": 2, **claims(**observed)}
        assert diagnose(evidence(given)).rule == "thread-order float accumulation on the CPU"

    def test_a_difference_of_the_batch_is_no_race(self) -> None:
        given = {**BATCH, "device": "cpu", "threads": 2, **claims(**OFF)}
        assert diagnose(evidence(given)).rule == "different data in the batch"

    @pytest.mark.parametrize("condition", ["data.files / a.png", "data.order / train.0", "data.features / digest"])
    def test_other_data_do_not_explain_gradients_after_an_equal_batch(self, condition: str) -> None:
        assert diagnose(evidence({**GRAD, **differs(condition)})).rule == "different conditions"

    def test_threads_do_not_explain_a_draw(self) -> None:
        given = {**RNG, "phase": "callbacks", **differs("environment.threads / intra_op")}
        found = diagnose(evidence(given))
        assert found.rule == "user code drew from the training's generators"
        assert any(other.startswith("different conditions") for other in found.others)

    def test_equal_features_from_a_cache_do_not_explain_gradients(self) -> None:
        assert diagnose(evidence({**GRAD, "feature_sources": ("extracted", "cache")})).rule == "unknown"

    def test_a_cache_that_left_the_generators_alone_does_not_explain_values(self) -> None:
        given = {**INIT, "feature_sources": ("extracted", "cache"), **claims(**SAME)}
        assert diagnose(evidence(given)).rule == "initial values that do not follow the seed"

    def test_a_module_that_drew_more_is_not_one_that_ignores_the_seed(self) -> None:
        found = diagnose(evidence({**INIT, **differs("generators at step 0"), "claims": (SAME, {})}))
        assert found.rule == "different generator states before the first step"

    def test_a_module_that_reads_entropy_is_not_uninitialised(self) -> None:
        given = {**INIT, "outside_of_setup": ("model.py:3 (build)",), **claims(**SAME, **OFF)}
        found = diagnose(evidence(given))
        assert found.rule == "initial values that do not follow the seed"
        assert "model.py:3 (build)" in found.cause

    def test_a_module_that_reads_entropy_is_not_blamed_on_the_hash_seed(self) -> None:
        given = {**INIT, "outside_of_setup": ("model.py:3 (build)",), **claims(**SAME, **FREE)}
        assert diagnose(evidence(given)).rule == "initial values that do not follow the seed"

    def test_a_loss_that_reads_the_clock_is_not_blamed_on_the_hash_seed(self) -> None:
        given = {**LOSS, "clock": ("model.py:3 (loss)",), **claims(**FREE)}
        assert diagnose(evidence(given)).rule == "wall-clock dependence"

    def test_a_clock_that_is_read_for_a_log_does_not_hide_a_race(self) -> None:
        given = {**GRAD, "clock": ("log.py:3 (tell)",), "device": "cpu", "threads": 2, **claims(**OFF)}
        found = diagnose(evidence(given))
        assert found.rule == "thread-order float accumulation on the CPU"
        assert found.others == ("wall-clock dependence: a clock is read in log.py:3 (tell)",)

    def test_filled_memory_is_not_uninitialised(self) -> None:
        given = {**INIT, "outside_of_setup": (), **claims(**SAME, **{"uninitialised memory": "filled"})}
        assert diagnose(evidence(given)).rule == "initial values that do not follow the seed"

    def test_a_clock_in_a_training_that_diverges_in_its_initial_values(self) -> None:
        assert diagnose(evidence({**INIT, "clock": ("model.py:3",)})).rule == "unknown"

    def test_without_a_trace_a_stage_says_nothing(self) -> None:
        for stage in (RNG, BATCH, GRAD, PARAMS, SCHEDULE, EVAL):
            assert diagnose(evidence({**stage, "traced": False})).rule == "unknown"


@pytest.mark.parametrize("given", [LOSS, GRAD])
def test_unknown_says_what_is_ruled_out(given: dict[str, Any]) -> None:
    found = diagnose(evidence(given))
    assert found.rule == "unknown"
    assert found.cause.startswith("unknown; ")


def test_nothing_is_known_of_nothing() -> None:
    assert diagnose(Evidence()) == dataclasses.replace(diagnose(Evidence()), rule="unknown", cause="unknown")


def test_an_inference_is_called_likely() -> None:
    for name, given, _ in CASES:
        found = diagnose(evidence(given))
        strength = max(rule.strength for rule in RULES if rule.name == name and rule.find(evidence(given)))
        assert found.cause.startswith("likely ") == (strength < Strength.RECORDED)


def test_what_else_it_can_be_is_told_once() -> None:
    found = diagnose(evidence({**INIT, **differs("seed", "config.yml / machine.seed", "config.yml / vis")}))
    assert [other.partition(":")[0] for other in found.others] == ["different code or configuration"]


def test_sentences() -> None:
    for rule in RULES:
        assert re.fullmatch(r"[^.].*[^.]", rule.name)
        assert rule.reason.endswith(".") and rule.remedy.endswith(".")


def test_the_documented_table_is_the_table() -> None:
    assert table() in (DOCS / "causes.md").read_text("utf8")
