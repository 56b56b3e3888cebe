from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_runs import FakeRun, claim, plain_run

from f3rm_verify.compare_setup import compare_seeding, compare_setup
from f3rm_verify.difference import Difference, Verdict
from f3rm_verify.run_dir import CONFIG, MANIFEST, SEEDING, TRANSFORMS, RunDir

Change = Callable[[FakeRun], Any]
Compare = Callable[[FakeRun, FakeRun], Difference]


@pytest.fixture
def setup(tmp_path: Path) -> Compare:
    """Compares the setups of two runs that it writes, and of the same two with the sides swapped."""
    return lambda reference, candidate: _both_ways(compare_setup, tmp_path, reference, candidate)


@pytest.fixture
def seeding(tmp_path: Path) -> Compare:
    """The same for seeding logs."""
    return lambda reference, candidate: _both_ways(compare_seeding, tmp_path, reference, candidate)


def _both_ways(
    comparator: Callable[[RunDir, RunDir], Difference], path: Path, reference: FakeRun, candidate: FakeRun
) -> Difference:
    folder = path / str(len(list(path.iterdir())))
    sides = reference.write(folder / "reference"), candidate.write(folder / "candidate")
    node, swapped = comparator(*sides), comparator(*reversed(sides))
    assert verdicts(node) == verdicts(swapped)
    assert len(verdicts(node)) == len(list(node.leaves())), "each leaf has a path of its own"
    assert Difference.from_dict(json.loads(json.dumps(node.to_dict(), allow_nan=False))).to_dict() == node.to_dict()
    return node


def changed(change: Change, run: FakeRun | None = None) -> FakeRun:
    run = run or FakeRun()
    change(run)
    return run


def verdicts(node: Difference) -> dict[str, str]:
    return {"/".join(path[1:]): leaf.verdict.value for path, leaf in node.leaves()}


def faults(node: Difference) -> dict[str, str]:
    """The leaves that are not identical: path and summary."""
    return {"/".join(path[1:]): leaf.summary for path, leaf in node.leaves() if leaf.verdict is not Verdict.IDENTICAL}


class TestSetup:
    def test_equal_ones_are_identical_in_every_value(self, setup: Compare) -> None:
        node = setup(FakeRun(), FakeRun())
        assert set(verdicts(node).values()) == {"identical"}
        assert [child.name for child in node.children][:5] == [CONFIG, "method", "implementation", "seed", "rank"]
        expected = {"config.yml/machine.seed", "environment.threads/intra_op", "data.files/images/frame_1\\.png"}
        assert expected <= set(verdicts(node))

    @pytest.mark.parametrize(
        ("change", "path"),
        [
            (lambda run: run.config["machine"].update(seed=43), "config.yml/machine.seed"),
            (lambda run: run.config.update(pipeline={"levels": [1, 2]}), "config.yml/pipeline.levels[0]"),
            (lambda run: run.manifest.update(method="nerfacto"), "method"),
            (lambda run: run.manifest.update(seed=43), "seed"),
            (lambda run: run.manifest.update(seed=42.0), "seed"),
            (lambda run: run.manifest.update(seed="42"), "seed"),
            (lambda run: run.manifest.update(rank=False), "rank"),
            (lambda run: run.manifest.update(world_size=2), "world_size"),
            (lambda run: run.manifest.update(tool_version="0.2.0"), "tool_version"),
            (lambda run: run.manifest["implementation"].update(model="x"), "implementation/model"),
            (lambda run: run.manifest["encodings"].clear(), "encodings/field\\.position_encoding"),
            (lambda run: run.manifest["encodings"].update(x="tcnn"), "encodings/x"),
            (lambda run: run.manifest["environment"].update(python="3.12"), "environment.python"),
            (lambda run: run.manifest["environment"].update(platform="Other"), "environment.platform"),
            (lambda run: run.manifest["environment"]["packages"].update(numpy="3"), "environment.packages/numpy"),
            (lambda run: run.manifest["environment"]["packages"].pop("numpy"), "environment.packages/numpy"),
            (lambda run: run.manifest["environment"]["hardware"].update(gpus=["A"]), "environment.hardware/gpus[0]"),
            (lambda run: run.manifest["environment"]["hardware"].update(driver="1"), "environment.hardware/driver"),
            (lambda run: run.manifest["environment"]["threads"].update(inter_op=1), "environment.threads/inter_op"),
            (
                lambda run: run.manifest["environment"]["variables"].update(PYTHONHASHSEED="0"),
                "environment.variables/PYTHONHASHSEED",
            ),
            (lambda run: run.manifest["environment"]["git"].update(dirty=True), "environment.git/dirty"),
            (lambda run: run.manifest["environment"].update(git=None), "environment.git"),
            (
                lambda run: run.manifest["data"]["files"].update({"transforms.json": "x"}),
                "data.files/transforms\\.json",
            ),
            (lambda run: run.manifest["data"]["features"].update(digest="x"), "data.features/digest"),
            (lambda run: run.manifest["data"].update(features=None), "data.features"),
        ],
    )
    def test_one_change_is_one_different_leaf(self, setup: Compare, change: Change, path: str) -> None:
        node = setup(FakeRun(), changed(change))
        found = faults(node)
        if path.endswith("[0]"):  # the list was empty or not there, which is a leaf of its own
            found.pop(path.removesuffix("[0]") + "[]", None)
            found.pop("config.yml/pipeline.levels[1]", None)
        assert list(found) == [path]
        assert node.verdict is Verdict.DIFFERENT

    def test_both_values_are_told(self, setup: Compare) -> None:
        node = setup(FakeRun(), changed(lambda run: run.manifest.update(seed=43, method="m" * 100)))
        assert faults(node) == {
            "method": f"f3rm in the reference, {'m' * 79}… in the candidate",
            "seed": "42 in the reference, 43 in the candidate",
        }

    @pytest.mark.parametrize(
        ("key", "values"),
        [
            ("zero", (0.0, -0.0)),
            ("one", (1, True)),
            ("number", (1, 1.0)),
            ("text", ("1", 1)),
            ("nothing", (None, "None")),
            ("empty", ([], {})),
            ("missing", (None, [])),
            ("case", ("a", "A")),
        ],
    )
    def test_values_that_python_takes_for_equal_or_alike(
        self, setup: Compare, key: str, values: tuple[object, object]
    ) -> None:
        sides = [changed(lambda run, value=value: run.config.update({key: value})) for value in values]
        assert setup(*sides).verdict is Verdict.DIFFERENT

    def test_nan_is_nan(self, setup: Compare) -> None:
        sides = [changed(lambda run: run.config.update(limit=float("nan"))) for _ in range(2)]
        assert setup(*sides).verdict is Verdict.IDENTICAL

    def test_places_and_times_are_ignored_with_their_reasons(self, setup: Compare) -> None:
        def moved(run: FakeRun) -> None:
            run.config |= {"output_dir": "o", "experiment_name": "e", "timestamp": "t", "data": "d"}
            run.config["pipeline"] = {"datamanager": {"data": "d"}}
            run.config["viewer"] = {"websocket_port": 1}

        node = setup(FakeRun(), changed(moved))
        assert node.verdict is Verdict.IDENTICAL
        digests = "a path; the files' digests are compared where they were recorded"
        assert faults(node) == {
            "config.yml/data": digests,
            "config.yml/pipeline.datamanager.data": digests,
            "config.yml/viewer.websocket_port": "a port of the viewer",
            "config.yml/experiment_name": "a name in the output path",
            "config.yml/timestamp": "a time in the output path",
            "config.yml/output_dir": "a path",
        }

    @pytest.mark.parametrize(
        "key", ["load_dir", "vis", "max_num_iterations", "pipeline", "dataset", "data_parser", "timestamps"]
    )
    def test_nothing_else_is(self, setup: Compare, key: str) -> None:
        assert setup(FakeRun(), changed(lambda run: run.config.update({key: "other"}))).verdict is Verdict.DIFFERENT

    @pytest.mark.parametrize(
        "name", ["OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "NERFSTUDIO_METHOD_CONFIGS"]
    )
    def test_variables_without_an_effect_of_their_own_are_ignored(self, setup: Compare, name: str) -> None:
        node = setup(FakeRun(), changed(lambda run: run.manifest["environment"]["variables"].update({name: "x"})))
        assert node.verdict is Verdict.IDENTICAL
        assert list(faults(node)) == [f"environment.variables/{name}"]

    def test_also_where_there_are_no_others(self, setup: Compare) -> None:
        def only(run: FakeRun, value: str) -> None:
            run.manifest["environment"]["variables"] = {"OMP_NUM_THREADS": value}

        node = setup(changed(lambda run: only(run, "2")), changed(lambda run: only(run, "all")))
        assert node.verdict is Verdict.IDENTICAL
        assert verdicts(node)["environment.variables.OMP_NUM_THREADS"] == "ignored"

    def test_where_features_came_from_is_ignored_but_not_what_they_are(self, setup: Compare) -> None:
        sides = [
            changed(lambda run, source=source: run.manifest["data"]["features"].update(source=source))
            for source in ("cache", "extracted")
        ]
        assert setup(*sides).verdict is Verdict.IDENTICAL

    def test_plain_runs_have_a_config(self, setup: Compare) -> None:
        node = setup(plain_run(), plain_run())
        assert (node.verdict, [child.name for child in node.children]) == (Verdict.IDENTICAL, [CONFIG])

    def test_ours_against_plain(self, setup: Compare) -> None:
        node = setup(FakeRun(), plain_run())
        assert (node.verdict, faults(node)) == (Verdict.MISSING, {MANIFEST: "not in the candidate"})

    def test_no_config_at_all(self, setup: Compare) -> None:
        sides = [changed(lambda run: setattr(run, "config", None)) for _ in range(2)]
        node = setup(*sides)
        assert (node.verdict, faults(node)) == (
            Verdict.MISSING,
            {CONFIG: "not in the reference and not in the candidate"},
        )

    @pytest.mark.parametrize("name", ["seed", "encodings", "environment", "data"])
    def test_what_neither_manifest_says_is_missing(self, setup: Compare, name: str) -> None:
        sides = [changed(lambda run: run.manifest.pop(name)) for _ in range(2)]
        node = setup(*sides)
        assert node.verdict is Verdict.MISSING
        assert all(path.startswith(name) for path in faults(node))

    @pytest.mark.parametrize(
        "content",
        [
            {"environment": 3},
            {"environment": {"packages": [1], "threads": "x", "variables": None, "git": [], "hardware": True}},
            {"data": {"files": 3, "features": []}, "encodings": ["x"], "implementation": None},
            {"seed": {"a": [1]}, "method": [[[]]], "rank": {}},
        ],
    )
    def test_other_types_are_told(self, setup: Compare, content: Mapping[str, Any]) -> None:
        node = setup(FakeRun(), changed(lambda run: run.manifest.update(content)))
        assert node.verdict in (Verdict.DIFFERENT, Verdict.MISSING)
        assert all(path.split(".")[0].split("/")[0] in content for path in faults(node))

    @pytest.mark.parametrize("value", [{str(i): i for i in range(60_000)}, json.loads("[" * 150 + "]" * 150)])
    def test_too_large_or_too_deep_a_manifest_is_unreadable(self, setup: Compare, value: object) -> None:
        node = setup(FakeRun(), changed(lambda run: run.manifest.update(encodings=value)))
        assert [(child.name, child.verdict.value) for child in node.children] == [
            (CONFIG, "identical"),
            (MANIFEST, "unreadable"),
        ]

    def test_a_broken_file_hides_no_other(self, setup: Compare) -> None:
        node = setup(FakeRun(), changed(lambda run: setattr(run, "config", "a: [1")))
        assert list(faults(node)) == [CONFIG]
        assert faults(node)[CONFIG].startswith("candidate: config.yml: not readable as YAML")
        assert len(node.children) == len(setup(FakeRun(), FakeRun()).children)

    def test_transforms_are_compared_where_there_are_any(self, tmp_path: Path) -> None:
        sides = [plain_run().write(tmp_path / name) for name in ("reference", "candidate")]

        def compared(*texts: str) -> dict[str, str]:
            for side, text in zip(sides, texts, strict=False):
                (side.path / TRANSFORMS).write_text(text, "utf8")
            node = compare_setup(*(RunDir(side.path) for side in sides))
            return {path: verdict for path, verdict in verdicts(node).items() if path.startswith(TRANSFORMS)}

        assert compared() == {}
        assert compared('{"scale": 1.0}') == {TRANSFORMS: "missing"}
        assert compared('{"scale": 1.0}', '{"scale": 1.0}') == {f"{TRANSFORMS}/scale": "identical"}
        assert compared('{"scale": 1.0}', '{"scale": 1.5}') == {f"{TRANSFORMS}/scale": "different"}
        assert compared('{"scale": 1.0}', "null") == {TRANSFORMS: "unreadable"}


def with_claims(*claims: dict[str, str]) -> FakeRun:
    return changed(lambda run: run.seeding.update(entries=list(claims)))


class TestSeeding:
    def test_equal_logs(self, seeding: Compare) -> None:
        node = seeding(FakeRun(), FakeRun())
        assert verdicts(node) == {"PYTHONHASHSEED": "identical", "deterministic algorithms": "identical"}
        assert node.summary == "2 identical"

    @pytest.mark.parametrize("changes", [{"observed": "off"}, {"verdict": "fails"}])
    def test_what_was_observed_counts(self, seeding: Compare, changes: dict[str, str]) -> None:
        node = seeding(with_claims(claim("a", "on")), with_claims(claim("a", "on") | changes))
        assert verdicts(node) == {"a": "different"}
        assert node.verdict is Verdict.DIFFERENT

    def test_how_it_was_asked_does_not(self, seeding: Compare) -> None:
        other = claim("a", "on") | {"asked": "True", "set": "yes", "remedy": "none"}
        assert seeding(with_claims(claim("a", "on")), with_claims(other)).verdict is Verdict.IDENTICAL

    def test_claims_that_fail_alike_are_named_but_no_difference(self, seeding: Compare) -> None:
        claims = claim("b", "off", "fails"), claim("a", "off", "fails"), claim("c", "on")
        node = seeding(with_claims(*claims), with_claims(*claims))
        assert (node.verdict, node.summary) == (Verdict.IDENTICAL, "3 identical; does not hold: a, b")

    def test_a_claim_of_one_side_is_missing(self, seeding: Compare) -> None:
        node = seeding(with_claims(claim("a", "on")), with_claims(claim("a", "on"), claim("b", "on")))
        assert verdicts(node) == {"a": "identical", "b": "missing"}
        assert faults(node) == {"b": "not in the reference"}

    def test_a_log_of_one_side(self, seeding: Compare) -> None:
        assert verdicts(seeding(FakeRun(), plain_run())) == {
            "PYTHONHASHSEED": "missing",
            "deterministic algorithms": "missing",
        }

    def test_no_claims_and_no_logs_compare_nothing(self, seeding: Compare) -> None:
        for run in (with_claims(), plain_run()):
            node = seeding(run, run)
            assert (node.verdict, node.summary) == (Verdict.UNREADABLE, "nothing was compared")

    @pytest.mark.parametrize(
        ("log", "reason"),
        [
            ("{", "not readable as JSON"),
            ({}, "holds no list of claims"),
            ({"entries": {}}, "holds no list of claims"),
            ({"entries": [3]}, "holds no list of claims"),
            ({"entries": [{"observed": "on", "verdict": "holds"}]}, "holds no list of claims"),
            ({"entries": [claim("a", "on") | {"claim": ["a"]}]}, "holds no list of claims"),
            ({"entries": [claim("a", "on") | {"observed": {"deep": []}}]}, "holds no list of claims"),
            ({"entries": [claim("a", "on"), claim("a", "off")]}, "has one claim twice"),
        ],
    )
    def test_a_broken_log_is_unreadable(self, seeding: Compare, log: object, reason: str) -> None:
        node = seeding(FakeRun(), changed(lambda run: setattr(run, "seeding", log)))
        assert (node.verdict, node.children) == (Verdict.UNREADABLE, ())
        assert node.summary.startswith(f"candidate: {SEEDING}: ")
        assert reason in node.summary
