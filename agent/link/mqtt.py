"""One MQTT 5 connection driven by the event loop: the daemon's only importer of paho.

paho's callbacks become two futures, a table of confirmations and one bounded stream. paho's own thread is not used: its
select() fails once the process holds 1,024 descriptors. No topic alias: paho.mqtt.python issue 893.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import anyio
from anyio import to_thread
from paho.mqtt.client import Client, ConnectFlags, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.link.broker import Broker, LinkLost, PublishRefused, Received, Will

logger = logging.getLogger(__name__)

_MISC_INTERVAL_S = 1.0
_DISCONNECT_WITH_WILL = 0x04


class Link:
    """`async with Link(broker, will) as link`: connected inside, gone outside; reusable by nobody.

    Leaving without `disconnect()` tells the broker to send the will. At most `receive_maximum` messages are handed out
    unacknowledged; QoS 0 beyond the bounded inbox is dropped and counted in `dropped`.
    """

    def __init__(self, broker: Broker, will: Will | None = None) -> None:
        self._broker = broker
        self._will = will
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=broker.client_id, protocol=MQTTv5, manual_ack=True)
        self._loop: asyncio.AbstractEventLoop
        self._connected: asyncio.Future[bool]
        self._timer: asyncio.TimerHandle | None = None
        self._socket: socket.socket | None = None
        self._confirmations: dict[int, asyncio.Future[Sequence[ReasonCode]]] = {}
        self._inbox, self._messages = anyio.create_memory_object_stream[Received](4 * broker.receive_maximum)
        self._lost: str | None = None
        self._is_abandoned = False
        self.session_present = False
        self.dropped = 0

    async def __aenter__(self) -> Link:
        self._loop = asyncio.get_running_loop()
        self._connected = self._loop.create_future()
        client = self._client
        client.on_connect, client.on_message = self._on_connect, self._on_message
        client.on_publish = lambda _client, _data, message_id, reason, _properties: self._confirm(message_id, [reason])
        client.on_subscribe = lambda _client, _data, message_id, reasons, _properties: self._confirm(message_id, reasons)
        # Twice on a keep-alive time-out.
        client.on_disconnect = lambda _client, _data, _flags, reason, _properties: self._end(f"connection lost: {reason}")
        try:
            with anyio.fail_after(self._broker.timeout_s):
                await to_thread.run_sync(self._connect, abandon_on_cancel=True)
                self._drive()
                self.session_present = await self._connected
        except BaseException as error:
            self._is_abandoned = True
            self._end("connecting failed")
            self._close()
            if isinstance(error, (OSError, ValueError)):
                raise LinkLost(f"no connection to {self._broker.host}:{self._broker.port}: {error or type(error).__name__}") from error
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._goodbye("the link was closed", ReasonCode(PacketTypes.DISCONNECT, identifier=_DISCONNECT_WITH_WILL))
        self._close()

    def disconnect(self) -> None:
        """Says goodbye: the broker forgets the will."""
        self._goodbye("the link was disconnected", None)

    def _goodbye(self, why: str, reason: ReasonCode | None) -> None:
        if self._lost is None:
            self._client.disconnect(reason)
            self._client.loop_write()  # now: the event loop will not write for this socket again
        self._end(why)

    async def subscribe(self, topics: Sequence[str]) -> None:
        """QoS 1, retained messages on every call. Raises LinkLost, also when the broker refuses one of the topics."""
        filters = [(topic, SubscribeOptions(qos=1)) for topic in topics]
        code, message_id = self._client.subscribe(filters)
        for topic, reason in zip(topics, await self._confirmed(code, message_id), strict=False):
            if reason.is_failure:
                raise LinkLost(f"subscription to {topic} refused: {reason}; check the broker's ACL for this client")

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        expiry_s: int | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> None:
        """Returns once the broker has it (QoS 1) or it is on its way (QoS 0). Raises LinkLost or PublishRefused."""
        if self._lost is not None:
            raise LinkLost(self._lost)
        options = _properties(PacketTypes.PUBLISH)
        if expiry_s is not None:
            options.MessageExpiryInterval = max(1, expiry_s)
        for name, value in (properties or {}).items():
            options.UserProperty = (name, value)
        info = self._client.publish(topic, payload, qos, retain, options)
        if qos == 0:
            return
        for reason in await self._confirmed(info.rc, info.mid):
            if reason.is_failure:
                raise PublishRefused(f"publication to {topic} refused: {reason}")

    async def messages(self) -> AsyncIterator[Received]:
        """Publications in the broker's order. Ends only by raising LinkLost."""
        async for message in self._messages:
            yield message
        raise LinkLost(self._lost or "the link was closed")

    def acknowledge(self, message: Received) -> None:
        """Call it once the message is safe; until then the broker delivers it again after a reconnect."""
        if self._lost is None and message.qos > 0:
            self._client.ack(message.message_id, message.qos)

    async def _confirmed(self, code: MQTTErrorCode, message_id: int | None) -> Sequence[ReasonCode]:
        if message_id is None or code != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._end(f"paho could not send: {code!s}")
            raise LinkLost(self._lost)
        confirmation = self._confirmations[message_id] = self._loop.create_future()
        try:
            with anyio.fail_after(self._broker.timeout_s):
                reasons: Sequence[ReasonCode] = await confirmation
                return reasons
        except TimeoutError as error:
            self._end(f"no answer from the broker within {self._broker.timeout_s} s")
            raise LinkLost(self._lost) from error
        finally:
            self._confirmations.pop(message_id, None)

    def _connect(self) -> None:
        # In a thread: name resolution, TCP and TLS block, and so does reading secrets.
        _configure(self._client, self._broker, self._will)
        self._client.on_socket_open = self._on_socket_open
        options = _properties(PacketTypes.CONNECT)
        options.SessionExpiryInterval, options.ReceiveMaximum = self._broker.session_expiry_s, self._broker.receive_maximum
        self._client.connect(
            self._broker.host, self._broker.port, keepalive=self._broker.keepalive_s, clean_start=False, properties=options
        )
        if self._is_abandoned:
            self._close()

    def _on_socket_open(self, _client: Client, _data: object, sock: Any) -> None:
        self._socket = sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _drive(self) -> None:
        # From here on paho is only ever called on the event loop.
        sock, client, loop = self._socket, self._client, self._loop
        if sock is None or sock.fileno() < 0:
            raise LinkLost("the broker closed the connection at once")
        loop.add_reader(sock, self._read)
        client.on_socket_register_write = lambda _client, _data, sock: loop.add_writer(sock, client.loop_write)
        client.on_socket_unregister_write = lambda _client, _data, sock: loop.remove_writer(sock)  # type: ignore[assignment]  # its bool is ignored
        client.on_socket_close = lambda _client, _data, _sock: self._leave_loop()
        if client.want_write():
            loop.add_writer(sock, client.loop_write)
        self._timer = loop.call_later(_MISC_INTERVAL_S, self._misc)

    def _read(self) -> None:
        self._client.loop_read()
        # TLS may hold decrypted bytes that no descriptor will announce.
        while isinstance(sock := self._client.socket(), ssl.SSLSocket) and sock.pending() > 0:
            self._client.loop_read()

    def _misc(self) -> None:
        self._client.loop_misc()
        if self._lost is None:
            self._timer = self._loop.call_later(_MISC_INTERVAL_S, self._misc)

    def _on_connect(self, _client: Client, _data: object, flags: ConnectFlags, reason: ReasonCode, _properties: Properties | None) -> None:
        if reason.is_failure:
            self._end(f"the broker refused the connection: {reason}")
        elif not self._connected.done():
            self._connected.set_result(flags.session_present)

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        given = message.properties
        received = Received(
            message.topic,
            bytes(message.payload),
            message.retain,
            getattr(given, "MessageExpiryInterval", None),
            dict(getattr(given, "UserProperty", [])),
            message.mid,
            message.qos,
        )
        try:
            self._inbox.send_nowait(received)
        except anyio.WouldBlock:
            self.dropped += 1
        except anyio.BrokenResourceError:
            self._end("nobody reads the messages any more")

    def _confirm(self, message_id: int, reasons: Sequence[ReasonCode]) -> None:
        confirmation = self._confirmations.get(message_id)
        if confirmation is not None and not confirmation.done():
            confirmation.set_result(reasons)

    def _end(self, why: str) -> None:
        # Every way out passes here, some twice: the first reason stays.
        if self._lost is not None:
            return
        self._lost = why
        if self._timer is not None:
            self._timer.cancel()
        self._leave_loop()
        waiting: Iterable[asyncio.Future[Any]] = (self._connected, *self._confirmations.values())
        for future in waiting:
            if not future.done():
                future.set_exception(LinkLost(why))
                future.exception()  # retrieved: its reader may have been cancelled
        self._inbox.close()

    def _leave_loop(self) -> None:
        # Before the descriptor is closed: the selector would take a later socket of the same number for this one.
        if self._socket is not None and self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)

    def _close(self) -> None:
        # paho would call into the loop once more from its destructor.
        client = self._client
        client.on_socket_close = client.on_socket_register_write = client.on_socket_unregister_write = client.on_disconnect = None
        self._messages.close()
        if self._socket is not None:
            self._socket.close()


class _HandshakeSocket(ssl.SSLSocket):
    """Closes itself when the handshake fails, for then paho forgets it."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


def _configure(client: Client, broker: Broker, will: Will | None) -> None:
    client.connect_timeout = broker.timeout_s
    client.max_inflight_messages_set(broker.receive_maximum)
    if broker.username is not None:
        client.username_pw_set(broker.username, broker.password_file.read_text().strip() if broker.password_file else None)
    if broker.uses_tls or broker.ca_file or broker.certificate_file:
        context = ssl.create_default_context(cafile=str(broker.ca_file) if broker.ca_file else None)
        context.sslsocket_class = _HandshakeSocket
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if broker.certificate_file:
            context.load_cert_chain(broker.certificate_file, broker.key_file)
        client.tls_set_context(context)
    if will is not None:
        options = _properties(PacketTypes.WILLMESSAGE)
        options.WillDelayInterval, options.MessageExpiryInterval = will.delay_s, will.expiry_s
        client.will_set(will.topic, will.payload, qos=1, retain=True, properties=options)


def _properties(packet: int) -> Any:
    return Properties(packet)  # type: ignore[no-untyped-call]  # its fields are set by name and checked at run time
