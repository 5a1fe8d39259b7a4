"""Calls: that each ends, how, and what becomes of descriptors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from migrate.bus import Bus, Call, Interface, Method, PrivateBus, Signal
from migrate.bus.messages import Message
from migrate.errors import (
    BlobError,
    BusError,
    DeviceGone,
    DeviceRefused,
    DeviceTimeout,
    FerryError,
    IncompatibleError,
    InDoubtError,
    LocalProtocolError,
    Phase,
    Reason,
    TrackerError,
)

NAME = "org.vmferry.Test"
OnBus = Callable[[Callable[[PrivateBus], Awaitable[Any]]], Any]


def serving(handler: Callable[..., Awaitable[Any]], takes: str = "", gives: str = "") -> Interface:
    def names(signature: str) -> list[str]:
        return [f"arg{number}" for number in range(len(signature.replace("ay", "y")))]

    return Interface(NAME, [Method("Do", takes, gives, names(takes), names(gives), handler)])


async def two(private: PrivateBus, interface: Interface | None = None) -> tuple[Bus, Bus]:
    server, client = await Bus.connect(private.address), await Bus.connect(private.address)
    if interface is not None:
        server.export("/x", interface)
    return server, client


async def raises(error: FerryError, private: PrivateBus, **options: Any) -> FerryError:
    """What the caller sees where the handler raised `error`."""

    async def fail(_call: Call) -> None:
        raise error

    server, client = await two(private, serving(fail))
    with pytest.raises(FerryError) as caught:
        await client.call(server.unique_name, "/x", NAME, "Do", timeout=5, **options)
    await server.close()
    await client.close()
    return caught.value


def test_a_call_that_is_not_answered_ends_at_its_deadline_and_names_the_device(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        async def hang(_call: Call) -> None:
            await asyncio.Event().wait()

        server, client = await two(private, serving(hang))
        loop = asyncio.get_running_loop()
        started = loop.time()
        with pytest.raises(DeviceTimeout, match=r"disk0 did not answer Do within 0\.2 s") as caught:
            await client.call(
                server.unique_name, "/x", NAME, "Do", timeout=0.2, device="disk0", phase=Phase.SAVE
            )
        assert 0.19 < loop.time() - started < 2
        assert (caught.value.device, caught.value.phase) == ("disk0", "save")
        assert not client._pending
        await server.close()
        await client.close()

    on_bus(scenario)


def test_an_answer_that_comes_too_late_has_its_descriptors_closed(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        late = asyncio.Event()

        async def give(_call: Call) -> int:
            await late.wait()
            return os.memfd_create("late")

        server, client = await two(private, serving(give, gives="h"))
        with pytest.raises(DeviceTimeout):
            await client.call(server.unique_name, "/x", NAME, "Do", timeout=0.05)
        cancelled = asyncio.create_task(client.call(server.unique_name, "/x", NAME, "Do", timeout=5))
        await asyncio.sleep(0)
        cancelled.cancel()
        late.set()
        # Whatever the server sent before it answers this has reached the client.
        await client.call(server.unique_name, "/", "org.freedesktop.DBus.Peer", "Ping", timeout=5)
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await server.close()
        await client.close()  # and on_bus sees no descriptor left

    on_bus(scenario)


def test_an_answer_in_the_moment_of_a_cancellation_has_its_descriptors_closed(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        async def give(_call: Call) -> int:
            return os.memfd_create("given")

        server, client = await two(private, serving(give, gives="h"))
        call = asyncio.create_task(client.call(server.unique_name, "/x", NAME, "Do", timeout=5))
        deliver = client._on_message

        def deliver_and_cancel(message: Message) -> None:
            deliver(message)
            if message.fds:
                call.cancel()

        client._link._on_message = deliver_and_cancel
        with pytest.raises(asyncio.CancelledError):
            await call
        await server.close()
        await client.close()  # and on_bus sees no descriptor left

    on_bus(scenario)


def test_a_handler_that_was_not_entered_when_we_close_leaves_no_descriptor(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        async def keep(_call: Call, _fd: int) -> None:
            await asyncio.Event().wait()

        server, client = await two(private, serving(keep, "h"))
        deliver = server._on_message
        closing: list[asyncio.Task[None]] = []

        def close_and_deliver(message: Message) -> None:
            closing.append(asyncio.create_task(server.close()))
            deliver(message)

        server._link._on_message = close_and_deliver
        fd = os.memfd_create("x")
        with pytest.raises(DeviceGone):
            await client.call(server.unique_name, "/x", NAME, "Do", "h", [fd], timeout=5)
        os.close(fd)
        await asyncio.gather(*closing)
        await client.close()

    on_bus(scenario)


def test_a_call_to_a_process_that_ends_meanwhile_fails_at_once(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        called = asyncio.Event()

        async def hang(_call: Call) -> None:
            called.set()
            await asyncio.Event().wait()

        server, client = await two(private, serving(hang))
        call = asyncio.create_task(
            client.call(server.unique_name, "/x", NAME, "Do", timeout=30, device="disk0")
        )
        await called.wait()
        await server.close()
        with pytest.raises(DeviceGone, match="disk0"):
            await asyncio.wait_for(call, 5)
        with pytest.raises(DeviceGone, match="disk0"):
            await client.call(server.unique_name, "/x", NAME, "Do", timeout=30, device="disk0")
        await client.close()

    on_bus(scenario)


def test_calls_fail_at_once_when_the_bus_dies_and_ever_after(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        called, told = asyncio.Event(), asyncio.Event()

        async def hang(_call: Call) -> None:
            called.set()
            await asyncio.Event().wait()

        server, client = await two(private, serving(hang))
        client.on_disconnect(told.set)
        call = asyncio.create_task(client.call(server.unique_name, "/x", NAME, "Do", timeout=30))
        await called.wait()
        await private.stop()
        with pytest.raises(DeviceGone, match="closed the connection"):
            await asyncio.wait_for(call, 5)
        await asyncio.wait_for(told.wait(), 5)
        assert client.closed.is_set()
        with pytest.raises(DeviceGone):
            await asyncio.wait_for(client.call(server.unique_name, "/x", NAME, "Do", timeout=30), 1)
        with pytest.raises(BusError):
            await client.request_name("org.vmferry.X", queue=True)
        with pytest.raises(BusError):
            client.emit("/x", NAME, "S")
        told.clear()
        client.on_disconnect(told.set)
        await asyncio.wait_for(told.wait(), 5)
        await server.close()
        await client.close()

    on_bus(scenario)


def test_our_own_close_is_no_disconnect_and_ends_what_waits(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        async def hang(_call: Call) -> None:
            await asyncio.Event().wait()

        server, client = await two(private, serving(hang))
        client.on_disconnect(lambda: pytest.fail("told of a disconnect"))
        call = asyncio.create_task(client.call(server.unique_name, "/x", NAME, "Do", timeout=30))
        await asyncio.sleep(0)
        await client.close()
        await client.close()
        with pytest.raises(DeviceGone):
            await call
        await server.close()

    on_bus(scenario)


def test_an_error_of_ours_arrives_as_what_it_was(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        sent = TrackerError(
            "no userfaultfd", remedy="use --tracker log", phase=Phase.PREFLIGHT, device="disk0"
        )
        caught = await raises(sent, private)
        assert type(caught) is TrackerError
        assert caught.as_reason() == sent.as_reason()
        every = [Reason("a", "preflight", "one", "x"), Reason("b", "preflight", "two", "y")]
        caught = await raises(IncompatibleError(every), private)
        assert caught.reasons() == every

    on_bus(scenario)


def test_a_device_speaks_for_itself_only(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        said = BlobError("damaged", device="somebody-else", phase=Phase.COMMIT)
        caught = await raises(said, private, device="uart0", phase=Phase.LOAD)
        assert type(caught) is BlobError
        assert (caught.device, caught.phase, caught.reason) == ("uart0", "load", "damaged")
        caught = await raises(InDoubtError("believe me"), private, device="uart0")
        assert type(caught) is DeviceRefused
        assert caught.exit_code == 1

    on_bus(scenario)


def test_a_peer_s_words_reach_a_terminal_without_control_characters(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        caught = await raises(BlobError("\x1b[2Jgone\nexit 0" + "x" * 5000), private, device="uart0")
        assert caught.reason.startswith("[2Jgone exit 0x")
        assert len(caught.reason) <= 2000

    on_bus(scenario)


def test_what_a_handler_trips_over_stays_at_home(on_bus: OnBus, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(private: PrivateBus) -> None:
        async def trip(_call: Call) -> None:
            raise FileNotFoundError(2, "secret", "/etc/shadow")

        server, client = await two(private, serving(trip))
        with pytest.raises(DeviceRefused) as caught:
            await client.call(server.unique_name, "/x", NAME, "Do", timeout=5, device="uart0")
        assert "shadow" not in str(caught.value)
        assert "Traceback" not in str(caught.value)
        assert "log" in str(caught.value)
        await server.close()
        await client.close()

    on_bus(scenario)
    assert "/etc/shadow" in caplog.text


def test_an_answer_of_the_wrong_type_is_refused_and_its_descriptors_closed(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        async def give(_call: Call) -> tuple[int, str]:
            return os.memfd_create("wrong"), "wrong"

        server, client = await two(private, serving(give, gives="hs"))
        with pytest.raises(DeviceRefused, match="'hs' where 'ay'"):
            await client.call(
                server.unique_name, "/x", NAME, "Do", timeout=5, device="uart0", reply_signature="ay"
            )
        await server.close()
        await client.close()

    on_bus(scenario)


def test_a_handler_that_gives_something_else_than_it_promised_is_an_error_and_no_hang(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        async def give(_call: Call) -> str:
            return "not bytes"

        server, client = await two(private, serving(give, gives="ay"))
        with pytest.raises(FerryError, match="does not fit"):
            await client.call(server.unique_name, "/x", NAME, "Do", timeout=5)
        await server.close()
        await client.close()

    on_bus(scenario)


def test_descriptors_travel_both_ways_and_are_close_on_exec(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        async def swap(_call: Call, first: int, word: str, second: int) -> tuple[int, str, int]:
            assert not os.get_inheritable(first)
            return second, word + "!", first

        server, client = await two(private, serving(swap, "hsh", "hsh"))
        mine = [os.memfd_create("a"), os.memfd_create("b")]
        os.write(mine[0], b"A")
        os.write(mine[1], b"B")
        for second in (mine[1], mine[0]):
            # The second time the same descriptor goes twice.
            body = [mine[0], "word", second]
            first, word, last = await client.call(
                server.unique_name, "/x", NAME, "Do", "hsh", body, timeout=5
            )
            assert (word, os.pread(last, 1, 0)) == ("word!", b"A")
            assert os.pread(first, 1, 0) == os.pread(second, 1, 0)
            assert not os.get_inheritable(first)
            os.close(first)
            os.close(last)
        for fd in mine:
            os.close(fd)
        await server.close()
        await client.close()

    on_bus(scenario)


def test_descriptors_of_a_call_that_fails_or_is_nobody_s_are_closed(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        given: list[int] = []

        async def refuse(_call: Call, fd: int) -> None:
            given.append(fd)
            if len(given) == 2:
                os.close(fd)  # a handler may close it before it raises
                given.append(os.memfd_create("somebody else's, of the same number"))
                assert given[2] == fd
            raise BlobError("no")

        server, client = await two(private, serving(refuse, "h"))
        fd = os.memfd_create("x")
        for path, member, signature, body in (
            ("/x", "Do", "h", [fd]),
            ("/x", "Do", "h", [fd]),
            ("/x", "Do", "hs", [fd, "x"]),
            ("/x", "Undo", "h", [fd]),
            ("/nowhere", "Do", "h", [fd]),
        ):
            with pytest.raises(FerryError):
                await client.call(server.unique_name, path, NAME, member, signature, body, timeout=5)
        os.fstat(given[2])
        os.close(given[2])
        os.close(fd)
        await server.close()
        await client.close()

    on_bus(scenario)


def test_a_descriptor_that_is_closed_already_does_not_cost_the_connection(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        server, client = await two(private)
        fd = os.memfd_create("x")
        os.close(fd)
        with pytest.raises(LocalProtocolError, match="cannot be passed"):
            await client.call(server.unique_name, "/x", NAME, "Do", "h", [fd], timeout=5)
        assert await client.uid_of(server.unique_name) == os.getuid()
        await server.close()
        await client.close()

    on_bus(scenario)


def test_a_message_that_the_bus_would_not_take_is_refused_and_the_connection_lives(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        server, client = await two(private)
        with pytest.raises(LocalProtocolError, match="memfd"):
            await client.call(server.unique_name, "/x", NAME, "Do", "ay", [bytes(64 << 20)], timeout=5)
        assert await client.pid_of(server.unique_name) == os.getpid()
        await server.close()
        await client.close()

    on_bus(scenario)


def test_the_largest_message_we_send_is_one_that_the_bus_takes(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        async def measure(_call: Call, data: bytes) -> int:
            return len(data)

        server, client = await two(private, serving(measure, "ay", "u"))
        size = (63 << 20) - 300
        assert await client.call(server.unique_name, "/x", NAME, "Do", "ay", [bytes(size)], timeout=30) == [
            size
        ]
        await server.close()
        await client.close()

    on_bus(scenario)


def test_names_are_queued_for_and_owners_listed_in_order(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        a, b = await two(private)
        assert await a.queued_owners("org.vmferry.Device1") == []
        assert await a.request_name("org.vmferry.Device1", queue=True) is True
        assert await b.request_name("org.vmferry.Device1", queue=True) is False
        assert await b.queued_owners("org.vmferry.Device1") == [a.unique_name, b.unique_name]
        with pytest.raises(BusError, match="taken"):
            await b.request_name("org.vmferry.Device1", queue=False)
        with pytest.raises(DeviceGone, match=r":1\.999 is not on the bus"):
            await b.pid_of(":1.999")
        await a.close()
        await b.close()

    on_bus(scenario)


def test_a_name_s_end_is_told_once_and_also_when_it_was_over_before(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        a, b = await two(private)
        told: asyncio.Queue[str] = asyncio.Queue()
        b.watch_name(a.unique_name, lambda: told.put_nowait("first"))
        b.watch_name(b.unique_name, lambda: told.put_nowait("ours"))
        stop = b.watch_name(a.unique_name, lambda: told.put_nowait("stopped"))
        stop()
        gone = a.unique_name
        await a.close()
        assert await asyncio.wait_for(told.get(), 5) == "first"
        b.watch_name(gone, lambda: told.put_nowait("late"))
        assert await asyncio.wait_for(told.get(), 5) == "late"
        await b.pid_of(b.unique_name)
        assert told.empty()
        await b.close()

    on_bus(scenario)


def test_signals_reach_who_asked_for_them_until_they_stop(on_bus: OnBus) -> None:
    async def scenario(private: PrivateBus) -> None:
        a, b = await two(private, Interface(NAME, signals=[Signal("Rang", "su", ["who", "times"])]))
        heard: asyncio.Queue[tuple[str, str, list[Any]]] = asyncio.Queue()
        stop = await b.on_signal(NAME, "Rang", lambda *signal: heard.put_nowait(signal))
        await b.on_signal(NAME, "Rang", lambda *_: pytest.fail("not from this sender"), sender=b.unique_name)
        a.emit("/x", NAME, "Rang", "su", ["me", 3])
        assert await asyncio.wait_for(heard.get(), 5) == (a.unique_name, "/x", ["me", 3])
        stop()
        a.emit("/x", NAME, "Rang", "su", ["me", 4])
        await b.call(a.unique_name, "/", "org.freedesktop.DBus.Peer", "Ping", timeout=5)
        assert heard.empty()
        await a.close()
        await b.close()

    on_bus(scenario)
