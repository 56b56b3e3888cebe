from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from f3rm_verify.compare_checkpoints import compare_checkpoints, nothing_trained
from f3rm_verify.difference import Difference, Verdict
from f3rm_verify.policy import Policy
from f3rm_verify.run_dir import CHECKPOINTS, RunDir

torch = pytest.importorskip("torch")

TABLE = "pipeline/_model.field.mlp_base.hash_table"


def training(step: int = 999) -> dict[str, Any]:
    """What a nerfstudio trainer saves."""
    generator = torch.Generator().manual_seed(step)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    pipeline = {
        "_model.field.mlp_base.hash_table": draw(32, 2),
        "_model.field.head.bias": draw(4).to(torch.bfloat16),
        "_model.occupancy": torch.tensor([True, False]),
        "_model.step": torch.tensor(step),
    }
    state = {i: {"step": torch.tensor(3.0), "exp_avg": draw(3, 2), "exp_avg_sq": draw(3, 2)} for i in range(2)}
    return {
        "step": step,
        "pipeline": pipeline,
        "optimizers": {
            "fields": {"state": state, "param_groups": [{"lr": 0.01, "betas": (0.9, 0.999), "params": [0, 1]}]}
        },
        "schedulers": {"fields": {"last_epoch": step, "_last_lr": [np.float64(0.005)], "lr_lambdas": [None]}},
        "scalers": {},
    }


def write(path: Path, *trainings: dict[str, Any]) -> RunDir:
    folder = path / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    for value in trainings:
        torch.save(value, folder / f"step-{value['step']:09d}.ckpt")
    return RunDir(path)


def both(tmp_path: Path, reference: dict[str, Any], candidate: dict[str, Any]) -> Difference:
    """The tree, after a check that swapped sides have the same verdicts and that it is JSON data."""
    runs = write(tmp_path / "reference", reference), write(tmp_path / "candidate", candidate)
    tree, swapped = compare_checkpoints(*runs, policy=Policy()), compare_checkpoints(*reversed(runs), policy=Policy())
    assert {path: node.verdict for path, node in tree.walk()} == {path: node.verdict for path, node in swapped.walk()}
    assert json.loads(json.dumps(tree.to_dict(), allow_nan=False)) == tree.to_dict()
    return tree


def not_identical(tree: Difference) -> dict[str, Difference]:
    """The leaves that are not identical, by path below the step."""
    leaves = {"/".join(path[2:]): node for path, node in tree.leaves()}
    assert len(leaves) == len(list(tree.leaves())), "each node has a path of its own"
    return {path: node for path, node in leaves.items() if node.verdict is not Verdict.IDENTICAL}


def only(tree: Difference, path: str) -> Difference:
    found = not_identical(tree)
    assert list(found) == [path]
    return found[path]


def test_a_run_is_identical_to_its_equal_and_every_value_has_a_node(tmp_path: Path) -> None:
    tree = both(tmp_path, training(), training())
    assert {node.verdict for _, node in tree.walk()} == {Verdict.IDENTICAL}
    assert (tree.name, tree.artefact) == ("checkpoints", "checkpoints")
    (step,) = tree.children
    assert step.name == "step-000000999"
    assert [part.name for part in step.children] == ["step", "pipeline", "optimizers", "schedulers", "scalers"]
    paths = {"/".join(path[2:]) for path, _ in tree.leaves()}
    assert len(paths) == 1 + 4 + 2 * 3 + 5 + 3 + 1
    expected = {"step", "scalers", TABLE, "optimizers/fields/state/1/exp_avg_sq", "schedulers/fields/_last_lr/[0]"}
    assert expected <= paths


def test_one_flipped_bit_saved_again_is_exactly_one_different_tensor(tmp_path: Path) -> None:
    changed = training()
    table = changed["pipeline"]["_model.field.mlp_base.hash_table"]
    table.view(torch.int32)[17, 1] ^= 1
    node = only(both(tmp_path, training(), changed), TABLE)
    assert node.verdict is Verdict.DIFFERENT
    assert (node.measures["n"], node.measures["n_different"]) == (64, 1)
    assert (node.measures["max_ulp"], node.measures["at"]) == (1, [17, 1])
    assert node.summary.startswith("1 of 64 values differs, largest ")
    assert node.summary.endswith(" at [17, 1] (1 ulp)")
    assert "crc_mismatch" not in node.measures


def test_one_flipped_bit_in_the_file_is_exactly_one_different_tensor(tmp_path: Path) -> None:
    runs = write(tmp_path / "reference", training()), write(tmp_path / "candidate", training())
    (path,) = runs[1].checkpoints.values()
    raw = bytearray(path.read_bytes())
    needle = training()["pipeline"]["_model.field.mlp_base.hash_table"].numpy().tobytes()
    assert raw.count(needle) == 1
    raw[raw.index(needle) + 4 * (17 * 2 + 1)] ^= 1
    path.write_bytes(raw)
    node = only(compare_checkpoints(*runs, policy=Policy()), TABLE)
    assert (node.verdict, node.measures["max_ulp"], node.measures["at"]) == (Verdict.DIFFERENT, 1, [17, 1])
    assert node.measures["crc_mismatch"] == "candidate"
    assert "checksum mismatch in candidate" in node.summary


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("optimizers/fields/state/1/exp_avg", lambda t: t["optimizers"]["fields"]["state"][1]["exp_avg"].add_(1e-6)),
        ("pipeline/_model.field.head.bias", lambda t: t["pipeline"]["_model.field.head.bias"].mul_(2)),
        ("pipeline/_model.occupancy", lambda t: t["pipeline"]["_model.occupancy"].logical_not_()),
        ("pipeline/_model.step", lambda t: t["pipeline"]["_model.step"].add_(1)),
        (TABLE, lambda t: t["pipeline"]["_model.field.mlp_base.hash_table"].fill_(float("nan"))),
        ("schedulers/fields/last_epoch", lambda t: t["schedulers"]["fields"].update(last_epoch=3)),
        ("schedulers/fields/last_epoch", lambda t: t["schedulers"]["fields"].update(last_epoch=999.0)),
        ("schedulers/fields/_last_lr/[0]", lambda t: t["schedulers"]["fields"].update(_last_lr=[np.float64(0.006)])),
        ("schedulers/fields/_last_lr/[0]", lambda t: t["schedulers"]["fields"].update(_last_lr=[0.005])),
        ("schedulers/fields/lr_lambdas/[0]", lambda t: t["schedulers"]["fields"].update(lr_lambdas=[False])),
        (
            "optimizers/fields/param_groups/[0]/lr",
            lambda t: t["optimizers"]["fields"]["param_groups"][0].update(lr=float(np.nextafter(0.01, 1))),
        ),
    ],
)
def test_one_planted_fault_is_exactly_one_different_node(tmp_path: Path, path: str, change: Any) -> None:
    changed = training()
    change(changed)
    node = only(both(tmp_path, training(), changed), path)
    assert node.verdict is Verdict.DIFFERENT
    assert node.summary


def test_python_floats_are_compared_by_bits_and_measured(tmp_path: Path) -> None:
    def with_rate(rate: float) -> dict[str, Any]:
        value = training()
        value["schedulers"]["fields"]["rate"] = rate
        return value

    node = only(both(tmp_path, with_rate(0.1), with_rate(0.1 + 2**-56)), "schedulers/fields/rate")
    assert node.summary == "0.1 against 0.10000000000000002"
    assert node.measures["max_ulp"] == 1
    assert (
        only(both(tmp_path, with_rate(0.0), with_rate(-0.0)), "schedulers/fields/rate").measures["n_sign_of_zero"] == 1
    )
    assert (
        only(both(tmp_path, with_rate(1.0), with_rate(float("nan"))), "schedulers/fields/rate").verdict == "different"
    )
    assert both(tmp_path, with_rate(float("nan")), with_rate(float("nan"))).verdict is Verdict.IDENTICAL


def test_a_tensor_on_one_side_only_is_missing_and_the_side_named(tmp_path: Path) -> None:
    shorter = training()
    del shorter["pipeline"]["_model.occupancy"]
    tree = both(tmp_path, training(), shorter)
    node = only(tree, "pipeline/_model.occupancy")
    assert (node.verdict, node.summary) == (Verdict.MISSING, "missing in the candidate")
    assert tree.verdict is Verdict.MISSING


def test_a_part_on_one_side_only_is_missing(tmp_path: Path) -> None:
    shorter = training()
    del shorter["optimizers"]
    found = not_identical(both(tmp_path, training(), shorter))
    assert {node.verdict for node in found.values()} == {Verdict.MISSING}
    assert len(found) == 11


def test_a_part_that_is_empty_on_one_side_is_missing(tmp_path: Path) -> None:
    fuller = training()
    fuller["scalers"] = {"scale": 65536.0}
    found = not_identical(both(tmp_path, training(), fuller))
    assert {path: node.verdict for path, node in found.items()} == {
        "scalers/(itself)": Verdict.MISSING,
        "scalers/scale": Verdict.MISSING,
    }


@pytest.mark.parametrize(
    ("tensor", "summary"),
    [
        (torch.zeros(32, 2, dtype=torch.float64), "float32 [32, 2] against float64 [32, 2]"),
        (torch.zeros(64), "float32 [32, 2] against float32 [64]"),
        (torch.zeros(32, 2, dtype=torch.int32), "float32 [32, 2] against int32 [32, 2]"),
        (0.5, "float32 [32, 2] against float 0.5"),
        ("text", "float32 [32, 2] against str 'text'"),
    ],
)
def test_another_dtype_shape_or_kind_is_different_before_values(tmp_path: Path, tensor: Any, summary: str) -> None:
    changed = training()
    changed["pipeline"]["_model.field.mlp_base.hash_table"] = tensor
    node = only(both(tmp_path, training(), changed), TABLE)
    assert (node.verdict, node.summary) == (Verdict.DIFFERENT, summary)


def test_bits_of_equal_width_and_other_dtype_are_different(tmp_path: Path) -> None:
    changed = training()
    bias = changed["pipeline"]["_model.field.head.bias"]
    changed["pipeline"]["_model.field.head.bias"] = bias.view(torch.uint16)
    node = only(both(tmp_path, training(), changed), "pipeline/_model.field.head.bias")
    assert node.summary == "bfloat16 [4] against uint16 [4]"


def test_equal_nans_are_identical_and_other_nans_are_not(tmp_path: Path) -> None:
    sides = [training(), training(), training()]
    for side in sides:
        side["pipeline"]["_model.field.mlp_base.hash_table"][3] = float("nan")
    sides[2]["pipeline"]["_model.field.mlp_base.hash_table"].view(torch.int32)[3, 0] ^= 1
    assert both(tmp_path, sides[0], sides[1]).verdict is Verdict.IDENTICAL
    node = only(both(tmp_path, sides[0], sides[2]), TABLE)
    assert (node.verdict, node.measures["n_nan_payload"]) == (Verdict.DIFFERENT, 1)


def test_a_nan_on_one_side_is_different_and_counted(tmp_path: Path) -> None:
    changed = training()
    changed["pipeline"]["_model.field.mlp_base.hash_table"][3, 1] = float("nan")
    node = only(both(tmp_path, training(), changed), TABLE)
    assert (node.verdict, node.measures["n_nan_mismatch"], node.measures["at"]) == (Verdict.DIFFERENT, 1, [3, 1])


def test_layout_in_memory_and_order_of_keys_are_no_difference(tmp_path: Path) -> None:
    changed = training()
    table = changed["pipeline"].pop("_model.field.mlp_base.hash_table")
    changed["pipeline"]["_model.field.mlp_base.hash_table"] = torch.nn.Parameter(table.T.contiguous().T)
    assert both(tmp_path, training(), changed).verdict is Verdict.IDENTICAL


def test_keys_with_slashes_stay_apart(tmp_path: Path) -> None:
    one, other = training(), training()
    one["pipeline"]["a/b"], one["pipeline"]["a"] = torch.ones(1), {"b": torch.zeros(1)}
    other["pipeline"]["a/b"], other["pipeline"]["a"] = torch.zeros(1), {"b": torch.ones(1)}
    assert list(not_identical(both(tmp_path, one, other))) == ['pipeline/"a\\u002fb"', "pipeline/a/b"]


def test_a_step_on_one_side_only_is_missing_and_the_others_are_compared(tmp_path: Path) -> None:
    reference = write(tmp_path / "reference", training(499), training(999))
    candidate = write(tmp_path / "candidate", training(999))
    tree = compare_checkpoints(reference, candidate, policy=Policy())
    assert [(child.name, child.verdict, child.summary) for child in tree.children] == [
        ("step-000000499", Verdict.MISSING, "missing in the candidate"),
        ("step-000000999", Verdict.IDENTICAL, "20 identical"),
    ]
    assert compare_checkpoints(candidate, reference, policy=Policy()).verdict is Verdict.MISSING


def test_an_unreadable_file_is_one_node_and_the_other_steps_are_compared(tmp_path: Path) -> None:
    changed = training(1499)
    changed["pipeline"]["_model.occupancy"].fill_(True)
    reference = write(tmp_path / "reference", training(499), training(999), training(1499))
    candidate = write(tmp_path / "candidate", training(499), training(999), changed)
    path = candidate.checkpoints[499]
    path.write_bytes(path.read_bytes()[:2000])
    tree = compare_checkpoints(reference, candidate, policy=Policy())
    verdicts = [child.verdict for child in tree.children]
    assert verdicts == [Verdict.UNREADABLE, Verdict.IDENTICAL, Verdict.DIFFERENT]
    assert tree.children[0].summary.startswith("candidate: step-000000499.ckpt: truncated")
    assert not tree.children[0].children
    reference.checkpoints[499].write_bytes(b"")
    both_broken = compare_checkpoints(reference, candidate, policy=Policy()).children[0]
    assert both_broken.verdict is Verdict.UNREADABLE
    assert "reference: " in both_broken.summary
    assert "candidate: " in both_broken.summary


class Attack:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_a_malicious_checkpoint_is_unreadable_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changed = training()
    changed["pipeline"]["attack"] = Attack()
    (node,) = both(tmp_path, training(), changed).children
    assert node.verdict is Verdict.UNREADABLE
    assert "mkdir" in node.summary
    assert not Path("executed").exists()


def test_equal_files_that_hold_nothing_are_not_identical(tmp_path: Path) -> None:
    for side in ("reference", "candidate"):
        write(tmp_path / side)
        torch.save({}, tmp_path / side / CHECKPOINTS / "step-000000001.ckpt")
    tree = compare_checkpoints(RunDir(tmp_path / "reference"), RunDir(tmp_path / "candidate"), policy=Policy())
    assert tree.verdict is Verdict.UNREADABLE


@pytest.mark.parametrize("create", [True, False])
def test_no_checkpoints_on_either_side_compares_nothing(tmp_path: Path, create: bool) -> None:
    if create:
        write(tmp_path / "a"), write(tmp_path / "b")
    tree = compare_checkpoints(RunDir(tmp_path / "a"), RunDir(tmp_path / "b"), policy=Policy())
    assert (tree.verdict, tree.children) == (Verdict.UNREADABLE, ())
    assert tree.summary == "neither run has checkpoints in nerfstudio_models/"


def test_no_checkpoints_on_one_side_is_missing(tmp_path: Path) -> None:
    full, empty = write(tmp_path / "full", training()), write(tmp_path / "empty")
    tree = compare_checkpoints(full, empty, policy=Policy())
    assert tree.verdict is Verdict.MISSING
    assert tree.children[0].summary == "missing in the candidate"
    assert compare_checkpoints(empty, full, policy=Policy()).children[0].summary == "missing in the reference"


def test_a_checkpoint_linked_from_elsewhere_is_unreadable(tmp_path: Path) -> None:
    full, linked = write(tmp_path / "full", training()), write(tmp_path / "linked")
    (path,) = full.checkpoints.values()
    (linked.path / CHECKPOINTS / path.name).symlink_to(path)
    tree = compare_checkpoints(full, linked, policy=Policy())
    assert tree.verdict is Verdict.UNREADABLE
    assert "leads out of the run directory" in tree.children[0].summary
    assert nothing_trained(linked) is None


def test_nothing_trained_needs_moments_that_are_all_zero(tmp_path: Path) -> None:
    untrained = training()
    for moments in untrained["optimizers"]["fields"]["state"].values():
        moments["exp_avg"].zero_()
        moments["exp_avg_sq"].zero_()
    assert nothing_trained(write(tmp_path / "untrained", untrained)) is True
    nearly = copy.deepcopy(untrained)
    nearly["optimizers"]["fields"]["state"][1]["exp_avg_sq"][2, 1] = 1e-45
    assert nothing_trained(write(tmp_path / "nearly", nearly)) is False
    assert nothing_trained(write(tmp_path / "later", untrained, training(1999))) is False
    assert nothing_trained(write(tmp_path / "trained", training())) is False


def test_nothing_trained_is_unknown_without_moments(tmp_path: Path) -> None:
    assert nothing_trained(RunDir(tmp_path)) is None
    value = training()
    value["optimizers"] = {}
    assert nothing_trained(write(tmp_path / "none", value)) is None
    broken = write(tmp_path / "broken", training())
    broken.checkpoints[999].write_bytes(b"")
    assert nothing_trained(broken) is None


def test_tensors_that_share_a_storage_say_so_where_they_differ(tmp_path: Path) -> None:
    def tied(value: float) -> dict[str, Any]:
        weight = torch.full((4, 2), value)
        state = {"encoder.weight": weight, "decoder.weight": weight.t(), "bias": torch.zeros(2)}
        return {"step": 3, "pipeline": state}

    tree = both(tmp_path, tied(1.0), tied(2.0))
    found = not_identical(tree)
    assert sorted(found) == ["pipeline/decoder.weight", "pipeline/encoder.weight"]
    node = found["pipeline/decoder.weight"]
    assert node.summary.endswith("; shares its storage with pipeline/encoder.weight")
    assert node.measures["shares_storage"] == ["pipeline/encoder.weight"]
    assert node.measures["ulp_histogram"] == {str(2**23): 8}


def test_other_shapes_and_precisions_of_the_same_values_say_so(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(8.0), "b": torch.arange(8.0), "c": torch.arange(8.0), "d": torch.arange(8.0)}
    others = {
        "a": torch.arange(8.0).reshape(2, 4),
        "b": torch.arange(8.0).double(),
        "c": torch.arange(8.0).half() + 1,
        "d": torch.arange(1.0, 9.0).reshape(2, 4),
    }
    tree = both(tmp_path, {"step": 1, "pipeline": tensors}, {"step": 1, "pipeline": others})
    found = {path[-1]: node for path, node in tree.leaves() if node.verdict is Verdict.DIFFERENT}
    assert {name: "same values" in node.summary for name, node in found.items()} == {
        "a": True,
        "b": True,
        "c": False,
        "d": False,
    }
