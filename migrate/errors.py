"""The one tree of errors. Every failure that a person may read is one of these; nothing else crosses a process border.

    FerryError                      exit 1  failed, the source runs
    ├── UsageError                  exit 2  the words of a call, a machine.toml, a host.toml
    ├── DeniedError                 exit 1  the caller is a user who may only look
    ├── IncompatibleError           exit 3  refused before anything was stopped; carries *all* reasons
    ├── InDoubtError                exit 4  COMMIT is in the ledger and the peer is silent; the machine is stopped
    ├── InterruptedByUser           exit 130
    ├── CancelledByUser             exit 1  `ferry cancel`; the source runs
    ├── GuestEnded                  exit 1  the guest powered off, or its machine failed, while it was being moved
    ├── NotConvergingError          exit 1  the guest dirties faster than the channel sends
    ├── MemoryFault                 exit 1  a memfd without its seals, an address outside every region
    │   └── TrackerError            exit 1  a dirty tracker that does not work here
    ├── StateError                  exit 1
    │   ├── SchemaError             exit 1  a schema file is wrong
    │   └── BlobError               exit 1  a state blob is damaged, not canonical or out of its bounds
    ├── DeviceError                 exit 1  a device process refused, failed, vanished or missed its deadline
    │   ├── DeviceRefused
    │   ├── DeviceGone
    │   └── DeviceTimeout
    ├── BusError                    exit 1  the private bus itself
    ├── LedgerError                 exit 1
    ├── TransportError              exit 1  connecting, TLS, a channel that broke
    │   └── ChannelClosed
    └── ProtocolError               exit 1
        ├── LocalProtocolError              we were about to break the protocol
        └── RemoteProtocolError             the peer broke it

Every error has four typed fields beside its text: `phase`, `device`, `reason` and `remedy`. `Reason` is the same four fields as
plain data: what travels on the wire, over D-Bus and in `--json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Where in the life of a machine or a migration something happened."""

    SETUP = "setup"  #: starting a machine, a daemon or a command
    PREFLIGHT = "preflight"  #: the manifest is compared; nothing has moved
    PRECOPY = "pre-copy"  #: memory moves, the guest runs
    STOP = "stop"  #: the two-phase quiesce
    SAVE = "save"  #: last pages and state blobs leave the source
    LOAD = "load"  #: the destination stages, validates, applies
    COMMIT = "commit"  #: between READY and COMMITTED
    RESUME = "resume"  #: between COMMITTED and RUNNING
    RECOVER = "recover"  #: finding out who runs the machine
    RUNNING = "running"  #: no migration at all


#: Longest text that a peer may make us keep or show, in characters.
MAX_TEXT = 2000


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something did not happen: a device (or None), a phase, a reason and a remedy."""

    device: str | None
    phase: str
    reason: str
    remedy: str

    def to_wire(self) -> dict[str, str | None]:
        return {"device": self.device, "phase": self.phase, "reason": self.reason, "remedy": self.remedy}

    @classmethod
    def from_wire(cls, value: object) -> Reason:
        """Read a reason that a peer sent. Never raises: a reason is shown, not obeyed, so what is odd is cut or named."""
        if not isinstance(value, Mapping):
            return cls(
                None, "unknown", "the peer gave a reason that cannot be read", "look at the peer's log"
            )

        def text(key: str) -> str:
            item = value.get(key)
            return item[:MAX_TEXT] if isinstance(item, str) else ""

        device = value.get("device")
        return cls(
            device[:255] if isinstance(device, str) else None, text("phase"), text("reason"), text("remedy")
        )

    def __str__(self) -> str:
        where = f"{self.device}: " if self.device else ""
        tail = f" ({self.remedy})" if self.remedy else ""
        return f"{where}{self.reason}{tail}"


class FerryError(Exception):
    """Base of the tree; see the module's docstring.

    :param reason: what went wrong, in one line, for the person who reads it at three in the morning.
    :param remedy: what to do about it.
    :param phase: where it happened.
    :param device: the participant's Id, where one is to blame.
    """

    exit_code = 1
    #: Stable name, the tail of the D-Bus error name and the `code` in JSON.
    code = "Failed"

    def __init__(
        self, reason: str, *, remedy: str = "", phase: Phase | str = Phase.SETUP, device: str | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy
        self.phase = str(phase)
        self.device = device

    def as_reason(self) -> Reason:
        return Reason(self.device, self.phase, self.reason, self.remedy)

    def reasons(self) -> list[Reason]:
        """All reasons; one for most errors, all of them for a refusal."""
        return [self.as_reason()]

    def __str__(self) -> str:
        return str(self.as_reason())


class UsageError(FerryError):
    exit_code = 2
    code = "Usage"


class DeniedError(FerryError):
    code = "Denied"


class IncompatibleError(FerryError):
    """Refused in the preflight, with every reason at once. Nothing was stopped."""

    exit_code = 3
    code = "Incompatible"

    def __init__(self, reasons: Sequence[Reason]) -> None:
        first = reasons[0]
        super().__init__(first.reason, remedy=first.remedy, phase=Phase.PREFLIGHT, device=first.device)
        self.all_reasons = list(reasons)

    def reasons(self) -> list[Reason]:
        return list(self.all_reasons)

    def __str__(self) -> str:
        return "; ".join(str(reason) for reason in self.all_reasons)


class InDoubtError(FerryError):
    exit_code = 4
    code = "InDoubt"


class InterruptedByUser(FerryError):
    exit_code = 130
    code = "Interrupted"


class CancelledByUser(FerryError):
    code = "Cancelled"


class GuestEnded(FerryError):
    code = "GuestEnded"


class NotConvergingError(FerryError):
    code = "NotConverging"


class MemoryFault(FerryError):
    code = "Memory"


class TrackerError(MemoryFault):
    code = "Tracker"


class StateError(FerryError):
    code = "State"


class SchemaError(StateError):
    code = "Schema"


class BlobError(StateError):
    code = "Blob"


class DeviceError(FerryError):
    code = "Device"


class DeviceRefused(DeviceError):
    code = "DeviceRefused"


class DeviceGone(DeviceError):
    code = "DeviceGone"


class DeviceTimeout(DeviceError):
    code = "DeviceTimeout"


class BusError(FerryError):
    code = "Bus"


class LedgerError(FerryError):
    code = "Ledger"


class TransportError(FerryError):
    code = "Transport"


class ChannelClosed(TransportError):
    code = "ChannelClosed"


class ProtocolError(FerryError):
    """Abstract: raise LocalProtocolError or RemoteProtocolError."""

    code = "Protocol"


class LocalProtocolError(ProtocolError):
    code = "LocalProtocol"


class RemoteProtocolError(ProtocolError):
    code = "RemoteProtocol"
