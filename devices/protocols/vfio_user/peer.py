"""What the parts of a session share about its client."""

from __future__ import annotations

from dataclasses import dataclass, field

from devices.protocols.vfio_user.framing import close_all
from devices.protocols.vfio_user.version import Capabilities


@dataclass(slots=True)
class Peer:
    #: What the client can take. Until it has said so: what one can that says nothing.
    client: Capabilities = field(default_factory=Capabilities)
    #: What was answered.
    agreed: Capabilities = field(default_factory=Capabilities)
    #: Descriptors that go with the reply to the present message; owned here until then.
    out_fds: list[int] = field(default_factory=list)

    @property
    def most_data(self) -> int:
        """Bytes of data that may go in one message, either way (vfio-user.rst, Read and Write Operations)."""
        return min(self.client.max_data_xfer_size, self.agreed.max_data_xfer_size)

    def forget_fds(self) -> None:
        close_all(self.out_fds)
