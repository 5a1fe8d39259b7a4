"""Where schemas are found: one's own directories, the environment, a checkout, a wheel installed elsewhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.errors import SchemaError
from migrate.state import catalog

ROOT = Path(__file__).parents[3]
OWN = 'type = "widget"\nversion = 1\n[[field]]\nname = "a"\ntype = "{}"\n'


@pytest.fixture(autouse=True)
def _no_schemas_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(catalog.ENVIRONMENT, raising=False)


def test_the_types_of_vmferry_are_all_there_and_sorted() -> None:
    assert catalog.types() == sorted(path.stem for path in (ROOT / "schemas").glob("*.toml"))
    assert {"uart16550", "rtc", "display", "vcpu"} <= set(catalog.types())
    assert catalog.load("uart16550").versions == (1, 2, 3)
    assert catalog.load("uart16550").written == 2
    assert catalog.load("rtc").written == 1


def test_a_type_of_ones_own_is_found_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "widget.toml").write_text(OWN.format("u8"))
    monkeypatch.setenv(catalog.ENVIRONMENT, f"/does/not/exist:{tmp_path}")
    assert catalog.load("widget").version == 1
    assert "widget" in catalog.types()
    assert "uart16550" in catalog.types()


def test_a_directory_given_by_the_caller_comes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, kind in (("given", "u16"), ("environment", "u8")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "widget.toml").write_text(OWN.format(kind))
    monkeypatch.setenv(catalog.ENVIRONMENT, str(tmp_path / "environment"))
    assert catalog.load("widget", [tmp_path / "given"]).at(1).fields[0].kind.text() == "u16 0..65535"


def test_an_unknown_type_is_refused_with_the_nearest_and_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(SchemaError) as caught:
        catalog.load("uart16500", [tmp_path])
    assert "uart16550" in caught.value.reason
    assert str(tmp_path) in caught.value.remedy
    assert catalog.ENVIRONMENT in caught.value.remedy


@pytest.mark.parametrize(
    "name", ["../schemas/rtc", "/etc/passwd", "rtc.toml", "", "RTC", "rtc\0", "x" * 1000]
)
def test_a_name_that_is_none_never_becomes_a_path(name: str) -> None:
    with pytest.raises(SchemaError, match="no schema for device type"):
        catalog.load(name)


def test_a_file_under_another_types_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gadget.toml").write_text(OWN.format("u8"))
    with pytest.raises(SchemaError, match="describes 'widget'"):
        catalog.load("gadget", [tmp_path])


@pytest.mark.parametrize("content", [b"\xff\xfe", b"#" * (1 << 20) + b"##"])
def test_a_file_that_is_no_text_or_too_large_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "widget.toml").write_bytes(content)
    with pytest.raises(SchemaError, match=r"widget\.toml"):
        catalog.load("widget", [tmp_path])


def test_an_installed_package_finds_its_schemas_from_any_directory(tmp_path: Path) -> None:
    """The layout that pyproject.toml gives a wheel: `schemas` inside `migrate/state`, none beside `migrate`."""
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "migrate" / "state", tmp_path / "migrate" / "state", ignore=skip)
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "migrate" / name, tmp_path / "migrate" / name)
    shutil.copytree(ROOT / "schemas", tmp_path / "migrate" / "state" / "schemas")
    program = (
        "import migrate; from migrate.state import catalog; print(migrate.__file__); catalog.load('vcpu')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd="/",
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
