"""Which candidates are expected to end in the time that a search has, by those that are over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lora_dpo.tuning.space import Values
from lora_dpo.tuning.trials import Trial


@dataclass(frozen=True)
class TimeLimit:
    """The time for all of a search.

    Args:
        minutes: None for no end.
        more: runs that come after the candidates.
        measurings: how many times as long as measuring a candidate what is measured at the end takes.
    """

    minutes: float | None
    more: int = 0
    measurings: float = 0.0

    def allows(self, values: Values, *, used: float, done: Sequence[Trial]) -> bool:
        """Whether the search is expected to be over in time with one more candidate; the first is always tried.

        Args:
            used: seconds until now.
            done: the candidates that are over. By the median of those that were measured one more is expected to cost
                its steps, and being measured. The reference is scored for the first one, and again only where it
                was for all after it: `engine.reference_cache` is off.
        """
        if self.minutes is None or not done:
            return True
        whole = [trial for trial in done if trial.measured]
        if not whole:
            return used <= self.minutes * 60
        step = median((trial.seconds - trial.measuring - trial.scoring) / max(1, trial.steps) for trial in whole)
        scoring = min((trial.scoring for trial in whole[1:]), default=0.0)
        measuring = median(trial.measuring for trial in whole)
        steps = float(values.get("trainer.max_steps") or whole[0].planned)
        runs = 1 + self.more
        return used + runs * (steps * step + scoring) + (runs + self.measurings) * measuring <= self.minutes * 60
