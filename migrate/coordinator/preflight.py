"""Everything that is compared before anything moves: the manifest, and all reasons against it. Pure where it can be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from migrate.coordinator.pages_out import Sent
from migrate.coordinator.participants import QEMU_TYPE, Participants, tracker_of
from migrate.errors import IncompatibleError, Phase, Reason, RemoteProtocolError, UsageError
from migrate.machine.config import (
    NAME,
    OPTION,
    VCPU_ID,
    DeviceConfig,
    MachineConfig,
    QemuConfig,
    RegionConfig,
    check_regions,
)
from migrate.protocol import messages as m
from migrate.state import versions

#: What the two sides can do beyond the first version of the protocol; empty so far.
FEATURES: tuple[str, ...] = ()


def _reason(device: str | None, text: str, remedy: str) -> Reason:
    return Reason(device, str(Phase.PREFLIGHT), text, remedy)


def check_source(parts: Participants, against: Sequence[Reason] = ()) -> None:
    """What the source can know by itself.

    :param against: what its VMM says.
    :raises IncompatibleError: with every participant that cannot be moved.
    """
    reasons = [
        *against,
        *(
            _reason(
                member.id,
                f"it cannot be moved: {member.info.obstacle}",
                "see its documentation, or start another in its place",
            )
            for member in parts.members
            if member.info.obstacle
        ),
    ]
    reasons += [
        _reason(
            member.id,
            "it writes guest memory and has no working dirty tracker",
            'set tracker = "compare" for it in machine.toml (costs a pass over memory while stopped), or run a newer kernel',
        )
        for member in parts.members
        if not member.info.opaque and tracker_of(member) == "untracked" and parts.qemu is None
    ]
    reasons += [
        _reason(
            member.id,
            f"its image is not known ({disk.option}), so nobody can see that the destination has the same",
            f"adopt the machine again, with --image {member.id}=PATH",
        )
        for member in parts.members
        for disk in member.info.disks
        if disk.option not in member.entry["images"]
    ]
    if reasons:
        raise IncompatibleError(reasons)


def check_hello(hello: m.Hello) -> None:
    """:raises RemoteProtocolError: if we share no version of the protocol."""
    if m.PROTOCOL_VERSION not in hello.versions:
        raise RemoteProtocolError(
            f"{hello.host} ({hello.software}) speaks versions {', '.join(map(str, hello.versions))} of the protocol, "
            f"we speak {m.PROTOCOL_VERSION}",
            phase=Phase.PREFLIGHT,
            remedy="upgrade the older of the two",
        )


def manifest(
    parts: Participants, job: str, epoch: int, tokens: Mapping[tuple[str, str], str], *, check_only: bool
) -> m.Manifest:
    """:param tokens: those written beside the images, by device and option."""
    description = parts.description
    return m.Manifest(
        machine=description["name"],
        job=job,
        epoch=epoch,
        check_only=check_only,
        regions=tuple(m.RegionEntry(region["gpa"], region["size"]) for region in description["regions"]),
        devices=tuple(member.to_entry(tokens) for member in parts.members),
        features=FEATURES,
    )


def check_accept(parts: Participants, answer: m.Accept) -> dict[str, int]:
    """The version to write for each participant.

    :raises RemoteProtocolError: if the destination asks for one that was not offered.
    """
    for member in parts.members:
        if not member.info.opaque and answer.versions.get(member.id) not in member.info.writable:
            raise RemoteProtocolError(
                f"the destination wants version {answer.versions.get(member.id)} of {member.id}, which was not offered",
                phase=Phase.PREFLIGHT,
                device=member.id,
                remedy="see its log",
            )
    return answer.versions


def stopped(number: int, sent: Sent, blobs: dict[str, bytes]) -> m.Stopped:
    return m.Stopped(
        number,
        sent.pages,
        sent.digests,
        {name: hashlib.sha256(blob).digest() for name, blob in blobs.items()},
    )


# -- the destination's side ------------------------------------------------------------------------------------------------


def is_qemu(manifest: m.Manifest) -> bool:
    return any(entry.id == VCPU_ID and entry.type == QEMU_TYPE for entry in manifest.devices)


def incoming_config(
    manifest: m.Manifest,
    available: Sequence[str],
    images: Mapping[str, dict[str, str]],
    qemu: QemuConfig | None = None,
) -> MachineConfig:
    """The machine that a manifest describes, with those participants that this host offers. Nothing of the peer's is a path.

    :param images: by device and option, where this host has them. :param qemu: how this host starts its QEMU, if it is one.

    :raises UsageError: if it is no machine: the peer is hostile until it has proved otherwise.
    """
    where = "the manifest"
    if not NAME.fullmatch(manifest.machine):
        raise UsageError(f"{where}: {manifest.machine[:40]!r} is not a machine's name")
    regions = [RegionConfig(region.gpa, region.size) for region in manifest.regions]
    check_regions(regions, where, qemu=qemu is not None)
    devices = []
    vcpu = False
    for entry in manifest.devices:
        if not NAME.fullmatch(entry.id) or not NAME.fullmatch(entry.type):
            raise UsageError(f"{where}: {entry.id[:40]!r} of type {entry.type[:40]!r} is not a device")
        for key, value in entry.options.items():
            if not NAME.fullmatch(key) or not OPTION.fullmatch(value):
                raise UsageError(
                    f"{where}: {entry.id}: the option {key[:40]!r} has characters that may not travel"
                )
        if entry.id == VCPU_ID:
            vcpu = entry.id in available
            if qemu is not None and NAME.fullmatch(backend := entry.options.get("backend", "")):
                qemu = replace(qemu, backend=backend)
        elif entry.id in available:
            devices.append(
                DeviceConfig(
                    entry.id,
                    entry.type,
                    entry.protocol,
                    gpa=entry.gpa,
                    irq=entry.irq,
                    vectors=entry.vectors,
                    tracker="compare" if entry.tracker == "compare" else "",
                    options=dict(entry.options),
                    local=images.get(entry.id, {}),
                )
            )
    if len({entry.id for entry in manifest.devices}) != len(manifest.devices):
        raise UsageError(f"{where}: two devices have one id")
    regions.sort(key=lambda region: region.gpa)
    return MachineConfig(manifest.machine, regions, devices, vcpu=vcpu, qemu=qemu)


def check_memory(manifest: m.Manifest, free_bytes: int) -> list[Reason]:
    need = sum(region.size for region in manifest.regions)
    if need > free_bytes:
        return [
            _reason(
                None,
                f"the machine has {need >> 20} MiB of memory, this host has {free_bytes >> 20} MiB free",
                "free memory on the destination, or choose another",
            )
        ]
    return []


def compare(manifest: m.Manifest, parts: Participants) -> tuple[dict[str, int], list[Reason]]:
    """What the waiting participants can load of what the source writes: a version for each, and every reason against."""
    agreed: dict[str, int] = {}
    reasons: list[Reason] = []
    for entry in manifest.devices:
        member = parts.by_id.get(entry.id)
        if member is None:
            continue  # not offered here: its reason was given where that was found out
        info = member.info
        if info.opaque or entry.opaque:
            if info.opaque != entry.opaque:
                reasons.append(
                    _reason(
                        entry.id,
                        "one side knows org.vmferry.Device1 and the other does not",
                        "run the same release",
                    )
                )
            continue
        version = versions.can_read(info.readable, entry.versions)
        if version is None:
            text, remedy = versions.why_not(entry.type, readable=info.readable, writable=entry.versions)
            reasons.append(_reason(entry.id, text, remedy))
            continue
        if version == info.version == max(entry.versions):
            differ = versions.digests_differ(
                entry.type, version, source=entry.digest, destination=info.digest
            )
            if differ is not None:
                reasons.append(_reason(entry.id, *differ))
        agreed[entry.id] = version
    return agreed, reasons


def as_json(machine: MachineConfig) -> dict[str, object]:
    """The machine as the daemon is asked for it."""
    found: dict[str, object] = json.loads(machine.to_json())
    return found
