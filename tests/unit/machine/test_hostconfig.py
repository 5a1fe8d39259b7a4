"""host.toml: what this host offers, and where it looks."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.errors import UsageError
from migrate.machine import hostconfig


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vf-", dir="/tmp") as name:
        yield Path(name)


def test_a_host_without_a_file_offers_what_is_installed(directory: Path) -> None:
    host = hostconfig.load(directory)
    assert host.command_of("uart16550") == [sys.executable, "-m", "devices.uart16550"]
    assert host.machine_directory("web1") == directory / "machines" / "web1"


def test_a_command_of_ones_own_takes_the_place_of_the_installed_one(directory: Path) -> None:
    (directory / "host.toml").write_text('[device.uart16550]\ncommand = ["my-uart", "--fast"]\n')
    host = hostconfig.load(directory)
    assert host.command_of("uart16550") == ["my-uart", "--fast"]
    assert host.command_of("rtc")[1:] == ["-m", "devices.rtc"]


def test_a_type_that_is_not_available_is_refused(directory: Path) -> None:
    (directory / "host.toml").write_text("[device.display]\navailable = false\n")
    with pytest.raises(UsageError, match="does not offer 'display'"):
        hostconfig.load(directory).command_of("display")


def test_a_type_that_nobody_knows_is_refused_with_the_nearest(directory: Path) -> None:
    with pytest.raises(UsageError, match=r"no device type 'uart1655'.*did you mean 'uart16550'") as caught:
        hostconfig.load(directory).command_of("uart1655")
    assert "[device.uart1655]" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[devise.x]\n", "unknown key 'devise' (did you mean 'device'?)"),
        ("device = 5\n", "device is not a table"),
        ("[device]\nuart16550 = 5\n", "[device.uart16550] is not a table"),
        ("[device.x]\ncomand = []\n", "unknown key 'comand' (did you mean 'command'?)"),
        ('[device.x]\ncommand = "a b"\n', "command is not a list of texts"),
        ("[device.x]\ncommand = [1]\n", "command is not a list of texts"),
        ('[device.x]\navailable = "no"\n', "available is neither true nor false"),
        ('images = "/srv"\n', "images is not a list of absolute paths"),
        ('images = ["srv"]\n', "images is not a list of absolute paths"),
        ("[device\n", "cannot be read"),
    ],
)
def test_a_mistake_in_host_toml_is_named(text: str, says: str, directory: Path) -> None:
    (directory / "host.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        hostconfig.load(directory)
    assert says in caught.value.reason
    assert str(directory / "host.toml") in caught.value.reason
    assert caught.value.remedy


def test_a_directory_too_deep_for_sockets_is_refused_before_anything_starts() -> None:
    with pytest.raises(UsageError, match="longer than 60 bytes"):
        hostconfig.load(Path("/tmp") / ("x" * 60))


def test_an_image_is_found_by_its_name_in_the_directories_that_are_named(directory: Path) -> None:
    for name in ("a", "b"):
        (directory / name).mkdir()
        (directory / name / f"{name}.img").touch()
    (directory / "host.toml").write_text(f'images = ["{directory}/a", "{directory}/b"]\n')
    host = hostconfig.load(directory)
    assert host.image("b.img") == directory / "b" / "b.img"
    with pytest.raises(UsageError, match=r"'c\.img' is not on this host \(looked in .*/a, .*/b\)"):
        host.image("c.img")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "", ".", ".."])
def test_no_path_is_an_images_name(name: str, directory: Path) -> None:
    (directory / "host.toml").write_text(f'images = ["{directory}"]\n')
    with pytest.raises(UsageError, match="is not a file name"):
        hostconfig.load(directory).image(name)
