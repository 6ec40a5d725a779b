"""Training on several processes: who does what alone, and how a model is spread over all of them.

Everything is launched by torchrun (or anything that sets its environment variables). Importing this module does not load
torch, so that the command line can ask which process it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from addlang.errors import AddlangError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from addlang.recipe import Phase
    from addlang.strategies.base import Attached

T = TypeVar("T")
STEP_TIMEOUT = timedelta(minutes=30)  # of one exchange between processes that train
WAIT_TIMEOUT = timedelta(days=14)  # of a wait for what the first process does alone: planning, evaluation, export


@dataclass(frozen=True)
class World:
    """The processes of a run. A run of one process never touches ``torch.distributed``.

    Attributes:
        rank: this process, 0 .. size - 1; the first one alone writes reports, evaluations and exports.
        waiting: group of all processes whose exchanges may take days.
        writing: group of all processes for the thread that writes checkpoints: its exchanges must not mix with those of
            training.
    """

    rank: int = 0
    size: int = 1
    waiting: Any = None
    writing: Any = None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Sum of each value over all processes, the same bits everywhere."""
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        # on the CPU, over gloo: these are a few numbers per step and need not queue behind the GPU's work
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return [float(v) for v in tensor]

    def agree(self, value: T) -> T:
        """The first process's value, on all of them; waits for it as long as it takes."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.waiting)
        return box[0]

    def first(self, function: Callable[[], T]) -> T | None:
        """Call ``function`` in the first process while the others wait; they get None.

        Raises:
            SystemExit: in the others, where it failed in the first, which alone reports the error.
        """
        result = None
        code: int | None = None
        error: BaseException | None = None
        if self.leads:
            try:
                result = function()
            except BaseException as caught:
                if self.size == 1:
                    raise
                error, code = caught, getattr(caught, "exit_code", 1)
        code = self.agree(code)
        if error is not None:
            raise error
        if code is not None:
            raise SystemExit(code)
        return result

    def in_turn(self, function: Callable[[], T]) -> T:
        """Call ``function`` in every process, in the first one before the others, which then find its cache."""
        result = self.first(function)
        return result if self.leads else function()  # type: ignore[return-value]

    def same(self, error: AddlangError) -> BaseException:
        """An error that arises in all processes alike: reported by the first, a silent exit code in the others."""
        return error if self.leads else SystemExit(error.exit_code)

    def rows(self, batch: int) -> tuple[int, int]:
        """This process's part of a batch of ``batch`` sequences: (first, count); counts differ by at most 1."""
        base, extra = divmod(batch, self.size)
        return self.rank * base + min(self.rank, extra), base + (self.rank < extra)


ALONE = World()


def launched() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this node) as the launcher says, or (0, 1, 0)."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return 0, 1, 0
    return int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))


@contextlib.contextmanager
def join_world(device: Literal["auto", "cpu", "cuda"]) -> Iterator[World]:
    """Join the processes of this run: nccl between GPUs, gloo between CPUs.

    Raises:
        AddlangError: launched under DeepSpeed, or with more processes per node than GPUs.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        raise AddlangError(
            "DeepSpeed is not supported: ZeRO-3 replaces parameters by empty ones that a freeze plan cannot be checked against",
            "launch with torchrun and sharding: fsdp, which shards the same things",
        )
    rank, size, local = launched()
    if size == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if local >= torch.cuda.device_count():
            raise AddlangError(
                f"process {local} of this node has no GPU of its own: torch sees {torch.cuda.device_count()}",
                f"launch with --nproc-per-node {torch.cuda.device_count()}",
            )
        torch.cuda.set_device(local)
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=STEP_TIMEOUT)
    try:
        yield World(
            rank,
            size,
            waiting=dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT),
            writing=dist.new_group(backend="gloo", timeout=STEP_TIMEOUT),
        )
    finally:
        if mine:
            dist.destroy_process_group()


def sharding_of(phase: Phase, world: World) -> Literal["none", "ddp", "fsdp"]:
    """How the phase's model is spread over the processes.

    Raises:
        AddlangError: the setting contradicts the number of processes.
    """
    if phase.sharding == "auto":
        return "none" if world.size == 1 else "fsdp"
    if (phase.sharding == "none") != (world.size == 1):
        raise AddlangError(
            f"sharding: {phase.sharding} on {world.size} process(es)",
            "use sharding: auto, or launch several processes with torchrun"
            if world.size == 1
            else "use sharding: auto, fsdp or ddp, or launch one process",
        )
    return phase.sharding


def check_sharding(phase: Phase, world: World) -> Literal["none", "ddp", "fsdp"]:
    """How the phase's model is spread over the processes, if it can be trained so.

    Raises:
        AddlangError: the setting contradicts the number of processes, or the method or its execution cannot be sharded.
    """
    sharding = sharding_of(phase, world)
    phase.strategy.check_sharding(sharding)
    if sharding == "fsdp" and phase.execution == "split_resident":
        raise AddlangError(
            f"phase '{phase.name}': resident split layers cannot be sharded",
            "use execution: split_assemble, or DDP (sharding: ddp)",
        )
    return sharding


def spread(
    attached: Attached, phase: Phase, world: World, device: torch.device, compute: torch.dtype | None
) -> nn.Module:
    """Shard or replicate the attached model in place; returns the module to call in the forward pass.

    Call it after the plan is attached and before the optimizer is built: sharding replaces every parameter, so hooks and
    optimizers that know the old ones would never act.

    Args:
        compute: type of the matrix products; None: the weights' own.
    """
    import torch

    mode = sharding_of(phase, world)
    model = attached.model
    if mode == "none":
        return model
    if mode == "ddp":
        return torch.nn.parallel.DistributedDataParallel(
            model.to(device), broadcast_buffers=False, gradient_as_bucket_view=True
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    low = compute in (torch.bfloat16, torch.float16)
    # gathered in the compute type: half the traffic, and no 16-bit copies that autocast would keep for backward.
    # gradients are added up in fp32; the residual stream keeps its type, as on one device.
    policy = MixedPrecisionPolicy(
        param_dtype=compute if low else None,
        reduce_dtype=torch.float32 if low or compute is None else None,
        cast_forward_inputs=False,
    )
    root_policy = MixedPrecisionPolicy(reduce_dtype=policy.reduce_dtype, cast_forward_inputs=False)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=root_policy)
    return model


def decoder_layers(model: Any) -> list[nn.Module]:
    """The transformer blocks of a causal LM."""
    return list(model.get_decoder().layers)


def accumulating(model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[None]:
    """Around forward and backward of one micro-batch: DDP exchanges gradients in the last one only.

    FSDP2 exchanges them every time: otherwise every process would hold the gradients of the whole model.
    """
    import torch

    if isinstance(model, torch.nn.parallel.DistributedDataParallel) and not last:
        held: contextlib.AbstractContextManager[None] = model.no_sync()
        return held
    return contextlib.nullcontext()


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """This process's rows of a tensor (shared storage, no gradient) and the number of its first row.

    An ordinary tensor is its own part.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local: Tensor = DTensor.to_local(tensor.detach())  # type: ignore[arg-type]
    return local, offset[0] if offset else 0


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all processes where it is sharded (all must call), detached."""
    from torch.distributed.tensor import DTensor

    full: Tensor = DTensor.full_tensor(tensor.detach()) if isinstance(tensor, DTensor) else tensor.detach()  # type: ignore[arg-type]
    return full
