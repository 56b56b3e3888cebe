"""The weights of a model: where they are, what they are, and that they are those that were asked for.

They come from a folder, or from the hub's cache on this machine; only where they are in neither is the hub asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f3rm_verify.errors import TrainingError

#: The names under which transformers saves weights, in the order in which it looks for them.
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
#: What to fetch from the hub: the same weights in one format only.
_FORMATS = ("model*.safetensors*", "pytorch_model*.bin*")
#: Commits of models on the hub, so that what is fetched there has not changed meanwhile.
_PINNED: Mapping[str, str] = {"openai/clip-vit-large-patch14-336": "ce19dc912ca5cd21c8a653c79e251e808ccabcd1"}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model computes the features, and how images come to it."""

    model: str
    """Name on the Hugging Face hub, or a folder that holds config.json and weights as transformers saves them."""
    revision: str | None = None
    """Commit, branch or tag on the hub; else the commit known for a default model, or the hub's main branch."""
    weights_digest: str | None = None
    """SHA-256 that the weights must have (as in the run's manifest); others are refused."""
    load_size: int | None = None
    """Pixels to which the shorter side of each image is resized; else the size that the model was trained with."""
    batch_size: int = 4
    """Images at a time; more need more memory."""
    half: bool = False
    """Compute in half precision; on CUDA only."""


@dataclass(frozen=True)
class Weights:
    """A folder with a model: `digest` is the SHA-256 of its weights, `architecture` that of its config.json.

    `file` is what transformers is to load: the weights, or the index of their parts. `commit` is that of the hub.
    """

    folder: Path
    file: Path
    digest: str
    architecture: str
    model_type: str
    commit: str | None


def find_weights(options: ModelOptions, *, option: str, model_types: tuple[str, ...]) -> Weights:
    """The weights that `options` name, which came as ns-train's `option`.

    Raises TrainingError where they are nowhere, are broken, are another kind of model, or have another digest.
    """
    folder, commit = _locate(options, option)
    file = _weights_in(folder)
    config = folder / "config.json"
    if file is None or not config.is_file():
        lacking = "config.json" if file else f"weights ({_NAMES[0]} or {_NAMES[2]})"
        raise TrainingError(f"{folder} holds no {lacking}; give {option}.model a folder as transformers saves a model.")
    model_type = str(_read_object(config).get("model_type"))
    if model_type not in model_types:
        raise TrainingError(
            f"{config} describes a model of type {model_type:.40}, and {option}.model must be one of "
            f"{', '.join(model_types)}; give another."
        )
    digest = _digest(file)
    if options.weights_digest not in (None, digest):
        raise TrainingError(
            f"The weights {file} have the digest {digest}, not the {options.weights_digest} that was asked for; get "
            f"those, or give {option}.weights-digest theirs."
        )
    return Weights(folder, file, digest, _sha256(config), model_type, commit)


def _locate(options: ModelOptions, option: str) -> tuple[Path, str | None]:
    """The folder of a model, and its commit where it is the hub's."""
    folder = Path(options.model).expanduser()
    if folder.is_dir():
        return folder.resolve(), None
    if folder.is_absolute() or options.model.startswith(("~", ".")) or options.model.count("/") > 1:
        raise TrainingError(f"There is no folder {options.model}; give {option}.model one, or a name on the hub.")
    from huggingface_hub import constants, snapshot_download

    revision = options.revision or _PINNED.get(options.model)
    why = "nothing was found"
    for pattern, local in (("*", True), *((pattern, False) for pattern in _FORMATS)):
        wanted = ["config.json", pattern]
        try:
            found = snapshot_download(options.model, revision=revision, allow_patterns=wanted, local_files_only=local)
        except Exception as error:  # whatever stops a download: the network, the hub, its client, the disk
            why = type(error).__name__
            if local:
                continue
            break
        if _weights_in(Path(found)) is not None:
            return Path(found), Path(found).name
    pin = f" --revision {revision}" if revision else ""
    raise TrainingError(
        f"The model {options.model}{f' ({revision})' if revision else ''} is not in the hub's cache "
        f"{constants.HF_HUB_CACHE}, and cannot be fetched ({why}); fetch it where there is a network (hf download "
        f"{options.model}{pin}) and copy the cache, or give {option}.model a folder that holds it."
    )


def _weights_in(folder: Path) -> Path | None:
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)


def _digest(file: Path) -> str:
    """The SHA-256 of a file with weights; where they are in parts, that of the parts' names and digests."""
    if file.suffix != ".json":
        return _sha256(file)
    parts = _read_object(file).get("weight_map")
    names = sorted({str(name) for name in parts.values()}) if isinstance(parts, dict) else []
    lines = [f"{name} {_sha256(file.parent / Path(name).name)}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    state = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                state.update(block)
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror or error}); get the model again.") from error
    return state.hexdigest()


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(f"{path} cannot be read as JSON ({type(error).__name__}); get the model again.") from error
    if not isinstance(data, dict):
        raise TrainingError(f"{path} holds no JSON object; get the model again.")
    return data
