"""Results of every kind that a report must show well, built by hand: what each reporter is tested with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from f3rm_verify.difference import Difference, FirstDivergence, Outcome, Result, Verdict

HOSTILE = "evil\x1b]0;owned\x07\x1b[2J\u202e[bold red]x[/]:fire:\nREPRODUCIBLE\udcff"


def leaf(
    artefact: str, name: str, verdict: Verdict = Verdict.IDENTICAL, summary: str = "", **measures: Any
) -> Difference:
    return Difference(name=name, artefact=artefact, verdict=verdict, summary=summary, measures=measures)


def group(artefact: str, *children: Difference, name: str = "", summary: str = "") -> Difference:
    return Difference.group(name=name or artefact, artefact=artefact, children=children, summary=summary)


def ignored_tags() -> tuple[Difference, ...]:
    return (
        leaf("curves", "Train Iter (time)", Verdict.IGNORED, "a duration"),
        leaf("curves", "Train Total (time)", Verdict.IGNORED, "a duration"),
        leaf("curves", "ETA (time)", Verdict.IGNORED, "a duration"),
        leaf("curves", "GPU Memory (MB)", Verdict.IGNORED, "memory use"),
    )


def good_artefacts() -> list[Difference]:
    return [
        group(
            "setup", *(leaf("setup", name) for name in ("seed", "data", "packages")), summary="41 settings identical"
        ),
        group("seeding", leaf("seeding", "PYTHONHASHSEED"), summary="11 claims identical"),
        group("curves", leaf("curves", "Train Loss"), *ignored_tags(), summary="17 tags identical in 1000 steps"),
        group("metrics", leaf("metrics", "psnr"), summary="4 images identical"),
        group(
            "checkpoints",
            group("checkpoints", leaf("checkpoints", "pipeline._model.field"), name="step-000000999"),
            summary="74 tensors identical in step-000000999",
        ),
        group("renders", leaf("renders", "eval_0.rgb"), summary="12 images identical"),
    ]


def claims(**verdicts: str) -> list[dict[str, Any]]:
    return [
        {"claim": name, "asked": 42, "set": 42, "observed": 42, "verdict": verdict, "remedy": None}
        for name, verdict in verdicts.items()
    ]


def run_of(side: str, **changes: Any) -> dict[str, Any]:
    return {
        "directory": f"outputs/{side}/fox/f3rm/run",
        "method": "f3rm",
        "seed": 42,
        "steps": 1000,
        "completed": True,
        "threads": 2,
        "device": "cpu",
        **changes,
    }


def reproducible() -> Result:
    log = claims(python="holds", numpy="holds", torch="holds", cuda="not applicable")
    return Result(
        tool={"name": "f3rm-verify", "version": "0.1.0"},
        outcome=Outcome.REPRODUCIBLE,
        reasons=(),
        reference=run_of("reference"),
        candidate=run_of("candidate"),
        pairs=1,
        steps=1000,
        not_recorded=("trace",),
        control={"seed": 43, "verdict": "different", "summary": "74 of 74 tensors different"},
        seeding={"reference": log, "candidate": log},
        root=group("run", *good_artefacts()),
    )


def bad_tensors(count: int) -> list[Difference]:
    return [
        leaf(
            "checkpoints",
            f"_model.field.mlp_base.encoder.levels.{number}.hash_table",
            Verdict.DIFFERENT,
            f"{number + 1} of 8,192 values differ, largest {1e-5 * (number + 1):.3g} at [17, 1] ({number + 411} ulp)",
            n=8192,
            n_different=number + 1,
            max_rel=0.01 * (number + 1),
        )
        for number in range(count)
    ]


def diverged() -> Result:
    failing = [
        *claims(python="holds", numpy="holds", cuda="not applicable"),
        {
            "claim": "PYTHONHASHSEED",
            "asked": "42",
            "set": "42",
            "observed": "another hash seed: setting it inside a running process has no effect on that process",
            "verdict": "fails",
            "remedy": "Start with PYTHONHASHSEED=42 in the environment, or through f3rm-verify run.",
        },
        {
            "claim": "deterministic algorithms",
            "asked": "on",
            "set": "off",
            "observed": False,
            "verdict": "fails",
            "remedy": "",
        },
    ]
    tensors = group("checkpoints", *bad_tensors(26), leaf("checkpoints", "_model.bias"), name="pipeline")
    artefacts = good_artefacts()
    artefacts[2] = group(
        "curves",
        leaf(
            "curves", "Train Loss Dict/feature_loss", Verdict.DIFFERENT, "first at step 3", max_rel=2e-7, first_step=3
        ),
        leaf("curves", "Train Loss", Verdict.DIFFERENT, "first at step 3", max_rel=1e-7),
        leaf("curves", "learning_rate/fields"),
        *ignored_tags(),
        summary="2 of 17 tags different, first at step 3",
    )
    artefacts[4] = group(
        "checkpoints",
        group("checkpoints", tensors, leaf("checkpoints", "step"), name="step-000000999"),
        summary="26 of 74 tensors different",
    )
    artefacts[5] = group(
        "renders",
        leaf("renders", "eval_0.rgb", Verdict.UNREADABLE, "not a PNG file: 0 bytes"),
        leaf("renders", "eval_1.rgb", Verdict.MISSING, "only the reference has it"),
        summary="1 of 12 images unreadable, 1 missing",
    )
    return dataclasses.replace(
        reproducible(),
        outcome=Outcome.DIVERGED,
        reasons=("2 of 17 tags and 26 of 74 tensors are different.",),
        not_recorded=("trace",),
        first_divergence=FirstDivergence(
            step=3,
            last_equal_step=2,
            stage="loss",
            subject="Train Loss Dict/feature_loss",
            operator="aten::index_put_",
            cause="index_put_(accumulate=True) adds floats in the order in which two threads reach them, so the sums "
            "differ in their last bits",
            remedy="call torch.use_deterministic_algorithms(True) before training",
            evidence=("reference: 0x1.8d2f3ap-4", "candidate: 0x1.8d2f38p-4 (1 ulp away)"),
            reproduce="f3rm-verify explain outputs/reference/fox/f3rm/run outputs/candidate/fox/f3rm/run --step 3",
        ),
        control=None,
        seeding={"reference": failing, "candidate": failing},
        root=group("run", *artefacts),
    )


def inconclusive() -> Result:
    artefacts = good_artefacts()
    artefacts[4] = leaf("checkpoints", "checkpoints", Verdict.MISSING, "the candidate has no checkpoint")
    return dataclasses.replace(
        reproducible(),
        outcome=Outcome.INCONCLUSIVE,
        reasons=("The candidate did not complete: 412 of 1000 steps.", "The candidate has no checkpoint."),
        candidate=run_of("candidate", seed=43, steps=412, completed=False),
        control={"seed": 43, "verdict": "identical", "summary": "nothing differs"},
        seeding={"reference": claims(python="holds"), "candidate": claims(python="fails")},
        root=group("run", *artefacts),
    )


def several_pairs() -> Result:
    bad = diverged()
    return dataclasses.replace(
        bad,
        pairs=3,
        candidates=tuple(run_of(f"candidate-{number}") for number in (1, 2, 3)),
        not_recorded=(),
        root=group(
            "run",
            group("run", *good_artefacts(), name="candidate-1"),
            group("run", *bad.root.children, name="candidate-2"),
            group("run", *good_artefacts(), name="candidate-3"),
        ),
    )


def hostile() -> Result:
    tensor = leaf("checkpoints", HOSTILE * 3, Verdict.DIFFERENT, HOSTILE, max_rel="nan")
    return dataclasses.replace(
        diverged(),
        reasons=(HOSTILE,),
        reference=run_of("reference", directory=HOSTILE, method=HOSTILE, device=[HOSTILE], threads={"a": 1}),
        not_recorded=(HOSTILE,),
        first_divergence=FirstDivergence(
            subject=HOSTILE, stage=HOSTILE, operator=HOSTILE, evidence=(HOSTILE,) * 12, reproduce=HOSTILE, cause=HOSTILE
        ),
        control={"seed": HOSTILE, "verdict": HOSTILE, "summary": HOSTILE},
        seeding={
            HOSTILE: [{"claim": HOSTILE, "asked": {HOSTILE: 1}, "verdict": HOSTILE}, HOSTILE],
            "candidate": {"entries": claims(python="holds"), "lines": [HOSTILE]},
            "other": 5,
        },
        root=group(
            "run",
            group("checkpoints", tensor, leaf("checkpoints", HOSTILE, Verdict.IGNORED, HOSTILE), name=HOSTILE),
        ),
    )


RESULTS: dict[str, Callable[[], Result]] = {
    "reproducible": reproducible,
    "diverged": diverged,
    "inconclusive": inconclusive,
    "several_pairs": several_pairs,
    "hostile": hostile,
}
