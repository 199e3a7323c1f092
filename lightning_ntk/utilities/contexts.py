"""Contexts that make a Jacobian pass exact and hide it from the run."""

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_ntk.utilities.attention import dual_attention

# In older versions, torch.compiler.set_stance frees None too often, until Python aborts.
if torch.__version__ < (2, 8):  # type: ignore[operator]
    raise ImportError(f"lightning_ntk needs PyTorch 2.8 or newer, but this is {torch.__version__}. Upgrade torch.")

_BACKENDS: Any = torch.backends  # whose switches depend on the version


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Turns off autocast, TF32 and reduced-precision float32 products."""
    with ExitStack() as stack:
        for kind in {"cpu", device_type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_full_precision_products())
        yield


@contextmanager
def _full_precision_products() -> Iterator[None]:
    cuda, cudnn, mkldnn = _BACKENDS.cuda, _BACKENDS.cudnn, _BACKENDS.mkldnn
    if hasattr(cudnn, "conv"):  # PyTorch 2.9 and newer, which raise when the older switches are mixed in
        switches = (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
        with _attribute(switches, "fp32_precision", "ieee"):
            yield
        return
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")  # products of CUDA and oneDNN
        with _attribute((cudnn,), "allow_tf32", False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Puts every submodule in eval mode, and restores each flag on exit."""
    training = [submodule for submodule in module.modules() if submodule.training]
    # nn.TransformerEncoder takes a fused path without derivatives whenever no parameter requires a gradient.
    fused_attention = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with _attribute(training, "training", False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused_attention)


@contextmanager
def without_compilation() -> Iterator[None]:
    """Runs compiled modules eagerly: their graphs were not traced with tangents or replaced weights."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and the import takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def isolated_pass(module: nn.Module, device_type: str) -> Iterator[None]:
    """Runs a pass in eval mode and full precision, outside `torch.inference_mode` and `torch.compile`."""
    with torch.inference_mode(False), full_precision(device_type), evaluation_mode(module), without_compilation():
        yield


@contextmanager
def without_library_kernels() -> Iterator[None]:
    """Turns off cuDNN and oneDNN, whose recurrent layers have no forward-mode derivative."""
    # Not through their flags() contexts, which also set TF32 through the older interface.
    with _attribute((torch.backends.cudnn, torch.backends.mkldnn), "enabled", False):
        yield


@contextmanager
def forward_mode() -> Iterator[None]:
    """Makes attention differentiable in forward mode, with reverse mode's derivatives.

    Gradients must be enabled outside of the network, so that it shows where the network disables them.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _AsInReverseMode():
        yield


class _AsInReverseMode(TorchFunctionMode):
    """Makes a constant of what is one in reverse mode.

    This is all under `no_grad`, and rows of padding, which a tied head may move.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            with _set_fwd_grad_enabled(False):
                return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and (attended := dual_attention(*args, **kwargs)) is not None:
            return attended
        result = func(*args, **kwargs)
        padding = kwargs.get("padding_idx") if func is F.embedding else None
        if padding is None:
            return result
        indices, weight = args[:2]
        return torch.where((indices == padding % len(weight)).unsqueeze(-1), result.detach(), result)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restores random states on exit, even after an error.

    These are PyTorch's (CPU and GPU), NumPy's and Python's.
    """
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    # fork_rng warns about several GPUs unless they are named. An unused GPU is not initialized for this.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


@contextmanager
def _attribute(owners: Sequence[Any], name: str, value: object) -> Iterator[None]:
    """Sets an attribute of several objects, and restores that of each one on exit."""
    saved = [getattr(owner, name) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, value)
        yield
    finally:
        for owner, old in zip(owners, saved, strict=True):
            setattr(owner, name, old)
