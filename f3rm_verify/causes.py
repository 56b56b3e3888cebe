"""From evidence to cause and remedy: a table of rules, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from f3rm_verify import cause_evidence as find
from f3rm_verify.cause_evidence import Evidence


class Strength(IntEnum):
    """How firmly the evidence of a rule points at its cause; the strongest wins, the first of equals."""

    POSSIBLE = 1
    LIKELY = 2
    RECORDED = 3
    """A recorded difference between the two sides that reaches the stage which broke."""
    SHOWN = 4
    """Seen when the step was executed again."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row of the table. `find` gives the evidence in words; None where it does not suffice."""

    name: str
    needs: str
    reason: str
    remedy: str
    strength: Strength
    find: Callable[[Evidence], str | None]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """`rule` is the name of the rule that fired, "unknown" where none did; `others` what the evidence also allows."""

    rule: str
    cause: str
    remedy: str
    others: tuple[str, ...] = ()


def diagnose(evidence: Evidence) -> Diagnosis:
    """The cause that the evidence points at most firmly; "unknown", with what can be ruled out, where it does not."""
    found = [(rule, words) for rule in RULES if (words := rule.find(evidence)) is not None]
    if not found:
        return _unknown(evidence)
    found.sort(key=lambda pair: -pair[0].strength)  # stable: the first of equals stays first
    (rule, words), *rest = found
    return Diagnosis(
        rule=rule.name,
        cause=f"{'' if rule.strength >= Strength.RECORDED else 'likely '}{rule.name}: {words}. {rule.reason}",
        remedy=rule.remedy,
        others=tuple(_news(words, rest)),
    )


def _news(told: str, rest: Sequence[tuple[Rule, str]]) -> Iterator[str]:
    """What the other rules found, where that was not told before."""
    known = set(told.split("; "))
    for rule, words in rest:
        if not set(words.split("; ")) <= known:
            yield f"{rule.name}: {words}"
        known.update(words.split("; "))


#: What is left where no rule fires, by the first stage that differs.
_LEFT: Mapping[str, str] = {
    "init": "the model or its optimizers were built with other values",
    "batch": "every generator had the same state, so what makes the batch has a state or data that are not recorded",
    "forward": "generators, batch and parameters are equal, so it is in what the model computes from them",
    "loss": "batch and outputs are equal, so it is in how the losses are computed from them",
    "grad": "the losses are equal, so it is in the backward pass or in what changes gradients after it",
    "params": "the gradients are equal, so it is in the optimizer's step, or something else wrote into the model",
    "schedule": "everything before it is equal, so it is in the schedulers or in the gradient scaler",
    "eval": "the training before it is equal, so it is in the evaluation",
}


def _unknown(evidence: Evidence) -> Diagnosis:
    left = _LEFT.get(evidence.stage or "") if evidence.traced else None
    loose = find.off(evidence) and (evidence.device != "cpu" or (evidence.threads or 2) > 1)
    where = f"unknown; {left}" if left else "unknown"
    if evidence.repeats is True:
        return Diagnosis(
            rule="unknown",
            cause=f"{where}; one process that repeats the step gets one result, so it is something that a process "
            "inherits or finds: its environment, the order of a set, files, caches, workers, a clock",
            remedy="Start both with one environment and one PYTHONHASHSEED; look for code that goes through a set, "
            "lists a directory, or reads a clock, the environment or the process id.",
        )
    if loose:
        return Diagnosis(
            rule="unknown",
            cause=f"{where}; torch's deterministic algorithms were off, so operations that add floats in the order in "
            "which threads arrive were allowed",
            remedy=_SEEDED,
        )
    remedy = "Look at the evidence below, and at the seeding log."
    return Diagnosis(rule="unknown", cause=where, remedy=remedy)


_SEEDED = "Train with --enable-comprehensive-seeding True and --seed-deterministic-algorithms True."
_SAME = "Give both runs the same setup, then compare again."
_COMPUTED = find.ARITHMETIC | {"init", "eval"}

#: The table, in the order in which equally strong rules are believed: what comes first in a training stands first.
RULES: tuple[Rule, ...] = (
    Rule(
        name="uninitialised memory",
        needs="executing the step again shows an operator that hands out fresh memory giving different values",
        reason="Such an operator writes nothing: its values are what lay there before.",
        remedy="Write into the tensor before it is read, or make it with torch.zeros; train with "
        "--seed-deterministic-algorithms True, which has torch fill such memory.",
        strength=Strength.SHOWN,
        find=find.uninitialised,
    ),
    Rule(
        name="atomics in a CUDA extension",
        needs="executing the step again shows an operator of tiny-cuda-nn, gsplat or nerfacc with equal inputs and "
        "different outputs",
        reason="These kernels add floats atomically, so in any order, and torch's deterministic algorithms do not "
        "reach them.",
        remedy="Use a torch implementation of this part (--pipeline.model.implementation torch, --encoding "
        "deterministic), or compare with limits.",
        strength=Strength.SHOWN,
        find=find.extension_at_work,
    ),
    Rule(
        name="thread-order float accumulation on the CPU",
        needs="executing the step again shows an accumulating operator (index_put, index_add, scatter) with equal "
        "inputs and different outputs, on more than one thread",
        reason="Its threads add floats in the order in which they arrive, and float addition depends on the order.",
        remedy=_SEEDED,
        strength=Strength.SHOWN,
        find=find.accumulation_shown,
    ),
    Rule(
        name="a kernel that is not deterministic",
        needs="executing the step again in one process, from one state, gives several results, first in this operator",
        reason="Inputs, generators and process are the same, so the kernel itself does not keep an order.",
        remedy=f"{_SEEDED} If torch has no deterministic kernel for it, replace the operator.",
        strength=Strength.SHOWN,
        find=find.kernel_shown,
    ),
    Rule(
        name="different seeds",
        needs="the seeds differ",
        reason="Initial weights, batches and samples are drawn from it.",
        remedy="Train both with one --seed.",
        strength=Strength.RECORDED,
        find=find.differing("seed", "config.yml / machine.seed"),
    ),
    Rule(
        name="different image files",
        needs="the digest of a file differs, or a file is on one side only; first in init, batch or eval",
        reason="Batches are made from these files.",
        remedy="Train both on one dataset: restore the files that are named, and delete caches made from others.",
        strength=Strength.RECORDED,
        find=find.differing("data.files", "data.files / *", stages=find.FROM_DATA),
    ),
    Rule(
        name="different order of the image files",
        needs="the files are equal, their order in the dataset is not; first in init, batch or eval",
        reason="A drawn number stands for another image where the order is another.",
        remedy="List the images in one order: sort the frames of transforms.json, or the directory listing.",
        strength=Strength.RECORDED,
        find=lambda e: (
            None
            if find.condition(e, "data.files", "data.files / *")
            else find.differing("data.order", "data.order / *", "data.order.*", stages=find.FROM_DATA)(e)
        ),
    ),
    Rule(
        name="stale feature cache",
        needs="the digest of the features differs and that of no image file does; first in init, batch or eval",
        reason="Equal images have equal features, unless these were made from other images or by another extractor.",
        remedy="Delete the feature caches in the dataset's folder, and train both again.",
        strength=Strength.RECORDED,
        find=lambda e: (
            None
            if find.condition(e, "data.files", "data.files / *")
            else find.differing("data.features", "data.features / digest", stages=find.FROM_DATA)(e)
        ),
    ),
    Rule(
        name="unseeded generators",
        needs="generator states or initial values differ before the first step, and the seeding log's claim about a "
        "generator fails",
        reason="A generator that does not follow the seed gives every run other numbers.",
        remedy=_SEEDED,
        strength=Strength.RECORDED,
        find=find.unseeded,
    ),
    Rule(
        name="cold and warm feature cache",
        needs="one side extracted its features and the other read them from a cache, and the generator states at step "
        "0 differ; first in these or in the initial values",
        reason="Extracting builds a network that draws from the generators before the model does.",
        remedy="Start both from equal caches: make them once beforehand, or delete them on both sides.",
        strength=Strength.RECORDED,
        find=find.extraction_drew,
    ),
    Rule(
        name="different library versions or hardware",
        needs="packages, Python, platform or hardware differ; first in a stage that computes",
        reason="Another version or processor rounds differently and chooses other kernels.",
        remedy="Install the same versions, and train both on the same kind of machine.",
        strength=Strength.RECORDED,
        find=find.differing(
            "environment.packages / *",
            "environment.hardware / *",
            "environment.python",
            "environment.platform",
            "libraries",
            stages=_COMPUTED,
        ),
    ),
    Rule(
        name="different thread counts",
        needs="the number of threads differs; first in a stage that computes",
        reason="Sums are split into as many parts as there are threads, and float addition depends on the split.",
        remedy="Set OMP_NUM_THREADS to one number for both.",
        strength=Strength.RECORDED,
        find=find.differing("environment.threads / *", "CPU threads", stages=_COMPUTED),
    ),
    Rule(
        name="different TF32, cuDNN or determinism flags",
        needs="a flag that chooses kernels or their precision differs; first in a stage that computes",
        reason="These flags choose between kernels that round or order additions differently.",
        remedy="Set the flag alike on both sides; the seeding log names who has which.",
        strength=Strength.RECORDED,
        find=find.differing(
            "float32 precision",
            "cuDNN *",
            f"{find.MODE}*",
            "uninitialised memory*",
            "config.yml / seed_*",
            "config.yml / enable_comprehensive_seeding",
            "CUBLAS_WORKSPACE_CONFIG",
            "environment.variables / *TF32*",
            "environment.variables / CUBLAS*",
            "environment.variables / CUDNN*",
            "environment.variables / ONEDNN*",
            "environment.variables / DNNL*",
            "environment.variables / MKL*",
            stages=_COMPUTED,
        ),
    ),
    Rule(
        name="different mixed precision",
        needs="the option mixed_precision or use_grad_scaler differs; first in a stage that computes, or the scaler",
        reason="Half precision keeps 10 bits of a float's 23, and the scaler skips steps that overflow.",
        remedy="Give both runs the same mixed_precision and use_grad_scaler.",
        strength=Strength.RECORDED,
        find=find.differing(
            "config.yml / mixed_precision", "config.yml / use_grad_scaler", stages=_COMPUTED | {"schedule"}
        ),
    ),
    Rule(
        name="different hash seeds",
        needs="PYTHONHASHSEED differs; first in any stage but the generators",
        reason="The order of a set of strings follows from it: parameters, modules or sums can be in another order.",
        remedy="Start both with one PYTHONHASHSEED in the environment, or through f3rm-verify run; sort sets before "
        "going through them.",
        strength=Strength.RECORDED,
        find=find.differing(
            "environment.variables / PYTHONHASHSEED",
            "PYTHONHASHSEED",
            stages=frozenset({"init", "batch", "forward", "loss", "grad", "params", "eval"}),
        ),
    ),
    Rule(
        name="the viewer drew from the training's generators",
        needs="generator states differ first while the viewer ran, or between steps and the viewer was on",
        reason="It renders when a browser asks, and draws from the generators at a step that the clock chooses.",
        remedy="Train with --vis tensorboard.",
        strength=Strength.RECORDED,
        find=find.viewer_drew,
    ),
    Rule(
        name="an evaluation drew from the training's generators",
        needs="generator states differ first after an evaluation, or between steps and its interval differs",
        reason="Evaluations draw their rays from the same generators as the training.",
        remedy="Evaluate at the same steps in both (--steps-per-eval-batch, --steps-per-eval-image, "
        "--steps-per-eval-all-images).",
        strength=Strength.RECORDED,
        find=find.evaluation_drew,
    ),
    Rule(
        name="the loading of data drew another number of values",
        needs="generator states differ first after the batch of a step was made",
        reason="The generators and the data before it are equal: a data worker or the sampler drew more, or less.",
        remedy="Give the data workers and the sampler generators of their own, seeded for each batch.",
        strength=Strength.RECORDED,
        find=find.drew_in("batch"),
    ),
    Rule(
        name="the model drew another number of values",
        needs="generator states differ first after the forward pass, the backward pass or the optimizer of a step",
        reason="The generators before it are equal, and how much is drawn depends on something that is not.",
        remedy="Find what draws in this pass only at times; let it draw in every step, or from a generator of its own.",
        strength=Strength.LIKELY,
        find=find.drew_in("forward", "backward", "optimizer"),
    ),
    Rule(
        name="different generator states before the first step",
        needs="generator states at step 0 differ, though both sides have one seed",
        reason="Both were seeded alike, so something drew another number of values while model and data were built.",
        remedy="Find what draws while building and depends on caches, files or the environment; give it a generator of "
        "its own.",
        strength=Strength.RECORDED,
        find=find.drawn_while_building,
    ),
    Rule(
        name="user code drew from the training's generators",
        needs="generator states differ first after the callbacks of a step, or between two steps",
        reason="Neither batch, model, optimizers nor an evaluation drew then: it was a callback, or other code between "
        "the steps.",
        remedy="Find the callback or hook that draws, and give it a generator of its own.",
        strength=Strength.LIKELY,
        find=find.user_code_drew,
    ),
    Rule(
        name="different code or configuration",
        needs="the commit, the classes, the hash grids or the configuration differ",
        reason="The two sides are not one experiment.",
        remedy=_SAME,
        strength=Strength.RECORDED,
        find=find.differing(
            "environment.git*",
            "implementation / *",
            "encodings / *",
            "method",
            "tool_version",
            "world_size",
            "rank",
            "config.yml / *",
        ),
    ),
    Rule(
        name="hash-order dependence",
        needs="no fixed PYTHONHASHSEED; first in the initial values or the losses, or in another stage that computes "
        "where no unordered additions were allowed; and no code was seen to read a clock or entropy there",
        reason="Without a fixed hash seed every process goes through sets of strings in another order.",
        remedy="Start with PYTHONHASHSEED in the environment, or through f3rm-verify run; sort sets before going "
        "through them.",
        strength=Strength.LIKELY,
        find=find.hash_order,
    ),
    Rule(
        name="uninitialised memory",
        needs="initial values differ, the states of all generators at step 0 are equal, torch's filling of fresh "
        "memory was off, and no code was seen to read a clock or entropy while the training was built",
        reason="What neither the generators nor anything outside gave, lay in the memory before.",
        remedy="Write into the tensor before it is read, or make it with torch.zeros; train with "
        "--seed-deterministic-algorithms True, which has torch fill such memory.",
        strength=Strength.LIKELY,
        find=find.unfilled,
    ),
    Rule(
        name="initial values that do not follow the seed",
        needs="initial values differ, and the states of all generators at step 0 are equal",
        reason="They did not come from the seeded generators: a module seeds itself, or reads the clock or the "
        "system's entropy, or something wrote into it.",
        remedy="Initialise the module from torch's generator, or give it the seed.",
        strength=Strength.LIKELY,
        find=find.own_randomness,
    ),
    Rule(
        name="a race between data workers",
        needs="the batch differs, the generators do not, and the workers are not seeded or not read in order",
        reason="Workers without a seed of their own, or in one queue, hand over batches as the scheduler wants it.",
        remedy="Use a data manager that keeps ParallelDataManager.setup_train, with comprehensive seeding on.",
        strength=Strength.LIKELY,
        find=find.workers,
    ),
    Rule(
        name="atomics in a CUDA extension",
        needs="first in outputs or gradients, generators and batch equal, on a GPU, and the model uses tiny-cuda-nn, "
        "gsplat or nerfacc",
        reason="Their kernels add floats atomically, so in any order, and torch's deterministic algorithms do not "
        "reach them.",
        remedy="Use a torch implementation of this part (--pipeline.model.implementation torch, --encoding "
        "deterministic), or compare with limits.",
        strength=Strength.LIKELY,
        find=find.extension_atomics,
    ),
    Rule(
        name="atomics in CUDA kernels",
        needs="first in the gradients, everything before it equal, on a GPU, with deterministic algorithms off",
        reason="torch's CUDA backward of an index or a scatter adds atomically unless deterministic algorithms are on.",
        remedy=_SEEDED,
        strength=Strength.LIKELY,
        find=find.cuda_accumulation,
    ),
    Rule(
        name="thread-order float accumulation on the CPU",
        needs="first in the gradients, everything before it equal, on the CPU with more than one thread and with "
        "deterministic algorithms off",
        reason="torch's CPU backward of an index adds floats in the order in which threads arrive, unless "
        "deterministic algorithms are on.",
        remedy=_SEEDED,
        strength=Strength.LIKELY,
        find=find.cpu_accumulation,
    ),
    Rule(
        name="randomness that no seed reaches",
        needs="code of the training reads the system's entropy while it trains; first within a step",
        reason="The system's entropy is new in every process.",
        remedy="Seed that generator from the configuration's seed.",
        strength=Strength.LIKELY,
        find=find.entropy_in_steps,
    ),
    Rule(
        name="wall-clock dependence",
        needs="code of the training, not of its libraries, reads a clock while it trains; first within a step",
        reason="What is computed from the time differs from run to run.",
        remedy="Compute it from the step instead.",
        strength=Strength.LIKELY,
        find=find.clock,
    ),
    Rule(
        name="kernels chosen by benchmark",
        needs="first in outputs or gradients, generators and batch equal, on a GPU, with cuDNN's benchmark mode on",
        reason="The mode times several kernels and takes the fastest, which is not the same every time.",
        remedy="Train with --enable-comprehensive-seeding True, which turns it off.",
        strength=Strength.POSSIBLE,
        find=find.benchmarked,
    ),
    Rule(
        name="the mixed-precision gradient scaler",
        needs="the scaler's state differs first, everything before it in that step equal",
        reason="Gradients and parameters are equal, so it did not react to them: its settings or its history differ.",
        remedy="Give both the same scaler settings, or train with --mixed-precision False.",
        strength=Strength.LIKELY,
        find=find.scaler,
    ),
    Rule(
        name="another learning-rate schedule",
        needs="learning rates differ first, everything before them in that step equal",
        reason="A learning rate follows from the step alone, so the schedulers or their state differ.",
        remedy="Compare the schedulers' settings, and look for code that sets a learning rate.",
        strength=Strength.LIKELY,
        find=find.learning_rate,
    ),
    Rule(
        name="a data worker made another batch",
        needs="the batch differs, the generators do not, and worker processes make it, seeded and read in order",
        reason="A worker has generators of its own, seeded for each batch: it drew another number of values, or read "
        "other data.",
        remedy="Look at what the workers run: the pixel sampler, its collate function, and what changes images there.",
        strength=Strength.POSSIBLE,
        find=find.worker_made,
    ),
    Rule(
        name="different data in the batch",
        needs="the batch differs, the generators before it do not",
        reason="The same numbers were drawn, so the data behind them, or their order, are not the same in memory.",
        remedy="Look for code that changes or reorders images, cameras or features after they are loaded.",
        strength=Strength.POSSIBLE,
        find=find.other_batch,
    ),
    Rule(
        name="something besides the gradients changed the model",
        needs="parameters or optimizer state differ after a step, its gradients do not",
        reason="An optimizer does the same with equal gradients and equal state: a callback or other code wrote into "
        "the model or the optimizer, or a step was skipped.",
        remedy="Look for callbacks and hooks that write into parameters, buffers or optimizers, and for skipped steps.",
        strength=Strength.POSSIBLE,
        find=find.written_elsewhere,
    ),
    Rule(
        name="another evaluation",
        needs="what an evaluation read or drew differs first",
        reason="The training before it is equal, so the evaluation itself took other images, rays or numbers.",
        remedy="Evaluate at the same steps, on the same images; seed what the evaluation draws.",
        strength=Strength.POSSIBLE,
        find=find.evaluation,
    ),
    Rule(
        name="different conditions",
        needs="anything else of setup or seeding log differs",
        reason="What follows from different conditions says nothing about the training.",
        remedy=_SAME,
        strength=Strength.POSSIBLE,
        find=lambda e: find.condition(e, "*"),
    ),
)


def table() -> str:
    """The table in Markdown, for the documentation."""
    lines = ["| cause | evidence | reason | remedy |", "| --- | --- | --- | --- |"]
    for rule in RULES:
        likely = "" if rule.strength >= Strength.RECORDED else "likely "
        lines.append(f"| {likely}{rule.name} | {rule.needs} | {rule.reason} | {rule.remedy} |")
    return "\n".join(lines) + "\n"
