"""Differentiation inside the memory where the caller's context forbids it: in a thread of its own."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def undisturbed(run: Callable[[], T]) -> T:
    """``run()``, in a thread of its own where the dispatch state of this one forbids differentiation by functorch.

    Two callers do: dispatch modes (opcheck, the aliasing check of a compiled region's first call) switch functorch's
    keys off around an operator, and activation checkpointing sets hooks on saved tensors. A new thread has neither; what it
    saves for the backward pass is then kept, and not made again or moved by the hooks.
    """
    front = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode
    if not _hooked() and not torch._C._dispatch_tls_is_dispatch_key_excluded(front):
        return run()
    streams = [torch.cuda.current_stream()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def same_context() -> T:
        # A new thread is on the default stream of the first device, and records gradients.
        with contextlib.ExitStack() as entered:
            for stream in streams:
                entered.enter_context(torch.cuda.stream(stream))
            entered.enter_context(torch.inference_mode(inference))
            entered.enter_context(torch.set_grad_enabled(grad))
            return run()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, same_context).result()


def unhooked(run: Callable[[], T]) -> T:
    """``run()``, and :func:`undisturbed` where hooks on saved tensors are set; may be traced."""
    return run() if torch.compiler.is_compiling() or not _hooked() else undisturbed(run)


def _hooked() -> bool:
    """Whether hooks on saved tensors are set here, as by activation checkpointing and ``save_on_cpu``."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
