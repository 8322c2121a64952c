"""Runs micro-batches from recordings, one for each shape, made when the shape first appears (docs/fast_step.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sushi_research.errors import first_line
from sushi_research.fast.batch import Batch
from sushi_research.fast.decision import MOST_SHAPES
from sushi_research.fast.static_batch import ShapeKey, StaticBatch, shape_key

# How far the first replay may be from the same micro-batch run by Python. Kernels that are not deterministic differ by 3e-3 in the
# gradient on an H200, and the losses not at all; a recording that misses something is far off.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 0.1


class Graphs(Protocol):
    """What makes recordings: `CudaGraphs`, or a stand-in for it in tests on a CPU."""

    def warm_up(self, function: Callable[[], None]) -> None: ...
    def capture(self, function: Callable[[], None]) -> Callable[[], None]: ...
    def release(self) -> None: ...
    def is_tight(self) -> bool: ...
    def random_state(self) -> torch.Tensor: ...
    def set_random_state(self, state: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class StepBuffers:
    """The tensors that a micro-batch writes to, at addresses that do not change.

    `gradients` are the fp32 sums, `losses` those of the samples of the last micro-batch, `others` all other sums. `discard` clears
    the gradients of a micro-batch that did not end; `require_in_place` asserts that nothing has moved.
    """

    gradients: Sequence[torch.Tensor]
    losses: torch.Tensor
    others: Sequence[torch.Tensor]
    discard: Callable[[], None]
    require_in_place: Callable[[], None]

    @property
    def all(self) -> list[torch.Tensor]:
        return [*self.gradients, self.losses, *self.others]


@dataclass(frozen=True)
class Saved:
    """Copies of the buffers, and of the random state."""

    tensors: list[torch.Tensor]
    random: torch.Tensor


class Recorder:
    """Runs micro-batches: `micro_batch(batch)` from recordings, or as it is where there can be none.

    What counts is always the replay, never the run before it, so a resumed run does the same arithmetic. At most `most` shapes
    are recorded; with 0, all run as they are, and `graphs` may be None if there is no trial. `wait` waits until no other thread
    uses the GPU; `say` prints a line.
    """

    def __init__(
        self,
        micro_batch: Callable[[Any], None],
        buffers: StepBuffers,
        graphs: Graphs | None,
        *,
        wait: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = print,
        most: int = MOST_SHAPES,
    ) -> None:
        self._micro_batch, self._buffers, self._graphs = micro_batch, buffers, graphs
        self._wait, self._say, self._most = wait, say, most
        self._static: dict[ShapeKey, StaticBatch] = {}  # of the shapes whose recording was right
        self._replays: dict[ShapeKey, Callable[[], None]] = {}
        self._unrecorded: set[ShapeKey] = set()
        self._is_full = False

    def __call__(self, batch: Batch) -> None:
        """Runs the micro-batch."""
        if not self._most:
            self._micro_batch(batch)
            return
        key, why = shape_key(batch), None
        if key not in self._unrecorded:
            if key in self._static or len(self._static) < self._most:
                why = self._record(key, batch)
                if why is None:
                    return
                self._say(f"micro-batches like {_title(batch)} run unrecorded: {why}")
            elif not self._is_full:
                self._is_full = True
                self._say(
                    f"{self._most} shapes of micro-batches are recorded, which is the most: others, such as {_title(batch)}, run "
                    "unrecorded"
                )
            self._unrecorded.add(key)
        self._run_unrecorded(batch)

    def try_out(self, batch: Batch) -> str | None:
        """Runs the micro-batch, and undoes what it did. Returns why it cannot be recorded; None if it was, or if none is to be.

        Raises torch.OutOfMemoryError if there is too little memory for it.
        """
        saved, why = self._save(), None
        if self._most:
            why = self._record(shape_key(batch), batch)
            if why is not None:
                self.stop()
        if not self._most:
            self._micro_batch(batch)
        self._restore(saved)
        return why

    def stop(self) -> None:
        """From here on all micro-batches run unrecorded."""
        self._most = 0
        self._release()

    def make_room(self) -> None:
        """Releases the recordings if they leave too little memory for evaluating and sampling. They are made again when needed."""
        if self._replays and self._graphs.is_tight():
            self._release()

    def forget(self) -> None:
        """Releases the recordings, because micro-batches compute something else from here on. They are made again when needed."""
        self._release()

    def _record(self, key: ShapeKey, batch: Batch) -> str | None:
        """Runs the micro-batch from its recording, which is made first if there is none. Returns why that is not possible.

        All is then as it was before the call. torch.OutOfMemoryError if the micro-batch does not fit by itself either.
        """
        static = self._static.get(key)
        if static is None:
            return self._first(key, batch)
        static.fill(batch)
        if key not in self._replays:  # it was released
            why = self._capture(key, static, self._save())
            if why is not None:
                return why
        self._buffers.require_in_place()
        self._replays[key]()
        return None

    def _first(self, key: ShapeKey, batch: Batch) -> str | None:
        """Runs a micro-batch of a new shape: once by Python, then from its recording, and compares both."""
        self._buffers.require_in_place()
        static, saved = StaticBatch(batch), self._save()
        why = self._with_room(lambda: self._warm_up(static, batch), saved)
        if why is None:
            expected = self._save()
            why = self._capture(key, static, saved)
            if why is None:
                self._restore(saved)
                self._replays[key]()
                why = self._difference(saved, expected, len(batch))
        if why is None:
            self._static[key] = static
        else:
            self._replays.pop(key, None)
            self._restore(saved)
        return why

    def _warm_up(self, static: StaticBatch, batch: Batch) -> str | None:
        """Runs the micro-batch by Python, alone in the buffers."""
        for tensor in self._buffers.all:
            tensor.zero_()
        with static.noting_draws(batch):
            # A mistake in the step itself shows again, with its traceback, when the batch runs unrecorded.
            return _failure(lambda: self._graphs.warm_up(lambda: self._micro_batch(static)))

    def _capture(self, key: ShapeKey, static: StaticBatch, saved: Saved) -> str | None:
        def capture() -> None:
            self._replays[key] = self._graphs.capture(lambda: self._micro_batch(static))

        self._wait()
        try:
            why = self._with_room(lambda: _failure(capture), saved)
        except torch.OutOfMemoryError:
            why = "there is too little memory for its recording"
        if why is not None:
            self._buffers.discard()
            self._release()  # earlier recordings do not survive a capture that fails (`CudaGraphs.capture`)
        return why

    def _with_room(self, attempt: Callable[[], str | None], saved: Saved) -> str | None:
        """`attempt()`, and if memory runs out beside recordings, once more without them, from the saved buffers."""
        if self._replays:
            try:
                return attempt()
            except torch.OutOfMemoryError:
                pass  # its traceback holds tensors, which are free once this block is left
            self._restore(saved)
            self._release()
        return attempt()

    def _run_unrecorded(self, batch: Batch) -> None:
        if not self._replays:
            self._micro_batch(batch)
            return
        saved = self._save(on_device=True)
        try:
            self._micro_batch(batch)
            return
        except torch.OutOfMemoryError:
            pass
        self._restore(saved)
        self._say(
            "the memory does not suffice for recordings and unrecorded micro-batches: all run unrecorded from here on"
        )
        self.stop()
        self._micro_batch(batch)

    def _release(self) -> None:
        self._replays.clear()
        if self._graphs is not None:
            self._graphs.release()

    def _save(self, *, on_device: bool = False) -> Saved:
        # On the CPU they take no memory from the step; on the device they take no time.
        tensors = [each.clone() if on_device else each.to("cpu", copy=True) for each in self._buffers.all]
        return Saved(tensors, self._graphs.random_state())

    @torch.no_grad()
    def _restore(self, saved: Saved) -> None:
        self._buffers.discard()
        for tensor, copy in zip(self._buffers.all, saved.tensors, strict=True):
            tensor.copy_(copy)
        self._graphs.set_random_state(saved.random)

    def _difference(self, before: Saved, expected: Saved, size: int) -> str | None:
        """How the replay, which began at `before`, differs from the run by Python, which began at zero; None if it does not."""
        found = [tensor.cpu() for tensor in self._buffers.all]
        count = len(self._buffers.gradients)
        losses, wanted = found[count][:size], expected.tensors[count][:size]
        if not torch.allclose(losses, wanted, rtol=LOSS_TOLERANCE, atol=1e-6, equal_nan=True):
            return f"its first replay gave the losses {losses.tolist()} instead of {wanted.tolist()}"
        for after, start, alone in zip(found[:count], before.tensors, expected.tensors, strict=False):
            norm, difference = float(alone.norm()), float((after - start - alone).norm())
            # Gradients that overflow in fp16 are compared by nothing: the loss scaler skips the step.
            if norm < float("inf") and not difference <= GRADIENT_TOLERANCE * norm:
                return f"its first replay gave a gradient that is off by {difference / (norm or 1.0):.2g}"
        return None


def _failure(attempt: Callable[[], None]) -> str | None:
    """The error of `attempt()` as text, without its traceback, which would hold tensors; torch.OutOfMemoryError is raised."""
    try:
        attempt()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}".rstrip(".")
    return None


def _title(batch: Batch) -> str:
    """A micro-batch by what the user knows of its shape: "4 of 1024x768"."""
    height, width = batch.mean.shape[-2:]
    return f"{len(batch)} of {8 * width}x{8 * height}"
