"""An address with its password, pasted where a name belongs, is in no finding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxyd.cli.main import main
from proxyd.config.load import parse

URL = "https://u:hunter2@h/x"


@pytest.mark.parametrize(
    "text",
    [
        f'"{URL}" = 1',
        f"'{URL}' = 1",
        f'[server]\n"{URL}" = 1',
        f'[server]\n"{URL}".b = 1',
        f'[limits.tenants]\n"{URL}" = 3',
        f'[limits.tenants."{URL}"]\nfoo = 3\nrequests_per_minute = "x"',
        f'[[upstream]]\nname = "x"\n"{URL}" = 1',
        f'["{URL}"]\n["{URL}"]',
        f'[[a."{URL}"]]\n[a."{URL}"]',
        f'[a."{URL}"]\nb = 1\n[a]\n"{URL}" = 2',
        f'"{URL}" = 1\n"{URL}" = 2',
        f'"{URL}" = oops',
        f'"{URL}" 1',
        f'["{URL}"',
        f'"{URL}\n" = 1',
    ],
)
def test_a_key_that_no_option_could_have_is_not_repeated(text: str) -> None:
    findings = parse(text, "f", {})[1]
    assert findings
    assert "hunter2" not in " ".join(finding.text() for finding in findings)


def test_of_a_long_name_the_beginning_is_told_and_of_a_good_one_all() -> None:
    findings = parse(f'[server]\n{"k" * 41} = 1\n{"g" * 40} = 1\n[limits.tenants."acme corp"]\nfoo = 1', "f", {})[1]
    assert [finding.key for finding in findings if finding.message == "unknown key"] == [
        "server.kkkkkkkk...",
        "server." + "g" * 40,
        "limits.tenants.acme corp.foo",
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_check_config_tells_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    file = tmp_path / "proxyd.toml"
    file.write_text(f'[server]\n"{URL}" = 1\n')
    assert main(["-c", str(file), "--check-config", *(["--json"] if as_json else [])]) != 0
    said = capsys.readouterr()
    assert "hunter2" not in said.out + said.err
    if as_json:
        assert f"server.<{len(URL)} characters>" in {one["key"] for one in json.loads(said.out)["findings"]}
