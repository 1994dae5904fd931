"""The batch of every step: `training.global_batch_size`, and the sizes that follow it in `[[training.batch_schedule]]`.

A size is a pure function of the step, so batches, data cursor and learning rate agree after any resume. An entry given
in tokens holds from the first step that begins with at least that many target positions behind it, masked ones
included: what `training.seq_len` and the sizes before it add up to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from titan_growth.config.duration import Duration
from titan_growth.config.schema.growth import GrowthConfig
from titan_growth.config.schema.recipe import LRSchedulerConfig, TrainingConfig


@dataclass(frozen=True)
class BatchSizes:
    """Sequences of each step, steps counted from 1."""

    sizes: tuple[int, ...]
    """In their order; the last one holds to the end of the run, and beyond."""
    starts: tuple[int, ...] = (0,)
    """The step after which each size holds; the first is 0."""
    seq_len: int = 1
    """Tokens of a sequence."""

    @classmethod
    def of(cls, training: TrainingConfig) -> BatchSizes:
        """The sizes of a run; `global_batch_size` has been resolved. Entries may still be out of order."""
        found = cls((training.global_batch_size,), seq_len=training.seq_len)
        for entry in training.batch_schedule:
            at = entry.when
            start = found.steps_of(at)
            found = cls((*found.sizes, entry.global_batch_size), (*found.starts, start), training.seq_len)
        return found

    @classmethod
    def measure_of(cls, training: TrainingConfig, schedule: LRSchedulerConfig, growth: GrowthConfig) -> BatchSizes:
        """What the progress of a learning rate is measured in.

        Sequences under a batch schedule, or where a length is given in tokens; else steps.
        """
        in_tokens = training.batch_schedule or schedule.in_tokens or growth.in_tokens
        return cls.of(training) if in_tokens else STEPS

    def steps_of(self, length: Duration, start: int = 0) -> int:
        """Steps that a length in steps or tokens takes after a step: all that begin before its tokens are reached."""
        if length.unit == "steps":
            return length.count
        return self.step_reaching(self.sequences(start) + self.sequences_of(length)) - start

    def sequences_of(self, length: Duration) -> int:
        """The sequences of a length in tokens, rounded up."""
        return -(-length.count // self.seq_len)

    def size(self, step: int) -> int:
        """Sequences of a step."""
        return next(size for size, start, _ in reversed(list(self.stretches())) if start < step)

    def sequences(self, step: int) -> int:
        """Sequences of all steps up to and including this one."""
        ends = [step if end is None else min(step, end) for _, _, end in self.stretches()]
        return sum(size * max(0, end - start) for size, start, end in zip(self.sizes, self.starts, ends, strict=True))

    def step_reaching(self, num_sequences: int) -> int:
        """The first step after which at least that many sequences have been trained on."""
        for size, start, end in self.stretches():
            step = start + max(0, -(-(num_sequences - self.sequences(start)) // size))
            if end is None or step <= end:
                return step
        raise AssertionError("the last size has no end")

    def step_nearest(self, num_sequences: int) -> int:
        """The step whose end is nearest to so many sequences; of two, the earlier one."""
        step = self.step_reaching(num_sequences)
        over = self.sequences(step) - num_sequences
        return step - 1 if step > 0 and over > 0 and self.size(step) - over <= over else step

    def stretches(self) -> Iterator[tuple[int, int, int | None]]:
        """(size, the step after which it holds, its last step) of each size; the last one has no end."""
        return zip(self.sizes, self.starts, (*self.starts[1:], None), strict=True)


STEPS = BatchSizes((1,))
"""Each step counts as one."""
