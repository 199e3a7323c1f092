"""An Optuna study as a queue: every configuration is run until it has one complete result, and never twice.

A configuration may have several trials over time. The rules that keep them apart need no lock but the storage's own atomic step
from WAITING to RUNNING, and its refusal to change a finished trial:

* A worker that has taken a trial gives it up if another trial of the same configuration is complete, or open and older.
* The trial of a dead worker is marked FAIL and the configuration is enqueued again. If the worker was not dead after all, its
  result is refused, because the trial has ended.
"""

import json
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_ntk.sweep.configurations import Configuration, configuration_key
from lightning_ntk.sweep.entry import (
    ATTEMPT,
    CONFIGURATION,
    DUPLICATE,
    ERROR,
    INTERRUPTED,
    KEY,
    ROWS,
    Entry,
    Row,
    ended_in_error,
    entry_of,
)
from lightning_ntk.sweep.liveness import HEARTBEAT, WORKER, Identity, Observer

# User attribute of a study.
_MARK = "lightning_ntk sweep"
# MySQL keeps 65535 bytes of an attribute.
_CHUNK = 30_000
# Of the curve that Optuna's dashboard shows, each one a write; the rows have all of them.
_CURVE_POINTS = 100


@dataclass(frozen=True)
class Task:
    """A trial taken from the queue."""

    trial_id: int
    number: int
    configuration: Configuration


class Queue:
    """The configurations of one study in a storage.

    Args:
        storage: An Optuna storage, see `open_storage`.
        name: Of the study.
        objective: Identity of the objective; a study of another objective is refused. None: open what is there.

    Raises:
        ValueError: If the study was made by something else, or with another objective, or, without `objective`, not at all.
    """

    def __init__(self, storage: BaseStorage, name: str, objective: str | None = None) -> None:
        self.storage, self.name = storage, name
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self.study_id = self._open(objective)
        finally:
            optuna.logging.set_verbosity(verbosity)

    def _open(self, objective: str | None) -> int:
        names = {study.study_name: study._study_id for study in self.storage.get_all_studies()}
        if self.name not in names:
            if objective is None:
                raise ValueError(
                    f"Expected a sweep named {self.name!r} in the storage but it has {sorted(names) or 'none at all'}. "
                    "Run it first, or give the `name` and `storage` with which it was run."
                )
            try:
                names[self.name] = self.storage.create_new_study([StudyDirection.MINIMIZE], self.name)
                self.storage.set_study_user_attr(names[self.name], _MARK, objective)
            except DuplicatedStudyError:  # another process was faster
                names[self.name] = self.storage.get_study_id_from_name(self.name)
        study_id = names[self.name]
        made_with = self.storage.get_study_user_attrs(study_id).get(_MARK)
        if made_with is None and objective is not None and not self.storage.get_all_trials(study_id, deepcopy=False):
            # Its maker was killed, or is about to write the mark.
            self.storage.set_study_user_attr(study_id, _MARK, objective)
        elif made_with is None:
            raise ValueError(
                f"Expected the study {self.name!r} to be a sweep of lightning_ntk but something else made it. Nothing was "
                "changed: give another `name` or `storage`."
            )
        elif objective is not None and made_with != objective:
            raise ValueError(
                f"Expected the sweep {self.name!r} to be one of the objective {objective} but it was made with {made_with}. "
                "Nothing was changed: give another `name` or `storage`."
            )
        return study_id

    def _trials(self) -> list[FrozenTrial]:
        # A trial without a key was added by hand, in a notebook or the dashboard.
        trials = self.storage.get_all_trials(self.study_id, deepcopy=False)
        return [trial for trial in trials if KEY in trial.user_attrs]

    def entries(self, *, rows: bool = False) -> dict[str, Entry]:
        """Every configuration that was ever enqueued, by key, in the order of their first trials; reads the storage once."""
        groups: dict[str, list[FrozenTrial]] = {}
        for trial in self._trials():
            groups.setdefault(trial.user_attrs[KEY], []).append(trial)
        return {key: entry_of(trials, rows) for key, trials in groups.items()}

    def enqueue(self, configurations: Sequence[Configuration], *, retry_failed: bool = False) -> int:
        """Adds trials for those configurations, and those of the storage, that need one; returns how many were unknown.

        Args:
            configurations: Distinct ones.
            retry_failed: Whether configurations that failed are tried again.
        """
        entries = self.entries()
        unknown = {configuration_key(c): c for c in configurations}
        new = [key for key in unknown if key not in entries]
        for key in new:
            self._add(unknown[key], key, attempt=0)
        for key, entry in entries.items():
            failed = entry.state == "failed" and retry_failed
            if entry.state == "missing" or failed:
                self._add(entry.configuration, key, attempt=entry.attempt + failed)
        return len(new)

    def _add(self, configuration: Configuration, key: str, attempt: int) -> None:
        # Numbers are Optuna parameters, for its plots; a parameter must have one kind of distribution in all trials, and a
        # choice the same options, which a grid that grows cannot promise. Other values are seen as user attributes.
        numbers = {name: float(value) for name, value in configuration.items() if _is_number(value)}
        others = {name: value for name, value in configuration.items() if name not in numbers}
        distributions: dict[str, BaseDistribution] = {name: FloatDistribution(v, v) for name, v in numbers.items()}
        trial = optuna.trial.create_trial(
            state=TrialState.WAITING,
            params=numbers,
            distributions=distributions,
            user_attrs={
                KEY: key,
                CONFIGURATION: configuration,
                ATTEMPT: attempt,
                **{f"parameter {name}": value for name, value in others.items()},
            },
        )
        self.storage.create_new_trial(self.study_id, template_trial=trial)

    def knows(self, worker: str) -> bool:
        """Whether the worker with this id ever took a trial."""
        return any(trial.user_attrs.get(WORKER, {}).get("id") == worker for trial in self._trials())

    def claim(self, identity: Identity) -> Task | None:
        """Takes the oldest waiting trial; None if nothing waits."""
        for trial in self._trials():
            if trial.state != TrialState.WAITING:
                continue
            try:
                if self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING) and self._keep(
                    trial, identity
                ):
                    return Task(trial._trial_id, trial.number, dict(trial.user_attrs[CONFIGURATION]))
            except UpdateFinishedTrialError:
                continue
        return None

    def _keep(self, trial: FrozenTrial, identity: Identity) -> bool:
        try:
            self.storage.set_trial_user_attr(trial._trial_id, WORKER, identity)
            rival = self._rival(trial)
            if rival is not None:
                self.storage.set_trial_user_attr(trial._trial_id, DUPLICATE, rival)
                self.storage.set_trial_state_values(trial._trial_id, TrialState.PRUNED)
        except (KeyboardInterrupt, SystemExit):
            self.release(trial._trial_id, interrupted=True)
            raise
        return rival is None

    def _rival(self, mine: FrozenTrial) -> int | None:
        """The trial that has, or will have, the result for which `mine` was enqueued."""
        for trial in self._trials():
            if trial.user_attrs[KEY] != mine.user_attrs[KEY] or trial.number == mine.number:
                continue
            open_and_older = not trial.state.is_finished() and trial.number < mine.number
            failed_already = ended_in_error(trial) and trial.user_attrs[ATTEMPT] >= mine.user_attrs[ATTEMPT]
            if trial.state == TrialState.COMPLETE or open_and_older or failed_already:
                return trial.number
        return None

    def beat(self, task: Task, now: float) -> None:
        """Says that the task is being worked on."""
        self.storage.set_trial_user_attr(task.trial_id, HEARTBEAT, now)

    def complete(self, task: Task, rows: Sequence[Row], metric: str) -> bool:
        """Stores the result; False if the trial was given to another worker in the meantime, whose result will count.

        Args:
            task: What `claim` returned.
            rows: One for each measurement.
            metric: The scalar that Optuna and its dashboard show as the value of the trial, from the last row.
        """
        text = json.dumps(rows)
        try:
            for part, start in enumerate(range(0, len(text), _CHUNK)):
                self.storage.set_trial_user_attr(task.trial_id, f"{ROWS}/{part}", text[start : start + _CHUNK])
            for row in rows[:: math.ceil(len(rows) / _CURVE_POINTS)]:
                if "step" in row and metric in row:
                    self.storage.set_trial_intermediate_value(task.trial_id, int(row["step"]), row[metric])
            value = rows[-1].get(metric, math.nan)
            # Optuna has no complete trial whose value is not a number; the rows keep what it was.
            self.storage.set_trial_state_values(
                task.trial_id, TrialState.COMPLETE, [math.inf if math.isnan(value) else value]
            )
        except UpdateFinishedTrialError:
            return False
        return True

    def fail(self, task: Task, error: BaseException) -> bool:
        """Stores the traceback of a failure; False as in `complete`."""
        text = "".join(traceback.format_exception(error))
        try:
            # The end of a traceback says most.
            self.storage.set_trial_user_attr(task.trial_id, ERROR, text[-_CHUNK:])
            self.storage.set_trial_state_values(task.trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return False
        return True

    def release(self, trial_id: int, *, interrupted: bool) -> bool:
        """Ends a trial without a result, so that its configuration is enqueued again; False if it has ended already.

        Args:
            trial_id: Of a running trial.
            interrupted: Whether its worker was asked to stop, which does not count as a death.
        """
        try:
            if interrupted:
                self.storage.set_trial_user_attr(trial_id, INTERRUPTED, True)
            self.storage.set_trial_state_values(trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return False
        return True

    def recover(self, observer: Observer, *, dead: Mapping[str, bool] | None = None) -> list[Configuration]:
        """Releases the trials of workers that are gone, and returns their configurations; `enqueue` adds them again.

        Args:
            observer: Judges workers of which nothing else is known.
            dead: Ids of workers known to have ended, and whether they were asked to.
        """
        lost = []
        for trial in self._trials():
            if trial.state != TrialState.RUNNING:
                continue
            worker = trial.user_attrs.get(WORKER, {}).get("id")
            known_dead = dead is not None and worker in dead
            interrupted = bool(dead and dead.get(worker, False))
            gone = known_dead or observer.is_gone(trial.number, trial.user_attrs)
            if gone and self.release(trial._trial_id, interrupted=interrupted):
                lost.append(dict(trial.user_attrs[CONFIGURATION]))
        return lost


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53)
