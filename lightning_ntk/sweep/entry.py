"""What the trials of one configuration say about it."""

import json
from dataclasses import dataclass
from typing import Literal

from optuna.trial import FrozenTrial, TrialState

from lightning_ntk.sweep.configurations import Configuration
from lightning_ntk.sweep.liveness import WORKER, Identity

# User attributes of trials.
KEY, CONFIGURATION, ATTEMPT, ROWS = "key", "configuration", "attempt", "rows"
ERROR, INTERRUPTED, DUPLICATE = "error", "interrupted", "duplicate of"

# A configuration whose worker died so often is not tried again: most likely it kills the process, by its need of memory.
MAX_DEATHS = 3

Row = dict[str, float]
State = Literal["complete", "failed", "running", "waiting", "missing"]


@dataclass(frozen=True)
class Entry:
    """What is known of one configuration.

    Args:
        configuration: Parameter names and values.
        state: "missing" if it must be enqueued (again).
        trial: Number of the trial that says most: the complete one, the running one, ...
        attempt: How often it was tried again on request.
        rows: Of the complete result, one for each measurement.
        error: Traceback of the failure, if it failed.
        worker: Identity of the process that runs or ran the trial.
        seconds: Duration of the complete trial.
    """

    configuration: Configuration
    state: State
    trial: int
    attempt: int
    rows: list[Row]
    error: str | None
    worker: Identity | None
    seconds: float | None


def ended_in_error(trial: FrozenTrial) -> bool:
    """Whether the objective raised, which is not tried again unasked."""
    return trial.state == TrialState.FAIL and ERROR in trial.user_attrs


def entry_of(trials: list[FrozenTrial], rows: bool) -> Entry:
    """Sums up the trials of one configuration, oldest first; with the rows of its result if `rows`."""
    attempt = max(trial.user_attrs[ATTEMPT] for trial in trials)
    latest = [trial for trial in trials if trial.user_attrs[ATTEMPT] == attempt]
    by_state = {state: [t for t in trials if t.state == state] for state in TrialState}
    failures = [trial for trial in latest if ended_in_error(trial)]
    deaths = [t for t in latest if t.state == TrialState.FAIL and not t.user_attrs.keys() & {ERROR, INTERRUPTED}]
    error = None
    state: State
    if by_state[TrialState.COMPLETE]:
        state, trial = "complete", by_state[TrialState.COMPLETE][0]
    elif by_state[TrialState.RUNNING]:
        state, trial = "running", by_state[TrialState.RUNNING][0]
    elif failures:
        state, trial = "failed", failures[-1]
        error = trial.user_attrs[ERROR]
    elif by_state[TrialState.WAITING]:
        state, trial = "waiting", by_state[TrialState.WAITING][0]
    elif len(deaths) >= MAX_DEATHS:
        state, trial = "failed", deaths[-1]
        error = f"The process of its worker died in each of {len(deaths)} tries, without a Python error: out of memory?"
    else:
        state, trial = "missing", latest[-1]
    start, end = trial.datetime_start, trial.datetime_complete
    return Entry(
        configuration=dict(trial.user_attrs[CONFIGURATION]),
        state=state,
        trial=trial.number,
        attempt=attempt,
        rows=_stored_rows(trial) if rows and state == "complete" else [],
        error=error,
        worker=trial.user_attrs.get(WORKER),
        seconds=(end - start).total_seconds() if state == "complete" and start and end else None,
    )


def _stored_rows(trial: FrozenTrial) -> list[Row]:
    parts = sum(name.startswith(f"{ROWS}/") for name in trial.user_attrs)
    stored: list[Row] = json.loads("".join(trial.user_attrs[f"{ROWS}/{part}"] for part in range(parts)))
    return stored
