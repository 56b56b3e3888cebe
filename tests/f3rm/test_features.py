"""Features of a tiny CLIP and DINO: against a computation of their own, undisturbed and undisturbing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_models

from f3rm_verify.errors import TrainingError
from f3rm_verify.scene import write_scene

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]

Array = npt.NDArray[np.float64]
KINDS = ("CLIP", "DINO", "DINOV2")
#: Images that no model's square fits: 60 x 40 pixels.
WIDTH, HEIGHT = 60, 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "CLIP": tiny_models.save_clip(folder / "clip"),
        "DINO": tiny_models.save_dino(folder / "dino"),
        "DINOV2": tiny_models.save_dinov2(folder / "dinov2"),
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(3).integers(0, 256, (5, HEIGHT, WIDTH, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


def extractor(kind: str, models: Mapping[str, Path], **options: Any) -> Any:
    from f3rm_verify.f3rm.features.clip import ClipExtractor, ClipOptions
    from f3rm_verify.f3rm.features.daisy import DaisyExtractor
    from f3rm_verify.f3rm.features.dino import DinoExtractor, DinoOptions

    if kind == "DAISY":
        return DaisyExtractor(**options)
    options = {"model": str(models[kind]), "batch_size": 2, **options} if kind in models else options
    if kind == "CLIP":
        return ClipExtractor(ClipOptions(**options), "cpu")
    sizes = {"DINO": (40, 4), "DINOV2": (56, 7)}
    load_size, stride = sizes[kind]
    return DinoExtractor(DinoOptions(**{"load_size": load_size, "stride": stride, **options}), "cpu")


def extract(one: Any, images: list[Path]) -> npt.NDArray[np.float32]:
    from f3rm_verify.f3rm.features import load_or_extract

    map_ = load_or_extract("X", one, images, images[0].parent, use_cache=False, tell=lambda *_: None)
    assert map_.source == "extracted"
    return map_.values


# ---- A vision transformer written down in NumPy and float64, from the saved tensors alone.


def linear(state: Mapping[str, Array], name: str, x: Array) -> Array:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", np.zeros(1))


def norm(state: Mapping[str, Array], name: str, x: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def heads(x: Array, count: int) -> Array:
    return x.reshape(len(x), count, -1).transpose(1, 0, 2)


def attend(query: Array, key: Array, value: Array, count: int) -> Array:
    scores = heads(query, count) @ heads(key, count).transpose(0, 2, 1) / np.sqrt(query.shape[-1] / count)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True)) @ heads(value, count)
    return mixed.transpose(1, 0, 2).reshape(len(query), -1)


def gelu(x: Array) -> Array:
    from scipy.special import erf

    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def patches(pixels: Array, weight: Array, stride: int) -> tuple[Array, int, int]:
    """Each patch's product with the kernel, row by row."""
    size = weight.shape[-1]
    rows, columns = (1 + (length - size) // stride for length in pixels.shape[-2:])
    cut = [
        pixels[:, y * stride : y * stride + size, x * stride : x * stride + size].ravel()
        for y in range(rows)
        for x in range(columns)
    ]
    return np.stack(cut) @ weight.reshape(len(weight), -1).T, rows, columns


def cubic(distance: Array, a: float = -0.75) -> Array:
    d = np.abs(distance)
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def stretching(old: int, new: int) -> Array:
    """The matrix (new, old) of a bicubic interpolation by (new + 0.1) / old; the border is repeated."""
    matrix = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / (new + 0.1) - 0.5
        first = int(np.floor(place))
        for j in range(first - 1, first + 3):
            matrix[i, min(max(j, 0), old - 1)] += cubic(np.array(place - j))
    return matrix


def stretched(table: Array, rows: int, columns: int) -> Array:
    side = int(np.sqrt(len(table) - 1))
    learned = table[1:].reshape(side, side, -1)
    new = np.einsum("ri,cj,ijk->rck", stretching(side, rows), stretching(side, columns), learned)
    return np.concatenate([table[:1], new.reshape(rows * columns, -1)])


def pixels_of(path: Path, size: int, resample: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    from PIL import Image

    wanted = (int(size * WIDTH / HEIGHT), size)
    values = np.asarray(Image.open(path).resize(wanted, resample), dtype=np.float64) / 255
    return ((values - mean) / std).transpose(2, 0, 1)


def clip_by_hand(state: Mapping[str, Array], path: Path) -> Array:
    from PIL import Image

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = pixels_of(path, 32, Image.Resampling.BICUBIC, mean, std)
    v, eps = "vision_model.", 1e-5
    x, rows, columns = patches(pixels, state[f"{v}embeddings.patch_embedding.weight"], 8)
    x = np.concatenate([state[f"{v}embeddings.class_embedding"][None], x])
    x = norm(
        state, f"{v}pre_layrnorm", x + stretched(state[f"{v}embeddings.position_embedding.weight"], rows, columns), eps
    )
    for index in range(3):
        block = f"{v}encoder.layers.{index}."
        inside = norm(state, f"{block}layer_norm1", x, eps)
        query, key, value = (linear(state, f"{block}self_attn.{name}_proj", inside) for name in "qkv")
        if index == 2:  # the last block: no attention, no residual, no MLP
            x = linear(state, f"{block}self_attn.out_proj", value)
            break
        x = x + linear(state, f"{block}self_attn.out_proj", attend(query, key, value, 2))
        inside = linear(state, f"{block}mlp.fc1", norm(state, f"{block}layer_norm2", x, eps))
        x = x + linear(state, f"{block}mlp.fc2", inside / (1 + np.exp(-1.702 * inside)))
    x = linear(state, "visual_projection", norm(state, f"{v}post_layernorm", x[1:], eps))
    return x.reshape(rows, columns, -1)


def dino_by_hand(state: Mapping[str, Array], path: Path, *, v2: bool, facet: str, layer: int) -> Array:
    from PIL import Image

    size, stride, eps = (56, 7, 1e-6) if v2 else (40, 4, 1e-12)
    pixels = pixels_of(path, size, Image.Resampling.LANCZOS, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x, rows, columns = patches(pixels, state["embeddings.patch_embeddings.projection.weight"], stride)
    x = np.concatenate([state["embeddings.cls_token"][0], x + state["embeddings.patch_embeddings.projection.bias"]])
    x = x + stretched(state["embeddings.position_embeddings"][0], rows, columns)
    for index in range(layer + 1):
        block = f"encoder.layer.{index}."
        first, second = ("norm1", "norm2") if v2 else ("layernorm_before", "layernorm_after")
        inside = norm(state, f"{block}{first}", x, eps)
        parts = {
            name: linear(state, f"{block}attention.attention.{name}", inside) for name in ("query", "key", "value")
        }
        if index == layer and facet != "token":
            x = parts[facet].reshape(len(x), 2, -1).transpose(0, 2, 1).reshape(len(x), -1)
            break
        mixed = linear(state, f"{block}attention.output.dense", attend(*parts.values(), 2))
        x = x + mixed * (state[f"{block}layer_scale1.lambda1"] if v2 else 1)
        inside = norm(state, f"{block}{second}", x, eps)
        up, down = ("mlp.fc1", "mlp.fc2") if v2 else ("intermediate.dense", "output.dense")
        inside = linear(state, f"{block}{down}", gelu(linear(state, f"{block}{up}", inside)))
        x = x + inside * (state[f"{block}layer_scale2.lambda1"] if v2 else 1)
    return x[1:].reshape(rows, columns, -1)


def saved(models: Mapping[str, Path], kind: str) -> dict[str, Array]:
    return {name: value.double().numpy() for name, value in tiny_models.state_of(models[kind]).items()}


class TestAgainstAComputationOfItsOwn:
    def test_clip(self, models: dict[str, Path], images: list[Path]) -> None:
        found = extract(extractor("CLIP", models), images)
        expected = np.stack([clip_by_hand(saved(models, "CLIP"), path) for path in images])
        assert found.shape == expected.shape == (5, 4, 6, 12)
        assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()

    @pytest.mark.parametrize(
        ("kind", "facet", "layer"),
        [
            ("DINO", "key", -1),
            ("DINO", "query", 1),
            ("DINO", "value", 0),
            ("DINO", "token", 2),
            ("DINOV2", "key", 2),
            ("DINOV2", "token", -2),
        ],
    )
    def test_dino(self, models: dict[str, Path], images: list[Path], kind: str, facet: str, layer: int) -> None:
        found = extract(extractor(kind, models, facet=facet, layer=layer), images)
        state = saved(models, kind)
        by_hand = [dino_by_hand(state, path, v2=kind == "DINOV2", facet=facet, layer=layer % 3) for path in images]
        assert found.shape == (5, *by_hand[0].shape)
        assert found.shape[1:3] == ((9, 14) if kind == "DINO" else (7, 11))
        assert np.abs(found - np.stack(by_hand)).max() < 3e-6 * np.abs(by_hand).max()

    def test_a_square_image_of_the_models_size_takes_the_positions_as_learned(self) -> None:
        import torch

        from f3rm_verify.f3rm.features.transformer import stretch_positions

        table = torch.randn(17, 6)
        assert torch.equal(stretch_positions(table, torch.zeros(1, 3, 32, 32), 4, 4)[0], table)
        assert not torch.equal(stretch_positions(table, torch.zeros(1, 3, 32, 39), 4, 4)[0], table)


def states() -> list[Any]:
    import torch

    return [random.getstate(), [str(part) for part in np.random.get_state()], torch.get_rng_state().tolist()]


class TestTheTrainingIsNotDisturbed:
    @pytest.mark.parametrize("kind", ["DAISY", *KINDS])
    def test_generators_are_as_before(self, models: dict[str, Path], images: list[Path], kind: str) -> None:
        before = states()
        extract(extractor(kind, models), images)
        assert states() == before

    def test_also_where_the_extraction_draws_or_fails(self, images: list[Path]) -> None:
        """The control: an extractor that draws from all of them, and then breaks."""
        import torch

        class Draws:
            identity: Mapping[str, Any] = {}
            origin: Mapping[str, Any] = {}

            def batches(self, images: list[Path]) -> Iterator[npt.NDArray[np.float32]]:
                random.random(), np.random.rand(), torch.rand(1)
                assert states() != before
                yield np.zeros((1, 1, 1, 1), np.float32)
                raise TrainingError("broken")

        before = states()
        with pytest.raises(TrainingError, match="broken"):
            extract(Draws(), images)
        assert states() == before

    def test_flags_are_as_before(self, models: dict[str, Path], images: list[Path]) -> None:
        import torch

        cudnn = torch.backends.cudnn
        before = cudnn.benchmark, cudnn.deterministic, torch.get_float32_matmul_precision(), torch.is_grad_enabled()
        extract(extractor("DINO", models), images)
        after = cudnn.benchmark, cudnn.deterministic, torch.get_float32_matmul_precision(), torch.is_grad_enabled()
        assert after == before


class TestTheTrainingDoesNotDisturb:
    @pytest.mark.parametrize("kind", ["DAISY", *KINDS])
    def test_two_extractions_are_bit_identical(self, models: dict[str, Path], images: list[Path], kind: str) -> None:
        first, second = (extract(extractor(kind, models), images) for _ in range(2))
        assert first.tobytes() == second.tobytes()

    @pytest.mark.parametrize("kind", KINDS)
    def test_whatever_its_seed_and_flags(self, models: dict[str, Path], images: list[Path], kind: str) -> None:
        import torch

        first = extract(extractor(kind, models), images)
        precision = torch.get_float32_matmul_precision()
        torch.manual_seed(99)
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.benchmark = True
        try:
            second = extract(extractor(kind, models), images)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.benchmark = False
        assert first.tobytes() == second.tobytes()

    def test_one_channel_of_one_pixel_is_seen(
        self, models: dict[str, Path], images: list[Path], tmp_path: Path
    ) -> None:
        """The control: features do depend on the image."""
        from PIL import Image

        with Image.open(images[2]) as image:
            pixels = np.array(image)
        pixels[7, 9, 1] ^= 64
        Image.fromarray(pixels).save(tmp_path / "changed.png")
        for kind in KINDS:
            first, second = (extract(extractor(kind, models), [path]) for path in (images[2], tmp_path / "changed.png"))
            assert first.tobytes() != second.tobytes()

    def test_it_tells_how_far_it_is(self, models: dict[str, Path], images: list[Path]) -> None:
        from f3rm_verify.f3rm.features import load_or_extract

        told: list[tuple[str, int, int]] = []
        load_or_extract(
            "CLIP",
            extractor("CLIP", models),
            images,
            images[0].parent,
            use_cache=False,
            tell=lambda *at: told.append(at),
        )
        assert told == [("extracting", 2, 5), ("extracting", 4, 5), ("extracting", 5, 5)]


def lacking(folder: Path, name: str) -> None:
    """Saves the weights again without one tensor."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


class TestRefusedModels:
    """Each mistake ends in one sentence that names the place and what to do."""

    @pytest.fixture
    def copy(self, models: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
        import shutil

        return {kind: Path(shutil.copytree(folder, tmp_path / kind)) for kind, folder in models.items()}

    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            ("CLIP", {"half": True}, r"--pipeline\.datamanager\.clip\.half True needs CUDA"),
            ("CLIP", {"batch_size": 0}, r"clip\.batch-size must be 1 or more"),
            ("CLIP", {"load_size": 5}, r"clip\.load-size 5 is less than one patch, 8 pixels; give more"),
            ("DINO", {"stride": 3}, r"dino\.stride 3 does not divide 8, a patch; give one of 1, 2, 4, 8\."),
            ("DINOV2", {"stride": 4}, r"dino\.stride 4 does not divide 14, a patch; give one of 1, 2, 7, 14\."),
            ("DINO", {"layer": 3}, r"dino\.layer 3 is not there: the model has 3 blocks, 0 to 2"),
            ("DINO", {"layer": -4}, r"dino\.layer -4 is not there"),
        ],
    )
    def test_options(
        self, models: dict[str, Path], images: list[Path], kind: str, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(TrainingError, match=message):
            extract(extractor(kind, models, **options), images)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda folder: (folder / "config.json").unlink(), r"holds no config\.json; give .*dino\.model a folder"),
            (
                lambda folder: (folder / "model.safetensors").unlink(),
                r"holds no weights \(model\.safetensors or pytorch",
            ),
            (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read as JSON .*; get"),
            (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json holds no JSON object; get"),
            (
                lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
                r"describes a model of type bert, and --pipeline\.datamanager\.dino\.model must be one of vit, dinov2",
            ),
            (
                lambda folder: (folder / "model.safetensors").write_bytes(b"not weights"),
                r"model\.safetensors cannot be loaded \(.*\); get the model again",
            ),
            (
                lambda folder: lacking(folder, "encoder.layer.1.attention.attention.query.weight"),
                r"model\.safetensors lack 1 tensors \(layers\.1\.attention\.q_proj\.weight, \.\.\.\); get the whole",
            ),
        ],
    )
    def test_folders(
        self, copy: dict[str, Path], images: list[Path], damage: Callable[[Path], Any], message: str
    ) -> None:
        damage(copy["DINO"])
        with pytest.raises(TrainingError, match=message):
            one = extractor("DINO", copy)
            assert one.identity
            extract(one, images)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(
            TrainingError, match=r"There is no folder .*nowhere; give --pipeline\.datamanager\.clip\.model"
        ):
            assert extractor("CLIP", {"CLIP": tmp_path / "nowhere"}).identity

    def test_a_name_that_is_not_in_the_cache_of_an_offline_machine(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        name, commit = "openai/clip-vit-large-patch14-336", "ce19dc912ca5cd21c8a653c79e251e808ccabcd1"
        wanted = (
            rf"^The model {name} \({commit}\) is not in the hub's cache .*hub, and cannot be fetched \(.*\); fetch it "
            rf"where there is a network \(hf download {name} --revision {commit}\) and copy the cache, or give "
            r"--pipeline\.datamanager\.clip\.model a folder that holds it\.$"
        )
        with pytest.raises(TrainingError, match=wanted):
            assert extractor("CLIP", {}).identity

    def test_a_name_that_is_in_the_cache(
        self, models: dict[str, Path], images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import shutil

        from huggingface_hub import constants

        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / "hub" / "models--someone--tiny"
        shutil.copytree(models["CLIP"], repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        named, local = extractor("CLIP", models, model="someone/tiny"), extractor("CLIP", models)
        assert named.origin == {"model": "someone/tiny", "commit": commit}
        assert named.identity == local.identity
        assert extract(named, images).tobytes() == extract(local, images).tobytes()

    def test_other_weights_than_those_that_were_asked_for(self, models: dict[str, Path], copy: dict[str, Path]) -> None:
        import hashlib

        digest = hashlib.sha256((models["CLIP"] / "model.safetensors").read_bytes()).hexdigest()
        asked = extractor("CLIP", copy, weights_digest=digest)
        assert asked.identity["weights"]["digest"] == digest
        content = bytearray((copy["CLIP"] / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (copy["CLIP"] / "model.safetensors").write_bytes(content)
        with pytest.raises(
            TrainingError, match=rf"model\.safetensors have the digest \w+, not the {digest} that was asked"
        ):
            assert replace(asked).identity

    def test_weights_in_parts_have_one_digest_and_each_part_counts(
        self, copy: dict[str, Path], images: list[Path]
    ) -> None:
        from transformers import ViTModel

        whole = extract(extractor("DINO", copy), images)
        model = ViTModel.from_pretrained(copy["DINO"])
        (copy["DINO"] / "model.safetensors").unlink()
        model.save_pretrained(copy["DINO"], max_shard_size="10KB")
        parts = sorted(copy["DINO"].glob("model-*.safetensors"))
        assert len(parts) > 1
        in_parts = extractor("DINO", copy)
        assert extract(in_parts, images).tobytes() == whole.tobytes()
        content = bytearray(parts[-1].read_bytes())
        content[-1] ^= 1
        parts[-1].write_bytes(content)
        assert replace(in_parts).weights.digest != in_parts.weights.digest
        parts[-1].unlink()
        with pytest.raises(TrainingError, match=r"model-.*safetensors cannot be read .*; get the model again"):
            assert replace(in_parts).weights


def test_the_scene_has_features_of_every_kind(models: dict[str, Path], tmp_path: Path) -> None:
    scene = sorted((write_scene(tmp_path / "scene") / "images").iterdir())[:2]
    shapes = {kind: extract(extractor(kind, models), scene).shape for kind in ("DAISY", *KINDS)}
    assert shapes == {
        "DAISY": (2, 32, 32, 52),
        "CLIP": (2, 4, 4, 12),
        "DINO": (2, 9, 9, 16),
        "DINOV2": (2, 7, 7, 16),
    }
