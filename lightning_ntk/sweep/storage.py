"""Opens what keeps a sweep: a journal file or a database, and a study in it."""

import os
import random
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


def open_storage(storage: str | os.PathLike[str]) -> BaseStorage:
    """Opens a journal file at a path, created if it does not exist, or a database at an Optuna URL."""
    url = os.fspath(storage)
    if "://" in url:
        return get_storage(_database(url))
    path = Path(url).expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_RepairingLock(str(path))))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected argument `storage` to be a journal file of Optuna, a path that does not exist yet, or a URL but {path} is "
            f"another kind of file ({type(error).__name__}: {error}). An SQLite file needs the URL sqlite:///{url}."
        ) from error


def open_study(storage: BaseStorage, name: str, objective: str | None = None) -> int:
    """The id of a sweep's study, created if it does not exist and `objective`, which made it, is known."""
    names = sorted(study.study_name for study in storage.get_all_studies())
    if objective is None and name not in names:
        raise ValueError(
            f"Expected a sweep named {name!r} in the storage but it has {names or 'none at all'}. "
            "Run it first, or give the `name` and `storage` with which it was run."
        )
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
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


def _cut_torn_line(journal: Path) -> None:
    with journal.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        if file.read() in (b"", b"\n"):
            return
    content = journal.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole == 0 and not content.startswith(b'{"op_code":'):
        raise ValueError(
            f"Expected a journal file of Optuna but {journal} is another kind of file. Nothing was changed."
        )
    os.truncate(journal, whole)


def _database(url: str) -> RDBStorage:
    from sqlalchemy.exc import DBAPIError

    create = _sqlite if url.startswith("sqlite:") else RDBStorage
    for attempt in range(1, _ATTEMPTS):
        try:
            return create(url)
        except DBAPIError:
            # When several processes make the tables of an empty database at once, only one succeeds.
            time.sleep(random.uniform(0, 0.2 * attempt))
    return create(url)


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
