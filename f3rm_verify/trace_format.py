"""The format of a trace: `verify/trace.json` says what the records in `verify/trace.bin` are.

trace.bin is a row of frames: one for the state before the first step, then one for each step. A frame is appended
whole and carries a checksum, so that whatever ends a training leaves a readable prefix. Little-endian:

    u32  CRC-32 of everything after it in the frame
    u16  kind: 0 before the first step, 1 a step
    u16  n, the number of records
    i64  the step, from 0
    u16  x n  subjects, as indices into trace.json's `subjects`
    u64  x n  values: digests, or the bits of a number, as the subject's `kind` says
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

#: Of both files. What another version wrote can mean something else, so it is not read.
TRACE_VERSION = 1
#: The checksum, and what it is of together with the records: kind, number of records, step.
CHECKSUM = struct.Struct("<I")
HEAD = struct.Struct("<HHq")
BEFORE_TRAINING, STEP = 0, 1
#: Subjects of one trace, and records of one frame, at most.
MAX_SUBJECTS = 2**16 - 1
RECORD_BYTES = 10
#: What can be recorded: nothing, groups, or every tensor.
MODES = ("off", "steps", "tensors")
#: What the value of a subject can be: a digest, or the bits of a number of this type.
DIGEST = "digest"
NUMBERS = ("float16", "bfloat16", "float32", "float64")

#: Who can draw from a generator, as the trace names it: "torch cpu after PHASE" is the state that this phase left.
CONSUMERS = {
    "batch": "the data manager, for the batch of rays",
    "forward": "the model's forward pass and its losses",
    "backward": "the backward pass",
    "optimizer": "the optimizers and schedulers",
    "callbacks": "the method's training callbacks",
    "evaluation": "an evaluation between steps",
    "checkpoint": "saving a checkpoint",
    "viewer": "the viewer",
    "between steps": "something between the steps: the viewer, logging, another thread, or code of the user's own",
}
#: Stands between the name of a generator and of a phase.
AFTER = " after "


def frame(kind: int, step: int, subjects: Sequence[int], values: Sequence[int]) -> bytes:
    """One frame. Raises ValueError for more records than a frame can hold."""
    if len(subjects) > MAX_SUBJECTS or len(subjects) != len(values):
        raise ValueError(f"{len(subjects)} subjects with {len(values)} values are no frame")
    body = (
        HEAD.pack(kind, len(subjects), step) + np.array(subjects, "<u2").tobytes() + np.array(values, "<u8").tobytes()
    )
    return CHECKSUM.pack(zlib.crc32(body)) + body
