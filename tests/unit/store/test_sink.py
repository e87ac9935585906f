"""Which store a sink means, and what is imported for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from proxyd.config.secrets import Secret
from proxyd.store.schema import StoreError, StoreMissing
from proxyd.store.sink import make_store, mysql_address, open_reader
from proxyd.store.sqlite import SqliteStore

ROOT = Path(__file__).resolve().parents[3]
NODE = "0123456789abcdef"


def test_each_kind_of_sink_has_its_store(tmp_path: Path) -> None:
    assert isinstance(make_store(f"sqlite:///{tmp_path}/t.db", "row"), SqliteStore)
    store = make_store("mysql://u@h/d", "row", password=Secret(b"hush"), node=NODE, log=None)
    assert type(store).__name__ == "MysqlStore"
    with pytest.raises(StoreMissing):
        open_reader(f"sqlite:///{tmp_path}/t.db")


def test_the_password_goes_to_the_driver_and_into_no_text() -> None:
    address = mysql_address("mysql://u@h/d", Secret("h\u00fcsh".encode()))
    assert address.arguments()["password"] == "h\u00fcsh"
    assert "sh" not in str(address) + repr(address)


def test_two_passwords_are_refused_and_none_is_told() -> None:
    with pytest.raises(StoreError) as refused:
        make_store("mysql://u:first@h/d", "row", password=Secret(b"second"), node=NODE)
    assert not {"first", "second"} & set(str(refused.value).replace(":", " ").replace("@", " ").split())


def test_a_node_with_sqlite_imports_no_driver_of_mysql() -> None:
    program = (
        "import sys\nimport proxyd.cli.serve, proxyd.cli.usage, proxyd.cli.schema\n"
        "from proxyd.store.sink import make_store\nmake_store('sqlite:////x/t.db', 'row')\n"
        "found = {'aiomysql', 'pymysql'} & set(sys.modules)\nassert not found, found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_a_sink_will_need_can_be_imported_before_an_upgrade() -> None:
    program = (
        "import sys\nimport proxyd.cli.upgrade_check\nfrom proxyd.store.sink import load\n"
        "load('sqlite:////x/t.db')\nassert 'aiomysql' not in sys.modules\nload('mysql://u@h/d')\n"
        "from proxyd.store.sink import make_store, open_reader\nbefore = set(sys.modules)\n"
        "make_store('mysql://u@h/d', 'row', node='0123456789abcdef')\n"
        "more = {name for name in set(sys.modules) - before if 'mysql' in name}\nassert not more, more\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
