"""The result file: exact round trip, the same bytes each time, and one sentence for every file that is none."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_results import RESULTS
from fake_runs import IMAGES, LOSS, FakeRun, compare_fakes, plain_run, run_of_ranks
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from f3rm_verify import cli
from f3rm_verify.baseline import make_baseline, read_baseline, write_baseline
from f3rm_verify.compare_runs import compare_runs
from f3rm_verify.difference import SCHEMA_VERSION, Difference, FirstDivergence, Outcome, Result, Verdict
from f3rm_verify.errors import UsageError
from f3rm_verify.policy import DIFF_POLICY, RUN_POLICY
from f3rm_verify.reporters import json_report
from f3rm_verify.reporters.json_report import read_json, schema_text, write_json
from f3rm_verify.verification import compare_with_baseline

SCHEMA = Draft202012Validator(json.loads(schema_text()))

#: As in a file name that is not UTF-8, with markup and a terminal escape.
ODD_NAME = 'a/"b"\\\x1b[2J\udcff\u2028<script>深度'


def make_result() -> Result:
    leaf = Difference(
        name=ODD_NAME,
        artefact="checkpoints",
        verdict=Verdict.DIFFERENT,
        summary="1 of 3",
        measures={"max_rel": float("nan"), "max_abs": float("inf"), "n": np.int64(3), "at": (0, 1), "tiny": 5e-324},
    )
    return Result(
        tool={"name": "f3rm-verify", "version": "0.1.0"},
        outcome=Outcome.DIVERGED,
        reasons=("one", "two"),
        reference={"directory": "a", "seed": 42},
        candidate={"directory": "b", "seed": 2**80},
        candidates=({"directory": "b"},),
        pairs=1,
        steps=1000,
        not_recorded=("trace",),
        policy={"required": None},
        first_divergence=FirstDivergence(
            step=3, last_equal_step=2, stage="grad", subject=ODD_NAME, evidence=("x", "y"), growth={"steps": [3, 4]}
        ),
        control={"seed": 43, "verdict": "different", "summary": "differs"},
        seeding={"reference": [{"claim": "numpy", "verdict": "holds"}], "candidate": []},
        root=Difference.group(name="run", artefact="run", children=[leaf]),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "r.json"


def test_round_trip_is_exact(path: Path) -> None:
    result = make_result()
    write_json(result, path)
    again = read_json(path)
    assert again.to_dict() == result.to_dict()
    assert again.root.children[0].name == ODD_NAME
    assert type(again.first_divergence) is FirstDivergence
    write_json(again, path.with_name("s.json"))
    assert path.with_name("s.json").read_bytes() == path.read_bytes()


def test_round_trip_of_a_bare_result(path: Path) -> None:
    root = Difference.group(name="run", artefact="run", children=())
    result = Result(
        tool={},
        outcome=Outcome.INCONCLUSIVE,
        reasons=(),
        reference={},
        candidate={},
        pairs=1,
        steps=None,
        root=root,
    )
    write_json(result, path)
    assert read_json(path) == result


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
leaves = st.builds(
    Difference,
    name=st.text(),
    artefact=st.text(),
    verdict=st.sampled_from(Verdict),
    summary=st.text(),
    measures=st.dictionaries(st.text(), plain, max_size=3),
)
trees = st.recursive(
    leaves,
    lambda inner: st.builds(Difference.group, name=st.text(), artefact=st.text(), children=st.lists(inner, max_size=3)),
    max_leaves=6,
)


objects = st.dictionaries(st.text(), plain, max_size=3)
texts = st.lists(st.text(), max_size=3).map(tuple)
numbers = st.integers()
firsts = st.builds(
    FirstDivergence,
    rank=numbers,
    step=numbers | st.none(),
    last_equal_step=numbers | st.none(),
    stage=st.none() | st.text(),
    subject=st.text(),
    operator=st.none() | st.text(),
    cause=st.text(),
    remedy=st.text(),
    evidence=texts,
    growth=objects,
    reproduce=st.text(),
)
results = st.builds(
    Result,
    tool=objects,
    outcome=st.sampled_from(Outcome),
    reasons=texts,
    reference=objects,
    candidate=objects,
    candidates=st.lists(objects, max_size=2).map(tuple),
    pairs=numbers,
    steps=numbers | st.none(),
    not_recorded=texts,
    policy=objects,
    first_divergence=firsts | st.none(),
    control=objects | st.none(),
    seeding=objects,
    root=trees,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(result=results)
def test_any_result_is_as_the_schema_says_and_comes_back(path: Path, result: Result) -> None:
    write_json(result, path)
    SCHEMA.validate(json.loads(path.read_bytes()))
    assert read_json(path).to_dict() == result.to_dict()


def test_file_is_strict_json_with_the_keys_of_the_contract_in_order(path: Path) -> None:
    write_json(make_result(), path)
    text = path.read_text(encoding="ascii")
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the file"))
    assert text.endswith("}\n")
    assert list(data) == list(make_result().to_dict())
    assert data["schema_version"] == 1
    assert data["exit_code"] == 1
    assert data["root"]["children"][0]["measures"]["max_rel"] == "nan"


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path, path: Path) -> None:
    path.write_text("old")
    write_json(make_result(), path)
    assert [item.name for item in tmp_path.iterdir()] == ["r.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_write_makes_the_directory(tmp_path: Path) -> None:
    write_json(make_result(), tmp_path / "a" / "b" / "r.json")
    assert read_json(tmp_path / "a" / "b" / "r.json").steps == 1000


def test_a_failed_write_keeps_the_file_that_was_there(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(make_result(), path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("f3rm_verify.reporters.report_file.os.replace", full)
    with pytest.raises(UsageError, match=r"r\.json: .*No space left on device.*name another file"):
        write_json(make_result(), path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("name", ["", "file/r.json", "nul\0.json", "x" * 300])
def test_a_file_that_cannot_be_written_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="name another file"):
        write_json(make_result(), tmp_path / name)


def test_a_pipe_is_not_replaced(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(UsageError, match="no regular file"):
        write_json(make_result(), path)
    with pytest.raises(UsageError, match="not a regular file"):
        read_json(path)
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b'{"a": NaN}', "a number is out of range"),
        (b'{"a": -Infinity}', "a number is out of range"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"verdict": "diverged", "verdict": "reproducible"}', "a key twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b"[" * 101 + b"]" * 101, "nested too deeply"),
        (b'{"children":' * 150 + b"1" + b"}" * 150, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b"[]", "the file is array, expected object"),
        (b"null", "the file is null, expected object"),
        (b"{}", "'schema_version' is missing"),
        (b'{"schema_version": 2}', "schema_version is 2, this version reads 1"),
        (b'{"schema_version": "1"}', "schema_version is string, expected integer"),
        (b'{"schema_version": true}', "schema_version is boolean, expected integer"),
        (b'{"schema_version": 1}', "'tool' is missing"),
    ],
)
def test_what_is_no_result_file(path: Path, content: bytes, reason: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_json(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is no result file (")
    assert reason in message
    assert message.endswith("); give the file that --json wrote.")
    assert "\n" not in message


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist; give the file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(UsageError, match="not a regular file"):
        read_json(tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_json(tmp_path / "nul\0")


def test_truncated_at_every_hundredth_byte(path: Path) -> None:
    write_json(make_result(), path)
    content = path.read_bytes()
    for length in range(0, len(content) - 2, 100):
        path.write_bytes(content[:length])
        with pytest.raises(UsageError, match="not JSON"):
            read_json(path)


def test_huge_file_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(make_result(), path)
    kind = json_report._KIND
    monkeypatch.setattr(json_report, "_KIND", dataclasses.replace(kind, max_bytes=path.stat().st_size))
    assert read_json(path).steps == 1000
    monkeypatch.setattr(json_report, "_KIND", dataclasses.replace(kind, max_bytes=path.stat().st_size - 1))
    with pytest.raises(UsageError, match="larger than"):
        read_json(path)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value whose type the contract fixes."""
    free = {"tool", "reference", "candidate", "candidates", "policy", "control", "seeding", "measures", "growth"}
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        if key not in free:
            yield from places(value, (*path, key))


#: What a value of the contract is never replaced with, by the type that it has.
WRONG: dict[type, tuple[Any, ...]] = {
    str: (None, 1, ["text"], {}),
    int: ("1", 1.0, True, [1]),
    list: (None, "text", {}, {"a": 1}),
    dict: ("text", [], [["a", 1]], 1),
    type(None): ([], 1.5, True),
}
PLACES = list(places(make_result().to_dict()))


#: Words of JSON Schema that `read_json` follows; a description binds nobody.
KNOWN = {"type", "const", "enum", "properties", "required", "additionalProperties", "items", "description"}


def refusal(path: Path, data: Any) -> str:
    """What the reader has against it; "" where it reads it."""
    path.write_text(json.dumps(data))
    try:
        read_json(path)
    except UsageError as error:
        assert "is no result file" in str(error)
        return str(error)
    return ""


def different() -> FakeRun:
    run = FakeRun()
    run.scalars[LOSS][4] = float("nan")
    run.renders[IMAGES[0]]["rgb"][0, 0, 0] += 1
    return run


def unfinished() -> FakeRun:
    run = FakeRun()
    run.manifest["completion"] = None
    return run


def several(path: Path) -> Result:
    runs = {f"candidate-{number}": run.write(path / str(number)) for number, run in enumerate((FakeRun(), different()))}
    return compare_runs(FakeRun().write(path / "reference"), runs, policy=DIFF_POLICY)


def against_a_baseline(path: Path) -> Result:
    run = FakeRun().write(path / "recorded")
    write_baseline(path / "b.json", make_baseline(run, path / "b.json", policy=RUN_POLICY, runs=2))
    return compare_with_baseline(read_baseline(path / "b.json"), different().write(path / "checked"), reproduce="")


REAL: dict[str, Callable[[Path], Result]] = {
    "reproducible": lambda path: compare_fakes(path, FakeRun(), FakeRun()),
    "diverged": lambda path: compare_fakes(path, FakeRun(), different()),
    "inconclusive": lambda path: compare_fakes(path, FakeRun(), unfinished()),
    "plain": lambda path: compare_fakes(path, plain_run(), plain_run()),
    "ranks": lambda path: compare_fakes(path, run_of_ranks(), run_of_ranks()),
    "several": several,
    "baseline": against_a_baseline,
}


def parent_of(data: Any, place: tuple[Any, ...]) -> Any:
    for key in place[:-1]:
        data = data[key]
    return data


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_every_value_of_another_type_is_refused(path: Path, place: tuple[Any, ...]) -> None:
    good = make_result().to_dict()
    may_be_null = ("first_divergence", "stage")
    for wrong in WRONG[type(parent_of(good, place)[place[-1]])]:
        if wrong is None and place == may_be_null:
            continue
        data = copy.deepcopy(good)
        parent_of(data, place)[place[-1]] = wrong
        assert refusal(path, data)
        assert wrong == 1.0 or not SCHEMA.is_valid(data)  # 1.0 is an integer to JSON Schema


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_every_key_is_needed(path: Path, place: tuple[Any, ...]) -> None:
    data = make_result().to_dict()
    parent = parent_of(data, place)
    if isinstance(parent, list):
        parent.append(None)
    else:
        del parent[place[-1]]
    assert re.search("is missing|expected", refusal(path, data))
    assert not SCHEMA.is_valid(data)


@pytest.mark.parametrize("place", [(), ("root",), ("root", "children", 0), ("first_divergence",)])
def test_no_key_is_added(path: Path, place: tuple[Any, ...]) -> None:
    data = make_result().to_dict()
    parent_of(data, (*place, "more"))["more"] = 1
    assert "has the unknown key 'more'" in refusal(path, data)
    assert not SCHEMA.is_valid(data)


@pytest.mark.parametrize("outcome", Outcome)
@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_an_exit_code_of_another_verdict_is_refused(path: Path, outcome: Outcome, code: int) -> None:
    data = {**make_result().to_dict(), "verdict": outcome.value, "exit_code": code}
    assert SCHEMA.is_valid(data) == (code == outcome.exit_code)
    assert ("exit_code" in refusal(path, data)) == (code != outcome.exit_code)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=plain | st.sampled_from([*Verdict, *Outcome]))
def test_the_schema_and_the_reader_agree(path: Path, place: tuple[Any, ...], value: Any) -> None:
    assume(not (isinstance(value, float) and value.is_integer()))
    data = make_result().to_dict()
    parent_of(data, place)[place[-1]] = value
    assert SCHEMA.is_valid(data) == (refusal(path, data) == "")


class TestSchema:
    def test_it_is_one(self) -> None:
        Draft202012Validator.check_schema(SCHEMA.schema)

    def test_it_says_what_is_written(self) -> None:
        written, rules = make_result().to_dict(), SCHEMA.schema["$defs"]
        for rule, data in (
            (SCHEMA.schema, written),
            (rules["first_divergence"], written["first_divergence"]),
            (rules["difference"], written["root"]),
        ):
            assert list(rule["properties"]) == rule["required"] == list(data)
            assert rule["additionalProperties"] is False
        assert SCHEMA.schema["properties"]["verdict"]["enum"] == [outcome.value for outcome in Outcome]
        assert rules["difference"]["properties"]["verdict"]["enum"] == [verdict.value for verdict in Verdict]
        assert SCHEMA.schema["properties"]["schema_version"]["const"] == SCHEMA_VERSION

    def test_it_uses_only_words_that_the_reader_knows(self) -> None:
        head = {"$schema", "$id", "$defs", "title", "oneOf"}
        rules = [{key: value for key, value in SCHEMA.schema.items() if key not in head}]
        rules += SCHEMA.schema["$defs"].values()
        for rule in rules:
            rules += rule.get("properties", {}).values()
            rules += [rule["items"]] if "items" in rule else []
            if "$ref" in rule:
                assert rule.keys() == {"$ref"} and rule["$ref"].removeprefix("#/$defs/") in SCHEMA.schema["$defs"]
                continue
            assert rule.keys() <= KNOWN
            assert {rule["type"]} if isinstance(rule["type"], str) else {*rule["type"]} <= {*json_report._TYPES}
            assert ("properties" in rule) == ("required" in rule) == ("additionalProperties" in rule)
        assert len(rules) > 30

    @pytest.mark.parametrize("name", RESULTS)
    def test_results_of_every_kind(self, path: Path, name: str) -> None:
        write_json(RESULTS[name](), path)
        SCHEMA.validate(json.loads(path.read_bytes()))

    @pytest.mark.parametrize("kind", REAL)
    def test_real_results(self, tmp_path: Path, kind: str) -> None:
        write_json(REAL[kind](tmp_path / "runs"), tmp_path / "r.json")
        SCHEMA.validate(json.loads((tmp_path / "r.json").read_bytes()))
        assert read_json(tmp_path / "r.json").to_dict()

    def test_the_command_prints_it(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr("sys.argv", ["f3rm-verify", "schema"])
        with pytest.raises(SystemExit, match="0"):
            cli.main()
        assert json.loads(capsys.readouterr().out) == SCHEMA.schema


def test_a_long_reason_is_cut(path: Path) -> None:
    path.write_text(json.dumps({**make_result().to_dict(), "verdict": "x" * 10_000}))
    with pytest.raises(UsageError) as caught:
        read_json(path)
    assert len(str(caught.value)) < 300 + len(str(path))
