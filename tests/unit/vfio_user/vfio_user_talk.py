"""A session and its backend, without a socket: `ask` gives the payload of a reply, or the errno of an error reply."""

from __future__ import annotations

from vfio_user_backend import MemoryBackend, command

from devices.protocols.vfio_user import messages as m
from devices.protocols.vfio_user import version as v
from devices.protocols.vfio_user.client_link import ClientLink
from devices.protocols.vfio_user.messages import Command
from devices.protocols.vfio_user.session import Session

#: What a client proposes that wants all there is but a twin socket.
EVERYTHING = v.OURS


class Talk:
    def __init__(
        self, capabilities: v.Capabilities | None = EVERYTHING, link: ClientLink | None = None
    ) -> None:
        """:param capabilities: None: nothing is negotiated."""
        self.backend = MemoryBackend()
        self.session = Session(self.backend, link)
        if capabilities is not None:
            assert isinstance(self.ask(Command.VERSION, v.Version(0, 1, capabilities).encode()), bytes)

    def ask(self, number: int, payload: bytes = b"", fds: list[int] | None = None) -> bytes | int:
        reply = self.session.handle(command(number, payload, fds=fds))
        assert reply is not None
        header = m.Header._make(m.HEADER.unpack_from(reply))
        assert (header.id, header.command, header.size) == (7, number, len(reply))
        if header.flags & m.ERROR:
            assert len(reply) == m.HEADER_SIZE
            assert not self.session.out_fds
            return header.error
        assert header.flags == m.REPLY
        return reply[m.HEADER_SIZE :]

    def taken(self) -> list[int]:
        """The descriptors that go with the last reply; the caller's."""
        fds = list(self.session.out_fds)
        self.session.out_fds.clear()
        return fds
