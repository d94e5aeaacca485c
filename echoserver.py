"""A WebSocket echo server in one module: synchronous, one thread for each connection, no asyncio.

    python echoserver.py 1234                    # sends every text and binary message back to its sender

    with EchoServer(port=0) as server:           # in a program: serves in a background thread
        client = websocket.create_connection(server.url)

To learn the pattern, read `EchoServer`: three callbacks and a list of clients. `Server`, below it, supplies what the
package websocket-server lacks. The other chapters have the words of RFC 6455.

`Connection`, the streams and `Server` own sockets and threads and decide nothing about the protocol. The chapters with
"bytes in, values out" decide all of it and touch no socket. One thread accepts. Each connection has a thread, which
alone reads from it and calls its callbacks. Any thread may send. `Connection._send_lock` keeps the frames on one wire
in order; `Server._lock` guards the register, the states and the counts. They are taken in this order.
"""
from __future__ import annotations

import argparse
import base64
import codecs
import collections
import contextlib
import email.utils
import enum
import errno
import functools
import hashlib
import http
import logging
import os
import re
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import zlib
from typing import (Any, Callable, Counter, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple,
                    Union)

import _socket

logger = logging.getLogger("echoserver")

# websocket-server calls logging.basicConfig() when it is imported. That does nothing while the root logger has a
# handler, so the host program's logging stays as it was.
_placeholder = logging.NullHandler()
logging.getLogger().addHandler(_placeholder)
from websocket_server import WebsocketServer
logging.getLogger().removeHandler(_placeholder)

__version__ = "1.1.0"
__all__ = ["EchoServer", "Server"]

Client = Dict[str, Any]
Data = Union[bytes, bytearray]

# ==== The server: the listening socket, its threads, the register of connections ===================================


class Server(WebsocketServer):
    """websocket-server's WebsocketServer with what it lacks: the whole protocol, limits, safety in threads.

    It takes websocket-server's arguments (`port` 0 is a free one; `key` and `cert`, two PEM files, make it wss://), and
    each option below by name. Raises OSError when it cannot listen or use the certificate, ValueError for an option
    out of range, TypeError for one that does not exist.
    """

    # Options; times are in seconds
    max_size = 16 * 2**20  # longest message taken, in bytes, decompressed; a longer one gets Close 1009
    max_pending = 256 * 2**20  # bytes in unfinished messages (over it, Close 1013) and unsent answers (cut); 0: any
    max_clients = 10000  # connections at once, those in their opening handshake included; over it, 503
    open_timeout = 10.0  # for the whole opening handshake, TLS included
    close_timeout = 10.0  # for the closing handshake, and for `close()` as a whole
    send_timeout = 20.0  # in which a client must take 256 KiB, or all there is; else it is cut
    ping_interval = 20.0  # silence before a client gets a Ping; 0: never
    ping_timeout = 20.0  # further silence before it is dropped; 0: never
    origin: Union[str, Iterable[str], None] = None  # an origin, or several, whose pages are served; others get 403
    compression = True  # whether permessage-deflate is negotiated
    ssl_context: Optional[ssl.SSLContext] = None  # serves wss://
    reuse_port = False  # lets several processes share the port
    debug = False  # shows connections and messages through the logger "echoserver"; may be set at any time

    # Knobs for speed
    looks = 64  # times that a lone client's connection looks for the next message before it sleeps, 1 or 2 µs each
    switch_interval = 0.0  # seconds that each client adds to the interpreter's switch interval; 50e-6 for thousands
    processors: Set[int] = frozenset()  # type: ignore[assignment]  # what a thread held to one may use; see main()

    request_queue_size = 4096  # connections that wait to be accepted: a burst is not refused
    allow_reuse_address = sys.platform != "win32"  # there it would let another program take the port over
    spare_threads = 100  # threads beyond max_clients, for 503s and for connections that are ending

    _least = {"max_size": 0, "max_pending": 0, "max_clients": 1, "open_timeout": 0.01, "close_timeout": 0.01,
              "send_timeout": 0.01, "ping_interval": 0, "ping_timeout": 0}
    _options = {*_least, "origin", "compression", "ssl_context", "reuse_port", "debug"}

    def __init__(self, host: str = "127.0.0.1", port: int = 0, loglevel: int = logging.WARNING,
                 key: Optional[str] = None, cert: Optional[str] = None, **options: Any) -> None:
        for name, value in options.items():
            if name not in self._options:
                raise TypeError("there is no option %r" % name)
            setattr(self, name, value)
        limits = [(name, getattr(self, name), low, 2**33) for name, low in self._least.items()]
        for name, value, low, high in [("port", port, 0, 65535), *limits]:
            if not low <= value <= high:
                raise ValueError("%s must be from %g to %g, not %r" % (name, low, high, value))
        origins = [self.origin] if isinstance(self.origin, str) else self.origin
        self.origins = None if origins is None else set(origins)
        for origin in self.origins or ():
            if not ORIGIN.fullmatch(origin):
                raise ValueError("origin must be as browsers send it, like https://example.org, not %r" % origin)
        if cert is not None or key is not None:
            self.ssl_context = tls_context(cert, key)
        if self.ssl_context and self.ssl_context.protocol == ssl.PROTOCOL_TLS_CLIENT:
            raise ValueError("ssl_context must be for a server, not for clients")
        self._lock = threading.RLock()  # guards the next five, states and id_counter; reentrant for signal handlers
        self._connections: Dict[Connection, threading.Thread] = {}  # every connection that has a thread
        self._states: Counter[State] = collections.Counter()  # how many of them are in each state
        self._pending = 0  # bytes that count towards max_pending
        self._closing = False  # close() was called
        self._background: Optional[threading.Thread] = None  # what start() started
        self._stopping = False  # only ever becomes True: no new connections
        self._serving_pid: Optional[int] = None  # the process that serves; a child that it forks does not
        self._accepting_ended = threading.Event()
        self._accepting_ended.set()
        self._last_complaint = float("-inf")  # belongs to the accepting thread
        self.closed = threading.Event()
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            found.sort(key=lambda info: info[0] != socket.AF_INET)
            self.address_family, self._address = found[0][0], found[0][4]
            super().__init__(str(self._address[0]), port, loglevel, key, cert)
        except OSError as error:
            hint = {errno.EADDRINUSE: "choose another port or stop the program that has this one", errno.EACCES:
                    "choose a port from 1024 up"}.get(error.errno or 0, "choose an address of this machine")
            raise OSError(error.errno, "cannot listen on %s port %d: %s; %s"
                          % (host, port, error.strerror or error, hint)) from None
        self.host = host
        self._log("Echoserver listening on port %d", self.port)

    @property
    def tick(self) -> float:
        """The longest wait in one receive; the times are looked at in between."""
        return max(0.01, min(filter(None, (self.ping_interval, self.ping_timeout, self.close_timeout))) / 2)

    def server_bind(self) -> None:
        """Bind the listening socket (socketserver calls this)."""
        self.server_address = self._address  # with the scope of an IPv6 address
        if self.reuse_port:
            if not hasattr(socket, "SO_REUSEPORT"):
                raise OSError(errno.ENOTSUP, "this system cannot share a port between processes")
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if self.address_family == socket.AF_INET6:
            with contextlib.suppress(OSError):  # IPv4 clients too, where the system allows
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    @property
    def url(self) -> str:
        """Where a client on this machine connects."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        host = "[%s]" % host.replace("%", "%25") if ":" in host else host
        return "%s://%s:%d" % ("wss" if self.ssl_context else "ws", host, self.port)

    # Life: start, serve, close

    def start(self) -> None:
        """Serve in a background thread. Does nothing if that was started before."""
        with self._lock:
            self._check_not_closed()
            if self._background is None:
                thread = threading.Thread(target=self.serve_forever, name="echoserver accept", daemon=True)
                self._serving_pid = os.getpid()
                thread.start()
                self.thread = self._background = thread
                self.daemon = True  # as websocket-server says of a server in the background

    def _check_not_closed(self) -> None:
        if self._closing:
            raise RuntimeError("this server was closed; make a new one")

    def serve_forever(self, poll_interval: Optional[float] = 0.5) -> None:
        """Serve in this thread until the server is stopped, and close it. `poll_interval` is socketserver's."""
        with self._lock:  # either close() waits until this ends, or this does nothing
            if self._closing and threading.current_thread() is self._background:
                return
            self._check_not_closed()
            self.thread, self._serving_pid = threading.current_thread(), os.getpid()
            self._accepting_ended.clear()
        try:
            with contextlib.suppress(OSError):  # closed meanwhile
                self.socket.settimeout(poll_interval or 0.5)
            while not self._stopping:
                try:
                    self.process_request(*self.get_request())
                except socket.timeout:
                    pass
                except Exception as error:  # out of files or threads, most likely
                    self._wait_for_room(error)
        finally:
            self._accepting_ended.set()
            self.close()

    def run_forever(self, threaded: bool = False) -> None:
        """Serve in this thread until closed, or ended by Ctrl-C; or in the background (websocket-server's name)."""
        with contextlib.suppress(KeyboardInterrupt):
            self.start() if threaded else self.serve_forever()

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        """Give a new connection a thread of its own (socketserver's name for it)."""
        connection = Connection(request, client_address, self)
        thread = threading.Thread(target=connection.run, name="echoserver connection", daemon=True)
        try:
            if self.verify_request(request, client_address) and self._enter(connection, thread):
                thread.start()
        finally:
            if thread.ident is None:  # it has not started; a Ctrl-C may come when it has
                self.forget(connection)
                request.close()

    def _wait_for_room(self, error: Exception) -> None:
        """Keep what there is, and neither spin nor fill the log, while the system has no room for more."""
        if self._stopping or "interpreter shutdown" in str(error):  # the program ends, and starts no more threads
            return
        if time.monotonic() > self._last_complaint + 60:
            self._last_complaint = time.monotonic()
            logger.warning("no room for another connection: %s; %d stay, new ones wait", error, len(self._connections))
        time.sleep(0.05)

    def stop(self) -> None:
        """Accept no more connections; `serve_forever()` then closes the server. Safe in a signal handler."""
        if self._stopping or self._in_forked_child():
            return
        self._stopping = True
        with contextlib.suppress(OSError), socket.socket(self.address_family) as waker:
            waker.setblocking(False)
            waker.connect(self.socket.getsockname())  # ends accept()

    def close(self, code: int = 1001, reason: Union[str, bytes] = "") -> None:
        """Send Close to every client, wait for them, cut those that do not answer. It may be called again.

        Returns when no thread of the server is left but the calling one, after `close_timeout` at the latest. In a
        forked child it only closes the child's copies. In a signal handler call `stop()` instead. Raises ValueError
        for what a Close frame may not carry.
        """
        payload = close_payload(code, reason)
        if self._in_forked_child():  # shutdown() would reach the parent's, and a lock may have no holder any more
            for sock in [self.socket, *(connection.request for connection in list(self._connections))]:
                sock.close()
            self.closed = threading.Event()
            self.closed.set()
            return
        end = time.monotonic() + self.close_timeout
        grace = end - self.close_timeout / 4  # the rest is for cutting off those who do not answer
        me = threading.current_thread()
        with self._lock:
            again, self._closing = self._closing, True
            inside = me is self._background or me in self._connections.values()
        if again and inside:  # another call waits for this thread, so it must not wait for others
            return
        if again:  # one after the other, since on PyPy two threads cannot join a third
            self.closed.wait(self.close_timeout)
        self.stop()
        if me is not self.thread:
            self._accepting_ended.wait(self.close_timeout)
        self.server_close()
        with self._lock:
            connections = dict(self._connections)
        threads = {self._background, *connections.values()} - {me, None}
        for connection in connections:
            if connection.state is CONNECTING:
                connection.abort()
        self._close_all(connections, payload, grace)
        join(threads, grace)
        for connection, thread in connections.items():
            if thread is not me:
                self.cut(connection)
        stuck = join(threads, end)
        if stuck:
            logger.warning("closed, but %d threads have not ended", stuck)
        self.closed.set()

    shutdown = _shutdown_gracefully = close  # socketserver's waits for ever before the start, or in a callback

    def server_close(self) -> None:
        """Stop accepting connections, and close the listening socket."""
        self.stop()
        self.socket.close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _in_forked_child(self) -> bool:
        return self._serving_pid not in (None, os.getpid())

    def _close_all(self, connections: Iterable[Connection], payload: bytes, until: float) -> None:
        """Send Close to all at once. One that another thread sends to is tried again, and cut at the time `until`."""
        waiting = [] if self._in_forked_child() else [c for c in connections if not c.try_send(CLOSE, payload)]
        while waiting and time.monotonic() < until:
            time.sleep(0.01)
            waiting = [connection for connection in waiting if not connection.try_send(CLOSE, payload)]
        for connection in waiting:
            connection.abort()

    # The register

    @property
    def open_clients(self) -> List[Client]:
        """The clients with an open connection, no Close frame sent or received, in order of arrival (a new list)."""
        with self._lock:
            found = [c.client for c in self._connections if c.state is OPEN and c.client]
        return sorted(found, key=lambda client: int(client["id"]))

    clients: Any = property(lambda self: self.open_clients, lambda self, _: None)  # websocket-server sets its own

    def _enter(self, connection: Connection, thread: threading.Thread) -> bool:
        """Register a connection, unless there are far too many. Over `max_clients` it begins as CLOSED, for its 503."""
        with self._lock:
            if self._closing or len(self._connections) >= self.max_clients + self.spare_threads:
                return False
            if self._states[CONNECTING] + self._states[OPEN] >= self.max_clients:
                connection.state = CLOSED
            self._states[connection.state] += 1
            self._connections[connection] = thread
            return True

    def admit(self, connection: Connection, request: Request, subprotocol: Optional[str]) -> bool:
        """Make a connection a client, and OPEN, unless new ones are denied."""
        with self._lock:
            if self._closing or self._deny_clients or connection.state is not CONNECTING:
                return False
            self.id_counter += 1
            connection.client = {
                "id": self.id_counter, "handler": connection, "address": connection.client_address,
                "path": request.path, "headers": request.headers, "subprotocol": subprotocol}
            return self.advance(connection, OPEN)

    def advance(self, connection: Connection, state: State) -> bool:
        """Move a connection to a later state. Returns False if it is there, or past it, already."""
        with self._lock:
            if state <= connection.state:
                return False
            self._states[connection.state] -= 1
            self._states[state] += 1
            connection.state = state
            if self.switch_interval:  # or thousands of threads wake up for the interpreter every 5 ms, and nothing else
                sys.setswitchinterval(min(max(0.005, self._states[OPEN] * self.switch_interval), 0.5))
            return True

    def forget(self, connection: Connection) -> None:
        """Take a connection off the register: its thread is about to close the socket."""
        with self._lock:
            if connection in self._connections:
                self.advance(connection, CLOSED)
                self._states[CLOSED] -= 1
                del self._connections[connection]

    def cut(self, connection: Connection) -> None:
        """End TCP both ways, which wakes every thread that waits there. Not after forget(): by then the number of the
        socket may be another's."""
        with self._lock, contextlib.suppress(OSError):
            if connection in self._connections and not self._in_forked_child():
                connection.request.shutdown(socket.SHUT_RDWR)

    def hold(self, size: int) -> bool:
        """Count bytes that a client makes the server keep, or gives back. False, and over `max_pending`."""
        with self._lock:
            fits = size < 0 or not self.max_pending or self._pending + size <= self.max_pending
            self._pending += size if fits else 0
            return fits

    # The rest of websocket-server's interface works as it is, on these

    def send_message(self, client: Client, msg: Union[str, Data]) -> bool:
        """Send text (str) or binary (bytes), from any thread. Returns True when TCP has the message, False if the
        client is gone. It waits while the client does not read: see `send_timeout`."""
        return client["handler"].send_message(msg)  # type: ignore[no-any-return]

    def handler_to_client(self, handler: Connection) -> Optional[Client]:
        """Return the client of a connection, None if that is not open."""
        return handler.client if handler.state is OPEN else None

    def only_echoes(self) -> bool:
        """Whether the message callback need not be called: its own code is that of an echo (see the decorator of this
        name), and nothing in it is overridden or shown."""
        code = getattr(self.message_received, "only_echoes", None)
        return (code is not None and code is getattr(self.message_received, "__code__", None) and not self.debug
                and type(self).send_message is Server.send_message and "send_message" not in self.__dict__)

    def _multicast(self, msg: Union[str, Data]) -> None:
        for client in self.open_clients:
            self.send_message(client, msg)

    def _disconnect_clients_gracefully(self, status: int = 1000, reason: Union[str, bytes] = b"") -> None:
        payload, until = close_payload(status, reason), time.monotonic() + self.close_timeout
        self._close_all([client["handler"] for client in self.open_clients], payload, until)

    def _terminate_client_handlers(self) -> None:
        for client in self.open_clients:
            client["handler"].abort()

    def _deny_new_connections(self, status: int, reason: Union[str, bytes]) -> None:
        self._deny_clients = close_payload(status, reason)

    def _log(self, text: str, *values: Any) -> None:
        if self.debug:
            logger.setLevel(logging.DEBUG)
            if not logger.hasHandlers():  # the host program has not set logging up
                logger.addHandler(logging.StreamHandler())
            logger.debug(text, *values)


def join(threads: Iterable[Optional[threading.Thread]], until: float) -> int:
    """Wait for threads to end, but not past the time `until`. Return how many have not."""
    for thread in threads:
        if thread and thread.is_alive():
            thread.join(max(0, until - time.monotonic()))
    return sum(thread.is_alive() for thread in threads if thread)


# ==== The echo pattern =============================================================================================


def only_echoes(callback: Callable[..., None]) -> Callable[..., None]:
    """Let the fast path answer in place of a message callback, as long as its code is just the echo below.

    A callback that is edited loses this by itself: what you read is what runs.
    """
    def echo(self: Any, client: Client, server: Server, message: Union[str, bytes]) -> None:
        """Send it back."""
        server.send_message(client, message)

    code, same = callback.__code__, echo.__code__
    if (code.co_code, code.co_names, code.co_varnames) == (same.co_code, same.co_names, same.co_varnames):
        callback.only_echoes = code  # type: ignore[attr-defined]
    return callback


class EchoServer(Server):
    """Send every message back to the client that it came from.

    Three callbacks make a server; override any of them. Each runs in the thread of that client's own connection, so
    it may block, and what it sends is on its way when `send_message` returns. An exception in one is logged, and its
    client gets Close 1011.

    `client` is websocket-server's dictionary: 'id' (1, 2, 3 …), 'address' (host, port) and 'handler' (its
    Connection); and from its opening handshake 'path', 'headers' and 'subprotocol' (or None). `server` is this
    object. The options and the errors are those of `Server`.
    """

    def __init__(self, port: int = 1234, debug: bool = False, host: str = "0.0.0.0", **options: Any) -> None:
        self._clients: Dict[int, Client] = {}  # the list, by number
        self._clients_lock = threading.Lock()  # guards it, since each client has a thread of its own
        super().__init__(host, port, debug=debug, **options)
        self.set_fn_new_client(self.new_client)
        self.set_fn_message_received(self.message_received)
        self.set_fn_client_left(self.client_left)

    def new_client(self, client: Client, server: Server) -> None:
        """The opening handshake is done: put the client on the list."""
        with self._clients_lock:
            self._clients[client["id"]] = client

    @only_echoes  # only for speed: many messages are answered in one write. It goes by itself when the method changes.
    def message_received(self, client: Client, server: Server, message: Union[str, bytes]) -> None:
        """A whole message is here, text as str or binary as bytes: send it back."""
        server.send_message(client, message)

    def client_left(self, client: Client, server: Server) -> None:
        """The connection is over: take the client off the list."""
        with self._clients_lock:
            self._clients.pop(client["id"], None)

    @Server.clients.getter  # type: ignore[untyped-decorator]
    def clients(self) -> List[Client]:
        """The clients on the list with an open connection, in order of arrival (a new list)."""
        with self._clients_lock:
            listed = sorted(self._clients.items())
        return [client for _, client in listed if client["handler"].state is OPEN]

    def __enter__(self) -> EchoServer:
        """Serve in a background thread until the end of the `with` block."""
        self.start()
        return self


# ==== The command line =============================================================================================


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Serve until SIGINT or SIGTERM; return the exit status. A second signal ends the process at once."""
    parser = command_line()
    options = vars(parser.parse_args(argv))
    raise_file_limit()
    try:
        if "keyfile" in options or "certfile" in options:
            options["ssl_context"] = tls_context(options.pop("certfile", None), options.pop("keyfile", None))
        server = EchoServer(**options)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.exit(1, "echoserver: error: %s\n" % (error.strerror or error))

    def stop(*_: object) -> None:
        for number in handlers:
            signal.signal(number, signal.SIG_DFL)
        server.stop()

    interval = sys.getswitchinterval()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in handlers:
            signal.signal(number, stop)
        server.switch_interval = 50e-6
        with one_processor() as server.processors:
            print("Echo server listening on %s port %d: %s (Ctrl-C stops it)"
                  % (server.host, server.port, server.url), flush=True)
            server.serve_forever()
    except OSError as error:  # the line above cannot be written; where nobody reads, nothing more is said
        sys.stdout = None  # or the interpreter tries again at its end
        parser.exit(1, "" if error.errno == errno.EPIPE else "echoserver: error: stdout: %s\n" % error.strerror)
    finally:
        server.close()
        sys.setswitchinterval(interval)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def command_line() -> argparse.ArgumentParser:
    """Describe the command line. What is given goes to `EchoServer` by its own name; the defaults are there."""
    parser = argparse.ArgumentParser(prog="echoserver", argument_default=argparse.SUPPRESS,
                                     description="A WebSocket echo server: every message goes back to its sender.")
    parser.error = lambda message: parser.exit(  # type: ignore[method-assign]
        2, "echoserver: error: %s (-h shows the options)\n" % message)
    option = parser.add_argument
    option("port", nargs="?", type=int, default=1234, help="port to listen on, 0 for a free one (default 1234)")
    option("--host", help="address to listen on (default 0.0.0.0; :: for IPv6 and IPv4)")
    option("-d", "--debug", action="store_true", help="show connections and messages, shortened")
    for name, kind, unit, text in (
            ("max_size", int, "BYTES", "longest message taken"),
            ("max_pending", int, "BYTES", "what unfinished messages and unsent answers hold together; 0: no bound"),
            ("max_clients", int, "N", "connections at once"),
            ("open_timeout", float, "S", "seconds for the opening handshake"),
            ("close_timeout", float, "S", "seconds for the closing handshake"),
            ("send_timeout", float, "S", "seconds in which a client must take 256 KiB, or all there is"),
            ("ping_interval", float, "S", "seconds of silence before a Ping; 0: never"),
            ("ping_timeout", float, "S", "seconds without an answer before the client is dropped; 0: never")):
        default = getattr(Server, name)
        shown = "%d MiB" % (default >> 20) if unit == "BYTES" else "%g" % default
        option("--" + name.replace("_", "-"), type=kind, metavar=unit, help="%s (default %s)" % (text, shown))
    option("--origin", action="append", help="serve the pages of this origin only (may be given again)")
    option("--no-compression", dest="compression", action="store_false", help="decline permessage-deflate")
    option("--certfile", metavar="PEM", help="serve wss:// with this certificate chain")
    option("--keyfile", metavar="PEM", help="its private key, if that is in a file of its own")
    option("--reuse-port", action="store_true", help="let several processes share the port")
    option("--version", action="version", version="echoserver " + __version__)
    return parser


def tls_context(certfile: Optional[str], keyfile: Optional[str] = None) -> ssl.SSLContext:
    """Return a server's TLS context, TLS 1.2 or newer. Raises OSError for files that do not serve, and ValueError for
    a key alone."""
    if certfile is None:
        raise ValueError("a key goes with a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    try:
        context.load_cert_chain(certfile, keyfile, password=lambda: "")  # never ask on the terminal
    except OSError as error:
        files = repr(certfile) if keyfile is None else "%r and %r" % (certfile, keyfile)
        why = error if isinstance(error, ssl.SSLError) or not error.errno else os.strerror(error.errno)
        raise OSError(errno.EINVAL, "cannot use the certificate in %s: %s; it takes a PEM certificate chain and its "
                      "private key, not encrypted" % (files, why)) from None
    return context


def raise_file_limit() -> None:
    """Let this process open as many files, and so hold as many clients, as the system allows."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (10240 if sys.platform == "darwin" else hard, hard))


@contextlib.contextmanager
def one_processor() -> Iterator[Set[int]]:
    """Hold this thread, and the threads that it starts, to one processor. Yield all that they might use.

    With a GIL one thread runs at a time, and threads on several processors only wake each other up. This leaves alone
    processors that somebody has chosen. Several processes take different ones: each claims one by binding a name,
    which the kernel frees when the process ends.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(allowed) < max(2, os.cpu_count() or 0) or not getattr(sys, "_is_gil_enabled", lambda: True)():
        yield set()
        return
    held: Set[int] = set()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a sandbox may forbid any of this
            claim = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            processor = sorted(allowed)[os.getpid() % len(allowed)]  # if all are taken
            for free in sorted(allowed):
                with contextlib.suppress(OSError):
                    claim.bind("\0echoserver on processor %d" % free)
                    processor = free
                    break
            os.sched_setaffinity(0, {processor})
            stack.callback(os.sched_setaffinity, 0, allowed)
            held = allowed
        yield held


# ==== One connection: the life of a thread =========================================================================


class State(enum.IntEnum):
    """The states of a connection, as RFC 6455 names them. Each connection only moves down this list."""
    CONNECTING = 0  # the opening handshake is under way (section 4)
    OPEN = 1  # the 101 is on its way: messages may go both ways (section 4.2.2)
    CLOSING = 2  # a Close frame was sent or received (section 7.1.3)
    CLOSED = 3  # nothing can be sent any more (section 7.1.4)


CONNECTING, OPEN, CLOSING, CLOSED = State


class Connection:
    """One connection, and the life of its thread: setup, handle, finish. It is a client's 'handler'.

    Its own thread alone reads from it. The `send_…` methods and `abort()` may be called in any thread. A `send_…`
    returns True when its bytes are with TCP, and False, sending nothing, when the connection is not open any more.
    """

    client: Optional[Client] = None  # set before the 101 is sent; new_client and client_left are called for it
    compression: Optional[PerMessageDeflate] = None
    state = CONNECTING  # changed by Server.advance()
    closed_first: Optional[str] = None  # who sent the first Close frame, "server" or "client"; guarded by _send_lock
    _deadline = float("inf")  # when to stop waiting for the client to end TCP, once it is about to
    _fragments: Optional[Tuple[int, threading.Event]] = None  # the thread that sends fragments, and their end; as above
    _is_spread = False  # this thread may use every processor
    _callback: Any = None  # the last one, and what only_echoes() said of it
    _callback_echoes = False
    _until_look = 32  # messages until it looks for the next one before it sleeps
    _room = 479  # bytes to receive at once: as many as fit Python's own pools, and more while they are filled

    def __init__(self, request: socket.socket, client_address: Any, server: Server) -> None:
        self.request, self.client_address, self.server = request, (client_address or ("", 0))[:2], server
        self._send_lock = threading.RLock()  # held while a frame goes out; reentrant for signal handlers
        self._tcp = TCPStream(request, server.send_timeout, server.hold)
        self._stream: Union[TCPStream, TLSStream] = self._tcp
        self._looks = server.looks if self._tcp.in_kernel and DONTWAIT else 0

    def run(self) -> None:
        """Live the connection's life, in its own thread."""
        try:
            early = self.setup()
            if self.client:
                self.handle(early)
        except ProtocolError as error:  # section 7.1.7: fail the WebSocket connection
            self._close(close_payload(error.code, error.reason))
        except BaseException:  # sys.exit() too
            logger.exception("client %s gets Close 1011, since an override raised:", self.client and self.client["id"])
            self._close(close_payload(CloseCode.INTERNAL_ERROR, "internal error")) if self.client else self.abort()
        finally:
            self.finish()

    # Setup: section 4.2

    def setup(self) -> bytes:
        """Take the opening handshake; return the bytes that came behind it. `client` is set if it succeeds."""
        server, method = self.server, ""
        try:
            self._tcp.prepare()
            patience = server.open_timeout if self.state is CONNECTING else min(1, server.open_timeout)
            request, early = self._read_request(time.monotonic() + patience)
            method = request.method
            if self.state is CLOSED:
                raise HTTPAnswer(503, "This server has all the clients that it takes.", "Retry-After: 5")
            response, subprotocol, self.compression = accept(request, server.origins, server.compression)
            self._tcp.wait_at_most(server.tick)
            self._tcp.hold_back(True)
        except HTTPAnswer as answer:  # the request was for something else, or cannot be granted
            server.advance(self, CLOSED)  # so that its place is free
            crowded = len(server._connections) > server.max_clients + server.spare_threads // 2
            self._deadline = time.monotonic() + (0 if crowded else 1)
            self._write(answer.head + answer.content * (method != "HEAD"))
            return b""
        except OSError:  # gone, or no TLS: there is nobody to answer
            server.advance(self, CLOSED)
            self._deadline = 0
            return b""
        with self._send_lock:  # nobody's message may overtake the response
            if not server.admit(self, request, subprotocol):
                self._write(response)
                self._close(server._deny_clients or close_payload(CloseCode.GOING_AWAY, ""))
            elif not self._write(response):
                self.client = None  # without the 101 it is no client
        return early

    def _read_request(self, deadline: float) -> Tuple[Request, bytes]:
        """Read a request, all of it before the deadline, in clear text or TLS."""
        receive: Callable[[int], bytes] = functools.partial(self._tcp.receive_by, deadline)
        if self.server.ssl_context:
            self._stream = tls = TLSStream(self._tcp, self.server.ssl_context, receive)
            self._looks = 0  # what comes is ciphertext
            self._use_all_processors()
            tls.handshake()
            receive = tls.recv
        data, parsed = b"", None
        while not parsed:
            try:
                more = receive(4096)
            except TimeoutError:
                raise HTTPAnswer(408, "No full request came in %g seconds." % self.server.open_timeout) from None
            if not more and data:
                raise HTTPAnswer(400, "The request ended before its empty line.")
            if not more:
                raise ConnectionAbortedError
            data += more
            parsed = parse_request(data)
        if isinstance(self._stream, TLSStream):
            self._stream.receive = self._receive_ciphertext
        return parsed

    # Handle: sections 5 to 7

    def handle(self, data: bytes) -> None:
        """Take what the client sends until the connection is over; `data` came with the request."""
        server, client = self.server, self.client or {}
        receiver = Receiver(server.max_size, self.compression, server.hold)
        server._log("newConnection: client %d from %s port %d", client["id"], *client["address"])
        try:
            server.new_client(client, server)
            self._tcp.hold_back(False)
            data = data or self._receive()
            while data:
                if receiver.between_messages and not server.debug:
                    data = self._take_whole_frames(data)  # the fast path; without this line all is only slower
                for opcode, pieces in receiver.feed(data) if data else ():
                    if opcode == CLOSE:
                        self._take_close(bytes(pieces[0]))
                        return
                    if opcode == PING:
                        self.send_frame(PONG, pieces[0])
                    elif opcode != PONG:
                        self._deliver(opcode, *pieces)
                if receiver.left >= LONG or (self.compression and self.compression.used):
                    self._use_all_processors()
                data = self._receive()
        finally:
            receiver.release()

    def _take_whole_frames(self, data: bytes) -> bytes:
        """Take the messages that `data` begins with, by the fast path; return what is left of it."""
        server, client, callback = self.server, self.client, self.server.message_received
        frames, used = whole_frames(data, server.max_size)
        if callback is not self._callback:
            self._callback, self._callback_echoes = callback, server.only_echoes()
        if self._callback_echoes:
            with self._send_lock:
                if self._fragments or not frames:
                    return data
                if self.state is OPEN:
                    self._write(b"".join(frames))
        else:
            each = iter(frames)
            for header, payload in zip(each, each):
                if self.state is OPEN:
                    callback(client, server, payload.decode() if header[0] & TEXT else bytes(payload))
        return data[used:]

    def _deliver(self, opcode: int, *pieces: Data) -> None:
        """Call the callback with a message. What comes after our Close frame is ignored."""
        server, client = self.server, self.client or {}
        if self.state is not OPEN:
            return
        if server.only_echoes():
            self._send_data(opcode, *pieces)
            return
        payload = b"".join(pieces)
        message = payload.decode() if opcode == TEXT else payload
        if server.debug:
            kind = "Message" if opcode == TEXT else "Binary Message"
            server._log("%s received: client %d: %s", kind, client["id"], shorten(message))
        server.message_received(client, server, message)

    def _take_close(self, payload: bytes) -> None:
        """Take a Close frame: answer it, unless it is the answer to ours (section 5.5.1)."""
        if self._close(payload, "client"):
            self._deadline = time.monotonic() + 1  # it sends nothing more, and so ends TCP soon
        else:
            self._deadline = 0  # both sides sent one: end TCP at once (section 7.1.1)

    def _receive(self) -> bytes:
        """Return what the client sends next, b"" when there is nothing to wait for any more.

        After `ping_interval` of silence the client gets a Ping (section 5.5.2); after `ping_timeout` more it is failed.
        """
        server, silence, pinged = self.server, 0.0, False
        while True:
            try:
                if self.state is not OPEN:
                    remaining = self._deadline - time.monotonic()
                    if remaining <= 0:
                        return b""
                    self._tcp.wait_at_most(min(server.tick, remaining))
                self._until_look -= 1
                data = (self._until_look < 0 and self._look()) or self._stream.recv(self._room)
                if len(data) == self._room:
                    self._room = min(4 * self._room, MOST)
                return data
            except TIMED_OUT:
                silence += self._tcp.longest_wait
                self._room = Connection._room
            except OSError:
                return b""
            due = server.ping_timeout if pinged else server.ping_interval or float("inf")
            if self.state is OPEN and silence >= due:
                if pinged:
                    self._close(close_payload(CloseCode.INTERNAL_ERROR, "no answer to a Ping"))
                    return b""
                self.try_send(PING, b"")
                silence, pinged = 0.0, server.ping_timeout > 0

    def _look(self) -> bytes:
        """Return the next bytes if they come very soon, else b"": to be woken costs more than to look a few times.

        Only if no other connection has to wait meanwhile. A look in vain pauses looking for the next 32 messages.
        """
        for _ in range(self._looks if len(self.server._connections) == 1 else 0):
            try:
                return self.request.recv(self._room, DONTWAIT)
            except BlockingIOError:
                pass
        self._until_look = 32
        return b""

    def _receive_ciphertext(self, size: int) -> bytes:
        """Receive for TLS. It may get no plaintext of it and ask again, so time is checked here as in `_receive`."""
        return b"" if self.state is not OPEN and time.monotonic() > self._deadline else self.request.recv(size)

    def _use_all_processors(self) -> None:
        """Let this thread use every processor again: what it does now runs beside the interpreter."""
        if self.server.processors and not self._is_spread:
            os.sched_setaffinity(0, self.server.processors)
        self._is_spread = True

    # Finish: section 7

    def finish(self) -> None:
        """End the connection: our half of TCP first, then, when the client has ended its own, the rest.

        A socket that is closed with bytes unread sends a reset, which may destroy the Close frame or the answer on its
        way. So this reads what still comes, and throws it away, until the client ends or time is up.
        """
        server, client = self.server, self.client or {}
        server.advance(self, CLOSING)
        self._tcp.hold_back(False)
        with contextlib.suppress(OSError):
            self._stream.shutdown()
        try:
            if client:
                server._log("socketDisconnected: client %d", client["id"])
                server.client_left(client, server)
        except BaseException:
            logger.exception("client_left raised, after client %s had left:", client["id"])
        finally:
            with contextlib.suppress(OSError):
                deadline = min(self._deadline, time.monotonic() + server.close_timeout)
                while self._tcp.receive_by(deadline, LONG):
                    pass
            self.abort()
            if self._send_lock.acquire(timeout=server.close_timeout):  # nobody is sending any more
                self._send_lock.release()
            self.compression = None  # its streams need not wait for the garbage collector
            server.forget(self)
            self.request.close()

    def _close(self, payload: bytes, first: str = "server") -> bool:
        """Send a Close frame, once (section 7.1.2). Returns False if one was sent, or cannot be."""
        if not self._send_lock.acquire(timeout=self.server.close_timeout):  # a client that does not read
            self.abort()
            return False
        try:
            return self._begin_closing(first) and self._write(frame(CLOSE, payload))
        finally:
            self._send_lock.release()

    def _begin_closing(self, first: str) -> bool:
        """Start the closing handshake, before its frame goes out: a client that has that is on no list."""
        begins = self.server.advance(self, CLOSING)
        if begins:
            self.closed_first, self._deadline = first, time.monotonic() + self.server.close_timeout
        return begins

    def try_send(self, opcode: int, payload: bytes) -> bool:
        """Send a control frame without waiting; cut a client that does not read. Returns False if another thread is
        sending."""
        if not self._send_lock.acquire(blocking=False):
            return False
        try:
            if self.state is OPEN and (opcode != CLOSE or self._begin_closing("server")):
                self._write(frame(opcode, payload), wait=False)
        finally:
            self._send_lock.release()
        return True

    def abort(self, last_words: bytes = b"") -> None:
        """Cut the TCP connection without a Close frame, after sending some bytes as they are."""
        if last_words:
            with self._send_lock:
                if self.state is OPEN:
                    self._write(last_words)
        self.server.advance(self, CLOSED)  # no lock: its holder may be blocked sending
        self.server.cut(self)

    # Send

    def send_message(self, message: Union[str, Data]) -> bool:
        """Send text (str) or binary (bytes). Raises TypeError for anything else."""
        if isinstance(message, str):
            return self._send_data(TEXT, message.encode())
        if isinstance(message, (bytes, bytearray, memoryview)):
            return self._send_data(BINARY, bytes(message))
        raise TypeError("a message is str or bytes, not %s" % type(message).__name__)

    def send_fragments(self, pieces: Iterable[Union[str, bytes]]) -> bool:
        """Send one message in fragments (section 5.4), each as soon as `pieces` yields it, all str or all bytes.

        Meanwhile control frames may go between them. Messages from other threads wait for the last fragment,
        `send_timeout` at most, and are not sent after that. `pieces` itself must not send messages to this client.
        """
        mine, opcode, kind = (threading.get_ident(), threading.Event()), BINARY, None
        if not self._take_turn(mine):
            return False
        try:
            for piece in pieces:  # no lock is held while this waits for the next one
                if kind is None:
                    kind, opcode = type(piece), TEXT if isinstance(piece, str) else BINARY
                elif type(piece) is not kind:
                    raise TypeError("the fragments of a message are all str or all bytes")
                self.send_frame(opcode, piece.encode() if isinstance(piece, str) else piece, fin=False)
                opcode = CONTINUATION
            return self.send_frame(opcode, b"")
        except BaseException:  # the message cannot be ended, and no other be sent
            self._close(close_payload(CloseCode.INTERNAL_ERROR, "internal error"))
            raise
        finally:
            self._fragments = None
            mine[1].set()

    def send_text(self, message: Union[str, bytes], opcode: int = 0x1) -> bool:
        """Send text; bytes must be UTF-8 (websocket-server's name for it). Raises UnicodeDecodeError."""
        text = message if isinstance(message, str) else message.decode()
        return self.send_message(text) if opcode == TEXT else self.send_frame(opcode, text.encode())

    def send_ping(self, payload: Union[str, bytes] = b"") -> bool:
        """Send a Ping (section 5.5.2)."""
        return self.send_frame(PING, payload.encode() if isinstance(payload, str) else payload)

    def send_pong(self, message: Union[str, bytes] = b"") -> bool:
        """Send a Pong (section 5.5.3)."""
        return self.send_frame(PONG, message.encode() if isinstance(message, str) else message)

    def send_close(self, status: int = 1000, reason: Union[str, bytes] = b"") -> bool:
        """Start the closing handshake (section 7.1.2). Raises ValueError for what a Close frame may not carry."""
        payload = close_payload(status, reason)
        return self.state is OPEN and self._close(payload)

    def send_frame(self, opcode: int, payload: Data, fin: bool = True) -> bool:
        """Send one frame just as it is told: nothing checks that it makes sense at this place."""
        with self._send_lock:
            return self.state is OPEN and self._write(frame(opcode, payload, fin))

    def _send_data(self, opcode: int, *pieces: Data) -> bool:
        """Send one message, in one frame."""
        with self._send_lock:
            if self.state is not OPEN:
                return False
            if not self._fragments:
                compress = self.compression is not None and self.compression.used
                if self.compression and compress:
                    pieces = self.compression.deflate(b"".join(pieces)),
                size = len(pieces[0]) if len(pieces) == 1 else sum(map(len, pieces))
                header = frame_header(opcode, size, True, compress)
                if size <= LONG:
                    return self._write(header + (pieces[0] if len(pieces) == 1 else b"".join(pieces)))
                return all(map(self._write, (header, *pieces)))  # spares a copy
        return self._take_turn() and self._send_data(opcode, *pieces)

    def _take_turn(self, fragments: Optional[Tuple[int, threading.Event]] = None) -> bool:
        """Wait until no message is on its way out in fragments, and let `fragments` be the next. Returns False after
        `send_timeout`, or if the connection is not open any more."""
        deadline = time.monotonic() + self.server.send_timeout
        while True:
            with self._send_lock:
                if not self._fragments:
                    self._fragments = fragments if self.state is OPEN else None
                    return self.state is OPEN
                thread, ended = self._fragments
            if thread == threading.get_ident():
                raise RuntimeError("a message cannot be sent between the fragments of another (section 5.4)")
            if not ended.wait(max(0, deadline - time.monotonic())):
                return False

    def _write(self, data: Data, wait: bool = True) -> bool:
        """Send bytes; _send_lock is held. After a failure the connection is over: a part of a frame may be out."""
        try:
            self._stream.sendall(data, wait)
        except OSError:
            self.abort()
            return False
        return True

    # What else websocket-server's handler has
    connection = property(lambda self: self.request)
    keep_alive = property(lambda self: self.state is OPEN, lambda self, on: on or self.send_close())
    handshake_done = valid_client = property(lambda self: self.state is OPEN)


def shorten(message: Union[str, bytes], limit: int = 80) -> str:
    """Return the message for a log line: escaped, its middle left out, with its size."""
    shown = repr(message if len(message) <= limit else message[:limit // 2])
    if len(message) > limit:
        shown += " … " + repr(message[-limit // 4:])
    return "%s (%d %s)" % (shown, len(message), "characters" if isinstance(message, str) else "bytes")


# ==== Streams: TCP and TLS; every wait has a bound =================================================================

TIMED_OUT = (BlockingIOError, socket.timeout, TimeoutError)  # the kernel's, settimeout()'s and Windows' words for it
DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)
LEAST = 256 * 1024  # bytes that a peer must take within send_timeout, or all there are
LONG = 64 * 1024  # bytes that are sent as one
MOST = 127 * 1024  # bytes to receive at once: a frame of 64 KiB fits, and malloc() does not yet map memory anew


class TCPStream:
    """A connected socket, none of whose waits is without a bound.

    The kernel keeps the time (SO_RCVTIMEO, SO_SNDTIMEO), since settimeout() would cost a poll() for each call. Under
    gevent and eventlet a socket never waits in the kernel, so there settimeout() does it.
    """

    def __init__(self, sock: socket.socket, send_timeout: float, hold: Callable[[int], bool]) -> None:
        self._sock, self._send_timeout, self._hold = sock, send_timeout, hold
        self._send_step = min(1.0, send_timeout / 8)  # the longest wait in send(), which then looks at the clock
        self.in_kernel = isinstance(sock, _socket.socket)
        self.recv = sock.recv  # raises one of TIMED_OUT when nothing comes in time
        self.longest_wait = -1.0

    def prepare(self) -> None:
        """Set the socket's options. Raises OSError."""
        if self._sock.gettimeout() is not None:  # the host program's default
            self._sock.settimeout(None)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # messages leave at once
        if self.in_kernel:
            set_timeout(self._sock, socket.SO_SNDTIMEO, self._send_step)

    def hold_back(self, on: bool) -> None:
        """Let the kernel keep back what is sent, for 0.2 s at most. Until new_client is done with the list, the client
        has no 101; and yet new_client may block."""
        if hasattr(socket, "TCP_CORK"):
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, on)

    def wait_at_most(self, seconds: float) -> None:
        """Bound each wait in recv(), unless it is bounded so already (to a few milliseconds). Raises OSError."""
        seconds = seconds if self.in_kernel else max(0.001, min(seconds, self._send_step))  # it is for send() too
        if not seconds <= self.longest_wait < seconds + 0.005:
            if self.in_kernel:
                set_timeout(self._sock, socket.SO_RCVTIMEO, seconds)
            else:
                self._sock.settimeout(seconds)
            self.longest_wait = seconds

    def receive_by(self, deadline: float, size: int) -> bytes:
        """Return what comes before the time `deadline`, b"" at the end. Raises TimeoutError, or another OSError."""
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self.wait_at_most(remaining)
            with contextlib.suppress(*TIMED_OUT):
                return self._sock.recv(size)

    def sendall(self, data: Data, wait: bool = True) -> None:
        """Send bytes. Raises OSError: TimeoutError if the peer takes them too slowly, BlockingIOError if it does not
        take them at once and this must not wait."""
        try:
            sent = self._sock.send(data, DONTWAIT)
        except TIMED_OUT:
            sent = 0
        if sent != len(data):
            if not wait:
                raise BlockingIOError
            self._send_as_it_reads(memoryview(data)[sent:])

    def _send_as_it_reads(self, data: memoryview) -> None:
        """Send what TCP does not take at once: LEAST bytes, or all, within each `send_timeout`."""
        size = len(data)
        if not self._hold(size):
            raise OSError(errno.ENOBUFS, "the server holds max_pending bytes already")
        try:
            while data:
                part, data, deadline = data[:LEAST], data[LEAST:], time.monotonic() + self._send_timeout
                while part:
                    with contextlib.suppress(*TIMED_OUT):
                        part = part[self._sock.send(part):]
                    if part and time.monotonic() >= deadline:
                        raise TimeoutError
        finally:
            self._hold(-size)

    def shutdown(self) -> None:
        """End TCP in our direction. Raises OSError."""
        self._sock.shutdown(socket.SHUT_WR)


def set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """Bound each wait of a blocking socket: SO_RCVTIMEO that of recv(), SO_SNDTIMEO that of send()."""
    milliseconds = max(1, int(seconds * 1000))
    layout = "qq" if option in (66, 67) else "ll"  # a struct timeval; these numbers have it with 64 bits everywhere
    value = milliseconds if sys.platform == "win32" else struct.pack(layout, *divmod(milliseconds * 1000, 10**6))
    sock.setsockopt(socket.SOL_SOCKET, option, value)


class TLSStream:
    """TLS over a TCPStream, with the methods that a Connection uses.

    `_tls_lock` guards the TLS object, and is never held in a wait. `_wire_lock` keeps in order on the wire what that
    makes. A thread that needs both takes them in the order wire lock, TLS lock.
    """

    def __init__(self, tcp: TCPStream, context: ssl.SSLContext, receive: Callable[[int], bytes]) -> None:
        self._tcp, self.receive = tcp, receive  # where the ciphertext comes from
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._tls_lock, self._wire_lock = threading.Lock(), threading.Lock()

    def handshake(self) -> None:
        """Do the TLS handshake. Raises OSError; ssl.SSLError is one."""
        self._run(self._tls.do_handshake)

    def recv(self, size: int) -> bytes:
        """Return some plaintext, b"" when it has ended. Raises what `receive` raises."""
        try:
            plaintext: bytes = self._run(lambda: self._tls.read(size))
            return plaintext
        except ssl.SSLError:
            return b""

    def _run(self, step: Callable[[], Any]) -> Any:
        """Do a step of TLS, with as much of what the peer sends as it takes; send what it makes besides."""
        while True:
            unsent = 0
            try:
                with self._tls_lock:
                    try:
                        return step()
                    finally:
                        unsent = self._outgoing.pending
            except ssl.SSLWantReadError:
                pass
            finally:
                if unsent:
                    self.sendall(b"")
            ciphertext = self.receive(LONG)
            if not ciphertext:  # without a close_notify; to tell the TLS object would keep it from sending its own
                raise ssl.SSLEOFError
            with self._tls_lock:
                self._incoming.write(ciphertext)

    def _encrypt(self, plaintext: Union[bytes, memoryview]) -> bytes:
        """Return the ciphertext that goes out next; _wire_lock is held."""
        with self._tls_lock:
            if plaintext:
                self._tls.write(plaintext)
            return self._outgoing.read()

    def sendall(self, data: Data, wait: bool = True) -> None:
        """Send plaintext, behind whatever else the TLS object has to send. Raises OSError as TCPStream does."""
        plaintext = memoryview(data)
        if not self._wire_lock.acquire(timeout=-1 if wait else 1):  # its holder sends to a client that does not read
            raise BlockingIOError
        try:
            for at in range(0, len(data) or 1, LONG):
                self._tcp.sendall(self._encrypt(plaintext[at:at + LONG]), wait)
        finally:
            self._wire_lock.release()

    def shutdown(self) -> None:
        """Send close_notify (RFC 8446 section 6.1), then end TCP in our direction. Raises OSError."""
        with contextlib.suppress(ssl.SSLError), self._tls_lock:
            self._tls.unwrap()  # raises, since it would like to wait for the peer's
        with contextlib.suppress(OSError):
            self.sendall(b"", wait=False)
        self._tcp.shutdown()


# ==== The opening handshake: bytes in, values out (RFC 6455 section 4.2, RFC 9110, RFC 9112) =======================

MAX_HEAD, MAX_FIELDS = 16 * 1024, 100  # bytes and fields of a request's header
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # section 1.3
TCHAR = r"[!#$%&'*+.^_`|~0-9A-Za-z-]"
TOKEN = TCHAR + "+"
# In origin-form or absolute-form (RFC 9112 section 3.2), with no fragment
REQUEST_LINE = re.compile(
    r"(%s) (?:/|[A-Za-z][A-Za-z0-9+.-]*://[!$-.0->@-~]+(?:/|(?=[? ])))([!-\"$-~]*) HTTP/(1\.[0-9])" % TOKEN)
FIELD_LINE = re.compile(r"(%s):([\t -~\x80-\xff]*)" % TOKEN)
HOST = re.compile(r"(\[[0-9A-Za-z:.]+\]|[0-9A-Za-z._~!$&'()*+;=%-]*)(:[0-9]*)?")
# As browsers write it: in lower case, with no path and no default port (RFC 6454 section 6.2)
ORIGIN = re.compile(r"null|(?!https:.*:443$|http:.*:80$)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[1-9][0-9]*)?")
UPGRADE = ("Upgrade: websocket", "Connection: Upgrade")
# Section 9.1: a name, then parameters with or without a value; a value that is quoted is a token too
PARAMETER = r"[ \t]*;[ \t]*(%s)(?:[ \t]*=[ \t]*(%s|\"(?:%s|\\%s)+\"))?" % (TOKEN, TOKEN, TCHAR, TCHAR)
EXTENSION = re.compile(r"[ \t,]*(%s)((?:%s)*)[ \t]*(?:,[ \t,]*|$)" % (TOKEN, PARAMETER))


Extension = Tuple[str, List[Tuple[str, Optional[str]]]]  # a name, and parameters with their value or None


class HTTPAnswer(Exception):
    """A request ends in a plain HTTP answer, and not in a WebSocket connection."""

    def __init__(self, status: int, body: str, *fields: str, kind: str = "text/plain") -> None:
        super().__init__("%d %s" % (status, body))
        self.content = body.encode() + b"\n"
        self.head = "\r\n".join((
            "HTTP/1.1 %d %s" % (status, http.HTTPStatus(status).phrase),
            "Date: " + email.utils.formatdate(usegmt=True), "Content-Type: %s; charset=utf-8" % kind,
            "Content-Length: %d" % len(self.content), "Connection: close", *fields, "", "")).encode()


class Headers(Dict[str, str]):
    """A request's header fields by lower-case name; they may be looked up in any case. A field that came more than
    once has its values joined by commas (RFC 9110 section 5.3)."""

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())

    def get(self, name: str, default: Any = None) -> Any:
        """Return the field's value, or `default`."""
        return super().get(name.lower(), default)

    def items_of(self, name: str) -> List[str]:
        """Return the items of a field that is a list of tokens (RFC 9110 section 5.6.1)."""
        return [item.strip(" \t") for item in self.get(name, "").split(",") if item.strip(" \t")]


class Request(NamedTuple):
    """A request's header."""
    method: str
    path: str  # with its query, as it was sent
    version: str
    headers: Headers


def parse_request(data: bytes) -> Optional[Tuple[Request, bytes]]:
    """Return the request that `data` begins with, and the bytes behind it; None while it is incomplete.

    Raises HTTPAnswer 400 or 431 as soon as it cannot become one.
    """
    data = data[2 * data.startswith(b"\r\n"):]  # an empty line in front is ignored (RFC 9112 section 2.2)
    end = data.find(b"\r\n\r\n")
    head = data.rstrip(b"\r\n") if end < 0 else data[:end]
    if len(head) > MAX_HEAD or head.count(b"\n") > MAX_FIELDS:
        raise HTTPAnswer(431, "The request's header is over %d bytes or %d fields." % (MAX_HEAD, MAX_FIELDS))
    lines = data[:end + 2] if end >= 0 else data
    if data not in (b"", b"\r") and (not data[:1].isalpha() or lines.count(b"\n") > lines.count(b"\r\n")):
        raise HTTPAnswer(400, "This is no HTTP request.")
    if end < 0:
        return None
    first, *others = head.decode("latin-1").split("\r\n")
    match = REQUEST_LINE.fullmatch(first)
    if not match:
        raise HTTPAnswer(400, "The request line is malformed.")
    fields: Dict[str, str] = {}
    for line in others:
        field = FIELD_LINE.fullmatch(line)
        if not field:
            raise HTTPAnswer(400, "A header field is malformed.")
        name, value = field[1].lower(), field[2].strip(" \t")
        fields[name] = fields[name] + ", " + value if name in fields else value
    return Request(match[1], "/" + match[2], match[3], Headers(fields)), data[end + 4:]


def parse_extensions(value: str) -> List[Extension]:
    """Return what a Sec-WebSocket-Extensions field offers. Raises HTTPAnswer 400 if it does not fit the ABNF (section
    9.1)."""
    found: List[Extension] = []
    at = 0
    while at < len(value) or not value:
        match = EXTENSION.match(value, at)
        if not match:
            raise HTTPAnswer(400, "Sec-WebSocket-Extensions is malformed.")
        parameters = re.findall(PARAMETER, match[2])
        found.append((match[1], [(name, re.sub(r'["\\]', "", text) or None) for name, text in parameters]))
        at = match.end()
    return found


def accept(request: Request, origins: Optional[Set[str]], compression: bool
           ) -> Tuple[bytes, Optional[str], Optional[PerMessageDeflate]]:
    """Return the answer 101 to an opening handshake, the subprotocol and the extension that it agrees on.

    Raises HTTPAnswer where the request is for the page or does not meet section 4.2.1.
    """
    headers = request.headers
    subprotocols = headers.items_of("sec-websocket-protocol")
    key, origin = headers.get("sec-websocket-key", ""), headers.get("origin")
    if request.method not in ("GET", "HEAD"):
        raise HTTPAnswer(405, "The method must be GET, not %s." % request.method, "Allow: GET, HEAD")
    if not HOST.fullmatch(headers.get("host", "" if request.version == "1.0" else ",")):
        raise HTTPAnswer(400, "There must be one Host field, and it must be valid.")
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        raise HTTPAnswer(400, "The request must have no body.")
    if request.method == "HEAD" or "websocket" not in map(str.lower, headers.items_of("upgrade")):
        if request.path.split("?")[0] == "/":
            raise HTTPAnswer(200, PAGE, *PAGE_FIELDS, kind="text/html")
        raise HTTPAnswer(426, "This is a WebSocket server; its page is at /.", *UPGRADE)
    if request.version == "1.0" or "upgrade" not in map(str.lower, headers.items_of("connection")):
        raise HTTPAnswer(400, "An opening handshake must be HTTP/1.1 and have Connection: Upgrade.")
    if headers.get("sec-websocket-version") != "13":
        raise HTTPAnswer(426, "Sec-WebSocket-Version must be 13.", *UPGRADE, "Sec-WebSocket-Version: 13")
    if not re.fullmatch("[A-Za-z0-9+/]{22}==", key):
        raise HTTPAnswer(400, "Sec-WebSocket-Key must be 16 bytes in base64, not %r." % key)
    if origins is not None and origin is not None and origin not in origins:
        raise HTTPAnswer(403, "The origin %r is not served here." % origin)
    for subprotocol in subprotocols or [""] * ("sec-websocket-protocol" in headers):
        if not re.fullmatch(TOKEN, subprotocol):
            raise HTTPAnswer(400, "The subprotocol %r is no token." % subprotocol)
    offers = parse_extensions(headers["sec-websocket-extensions"]) if "sec-websocket-extensions" in headers else []
    extension, agreed = negotiate(offers) if compression else (None, "")
    digest = hashlib.sha1(key.encode() + GUID).digest()
    fields = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade",
              "Sec-WebSocket-Accept: " + base64.b64encode(digest).decode()]
    if subprotocols:
        fields.append("Sec-WebSocket-Protocol: " + subprotocols[0])
    if extension:
        fields.append("Sec-WebSocket-Extensions: " + agreed)
    return "\r\n".join((*fields, "", "")).encode(), subprotocols[0] if subprotocols else None, extension


# ==== Frames and messages: bytes in, values out (RFC 6455 sections 5 and 7) ========================================

# Opcodes (section 5.2); 3 to 7 and 11 to 15 are reserved
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
FIN, RSV1, RSV2, RSV3, MASKED = 0x80, 0x40, 0x20, 0x10, 0x80

# Status codes that a Close frame may carry (section 7.4 and the IANA registry). 1004 is reserved; 1005 (no status),
# 1006 (abnormal closure) and 1015 (TLS) stand for what happened without a Close frame; 1016 to 2999 are not assigned.
CloseCode = enum.IntEnum("CloseCode", {
    "NORMAL_CLOSURE": 1000, "GOING_AWAY": 1001, "PROTOCOL_ERROR": 1002, "UNSUPPORTED_DATA": 1003,
    "INVALID_PAYLOAD": 1007, "POLICY_VIOLATION": 1008, "MESSAGE_TOO_BIG": 1009, "MANDATORY_EXTENSION": 1010,
    "INTERNAL_ERROR": 1011, "SERVICE_RESTART": 1012, "TRY_AGAIN_LATER": 1013, "BAD_GATEWAY": 1014})
STATUS_CODES = {*map(int, CloseCode), *range(3000, 5000)}  # the rest is for libraries and applications


class ProtocolError(Exception):
    """The connection must be failed, with this status code and reason (section 7.1.7)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


def frame_header(opcode: int, size: int, fin: bool = True, rsv1: bool = False) -> bytes:
    """Return the header of a frame to a client: never masked, its length in the fewest bytes (section 5.2)."""
    first = opcode | FIN * fin | RSV1 * rsv1
    if size < 126:
        return bytes((first, size))
    if size < 2**16:
        return struct.pack("!BBH", first, 126, size)
    return struct.pack("!BBQ", first, 127, size)


def frame(opcode: int, payload: Data, fin: bool = True) -> bytes:
    """Return a whole frame to a client. Raises ValueError for a control frame that is too long (section 5.5)."""
    if opcode & 0x8 and len(payload) > 125:
        raise ValueError("a control frame takes 125 bytes, not %d" % len(payload))
    return frame_header(opcode, len(payload), fin) + payload


def close_payload(code: int, reason: Union[str, bytes]) -> bytes:
    """Return what a Close frame carries (section 5.5.1). Raises ValueError for what it may not."""
    text = reason if isinstance(reason, bytes) else reason.encode()
    if code not in STATUS_CODES:
        raise ValueError("a Close frame may not carry the status code %r (section 7.4)" % code)
    if len(text) > 123:
        raise ValueError("the reason of a Close frame takes 123 bytes, not %d" % len(text))
    text.decode()
    return struct.pack("!H", code) + text


def unmask(data: Union[Data, memoryview], key: bytes) -> Data:
    """XOR data with the masking key, over and over (section 5.3)."""
    size = len(data)
    if size < 512:  # as one large number
        mask = (key * (size // 4 + 1))[:size]
        return (int.from_bytes(data, "big") ^ int.from_bytes(mask, "big")).to_bytes(size, "big")
    out = bytearray(data)
    in_c = xor_in_c() if size >= 1024 else None
    if in_c:
        in_c(out, key)
    else:  # each byte of the key has every fourth byte of the data to itself
        for i in range(4):
            out[i::4] = out[i::4].translate(bytes(key[i] ^ byte for byte in range(256)))
    return out


@functools.lru_cache(maxsize=1)
def xor_in_c() -> Optional[Callable[[bytearray, bytes], None]]:
    """Return what XORs a bytearray in place, several times as fast and without the GIL; None where there is none.

    It is in OpenSSL, which the ssl module has loaded. In output feedback mode a cipher makes each block of the key
    stream from the one before. This cipher is memmove() of 16 bytes onto themselves: the first block, over and over.
    """
    try:
        import ctypes

        import _ssl
        pointer, number, byte = ctypes.c_void_p, ctypes.c_int, ctypes.c_char
        feed_back = ctypes.CDLL(_ssl.__file__).CRYPTO_ofb128_encrypt
        feed_back.argtypes = [pointer, pointer, ctypes.c_size_t, pointer, ctypes.c_char_p, pointer, pointer]
        feed_back.restype = None
        memmove = ctypes.cast(ctypes.CDLL(None).memmove, pointer)

        def xor(data: bytearray, key: bytes) -> None:
            start = ctypes.byref(byte.from_buffer(data))
            feed_back(start, start, len(data), 16, key * 4, ctypes.byref(number(0)), memmove)

        sample = bytearray(range(99))
        xor(sample, b"7abc")
        return xor if sample == unmask(bytes(range(99)), b"7abc") else None
    except Exception:  # no ctypes, no shared library, another OpenSSL: the strides serve
        return None


class Receiver:
    """Makes whole messages and control frames of the bytes that a client sends.

    `hold` is told how many bytes are kept for a message under way; where it refuses, that fails with Close 1013.
    """

    def __init__(self, max_size: int, compression: Optional[PerMessageDeflate] = None,
                 hold: Callable[[int], bool] = lambda size: True) -> None:
        self.between_messages = True  # the next byte begins a frame, and no message is under way
        self._max_size, self._compression, self._hold = max_size, compression, hold
        self._begun = b""  # the beginning of a frame's header, or of a control frame
        # The frame under way
        self._fin, self._frame_opcode, self.left, self._key = True, CONTINUATION, 0, b""
        # The message under way; CONTINUATION stands for none
        self._opcode, self._compressed, self._size = CONTINUATION, False, 0
        self._pieces: List[bytearray] = []
        self._rest = b""  # the beginning of a character

    def feed(self, data: bytes) -> Iterator[Tuple[int, List[Data]]]:
        """Yield (opcode, payload in pieces) of each message and control frame that these bytes complete.

        Each is checked as far as it has come. Raises ProtocolError at the first fault, after yielding what came
        before it.
        """
        data, self._begun, at = self._begun + data, b"", 0
        while True:
            if not self.left:
                begin = self._begin_frame(data, at)
                if not begin:
                    self._begun = data[at:]
                    break
                at = begin
            chunk = unmask(memoryview(data)[at:at + self.left], self._key)
            at += len(chunk)
            self.left -= len(chunk)
            turn = len(chunk) % 4
            self._key = self._key[turn:] + self._key[:turn]
            if self._frame_opcode & 0x8:
                if self._frame_opcode == CLOSE:
                    self._check_close(bytes(chunk))
                yield self._frame_opcode, [chunk]
                continue
            if self._compressed and self._compression:
                for inflated in self._compression.inflate(chunk):
                    self._extend(inflated)
            else:
                self._extend(chunk)
            if self.left:
                break
            if self._fin:
                yield self._end_message()
                self.release()  # the answer is out
        self.between_messages = not (self.left or self._begun or self._opcode)

    def release(self) -> None:
        """Give back what is held for the message under way."""
        self._hold(-self._size)
        self._size = 0

    def _begin_frame(self, data: bytes, at: int) -> int:
        """Take the frame header at data[at:]; return where its payload begins, 0 if the header is incomplete."""
        if len(data) < at + 2:
            return 0
        fin, rsv1, opcode = bool(data[at] & FIN), bool(data[at] & RSV1), data[at] & 0x0F
        masked, size = data[at + 1] & MASKED, data[at + 1] & 0x7F
        compressed = rsv1 if opcode else self._compressed
        for wrong, why in (
                (not masked, "a frame that is not masked (section 5.1)"),
                (data[at] & (RSV2 | RSV3) or (rsv1 and not (self._compression and opcode in (TEXT, BINARY))),
                 "a reserved bit (section 5.2)"),
                (opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG), "a reserved opcode (section 5.2)"),
                (opcode & 0x8 and (size > 125 or not fin), "a control frame, long or in fragments (section 5.5)"),
                (opcode == CONTINUATION and not self._opcode, "a continuation of nothing (section 5.4)"),
                (opcode in (TEXT, BINARY) and self._opcode, "a new message inside another (section 5.4)")):
            if wrong:
                raise ProtocolError(CloseCode.PROTOCOL_ERROR, why)
        at += 2
        if size > 125:
            width, least = (2, 126) if size == 126 else (8, 2**16)
            if len(data) < at + width:
                return 0
            size = int.from_bytes(data[at:at + width], "big")
            at += width
            if not least <= size < 2**63:
                raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a length that is not in the fewest bytes (section 5.2)")
        if not opcode & 0x8 and not compressed:
            self._check_size(size)
        if len(data) < at + 4 + size * (opcode >> 3):  # a control frame is taken as a whole
            return 0
        self._fin, self._frame_opcode, self.left, self._key = fin, opcode, size, data[at:at + 4]
        if opcode in (TEXT, BINARY):
            self._opcode, self._compressed = opcode, compressed
        return at + 4

    def _check_size(self, more: int) -> None:
        if self._size + more > self._max_size:
            raise ProtocolError(CloseCode.MESSAGE_TOO_BIG, "a message longer than %d bytes" % self._max_size)

    def _extend(self, chunk: Data) -> None:
        """Add a part of the payload to the message under way."""
        self._check_size(len(chunk))
        if not self._hold(len(chunk)):
            raise ProtocolError(CloseCode.TRY_AGAIN_LATER, "the server holds too many unfinished messages")
        self._size += len(chunk)
        if self._opcode == TEXT:
            self._check_text(chunk)
        if len(chunk) >= LONG // 4:
            self._pieces.append(chunk if isinstance(chunk, bytearray) else bytearray(chunk))
        else:  # together, since each piece takes memory of its own
            if not self._pieces:
                self._pieces.append(bytearray())
            self._pieces[-1] += chunk

    def _end_message(self) -> Tuple[int, List[Data]]:
        """Return the message under way, which is complete."""
        if self._compressed and self._compression:
            for inflated in self._compression.end_of_message():
                self._extend(inflated)
        if self._opcode == TEXT:
            self._check_text(b"", final=True)
        opcode, pieces = self._opcode, self._pieces
        self._opcode, self._pieces = CONTINUATION, []
        return opcode, [*pieces]

    def _check_text(self, chunk: Data, final: bool = False) -> None:
        """Check that text is UTF-8 as far as it has come (section 8.1)."""
        if self._rest or not chunk.isascii():
            data = self._rest + chunk
            try:
                self._rest = bytes(data[codecs.utf_8_decode(data, "strict", final)[1]:])
            except UnicodeDecodeError:
                self._rest = b"\xed\xa0"
            if b"\xed\xa0" <= self._rest < b"\xee":  # half a surrogate, which Python would wait for the end of
                raise ProtocolError(CloseCode.INVALID_PAYLOAD, "text that is not UTF-8 (section 8.1)") from None

    @staticmethod
    def _check_close(payload: bytes) -> None:
        """Check what a Close frame carries (sections 5.5.1 and 7.4)."""
        if payload and (len(payload) == 1 or int.from_bytes(payload[:2], "big") not in STATUS_CODES):
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a Close with a code that may not be sent (section 7.4)")
        try:
            payload[2:].decode()
        except UnicodeDecodeError:
            raise ProtocolError(CloseCode.INVALID_PAYLOAD, "a reason that is not UTF-8 (section 5.5.1)") from None


# ==== The fast path: whole messages, many at a time ================================================================
# This chapter may be deleted, with the line in Connection.handle() that calls it: the server is then slower, and
# nothing else. The tests hold it against Receiver, frame for frame.

# For each beginning of a short frame: its size, the header of the same message to a client, whether it is text, and
# what unmasks it in one step with its masking key: a factor that repeats the key from the key's own place on, and how
# many bits of that are too many.
SHORT_FRAMES = {
    bytes((FIN | opcode, MASKED | size)):
        (size, bytes((FIN | opcode, size)), opcode == TEXT,
         int.from_bytes(b"\0\0\0\1" * ((size + 7) // 4), "big"), -size % 4 * 8)
    for opcode in (TEXT, BINARY) for size in range(126)}
# For that of a long one: the beginning of its header to a client, whether it is text, where the length ends, and the
# least that it may be.
LONG_FRAMES = {
    bytes((FIN | opcode, MASKED | length)): (bytes((FIN | opcode, length)), opcode == TEXT, ends, least)
    for opcode in (TEXT, BINARY) for length, ends, least in ((126, 4, 126), (127, 10, 2**16))}


def whole_frames(data: bytes, max_size: int) -> Tuple[List[Data], int]:
    """Take the whole messages, in one frame each, that `data` begins with.

    Returns [header, payload, header, payload …], ready to send to a client, and how many bytes they took. Stops in
    front of whatever is incomplete, too long, in fragments, compressed, a control frame or wrong.
    """
    frames: List[Data] = []
    at, end, number = 0, len(data), int.from_bytes
    payload: Data
    while True:
        first = data[at:at + 2]
        try:  # not get(), which takes 200 times as long in a free-threaded interpreter
            size, header, text, repeat, excess = SHORT_FRAMES[first]
        except KeyError:
            if first not in LONG_FRAMES:
                return frames, at
            header, text, ends, least = LONG_FRAMES[first]
            length = data[at + 2:at + ends]
            size = number(length, "big")
            after = at + ends + 4 + size
            if after > end or not least <= size <= max_size:
                return frames, at
            header += length
            payload = unmask(memoryview(data)[after - size:after], data[at + ends:at + ends + 4])
        else:
            after = at + 6 + size
            if after > end or size > max_size:
                return frames, at
            masked = number(data[at + 2:after], "big")  # the masking key in front, which the XOR clears
            payload = (masked ^ (masked >> 8 * size) * repeat >> excess).to_bytes(size, "big")
        if text and not payload.isascii():
            try:
                payload.decode()
            except UnicodeDecodeError:
                return frames, at
        frames.append(header)
        frames.append(payload)
        at = after
        if at == end:
            return frames, at


# ==== Compression: permessage-deflate, bytes in, bytes out (RFC 7692) ==============================================

END_OF_MESSAGE = b"\0\0\xff\xff"  # is left out of each message (sections 7.2.1 and 7.2.2)
# A parameter of an offer (section 7.1)
OFFERED = re.compile("(server|client)_no_context_takeover=|client_max_window_bits=|"
                     "(server|client)_max_window_bits=([89]|1[0-5])")


def negotiate(offers: Iterable[Extension]) -> Tuple[Optional[PerMessageDeflate], str]:
    """Take the first offer of permessage-deflate that can be taken; return it and the answer (section 7.1).

    An offer with an unknown parameter, a bad value or a parameter twice is declined.
    """
    for name, offered in offers:
        parameters = dict(offered)
        if (name == "permessage-deflate" and len(parameters) == len(offered)
                and all(OFFERED.fullmatch("%s=%s" % (key, value or "")) for key, value in offered)):
            if not parameters.get("client_max_window_bits"):  # with no value it only says that the answer may set it
                parameters.pop("client_max_window_bits", None)
            answer = [name, *(key + "=" + value if value else key for key, value in parameters.items())]
            return PerMessageDeflate(int(parameters.get("server_max_window_bits") or 15),
                                     int(parameters.get("client_max_window_bits") or 15),
                                     "server_no_context_takeover" in parameters,
                                     "client_no_context_takeover" in parameters), "; ".join(answer)
    return None, ""


class PerMessageDeflate:
    """One connection's compression. Its two streams are made when they are first needed.

    `used` says that the client has sent a compressed message: only then are the answers compressed.
    """

    def __init__(self, server_bits: int = 15, client_bits: int = 15,
                 server_forgets: bool = False, client_forgets: bool = False) -> None:
        self.used = False
        # No more than 12, and little memory: 32 KiB a client, not 256. zlib cannot do 8, but with 9 it looks back 250
        # bytes at the most, which a window of 8 bits holds.
        self._server_bits, self._client_bits = max(9, min(server_bits, 12)), client_bits
        self._server_forgets, self._client_forgets = server_forgets, client_forgets  # no context takeover
        self._inflater: Optional[zlib._Decompress] = None
        self._deflater: Optional[zlib._Compress] = None

    def inflate(self, data: Data) -> Iterator[bytes]:
        """Yield what some of a message inflates to, LONG bytes at a time. Raises ProtocolError 1007."""
        self.used, inflated = True, b""
        try:
            for at in range(0, len(data), 4096):  # little at a time, since a new stream begins with a copy of the rest
                part = data[at:at + 4096]
                while part or len(inflated) == LONG:  # after that many, zlib may have more
                    inflater = self._inflater = self._inflater or zlib.decompressobj(-self._client_bits)
                    inflated = inflater.decompress(part, LONG)
                    yield inflated
                    part = inflater.unconsumed_tail
                    if inflater.eof:  # after a block with BFINAL a new stream begins
                        part, self._inflater = inflater.unused_data, zlib.decompressobj(-self._client_bits)
        except zlib.error:
            raise ProtocolError(CloseCode.INVALID_PAYLOAD, "a message that does not inflate (RFC 7692 section 7.2.2)"
                                ) from None

    def end_of_message(self) -> Iterator[bytes]:
        """Yield the last of what a message inflates to; forget what must not be carried over to the next. Raises
        ProtocolError 1007 if the stream is not between two blocks."""
        yield from self.inflate(END_OF_MESSAGE)
        assert self._inflater
        probe = self._inflater.copy()
        with contextlib.suppress(zlib.error):
            probe.decompress(b"\3\0")  # an empty last block
        if not probe.eof:
            raise ProtocolError(CloseCode.INVALID_PAYLOAD, "a message that does not inflate (RFC 7692 section 7.2.2)")
        if self._client_forgets:
            self._inflater = None

    def deflate(self, payload: bytes) -> bytes:
        """Return a whole message, compressed."""
        if self._deflater is None:
            self._deflater = zlib.compressobj(zlib.Z_BEST_SPEED, zlib.DEFLATED, -self._server_bits, 5)
        data = self._deflater.compress(payload) + self._deflater.flush(zlib.Z_SYNC_FLUSH)
        if self._server_forgets:
            self._deflater = None
        return data[:-len(END_OF_MESSAGE)] or b"\0"  # zlib emits nothing for a second consecutive empty flush


# ==== The page =====================================================================================================

PAGE = """\
<!doctype html><html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Echo server</title><link rel="icon" href="data:,">
<style>
:root { --page: #ececea; --card: #fff; --ink: #1c2024; --soft: #59626b; --edge: #848c94; --accent: #2f50c8 }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --card: #202327; --ink: #e7e9eb; --soft: #a3abb3; --edge: #78818a; --accent: #93abff } }
* { box-sizing: border-box; margin: 0; font: inherit; color-scheme: light dark }
body { max-width: 46rem; margin: auto; padding: 1.5rem 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
form { display: flex; flex-wrap: wrap; align-items: end; gap: .75rem; margin-top: 1rem; padding: 1.25rem;
  background: var(--card); border-radius: .75rem }
input, button { min-height: 2.75rem; padding: .25rem .875rem; border: 1px solid var(--edge); border-radius: .5rem;
  background: var(--card); color: var(--ink); font-size: 1rem }
button { flex: 1 0 auto } #send { background: var(--accent); border-color: var(--accent); color: var(--card) }
:disabled { opacity: .5 } :focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
h1 { font-size: 1.25rem; font-weight: 600 } label { flex: 1 6rem; color: var(--soft); font-size: .875rem }
label:last-of-type { flex: 99 8rem } label input { margin-top: .25rem } label input, p, #log { width: 100% }
#log { max-height: 20rem; overflow-y: auto; font: .75rem/1.75 ui-monospace, monospace; white-space: pre }
#log div { overflow: hidden; text-overflow: ellipsis }
</style>
<h1>Echo server</h1>
<form id="connection" method="dialog"> <!-- this method submits to nowhere -->
  <p id="state" role="status"></p>
  <label>Close code <input id="close-code" value="1000" inputmode="numeric" required pattern="1000|[34][0-9]{3}"
    title="1000, or 3000 to 4999"></label>
  <label>Reason <input id="close-reason" maxlength="41" autocomplete="off"></label>
  <button id="connect">Connect</button></form>
<form id="message" method="dialog">
  <label>Message <input id="text" value="Hello" autocomplete="off"></label><button id="send">Send</button>
  <button id="choose" type="button">Send a file</button><input id="file" type="file" aria-label="File" hidden>
  <div id="log" role="log" aria-label="Messages"></div></form>
<script>
const $ = (id) => document.getElementById(id);
let socket, sent; // when each message under way was sent: the echoes come in the same order

function connect() {
  sent = [];
  socket = new WebSocket(location.href.replace("http", "ws").split("#")[0]);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => show();
  socket.onmessage = ({ data }) =>
    log("in", data, sent.length ? `${(performance.now() - sent.shift()).toFixed(1)} ms` : "");
  socket.onclose = ({ code, reason, wasClean }) =>
    show(`. Closed: ${code} ${reason}`.trimEnd() + (wasClean ? " (clean)" : " (not clean)"));
  show();
}
function show(closed = "") {
  const state = ["○ Connecting to", "● Connected to", "○ Disconnecting from", "○ Not connected to"][socket.readyState];
  $("state").textContent = `${state} ${socket.url}${closed}`;
  $("connect").textContent = socket.readyState === WebSocket.CLOSED ? "Connect" : "Disconnect";
  $("send").disabled = $("choose").disabled = socket.readyState !== WebSocket.OPEN;
}
function send(data) {
  log("out", data);
  sent.push(performance.now());
  socket.send(data);
}
function log(direction, data, note = "") {
  const bytes = typeof data === "string" ? new TextEncoder().encode(data) : new Uint8Array(data);
  const hex = Array.from(bytes.subarray(0, 40), (byte) => byte.toString(16).padStart(2, "0")).join(" ");
  const [kind, start] = typeof data === "string" ? ["text  ", JSON.stringify(data.slice(0, 100))] : ["binary", hex];
  const textContent = [direction.padEnd(3), kind, `${bytes.length} B`.padStart(8), note.padStart(8), start].join(" ");
  $("log").prepend(Object.assign(document.createElement("div"), { textContent }));
  $("log").children[100]?.remove();
}
$("connection").onsubmit = () => {
  if (socket.readyState === WebSocket.CLOSED) return connect();
  socket.close($("close-code").value, $("close-reason").value);
  show();
};
$("message").onsubmit = () => send($("text").value);
$("choose").onclick = () => {
  $("file").value = ""; // or choosing the same file again would change nothing
  $("file").click();
};
$("file").onchange = async () => send(await $("file").files[0].arrayBuffer());
connect();
</script>
"""


def source_hash(tag: str) -> str:
    """Return what the Content-Security-Policy says of the page's only element of this name."""
    content = PAGE.partition("<%s>" % tag)[2].partition("</%s>" % tag)[0]
    return "'sha256-%s'" % base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


PAGE_FIELDS = (
    "Content-Security-Policy: default-src 'none'; connect-src 'self'; img-src data:; style-src %s; script-src %s; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'" % (source_hash("style"), source_hash("script")),
    "Cross-Origin-Opener-Policy: same-origin", "Cross-Origin-Embedder-Policy: require-corp")  # for a finer clock

if __name__ == "__main__":
    sys.exit(main())
