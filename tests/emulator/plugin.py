"""A plugin of pytest: ``-p tests.emulator.plugin`` runs tests of Triton kernels on an emulated GPU.

Environment: ``EMULATED_GPU`` is ``sm_80`` or ``sm_90`` (the default).
"""

from __future__ import annotations

import os
from functools import lru_cache

# Before triton is imported.
os.environ["TRITON_INTERPRET"] = "0"
# Before torch looks: tensors must lie in this process, also where there is a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""

import torch

from tests.emulator.driver import install
from titans_graph.kernels import triton_config

ARCH = os.environ.get("EMULATED_GPU", "sm_90")

install(int(ARCH.removeprefix("sm_")))
# Before other modules take the names from there.
triton_config.available = triton_config.importable
triton_config.current_arch = lru_cache(lambda device=None: ARCH)
# What torch.empty gives is then NaN: a kernel that reads what nobody wrote is found out.
torch.use_deterministic_algorithms(True)
