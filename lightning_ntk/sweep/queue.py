"""An Optuna study as a queue of configurations.

Every configuration runs until it has exactly one complete result.

A configuration may have several trials over time. The rules that keep them apart need no lock except the storage's own atomic
step from WAITING to RUNNING, and its refusal to change a finished trial:

* A worker gives up the trial it has taken if another trial of the same configuration is complete, or open and older.
* The trial of a dead worker is marked FAIL and the configuration is enqueued again. If the worker was alive after all, its
  result is refused, because the trial has ended.

Optuna's own heartbeat and retries are not enough: they ignore a worker that dies before its first beat, need a database, and
copy the attributes of the failed trial.
"""

import contextlib
import json
import math
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from lightning_ntk.sweep.configurations import Configuration, configuration_key
from lightning_ntk.sweep.liveness import HEARTBEAT, WORKER, Identity, Observer
from lightning_ntk.sweep.storage import open_study

# A configuration whose workers died this often is given up: most likely it kills them, by its need of memory.
MAX_DEATHS = 3

# User attributes of trials.
_KEY, _CONFIGURATION, _ATTEMPT, _ROWS = "key", "configuration", "attempt", "rows"
_ERROR, _DEATH, _INTERRUPTED, _DUPLICATE = "error", "death", "interrupted", "duplicate of"
_VERDICT, _REASON = "verdict", "verdict because"
# MySQL keeps 65535 bytes of an attribute.
_CHUNK = 30_000
# Points of the curve and scalars in Optuna's dashboard, each of them a write; the rows have all of them.
_CURVE_POINTS, _SCALARS = 100, 30

Row = dict[str, float]
State = Literal["complete", "failed", "running", "waiting", "missing"]


@dataclass(frozen=True)
class Entry:
    """What the trials of one configuration say about it."""

    configuration: Configuration
    state: State  # "missing": it must be enqueued (again)
    trial: int  # number of the trial that decides the state
    attempt: int  # how often it was tried again on request
    rows: list[Row]  # the complete result, one row for each measurement
    error: str | None  # traceback of the failure
    worker: Identity | None  # the process that runs or ran the trial
    seconds: float | None  # duration of the complete trial
    verdict: tuple[str, str] | None = None  # word and reason, of a monitor; sweeps of earlier versions have none

    @property
    def reason(self) -> str:
        """The failure in one line.

        It is the end of its traceback, with the indented lines that belong to it.
        """
        return " ".join(re.split(r"\n(?=\S)", (self.error or "").strip())[-1].split())


@dataclass(frozen=True)
class Task:
    """A trial taken from the queue."""

    trial_id: int
    number: int
    configuration: Configuration


class Queue:
    """The configurations of one study.

    The study must exist unless the identity of its `objective` is given.
    """

    def __init__(self, storage: BaseStorage, name: str, objective: str | None = None) -> None:
        self.storage, self.name = storage, name
        self.study_id = open_study(storage, name, objective)

    def entries(self, *, rows: bool = False) -> dict[str, Entry]:
        """Every configuration that was ever enqueued, by key.

        With `rows` it includes the rows of the results.
        """
        groups: dict[str, list[FrozenTrial]] = {}
        for trial in self._trials():
            groups.setdefault(trial.user_attrs[_KEY], []).append(trial)
        return {key: _entry(trials, rows) for key, trials in groups.items()}

    def counts(self) -> Counter[State]:
        """How many configurations are in each state."""
        return Counter(entry.state for entry in self.entries().values())

    def enqueue(self, configurations: Sequence[Configuration] = (), *, retry_failed: bool = False) -> int:
        """Adds a trial for every configuration that needs one.

        It covers these configurations and the storage's. Returns how many were unknown.
        """
        entries = self.entries()
        wanted = {configuration_key(configuration): configuration for configuration in configurations}
        new = [key for key in wanted if key not in entries]
        for key in new:
            self._add(wanted[key], key, attempt=0)
        for key, entry in entries.items():
            again = entry.state == "failed" and retry_failed
            if entry.state == "missing" or again:
                self._add(entry.configuration, key, attempt=entry.attempt + again)
        return len(new)

    def claim(self, identity: Identity) -> Task | None:
        """Takes the oldest waiting trial; None if nothing waits."""
        for trial in self._trials():
            if trial.state != TrialState.WAITING:
                continue
            try:
                taken = self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
                if taken and self._keep(trial, identity):
                    return Task(trial._trial_id, trial.number, dict(trial.user_attrs[_CONFIGURATION]))
            except UpdateFinishedTrialError:
                continue
        return None

    def beat(self, task: Task, now: float) -> None:
        """Records that the task's worker is alive."""
        self.storage.set_trial_user_attr(task.trial_id, HEARTBEAT, now)

    def complete(self, task: Task, rows: Sequence[Row], metric: str, verdict: tuple[str, str] | None = None) -> bool:
        """Stores a result; False if the trial has ended, so another worker's counts.

        Optuna's dashboard shows the scalar `metric` as the trial's curve and, from the last row, as its value, and the other
        scalars of the last row as user attributes.
        """
        text = json.dumps(rows)
        parts = {f"{_ROWS}/{part}": text[i : i + _CHUNK] for part, i in enumerate(range(0, len(text), _CHUNK))}
        shown = {f"scalar {tag}": rows[-1][tag] for tag in list(rows[-1])[:_SCALARS]}
        judged = {} if verdict is None else {_VERDICT: verdict[0], _REASON: verdict[1]}
        value = rows[-1].get(metric, math.nan)
        with contextlib.suppress(UpdateFinishedTrialError):
            for row in rows[:: math.ceil(len(rows) / _CURVE_POINTS)]:
                if "step" in row and metric in row:
                    self.storage.set_trial_intermediate_value(task.trial_id, int(row["step"]), row[metric])
        # Optuna has no complete trial whose value is not a number; the rows keep what it was.
        value = math.inf if math.isnan(value) else value
        self._name_value(metric)
        return self._end(task.trial_id, TrialState.COMPLETE, {**parts, **shown, **judged}, value)

    def fail(self, task: Task, error: BaseException) -> bool:
        """Stores the traceback of a failure; False if the trial has ended."""
        text = "".join(traceback.format_exception(error))
        return self._end(task.trial_id, TrialState.FAIL, {_ERROR: text[-_CHUNK:]})  # its end says most

    def release(self, trial_id: int, *, death: str | None = None) -> None:
        """Ends a trial without a result.

        Its worker was asked to stop, or died as `death` says.
        """
        self._end(trial_id, TrialState.FAIL, {_INTERRUPTED: True} if death is None else {_DEATH: death})

    def recover(self, observer: Observer, dead: Mapping[str, str | None] | None = None) -> None:
        """Enqueues again what dead workers were running.

        `dead` maps known dead workers to how they died, or to None if they were asked to stop.
        """
        dead = dead or {}
        for trial in self._trials():
            if trial.state == TrialState.RUNNING:
                worker = trial.user_attrs.get(WORKER, {}).get("id")
                if worker in dead or observer.is_gone(trial.number, trial.user_attrs):
                    self.release(trial._trial_id, death=dead.get(worker, "it is gone"))
        self.enqueue()

    def knows(self, worker: str) -> bool:
        """Whether the worker with this id ever took a trial."""
        return any(trial.user_attrs.get(WORKER, {}).get("id") == worker for trial in self._trials())

    def _trials(self) -> list[FrozenTrial]:
        # A trial without a key was added by hand, in a notebook or the dashboard.
        trials = self.storage.get_all_trials(self.study_id, deepcopy=False)
        return [trial for trial in trials if _KEY in trial.user_attrs]

    def _add(self, configuration: Configuration, key: str, attempt: int) -> None:
        # Numbers are Optuna parameters, for its plots; a parameter must have one kind of distribution in all trials, and a
        # choice the same options, which a grid that grows cannot promise. Other values are user attributes. (Parameters from
        # `Study.enqueue_trial` appear only once an objective asks for them, and it takes 1 and 1.00001 for the same.)
        numbers = {name: float(value) for name, value in configuration.items() if _is_number(value)}
        distributions: dict[str, BaseDistribution] = {name: FloatDistribution(v, v) for name, v in numbers.items()}
        others = {f"parameter {name}": value for name, value in configuration.items() if name not in numbers}
        attributes = {_KEY: key, _CONFIGURATION: configuration, _ATTEMPT: attempt, **others}
        trial = optuna.create_trial(
            state=TrialState.WAITING, params=numbers, distributions=distributions, user_attrs=attributes
        )
        self.storage.create_new_trial(self.study_id, template_trial=trial)

    def _keep(self, trial: FrozenTrial, identity: Identity) -> bool:
        try:
            self.storage.set_trial_user_attr(trial._trial_id, WORKER, identity)
            for other in self._trials():
                if other.number != trial.number and _has_result_for(trial, other):
                    self._end(trial._trial_id, TrialState.PRUNED, {_DUPLICATE: other.number})
                    return False
        except (KeyboardInterrupt, SystemExit):
            self.release(trial._trial_id)
            raise
        return True

    def _name_value(self, metric: str) -> None:
        study = optuna.load_study(study_name=self.name, storage=self.storage)
        if study.metric_names is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                study.set_metric_names([metric])

    def _end(self, trial_id: int, state: TrialState, attributes: Mapping[str, Any], value: float | None = None) -> bool:
        try:
            for name, attribute in attributes.items():
                self.storage.set_trial_user_attr(trial_id, name, attribute)
            self.storage.set_trial_state_values(trial_id, state, None if value is None else [value])
        except UpdateFinishedTrialError:
            return False
        return True


def _entry(trials: Sequence[FrozenTrial], rows: bool) -> Entry:
    """Sums up the trials of one configuration, oldest first."""
    attempt = max(trial.user_attrs[_ATTEMPT] for trial in trials)
    latest = [trial for trial in trials if trial.user_attrs[_ATTEMPT] == attempt]
    failed = [trial for trial in latest if trial.state == TrialState.FAIL]
    deaths = [trial for trial in failed if not trial.user_attrs.keys() & {_ERROR, _INTERRUPTED}]
    candidates: list[tuple[State, list[FrozenTrial]]] = [
        ("complete", [trial for trial in trials if trial.state == TrialState.COMPLETE]),
        ("running", [trial for trial in trials if trial.state == TrialState.RUNNING]),
        ("failed", [trial for trial in latest if _raised(trial)][-1:]),
        ("waiting", [trial for trial in trials if trial.state == TrialState.WAITING]),
        ("failed", deaths[MAX_DEATHS - 1 :]),
        ("missing", latest[-1:]),
    ]
    state, trial = next((state, found[0]) for state, found in candidates if found)
    how = deaths[-1].user_attrs.get(_DEATH) if deaths else None
    died = (
        f"The process of its worker died in each of {len(deaths)} tries, without a Python error, the last time: {how}. "
        "SIGKILL most often means that memory ran out."
    )
    return Entry(
        configuration=dict(trial.user_attrs[_CONFIGURATION]),
        state=state,
        trial=trial.number,
        attempt=attempt,
        rows=_stored_rows(trial) if rows and state == "complete" else [],
        error=trial.user_attrs.get(_ERROR, died) if state == "failed" else None,
        worker=trial.user_attrs.get(WORKER),
        seconds=trial.duration.total_seconds() if state == "complete" and trial.duration else None,
        verdict=_stored_verdict(trial) if state == "complete" else None,
    )


def _has_result_for(mine: FrozenTrial, other: FrozenTrial) -> bool:
    """Whether `other` has, or will have, the result for which `mine` was enqueued."""
    if other.user_attrs[_KEY] != mine.user_attrs[_KEY]:
        return False
    open_and_older = not other.state.is_finished() and other.number < mine.number
    failed_already = _raised(other) and other.user_attrs[_ATTEMPT] >= mine.user_attrs[_ATTEMPT]
    return other.state == TrialState.COMPLETE or open_and_older or failed_already


def _raised(trial: FrozenTrial) -> bool:
    """Whether the objective raised, which is tried again only on request."""
    return trial.state == TrialState.FAIL and _ERROR in trial.user_attrs


def _stored_rows(trial: FrozenTrial) -> list[Row]:
    parts = sum(name.startswith(f"{_ROWS}/") for name in trial.user_attrs)
    stored: list[Row] = json.loads("".join(trial.user_attrs[f"{_ROWS}/{part}"] for part in range(parts)))
    return stored


def _stored_verdict(trial: FrozenTrial) -> tuple[str, str] | None:
    attributes = trial.user_attrs
    return (attributes[_VERDICT], attributes[_REASON]) if _VERDICT in attributes else None


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53)
