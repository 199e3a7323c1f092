"""Opening the storage in which a sweep is kept: a journal file, or any URL that Optuna knows."""

import json
import os
import random
import time
from pathlib import Path
from typing import Any, BinaryIO

from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

# Seconds for which a process waits for another one's transaction on an SQLite file.
_SQLITE_PATIENCE = 60
# To open a database in which other processes make the tables.
_ATTEMPTS = 8


def open_storage(storage: str | os.PathLike[str]) -> BaseStorage:
    """The storage behind a URL, or the journal file at a path, created if it does not exist.

    Args:
        storage: A path, for example "sweep.journal", or an Optuna URL such as "sqlite:///sweep.db" or
            "postgresql://host/database".

    Raises:
        ValueError: If the file at the path is no journal.
    """
    url = os.fspath(storage)
    if "://" in url:
        return get_storage(_database(url))
    path = Path(url).expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return JournalStorage(_RepairedJournal(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected argument `storage` to be a journal file of Optuna, a path that does not exist yet, or a URL but {path} is "
            f"another kind of file ({type(error).__name__}: {error}). An SQLite file needs the URL sqlite:///{url}."
        ) from error


class _RepairedJournal(JournalFileBackend):
    """A journal file that survives a writer killed in the middle of a line: the torn line is cut off before the next."""

    def __init__(self, path: Path) -> None:
        # Optuna's default lock is a symbolic link, which is broken for relative paths and needs rights on Windows.
        self._path, self._own_lock = path, JournalFileOpenLock(str(path))
        super().__init__(str(path), lock_obj=self._own_lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self._own_lock.acquire()
        try:
            with self._path.open("r+b") as file:
                _cut_torn_line(file)
                file.seek(0, os.SEEK_END)
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        finally:
            self._own_lock.release()


def _cut_torn_line(file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _database(url: str) -> RDBStorage:
    from sqlalchemy.exc import DBAPIError

    create = _sqlite if url.startswith("sqlite:") else RDBStorage
    for attempt in range(1, _ATTEMPTS):
        try:
            return create(url)
        except DBAPIError:
            # Of several processes that make the tables of an empty database at once, one succeeds.
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
