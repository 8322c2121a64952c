"""What a launcher asks for in the environment. What has no effect here is refused by name, before anything is loaded.

`accelerate launch` exports every option, also those that nobody gave. Those that mean "off" are accepted. In use are the number
and addresses of the processes, --mixed_precision (precision.py), --cpu, --gpu_ids, --enable_cpu_affinity, --debug, and the number
of CPU threads.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch

from sushi_research import stopping
from sushi_research.errors import UserError

_TRUE, _FALSE = ("1", "true", "yes", "y", "t", "on"), ("0", "false", "no", "n", "f", "off", "")
_PARALLEL = "each process has the whole model here"
# Variable -> (the values that mean "off", the launcher's option, what to do instead).
_UNUSED = {
    "ACCELERATE_DYNAMO_BACKEND": (("no", "NO", ""), "--dynamo_backend", "launch with --dynamo_backend no"),
    "ACCELERATE_DYNAMO_MODE": (("default", ""), "--dynamo_mode", "launch without it"),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": (_FALSE, "--dynamo_use_fullgraph", "launch without it"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": (_FALSE, "--dynamo_use_dynamic", "launch without it"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": (
        _FALSE,
        "--dynamo_use_regional_compilation",
        "launch without it",
    ),
    "ACCELERATE_USE_DEEPSPEED": (_FALSE, "--use_deepspeed", f"launch without it ({_PARALLEL})"),
    "ACCELERATE_USE_FSDP": (_FALSE, "--use_fsdp", f"launch without it ({_PARALLEL})"),
    "ACCELERATE_USE_MEGATRON_LM": (_FALSE, "--use_megatron_lm", f"launch without it ({_PARALLEL})"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        _FALSE,
        "--use_parallelism_config",
        f"launch without it ({_PARALLEL}), or with its data-parallel processes as --num_processes",
    ),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        ("1", ""),
        "--gradient_accumulation_steps",
        "set train.accumulation in the config instead",
    ),
    "ACCELERATE_GRADIENT_CLIPPING": (
        ("none", ""),
        "--gradient_clipping",
        "set train.max_grad_norm in the config instead",
    ),
    "XLA_USE_BF16": (_FALSE, "--tpu", "launch on a GPU or a CPU"),
    "XLA_DOWNCAST_BF16": (_FALSE, "--downcast_bf16", "launch on a GPU or a CPU"),
}
_FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY")
# What `torchrun` and `accelerate launch` set together for each of several processes.
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def require_launch(environment: Mapping[str, str]) -> None:
    """Checks the launcher's variables in `environment`.

    Raises UserError for an option that has no effect here, and for processes that cannot find each other. All processes of a launch
    find the same, so those that are known not to be the first end silently with status 2.
    """
    try:
        _require_options(environment)
        _require_ranks(environment)
    except UserError:
        rank, world = (environment.get(name, "") for name in ("RANK", "WORLD_SIZE"))
        if rank.isdecimal() and world.isdecimal() and 0 < int(rank) < int(world):
            raise SystemExit(2) from None
        raise


def _require_options(environment: Mapping[str, str]) -> None:
    for name, (off, option, advice) in _UNUSED.items():
        value = environment.get(name, "")
        if value not in off and not (off is _FALSE and value.lower() in _FALSE):
            raise UserError(f"the launcher asks for {option} ({name} is {value}), which has no effect here: {advice}.")
    for name in _FLAGS:
        value = environment.get(name, "")
        if value.lower() not in _TRUE + _FALSE:
            raise UserError(f"{name} is {value}: it must be true or false.")


def _require_ranks(environment: Mapping[str, str]) -> None:
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if name in environment:
            try:
                numbers[name] = int(environment[name])
            except ValueError:
                raise UserError(
                    f"{name} is {environment[name]!r}, which is not a number: unset it, or start with `accelerate launch`."
                ) from None
    world = numbers.get("WORLD_SIZE", 1)
    if world < 1:
        raise UserError(f"WORLD_SIZE is {world}: unset it, or start with `accelerate launch`.")
    # LOCAL_RANK -1 is an older way to say "one process".
    given = [name for name in ("RANK", "LOCAL_RANK") if numbers.get(name, -1) >= 0]
    if not given and world == 1:
        return
    given += ["WORLD_SIZE"] if "WORLD_SIZE" in numbers else []
    if missing := [name for name in _RANKS if name not in given and not (name[0] == "M" and environment.get(name))]:
        raise UserError(
            f"{' and '.join(f'{name} is {numbers[name]}' for name in given)}, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: unset {' and '.join(given)} for one process, or start several with "
            "`accelerate launch`."
        )
    for name in ("RANK", "LOCAL_RANK"):
        if numbers[name] >= world:
            raise UserError(f"{name} is {numbers[name]}, but WORLD_SIZE is {world}: start with `accelerate launch`.")
    address, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_PORT is {port!r}: it must be a port number, such as 29500.")
    try:
        socket.getaddrinfo(address, int(port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"MASTER_ADDR is {address}, which cannot be resolved ({reason}): give the address of the machine of rank 0."
        ) from None


@contextlib.contextmanager
def joining() -> Iterator[None]:
    """A block in which the processes find each other: a failure of that is a UserError."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:  # of accelerate, torch.distributed and CUDA
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            raise
        where = ", ".join(f"{name} {os.environ.get(name, 'is not set')}" for name in _RANKS)
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the processes cannot begin together ({where}): {reason}; correct the launch, or choose another "
            "--main_process_port."
        ) from error


@contextlib.contextmanager
def one_report() -> Iterator[None]:
    """A block of which several processes report one error: that of the process that fails first. The others end silently.

    A process that fails makes the others fail too, with errors of the network library; or all find the same error. A stop of the
    first process, which that one reports (`process.run_main`), counts as its failure.
    """
    try:
        yield
    except stopping.Stopped:
        if _has_others() and stopping.is_first():
            _fails_first()
        raise
    except Exception as error:
        if not _has_others() or stopping.cause(error):
            raise
        if not _fails_first():
            raise SystemExit(2) from None
        if isinstance(error, UserError) or not _is_of_the_network(error):
            raise
        raise UserError(
            "another process ended without a message, perhaps because the machine ran out of memory (see the kernel's log): the "
            "same command again continues from the last checkpoint."
        ) from error


def _has_others() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _fails_first() -> bool:
    """Whether no other process has failed before. False too if the process that hosts the record is gone."""
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=10))
        rank = str(torch.distributed.get_rank())
        return store.compare_set("sushi_research/failed", "", rank).decode() == rank
    except RuntimeError:  # of torch.distributed
        return False


def _is_of_the_network(error: Exception) -> bool:
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
