"""Runs of any LightningModule: started, reported, resumed. Imports nothing from the rest of the repository."""

import os
import sys
import types

# Makes TensorBoard use its own stub instead of TensorFlow. Importing TensorFlow takes seconds, and an empty folder that
# an uninstalled TensorFlow left behind would make the import fail.
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))

# Launchers set these variables to the rank of a process. If a script left one of them empty, Lightning's import fails.
for _name in ["RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"]:
    if not os.environ.get(_name, "0").isdigit():
        del os.environ[_name]

if sys.platform == "darwin":  # read when torch is imported: operators that Apple's GPU lacks run on the CPU
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
