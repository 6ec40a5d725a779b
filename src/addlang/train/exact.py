"""Training whose results do not depend on the order in which a GPU happens to add."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from addlang.errors import AddlangError, first_line

REFUSED = "does not have a deterministic implementation"  # torch's words, as the next
TOO_LATE = "Deterministic behavior was enabled"


@contextlib.contextmanager
def any_order() -> Iterator[None]:
    """Within this context no kernel is refused: for an operation of which only that is read which is the same in any order.

    torch refuses ``kthvalue`` on a GPU because equal elements may be named in any order, also where only the value is read.
    """
    asked, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=only_warns)


@contextlib.contextmanager
def exact_kernels(device: torch.device) -> Iterator[None]:
    """Within this context a GPU's kernels are deterministic, where the run's are, or there is an error.

    Elsewhere torch is told to warn only, and then the backward pass of fused attention adds up in an order that differs from run to
    run. cuDNN's attention has no other in torch: it is left out.

    Raises:
        AddlangError: an operation has no deterministic kernel.
    """
    if device.type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        yield
        return
    only_warns, cudnn = torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    except RuntimeError as error:
        if TOO_LATE in str(error):  # older versions of torch ask once, at a process's first product on a GPU
            raise AddlangError(
                "cuBLAS was used in this process before it was asked for deterministic kernels",
                "start a new process with CUBLAS_WORKSPACE_CONFIG=:4096:8 in its environment, or set deterministic: false",
            ) from error
        if REFUSED not in str(error):
            raise
        raise AddlangError(
            f"training needs an operation that has no deterministic kernel ({first_line(error)})",
            "deterministic: false; then a run that is continued may differ in its last bits",
        ) from error
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.use_deterministic_algorithms(True, warn_only=only_warns)
