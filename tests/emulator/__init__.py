"""An emulated NVIDIA GPU: compiled Triton kernels run on this processor, with a watch on races (docs/kernels.md)."""
