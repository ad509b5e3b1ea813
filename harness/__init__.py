"""What keeps a run alive, and no mathematics. It imports nothing of ours from outside this folder."""

import os

# Which of several processes this one is, from a launcher. Left empty by a script, they would end Lightning's import.
for _name in ["RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"]:
    if not os.environ.get(_name, "0").isdigit():
        del os.environ[_name]

# What torch cannot do on Apple's GPU it does on the CPU, if this is there when it is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

# Large tensors on a CPU in large pages, where Linux has them; torch reads this when it allocates its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
