"""The environment variables by which the launcher speaks to a training that it started. Imports nothing."""

#: A random name of this training. The manifest repeats it, which shows that our trainer is the one that runs.
NONCE = "F3RM_VERIFY_NONCE"
#: The name of the method to wrap.
METHOD = "F3RM_VERIFY_METHOD"
#: nerfstudio's own: methods as `name=module:object`, separated by commas; the launcher appends the wrapped one.
METHODS = "NERFSTUDIO_METHOD_CONFIGS"
#: A saved config.yml to wrap, instead of the method's own configuration.
LOAD_CONFIG = "F3RM_VERIFY_LOAD_CONFIG"
#: `DESCRIPTOR:INODE` of a pipe whose other end only the launcher holds, so that it reads as closed when the launcher is
#: gone. The inode tells that pipe from whatever else has this number in a process further down.
LIFELINE = "F3RM_VERIFY_LIFELINE"
#: The disk budget for the renders in bytes. Its presence asks for the evaluation after the training.
RENDER_BUDGET = "F3RM_VERIFY_RENDER_BUDGET"
#: Variables, separated by commas, that the launcher set for the seeding; the others are the user's.
SEEDING_SET = "F3RM_VERIFY_SEEDING_SET"
#: Where this run keeps its features: in a folder of its own, so that all runs extract, or in one that they share.
FEATURE_CACHE = "F3RM_VERIFY_FEATURE_CACHE"
#: Set where they share them; then a cache in the dataset's folder serves, too.
SHARED_FEATURES = "F3RM_VERIFY_SHARED_FEATURES"
#: How many steps with and without each measure to time, in a process that trains nothing.
COST = "F3RM_VERIFY_COST"
#: Names of the measures to time, separated by commas; all of them where it is empty.
COST_ONLY = "F3RM_VERIFY_COST_ONLY"
#: The user's dataset, in a process that only makes the caches in a view of it; it ends before anything is trained.
PREPARE = "F3RM_VERIFY_PREPARE"
#: What the flight recorder records: "off", "steps" or "tensors"; "steps" where nothing is said.
TRACE = "F3RM_VERIFY_TRACE"
#: Keep a snapshot of the whole state before every so many steps.
SNAPSHOT_EVERY = "F3RM_VERIFY_SNAPSHOT_EVERY"
#: Which steps to execute again instead of training, as JSON: see f3rm/replay.py.
REPLAY = "F3RM_VERIFY_REPLAY"
