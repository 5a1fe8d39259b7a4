"""machine.toml: what is written there is what is made, and every mistake is one line that says where, what, and what to do."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrate.errors import UsageError
from migrate.machine import config
from migrate.machine.config import DeviceConfig, MachineConfig, RegionConfig

#: On a loaded machine a single example may take as long as it likes.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

WHOLE = """
[machine]
name = "web1"
memory = "64M"
[vcpu]
guest = "guest.bin"
cmdline = "dirty=64"
tracker = "log"
[[device]]
id = "uart0"
type = "uart16550"
output = "uart.out"
[[device]]
id = "disk0"
type = "virtio-blk"
protocol = "vfio-user"
image = "/srv/disk0.img"
irq = 9
vectors = 3
tracker = "scan"
options = { queue = 64, mode = "fast" }
command = ["python3", "my.py"]
"""
NAMED = '[machine]\nname = "web1"\n'
DEVICE = NAMED + '[[device]]\nid = "a"\ntype = "rtc"\n'


def parse(text: str) -> MachineConfig:
    return config.parse(tomllib.loads(text), "machine.toml", Path("/base"))


def test_everything_that_is_written_is_read() -> None:
    assert parse(WHOLE) == MachineConfig(
        name="web1",
        regions=[RegionConfig(0, 64 << 20)],
        devices=[
            DeviceConfig(
                "uart0", "uart16550", gpa=0xD0000000, irq=1, local={"output": "/base/uart.out"}
            ),
            DeviceConfig(
                "disk0", "virtio-blk", gpa=0xD1000000, irq=9, vectors=3, tracker="scan",
                options={"queue": "64", "mode": "fast"}, local={"image": "/srv/disk0.img"},
                command=("python3", "my.py"),
            ),
        ],
        guest="/base/guest.bin",
        cmdline="dirty=64",
        vcpu=True,
        vcpu_tracker="log",
    )  # fmt: skip


def test_the_least_machine_has_256_mib_and_no_vcpu() -> None:
    least = parse(NAMED)
    assert (least.memory_bytes, least.vcpu, least.devices) == (256 << 20, False, [])


def test_regions_are_listed_in_order_of_their_address() -> None:
    text = NAMED + '[[memory]]\ngpa = 0x100000\nsize = "1M"\n[[memory]]\nsize = "640K"\n'
    assert parse(text).regions == [RegionConfig(0, 640 << 10), RegionConfig(0x100000, 1 << 20)]


def test_a_machine_survives_the_way_to_its_supervisor() -> None:
    made = parse(WHOLE)
    again = MachineConfig.from_json(made.to_json())
    assert again.to_json() == made.to_json()
    assert again.devices[1].options == made.devices[1].options


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[machin]\nname = "a"', "machine.toml: unknown key 'machin' (did you mean 'machine'?)"),
        ('[machine]\nnane = "a"', "[machine]: unknown key 'nane' (did you mean 'name'?)"),
        (NAMED + '[vcpu]\ngest = "x"', "[vcpu]: unknown key 'gest' (did you mean 'guest'?)"),
        (DEVICE + 'imgae = "x"', "[[device]] number 1: unknown key 'imgae' (did you mean 'image'?)"),
        (NAMED + '[[memory]]\nsise = "1M"', "[[memory]] number 1: unknown key 'sise' (did you mean 'size'?)"),
        (NAMED + "[zzz]\n", "unknown key 'zzz'"),
        ("", "[machine]: name is missing"),
        ("machine = 1", "[machine] is not a table"),
        ("[machine]\nname = 7", "[machine]: name is 7, not a text"),
        ('[machine]\nname = "../x"', "the name '../x' is not one"),
        ('[machine]\nname = ""', "the name '' is not one"),
        (f'[machine]\nname = "{"a" * 64}"', "is not one"),
        (NAMED + 'memory = "1X"', "memory: '1X' is not a size in whole pages"),
        (NAMED + "memory = 4097", "memory: 4097 is not a size"),
        (NAMED + "memory = 0", "memory: 0 is not a size"),
        (NAMED + "memory = true", "memory: True is not a size"),
        (NAMED + 'memory = "4G"', "where devices' windows begin"),
        ('memory = "1M"\n' + NAMED, "memory is not a list of tables"),
        ("memory = 5\n" + NAMED, "memory is not a list of tables"),
        (NAMED + 'memory = "1M"\n[[memory]]\nsize = "1M"', "both memory"),
        ("memory = []\n" + NAMED, "no memory"),
        (NAMED + "[[memory]]\ngpa = 0", "None is not a size"),
        (NAMED + '[[memory]]\ngpa = -1\nsize = "1M"', "gpa is -1, not a number"),
        (NAMED + '[[memory]]\ngpa = 7\nsize = "1M"', "the region at 0x7 is not made of whole pages"),
        (NAMED + '[[memory]]\nsize = "2M"\n[[memory]]\ngpa = 0x100000\nsize = "1M"', "overlaps"),
        (NAMED + '[vcpu]\ntracker = "scam"', "[vcpu]: tracker is 'scam' (did you mean 'scan'?)"),
        (NAMED + "[vcpu]\nguest = 1", "[vcpu]: guest is 1, not a text"),
        ("device = 5\n" + NAMED, "device is not a list of tables"),
        ("device = [1]\n" + NAMED, "[[device]] number 1 is not a table"),
        (NAMED + '[[device]]\ntype = "rtc"', "[[device]] number 1: id is missing"),
        (NAMED + '[[device]]\nid = "a"', "[[device]] number 1: type is missing"),
        (NAMED + '[[device]]\nid = "a b"\ntype = "rtc"', "the device id 'a b' is not one"),
        (NAMED + '[[device]]\nid = "a"\ntype = "r/c"', "a: the type 'r/c' is not one"),
        (NAMED + '[[device]]\nid = "vcpu0"\ntype = "rtc"', "two participants are called 'vcpu0'"),
        (DEVICE + '[[device]]\nid = "a"\ntype = "rtc"', "two participants are called 'a'"),
        (DEVICE + 'protocol = "vhost"', "protocol is 'vhost'"),
        (DEVICE + 'tracker = "logs"', "tracker is 'logs' (did you mean 'log'?)"),
        (DEVICE + 'command = "run me"', "command is not a list of texts"),
        (DEVICE + "command = [1]", "command is not a list of texts"),
        (DEVICE + "options = 3", "options is not a table"),
        (DEVICE + 'options = { path = "/etc/passwd" }', "the option path = '/etc/passwd' has characters"),
        (DEVICE + 'options = { "a b" = "c" }', "has characters that may not travel"),
        (DEVICE + 'image = "a\\u0000b"', "not a text"),
        (DEVICE + "irq = 0", "interrupts 0 to 0 are not within 1 to 63"),
        (DEVICE + "irq = 64", "not within 1 to 63"),
        (DEVICE + "irq = 1.5", "irq is 1.5, not a number"),
        (DEVICE + "vectors = 0", "not within 1 to 63"),
        (DEVICE + "vectors = 64", "interrupts 1 to 64 are not within 1 to 63"),
        (DEVICE + "vectors = 1000000000000", "not within 1 to 63"),
        (DEVICE + 'vectors = 2\n[[device]]\nid = "b"\ntype = "rtc"', "b: its interrupts 2 to 2 are partly a's"),
        (NAMED + "".join(f'[[device]]\nid = "d{n}"\ntype = "rtc"\n' for n in range(41)), "41 devices, at most 40"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place_and_a_remedy(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert says in caught.value.reason
    assert "machine.toml" in caught.value.reason
    assert caught.value.remedy
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"[machine\n", "is not TOML"), (b"\xff\xfe", "is not text"), (None, "cannot be read: No such file")],
)
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=says) as caught:
        config.load(path)
    assert str(path) in caught.value.reason


def test_a_file_is_read_with_its_own_directory_as_base(tmp_path: Path) -> None:
    (tmp_path / "machine.toml").write_text(WHOLE)
    assert config.load(tmp_path / "machine.toml").guest == str(tmp_path / "guest.bin")


@pytest.mark.parametrize(
    ("text", "size"),
    [("256M", 256 << 20), ("1G", 1 << 30), ("4K", 4096), ("1MiB", 1 << 20), ("64KB", 64 << 10), (8192, 8192), (" 1M ", 1 << 20)],
)  # fmt: skip
def test_sizes_are_written_as_people_write_them(text: object, size: int) -> None:
    assert config.parse_size(text, "here") == size


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TOML = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
KEYS = st.sampled_from(
    [
        "machine",
        "memory",
        "vcpu",
        "device",
        "name",
        "id",
        "type",
        "gpa",
        "size",
        "irq",
        "vectors",
        "options",
        "image",
    ]
)


@patient
@given(st.dictionaries(KEYS, TOML | st.dictionaries(KEYS, TOML, max_size=4), max_size=4))
def test_whatever_the_file_says_it_is_a_machine_or_a_usage_error(raw: dict[str, object]) -> None:
    raw.setdefault("machine", {"name": "web1"})
    try:
        made = config.parse(raw, "machine.toml", Path("/base"))
    except UsageError:
        return
    assert made.memory_bytes > 0


def test_a_server_behind_a_bridge_is_a_path_of_this_host_and_its_model_is_what_the_guest_sees() -> None:
    raw = tomllib.loads(
        '[machine]\nname = "web1"\n[[device]]\nid = "nvme0"\ntype = "vfio-user"\nserver = "nvme.sock"\n'
        'options = { model = "nvme" }\n[[device]]\nid = "other0"\ntype = "vfio-user"\n'
        '[[device]]\nid = "rtc0"\ntype = "rtc"\noptions = { model = "x" }\n'
    )
    devices = config.parse(raw, "machine.toml", Path("/etc/vm")).devices
    assert devices[0].local == {"server": "/etc/vm/nvme.sock"}
    assert "server" not in devices[0].options
    assert [device.seen_as for device in devices] == ["nvme", "vfio-user", "rtc"]
