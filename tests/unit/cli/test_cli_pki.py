"""`ferry pki` makes what `ferry host --pki` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from migrate.cli.main import main
from migrate.transport import tls


def test_init_then_issue_makes_credentials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ca = tmp_path / "ca"
    assert main(["pki", "init", str(ca)]) == 0
    assert f"ferry pki issue {ca} NAME" in capsys.readouterr().err
    assert main(["pki", "issue", str(ca), "hosta.example", "192.0.2.7", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["names"] == ["hosta.example", "192.0.2.7"]
    tls.load(Path(made["directory"]), ["hostb"]).check(serving=True)


def test_what_is_there_is_not_replaced_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pki", "init", str(tmp_path)]) == 0
    assert main(["pki", "init", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["pki", "init", str(tmp_path), "--force"]) == 0
    assert main(["pki", "issue", str(tmp_path), "not a name"]) == 2
