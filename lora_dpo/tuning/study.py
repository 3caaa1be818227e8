"""Candidates drawn by Optuna, kept in SQLite: a tree-structured Parzen estimator (Bergstra et al. 2011, NeurIPS 24,
section 4), and a pruner that ends what lies behind the median of the others at the same place (Golovin et al. 2017,
section 3.2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_dpo.tuning.space import Axis, Values

STARTUP = 3
"""Candidates before the estimator has something to go by: the recipe's own, and two that are drawn at random."""
COMPARED = 5
"""Candidates before any is ended early for what the others came to."""


class Asked:
    """A candidate that Optuna drew, and what it is told about it."""

    def __init__(self, values: dict[str, Any], study: Any = None, trial: Any = None) -> None:
        self.values, self.study, self.trial = values, study, trial

    def prune(self, look: int, value: float) -> bool:
        """Note what was seen in the middle; whether it lies behind the others."""
        if self.trial is None:
            return False
        self.trial.report(value, look)
        return bool(self.trial.should_prune())

    def tell(self, value: float | None) -> None:
        """Note what it came to; None if it was ended early."""
        from optuna.trial import TrialState

        if self.trial is not None and value is None:
            self.study.tell(self.trial, state=TrialState.PRUNED)
        elif self.trial is not None:
            self.study.tell(self.trial, value)

    def drop(self) -> None:
        """Take it back: it will not be tried."""
        from optuna.trial import TrialState

        if self.trial is not None:
            self.study.tell(self.trial, state=TrialState.FAIL)


class Study:
    """The candidates of a search, drawn one by one; kept in SQLite.

    The draw of a candidate depends on its number and on what the earlier ones came to, and on nothing else: a search
    that was interrupted draws as one that was not.

    Args:
        own: the recipe's own values, the first candidate, whether or not they lie on the axes.
    """

    def __init__(self, path: Path, axes: Sequence[Axis], own: Values, seed: int) -> None:
        self.path, self.axes, self.own, self.seed = path, axes, dict(own), seed
        self.storage: Any = None

    def ask(self, number: int, last: tuple[Values, float | None] | None = None, *, draw: int = 0) -> Asked:
        """The candidate of that number.

        Args:
            draw: how many others of that number were drawn before and dropped.
            last: values of the candidate before, and what it came to (None if it was ended early): a process may have
                ended after that was kept and before `Asked.tell`.
        """
        from optuna.trial import TrialState

        study = self._open(self.seed * 10_007 + number + 1_000_003 * draw)
        for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            drawn = {axis.key: _decoded(axis, left.params[axis.key]) for axis in self.axes if axis.key in left.params}
            if last is not None and drawn == last[0]:
                Asked(drawn, study, left.number).tell(last[1])
            else:
                study.tell(left.number, state=TrialState.FAIL)  # it was interrupted: it is drawn again, as it was
        if number == 0:
            inside = all(axis.key in self.own and axis.holds(self.own[axis.key]) for axis in self.axes)
            if not inside:  # Optuna cannot learn from what is not on its axes
                return Asked(dict(self.own))
            if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                study.enqueue_trial({axis.key: _encoded(axis, self.own[axis.key]) for axis in self.axes})
        trial = study.ask()
        values = {axis.key: _suggested(trial, axis) for axis in self.axes}
        return Asked(values, study, trial)

    def _open(self, seed: int) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        if self.storage is None:
            self.storage = optuna.storages.RDBStorage(f"sqlite:///{self.path.absolute().as_posix()}")
        return optuna.create_study(
            study_name="search",
            storage=self.storage,
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=COMPARED, n_min_trials=3),
            direction="maximize",
            load_if_exists=True,
        )


def _encoded(axis: Axis, value: Any) -> Any:
    """A value as Optuna knows it: of choices the place among them, since a choice may be a list."""
    return axis.choices.index(value) if axis.choices else value


def _decoded(axis: Axis, value: Any) -> Any:
    return axis.choices[value] if axis.choices else value


def _suggested(trial: Any, axis: Axis) -> Any:
    if axis.choices:
        return _decoded(axis, trial.suggest_categorical(axis.key, list(range(len(axis.choices)))))
    if axis.whole:
        return trial.suggest_int(axis.key, int(axis.low), int(axis.high), log=axis.log)
    return trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log)
