"""A WebSocket echo server in one module: synchronous, one thread for each connection, no asyncio.

    python echoserver.py 1234                    # sends every text and binary message back to its sender

    with EchoServer(port=0) as server:           # in a program: serves in a background thread
        client = websocket.create_connection(server.url)

To learn the pattern, read `EchoServer`: three callbacks and a list of clients. `Server`, above it, supplies what the
package websocket-server lacks. The other chapters use the words of RFC 6455.

`Server` and `Connection` own sockets and threads, and decide nothing about the protocol. The chapters with "bytes in,
values out" decide all of it, and touch no socket. One thread accepts connections. Each connection has its own thread,
which alone reads from it and calls its callbacks. Any thread may send. `Connection._send_lock` keeps the frames on one
wire in order; `Server._lock` guards the register of connections and the counts. They are taken in this order.
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
from typing import Any, Callable, Dict, Iterable, Iterator, Sequence, Union
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
Data = Union[bytes, bytearray, memoryview]

# ==== The server: the listening socket, its threads, the register of connections ===================================
class Server(WebsocketServer):
    """websocket-server's WebsocketServer with what it lacks: the whole protocol, limits, safety in threads. It takes
    websocket-server's arguments (port 0 means a free one; `key` and `cert`, PEM files, make it wss://), and each option
    below by name. Raises OSError when it cannot listen or use the certificate, ValueError for an option out of range,
    TypeError for one that does not exist."""

    # Options; times are in seconds
    max_size = 16 * 2**20  # bytes of the longest message taken, decompressed; a longer one gets Close 1009
    max_pending = 256 * 2**20  # bytes in unfinished messages (beyond it, Close 1013) and unsent answers (cut); 0: any
    max_clients = 10000  # connections at once, including those in their opening handshake; beyond it, 503
    open_timeout = 10.0  # for the whole opening handshake, including TLS
    close_timeout = 10.0  # for the closing handshake, and for `close()` as a whole
    send_timeout = 20.0  # in which a client must take 256 KiB, or all there is; else it is cut
    ping_interval = 20.0  # silence before a client gets a Ping; 0: never
    ping_timeout = 20.0  # further silence before it is dropped; 0: never
    origin: str | Iterable[str] | None = None  # an origin, or several, whose pages are served; others get 403
    compression = True  # whether permessage-deflate is negotiated
    ssl_context: ssl.SSLContext | None = None  # serves wss://
    reuse_port = False  # lets several processes share the port
    debug = False  # shows connections and messages through the logger "echoserver"; may be set at any time
    # Knobs
    looks = 64  # how often a lone client's connection looks for the next message before it sleeps, 1 or 2 µs each
    processors: Iterable[int] = ()  # what a thread may use that one_processor() has held to one
    request_queue_size = 4096  # connections that wait to be accepted: a burst is not refused
    allow_reuse_address = sys.platform != "win32"  # there it would let another program take the port over
    spare_threads = 100  # threads beyond max_clients, for 503s and for connections that are ending

    _numbers = {  # the least that each may be, and what the command line says of it
        "max_size": (0, "BYTES", "longest message taken"),
        "max_pending": (0, "BYTES", "what unfinished messages and unsent answers hold together; 0: no bound"),
        "max_clients": (1, "N", "connections at once"),
        "open_timeout": (0.01, "S", "seconds for the opening handshake"),
        "close_timeout": (0.01, "S", "seconds for the closing handshake"),
        "send_timeout": (0.01, "S", "seconds in which a client must take 256 KiB, or all there is"),
        "ping_interval": (0, "S", "seconds of silence before a Ping; 0: never"),
        "ping_timeout": (0, "S", "seconds without an answer before the client is dropped; 0: never")}
    _options = {*_numbers, "origin", "compression", "ssl_context", "reuse_port", "debug"}

    def __init__(self, host: str = "127.0.0.1", port: int = 0, loglevel: int = logging.WARNING,
                 key: str | None = None, cert: str | None = None, **options: Any) -> None:
        for name in options.keys() - self._options:
            raise TypeError("there is no option %r" % name)
        self.__dict__.update(options)
        limits = [(name, getattr(self, name), least, 2**33) for name, (least, *_) in self._numbers.items()]
        for name, value, least, most in [("port", port, 0, 65535), *limits]:
            if not least <= value <= most:
                raise ValueError("%s must be from %g to %g, not %r" % (name, least, most, value))
        origins = [self.origin] if isinstance(self.origin, str) else self.origin
        self.origins = None if origins is None else set(origins)
        for origin in self.origins or ():
            if not ORIGIN.fullmatch(origin):
                raise ValueError("origin must be as browsers send it, like https://example.org, not %r" % origin)
        self.ssl_context = self.ssl_context if cert is key is None else tls_context(cert, key)
        if self.ssl_context and self.ssl_context.protocol == ssl.PROTOCOL_TLS_CLIENT:
            raise ValueError("ssl_context must be for a server, not for clients")
        self._lock = threading.RLock()  # guards the next four lines, the states and id_counter
        self._connections: dict[Connection, threading.Thread] = {}  # every connection that has a thread
        self._places = self._pending = 0  # how many of them are CONNECTING or OPEN; bytes that max_pending bounds
        self._closing = self._stopping = False  # close() was called; no new connections (set once, without the lock)
        self._background: threading.Thread | None = None  # what start() started
        self._serving_pid: int | None = None  # the process that serves; a child that it forks does not
        self._accepting, self._closer = threading.Lock(), threading.Lock()  # held while a thread accepts, or closes
        self._next_complaint = 0.0  # belongs to the accepting thread
        self.closed = threading.Event()
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            info = min(found, key=lambda info: info[0] != socket.AF_INET)
            self.address_family, self._address = info[0], info[4]
            super().__init__(host, port, loglevel, key, cert)
        except OSError as error:
            raise OSError(error.errno, "cannot listen on %s port %d: %s; choose another port, or an address of "
                          "this machine" % (host, port, error.strerror or error)) from None
        self._log("Echoserver listening on port %d", self.port)

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

    def start(self) -> None:
        """Serve in a background thread. Does nothing if that was started before."""
        with self._lock:
            if self._background is None or self._closing:
                self._begin()
                thread = threading.Thread(target=self._accept, name="echoserver accept", daemon=True)
                thread.start()
                self.thread, self._background, self.daemon = thread, thread, True

    def serve_forever(self, poll_interval: float | None = 0.5) -> None:
        """Serve in this thread until the server is stopped, then close it. `poll_interval` is socketserver's."""
        with self._lock:
            self._begin()
            self.thread = threading.current_thread()
        self._accept(poll_interval or 0.5)

    def run_forever(self, threaded: bool = False) -> None:
        """Serve in this thread until closed, or ended by Ctrl-C; or in the background (websocket-server's name)."""
        with contextlib.suppress(KeyboardInterrupt):
            self.start() if threaded else self.serve_forever()

    def _begin(self) -> None:
        if self._closing:
            raise RuntimeError("this server was closed; make a new one")
        self._serving_pid = os.getpid()

    def _accept(self, poll_interval: float = 0.5) -> None:
        try:
            with self._accepting:
                while not self._stopping:
                    try:
                        self.socket.settimeout(poll_interval)
                        self.process_request(*self.get_request())
                    except socket.timeout:
                        pass
                    except Exception as error:  # out of files or threads, most likely
                        self._wait_for_room(error)
        finally:
            self.close()

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        """Give a new connection its thread, if there are not too many. Over `max_clients` it is CLOSED, for its 503."""
        connection = Connection(request, client_address, self)
        thread = threading.Thread(target=connection.run, name="echoserver connection", daemon=True)
        try:
            verified = self.verify_request(request, client_address)
            with self._lock:
                if verified and not self._closing and len(self._connections) < self.max_clients + self.spare_threads:
                    self._connections[connection] = thread
                    self._places += 1
                    self.advance(connection, CLOSED if self._places > self.max_clients else CONNECTING)
            if connection in self._connections:
                thread.start()
        finally:
            if thread.ident is None:  # it has not started; a Ctrl-C may come when it has
                self.forget(connection)
                request.close()

    def _wait_for_room(self, error: Exception) -> None:
        """Keep what there is, and neither spin nor fill the log, while the system has no room for more."""
        ends = self._stopping or "interpreter shutdown" in str(error)  # then the program starts no more threads
        if not ends and time.monotonic() > self._next_complaint:
            self._next_complaint = time.monotonic() + 60
            logger.warning("no room for another connection: %s; %d stay, new ones wait", error, len(self._connections))
        time.sleep(0.05)

    def stop(self) -> None:
        """Accept no more connections; the accepting thread then closes the server. Safe in a signal handler."""
        if not self._stopping and not self._in_forked_child():
            self._stopping = True
            with contextlib.suppress(OSError), socket.socket(self.address_family) as waker:
                waker.setblocking(False)
                waker.connect(self.socket.getsockname())  # ends accept()

    def server_close(self) -> None:
        """Stop accepting connections, and close the listening socket."""
        self.stop()
        self.socket.close()

    def close(self, code: int = 1001, reason: str | bytes = "") -> None:
        """Send Close to every client, wait for the answers, cut those that do not answer. It may be called again. It
        returns when no thread of the server is left but the calling one, after `close_timeout` at the latest. In a
        forked child it only closes the child's copies. In a signal handler call `stop()` instead. Raises ValueError for
        what a Close frame may not carry."""
        payload, me = close_payload(code, reason), threading.current_thread()
        if self._in_forked_child():  # shutdown() would reach the parent's sockets, and nobody releases its locks here
            for sock in [self.socket, *(connection.request for connection in list(self._connections))]:
                sock.close()
            self.closed = threading.Event()
            return self.closed.set()
        end = time.monotonic() + self.close_timeout
        grace = end - self.close_timeout / 4  # the rest is for cutting those that do not answer
        with self._lock:
            self._closing = True
            inside = me is self._background or me in self._connections.values()
        # One call closes at a time. One in a callback does not wait for another, which waits for this very thread.
        if not self._closer.acquire(timeout=0 if inside else self.close_timeout):
            return None
        try:
            self.stop()
            if me is not self.thread and self._accepting.acquire(timeout=self.close_timeout / 4):
                self._accepting.release()
            self.server_close()
            with self._lock:
                connections = dict(self._connections)
            threads = {t for t in (self._background, *connections.values()) if t and t is not me}
            self._close_all(connections, payload, grace)
            for until in grace, end:
                for thread in filter(threading.Thread.is_alive, threads):
                    thread.join(max(0, until - time.monotonic()))
                for connection, thread in connections.items():
                    if thread is not me and time.monotonic() < end:  # with thousands, a turn at the GIL takes long
                        connection.abort()
            stuck = sum(map(threading.Thread.is_alive, threads))
            if stuck:
                logger.warning("closed, but threads that have not ended: %d", stuck)
            self.closed.set()
        finally:
            self._closer.release()

    shutdown = _shutdown_gracefully = close  # socketserver's waits for ever before the start, or in a callback

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _in_forked_child(self) -> bool:
        return self._serving_pid not in (None, os.getpid())

    def _close_all(self, connections: Iterable[Connection], payload: bytes, until: float) -> None:
        """Send Close to all at once. One that another thread sends to is tried again, and cut at the time `until`."""
        waiting = list(connections)
        while waiting and time.monotonic() < until:
            waiting = [connection for connection in waiting if not connection.send_control(CLOSE, payload, 0)]
            time.sleep(0.01 * bool(waiting))
        for connection in waiting:
            connection.abort()

    def admit(self, connection: Connection, request: Request, subprotocol: str | None) -> bool:
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
            if connection.state < CLOSING <= state and connection in self._connections:
                self._places -= 1
            connection.state = state
            return True

    def forget(self, connection: Connection) -> None:
        """End a connection, and take it off the register; then its socket may be closed."""
        connection.abort()
        with self._lock:
            self._connections.pop(connection, None)

    def hold(self, size: int) -> bool:
        """Count bytes that a client makes the server keep, or gives back. False, and over `max_pending`."""
        with self._lock:
            fits = size < 0 or not self.max_pending or self._pending + size <= self.max_pending
            self._pending += size if fits else 0
            return fits

    @property
    def open_clients(self) -> list[Client]:
        """The clients with an open connection, no Close frame sent or received, in order of arrival (a new list)."""
        with self._lock:
            found = [c.client for c in self._connections if c.state is OPEN and c.client]
        return sorted(found, key=lambda client: client["id"])

    clients: Any = property(lambda self: self.open_clients, lambda self, _: None)  # websocket-server sets its own

    def send_message(self, client: Client, msg: str | Data) -> bool:
        """Send text (str) or binary (bytes), in any thread. Returns True when TCP has it, False if it is not open."""
        return client["handler"].send_message(msg)  # type: ignore[no-any-return]

    def _disconnect_clients_gracefully(self, status: int = 1000, reason: str | bytes = b"") -> None:
        handlers = [client["handler"] for client in self.open_clients]
        self._close_all(handlers, close_payload(status, reason), time.monotonic() + self.close_timeout)

    def _terminate_client_handlers(self) -> None:
        for client in self.open_clients:
            client["handler"].abort()

    def _multicast(self, msg: str | Data) -> None:
        for client in self.open_clients:
            self.send_message(client, msg)

    def _deny_new_connections(self, status: int, reason: str | bytes) -> None:
        self._deny_clients = close_payload(status, reason)

    def only_echoes(self) -> bool:
        """Whether the fast path may answer in place of the message callback (see the decorator of this name)."""
        code = getattr(self.message_received, "only_echoes", None)
        return (code is not None and code is getattr(self.message_received, "__code__", None) and not self.debug
                and type(self).send_message is Server.send_message and "send_message" not in self.__dict__)

    def _log(self, text: str, *values: Any) -> None:
        if self.debug:
            logger.setLevel(logging.DEBUG)
            if not logger.hasHandlers():  # the host program has not set logging up
                logger.addHandler(logging.StreamHandler())
            logger.debug(text, *values)


# ==== The echo pattern =============================================================================================
def only_echoes(callback: Callable[..., None]) -> Callable[..., None]:
    """Let the fast path answer in place of a message callback, as long as its code is just the echo below. A callback
    that is edited loses this by itself: what you read is what runs."""
    def echo(self: Any, client: Client, server: Server, message: str | bytes) -> None:
        """Send it back."""
        server.send_message(client, message)

    code, same = callback.__code__, echo.__code__
    if (code.co_code, code.co_names, code.co_varnames) == (same.co_code, same.co_names, same.co_varnames):
        callback.only_echoes = code  # type: ignore[attr-defined]
    return callback


class EchoServer(Server):
    """Send every message back to the client that it came from.

    Three callbacks make a server; override any of them. Each runs in the thread of that client's own connection, so it
    may block, and what it sends is on its way when `send_message` returns. An exception in one is logged, and its
    client gets Close 1011. `client` is websocket-server's dictionary: 'id' (1, 2, 3 …), 'address' (host, port) and
    'handler' (its Connection); and from its opening handshake 'path', 'headers' and 'subprotocol' (or None). `server`
    is this object. The options and the errors are those of `Server`.
    """

    def __init__(self, port: int = 1234, debug: bool = False, host: str = "0.0.0.0", **options: Any) -> None:
        self._clients: dict[int, Client] = {}  # the list, by number
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
    def message_received(self, client: Client, server: Server, message: str | bytes) -> None:
        """A whole message is here, text as str or binary as bytes: send it back."""
        server.send_message(client, message)

    def client_left(self, client: Client, server: Server) -> None:
        """The connection is over: take the client off the list."""
        with self._clients_lock:
            self._clients.pop(client["id"], None)

    @Server.clients.getter  # type: ignore[untyped-decorator]
    def clients(self) -> list[Client]:
        """The clients on the list with an open connection, in order of arrival (a new list)."""
        with self._clients_lock:
            listed = sorted(self._clients.items())
        return [client for _, client in listed if client["handler"].state is OPEN]

    def __enter__(self) -> EchoServer:
        """Serve in a background thread until the end of the `with` block."""
        self.start()
        return self


# ==== The command line =============================================================================================
def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; return the exit status. A second signal ends the process at once."""
    parser, signals = command_line(), (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in signals]

    def stop(*_: object) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
        server.stop()

    try:
        try:
            options = vars(parser.parse_args(argv))
        finally:
            print(end="", flush=True)  # what -h printed
        with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
            import resource  # as many files, and so as many clients, as the system allows
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (10240 if sys.platform == "darwin" else hard, hard))
        with contextlib.closing(EchoServer(**options)) as server:
            for number in signals:
                signal.signal(number, stop)
            with one_processor() as server.processors:
                print("Echo server listening on %s port %d: %s (Ctrl-C stops it)"
                      % (server.host, server.port, server.url), flush=True)
                server.serve_forever()
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        why = error.strerror or str(error)
        if not why.startswith("cannot"):  # it does not come from Server
            why, sys.stdout = "cannot write to standard output: " + why, None  # or it is tried again at the very end
        parser.exit(1, "" if error.errno == errno.EPIPE else "echoserver: error: %s\n" % why)  # for EPIPE nobody reads
    finally:
        for number, handler in zip(signals, handlers):
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
    for name, (_, unit, text) in Server._numbers.items():
        default = getattr(Server, name)
        shown = "%d MiB" % (default >> 20) if unit == "BYTES" else "%g" % default
        option("--" + name.replace("_", "-"), type=type(default), metavar=unit, help="%s (default %s)" % (text, shown))
    option("--origin", action="append", help="serve the pages of this origin only (may be given again)")
    option("--no-compression", dest="compression", action="store_false", help="decline permessage-deflate")
    option("--certfile", dest="cert", metavar="PEM", help="serve wss:// with this certificate chain")
    option("--keyfile", dest="key", metavar="PEM", help="its private key, if that is in a file of its own")
    option("--reuse-port", action="store_true", help="let several processes share the port")
    option("--version", action="version", version="echoserver " + __version__)
    return parser


def tls_context(certfile: str | None, keyfile: str | None = None) -> ssl.SSLContext:
    """Return a server's TLS context, TLS 1.2 or newer. Raises OSError for unfit files, ValueError for a key alone."""
    if certfile is None:
        raise ValueError("a key goes with a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    try:
        context.load_cert_chain(certfile, keyfile, password=lambda: "")  # never ask on the terminal
    except OSError as error:
        why = error if isinstance(error, ssl.SSLError) or not error.errno else os.strerror(error.errno)
        raise OSError(errno.EINVAL, "cannot use the certificate in %r%s: %s; it takes a PEM certificate chain and its "
                      "private key, not encrypted" % (certfile, " and %r" % keyfile if keyfile else "", why)) from None
    return context


@contextlib.contextmanager
def one_processor() -> Iterator[Iterable[int]]:
    """Hold this thread, and the threads that it starts, to one processor; yield all that they might use. With a GIL,
    threads on several processors mostly wake each other up. Processors that somebody has chosen stay as they are. Each
    process takes another one: it binds a name, which the kernel frees when the process ends."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(allowed) < max(2, os.cpu_count() or 0) or not getattr(sys, "_is_gil_enabled", lambda: True)():
        yield ()
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a sandbox may forbid any of this
            claim = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            chosen = sorted(allowed)[os.getpid() % len(allowed)]  # if all are taken
            for processor in sorted(allowed):
                with contextlib.suppress(OSError):
                    claim.bind("\0echoserver on processor %d" % processor)
                    chosen = processor
                    break
            os.sched_setaffinity(0, {chosen})
            stack.callback(os.sched_setaffinity, 0, allowed)
        yield allowed


# ==== One connection: the life of a thread =========================================================================

TIMED_OUT = (BlockingIOError, socket.timeout, TimeoutError)  # what the kernel, settimeout() and Windows raise for it
DONTWAIT = int(getattr(socket, "MSG_DONTWAIT", 0))
MORE = 0x8000 * (sys.platform == "linux")  # MSG_MORE holds the 101 back, for 0.2 s at most, till the client is listed
LEAST = 256 * 1024  # bytes that a client must take within send_timeout, or all there are
LONG = 64 * 1024  # bytes that are sent as one
MOST = 127 * 1024  # bytes to receive at once: a frame of 64 KiB fits, and malloc() does not yet map memory anew


class State(enum.IntEnum):
    """The states of a connection, as RFC 6455 names them. Each connection only moves down this list."""
    CONNECTING = 0  # the opening handshake is under way (section 4)
    OPEN = 1  # the 101 is on its way: messages may go both ways (section 4.2.2)
    CLOSING = 2  # a Close frame was sent or received (section 7.1.3)
    CLOSED = 3  # nothing can be sent any more (section 7.1.4)


CONNECTING, OPEN, CLOSING, CLOSED = State


class Connection:
    """One connection, and the life of its thread: setup, handle, finish. It is a client's 'handler'. Its own thread
    alone reads from it; the `send_…` methods and `abort()` may be called in any. A `send_…` returns True when its bytes
    are with TCP, and False, sending nothing, when the connection is not open any more."""

    client: Client | None = None  # set before the 101 is sent; new_client and client_left are called for it
    compression: PerMessageDeflate | None = None
    state = CONNECTING  # changed by Server.advance()
    closed_first: str | None = None  # who sent the first Close frame, "server" or "client"; guarded by _send_lock
    _deadline = float("inf")  # when to stop waiting for the client to end TCP, once it is about to
    _fragments: threading.Condition | None = None  # while a message goes out in fragments; guarded by _send_lock
    _fragmenter = 0  # the thread that sends them
    _callback, _callback_echoes = None, False  # the message callback, and whether it only echoes; kept only for speed
    _until_look = 32  # messages until it looks for the next one before it sleeps
    _room = 479  # bytes to receive at once: as many as fit Python's own pools, and more while they are filled
    _is_spread = False  # this thread may use every processor

    def __init__(self, request: socket.socket, client_address: Any, server: Server) -> None:
        self.request, self.client_address, self.server = request, (client_address or ("", 0))[:2], server
        self._send_lock = threading.RLock()  # held while a frame goes out
        self._tls = TLS(server.ssl_context) if server.ssl_context else None
        self._recv = self._recv_tls if self._tls else request.recv  # raises one of TIMED_OUT when nothing comes in time
        self._in_kernel = isinstance(request, _socket.socket) and DONTWAIT > 0

    def run(self) -> None:
        """Live the connection's life, in its own thread."""
        try:
            early = self.setup()
            if self.client:
                self.handle(early)
        except ProtocolError as error:  # section 7.1.7: fail the WebSocket connection
            self._close(close_payload(*error.args))
        except BaseException:  # sys.exit() too
            logger.exception("client %s gets Close 1011, since an override raised:", self.client and self.client["id"])
            self._close(close_payload(CloseCode.INTERNAL_ERROR, "internal error"))
        finally:
            self.finish()

    def setup(self) -> bytes:
        """Take the opening handshake; return the bytes that came behind it. `client` is set if it succeeds."""
        server, method, early = self.server, "", b""
        try:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # messages leave at once
            self._bound_waits(1 / 8, socket.SO_RCVTIMEO, socket.SO_SNDTIMEO)
            request, early = self._read_request()
            method = request.method
            require(self.state is not CLOSED, 503, "This server has all the clients that it takes.", "Retry-After: 5")
            response, subprotocol, self.compression = accept(request, server.origins, server.compression)
            self._bound_waits(1 / 2, socket.SO_RCVTIMEO)  # a client that is idle costs next to nothing
        except HTTPAnswer as answer:  # the request was for something else, or cannot be granted
            server.advance(self, CLOSED)  # so that its place is free
            crowded = len(server._connections) > server.max_clients + server.spare_threads // 2
            self._deadline = time.monotonic() + (not crowded)
            self._write(answer.head + answer.content * (method != "HEAD"))
        except OSError:  # gone, or no TLS: there is nobody to answer
            self.abort()
        else:
            with self._send_lock:  # nobody's message may overtake the response
                if not server.admit(self, request, subprotocol):
                    self._write(response)
                    server.advance(self, OPEN)
                    self._close(server._deny_clients or close_payload(CloseCode.GOING_AWAY, ""))
                elif not self._write(response, more=MORE):
                    self.client = None  # without the 101 it is no client
        return early

    def _bound_waits(self, share: float, *options: int) -> None:
        """Let each wait end after a share of the server's shortest time; then the clock is read. Raises OSError. The
        kernel keeps the time, since settimeout() would cost a poll() for each call. Under gevent and eventlet a socket
        never waits in the kernel, and Windows has no MSG_DONTWAIT: there settimeout() does it."""
        times = (getattr(self.server, name) for name in Server._numbers if name.endswith(("timeout", "interval")))
        shortest = min(filter(None, times))
        self.request.settimeout(None if self._in_kernel else max(0.01, shortest / 8))
        for option in options if self._in_kernel else ():
            layout = "qq" if option in (66, 67) else "ll"  # a struct timeval; these numbers mean one of 64 bits
            value = struct.pack(layout, *divmod(int(max(0.01, shortest * share) * 10**6), 10**6))
            self.request.setsockopt(socket.SOL_SOCKET, option, value)

    def _read_request(self) -> tuple[Request, bytes]:
        """Read a request, all of it within `open_timeout`. Raises HTTPAnswer, or OSError when the client is gone."""
        patience = self.server.open_timeout if self.state is CONNECTING else min(1, self.server.open_timeout)
        deadline, data, parsed = time.monotonic() + patience, b"", None
        if self._tls:
            self._use_all_processors()
        while not parsed:
            try:
                more = self._recv_by(deadline, 4096)
            except TimeoutError:
                raise HTTPAnswer(408, "No full request came in %g seconds." % patience) from None
            if not more:
                raise HTTPAnswer(400, "The request ended before its empty line.") if data else ConnectionAbortedError
            data += more
            parsed = parse_request(data)
        return parsed

    def handle(self, data: bytes) -> None:
        """Take what the client sends until the connection is over; `data` came with the request."""
        server, client = self.server, self.client or {}
        receiver = Receiver(server.max_size, self.compression, server.hold)
        server._log("newConnection: client %d from %s port %d", client["id"], *client["address"])
        try:
            server.new_client(client, server)
            with contextlib.suppress(OSError):  # lets go of what MORE holds back
                self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            data = data or self._receive()
            while data:
                if receiver.between_messages and not server.debug:
                    data = self._take_whole_frames(data)  # the fast path; without this line all is only slower
                for opcode, pieces in receiver.feed(data) if data else ():
                    if opcode == CLOSE:  # answered, unless it is the answer to ours (section 5.5.1)
                        self._close(bytes(pieces[0]), "client")
                        self._deadline = time.monotonic() + (self.closed_first == "client")  # for it to end TCP
                        return
                    if opcode == PING:
                        self.send_frame(PONG, pieces[0])
                    elif opcode != PONG:
                        self._deliver(opcode, pieces)
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
                    callback(client, server, payload.decode() if header[0] & TEXT else payload)
        return data[used:]

    def _deliver(self, opcode: int, pieces: list[bytes | bytearray]) -> None:
        """Call the callback with a message. What comes after our Close frame is ignored."""
        server, client = self.server, self.client or {}
        if self.state is OPEN and server.only_echoes():
            self._send_data(opcode, *pieces)
        elif self.state is OPEN:
            payload = b"".join(pieces)
            message = payload.decode() if opcode == TEXT else payload
            if server.debug:
                shown = repr(message) if len(message) <= 80 else "%r … %r" % (message[:40], message[-20:])
                kind, unit = ("Message", "characters") if opcode == TEXT else ("Binary Message", "bytes")
                server._log("%s received: client %d: %s (%d %s)", kind, client["id"], shown, len(message), unit)
            server.message_received(client, server, message)

    def _receive(self) -> bytes:
        """Return what the client sends next, b"" when there is nothing to wait for any more. After `ping_interval` of
        silence the client gets a Ping (section 5.5.2); after `ping_timeout` more it is failed."""
        server, pinged, silent_since = self.server, False, time.monotonic()
        while self.state is OPEN or time.monotonic() < self._deadline:
            try:
                self._until_look -= 1
                data = (self._until_look < 0 and self._look()) or self._recv(self._room)
                if len(data) == self._room:
                    self._room = min(4 * self._room, MOST)
                return data
            except ssl.SSLWantReadError:  # a part of a TLS record: a sign of life
                silent_since = time.monotonic()
            except TIMED_OUT:
                self._room = Connection._room
                if self.state is not OPEN:
                    self._bound_waits(1 / 8, socket.SO_RCVTIMEO)
            except OSError:
                break
            patience = server.ping_timeout if pinged else server.ping_interval or float("inf")
            if self.state is OPEN and time.monotonic() >= silent_since + patience:
                if pinged:
                    self._close(close_payload(CloseCode.INTERNAL_ERROR, "no answer to a Ping"))
                    break
                self.send_control(PING, b"", 0)
                silent_since, pinged = time.monotonic(), server.ping_timeout > 0
        return b""

    def _look(self) -> bytes:
        """Return the next bytes if they come very soon, else b"": to be woken costs more. Not if others must wait."""
        if len(self.server._connections) == 1 and self._in_kernel and not self._tls:
            for _ in range(self.server.looks):
                with contextlib.suppress(BlockingIOError):
                    return self.request.recv(self._room, DONTWAIT)
        self._until_look = 32  # a failed look pauses looking
        return b""

    def _recv_by(self, deadline: float, size: int) -> bytes:
        """Return what comes before the time `deadline`, b"" at the end. Raises TimeoutError, or another OSError."""
        while time.monotonic() < deadline:
            with contextlib.suppress(*TIMED_OUT, ssl.SSLWantReadError):
                return self._recv(size)
        raise TimeoutError

    def _recv_tls(self, _: int) -> bytes:
        """Do what recv() does, and decrypt. Raises SSLWantReadError if that takes more than has come."""
        assert self._tls
        ciphertext = b"" if self._tls.has_ended else self.request.recv(LONG)
        plaintext = self._tls.decrypt(ciphertext)
        if self._tls.outgoing.pending:  # what TLS itself has to say
            with self._send_lock:
                self._write(b"")
        if ciphertext and not plaintext and not self._tls.has_ended:
            raise ssl.SSLWantReadError
        return plaintext

    def _use_all_processors(self) -> None:
        """Let this thread use every processor again: what it does now runs beside the interpreter."""
        if self.server.processors and not self._is_spread:
            os.sched_setaffinity(0, self.server.processors)
        self._is_spread = True

    def finish(self) -> None:
        """End our half of TCP, and, when the client has ended its own or time is up, the rest (section 7.1.1). A socket
        that is closed with bytes unread sends a reset, which may destroy the Close frame or the answer on its way. So
        this reads what still comes, and throws it away."""
        server, client = self.server, self.client or {}
        server.advance(self, CLOSING)
        if self._tls and self._send_lock.acquire(timeout=1):  # its holder may be blocked sending
            self._tls.close()
            self._write(b"", wait=False)
            self._send_lock.release()
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_WR)
        try:
            if client:
                server._log("socketDisconnected: client %d", client["id"])
                server.client_left(client, server)
        except BaseException:
            logger.exception("client_left raised, after client %s had left:", client["id"])
        finally:
            self._recv, deadline = self.request.recv, min(self._deadline, time.monotonic() + server.close_timeout)
            with contextlib.suppress(OSError):
                self._bound_waits(1 / 8, socket.SO_RCVTIMEO)
                while self._recv_by(deadline, LONG):
                    pass
            server.forget(self)
            if self._send_lock.acquire(timeout=server.close_timeout):  # nobody is sending any more
                self._send_lock.release()
            self.compression = None  # its streams need not wait for the garbage collector
            self.request.close()

    def abort(self, last_words: bytes = b"") -> None:
        """Cut the TCP connection without a Close frame, after sending some bytes as they are."""
        if last_words:
            with self._send_lock:
                if self.state is OPEN:
                    self._write(last_words)
        self.server.advance(self, CLOSED)  # without the send lock: its holder may be blocked sending
        with self.server._lock, contextlib.suppress(OSError):
            if self in self.server._connections:  # later the number of the socket may be another's
                self.request.shutdown(socket.SHUT_RDWR)  # wakes every thread that waits there

    def _close(self, payload: bytes, first: str = "server") -> None:
        """Send a Close frame, or cut a client that keeps another thread sending."""
        if not self.send_control(CLOSE, payload, self.server.close_timeout, first):
            self.abort()

    def send_control(self, opcode: int, payload: bytes, patience: float, first: str = "server") -> bool:
        """Send a control frame, if the connection is open. Returns False if another thread sends for longer than
        `patience`; with 0 a client that does not read is cut. A Close begins the closing handshake (section 7.1.2)."""
        if self.state is CONNECTING:
            self.abort()
        if not self._send_lock.acquire(timeout=patience):
            return False
        try:
            if self.state is OPEN:
                if opcode == CLOSE:  # before its frame goes out: a client that has that is on no list
                    self.server.advance(self, CLOSING)
                    self.closed_first, self._deadline = first, time.monotonic() + self.server.close_timeout
                self._write(frame_header(opcode, len(payload)) + payload, patience > 0)
            return True
        finally:
            self._send_lock.release()

    def send_message(self, message: str | Data) -> bool:
        """Send text (str) or binary (bytes). Raises TypeError for anything else."""
        if isinstance(message, str):
            return self._send_data(TEXT, message.encode())
        if isinstance(message, (bytes, bytearray, memoryview)):
            return self._send_data(BINARY, bytes(message))
        raise TypeError("a message is str or bytes, not %s" % type(message).__name__)

    def send_fragments(self, pieces: Iterable[str | bytes]) -> bool:
        """Send one message in fragments (section 5.4), each as soon as `pieces` yields it, all str or all bytes. Other
        threads' messages wait for the last fragment, `send_timeout` at most, and are not sent after that; control
        frames may go in between. `pieces` itself must not send messages to this client."""
        kind, turn = None, threading.Condition(self._send_lock)
        with turn:
            if not self._may_send():
                return False
            self._fragments, self._fragmenter = turn, threading.get_ident()
        try:
            for piece in pieces:  # no lock is held while this waits for the next one
                opcode = CONTINUATION if kind else TEXT if isinstance(piece, str) else BINARY
                kind = kind or type(piece)
                if type(piece) is not kind:
                    raise TypeError("the fragments of a message are all str or all bytes")
                if not self.send_frame(opcode, piece, fin=False):
                    return False
            return self.send_frame(CONTINUATION if kind else BINARY)
        except BaseException:  # the message cannot be ended, and no other be sent
            self._close(close_payload(CloseCode.INTERNAL_ERROR, "internal error"))
            raise
        finally:
            with turn:
                self._fragments = None
                turn.notify_all()

    def send_text(self, message: str | bytes, opcode: int = 0x1) -> bool:
        """Send text; bytes must be UTF-8 (websocket-server's name for it). Raises UnicodeDecodeError."""
        text = message if isinstance(message, str) else message.decode()
        return self.send_message(text) if opcode == TEXT else self.send_frame(opcode, text)

    def send_close(self, status: int = 1000, reason: str | bytes = b"") -> bool:
        """Start the closing handshake (section 7.1.2). Raises ValueError for what a Close frame may not carry."""
        payload, was_open = close_payload(status, reason), self.state is OPEN
        self._close(payload)
        return was_open

    def send_frame(self, opcode: int, payload: str | Data = b"", fin: bool = True) -> bool:
        """Send one frame just as it is told: nothing checks that it makes sense at this place."""
        data = payload.encode() if isinstance(payload, str) else payload
        with self._send_lock:
            return self.state is OPEN and self._write(frame_header(opcode, len(data), fin) + data)

    send_ping = functools.partialmethod(send_frame, 0x9)  # section 5.5.2
    send_pong = functools.partialmethod(send_frame, 0xA)  # section 5.5.3

    def _send_data(self, opcode: int, payload: Data, *more: Data) -> bool:
        """Send one message, in one frame."""
        with self._send_lock:
            if not (self._may_send() if self._fragments else self.state is OPEN):
                return False
            compress = self.compression is not None and self.compression.used
            if self.compression and compress:
                payload, more = self.compression.deflate(b"".join((payload, *more))), ()
            size = len(payload) + sum(map(len, more)) if more else len(payload)
            header = frame_header(opcode, size, True, compress)
            if size <= LONG and not more:
                return self._write(header + payload)
            return all(map(self._write, (header, payload, *more)))  # spares a copy

    def _may_send(self) -> bool:
        """Wait, without _send_lock, while another thread sends fragments: `send_timeout` at most. Then say if open."""
        until = time.monotonic() + self.server.send_timeout
        while self._fragments:
            if self._fragmenter == threading.get_ident():
                raise RuntimeError("a message cannot be sent between the fragments of another (section 5.4)")
            if not self._fragments.wait(until - time.monotonic()):
                return False
        return self.state is OPEN

    def _write(self, data: Data, wait: bool = True, more: int = 0) -> bool:
        """Send bytes; _send_lock is held. After a failure the connection is over: a part of a frame may be out."""
        try:
            data = self._tls.encrypt(data) if self._tls else data
            try:
                sent = self.request.send(data, DONTWAIT | more)
            except TIMED_OUT:
                sent = 0
            if sent != len(data):
                self._write_rest(memoryview(data)[sent:], wait)
            return True
        except OSError:
            self.abort()
            return False

    def _write_rest(self, data: memoryview, wait: bool) -> None:
        """Send what TCP does not take at once: LEAST bytes, or all, within each `send_timeout`. Raises OSError."""
        size = len(data)
        if not wait or not self.server.hold(size):
            raise BlockingIOError
        try:
            while data:
                part, data, deadline = data[:LEAST], data[LEAST:], time.monotonic() + self.server.send_timeout
                while part:
                    with contextlib.suppress(*TIMED_OUT):
                        part = part[self.request.send(part):]
                    if part and time.monotonic() >= deadline:
                        raise TimeoutError
        finally:
            self.server.hold(-size)

    # What else websocket-server's handler has
    connection = property(lambda self: self.request)
    keep_alive = property(lambda self: self.state is OPEN, lambda self, on: on or self.send_close())
    handshake_done = valid_client = property(lambda self: self.state is OPEN)


# ==== TLS: bytes in, bytes out =====================================================================================
class TLS:
    """One connection's TLS. Its lock guards the TLS object, which two threads must not use at once. No call waits."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.has_ended = False  # by a close_notify, or by what is not TLS
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self._lock = threading.Lock()

    def decrypt(self, ciphertext: bytes) -> bytes:
        """Return the plaintext that is complete with these bytes; the first ones are the TLS handshake's."""
        plaintext: list[bytes] = []
        with self._lock:
            self.incoming.write(ciphertext)
            try:
                plaintext.extend(iter(lambda: self._tls.read(LONG), b""))
                self.has_ended = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                self.has_ended = True
        return b"".join(plaintext)

    def encrypt(self, plaintext: Data) -> bytes:
        """Return the ciphertext of it, behind what TLS itself has to say. Raises ssl.SSLError."""
        with self._lock:
            if plaintext:
                self._tls.write(plaintext)
            return self.outgoing.read()

    def close(self) -> None:
        """Let close_notify be the next that is sent (RFC 8446 section 6.1)."""
        with contextlib.suppress(ssl.SSLError), self._lock:
            self._tls.unwrap()  # raises, since it would like to wait for the peer's


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
Request = collections.namedtuple("Request", "method path version headers")  # the path with its query, as it was sent
# Section 9.1: a name, then parameters with or without a value; a value that is quoted is a token too
PARAMETER = r"[ \t]*;[ \t]*(%s)(?:[ \t]*=[ \t]*(%s|\"(?:%s|\\%s)+\"))?" % (TOKEN, TOKEN, TCHAR, TCHAR)
EXTENSION = re.compile(r"[ \t,]*(%s)((?:%s)*)[ \t]*(?:,[ \t,]*|$)" % (TOKEN, PARAMETER))


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
        return super().get(name.lower(), default)

    def items_of(self, name: str) -> list[str]:  # of a list of tokens (RFC 9110 section 5.6.1)
        return [item.strip(" \t") for item in self.get(name, "").split(",") if item.strip(" \t")]


def require(condition: object, status: int, why: str, *fields: str) -> None:
    """Raise HTTPAnswer, unless the condition holds."""
    if not condition:
        raise HTTPAnswer(status, why, *fields)


def parse_request(data: bytes) -> tuple[Request, bytes] | None:
    """Return a request and the bytes behind it, None while it is incomplete. Raises HTTPAnswer 400 or 431 early."""
    data = data[2 * data.startswith(b"\r\n"):]  # an empty line in front is ignored (RFC 9112 section 2.2)
    end = data.find(b"\r\n\r\n")
    head = data[:-3] if end < 0 else data[:end]
    require(len(head) <= MAX_HEAD and head.count(b"\n") <= MAX_FIELDS, 431,
            "The request's header is over %d bytes or %d fields." % (MAX_HEAD, MAX_FIELDS))
    lines = data[:end + 2] if end >= 0 else data
    crlf_only = lines.count(b"\n") == lines.count(b"\r\n")
    require(data in (b"", b"\r") or (data[:1].isalpha() and crlf_only), 400, "This is no HTTP request.")
    if end < 0:
        return None
    (first, *others), fields = head.decode("latin-1").split("\r\n"), Headers()
    for line in others:
        field = FIELD_LINE.fullmatch(line)
        if not field:
            raise HTTPAnswer(400, "A header field is malformed.")
        name, value = field[1].lower(), field[2].strip(" \t")
        fields[name] = fields[name] + ", " + value if name in fields else value
    match = REQUEST_LINE.fullmatch(first)
    if not match:
        raise HTTPAnswer(400, "The request line is malformed.")
    return Request(match[1], "/" + match[2], match[3], fields), data[end + 4:]


def parse_extensions(value: str) -> list[tuple[str, list[tuple[str, str | None]]]]:
    """Return the offers of a Sec-WebSocket-Extensions field: names, each with its parameters and their values or None.
    Raises HTTPAnswer 400 if the field does not fit the ABNF (section 9.1)."""
    offers, at = [], 0
    while at < len(value) or not value:
        match = EXTENSION.match(value, at)
        if not match:
            raise HTTPAnswer(400, "Sec-WebSocket-Extensions is malformed.")
        parameters = re.findall(PARAMETER, match[2])
        offers.append((match[1], [(name, re.sub(r'["\\]', "", text) or None) for name, text in parameters]))
        at = match.end()
    return offers


def accept(request: Request, origins: set[str] | None,
           compression: bool) -> tuple[bytes, str | None, PerMessageDeflate | None]:
    """Return the answer 101 to an opening handshake, the subprotocol and the extension that it agrees on. Raises
    HTTPAnswer where the request is for the page or does not meet section 4.2.1."""
    method, path, version, headers = request
    subprotocols = headers.items_of("sec-websocket-protocol")
    key, origin, none = headers.get("sec-websocket-key", ""), headers.get("origin"), "," * (version != "1.0")
    require(method in ("GET", "HEAD"), 405, "The method must be GET, not %s." % method, "Allow: GET, HEAD")
    require(HOST.fullmatch(headers.get("host", none)), 400, "There must be one Host field, and it must be valid.")
    require(headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers, 400,
            "The request must have no body.")
    if method == "HEAD" or "websocket" not in map(str.lower, headers.items_of("upgrade")):
        require(path.split("?")[0] == "/", 426, "This is a WebSocket server; its page is at /.", *UPGRADE)
        raise HTTPAnswer(200, PAGE, "Content-Security-Policy: " + POLICY, kind="text/html")
    require(version != "1.0" and "upgrade" in map(str.lower, headers.items_of("connection")), 400,
            "An opening handshake must be HTTP/1.1 and have Connection: Upgrade.")
    require(headers.get("sec-websocket-version") == "13", 426, "Sec-WebSocket-Version must be 13.",
            *UPGRADE, "Sec-WebSocket-Version: 13")
    require(re.fullmatch("[A-Za-z0-9+/]{22}==", key), 400, "Sec-WebSocket-Key must be 16 bytes in base64.")
    require(origins is None or origin is None or origin in origins, 403, "The origin %r is not served here." % origin)
    for subprotocol in subprotocols or [""] * ("sec-websocket-protocol" in headers):
        require(re.fullmatch(TOKEN, subprotocol), 400, "The subprotocol %r is no token." % subprotocol)
    offered = headers.get("sec-websocket-extensions")
    offers = [] if offered is None else parse_extensions(offered)
    extension, agreed = negotiate(offers if compression else [])
    digest = base64.b64encode(hashlib.sha1(key.encode() + GUID).digest()).decode()
    response = ["HTTP/1.1 101 Switching Protocols", *UPGRADE, "Sec-WebSocket-Accept: " + digest,
                *("Sec-WebSocket-Protocol: " + subprotocol for subprotocol in subprotocols[:1]),
                *["Sec-WebSocket-Extensions: " + agreed] * bool(extension), "", ""]
    return "\r\n".join(response).encode(), subprotocols[0] if subprotocols else None, extension


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
    """The connection must be failed, with this status code and this reason, its two arguments (section 7.1.7)."""


def frame_header(opcode: int, size: int, fin: bool = True, rsv1: bool = False) -> bytes:
    """Return a frame's header: no mask, the length in the fewest bytes (section 5.2). Raises ValueError for a control
    frame that is too long (section 5.5)."""
    first = opcode | FIN * fin | RSV1 * rsv1
    if size < 126:
        return bytes((first, size))
    if opcode & 0x8:
        raise ValueError("a control frame takes 125 bytes, not %d" % size)
    return struct.pack("!BBH", first, 126, size) if size < 2**16 else struct.pack("!BBQ", first, 127, size)


def close_payload(code: int, reason: str | bytes) -> bytes:
    """Return what a Close frame carries (section 5.5.1). Raises ValueError for what it may not."""
    if code not in STATUS_CODES:
        raise ValueError("a Close frame may not carry the status code %r (section 7.4)" % code)
    text = reason if isinstance(reason, str) else reason.decode()
    if len(text.encode()) > 123:
        raise ValueError("the reason of a Close frame takes 123 bytes, not %d" % len(text.encode()))
    return struct.pack("!H", code) + text.encode()


def unmask(data: Data, key: bytes) -> bytes:
    """XOR data with the masking key, over and over (section 5.3)."""
    size = len(data)
    in_c = xor_in_c() if size >= 256 else None
    if in_c:
        return in_c(data, key)
    mask = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "big") ^ int.from_bytes(mask, "big")).to_bytes(size, "big")


@functools.lru_cache(maxsize=1)
def xor_in_c() -> Callable[[Data, bytes], bytes] | None:
    """Return what unmasks ten times as fast, and without the GIL; None where there is none. It is in OpenSSL, which the
    ssl module has loaded. In output feedback mode a cipher makes each block of the key stream from the one before. This
    cipher is memmove() of 16 bytes onto themselves: the first block, over and over."""
    try:
        import _ssl
        import ctypes
        feed_back = ctypes.CDLL(_ssl.__file__).CRYPTO_ofb128_encrypt
        pointer = ctypes.c_void_p
        feed_back.argtypes = pointer, pointer, ctypes.c_size_t, pointer, ctypes.c_char_p, pointer, pointer
        feed_back.restype = None
        memmove = ctypes.cast(ctypes.CDLL(None).memmove, pointer)

        def xor(data: Data, key: bytes) -> bytes:
            out = bytes(memoryview(data))  # a copy that nobody else has yet, so it may still be written
            feed_back(out, out, len(out), 16, key * 4, ctypes.byref(ctypes.c_int(0)), memmove)
            return out

        return xor if xor(b"Hello" * 9, b"7abc") == unmask(b"Hello" * 9, b"7abc") else None
    except Exception:  # no ctypes, no shared library, another OpenSSL
        return None


class Receiver:
    """Makes whole messages and control frames of the bytes that a client sends. `hold` is told how many bytes are kept
    for a message under way; where it refuses, that fails with Close 1013."""

    def __init__(self, max_size: int, compression: PerMessageDeflate | None = None,
                 hold: Callable[[int], bool] = lambda size: True) -> None:
        self.between_messages = True  # the next byte begins a frame, and no message is under way
        self._max_size, self._compression, self._hold = max_size, compression, hold
        # The frame under way: the beginning of its header, or of a control frame; then how much of its payload is left
        self._begun, self._fin, self._frame_opcode, self.left, self._key = b"", True, CONTINUATION, 0, b""
        # The message under way (CONTINUATION stands for none); `_rest` is the beginning of a character
        self._opcode, self._compressed, self._size, self._rest = CONTINUATION, False, 0, b""
        self._pieces: list[bytes | bytearray] = []

    def feed(self, data: bytes) -> Iterator[tuple[int, list[bytes | bytearray]]]:
        """Yield (opcode, payload in pieces) of each message and control frame that these bytes complete. All is checked
        as far as it has come. Raises ProtocolError at the first fault, after yielding what came before."""
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
                if self._frame_opcode == CLOSE and chunk:  # sections 5.5.1 and 7.4
                    try:
                        close_payload(int.from_bytes(chunk[:2], "big") * (len(chunk) > 1), chunk[2:])
                    except UnicodeDecodeError:
                        raise ProtocolError(CloseCode.INVALID_PAYLOAD, "a reason that is not UTF-8") from None
                    except ValueError:
                        raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a Close code that may not be sent") from None
                yield self._frame_opcode, [chunk]
                continue
            for part in self._compression.inflate(chunk) if self._compression and self._compressed else (chunk,):
                self._extend(part)
            if self.left:
                break
            if self._fin:
                for part in self._compression.end_of_message() if self._compression and self._compressed else ():
                    self._extend(part)
                self._check_text(b"", final=True)
                message, self._opcode, self._pieces = (self._opcode, self._pieces), CONTINUATION, []
                yield message
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
        if not opcode & 0x8 and not compressed and self._size + size > self._max_size:
            raise ProtocolError(CloseCode.MESSAGE_TOO_BIG, "a message longer than %d bytes" % self._max_size)
        if len(data) < at + 4 + size * (opcode >> 3):  # a control frame is taken as a whole
            return 0
        self._fin, self._frame_opcode, self.left, self._key = fin, opcode, size, data[at:at + 4]
        if opcode in (TEXT, BINARY):
            self._opcode, self._compressed = opcode, compressed
        return at + 4

    def _extend(self, part: bytes) -> None:
        """Add a part of the payload to the message under way."""
        if self._size + len(part) > self._max_size:
            raise ProtocolError(CloseCode.MESSAGE_TOO_BIG, "a message longer than %d bytes" % self._max_size)
        if not self._hold(len(part)):
            raise ProtocolError(CloseCode.TRY_AGAIN_LATER, "the server holds too many unfinished messages")
        self._size += len(part)
        self._check_text(part)
        if len(part) >= LONG // 4:
            self._pieces.append(part)
        elif self._pieces and isinstance(self._pieces[-1], bytearray):
            self._pieces[-1] += part
        else:  # short ones follow in one bytearray, since each object takes memory of its own
            self._pieces.append(bytearray(part))

    def _check_text(self, part: bytes, final: bool = False) -> None:
        """Check that text is UTF-8 as far as it has come (section 8.1)."""
        if self._opcode == TEXT and (self._rest or not part.isascii()):
            data = self._rest + part
            try:
                self._rest = data[codecs.utf_8_decode(data, "strict", final)[1]:]
            except UnicodeDecodeError:
                self._rest = b"\xed\xa0"
            if b"\xed\xa0" <= self._rest < b"\xee":  # half a surrogate, which Python would wait for the end of
                raise ProtocolError(CloseCode.INVALID_PAYLOAD, "text that is not UTF-8 (section 8.1)") from None


# ==== The fast path: whole messages, many at a time ================================================================
# This chapter may be deleted, with Connection._take_whole_frames() and the line that calls it: the server is then
# slower, and nothing else. The tests hold it against Receiver, frame for frame.

# For each beginning of a short frame: its size, the header of the same message to a client, and what unmasks it in one
# step: a factor that repeats the masking key from its own place on, and how many bits of that are too many.
SHORT_FRAMES = {
    bytes((FIN | opcode, MASKED | size)):
        (size, bytes((FIN | opcode, size)), int.from_bytes(b"\0\0\0\1" * ((size + 7) // 4), "big"), -size % 4 * 8)
    for opcode in (TEXT, BINARY) for size in range(126)}


def whole_frames(data: bytes, max_size: int) -> tuple[list[bytes], int]:
    """Take the whole messages, in one frame each of less than 64 KiB, that `data` begins with. Return [header, payload,
    header, payload …], ready to send to a client, and how many bytes they took. This stops before whatever is
    incomplete, too long, in fragments, compressed, a control frame or wrong."""
    frames: list[bytes] = []
    at, end, number = 0, len(data), int.from_bytes
    while at < end:
        first = data[at:at + 2]
        try:  # not get(), which takes 200 times as long in a free-threaded interpreter
            size, header, repeat, excess = SHORT_FRAMES[first]
            after = at + 6 + size
            if after > end or size > max_size:
                break
            masked = number(data[at + 2:after], "big")  # the masking key in front, which the XOR clears
            payload = (masked ^ (masked >> 8 * size) * repeat >> excess).to_bytes(size, "big")
        except KeyError:
            size = number(data[at + 2:at + 4], "big")
            after = at + 8 + size
            if first not in (b"\x81\xfe", b"\x82\xfe") or after > end or not 126 <= size <= max_size:
                break
            header = bytes((first[0], 126)) + data[at + 2:at + 4]
            payload = unmask(memoryview(data)[at + 8:after], data[at + 4:at + 8])
        if header[0] & TEXT and not payload.isascii():
            try:
                payload.decode()
            except UnicodeDecodeError:
                break
        frames += header, payload
        at = after
    return frames, at


# ==== Compression: permessage-deflate, bytes in, bytes out (RFC 7692) ==============================================

END_OF_MESSAGE = b"\0\0\xff\xff"  # is left out of each message (sections 7.2.1 and 7.2.2)
DOES_NOT_INFLATE = CloseCode.INVALID_PAYLOAD, "a message that does not inflate (RFC 7692 section 7.2.2)"
OFFERED = re.compile("(server|client)_no_context_takeover=|client_max_window_bits=|"
                     "(server|client)_max_window_bits=([89]|1[0-5])")  # a parameter of an offer (section 7.1)


def negotiate(offers: Iterable[tuple[str, list[tuple[str, str | None]]]]) -> tuple[PerMessageDeflate | None, str]:
    """Take the first offer of permessage-deflate with good parameters, none twice; return it and the answer (7.1)."""
    for name, offered in offers:
        parameters = dict(offered)
        if (name == "permessage-deflate" and len(parameters) == len(offered)
                and all(OFFERED.fullmatch("%s=%s" % (key, value or "")) for key, value in offered)):
            if not parameters.get("client_max_window_bits"):  # with no value it only says that the answer may set it
                parameters.pop("client_max_window_bits", None)
            answer = [name, *(key + "=" + value if value else key for key, value in parameters.items())]
            return PerMessageDeflate(parameters), "; ".join(answer)
    return None, ""


class PerMessageDeflate:
    """One connection's compression. Its two streams are made when they are first needed. Once the client has sent a
    compressed message, `used` says so, and the answers are compressed."""

    def __init__(self, parameters: dict[str, str | None]) -> None:
        self.used = False
        # At most 12, for 32 KiB a client, not 256. zlib cannot do 8, but 9 looks back 250 bytes, which 8 bits hold.
        self._server_bits = max(9, min(int(parameters.get("server_max_window_bits") or 12), 12))
        self._client_bits = int(parameters.get("client_max_window_bits") or 15)
        self._server_forgets, self._client_forgets = (
            side + "_no_context_takeover" in parameters for side in ("server", "client"))
        self._inflater: zlib._Decompress | None = None
        self._deflater: zlib._Compress | None = None

    def inflate(self, data: bytes) -> Iterator[bytes]:
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
            raise ProtocolError(*DOES_NOT_INFLATE) from None

    def end_of_message(self) -> Iterator[bytes]:
        """Yield the last of what a message inflates to. Raises ProtocolError 1007 if that is not between two blocks."""
        yield from self.inflate(END_OF_MESSAGE)
        assert self._inflater
        probe = self._inflater.copy()
        with contextlib.suppress(zlib.error):
            probe.decompress(b"\3\0")  # an empty last block
        if not probe.eof:
            raise ProtocolError(*DOES_NOT_INFLATE)
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

POLICY = "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
PAGE = """\
<!doctype html><html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Echo server</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --page: #ececea; --card: #fff; --ink: #1c2024; --accent: #2f50c8 }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #202327; --ink: #e7e9eb; --accent: #93abff } }
* { box-sizing: border-box; font: inherit; color: inherit }
body { max-width: 46rem; margin: auto; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
form { display: flex; flex-wrap: wrap; align-items: end; gap: .75rem; margin-top: 1rem; padding: 1.25rem;
  border-radius: .75rem; background: var(--card) }
input, button { width: 100%; padding: .5rem .875rem; border: 1px solid gray; border-radius: .5rem; background: none }
button { flex: 1; white-space: nowrap } #send { background: var(--accent); color: var(--card) }
h1, p { margin: 0 } p { width: 100% } label { flex: 3 8rem; font-size: .875rem } :disabled { opacity: .5 }
#log { width: 100%; max-height: 20rem; overflow: hidden auto; font: .75rem/1.75 monospace; white-space: pre }
</style>
<h1>Echo server</h1>
<form id="connection" method="dialog"> <!-- this method submits to nowhere -->
  <p id="state" role="status"></p>
  <label>Close code <input id="code" value="1000" required pattern="1000|[34][0-9]{3}" title="1000, 3000-4999"></label>
  <label>Reason <input id="reason" maxlength="41" autocomplete="off"></label>
  <button id="connect"></button></form>
<form id="message" method="dialog">
  <label>Message <input id="text" value="Hello" autocomplete="off"></label><button id="send">Send</button>
  <button id="choose" type="button">Send a file</button><input id="file" type="file" aria-label="File" hidden>
  <div id="log" role="log" aria-label="Messages"></div></form>
<script>
const [connection, state, code, reason, connect, message, text, send, choose, file, log] =
  document.querySelectorAll("[id]");
let socket, sent; // when each message under way was sent: the echoes come in the same order

function open() {
  sent = [];
  socket = new WebSocket(location.href.replace("http", "ws").split("#")[0]);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => show();
  socket.onmessage = ({ data }) =>
    add("in ", data, sent.length ? `${(performance.now() - sent.shift()).toFixed(1)} ms` : "");
  socket.onclose = ({ code, reason, wasClean }) =>
    show(`. Closed: ${code} ${reason}`.trimEnd() + (wasClean ? " (clean)" : " (not clean)"));
  show();
}
function show(closed = "") {
  const states = ["○ Connecting to", "● Connected to", "○ Disconnecting from", "○ Not connected to"];
  state.textContent = `${states[socket.readyState]} ${socket.url}${closed}`;
  connect.textContent = socket.readyState === WebSocket.CLOSED ? "Connect" : "Disconnect";
  send.disabled = choose.disabled = socket.readyState !== WebSocket.OPEN;
}
function transmit(data) {
  add("out", data);
  sent.push(performance.now());
  socket.send(data);
}
function add(direction, data, time = "") {
  const isText = typeof data === "string", bytes = isText ? new TextEncoder().encode(data) : new Uint8Array(data);
  const hex = Array.from(bytes.subarray(0, 40), (byte) => byte.toString(16).padStart(2, "0")).join(" ");
  const words = [direction, isText ? "text  " : "binary", `${bytes.length} B`.padStart(8), time.padStart(8)];
  log.prepend(document.createElement("div"));
  log.firstChild.textContent = [...words, isText ? JSON.stringify(data.slice(0, 100)) : hex].join(" ");
  log.children[100]?.remove();
}
connection.onsubmit = () => {
  if (socket.readyState === WebSocket.CLOSED) return open();
  socket.close(code.value, reason.value);
  show();
};
message.onsubmit = () => transmit(text.value);
choose.onclick = () => file.click();
file.onchange = async () => {
  transmit(await file.files[0].arrayBuffer());
  file.value = ""; // or to choose the same file again would change nothing
};
open();
</script>
"""

if __name__ == "__main__":
    sys.exit(main())
