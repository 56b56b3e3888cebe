"""A saved config.yml, of nerfstudio's trainer or of ours, becomes a seeded training, or one sentence says why not."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from saved_configs import as_from_before

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]


def ours(folder: Path) -> Path:
    import yaml

    from f3rm_verify.f3rm.f3rm_config import f3rm_method

    path = folder / "ours.yml"
    path.write_text(yaml.dump(f3rm_method.config), "utf8")
    return path


def before(folder: Path, change: Any = lambda text: text, **changes: str) -> Path:
    """The same as nerfstudio's trainer would have saved it."""
    path = folder / "before.yml"
    path.write_text(change(as_from_before(ours(folder), **changes)), "utf8")
    return path


def load(path: Path) -> Any:
    from f3rm_verify.f3rm.saved_config import load_saved_config

    return load_saved_config(path)


def refusal(path: Path) -> str:
    with pytest.raises(LookupError) as caught:
        load(path)
    assert str(path) in caught.value.args[0]
    assert "\n" not in caught.value.args[0]
    return str(caught.value.args[0])


def test_one_of_nerfstudios_trainer_is_wrapped_and_means_the_same(tmp_path: Path) -> None:
    from nerfstudio.engine.trainer import TrainerConfig

    from f3rm_verify.f3rm.f3rm_config import f3rm_method
    from f3rm_verify.f3rm.trainer import F3RMTrainer
    from f3rm_verify.f3rm.wrap import wrap_config

    loaded = load(before(tmp_path))
    assert type(loaded) is TrainerConfig
    wrapped = wrap_config(loaded)
    assert wrapped._target is F3RMTrainer
    assert wrapped == f3rm_method.config


def test_one_of_ours_stays_what_it_is(tmp_path: Path) -> None:
    from f3rm_verify.f3rm.f3rm_config import f3rm_method

    path = ours(tmp_path)
    assert load(path) == f3rm_method.config
    path.write_text(
        re.sub("enable_comprehensive_seeding: true", "enable_comprehensive_seeding: false", path.read_text())
    )
    assert load(path).enable_comprehensive_seeding is False


def test_nerfacto_takes_options_of_the_command_line_once_it_is_wrapped(tmp_path: Path) -> None:
    import tyro
    import yaml
    from nerfstudio.configs.method_configs import method_configs

    from f3rm_verify.f3rm.wrap import wrap_config

    config = copy.deepcopy(method_configs["nerfacto"])
    config.pipeline.datamanager.train_num_rays_per_batch = 77
    config.machine.seed = 9
    path = tmp_path / "nerfacto.yml"
    path.write_text(yaml.dump(config), "utf8")
    methods = tyro.extras.subcommand_type_from_defaults({"nerfacto": wrap_config(load(path)), "other": config})
    words = ["nerfacto", "--machine.seed", "10", "--seed-warn-only", "True"]
    parsed: Any = tyro.cli(tyro.conf.FlagConversionOff[methods], args=words)  # type: ignore[valid-type]
    assert (parsed.machine.seed, parsed.seed_warn_only) == (10, True)
    assert (parsed.pipeline.datamanager.train_num_rays_per_batch, parsed.enable_comprehensive_seeding) == (77, True)


def test_what_came_later_gets_its_default_and_what_went_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def older(text: str) -> str:
        text = re.sub(
            r"^ *(?:steps_per_eval_batch|eval_num_rays_per_batch|gradient_accumulation_steps): .*\n",
            "",
            text,
            flags=re.M,
        )
        return re.sub(r"^( *)log2_hashmap_size: ", r"\1size_of_the_table: 3\n\1log2_hashmap_size: ", text, flags=re.M)

    loaded = load(before(tmp_path, older))
    assert (loaded.steps_per_eval_batch, loaded.gradient_accumulation_steps) == (500, {})
    assert loaded.pipeline.datamanager.eval_num_rays_per_batch == 1024
    assert not hasattr(loaded.pipeline.model, "size_of_the_table")
    told = capsys.readouterr().out.splitlines()
    assert (
        "f3rm-verify: before.yml has no pipeline.datamanager.eval_num_rays_per_batch: its default, 1024, is taken."
        in told
    )
    assert any(
        "has pipeline.model.size_of_the_table, which FeatureFieldModelConfig no longer has" in line for line in told
    )
    assert len(told) == 4


def test_nothing_in_it_leads_the_training_elsewhere(tmp_path: Path) -> None:
    changes = {"load_config": "other.yml", "start_paused": "true"}
    strange = load(before(tmp_path, lambda text: text.replace("- nerfstudio_models", "- elsewhere"), **changes))
    assert (strange.load_config, strange.start_paused) == (None, False)
    assert str(strange.relative_model_dir) == "nerfstudio_models"


def test_a_number_where_there_is_a_table_today_is_named(tmp_path: Path) -> None:
    # nerfstudio 0.3.4 had one number for all groups of parameters.
    path = before(tmp_path, gradient_accumulation_steps="1")
    assert "has gradient_accumulation_steps: 1, where this version has a table" in refusal(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("!!python/object:gone.package.Config\nmethod_name: x", "cannot find module 'gone.package'"),
        ("!!python/object:nerfstudio.engine.trainer.GoneConfig\nmethod_name: x", "cannot find 'GoneConfig'"),
        ("method_name: f3rm", "holds dict, not the configuration of a training"),
        ("!!python/object:nerfstudio.configs.base_config.MachineConfig\nseed: 1", "holds MachineConfig"),
        ("a: [", "cannot be loaded"),
    ],
)
def test_what_cannot_be_had_here_is_named(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "old.yml"
    path.write_text(content)
    assert reason in refusal(path)
