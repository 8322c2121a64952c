"""What a launcher asks for in the environment. What has no effect here is refused by name, before anything is loaded.

`accelerate launch` exports every option, also those that nobody gave. Those that mean "off" are accepted. In use are the number
and addresses of the processes, --mixed_precision (precision.py), --cpu, --gpu_ids, --enable_cpu_affinity, --debug, and the number
of CPU threads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed.distributed_c10d as c10d

from sushi_research import stopping, terminal
from sushi_research.errors import UserError

START_SECONDS = 300  # the machines of a launch may start minutes apart
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
# accelerate reads these as numbers too: those of MPI, on a CPU.
_NUMBERS = (
    *("LOCAL_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    *("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def require_launch(environment: Mapping[str, str]) -> None:
    """Checks the launcher's variables in `environment`.

    Raises UserError for an option that has no effect here, and for processes that cannot find each other. All processes of a launch
    find the same, so those that are known not to be the first end silently with status 2.
    """
    try:
        _require_options(environment)
        _require_ranks(environment)
    except UserError:
        if not stopping.is_first(environment):
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
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", *_NUMBERS):
        if name in environment:
            numbers[name] = _number(name, environment)
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
    if "OMP_NUM_THREADS" in environment:
        _number("OMP_NUM_THREADS", environment)
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


def _number(name: str, environment: Mapping[str, str]) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(
            f"{name} is {environment[name]!r}, which is not a number: unset it, or start with `accelerate launch`."
        ) from None


@contextlib.contextmanager
def joining() -> Iterator[None]:
    """A block in which the processes find each other. A failure of that is a UserError.

    It takes `START_SECONDS` at most: a process whose others never start prints the error and ends with status 2. A signal ends it
    too. Both are so although the process waits in C code, where Python calls no signal handler. No process leaves the block before
    all have joined: one that failed right after it would break the connections that a slower one is still making.
    """
    if max(int(os.environ.get(name, "1")) for name in _SIZES) < 2:
        yield
        return
    late = threading.Timer(START_SECONDS, _give_up)
    late.daemon = True
    late.start()
    # torch.distributed reads it: a barrier at the end of init_process_group.
    os.environ.setdefault("TORCH_DIST_INIT_BARRIER", "1")
    try:
        with stopping.on_signals(None):
            yield
            _leave_after_the_others()
    except (RuntimeError, ValueError, OSError) as error:  # of accelerate, torch.distributed and CUDA
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:  # accelerate sets it to that of MPI, on a CPU only
            raise
        raise UserError(_apart(" ".join(str(error).split())[:300])) from error
    finally:
        late.cancel()


def _leave_after_the_others() -> None:
    """In process 0, which may host the store of the processes: waits until no other one reads it any more.

    The barrier of torch.distributed ends with a read, which would fail if the host ended at once.
    """
    if not _has_others():
        return
    store, rank, world = c10d._get_default_store(), torch.distributed.get_rank(), torch.distributed.get_world_size()
    keys = [f"sushi_research/joined/{number}" for number in range(1, world)]
    if rank:
        store.set(keys[rank - 1], "")
    else:
        store.wait(keys, timedelta(seconds=START_SECONDS))


def _give_up() -> None:
    terminal.say(f"error: {_apart(f'the others did not come within {START_SECONDS} seconds')}", file=sys.stderr)
    os._exit(2)


def _apart(reason: str) -> str:
    where = ", ".join(f"{name} {os.environ.get(name, 'is not set')}" for name in _RANKS)
    return f"the processes cannot begin together ({where}): {reason}; correct the launch, or choose another --main_process_port."


@contextlib.contextmanager
def one_report() -> Iterator[None]:
    """A block whose end several processes report once: the error of the process that fails first, or the stop of any process.

    A process that fails or is stopped makes the others fail too, with errors of the network library; or all find the same error.
    They end silently. Only the first process reports a stop (`process.run_main`), also one of another process.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not _has_others():
            raise
        stop = stopping.cause(error)
        interrupted = isinstance(error, KeyboardInterrupt)  # also one from a handler that a library has put in place
        before = _first_end(stop.number if stop else signal.SIGINT if interrupted else 0)
        if stop or interrupted:
            raise
        if before is None:
            if isinstance(error, UserError) or not _is_of_the_network(error):
                raise
            raise UserError(
                "another process ended without a message, perhaps because the machine ran out of memory (see the kernel's log): "
                "the same command again continues from the last checkpoint."
            ) from error
        rank, number = before
        if not number:
            raise SystemExit(2) from None
        if not stopping.is_first():
            raise SystemExit(128 + number) from None
        if not _is_of_the_network(error):
            raise
        name = signal.Signals(number).name
        raise stopping.Stopped(number, f"{name} to process {rank}") from None


def _has_others() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _first_end(number: int) -> tuple[int, int] | None:
    """Records how this process ends: by the signal `number`, or 0 for an error. Returns None if it is the first one to end, else
    (rank, number) of the first one. (0, 0) if the process that hosts the record is gone.
    """
    rank = torch.distributed.get_rank()
    try:
        store = c10d._get_default_store()
        store.set_timeout(timedelta(seconds=3))
        with terminal.without_errors_of_c():  # torch prints its C++ stack if that process is gone
            found = store.compare_set("sushi_research/first_end", "", f"{rank} {number}").decode()
        first, with_number = map(int, found.split())
    except RuntimeError:  # of torch.distributed
        return 0, 0
    return None if first == rank else (first, with_number)


def _is_of_the_network(error: Exception) -> bool:
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
