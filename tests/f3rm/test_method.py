"""The method itself, in one process that imports nerfstudio once and makes one real training step of the preset."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from f3rm_verify.presets import SMALL
from f3rm_verify.scene import write_scene

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]


@dataclass
class Stepped:
    """A trainer after one step, and what was seen in it."""

    trainer: Any
    calls: list[int]
    batch: dict[str, Any]
    loss_dict: dict[str, Any]
    outputs: dict[str, Any]


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stepped]:
    import tyro
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
    from nerfstudio.field_components.encodings import HashEncoding

    folder = tmp_path_factory.mktemp("method")
    scene = write_scene(folder / "scene")
    arguments = ["f3rm", "--data", str(scene), "--output-dir", str(folder / "out"), "--vis", "tensorboard", *SMALL]
    config = tyro.cli(AnnotatedBaseConfigUnion, args=[*arguments, "--machine.device-type", "cpu"])
    config.pipeline.datamanager.data = config.data
    config.set_timestamp()
    calls: list[int] = []
    forward = HashEncoding.forward

    def counted(self: Any, positions: Any) -> Any:
        calls.append(positions[..., 0].numel() * self.num_levels * self.features_per_level)
        return forward(self, positions)

    with pytest.MonkeyPatch.context() as patch:
        trainer = config.setup(local_rank=0, world_size=1)
        trainer.setup()
        patch.setattr(HashEncoding, "forward", counted)  # now: the seeding log probes the grids, too
        seen: dict[str, Any] = {}
        next_train, get_losses = trainer.pipeline.datamanager.next_train, trainer.pipeline.get_train_loss_dict

        def watched_batch(step: int) -> Any:
            rays, seen["batch"] = next_train(step)
            return rays, seen["batch"]

        def watched_losses(step: int) -> Any:
            outputs, losses, metrics = get_losses(step)
            seen.update(outputs=outputs, loss_dict=dict(losses))
            return outputs, losses, metrics

        patch.setattr(trainer.pipeline.datamanager, "next_train", watched_batch)
        patch.setattr(trainer.pipeline, "get_train_loss_dict", watched_losses)
        trainer.train_iteration(0)
    yield Stepped(trainer, calls, seen["batch"], seen["loss_dict"], seen["outputs"])


def test_the_preset_calls_every_hash_grid_with_more_than_100_000_values(stepped: Stepped) -> None:
    assert len(stepped.calls) == 3  # proposal network, NeRF, feature field
    assert min(stepped.calls) > 100_000


def test_the_feature_loss_is_the_weighted_mean_squared_error(stepped: Stepped) -> None:
    error = ((stepped.outputs["feature"] - stepped.batch["feature"]) ** 2).mean()
    assert stepped.loss_dict["feature_loss"].item() == pytest.approx(1e-3 * error.item(), rel=1e-6)


def test_features_are_those_of_the_nearest_cell(stepped: Stepped) -> None:
    (features,) = stepped.trainer.pipeline.datamanager.train_features
    for row in (0, 17, 101):
        camera, y, x = stepped.batch["indices"][row].tolist()
        assert (stepped.batch["feature"][row] == features[camera, y * 32 // 64, x * 32 // 64]).all()


def test_parameter_groups_are_disjoint_and_complete(stepped: Stepped) -> None:
    groups = stepped.trainer.pipeline.get_param_groups()
    named = {id(value): name for name, value in stepped.trainer.pipeline.model.named_parameters()}
    grouped = [id(value) for values in groups.values() for value in values]
    assert set(groups) == {"proposal_networks", "fields", "feature_field"}  # the preset's cameras are fixed
    assert len(grouped) == len(set(grouped))
    assert {named[key] for key in named if key not in grouped} <= {"device_indicator_param"}


def test_the_feature_field_does_not_move_the_rays(stepped: Stepped) -> None:
    import torch
    from nerfstudio.cameras.rays import Frustums, RaySamples

    origins = torch.rand(4, 3, 3, requires_grad=True)
    ends = torch.ones(4, 3, 1)
    frustums = Frustums(
        origins=origins, directions=torch.rand(4, 3, 3), starts=0 * ends, ends=ends, pixel_area=0.01 * ends
    )
    field = stepped.trainer.pipeline.model.feature_field
    features = field(RaySamples(frustums=frustums))
    assert features.shape == (4, 3, field.feature_dim)
    features.sum().backward()
    assert origins.grad is None
    assert field.grid.hash_table.grad is not None


def test_the_view_of_the_features_is_part_of_the_checkpoint_and_draws_nothing(stepped: Stepped) -> None:
    import torch

    model = stepped.trainer.pipeline.model
    camera = stepped.trainer.pipeline.datamanager.eval_dataset.cameras[0:1]
    model.eval()
    states = (random.getstate(), torch.get_rng_state())
    first, second = (model.get_outputs_for_camera(camera)["feature_pca"] for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (64, 64, 3)
    assert first.min() >= 0 and first.max() <= 1
    assert states[0] == random.getstate() and torch.equal(states[1], torch.get_rng_state())
    assert model.state_dict()["feature_pca_axes"].shape == (52, 3)
    model.train()


def test_an_unavailable_lpips_is_nan_and_leaves_the_generator_alone() -> None:
    import torch
    import torchmetrics.image.lpip as module

    from f3rm_verify.f3rm.lpips import UnavailableMetric, degrade_lpips_offline

    def without_weights(*_: Any, **__: Any) -> None:
        torch.rand(1)
        raise OSError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LearnedPerceptualImagePatchSimilarity", without_weights)
        degrade_lpips_offline()
        state = torch.get_rng_state()
        metric = module.LearnedPerceptualImagePatchSimilarity(normalize=True)  # type: ignore[operator]
        assert isinstance(metric, UnavailableMetric)
        assert torch.isnan(metric(torch.zeros(1), torch.zeros(1)))
        assert "OSError" in metric.unavailable_because
        assert torch.equal(state, torch.get_rng_state())


def test_defaults_are_upstreams(stepped: Stepped) -> None:
    from f3rm_verify.f3rm.f3rm_config import f3rm_method

    config: Any = f3rm_method.config
    model, data = config.pipeline.model, config.pipeline.datamanager
    feature_field = {
        name: getattr(model, f"feat_{name}")
        for name in ("num_levels", "log2_hashmap_size", "start_res", "max_res", "features_per_level", "pe_n_freq")
    }
    assert feature_field == {
        "num_levels": 12,
        "log2_hashmap_size": 19,
        "start_res": 16,
        "max_res": 128,
        "features_per_level": 8,
        "pe_n_freq": 6,
    }
    assert (model.feat_hidden_dim, model.feat_num_layers, model.feat_loss_weight) == (64, 2, 1e-3)
    assert (config.max_num_iterations, data.train_num_rays_per_batch) == (30000, 4096)
    assert data.dataparser.train_split_fraction == 0.95
    assert {config.optimizers[name]["optimizer"].lr for name in ("proposal_networks", "fields", "feature_field")} == {
        1e-2
    }
    seeding = ("enable_comprehensive_seeding", "seed_deterministic_algorithms", "seed_cublas_workspace")
    assert [getattr(config, name) for name in (*seeding, "seed_warn_only", "print_seed_info")] == [True] * 3 + [
        False,
        True,
    ]


def test_the_frequency_encoding_is_sine_and_cosine_of_powers_of_two() -> None:
    import torch

    from f3rm_verify.f3rm.feature_field import FrequencyEncoding

    encoded = FrequencyEncoding(3)(torch.tensor([[0.25, 0.5, 1.0]]))
    assert encoded.shape == (1, 18)
    expected = [f(np.pi * 2**k * x) for x in (0.25, 0.5, 1.0) for k in range(3) for f in (np.sin, np.cos)]
    assert encoded[0].numpy() == pytest.approx(np.array(expected), abs=1e-5)


def test_any_trainer_can_be_wrapped_and_its_config_read_again(tmp_path: Path) -> None:
    import yaml
    from nerfstudio.engine.trainer import Trainer, TrainerConfig

    from f3rm_verify.f3rm import wrap as module

    wrapped = module.wrap_config(TrainerConfig(method_name="x", max_num_iterations=7))
    assert type(wrapped) is module.F3RMTrainerConfig
    assert (wrapped._target, wrapped.max_num_iterations) == (module.F3RMTrainer, 7)
    assert module.wrap_config(wrapped) is wrapped
    own = module.seeded_trainer(Trainer)
    assert issubclass(own, module.SeededTrainer) and issubclass(own, Trainer)
    assert getattr(module, own.__name__) is own
    loaded = yaml.load(yaml.dump(wrapped), Loader=yaml.Loader)
    assert type(loaded) is module.F3RMTrainerConfig
    assert loaded == wrapped
