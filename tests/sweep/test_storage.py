import builtins
import io
from pathlib import Path
from typing import Any

import pytest

from lightning_ntk.sweep.liveness import worker_identity
from lightning_ntk.sweep.queue import Queue
from lightning_ntk.sweep.storage import open_storage


def test_a_journal_survives_a_writer_killed_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "sweep.journal"
    reader = Queue(open_storage(path), "sweep", "f")
    reader.enqueue([{"a": 1}])
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"op_code":8,"trial_id":0,"user_a')
    assert len(reader.entries()) == 1  # read while it is torn
    writer = Queue(open_storage(path), "sweep", "f")
    writer.enqueue([{"a": 2}])
    assert path.read_bytes().startswith(whole)
    assert b"user_a{" not in path.read_bytes()
    assert len(writer.entries()) == len(reader.entries()) == len(Queue(open_storage(path), "sweep").entries()) == 2
    assert reader.claim(worker_identity()) is not None


def test_a_relative_path_is_one_file_wherever_the_process_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    queue = Queue(open_storage("results/sweep.journal"), "sweep", "f")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    queue.enqueue([{"a": 1}])
    assert len(Queue(open_storage(tmp_path / "results" / "sweep.journal"), "sweep").entries()) == 1


def test_a_writer_that_loses_its_lock_while_it_stalls_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.journal"
    ours, theirs = (Queue(open_storage(path), "sweep", "f") for _ in range(2))
    opened = builtins.open

    def stalling(*arguments: Any, **options: Any) -> Any:
        file = opened(*arguments, **options)
        if Path(arguments[0]) != path or not file.writable():
            return file
        flush = file.flush

        def late_flush() -> None:
            monkeypatch.undo()
            file.flush = flush
            path.with_suffix(".journal.lock").unlink()  # after 30 seconds Optuna takes the lock of a stalled writer
            theirs.enqueue([{"a": 2}])
            flush()

        file.flush = late_flush
        return file

    monkeypatch.setattr(builtins, "open", stalling)
    monkeypatch.setattr(io, "open", stalling)
    ours.enqueue([{"a": 1}])
    configurations = [entry.configuration for entry in Queue(open_storage(path), "sweep").entries().values()]
    assert sorted(c["a"] for c in configurations) == [1, 2]


@pytest.mark.parametrize(
    "content",
    [b"SQLite format 3\0\xff\xfe\n\x80\n", b"some notes\nof mine\n", b'{"a": 1}\n{"b": 2}\n', b"one line", b'{"a": 1}'],
)
def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Expected a journal file of Optuna but line 1 of .* is another kind of file"):
        Queue(open_storage(path), "sweep", "f")
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [b"garbage", b"\0\0\0", b"{}", b'{"op_code":'])
def test_a_wrong_line_is_named_and_nothing_is_appended_behind_it(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "sweep.journal"
    Queue(open_storage(path), "sweep", "f").enqueue([{"a": 1}])
    good = path.read_bytes()
    path.write_bytes(good + line + b"\n")
    number = good.count(b"\n") + 1
    with pytest.raises(
        ValueError, match=rf"line {number} of {path} .* Delete this line, .* {number - 1} lines are good"
    ):
        open_storage(path)
    assert path.read_bytes() == good + line + b"\n"
    path.write_bytes(good + line)  # a writer was killed in this one
    Queue(open_storage(path), "sweep", "f").enqueue([{"a": 2}])
    assert len(Queue(open_storage(path), "sweep").entries()) == 2


def test_reading_a_sweep_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sweep.journal"
    Queue(open_storage(path), "sweep", "f").enqueue([{"a": 1}])
    before = path.read_bytes()
    assert len(Queue(open_storage(path), "sweep").entries()) == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite:///{0}/garbage.db", "file is not a database"),
        ("sqlite:////no/such/directory/s.db", "unable to open database file"),
        ("sqlite:///file:{0}/empty.db?mode=ro&uri=true", "attempt to write a readonly database"),
        ("nosuch://user:secret@host/x", r"\*\*\*@host/x' gives: Can't load plugin: sqlalchemy.dialects:nosuch"),
        ("://x", "Could not parse SQLAlchemy URL"),
    ],
)
def test_a_database_that_cannot_be_used_is_refused_with_the_reason(
    tmp_path: Path, url: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_ntk.sweep.storage._ATTEMPTS", 1)
    (tmp_path / "garbage.db").write_bytes(b"no database " * 1000)
    (tmp_path / "empty.db").touch()
    with pytest.raises(ValueError, match=rf"Expected argument `storage` to be the URL of a database .*{reason}"):
        open_storage(url.format(tmp_path))
