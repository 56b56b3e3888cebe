from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from f3rm_verify.difference import (
    ARTEFACTS,
    CONDITIONS,
    Difference,
    FirstDivergence,
    Outcome,
    Result,
    Verdict,
    count_summary,
    worst,
)

BEST_FIRST = ["ignored", "identical", "within_tolerance", "missing", "unreadable", "different"]


def leaf(name: str, verdict: Verdict = Verdict.IDENTICAL, **changes: Any) -> Difference:
    return Difference(name=name, artefact="curves", verdict=verdict, **changes)


def group(*children: Difference, **changes: Any) -> Difference:
    return Difference.group(name="group", artefact="curves", children=children, **changes)


def test_verdicts_are_ordered_best_first() -> None:
    assert [verdict.value for verdict in sorted(Verdict, key=lambda verdict: verdict.badness)] == BEST_FIRST
    for better, worse in itertools.combinations(Verdict, 2):
        assert worst([better, worse]) is worst([worse, better]) is worse
    assert worst([]) is Verdict.IGNORED


@pytest.mark.parametrize(("outcome", "code"), list(zip(Outcome, [0, 0, 1, 3], strict=True)))
def test_exit_codes(outcome: Outcome, code: int) -> None:
    assert outcome.exit_code == code


def test_conditions_are_artefacts() -> None:
    assert set(CONDITIONS) < set(ARTEFACTS)


class TestGroup:
    @given(st.lists(st.sampled_from(list(Verdict)), min_size=1))
    def test_takes_its_worst_child(self, verdicts: list[Verdict]) -> None:
        node = group(*(leaf(str(i), verdict) for i, verdict in enumerate(verdicts)))
        everything_ignored = set(verdicts) == {Verdict.IGNORED}
        assert node.verdict is (Verdict.UNREADABLE if everything_ignored else worst(verdicts))

    def test_that_compared_nothing_is_unreadable(self) -> None:
        assert (group().verdict, group().summary) == (Verdict.UNREADABLE, "nothing was compared")
        ignored = group(leaf("a", Verdict.IGNORED))
        assert (ignored.verdict, ignored.summary) == (Verdict.UNREADABLE, "everything here is ignored")

    def test_counts_its_children_worst_first(self) -> None:
        node = group(leaf("a"), leaf("b"), leaf("c", Verdict.WITHIN_TOLERANCE), leaf("d", Verdict.DIFFERENT))
        assert node.summary == count_summary(node.children) == "1 different, 1 within tolerance, 2 identical"

    def test_keeps_what_it_is_given(self) -> None:
        node = group(leaf("a"), summary="fine", measures={"n": 1})
        assert (node.summary, node.measures) == ("fine", {"n": 1})


def test_walk_yields_parents_first_and_leaves_only_leaves() -> None:
    tree = Difference.group(name="root", artefact="runs", children=[group(leaf("a"), leaf("b")), leaf("c")])
    paths = ["/".join(path) for path, _ in tree.walk()]
    assert paths == ["root", "root/group", "root/group/a", "root/group/b", "root/c"]
    assert ["/".join(path) for path, _ in tree.leaves()] == ["root/group/a", "root/group/b", "root/c"]


class TestPlainData:
    def test_measures_become_plain(self) -> None:
        measures = {
            "n": np.int64(3),
            "max_abs": np.float32(0.5),
            "nan": float("nan"),
            "largest": np.float64("inf"),
            "smallest": float("-inf"),
            "at": (1, np.int32(2)),
            "nested": {1: [True, None, "text"]},
            "verdict": Verdict.MISSING,
        }
        data = leaf("a", measures=measures).to_dict()
        assert json.loads(json.dumps(data, allow_nan=False)) == data
        assert data["measures"] == {
            "n": 3,
            "max_abs": 0.5,
            "nan": "nan",
            "largest": "inf",
            "smallest": "-inf",
            "at": [1, 2],
            "nested": {"1": [True, None, "text"]},
            "verdict": "missing",
        }

    def test_a_tree_comes_back(self) -> None:
        tree = group(leaf("a", Verdict.DIFFERENT, summary="1 differs", measures={"n": 1}), group(leaf("b")))
        data = json.loads(json.dumps(tree.to_dict(), allow_nan=False))
        assert Difference.from_dict(data) == tree

    @pytest.mark.parametrize("first", [None, FirstDivergence(subject="a", step=3, evidence=("x",), growth={"n": 1})])
    def test_a_result_comes_back(self, first: FirstDivergence | None) -> None:
        data = json.loads(json.dumps(result(first).to_dict(), allow_nan=False))
        assert Result.from_dict(data) == result(first)
        assert (data["verdict"], data["exit_code"], data["schema_version"]) == ("diverged", 1, 1)

    @pytest.mark.parametrize("version", [0, 2, None, "1"])
    def test_another_schema_is_refused(self, version: object) -> None:
        with pytest.raises(ValueError, match=r"schema_version is .*, this version reads 1"):
            Result.from_dict({**result(None).to_dict(), "schema_version": version})

    @pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Result) if field.name != "outcome"])
    def test_every_key_is_needed(self, key: str) -> None:
        data = result(None).to_dict()
        del data[key]
        with pytest.raises(KeyError, match=key):
            Result.from_dict(data)


def result(first: FirstDivergence | None) -> Result:
    return Result(
        tool={"name": "f3rm-verify"},
        outcome=Outcome.DIVERGED,
        reasons=("curves differ",),
        reference={"directory": "a"},
        candidate={"directory": "b"},
        candidates=({"directory": "b"},),
        pairs=1,
        steps=10,
        not_recorded=("trace",),
        policy={"required": None},
        first_divergence=first,
        control={"differs": True},
        seeding={"reference": []},
        root=group(leaf("a", Verdict.DIFFERENT)),
    )
