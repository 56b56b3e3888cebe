"""What becomes of the nodes of the comparators, and of what runs recorded about themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from f3rm_verify.cause_evidence import Evidence
from f3rm_verify.difference import Difference, FirstDivergence, Verdict
from f3rm_verify.gather_evidence import Repetition, Side, gather

NOTHING = Side(manifest={}, config={}, claims=())


def leaf(name: str, first_step: int | None = None) -> Difference:
    measures: Mapping[str, Any] = {} if first_step is None else {"first_step": first_step}
    verdict = Verdict.IDENTICAL if first_step is None else Verdict.DIFFERENT
    return Difference(name=name, artefact="trace", verdict=verdict, measures=measures)


def stage(name: str, *leaves: Difference) -> Difference:
    return Difference.group(name=name, artefact="trace", children=leaves)


def evidence(
    first: FirstDivergence, *stages: Difference, sides: tuple[Side, Side] = (NOTHING, NOTHING), **others: Any
) -> Evidence:
    trace = Difference.group(name="trace", artefact="trace", children=stages) if stages else None
    return gather(first, trace=trace, conditions=others.pop("conditions", ()), sides=sides, **others)


def at(stage: str, subject: str, step: int = 4) -> FirstDivergence:
    return FirstDivergence(step=step, last_equal_step=step - 1, stage=stage, subject=subject)


def test_stages_that_are_equal_up_to_this_step_are_proven() -> None:
    found = evidence(
        at("grad", "fields"),
        stage("init", leaf("fields")),
        stage("rng", leaf("python"), leaf("torch cpu", 5), leaf("torch cpu after forward", 4)),
        stage("batch", leaf("image")),
        stage("forward", leaf("rgb", 4)),
        stage("grad", leaf("fields", 4), leaf("camera", 4), leaf("other", 6)),
        stage("params", leaf("fields", 4)),
    )
    assert found.proven == {"init", "rng", "batch"}
    assert found.also == ("camera",)
    assert found.traced


def test_generators_that_the_step_found_are_not_proven_where_they_differ() -> None:
    assert evidence(at("batch", "image"), stage("rng", leaf("torch cpu", 4)), stage("batch")).proven == set()


def test_a_stage_that_was_not_recorded_is_not_proven() -> None:
    missing = Difference(name="batch", artefact="trace", verdict=Verdict.IGNORED, summary="not recorded")
    assert evidence(at("forward", "rgb"), stage("rng", leaf("python")), missing).proven == {"rng"}


@pytest.mark.parametrize(
    ("subject", "phase"),
    [
        ("torch cpu", None),
        ("torch cpu after callbacks", "callbacks"),
        ("numpy after between steps #2", "between steps"),
    ],
)
def test_the_phase_that_drew(subject: str, phase: str | None) -> None:
    assert evidence(at("rng", subject), stage("rng", leaf(subject, 4))).phase == phase


def test_an_evaluation_that_drew_later_in_its_stage() -> None:
    stages = stage("eval", leaf("rays", 4), leaf("torch cpu after evaluation", 4))
    assert evidence(at("eval", "rays"), stages).also_after == ("evaluation",)


def test_without_a_trace_nothing_is_proven() -> None:
    found = evidence(at("grad", "fields"))
    assert (found.traced, found.proven, found.also) == (False, frozenset(), ())


def test_conditions_that_differ() -> None:
    node = Difference.group(
        name="setup",
        artefact="setup",
        children=[
            Difference(name="seed", artefact="setup", verdict=Verdict.DIFFERENT, summary="1 and 2"),
            Difference(name="rank", artefact="setup", verdict=Verdict.IDENTICAL),
        ],
    )
    assert evidence(at("grad", "fields"), conditions=[node]).conditions == {"seed": "1 and 2"}


def test_what_the_sides_recorded() -> None:
    manifest = {
        "environment": {"threads": {"intra_op": 2}},
        "encodings": {"field": "stock"},
        "extensions": ["gsplat"],
        "outside_reads": {"clock, while training": ["a.py:1 (f)"], "entropy, while building": ["b.py:2 (g)"]},
        "data": {"features": {"source": "cache"}},
    }
    claims = (
        {"claim": "deterministic algorithms", "observed": "off", "verdict": "holds"},
        {"claim": "python random", "observed": "another stream", "verdict": "fails"},
        {"claim": "half an entry"},
    )
    side = Side(manifest=manifest, config={"machine": {"device_type": "cpu"}, "vis": "viewer"}, claims=claims)
    found = evidence(at("grad", "x"), sides=(side, side), repetition=Repetition(operator="aten::mm", repeats=False))
    assert found.claims[0] == {"deterministic algorithms": "off", "python random": "another stream"}
    assert found.failing == {"python random"}
    assert (found.threads, found.device, found.viewer) == (2, "cpu", True)
    assert (found.encodings, found.extensions) == ({"stock"}, {"gsplat"})
    assert (found.clock, found.outside_of_setup) == (("a.py:1 (f)",), ("b.py:2 (g)",))
    assert (found.operator, found.repeats) == ("aten::mm", False)
    assert found.feature_sources == ("cache", "cache")


@pytest.mark.parametrize("value", [3, "x", [1], {"a": [{}]}, None])
def test_a_manifest_that_is_something_else(value: Any) -> None:
    keys = ("environment", "encodings", "extensions", "outside_reads", "data")
    side = Side(manifest=dict.fromkeys(keys, value), config={"machine": value, "vis": value}, claims=())
    found = evidence(at("grad", "x"), sides=(side, side))
    assert (found.threads, found.clock, found.feature_sources) == (None, (), (None, None))


def test_nobody_looked_for_outside_reads() -> None:
    assert evidence(at("init", "x")).outside_of_setup is None
