"""How the bridge starts a server: what a host's owner writes, and what a machine that arrives may choose of it."""

from __future__ import annotations

import pytest

from devices.bridges.models import command_of, parse_models
from devices.bridges.vfio_user.server import ServerProcess
from migrate.errors import UsageError

OURS = {"socket": "/run/d0.sock.s", "id": "nic0", "directory": "/run", "start": "incoming"}


def test_a_command_is_filled_in_by_options_and_by_what_the_bridge_knows() -> None:
    models = parse_models(["nvme=/opt/nvme --socket {socket} --{start} -q '{queues} of {id}'", "other=x"])
    assert command_of(models, {"model": "nvme", "queues": "4"}, OURS, "vfio-user") == [
        "/opt/nvme", "--socket", "/run/d0.sock.s", "--incoming", "-q", "4 of nic0",
    ]  # fmt: skip


def test_an_option_of_the_peers_stays_within_its_word_and_is_not_filled_in_again() -> None:
    models = parse_models(["nvme=/opt/nvme {queues}"])
    assert command_of(models, {"model": "nvme", "queues": "1 --evil {socket}"}, OURS, "vfio-user") == [
        "/opt/nvme",
        "1 --evil {socket}",
    ]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model": "nvm"}, r"no vfio-user server for model 'nvm' \(did you mean 'nvme'\?\)"),
        ({}, r"no vfio-user server for model '': it has nvme"),
        ({"model": "nvme"}, r"the command of model 'nvme' has \{queues\}, and the machine gives model"),
        ({"model": "nvme", "queues": "1", "colour": "red"}, r"does not have \{colour\}"),
    ],
)
def test_what_does_not_fit_the_command_is_refused(options: dict[str, str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        command_of(parse_models(["nvme=/opt/nvme {queues}"]), options, OURS, "vfio-user")


@pytest.mark.parametrize("pair", ["nvme", "=x", "nvme=", "nvme='x", "nvme=a"])
def test_what_is_no_model_and_command_is_refused(pair: str) -> None:
    with pytest.raises(UsageError, match="--serve"):
        parse_models(["nvme=b", pair])


def test_how_a_server_ended_is_told_and_its_socket_is_gone(tmp_path) -> None:
    socket = tmp_path / "s"
    socket.touch()
    process = ServerProcess("nic0", ["sh", "-c", "exit 3"], str(socket))
    assert not socket.exists()
    assert process.obituary(10) == "exited with 3"
    process.end()
    process = ServerProcess("nic0", ["sleep", "60"], str(socket))
    assert process.obituary() == ""
    process.end()
    assert process.obituary() == "was killed by SIGTERM"
