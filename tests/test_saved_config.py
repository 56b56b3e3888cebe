"""What the launcher reads in a saved config.yml, and what it refuses before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from f3rm_verify.errors import UsageError
from f3rm_verify.saved_config import read_saved_config

CONFIG = """!!python/object:{kind}
method_name: my-method
max_num_iterations: 250
load_dir: {load_dir}
load_checkpoint: null
data: {alias}
machine: !!python/object:nerfstudio.configs.base_config.MachineConfig
  seed: 7
pipeline: !!python/object:nerfstudio.pipelines.base_pipeline.VanillaPipelineConfig
  datamanager: !!python/object:{manager}
    data: {data}
    dataparser: !!python/object:nerfstudio.data.x.XConfig
      data: {parser}
"""
MANAGER = "nerfstudio.data.datamanagers.base_datamanager.VanillaDataManagerConfig"


def saved(folder: Path, **values: str) -> Path:
    defaults = {"kind": "nerfstudio.engine.trainer.TrainerConfig", "load_dir": "null", "manager": MANAGER}
    places = {"alias": "null", "data": "null", "parser": "null"}
    path = folder / "old.yml"
    path.write_text(CONFIG.format(**(defaults | places | values)), "utf8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_saved_config(path).existing_data()
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_method_seed_steps_and_data(tmp_path: Path) -> None:
    read = read_saved_config(saved(tmp_path, data=f"!!python/object/apply:pathlib.PosixPath [{tmp_path}]"))
    assert (read.method, read.seed, read.iters, read.existing_data()) == ("my-method", 7, 250, tmp_path)


@pytest.mark.parametrize(
    ("places", "counts"),
    [({"data": "a", "parser": "b", "alias": "c"}, "a"), ({"parser": "b", "alias": "c"}, "b"), ({"alias": "c"}, "c")],
)
def test_the_data_are_those_that_ns_train_would_take(tmp_path: Path, places: dict[str, str], counts: str) -> None:
    assert read_saved_config(saved(tmp_path, **places)).data == Path(counts)


@pytest.mark.parametrize(
    ("manager", "provider"),
    [(MANAGER, None), ("f3rm_verify.f3rm.datamanager.X", None), ("f3rm.feature_datamanager.X", "f3rm")],
)
def test_a_foreign_data_manager_is_noticed(tmp_path: Path, manager: str, provider: str | None) -> None:
    assert read_saved_config(saved(tmp_path, manager=manager)).foreign_provider == provider


def test_what_it_goes_on_from_must_be_there(tmp_path: Path) -> None:
    assert read_saved_config(saved(tmp_path, load_dir=str(tmp_path))).seed == 7
    message = refusal(saved(tmp_path, load_dir="gone/nerfstudio_models"))
    assert "goes on from gone/nerfstudio_models" in message
    assert "set load_dir to null" in message


def test_data_that_are_gone(tmp_path: Path) -> None:
    assert "was trained on gone/scene, which does not exist any more; give --data" in refusal(
        saved(tmp_path, data="gone/scene")
    )
    assert "names no dataset" in refusal(saved(tmp_path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: [", "cannot be read"),
        ("", "no configuration of a training"),
        ("- 1", "no configuration of a training"),
        ("method_name: f3rm\nmax_num_iterations: 3", "no machine.seed"),
        ("method_name: null\nmax_num_iterations: 3\nmachine: {seed: 1}", "no method_name"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "old.yml"
    path.write_text(content)
    assert reason in refusal(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent.yml")
    assert "not a regular file" in refusal(tmp_path)


def test_nothing_that_it_names_is_imported_or_run(tmp_path: Path) -> None:
    path = saved(tmp_path, data=f"!!python/object/apply:os.mkdir [{tmp_path / 'made'}]")
    assert read_saved_config(path).data is None
    assert not (tmp_path / "made").exists()
