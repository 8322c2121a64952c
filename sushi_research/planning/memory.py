"""How much memory a training needs: what is there all the time, what a micro-batch adds, and what the GPU's software adds to both.

Three figures, with one word each here, in benchmarks and in the documentation:

- **allocated**: the bytes of all tensors at the peak, with the workspaces of the kernels (torch.cuda.max_memory_allocated);
- **reserved**: what torch's allocator has taken from the GPU for them (torch.cuda.max_memory_reserved);
- **with the CUDA context**: what nvidia-smi shows: reserved, and what CUDA itself and the kernels' code take.

On a CPU there is no such allocator and no context. The last figure is then that of the process: the tensors, and Python with its
libraries.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
# Bytes of state for each trained number; other optimizers are measured (training/optimizer_plan.py). 8-bit states have a number in
# fp32 for each block of 256. Prodigy keeps two averages, a sum, and where it started.
STATE_BYTES = {
    "adamw8bit": 2 + 2 * 4 / 256,
    "adamw": 8.0,
    "adamw_schedulefree": 8.0,
    "lion": 4.0,
    "lion8bit": 1 + 4 / 256,
    "prodigy": 16.0,
    "stableadamw": 8.0,
}
# What each has at least: besides these, CAME keeps rows and columns, and Muon more for what is no matrix.
LEAST_STATE_BYTES = STATE_BYTES | {"came": 4.0, "muon": 4.0}
# The same with arguments: Prodigy's slice_p, and betas that begin with 0, leave one average. None of the others becomes smaller.
LEAST_WITH_ARGUMENTS = LEAST_STATE_BYTES | {"prodigy": 4.0}
# Bytes for each trained number that a step of the optimizer takes for its intermediate results. Fused kernels have none; the others
# of torch keep about two tensors of fp32 at once.
STEP_BYTES = {"adamw8bit": 0.0, "lion": 0.0, "lion8bit": 0.0}
OTHER_STEP_BYTES = 8.0

# From the rows of one H200 in docs/performance.md. Rows of other cards may correct them.
# Workspaces of cuBLAS and cuDNN: 0.17 to 0.25 GiB between the allocated peak and the count of live bytes, in all rows without
# checkpointing.
WORKSPACES = 0.17 * GIB
# Reserved is allocated and a constant part (0.23 to 0.34 GiB at batch size 1), and a part of what a micro-batch adds: 0.01 to 0.02
# without checkpointing; with it 0.18 to 0.21, because the blocks that are computed again leave gaps.
RESERVED = 0.25 * GIB
GAPS = {"none": 0.02, "feed_forward": 0.12, "all": 0.21}  # feed_forward was not measured; it is between the two
# A recorded step allocates 0.5 to 3 % more of what a micro-batch adds, and leaves larger gaps.
RECORDED, RECORDED_GAPS = 0.03, 0.03
# In use on the card less reserved: 0.69 to 0.81 GiB, and 0.97 with recorded steps.
CONTEXT, RECORDED_CONTEXT = 0.8 * GIB, 1.0 * GIB
# A process on a CPU that has imported the libraries and made its plan has 0.6 GiB.
PROCESS = 0.7 * GIB


@dataclass(frozen=True)
class Memory:
    """A peak in bytes, by the three figures above."""

    allocated: float
    reserved: float
    with_context: float

    def describe(self) -> str:
        """The three figures in GiB."""
        return (
            f"{self.allocated / GIB:.2f} GiB allocated, {self.reserved / GIB:.2f} reserved, "
            f"{self.with_context / GIB:.2f} with the CUDA context"
        )


@dataclass(frozen=True)
class Held:
    """What is in memory all the time, in bytes: the frozen weights, the adapter (master weights, gradient sum, working copy,
    averages), the optimizer's state, and `encoders`, the text encoders of captions.encode while_training."""

    weights: float
    adapter: float
    optimizer: float
    encoders: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.optimizer + self.encoders


def adapter_bytes(numbers: int, compute_bytes: int, averages: int = 0) -> int:
    """Bytes of an adapter of so many numbers: fp32 master weights, their gradients, the working copy in the compute dtype, and
    averages of the weights in fp32."""
    return numbers * (4 + 4 + compute_bytes + 4 * averages)


def on_gpu(held: float, live: float, *, checkpointing: str = "none", recorded: bool = False) -> Memory:
    """The peak on a GPU of a micro-batch that adds `live` bytes to the `held` ones.

    `checkpointing` is train.gradient_checkpointing; `recorded` says whether the step runs as a CUDA graph.
    """
    allocated = held + WORKSPACES + live * (1 + RECORDED * recorded)
    reserved = allocated + RESERVED + live * (GAPS[checkpointing] + RECORDED_GAPS * recorded)
    return Memory(allocated, reserved, reserved + (RECORDED_CONTEXT if recorded else CONTEXT))


def on_cpu(held: float, live: float) -> Memory:
    """The peak on a CPU."""
    return Memory(held + live, held + live, held + live + PROCESS)
