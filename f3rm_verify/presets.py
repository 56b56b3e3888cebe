"""Sizes of a training, as arguments for ns-train."""

from __future__ import annotations

#: F3RM small enough for two cores: the built-in scene in minutes. Every call of a hash grid still looks up more than
#: 100,000 values (rays x samples x levels x features), because torch's backward of a table lookup on a CPU is serial,
#: and so deterministic, for small calls: a smaller preset would hide what this tool looks for.
SMALL: tuple[str, ...] = (
    *("--pipeline.datamanager.train-num-rays-per-batch", "512"),
    *("--pipeline.datamanager.eval-num-rays-per-batch", "512"),
    *("--pipeline.model.proposal-initial-sampler", "uniform"),
    *("--pipeline.model.num-proposal-iterations", "1"),
    *("--pipeline.model.num-proposal-samples-per-ray", "48"),
    *("--pipeline.model.num-nerf-samples-per-ray", "24"),
    *("--pipeline.model.proposal-net-args-list.0.log2-hashmap-size", "13"),
    *("--pipeline.model.num-levels", "8"),
    *("--pipeline.model.max-res", "256"),
    *("--pipeline.model.log2-hashmap-size", "15"),
    *("--pipeline.model.near-plane", "0.2"),
    *("--pipeline.model.far-plane", "6"),
    *("--pipeline.model.camera-optimizer.mode", "off"),
    *("--pipeline.model.feat-num-levels", "6"),
    *("--pipeline.model.feat-max-res", "64"),
    *("--pipeline.model.feat-log2-hashmap-size", "13"),
    *("--pipeline.model.feat-features-per-level", "4"),
)
