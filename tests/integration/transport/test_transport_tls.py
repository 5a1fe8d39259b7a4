"""Mutual TLS between two hosts: who gets in, and what each side is told when somebody does not."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from transport_rig import SESSION, Hosts, Server, in_thread

from migrate.errors import ChannelClosed, FerryError, RemoteProtocolError, TransportError, UsageError
from migrate.transport.channel import Channel
from migrate.transport.control import ControlStream, accept_control, accept_page, dial_control, dial_page
from migrate.transport.preamble import SIZE, Kind, Preamble, encode
from migrate.transport.tls import Credentials

FIRST = Preamble(Kind.PAGE, 3, SESSION)


def serve(server: Server, credentials: Credentials | None, *, timeout: float = 20) -> Future[Channel]:
    return server.take_after_preamble(
        lambda sock, first: accept_page(sock, first, credentials, timeout=timeout)
    )


def dial(
    server: Server, credentials: Credentials | None, *, name: str | None = None, timeout: float = 20
) -> Channel:
    return dial_page(server.destination(name), credentials, SESSION, 3, timeout=timeout)


def refusals(
    server: Server, ours: Credentials, theirs: Credentials, *, name: str | None = None
) -> tuple[FerryError, FerryError]:
    """What the client and the server say about a connection that must fail."""
    accepted = serve(server, theirs)
    with pytest.raises(FerryError) as client:
        dial(server, ours, name=name)
    with pytest.raises(FerryError) as host:
        accepted.result(20)
    for error in (client.value, host.value):
        assert error.remedy
        assert "\n" not in str(error)
    return client.value, host.value


def test_two_hosts_of_one_ca_talk_and_know_each_other_by_name(server: Server, hosts: Hosts) -> None:
    accepted = serve(server, replace(hosts.b, allow=frozenset({"hosta"})))
    ours = dial(server, replace(hosts.a, allow=frozenset({"127.0.0.1"})))
    theirs = accepted.result(20)
    assert (ours.peer, theirs.peer) == ("127.0.0.1", "hosta")
    ours.send(b"ping")
    got = bytearray(4)
    theirs.recv_into(memoryview(got))
    assert got == b"ping"
    ours.close()
    theirs.close()


def test_a_control_stream_opens_the_same_way(server: Server, hosts: Hosts) -> None:
    async def both() -> tuple[str, str, bytes]:
        loop = asyncio.get_running_loop()
        server.sock.setblocking(False)

        async def host() -> ControlStream:
            sock, _ = await loop.sock_accept(server.sock)
            first = await loop.sock_recv(sock, SIZE)
            assert first == encode(Preamble(Kind.CONTROL, 0, SESSION))
            sock.setblocking(True)
            return await accept_control(sock, Preamble(Kind.CONTROL, 0, SESSION), hosts.b, timeout=20)

        theirs, ours = await asyncio.gather(
            host(), dial_control(server.destination("hostb"), hosts.a, SESSION, timeout=20)
        )
        async with theirs, ours:
            await ours.write(b"hello", timeout=5)
            return ours.peer, theirs.peer, await theirs.read_exactly(5, timeout=5)

    assert asyncio.run(both()) == ("hostb", "hosta", b"hello")


def test_a_client_of_another_ca_with_the_same_name_learns_that_it_is_of_another_ca(
    server: Server, hosts: Hosts
) -> None:
    client, host = refusals(server, hosts.stranger, hosts.b)
    assert "refuses our certificate: it is from another CA" in str(client)
    assert "is from another CA" in str(host)


def test_a_server_of_another_ca_is_refused_and_told_so(server: Server, hosts: Hosts) -> None:
    client, host = refusals(server, hosts.a, hosts.stranger)
    assert "is from another CA" in str(client)
    assert "refuses our certificate: it is from another CA" in str(host)


def test_an_expired_certificate_is_named_on_both_sides(server: Server, hosts: Hosts) -> None:
    client, host = refusals(server, hosts.expired, hosts.b)
    assert "refuses our certificate: it has expired" in str(client)
    assert "has expired" in str(host)
    client, host = refusals(server, hosts.a, hosts.expired)
    assert "has expired" in str(client)
    assert "refuses our certificate: it has expired" in str(host)


def test_a_certificate_of_tomorrow_points_to_the_clocks(server: Server, hosts: Hosts) -> None:
    client, host = refusals(server, hosts.unborn, hosts.b)
    assert "clocks" in str(client)
    assert "not valid yet" in str(host)
    assert "clocks" in str(host)


def test_a_server_with_another_name_is_refused_by_listing_its_names(server: Server, hosts: Hosts) -> None:
    client, host = refusals(server, hosts.a, hosts.b, name="hostc")
    assert "is for hostb, 127.0.0.1, localhost, not for hostc" in str(client)
    assert "?name=hostb" in client.remedy
    assert "refused the name in our certificate" in str(host)


def test_a_client_may_restrict_which_destination_it_trusts(server: Server, hosts: Hosts) -> None:
    client, host = refusals(server, replace(hosts.a, allow=frozenset({"hostc"})), hosts.b)
    assert "is not allowed (allowed: hostc)" in str(client)
    assert "refused the name" in str(host)


def test_a_client_that_is_not_on_the_allow_list_is_refused_and_told_so(server: Server, hosts: Hosts) -> None:
    client, host = refusals(server, hosts.a, replace(hosts.b, allow=frozenset({"hostc", "hostd"})))
    assert "does not allow the name of our certificate" in str(client)
    assert "hostc" not in str(client)  # whom else a host trusts is not the peer's business
    assert "the name hosta is not allowed (allowed: hostc, hostd)" in str(host)


def test_a_server_without_an_allow_list_lets_nobody_in(server: Server, hosts: Hosts) -> None:
    accepted = serve(server, replace(hosts.b, allow=frozenset()))
    with pytest.raises(ChannelClosed):
        dial(server, hosts.a)
    with pytest.raises(UsageError, match="no list of hosts"):
        accepted.result(20)


def raw_client(server: Server, context: ssl.SSLContext) -> bytes:
    """A client that is not ours, up to its first read."""
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(encode(FIRST))
        with context.wrap_socket(sock) as secured:
            secured.sendall(encode(FIRST))
            return secured.recv(1)


def test_a_client_without_a_certificate_is_refused_with_the_alert_for_it(
    server: Server, hosts: Hosts
) -> None:
    accepted = serve(server, hosts.b)
    with pytest.raises(ssl.SSLError) as caught:
        raw_client(server, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    assert caught.value.reason == "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    with pytest.raises(TransportError, match="sent no certificate"):
        accepted.result(20)


def test_a_client_of_tls_1_2_is_refused_with_the_alert_for_it(server: Server, hosts: Hosts) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    accepted = serve(server, hosts.b)
    with pytest.raises(ssl.SSLError) as caught:
        raw_client(server, context)
    assert caught.value.reason == "TLSV1_ALERT_PROTOCOL_VERSION"
    with pytest.raises(TransportError, match=r"does not speak TLS 1\.3"):
        accepted.result(20)


def test_a_server_of_tls_1_2_is_refused(server: Server, hosts: Hosts) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(hosts.b.cert, hosts.b.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def old(sock: socket.socket, _: Preamble) -> None:
        with sock, pytest.raises(ssl.SSLError):
            context.wrap_socket(sock, server_side=True)

    accepted = server.take_after_preamble(old)
    with pytest.raises(TransportError, match=r"does not speak TLS 1\.3"):
        dial(server, hosts.a)
    accepted.result(20)


def test_a_peer_that_answers_in_the_clear_does_not_speak_tls(server: Server, hosts: Hosts) -> None:
    def web(sock: socket.socket, _: Preamble) -> None:
        with sock:
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            sock.recv(1 << 16)

    accepted = server.take_after_preamble(web)
    with pytest.raises(TransportError, match="does not speak TLS") as caught:
        dial(server, hosts.a)
    assert "vmferry's port" in caught.value.remedy
    accepted.result(20)


def test_a_client_that_talks_garbage_where_tls_should_begin_is_refused(server: Server, hosts: Hosts) -> None:
    accepted = serve(server, hosts.b)
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(encode(FIRST) + b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(TransportError, match="does not speak TLS"):
            accepted.result(20)


def test_a_refused_client_can_read_the_alert_although_it_said_more_than_was_read(
    server: Server, hosts: Hosts
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    hello = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="hostb").do_handshake()
    accepted = serve(server, hosts.b)
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(encode(FIRST) + hello.read() + bytes(20_000))
        answer = b""
        while data := sock.recv(100):  # to its end: a reset could overtake the alert on a real network
            answer += data
    assert answer[:1] == b"\x15"  # a record of the type alert (RFC 8446 §5.1)
    with pytest.raises(TransportError, match=r"does not speak TLS 1\.3"):
        accepted.result(20)


def test_a_destination_that_closes_at_once_is_a_closed_channel_with_a_hint(
    server: Server, hosts: Hosts
) -> None:
    accepted = server.take_after_preamble(lambda sock, _: sock.close())
    with pytest.raises(ChannelClosed, match="during the TLS handshake") as caught:
        dial(server, hosts.a)
    assert "session" in caught.value.remedy
    accepted.result(20)


def test_silence_ends_by_the_deadline_on_either_side(server: Server, hosts: Hosts) -> None:
    held: Future[socket.socket] = server.take(lambda sock: sock)
    with pytest.raises(TransportError, match="does not answer the TLS handshake in time"):
        dial(server, hosts.a, timeout=0.2)
    held.result(20).close()

    accepted = serve(server, hosts.b, timeout=0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(encode(FIRST))
        with pytest.raises(TransportError, match="does not answer the TLS handshake in time"):
            accepted.result(20)


def test_a_client_that_falls_silent_after_the_handshake_does_not_hold_the_server(
    server: Server, hosts: Hosts
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(hosts.a.cert, hosts.a.key)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    accepted = serve(server, hosts.b, timeout=0.5)
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(encode(FIRST))
        with context.wrap_socket(sock), pytest.raises(TransportError, match="in time"):
            accepted.result(20)


def relay_changing(server: Server, target: Server, change: Any) -> Future[None]:
    """A man in the middle who changes the preamble and passes on the rest."""

    def between(near: socket.socket) -> None:
        far = socket.create_connection(("127.0.0.1", target.port))
        far.sendall(change(near.recv(SIZE, socket.MSG_WAITALL)))

        def pump(source: socket.socket, sink: socket.socket) -> None:
            try:
                while data := source.recv(65536):
                    sink.sendall(data)
            except OSError:
                pass
            for sock in (source, sink):
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

        back = threading.Thread(target=pump, args=(far, near))
        back.start()
        pump(near, far)
        back.join()
        near.close()
        far.close()

    return server.take(between)


def test_a_preamble_changed_on_the_way_is_noticed_inside_tls(server: Server, hosts: Hosts) -> None:
    target = Server()
    accepted = serve(target, hosts.b)
    middle = relay_changing(server, target, lambda first: first[:9] + b"\x07" + first[10:])
    with pytest.raises(TransportError, match="another session than we asked for"):
        dial(server, hosts.a)
    with pytest.raises(RemoteProtocolError, match="another session inside TLS"):
        accepted.result(20)
    middle.result(20)
    target.sock.close()


def test_a_relay_that_changes_nothing_is_no_hindrance(server: Server, hosts: Hosts) -> None:
    target = Server()
    accepted = serve(target, hosts.b)
    middle = relay_changing(server, target, lambda first: first)
    ours = dial(server, hosts.a)
    accepted.result(20).close()
    ours.close()
    middle.result(20)
    target.sock.close()


def test_tcp_is_never_in_the_clear(server: Server) -> None:
    with pytest.raises(UsageError, match="needs certificates"):
        dial(server, None)
    accepted = serve(server, None)
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(encode(FIRST))
        with pytest.raises(UsageError, match="in the clear"):
            accepted.result(20)
        assert sock.recv(1) == b""


def test_our_own_mistake_is_found_before_anything_is_sent(server: Server, hosts: Hosts) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.pem"):
        dial(server, replace(hosts.a, key=hosts.a.key.with_name("nowhere.pem")))
    server.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.sock.accept()


def test_an_abort_never_drops_the_tls_before_the_connection(server: Server, hosts: Hosts) -> None:
    accepted = serve(server, hosts.b)
    ours = dial(server, hosts.a)
    theirs = accepted.result(20)
    ours.abort()
    # SSLSocket.shutdown would have made a plain socket of it, and a send in another thread a leak
    assert ours._tls.version() == "TLSv1.3"  # type: ignore[attr-defined]
    with pytest.raises(ChannelClosed, match="given up by this side"):
        ours.send(b"page")
    ours.close()
    theirs.close()


def test_a_name_that_does_not_resolve_and_a_port_where_nobody_listens_say_so(
    server: Server, hosts: Hosts
) -> None:
    server.sock.close()
    with pytest.raises(TransportError, match="nobody listens there"):
        dial(server, hosts.a)
    destination = replace(server.destination(), host="no-such-host.invalid")
    with pytest.raises(TransportError, match=r"no-such-host\.invalid cannot be resolved"):
        in_thread(lambda: dial_page(destination, hosts.a, SESSION, 0, timeout=20)).result(60)
