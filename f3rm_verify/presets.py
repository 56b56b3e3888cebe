"""Sizes of a training, as arguments for ns-train."""

from __future__ import annotations

#: F3RM small enough for two cores: the built-in scene in minutes. Every call of a hash grid still looks up more than
#: 100,000 values (rays x samples x levels x features), because torch's backward of a table lookup on a CPU is serial,
#: and so deterministic, for small calls: a smaller preset would hide what this tool looks for.
SMALL: tuple[str, ...] = (
    *("--pipeline.datamanager.train-num-rays-per-batch", "384"),
    *("--pipeline.datamanager.eval-num-rays-per-batch", "384"),
    *("--pipeline.model.proposal-initial-sampler", "uniform"),
    *("--pipeline.model.num-proposal-iterations", "1"),
    *("--pipeline.model.num-proposal-samples-per-ray", "32"),
    *("--pipeline.model.num-nerf-samples-per-ray", "20"),
    *("--pipeline.model.proposal-net-args-list.0.log2-hashmap-size", "13"),
    *("--pipeline.model.num-levels", "8"),
    *("--pipeline.model.max-res", "256"),
    *("--pipeline.model.log2-hashmap-size", "15"),
    # As nerfstudio's own nerfacto. With the class default, 1, fog before the training cameras hides held-out views.
    *("--pipeline.model.average-init-density", "0.01"),
    *("--pipeline.model.near-plane", "0.3"),
    *("--pipeline.model.far-plane", "3"),
    *("--pipeline.model.camera-optimizer.mode", "off"),
    *("--pipeline.model.feat-num-levels", "4"),
    *("--pipeline.model.feat-max-res", "64"),
    *("--pipeline.model.feat-log2-hashmap-size", "13"),
    *("--pipeline.model.feat-features-per-level", "4"),
)
