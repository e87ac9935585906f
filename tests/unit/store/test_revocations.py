"""The file of revocations: what an append promises, what a start makes of the file, what stops it."""

from __future__ import annotations

import math
import multiprocessing
import os
from pathlib import Path

import pytest

from proxyd.access.token import MAX_JTI_CHARS
from proxyd.shm.region import REVOCATION_ENTRIES
from proxyd.shm.revocations import Kind, Revocation
from proxyd.store.revocations import NAME, RevocationFile, RevocationFileError, _line

USER = Revocation(Kind.USER, "42", 100.0, math.inf)
TENANT = Revocation(Kind.TENANT, "acme", 101.0, 5000.0)
JTI = Revocation(Kind.JTI, 'a "quoted"\nö', 102.5, 4000.0)


@pytest.fixture
def file(tmp_path: Path) -> RevocationFile:
    return RevocationFile(tmp_path)


def test_what_was_appended_is_loaded_with_what_expires_first_at_the_head(file: RevocationFile) -> None:
    for entry in (USER, TENANT, JTI):
        file.append(entry)
    assert file.load(1000.0) == ([JTI, TENANT, USER], "")
    assert file.load(1000.0) == ([JTI, TENANT, USER], "")
    assert os.stat(file.path).st_mode & 0o777 == 0o600
    assert os.listdir(file.path.parent) == [NAME]


def test_without_a_file_nothing_is_in_force_and_none_is_made(file: RevocationFile) -> None:
    assert file.load(0.0) == ([], "")
    assert not file.path.exists()


def test_a_start_drops_what_has_expired_and_keeps_the_latest_of_what_was_said_twice(file: RevocationFile) -> None:
    for entry in (USER, JTI, TENANT, USER._replace(at=300.0, until=4100.0), TENANT._replace(at=50.0, until=4500.0)):
        file.append(entry)
    found = file.load(4000.0).entries
    assert found == [TENANT, USER._replace(at=300.0)]
    assert file.path.read_bytes() == b"".join(map(_line, found))


@pytest.mark.parametrize("torn", [b'{"kind":"us', b"\0" * 40, _line(JTI)[:-1]])
def test_a_torn_last_line_is_passed_over_and_gone_with_the_next_append(file: RevocationFile, torn: bytes) -> None:
    file.append(USER)
    with file.path.open("ab") as handle:
        handle.write(torn)
    file.append(TENANT)
    assert file.path.read_bytes() == _line(USER) + _line(TENANT)
    with file.path.open("ab") as handle:
        handle.write(torn)
    assert file.load(1000.0).entries == [TENANT, USER]
    assert file.path.read_bytes() == _line(TENANT) + _line(USER)


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"",
        b"[]",
        b"{}",
        b'{"kind":"user","value":42,"at":1.0,"until":null}',
        b'{"kind":"user","value":"x","at":1.0,"until":null}',
        b'{"kind":"who","value":"x","at":1.0,"until":null}',
        b'{"kind":"jti","value":"","at":1.0,"until":null}',
        b'{"kind":"jti","value":"x","at":null,"until":null}',
        b'{"kind":"jti","value":"x","at":1.0,"until":"soon"}',
        b'{"kind":"jti","value":"x","at":1.0}',
        b"\xff",
    ],
)
def test_a_line_that_is_no_revocation_stops_the_start_with_its_number_and_a_remedy(
    file: RevocationFile, line: bytes
) -> None:
    text = _line(USER) + line + b"\n" + _line(TENANT)
    file.path.write_bytes(text)
    with pytest.raises(RevocationFileError) as caught:
        file.load(1000.0)
    assert f"{file.path}:2 " in str(caught.value)
    assert "take it out" in str(caught.value)
    assert file.path.read_bytes() == text


def test_a_file_that_cannot_be_read_stops_the_start(file: RevocationFile) -> None:
    file.path.mkdir()
    with pytest.raises(RevocationFileError, match="cannot be read: Is a directory; it must be readable"):
        file.load(0.0)
    with pytest.raises(OSError, match="directory"):
        file.append(USER)


def test_more_revocations_than_the_ring_holds_stop_the_start(file: RevocationFile) -> None:
    lines = (_line(Revocation(Kind.JTI, str(n), 1.0, math.inf)) for n in range(REVOCATION_ENTRIES + 1))
    file.path.write_bytes(b"".join(lines))
    with pytest.raises(RevocationFileError, match="16385 revocations"):
        file.load(0.0)


def test_a_disk_without_room_leaves_the_file_as_it_was(file: RevocationFile) -> None:
    file.append(USER)
    pid = os.fork()
    if pid == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = os.stat(file.path).st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))  # the write is cut, as on a full disk
        try:
            file.append(TENANT)
        except OSError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert file.path.read_bytes() == _line(USER)


def test_a_file_that_cannot_be_written_anew_serves_as_it_is(file: RevocationFile) -> None:
    file.append(USER)
    file.append(USER)
    Path(f"{file.path}.new").mkdir()
    loaded = file.load(1000.0)
    assert loaded.entries == [USER]
    assert loaded.not_compacted == "Is a directory"
    assert file.path.read_bytes() == _line(USER) * 2


def test_the_longest_value_fits_the_look_for_a_torn_end(file: RevocationFile) -> None:
    longest = Revocation(Kind.JTI, "\x01" * MAX_JTI_CHARS, 1767225600.123456, 1767225600.123456)
    file.append(longest)
    with file.path.open("ab") as handle:
        handle.write(_line(longest)[:-1])
    file.append(longest)
    assert file.path.read_bytes() == _line(longest) * 2


def test_an_end_that_no_append_leaves_is_not_gone_on_with(file: RevocationFile) -> None:
    file.path.write_bytes(_line(USER) + b"\0" * 10_000)
    with pytest.raises(OSError, match="its end is damaged"):
        file.append(TENANT)


def test_appends_of_several_processes_and_a_start_between_them_lose_nothing(file: RevocationFile) -> None:
    def append(first: int) -> None:
        for number in range(first, first + 40):
            file.append(Revocation(Kind.USER, str(number), 1.0, math.inf))

    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=append, args=(first,)) for first in (0, 100)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        file.load(0.0)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = {entry.value for entry in file.load(0.0).entries}
    assert found == {str(number) for first in (0, 100) for number in range(first, first + 40)}
