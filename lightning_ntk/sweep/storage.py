"""Opens the storage of a sweep and a study in it.

The storage is a journal file or a database.
"""

import contextlib
import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

# Seconds for which a process waits for another one's transaction on an SQLite file.
_SQLITE_PATIENCE = 60
# Attempts to open a database in which other processes make the tables.
_ATTEMPTS = 8
# User attribute of the study of a sweep.
_OBJECTIVE = "lightning_ntk sweep"
# How each line of a journal begins.
_ENTRY = b'{"op_code":'


def open_storage(storage: str | os.PathLike[str]) -> BaseStorage:
    """Opens a journal file at a path, or a database at a URL.

    The file is created if it does not exist. The URL is one of Optuna.
    """
    url = os.fspath(storage)
    if "://" in url:
        return get_storage(_database(url))
    path = Path(url).expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _require_journal(path)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_RepairingLock(str(path))))


def open_study(storage: BaseStorage, name: str, objective: str | None = None) -> int:
    """The id of a sweep's study, created if it does not exist.

    Creating it requires `objective`, which made it.
    """
    names = sorted(study.study_name for study in storage.get_all_studies())
    if objective is None and name not in names:
        raise ValueError(
            f"Expected a sweep named {name!r} in the storage but it has {names or 'none at all'}. "
            "Run it first, or give the `name` and `storage` with which it was run."
        )
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if name in names:  # only read it: creating it again would write to a journal
            study = optuna.load_study(storage=storage, study_name=name)
        else:
            study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    finally:
        optuna.logging.set_verbosity(verbosity)
    made_with = study.user_attrs.get(_OBJECTIVE)
    if made_with is None and objective is not None and not study.get_trials(deepcopy=False):
        study.set_user_attr(_OBJECTIVE, objective)  # new, or its maker has not come this far
    elif made_with is None or objective not in (None, made_with):
        raise ValueError(
            f"Expected the study {name!r} to be a sweep of {objective or 'some objective'} but it is "
            f"{f'one of {made_with}' if made_with else 'not a sweep'}. Nothing was changed: give another `name` or `storage`."
        )
    return study._study_id


def _require_journal(path: Path) -> None:
    """Raises a ValueError unless every line is one of a journal.

    It names the line. The last line may be unfinished.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            whole = line.endswith(b"\n")
            try:
                valid = line.startswith(_ENTRY[: len(line)]) and (not whole or "op_code" in json.loads(line))
            except ValueError:
                valid = False
            if valid or (number > 1 and not whole):
                continue
            raise ValueError(
                f"Expected a journal file of Optuna but line {number} of {path} is not one of a journal. Nothing was changed. "
                + (
                    "It is another kind of file: give another `storage`; an SQLite file has the URL sqlite:///FILE."
                    if number == 1
                    else f"Delete this line, and what follows if it is not of the sweep either: {number - 1} lines are good."
                )
            )


# Optuna's default lock is a symbolic link, which is broken for relative paths and needs rights on Windows.
class _RepairingLock(JournalFileOpenLock):
    """The lock of a journal, whose owner appends to whole lines only.

    A line that a killed writer left unfinished is cut off. Optuna itself appends, so that a writer that stalls until others take
    its lock cannot overwrite what they wrote.
    """

    def __init__(self, journal: str) -> None:
        super().__init__(journal)
        self._journal = Path(journal)

    def acquire(self) -> bool:
        acquired = super().acquire()
        try:
            _cut_torn_line(self._journal)
        except BaseException:
            self.release()
            raise
        return acquired

    def release(self) -> None:
        with contextlib.suppress(RuntimeError):  # others took it while this writer stalled, and appended too
            super().release()


def _cut_torn_line(journal: Path) -> None:
    with journal.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        if file.read() in (b"", b"\n"):
            return
    os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)


def _database(url: str) -> RDBStorage:
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    create = _sqlite if url.startswith("sqlite:") else RDBStorage
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return create(url)
        except SQLAlchemyError as error:
            if not isinstance(error, DBAPIError) or attempt == _ATTEMPTS:
                shown = re.sub(r":[^:/@]*@", ":***@", url)  # without the password
                raise ValueError(
                    f"Expected argument `storage` to be the URL of a database that can be read and written, or a path, but "
                    f"{shown!r} gives: {storage_reason(error)}."
                ) from error
            # When several processes make the tables of an empty database at once, only one succeeds.
            time.sleep(random.uniform(0, 0.2 * attempt))
    raise AssertionError("not reached")


def storage_reason(error: BaseException) -> str:
    """What a database says about an error, in one line, without SQL."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0].rstrip(".")


def _sqlite(url: str) -> RDBStorage:
    from sqlalchemy import event

    storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _SQLITE_PATIENCE}})

    # SQLite ignores the row locks with which Optuna takes a trial: between reading that it waits and writing that it runs,
    # another process may do the same. Transactions that are writers from their start exclude each other.
    @event.listens_for(storage.engine, "connect")
    def leave_transactions_to_sqlalchemy(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(storage.engine, "begin")
    def begin_as_writer(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.engine.dispose()  # connections made before the two rules
    return storage
