"""A judgement as one number, for training: right and parallel first, fast second."""

from dataclasses import dataclass

from fourfold_hpc_coder.doors.judging import OpenJudge
from fourfold_hpc_coder.judge.judge import Judgement
from fourfold_hpc_coder.vocabulary import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """The worth of an answer: `counts` where it counts, and up to `speed` more by its efficiency.

    The judge owns both: the verdict and the clock. Efficiency is taken to be 1 at most, so that no luck of a
    clock is worth more than a perfect speed-up. The parts for less than a right and parallel answer are 0
    by default: whoever is paid for a program that merely builds learns to write those.
    """

    counts: float = 1.0
    """Of an answer that is right, parallel as asked and free of races."""
    speed: float = 1.0
    """Of an efficiency of 1 (speed-up over the best sequential time, per processor), added to `counts`."""
    right: float = 0.0
    """Of right answers that do not count: not parallel, or with a race."""
    builds: float = 0.0
    """Of anything else that builds."""

    def of(self, judge: OpenJudge, judgement: Judgement, model: Model) -> float:
        """The reward of a judgement on an answer in a model.

        Args:
            judge: the one whose judgement it is; it knows the launches.
            judgement: on the answer.
            model: parallel model that was asked for.
        """
        if judgement.sample.counts:
            return self.counts + self.speed * min(1.0, judge.efficiency(judgement, model))
        if judgement.verdict in ("not parallel", "race"):
            return self.right
        return self.builds if judgement.sample.built else 0.0
