"""What keeps a training run alive, for any LightningModule. It imports nothing of ours from outside this folder."""

import os
import sys
import types

# TensorBoard takes its own stand-in for TensorFlow: importing that costs seconds, and what is left of an uninstalled
# TensorFlow, a mere folder, would end the import.
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))

# Which of several processes this one is, from a launcher. Left empty by a script, they would end Lightning's import.
for _name in ["RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"]:
    if not os.environ.get(_name, "0").isdigit():
        del os.environ[_name]

if sys.platform == "darwin":  # torch reads it when it is imported: what Apple's GPU lacks runs on the CPU
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
