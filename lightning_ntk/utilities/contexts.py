"""Contexts that keep a Jacobian pass exact, and invisible to the run that it observes."""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

# Every switch that lets a float32 product run in TF32 or bfloat16. They are read and written through PyTorch's newer
# interface only: mixing it with `allow_tf32` makes PyTorch raise.
_REDUCED_PRECISION_SWITCHES: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
    torch.backends.mkldnn.rnn,  # type: ignore[attr-defined]
)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Turns autocast, TF32 and reduced-precision float32 products off, and restores them on exit."""
    saved = [switch.fp32_precision for switch in _REDUCED_PRECISION_SWITCHES]
    with ExitStack() as stack:
        for kind in {"cpu", device_type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            for switch in _REDUCED_PRECISION_SWITCHES:
                switch.fp32_precision = "ieee"
            yield
        finally:
            for switch, value in zip(_REDUCED_PRECISION_SWITCHES, saved, strict=True):
                switch.fp32_precision = value


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Puts every submodule in eval mode and restores the flag of each one, not that of the root, on exit."""
    training = [submodule for submodule in module.modules() if submodule.training]
    # nn.TransformerEncoder's fused inference path has no derivatives; it is taken whenever no parameter requires a gradient.
    fused_attention = torch.backends.mha.get_fastpath_enabled()
    try:
        for submodule in training:
            submodule.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused_attention)
        for submodule in training:
            submodule.training = True


@contextmanager
def without_compilation() -> Iterator[None]:
    """Runs what `torch.compile` has wrapped as the plain Python that it was: graphs of a run know no tangents and no clones."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and the import takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def isolated_pass(module: nn.Module, device_type: str) -> Iterator[None]:
    """A forward or backward pass in eval mode and full precision, outside `torch.inference_mode` and `torch.compile`."""
    with torch.inference_mode(False), full_precision(device_type), evaluation_mode(module), without_compilation():
        yield


@contextmanager
def without_library_kernels() -> Iterator[None]:
    """Turns cuDNN and oneDNN off, whose recurrent layers have no forward-mode derivative."""
    # Not through their own flags() contexts: these also touch TF32, through the interface that must not be mixed in.
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)
    saved = [backend.enabled for backend in backends]
    try:
        for backend in backends:
            backend.enabled = False
        yield
    finally:
        for backend, enabled in zip(backends, saved, strict=True):
            backend.enabled = enabled


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restores the state of PyTorch's (CPU and GPU), NumPy's and Python's generators on exit, also after an error."""
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    # All devices by name: left to itself, fork_rng warns where there are several. No GPU is woken up for it.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
