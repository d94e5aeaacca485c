"""A WebSocket echo server in one module: synchronous, a thread for each connection, no asyncio.

    python echoserver.py 1234                    # every text and binary message goes back to its sender

    with EchoServer(port=0) as server:           # in a program: a background thread, leaves nothing behind
        client = websocket.create_connection(server.url)

The module is built on the package websocket-server and supplies what that lacks. It reads from the top,
each chapter by itself, in the words of RFC 6455:

    The echo pattern       EchoServer: three callbacks and the list of clients
    The command line       main()
    The server             Server: the listening socket, its threads, the list of clients
    One connection         Connection: a thread's life from the opening to the closing handshake; TLS
    The opening handshake  bytes in, values out (section 4)
    Frames and messages    bytes in, values out (sections 5 and 7)
    Compression            permessage-deflate, bytes in, bytes out (RFC 7692)
    The page               what a browser shows at http://localhost:1234/

The first four chapters own sockets and threads and decide nothing about the protocol; the others decide
everything about it and touch no socket. One thread accepts; each connection's thread alone reads from it
and calls its callbacks; any thread may send. Two kinds of lock guard what they share: `Server._lock` the
registers of connections and clients, `Connection._send_lock` the order of frames on one wire. They are
taken in the order send lock, server lock.
"""
from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import email.utils
import errno
import functools
import hashlib
import http
import logging
import re
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import zlib
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

logger = logging.getLogger("echoserver")

# websocket-server calls logging.basicConfig() when it is imported; a root logger that already has a handler
# makes that do nothing, so the host program's logging stays as it was.
_placeholder = logging.NullHandler()
logging.getLogger().addHandler(_placeholder)
from websocket_server import WebsocketServer
logging.getLogger().removeHandler(_placeholder)

__version__ = "1.0.0"
__all__ = ["EchoServer"]

Client = Dict[str, Any]
Data = Union[bytes, bytearray]

# ==== The echo pattern =============================================================================================


class EchoServer:
    """Send every message back to the client that it came from.

    Three callbacks make a server; override any of them. Each is called in the thread of that client's own
    connection, so it may block, and what it sends is on its way when `send_message` returns. An exception
    in one is logged, and its client gets Close 1011.

    `client` is websocket-server's dictionary: 'id' (1, 2, 3 …), 'address' (host, port) and 'handler' (its
    Connection); and from its opening handshake 'path', 'headers' and 'subprotocol' (or None).

    `port` 0 takes a free one. `debug` shows what happens, through the logger "echoserver". The options are
    those of `Server`. Raises OSError when it cannot listen there, ValueError for an option out of range.
    """

    def __init__(self, port: int = 1234, debug: bool = False, host: str = "0.0.0.0", **options: Any) -> None:
        self.debug = debug
        self.server = Server(host, port, **options)
        self.server.set_fn_new_client(self.new_client)
        self.server.set_fn_message_received(self.message_received)
        self.server.set_fn_client_left(self.client_left)
        if debug:
            show_debug_output()
            logger.debug("Echoserver listening on port %d", self.port)

    def new_client(self, client: Client, server: Server) -> None:
        """The opening handshake is done; `client` is already in `clients`."""
        if self.debug:
            logger.debug("newConnection: client %d from %s port %d", client["id"], *client["address"])

    def message_received(self, client: Client, server: Server, message: Union[str, bytes]) -> None:
        """A whole message has come: text as str, binary as bytes."""
        if self.debug:
            kind = "Message" if isinstance(message, str) else "Binary Message"
            logger.debug("%s received: client %d: %s", kind, client["id"], shorten(message))
        server.send_message(client, message)

    def client_left(self, client: Client, server: Server) -> None:
        """The connection is over; `client` is no longer in `clients`. Called once for each `new_client`."""
        if self.debug:
            logger.debug("socketDisconnected: client %d", client["id"])

    def start(self) -> None:
        """Serve in a background thread."""
        self.server.start()

    def serve_forever(self) -> None:
        """Serve in this thread, until `close()` is called in another."""
        self.server.serve_forever()

    def close(self, code: int = 1001, reason: str = "") -> None:
        """Send Close to every client and stop. Returns when no thread of the server is left, after
        `close_timeout` seconds at the latest. May be called from any thread, and more than once."""
        self.server.close(code, reason)

    @property
    def clients(self) -> List[Client]:
        """The clients that are connected now, in order of arrival (a copy)."""
        return self.server.clients

    def __getattr__(self, name: str) -> Any:
        """Everything else is the server's: `port`, `url`, `closed`, `send_message_to_all()` …"""
        if name == "server":  # it could not be made
            raise AttributeError(name)
        return getattr(self.server, name)

    def __enter__(self) -> EchoServer:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def shorten(message: Union[str, bytes], limit: int = 80) -> str:
    """Return the message for a log line: escaped, its middle left out, with its size."""
    shown = repr(message if len(message) <= limit else message[:limit // 2])
    if len(message) > limit:
        shown += " … " + repr(message[-limit // 4:])
    return "%s (%d %s)" % (shown, len(message), "characters" if isinstance(message, str) else "bytes")


def show_debug_output() -> None:
    """Let the logger's debug lines through, to stderr where the host program has not set logging up."""
    logger.setLevel(logging.DEBUG)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())


# ==== The command line =============================================================================================


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Serve until SIGINT or SIGTERM; return the exit status. A second signal ends the process at once."""
    parser = command_line()
    options = vars(parser.parse_args(argv))
    certfile, keyfile = options.pop("certfile", None), options.pop("keyfile", None)
    raise_file_limit()
    try:
        if keyfile and not certfile:
            parser.error("--keyfile goes with --certfile")
        if certfile:
            options["ssl_context"] = tls_context(certfile, keyfile)
        server = EchoServer(**options).server
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.exit(1, "echoserver: error: %s\n" % (error.strerror or error))

    def stop(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        server.stop()

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    interval = sys.getswitchinterval()
    try:
        server.switch_interval = 50e-6
        print("Echo server listening on %s port %d: %s (Ctrl-C stops it)"
              % (server.host, server.port, server.url), flush=True)
        server.serve_forever()
    finally:
        sys.setswitchinterval(interval)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> Any:
        self.exit(2, "%s: error: %s (-h shows the options)\n" % (self.prog, message))


def command_line() -> CommandLine:
    """Describe the command line. What is given goes to `EchoServer` under its own name, and the rest has
    its defaults there."""
    parser = CommandLine(prog="echoserver", argument_default=argparse.SUPPRESS,
                         description="A WebSocket echo server: every message goes back to its sender.")
    option = parser.add_argument
    option("port", nargs="?", type=int, default=1234, help="port to listen on, 0 for a free one (default 1234)")
    option("--host", help="address to listen on (default 0.0.0.0; :: for IPv6 and IPv4)")
    option("-d", "--debug", action="store_true", help="show connections and messages, shortened")
    option("--max-size", type=int, metavar="BYTES", help="longest message taken (default 16 MiB)")
    option("--max-clients", type=int, metavar="N", help="connections at once (default 10000)")
    option("--open-timeout", type=float, metavar="S", help="seconds for the opening handshake (default 10)")
    option("--close-timeout", type=float, metavar="S", help="seconds for the closing handshake (default 10)")
    option("--ping-interval", type=float, metavar="S", help="seconds of silence before a Ping (default 20, 0: never)")
    option("--ping-timeout", type=float, metavar="S",
           help="seconds without an answer before the client is dropped (default 20, 0: never)")
    option("--origin", action="append", help="serve the pages of this origin only (may be given again)")
    option("--no-compression", dest="compression", action="store_false", help="decline permessage-deflate")
    option("--certfile", metavar="PEM", help="serve wss:// with this certificate chain")
    option("--keyfile", metavar="PEM", help="its private key, if that is in a file of its own")
    option("--reuse-port", action="store_true", help="let several processes share the port")
    option("--version", action="version", version="echoserver " + __version__)
    return parser


def tls_context(certfile: str, keyfile: Optional[str] = None) -> ssl.SSLContext:
    """Return a server's TLS context, TLS 1.2 or newer. Raises OSError for a file that will not do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    try:
        context.load_cert_chain(certfile, keyfile, password=lambda: "")  # never ask on the terminal
    except OSError as error:
        files = certfile if keyfile is None else "%s and %s" % (certfile, keyfile)
        raise OSError(errno.EINVAL, "cannot use the certificate in %s: %s; it takes a PEM certificate chain and its "
                      "private key, not encrypted" % (files, error.strerror or error)) from None
    return context


def raise_file_limit() -> None:
    """Let this process open as many files, and so hold as many clients, as the system allows."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, 10240):  # macOS refuses "unlimited" and takes this
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            break


# ==== The server: the listening socket, its threads, the list of clients ===========================================


class Server(WebsocketServer):
    """websocket-server's WebsocketServer with what it lacks: the whole protocol, limits, safety in threads.

    Options, with times in seconds:
      max_size        longest message taken, in bytes, decompressed (16 MiB); a longer one gets Close 1009
      max_clients     connections at once (10000), those in their opening handshake included; over it, 503
      open_timeout    for the whole opening handshake, TLS included (10)
      close_timeout   for the closing handshake, and for `close()` as a whole (10)
      ping_interval   silence after which a client is sent a Ping (20; 0: never)
      ping_timeout    further silence after which it is dropped (20; 0: never)
      origin          an origin, or several, whose pages are served (None: any); others get 403
      compression     whether permessage-deflate is negotiated (True)
      ssl_context     an ssl.SSLContext for a server: serve wss:// (None: ws://)
      reuse_port      let several processes share the port (False)
    """

    echoes = False  # the callback for messages only echoes, so it need not be called
    request_queue_size = 4096  # connections that wait to be accepted; a burst must not be refused
    allow_reuse_address = sys.platform != "win32"  # there it would let another program take the port over
    send_timeout = 20.0  # seconds in which a client must take some of what is sent to it; read when serving begins
    # Threads that wait for the interpreter ask for it at its switch interval, which is 5 ms. If thousands do, the
    # processor is busy with nothing else; so for each connection it grows by this many seconds, to 0.5 at most. It is
    # the whole process's, so that main() alone sets this.
    switch_interval = 0.0
    spare_threads = 100  # threads beyond max_clients: to answer 503, and for connections that are ending

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, max_size: int = 16 * 2**20,
                 max_clients: int = 10000, open_timeout: float = 10, close_timeout: float = 10,
                 ping_interval: float = 20, ping_timeout: float = 20, origin: Union[str, Iterable[str], None] = None,
                 compression: bool = True, ssl_context: Optional[ssl.SSLContext] = None,
                 reuse_port: bool = False) -> None:
        for name, value, low, high in (
                ("port", port, 0, 65535), ("max_size", max_size, 0, 2**62), ("max_clients", max_clients, 1, 10**6),
                ("open_timeout", open_timeout, 0.01, 10**6), ("close_timeout", close_timeout, 0.01, 10**6),
                ("ping_interval", ping_interval, 0, 10**6), ("ping_timeout", ping_timeout, 0, 10**6)):
            if not low <= value <= high:
                raise ValueError("%s must be from %g to %g, not %r" % (name, low, high, value))
        self.max_size, self.max_clients = max_size, max_clients
        self.open_timeout, self.close_timeout = open_timeout, close_timeout
        self.ping_interval, self.ping_timeout = ping_interval, ping_timeout
        self.origins = None if origin is None else [origin] if isinstance(origin, str) else list(origin)
        self.compression, self.ssl_context, self.reuse_port = compression, ssl_context, reuse_port
        if ssl_context and ssl_context.protocol == ssl.PROTOCOL_TLS_CLIENT:
            raise ValueError("ssl_context must be for a server, not for clients")
        self.tick = max(0.01, min(filter(None, (ping_interval, ping_timeout, close_timeout))))  # longest wait in recv

        self._lock = threading.RLock()  # guards the next four, and id_counter; reentrant for signal handlers
        self._connections: Dict[Connection, threading.Thread] = {}  # every connection that has a thread
        self._clients: Dict[int, Client] = {}  # those past the opening handshake, in order of arrival
        self._slots = 0  # connections that count towards max_clients
        self._closing = False  # close() was called
        self._stopping = False  # only ever becomes True: no new connections
        self._background: Optional[threading.Thread] = None  # what start() started
        self._accepting_ended = threading.Event()
        self._accepting_ended.set()
        self._last_complaint = float("-inf")  # belongs to the accepting thread
        self.inherited = b""  # the listening socket's SO_RCVTIMEO; set before it accepts
        self.latest: Optional[Connection] = None  # received something last; only a hint, so no lock guards it
        self.closed = threading.Event()
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
            super().__init__(str(address[0]), port, loglevel=logging.getLogger(WebsocketServer.__module__).level)
        except OSError as error:
            hints = {errno.EADDRINUSE: "choose another port or stop the program that has this one",
                     errno.EACCES: "choose a port from 1024 up"}
            hint = hints.get(error.errno or 0, "choose an address of this machine")
            raise OSError(error.errno, "cannot listen on %s port %d: %s; %s"
                          % (host, port, error.strerror or error, hint)) from None
        self.host = host

    def server_bind(self) -> None:
        """Bind the listening socket (socketserver calls this)."""
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
        return "%s://%s:%d" % ("wss" if self.ssl_context else "ws", "[%s]" % host if ":" in host else host, self.port)

    # Life: start, serve, close

    def start(self) -> None:
        """Serve in a background thread. Does nothing if that was started before."""
        with self._lock:
            if self._closing:
                raise RuntimeError("this server was closed; make a new one")
            if self._background is None:
                thread = threading.Thread(target=self.serve_forever, name="echoserver accept", daemon=True)
                thread.start()
                self._background = thread

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Accept connections and give each a thread, until the server is stopped; then close it."""
        with self._lock:  # either close() waits until this ends, or this does nothing
            if self._closing and threading.current_thread() is self._background:
                return
            if self._closing:
                raise RuntimeError("this server was closed; make a new one")
            self.thread = threading.current_thread()
            self._accepting_ended.clear()
        try:
            self.socket.settimeout(poll_interval or None)  # 0 would make the loop a busy one
            self.set_options(self.socket)  # what it accepts inherits them, which is quicker than to set them
            self.inherited = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)
            while not self._stopping:
                try:
                    self.process_request(*self.socket.accept())
                except (socket.timeout, BlockingIOError):
                    pass  # look whether to stop
                except Exception as error:  # out of files, of threads or of memory, most likely
                    if not self._stopping:
                        self._wait_for_room(error)
        finally:
            self._accepting_ended.set()
            self.close()

    def run_forever(self, threaded: bool = False) -> None:
        """Serve in this thread until interrupted, or in a background thread (websocket-server's name for it)."""
        with contextlib.suppress(KeyboardInterrupt):
            self.start() if threaded else self.serve_forever()

    def set_options(self, sock: socket.socket) -> None:
        """Set what a connection needs: its messages leave at once, and its waits are bounded."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_timeout(sock, socket.SO_SNDTIMEO, self.send_timeout)
        set_timeout(sock, socket.SO_RCVTIMEO, self.tick)

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        """Give a new connection a thread of its own (socketserver's name for it)."""
        connection = Connection(request, client_address, self)
        thread = threading.Thread(target=connection.run, name="echoserver connection", daemon=True)
        with self._lock:
            connection.has_slot = self._slots < self.max_clients
            admitted = not self._closing and len(self._connections) < self.max_clients + self.spare_threads
            if admitted:
                self._connections[connection] = thread
                self._slots += connection.has_slot
            if self.switch_interval:
                sys.setswitchinterval(min(max(0.005, len(self._connections) * self.switch_interval), 0.5))
        try:
            if admitted:
                thread.start()
            else:
                request.close()
        except (RuntimeError, MemoryError):
            self.leave(connection)
            self.forget(connection)
            request.close()
            raise

    def _wait_for_room(self, error: Exception) -> None:
        """Keep what there is, and neither spin nor fill the log, while the system has no room for more."""
        if time.monotonic() > self._last_complaint + 60:
            self._last_complaint = time.monotonic()
            logger.warning("no room for another connection: %s; %d stay, new ones wait", error, len(self._connections))
        time.sleep(0.05)

    def stop(self) -> None:
        """Accept no more connections; `serve_forever()` then closes the server. Safe in a signal handler."""
        self._stopping = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # on Linux this ends accept() at once, elsewhere its time does

    def close(self, code: int = 1001, reason: Union[str, bytes] = "") -> None:
        """Send Close to every client, wait for them, cut those that do not answer. Idempotent.

        Returns when no thread of the server is left but the calling one, and after `close_timeout` at the
        latest: an override that does not return cannot be ended. In a signal handler call `stop()` instead,
        since that may interrupt this very work. Raises ValueError for what a Close may not carry.
        """
        payload = close_payload(code, reason)
        end = time.monotonic() + self.close_timeout
        grace = end - self.close_timeout / 4  # the rest is for cutting off those who do not answer
        me = threading.current_thread()
        with self._lock:
            again, self._closing = self._closing, True
            inside = me is self._background or me in self._connections.values()
        if again and inside:  # another call waits for this thread, so it must not wait for others
            return
        self.stop()
        if me is not self.thread:
            self._accepting_ended.wait(self.close_timeout)
        self.server_close()
        with self._lock:
            connections = dict(self._connections)
        threads = {self._background, *connections.values()} - {me, None}
        for connection in connections:
            if not connection.client:  # still in its opening handshake
                self.cut(connection)
        busy = [c for c in connections if c.client and not c.close_within(0, payload)]
        for connection in busy:  # another thread is sending to it
            connection.close_within(max(0, grace - time.monotonic()), payload)
        join(threads, grace)
        for connection, thread in connections.items():
            if thread is not me:
                self.cut(connection)
        join(threads, end)
        stuck = sum(thread.is_alive() for thread in threads if thread)
        if stuck:
            logger.warning("closed, but %d threads have not ended", stuck)
        self.closed.set()

    # The registers

    @property
    def clients(self) -> List[Client]:
        """The clients that are connected now, in order of arrival (a copy)."""
        with self._lock:
            return list(self._clients.values())

    @clients.setter
    def clients(self, _: List[Client]) -> None:
        """websocket-server's constructor sets a list of its own here; the register takes its place."""

    def enter(self, connection: Connection, request: Request, subprotocol: Optional[str]) -> None:
        """Make a connection a client, unless new ones are denied."""
        with self._lock:
            if not self._closing and not self._deny_clients:
                self.id_counter += 1
                connection.client = self._clients[self.id_counter] = {
                    "id": self.id_counter, "handler": connection, "address": connection.client_address,
                    "path": request.path, "headers": request.headers, "subprotocol": subprotocol}

    def leave(self, connection: Connection) -> None:
        """Take a connection off the list of clients, and make room for the next. Idempotent."""
        with self._lock:
            self._slots -= connection.has_slot
            connection.has_slot = False
            if connection.client:
                self._clients.pop(connection.client["id"], None)

    def forget(self, connection: Connection) -> None:
        """A connection's thread is about to end; from now on nobody touches its socket but that thread."""
        with self._lock:
            self._connections.pop(connection, None)
            if self.latest is connection:
                self.latest = None

    def cut(self, connection: Connection) -> None:
        """End a connection's TCP connection both ways, if it has not ended. Wakes whoever waits in it."""
        with self._lock, contextlib.suppress(OSError):  # not after forget(): the number may be another's by then
            if connection in self._connections:
                connection.request.shutdown(socket.SHUT_RDWR)

    # The rest of websocket-server's interface works as it is, on these

    def set_fn_message_received(self, fn: Any) -> None:
        """Register the callback for messages."""
        super().set_fn_message_received(fn)
        # One that only echoes, and shows nothing, need not be called for each message: a connection may then
        # answer many in one write.
        self.echoes = getattr(fn, "__func__", None) is EchoServer.message_received and not fn.__self__.debug

    def send_message(self, client: Client, msg: Union[str, Data]) -> bool:
        """Send text (str) or binary (bytes), from any thread. Returns False if the client is gone.

        On return the message is with TCP; it waits while the client does not read, `send_timeout` at most.
        """
        sent: bool = client["handler"].send_message(msg)
        return sent

    def server_close(self) -> None:
        """Stop accepting connections, and close the listening socket."""
        self.stop()
        super().server_close()

    shutdown = close  # in socketserver it waits for ever when nothing is served yet, or in a callback
    _shutdown_gracefully = close

    def _deny_new_connections(self, status: int, reason: Union[str, bytes]) -> None:
        self._deny_clients = close_payload(status, reason)

    def _terminate_client_handler(self, handler: Connection) -> None:
        if not handler.closing:  # what was sent a Close is given the time to answer it
            handler.abort()


def join(threads: Iterable[Optional[threading.Thread]], until: float) -> None:
    """Wait for threads to end, but not past the time `until`."""
    for thread in threads:
        remaining = until - time.monotonic()
        if thread and thread.is_alive() and remaining > 0:
            thread.join(remaining)


# ==== One connection ===============================================================================================


class Connection:
    """One connection, and the life of its thread: setup, handle, finish. It is a client's 'handler'.

    Its own thread alone reads from it. `send_…()` and `abort()` may be called in any thread; a `send_…()`
    returns True when its bytes are with TCP, and False, sending nothing, when the connection is closing or
    gone. It waits while the client does not read, `Server.send_timeout` at most: then the client is cut.
    """

    client: Optional[Client] = None  # set before the 101 is sent
    compression: Optional[PerMessageDeflate] = None
    has_slot = False  # counts towards max_clients; guarded by the server's lock
    _method = ""  # of its request
    _announced = False  # new_client was called, so client_left will be
    closing = False  # a Close was sent, or the connection broke: nothing more is; guarded by _send_lock
    _fragmenting = False  # a fragmented message is on its way out; guarded by _send_lock
    _close_deadline = 0.0  # when to stop waiting for the peer's Close, once ours was sent
    _linger = float("inf")  # seconds for which the client may go on sending after our end; close_timeout at most
    _alone = 0  # messages in a row with no other client's among them, and no vain look
    _looks = 64 if hasattr(socket, "MSG_DONTWAIT") else 0  # for the next bytes; each takes 1 or 2 µs
    _room = 479  # bytes to receive at once: as many as Python allocates in its own pools; more when they were filled

    def __init__(self, request: socket.socket, client_address: Any, server: Server) -> None:
        self.request, self.client_address, self.server = request, (client_address or ("", 0))[:2], server
        self.stream: Union[socket.socket, TLSStream] = request
        self._longest_wait = server.tick  # in recv(), as the socket has it
        self._send_lock = threading.RLock()  # held for a frame, or a whole fragmented message, on the wire

    def run(self) -> None:
        """Live the connection's life, in its own thread."""
        try:
            early = self.setup()
            if self.client:
                self.handle(early)
        except HTTPAnswer as answer:  # the request was for something else, or cannot be granted
            self.server.leave(self)
            with self._send_lock:
                self.closing = self._write(answer.head + answer.content * (self._method != "HEAD"))
        except ProtocolError as error:  # section 7.1.7: fail the WebSocket connection
            self._fail(*error.args)
        except BaseException:  # sys.exit() too
            logger.exception("client %s gets Close 1011, since an override raised:", self.client and self.client["id"])
            self._fail(1011, "internal error")
        finally:
            self.finish()

    # Setup: section 4.2

    def setup(self) -> bytes:
        """Take the opening handshake; return the bytes that came behind it. `client` is set if it succeeds."""
        server = self.server
        try:
            self.request.settimeout(None)  # whatever the host program's default is
            if self.request.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) != server.inherited:
                server.set_options(self.request)  # a system on which sockets do not inherit them
            request, early = self._read_request(time.monotonic() + server.open_timeout)
            self._wait_at_most(server.tick)
        except OSError:  # gone, or no TLS: there is nobody to answer
            return b""
        self._method = request.method
        if not self.has_slot:
            raise HTTPAnswer(503, "This server has all the clients that it takes.", "Retry-After: 5")
        response, subprotocol, self.compression = accept(request, server.origins, server.compression)
        with self._send_lock:  # nobody's message may overtake the response
            server.enter(self, request, subprotocol)
            sent = self._write(response)
            if not self.client:
                self.close_within(-1, server._deny_clients or close_payload(1001, ""))
            elif not sent:
                server.leave(self)
                self.client = None
        return early

    def _read_request(self, deadline: float) -> Tuple[Request, bytes]:
        """Read a request, all of it before the deadline, in clear text or TLS."""
        receive: Callable[[int], bytes] = functools.partial(self._receive_by, deadline)
        if self.server.ssl_context:
            self.stream = tls = TLSStream(self.request, self.server.ssl_context, receive)
            self._looks = 0  # what comes is ciphertext
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
        if isinstance(self.stream, TLSStream):
            self.stream.receive = self._receive_ciphertext
        return parsed

    def _receive_by(self, deadline: float, size: int) -> bytes:
        """Receive some bytes before the time `deadline`. Raises TimeoutError, or another OSError."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._wait_at_most(remaining)
        try:
            return self.request.recv(size)
        except BlockingIOError:
            raise TimeoutError from None

    def _wait_at_most(self, seconds: float) -> None:
        """Bound each wait in recv(), unless it is bounded so already (to a few milliseconds). Raises OSError."""
        if not seconds <= self._longest_wait < seconds + 0.005:
            set_timeout(self.request, socket.SO_RCVTIMEO, seconds)
            self._longest_wait = seconds

    # Handle: sections 5 to 7

    def handle(self, data: bytes) -> None:
        """Take what the client sends until the connection is over; `data` is what came already."""
        server, receiver = self.server, Receiver(self.server.max_size, self.compression)
        self._announced = True
        server.new_client(self.client, server)
        data = data or self._receive()
        while data:
            used = 0
            if receiver.between_messages:
                frames, used = whole_frames(data, server.max_size)
                if not server.echoes:
                    for header, payload in zip(frames[::2], frames[1::2]):
                        self._take(header[0] & 0x0F, [payload])
                elif frames:
                    with self._send_lock:
                        if not self.closing:
                            self._write(b"".join(frames))
            for opcode, pieces in receiver.feed(data[used:]) if used < len(data) else ():
                if opcode == CLOSE:
                    server.leave(self)  # before the answer: a client that has it is on no list any more
                    self._linger = 0 if self.closing else 1
                    self.close_within(-1, bytes(pieces[0]))
                    return
                self._take(opcode, pieces)
            data = self._receive()

    def _take(self, opcode: int, pieces: Sequence[Data]) -> None:
        """Take a whole message, a Ping or a Pong. What comes after our Close is ignored."""
        server = self.server
        if self.closing or opcode == PONG:
            return
        if opcode == PING:
            self.send_frame(PONG, pieces[0])
        elif server.echoes:
            self._send_data(opcode, pieces)
        else:
            payload = b"".join(pieces)
            server.message_received(self.client, server, payload.decode() if opcode == TEXT else payload)

    def _receive(self) -> bytes:
        """Return what the client sent next, b"" when there is nothing to wait for any more."""
        server, data = self.server, b""
        if self.closing and time.monotonic() > self._close_deadline:
            return b""
        try:
            if server.latest is self:
                data = self._look()
            else:
                server.latest, self._alone = self, 0
            data = data or self.stream.recv(self._room)
        except (BlockingIOError, TimeoutError):
            return self._receive_after_silence()
        except OSError:
            return b""
        if len(data) == self._room:
            self._room = min(4 * self._room, MOST)
        return data

    def _look(self) -> bytes:
        """Return the next bytes if they come very soon, else b"": to look a few times for them is quicker than
        to fall asleep and be woken.

        Only after a run of messages with no other client's among them, since others would have to wait for the
        processor meanwhile; and after looking in vain, not before another such run.
        """
        if self._alone < 32:
            self._alone += 1
            return b""
        for _ in range(self._looks):
            try:
                return self.request.recv(self._room, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
        self._alone = 0
        return b""

    def _receive_ciphertext(self, size: int) -> bytes:
        """Receive from the socket for TLS. That may make no plaintext of it and ask again, so time is checked here
        as in `_receive`."""
        return b"" if self.closing and time.monotonic() > self._close_deadline else self.request.recv(size)

    def _receive_after_silence(self) -> bytes:
        """Wait on, after one tick in vain: send a Ping (section 5.5.2), and give up when it is time."""
        server, now, pinged = self.server, time.monotonic(), False
        due = now - server.tick + (server.ping_interval or float("inf"))  # when the next step is
        self._room = Connection._room
        try:
            while True:
                due = self._close_deadline if self.closing else due
                if now >= due and self.closing:
                    return b""
                if now >= due and pinged:
                    self._fail(1011, "no answer to a Ping")
                    return b""
                if now >= due:
                    self.send_ping()
                    pinged = server.ping_timeout > 0
                    due = now + (server.ping_timeout or server.ping_interval)
                self._wait_at_most(min(due - now, server.tick))
                try:
                    return self.stream.recv(self._room)
                except (BlockingIOError, TimeoutError):
                    now = time.monotonic()
        except OSError:
            return b""
        finally:
            with contextlib.suppress(OSError):
                self._wait_at_most(server.tick)

    # Finish: section 7

    def _fail(self, code: int, reason: str) -> None:
        """Fail the WebSocket connection (section 7.1.7)."""
        self.server.leave(self)
        if self.client:
            self.close_within(-1, close_payload(code, reason))

    def finish(self) -> None:
        """End the connection: our half first, then, when the client has ended its own, the rest.

        A socket that is closed with bytes unread sends a reset, which may destroy the Close or the answer
        on its way; so what still comes is read, and thrown away, until the client ends or time is up. That is
        soon where the client has sent a Close, after which it sends nothing, and at once where that was the
        answer to ours.
        """
        server = self.server
        server.leave(self)
        with contextlib.suppress(OSError):
            if self.closing:
                self.stream.shutdown(socket.SHUT_WR)
            else:
                self.request.shutdown(socket.SHUT_RDWR)  # wakes any thread that is sending
        try:
            if self.client and self._announced:
                server.client_left(self.client, server)
        except BaseException:
            logger.exception("client_left raised, after client %s had left:", self.client and self.client["id"])
        finally:
            with contextlib.suppress(OSError):
                deadline = time.monotonic() + min(self._linger, server.close_timeout)
                while self._receive_by(deadline, LONG):
                    pass
            self.abort()
            if self._send_lock.acquire(timeout=server.close_timeout):  # nobody is sending any more
                self._send_lock.release()
            self.compression = None  # its streams need not wait for the garbage collector
            server.forget(self)
            self.request.close()

    def close_within(self, patience: float, payload: bytes) -> bool:
        """Start the closing handshake, unless it was (section 7.1.2). Returns False if another thread was
        sending for all of `patience` seconds (-1: `close_timeout`, and wait for the client to read)."""
        if not self._send_lock.acquire(timeout=self.server.close_timeout if patience < 0 else patience):
            return False
        try:
            if not self.closing:
                self._close_deadline = time.monotonic() + self.server.close_timeout
                self.closing = True
                if patience >= 0:
                    with contextlib.suppress(OSError):
                        set_timeout(self.request, socket.SO_SNDTIMEO, 0)
                self._write(frame(CLOSE, payload))
        finally:
            self._send_lock.release()
        return True

    def abort(self, last_words: bytes = b"") -> None:
        """Cut the TCP connection without a Close, after sending some bytes as they are."""
        if last_words:
            with self._send_lock:
                if not self.closing:
                    self._write(last_words)
        self.closing = True  # without the lock, which someone may hold who waits for the client to read
        self.server.cut(self)

    # Send

    def send_message(self, message: Union[str, Data]) -> bool:
        """Send text (str) or binary (bytes)."""
        if isinstance(message, str):
            return self._send_data(TEXT, [message.encode()])
        if isinstance(message, (bytes, bytearray, memoryview)):
            return self._send_data(BINARY, [bytes(message)])
        raise TypeError("a message is str or bytes, not %s" % type(message).__name__)

    def send_fragments(self, pieces: Iterable[Union[str, bytes]]) -> bool:
        """Send one message in fragments (section 5.4), each as soon as `pieces` yields it, all str or all
        bytes. Meanwhile other threads wait, and `pieces` itself may send Pings and nothing else."""
        with self._send_lock:
            self._check_no_fragments()
            self._fragmenting, opcode, kind = True, CONTINUATION, None
            try:
                for piece in pieces:
                    if kind is None:
                        kind, opcode = type(piece), TEXT if isinstance(piece, str) else BINARY
                    elif type(piece) is not kind:
                        raise TypeError("the fragments of a message are all str or all bytes")
                    self.send_frame(opcode, piece.encode() if isinstance(piece, str) else piece, fin=False)
                    opcode = CONTINUATION
            except BaseException:  # the message cannot be ended, and no other be sent
                self.close_within(-1, close_payload(1011, "internal error"))
                raise
            finally:
                self._fragmenting = False
            return self.send_frame(opcode, b"") if kind else self.send_message(b"")

    def send_ping(self, payload: bytes = b"") -> bool:
        """Send a Ping (section 5.5.2)."""
        return self.send_frame(PING, payload)

    def send_close(self, status: int = 1000, reason: Union[str, bytes] = b"") -> bool:
        """Start the closing handshake (section 7.1.2). Raises ValueError for what a Close may not carry."""
        payload = close_payload(status, reason)
        return not self.closing and self.close_within(-1, payload)

    def send_frame(self, opcode: int, payload: Data, fin: bool = True) -> bool:
        """Send one frame just as it is told: nothing checks that it makes sense at this place."""
        with self._send_lock:
            return not self.closing and self._write(frame(opcode, payload, fin))

    def _send_data(self, opcode: int, pieces: Sequence[Data]) -> bool:
        """Send one message, in one frame."""
        with self._send_lock:
            self._check_no_fragments()
            if self.closing:
                return False
            compress = self.compression is not None and self.compression.used
            if self.compression and compress:
                pieces = [self.compression.deflate(b"".join(pieces))]
            size = sum(map(len, pieces))
            header = frame_header(opcode, size, rsv1=compress)
            if size <= LONG:
                return self._write(b"".join([header, *pieces]))
            return all(map(self._write, (header, *pieces)))  # spares a copy

    def _check_no_fragments(self) -> None:
        if self._fragmenting:  # by this thread, since it holds the lock
            raise RuntimeError("a message cannot be sent between the fragments of another (section 5.4)")

    def _write(self, data: Data) -> bool:
        """Hand bytes to TCP; _send_lock is held. After a failure the connection is of no more use, since a
        part of a frame may be out."""
        try:
            self.stream.sendall(data)
        except OSError:
            self.closing = True
            self.server.cut(self)
            return False
        return True


def set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """Bound each wait of a blocking socket: SO_RCVTIMEO of recv(), SO_SNDTIMEO of a send without progress.

    The kernel keeps the time, where settimeout() would cost a poll() for every recv() and send().
    """
    milliseconds = max(1, int(seconds * 1000))
    layout = "qq" if option in (66, 67) else "ll"  # a struct timeval; these numbers have it with 64 bits everywhere
    value = milliseconds if sys.platform == "win32" else struct.pack(layout, *divmod(milliseconds * 1000, 10**6))
    sock.setsockopt(socket.SOL_SOCKET, option, value)


class TLSStream:
    """TLS over a connected socket, with the methods of a socket that a Connection uses.

    `_tls_lock` guards the TLS object, and is never held in a wait; `_wire_lock` keeps in order on the wire what
    that makes. They are taken in the order wire lock, TLS lock.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, receive: Callable[[int], bytes]) -> None:
        self.receive = receive  # where the ciphertext comes from
        self._sock = sock
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
            with self._tls_lock:
                self._incoming.write(ciphertext) if ciphertext else self._incoming.write_eof()

    def sendall(self, data: Data) -> None:
        """Send plaintext, behind whatever else the TLS object has to send. Raises OSError."""
        plaintext = memoryview(data)
        with self._wire_lock:
            for at in range(0, len(data) or 1, LONG):
                with self._tls_lock:
                    if data:
                        self._tls.write(plaintext[at:at + LONG])
                    ciphertext = self._outgoing.read()
                self._sock.sendall(ciphertext)

    def shutdown(self, how: int) -> None:
        """Send close_notify, then end the TCP connection in this direction. Raises OSError."""
        with contextlib.suppress(ssl.SSLError), self._tls_lock:
            self._tls.unwrap()  # raises, since it would like to wait for the peer's
        self.sendall(b"")
        self._sock.shutdown(how)


# ==== The opening handshake: bytes in, values out (RFC 6455 section 4.2, RFC 9110, RFC 9112) =======================

MAX_HEAD = 16 * 1024  # bytes of a request's header
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # section 1.3
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# In origin-form or absolute-form (RFC 9112 section 3.2), with no fragment
REQUEST_LINE = re.compile(
    r"(%s) (?:/|[A-Za-z][A-Za-z0-9+.-]*://[!$-.0->@-~]+(?:/|(?=[? ])))([!-\"$-~]*) HTTP/(1\.[0-9])" % TOKEN)
FIELD_LINE = re.compile(r"(%s):([\t -~\x80-\xff]*)" % TOKEN)
HOST = re.compile(r"(\[[0-9A-Za-z:.]+\]|[0-9A-Za-z._~!$&'()*+;=%-]*)(:[0-9]*)?")
UPGRADE = ("Upgrade: websocket", "Connection: Upgrade")


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
    """A request's header fields by lower-case name; they may be looked up in any case. A field that came more
    than once has its values joined by commas (RFC 9110 section 5.3)."""

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())

    def get(self, name: str, default: Any = None) -> Any:
        """Return the field's value, or `default`."""
        return super().get(name.lower(), default)

    def tokens(self, name: str, normal: Callable[[str], str] = str) -> List[str]:
        """Return the items of a field that is a list, each put in its normal form (RFC 9110 section 5.6.1)."""
        value = self.get(name, "")
        if '"' in value:
            value = re.sub('"[^"]*"', lambda quoted: quoted[0].replace(",", " "), value)
        return [normal(item.strip(" \t")) for item in value.split(",") if item.strip(" \t")]


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
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[:end]
    if len(head) > MAX_HEAD:
        raise HTTPAnswer(431, "The request's header is longer than %d bytes." % MAX_HEAD)
    if not data[:1].isalpha() or head.count(b"\n") > head.count(b"\r\n"):
        raise HTTPAnswer(400, "This is no HTTP request.")
    if end < 0:
        return None
    line, *lines = head.decode("latin-1").split("\r\n")
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise HTTPAnswer(400, "The request line is malformed.")
    fields: Dict[str, str] = {}
    for line in lines:
        field = FIELD_LINE.fullmatch(line)
        if not field:
            raise HTTPAnswer(400, "A header field is malformed.")
        name, value = field[1].lower(), field[2].strip(" \t")
        fields[name] = fields[name] + ", " + value if name in fields else value
    return Request(match[1], "/" + match[2], match[3], Headers(fields)), data[end + 4:]


def accept(request: Request, origins: Optional[Sequence[str]], compression: bool
           ) -> Tuple[bytes, Optional[str], Optional[PerMessageDeflate]]:
    """Return the answer 101 to an opening handshake, the subprotocol and the extension that it agrees on.

    Raises HTTPAnswer where the request is for the page or does not meet section 4.2.1.
    """
    headers = request.headers
    subprotocols = headers.tokens("sec-websocket-protocol")
    key, origin = headers.get("sec-websocket-key", ""), headers.get("origin")
    if request.method not in ("GET", "HEAD"):
        raise HTTPAnswer(405, "The method must be GET, not %s." % request.method, "Allow: GET, HEAD")
    if not HOST.fullmatch(headers.get("host", "" if request.version == "1.0" else ",")):
        raise HTTPAnswer(400, "There must be one Host field, and it must be valid.")
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        raise HTTPAnswer(400, "The request must have no body.")
    if request.method == "HEAD" or "websocket" not in headers.tokens("upgrade", str.lower):
        if request.path.split("?")[0] == "/":
            raise HTTPAnswer(200, PAGE, *PAGE_FIELDS, kind="text/html")
        raise HTTPAnswer(426, "This is a WebSocket server; its page is at /.", *UPGRADE)
    if request.version == "1.0" or "upgrade" not in headers.tokens("connection", str.lower):
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
    digest = hashlib.sha1(key.encode() + GUID).digest()
    extension, agreed = negotiate(headers.tokens("sec-websocket-extensions")) if compression else (None, "")
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
LONG = 64 * 1024  # bytes that are sent as one
MOST = 127 * 1024  # bytes to receive at once: a frame of 64 KiB fits, and malloc() does not yet map memory anew

# Status codes that a Close may carry (section 7.4 and the IANA registry). 1004 is reserved; 1005, 1006 and
# 1015 stand for what happened without a Close; 1016 to 2999 are not assigned.
STATUS_CODES = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}


class ProtocolError(Exception):
    """The connection must be failed, with this status code and reason (section 7.1.7)."""


def frame_header(opcode: int, size: int, fin: bool = True, rsv1: bool = False) -> bytes:
    """Return the header of a frame to a client: never masked, its length in the fewest bytes (section 5.2)."""
    first = opcode | FIN * fin | RSV1 * rsv1
    if size < 126:
        return struct.pack("!BB", first, size)
    if size < 2**16:
        return struct.pack("!BBH", first, 126, size)
    return struct.pack("!BBQ", first, 127, size)


def frame(opcode: int, payload: Data, fin: bool = True) -> bytes:
    """Return a whole frame to a client. Raises ValueError for a control frame that is too long (section 5.5)."""
    if opcode & 0x8 and len(payload) > 125:
        raise ValueError("a control frame takes 125 bytes, not %d" % len(payload))
    return frame_header(opcode, len(payload), fin) + payload


def close_payload(code: int, reason: Union[str, bytes]) -> bytes:
    """Return what a Close carries (section 5.5.1). Raises ValueError for what it may not."""
    text = reason if isinstance(reason, bytes) else reason.encode()
    if code not in STATUS_CODES:
        raise ValueError("a Close may not carry the status code %r (section 7.4)" % code)
    if len(text) > 123:
        raise ValueError("the reason of a Close takes 123 bytes, not %d" % len(text))
    text.decode()
    return struct.pack("!H", code) + text


@functools.lru_cache(maxsize=256)
def xor_table(byte: int) -> bytes:
    """Return the table that XORs with `byte`, for bytes.translate()."""
    return bytes(byte ^ other for other in range(256))


@functools.lru_cache(maxsize=1)
def numpy() -> Any:
    """Return NumPy if the host program has it, else None. It is imported when the first long payload comes."""
    try:
        import numpy as module
        return module
    except Exception:  # whatever is wrong with it, this works without
        return None


def unmask(data: Union[Data, memoryview], key: bytes) -> Data:
    """XOR data with the masking key, over and over (section 5.3)."""
    size = len(data)
    if size < 256:  # as one large number
        mask = (key * (size // 4 + 1))[:size]
        return (int.from_bytes(data, "big") ^ int.from_bytes(mask, "big")).to_bytes(size, "big")
    out = bytearray(data)
    np = numpy() if size >= 8192 else None
    if np:
        words = np.ndarray(size // 4, np.uint32, out)
        words ^= np.ndarray((), np.uint32, key)
        for i in range(size - size % 4, size):
            out[i] ^= key[i % 4]
    else:
        for i in range(4):  # each byte of the key has every fourth byte of the data to itself
            out[i::4] = out[i::4].translate(xor_table(key[i]))
    return out


# What is known of a whole message in one frame by the frame's first two bytes. First the size, the header of
# the same message to a client, and whether it is text; then, to unmask it in one step with its masking key, a
# factor that repeats the key from the key's own place on, and how many bits of that are too many.
SHORT_FRAMES = {
    bytes((FIN | opcode, MASKED | size)):
        (size, bytes((FIN | opcode, size)), opcode == TEXT,
         int.from_bytes(b"\0\0\0\1" * ((size + 7) // 4), "big"), -size % 4 * 8)
    for opcode in (TEXT, BINARY) for size in range(126)}
# For the others the header to a client as far as it is known, whether it is text, the place where the length
# ends, and the least that it may be.
LONG_FRAMES = {
    bytes((FIN | opcode, MASKED | length)): (bytes((FIN | opcode, length)), opcode == TEXT, ends, least)
    for opcode in (TEXT, BINARY) for length, ends, least in ((126, 4, 126), (127, 10, 2**16))}


def whole_frames(data: bytes, max_size: int) -> Tuple[List[Data], int]:
    """Take the whole messages, in one frame each, that `data` begins with: the fast path for what `Receiver`
    does in full.

    Returns [header, payload, header, payload …], ready to send to a client, and how many bytes they took.
    Stops in front of whatever is incomplete, too long, in fragments, compressed, a control frame or wrong.
    """
    frames: List[Data] = []
    at, end, known, number = 0, len(data), SHORT_FRAMES.get, int.from_bytes
    payload: Data
    while True:
        short = known(data[at:at + 2])
        if short:
            size, header, text, repeat, excess = short
            after = at + 6 + size
            if after > end or size > max_size:
                return frames, at
            masked = number(data[at + 2:after], "big")  # the masking key in front, which the XOR clears
            payload = (masked ^ (masked >> 8 * size) * repeat >> excess).to_bytes(size, "big")
        else:
            long = LONG_FRAMES.get(data[at:at + 2])
            if long is None:
                return frames, at
            header, text, ends, least = long
            length = data[at + 2:at + ends]
            size = number(length, "big")
            after = at + ends + 4 + size
            if after > end or not least <= size <= max_size:
                return frames, at
            header += length
            payload = unmask(memoryview(data)[after - size:after], data[at + ends:at + ends + 4])
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


class Receiver:
    """Makes whole messages and control frames of the bytes that a client sends."""

    def __init__(self, max_size: int, compression: Optional[PerMessageDeflate] = None) -> None:
        self.between_messages = True  # the next byte begins a frame, and no message is under way
        self._max_size, self._compression = max_size, compression
        self._held = b""  # the beginning of a frame's header, or of a control frame
        # the frame under way
        self._fin, self._frame_opcode, self._left, self._key = True, CONTINUATION, 0, b""
        # the message under way; CONTINUATION stands for none
        self._opcode, self._compressed, self._size = CONTINUATION, False, 0
        self._pieces: List[bytearray] = []
        self._rest = b""  # the beginning of a character

    def feed(self, data: bytes) -> Iterator[Tuple[int, List[Data]]]:
        """Yield (opcode, payload in pieces) of each message and control frame that these bytes complete.

        Each is checked as far as it has come. Raises ProtocolError at the first fault, after yielding what
        came before it.
        """
        data, self._held, at = self._held + data, b"", 0
        while True:
            if not self._left:
                begin = self._begin_frame(data, at)
                if not begin:
                    self._held = data[at:]
                    break
                at = begin
            chunk = unmask(data[at:at + self._left], self._key)
            at += len(chunk)
            self._left -= len(chunk)
            turn = len(chunk) % 4
            self._key = self._key[turn:] + self._key[:turn]
            if self._frame_opcode & 0x8:
                if self._frame_opcode == CLOSE:
                    self._check_close(bytes(chunk))
                yield self._frame_opcode, [chunk]
                continue
            self._extend(chunk)
            if self._left:
                break
            if self._fin:
                yield self._end_message()
        self.between_messages = not (self._left or self._held or self._opcode)

    def _begin_frame(self, data: bytes, at: int) -> int:
        """Take the frame header at data[at:]; return where its payload begins, 0 if the header is incomplete."""
        if len(data) < at + 2:
            return 0
        fin, rsv1, opcode = bool(data[at] & FIN), bool(data[at] & RSV1), data[at] & 0x0F
        masked, size = data[at + 1] & MASKED, data[at + 1] & 0x7F
        compressed = rsv1 if opcode else self._compressed
        if not masked:
            raise ProtocolError(1002, "a frame that is not masked (section 5.1)")
        if data[at] & (RSV2 | RSV3) or (rsv1 and not (self._compression and opcode in (TEXT, BINARY))):
            raise ProtocolError(1002, "a reserved bit (section 5.2)")
        if opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise ProtocolError(1002, "a reserved opcode (section 5.2)")
        if opcode & 0x8 and (size > 125 or not fin):
            raise ProtocolError(1002, "a control frame that is long or in fragments (section 5.5)")
        if opcode == CONTINUATION and not self._opcode:
            raise ProtocolError(1002, "a continuation of nothing (section 5.4)")
        if opcode in (TEXT, BINARY) and self._opcode:
            raise ProtocolError(1002, "a new message inside another (section 5.4)")
        at += 2
        if size > 125:
            width, least = (2, 126) if size == 126 else (8, 2**16)
            if len(data) < at + width:
                return 0
            size = int.from_bytes(data[at:at + width], "big")
            at += width
            if not least <= size < 2**63:
                raise ProtocolError(1002, "a length that is not in the fewest bytes (section 5.2)")
        if not opcode & 0x8 and not compressed and self._size + size > self._max_size:
            raise ProtocolError(1009, "a message longer than %d bytes" % self._max_size)
        if len(data) < at + 4 + size * (opcode >> 3):  # a control frame is taken as a whole
            return 0
        self._fin, self._frame_opcode, self._left, self._key = fin, opcode, size, data[at:at + 4]
        if opcode in (TEXT, BINARY):
            self._opcode, self._compressed = opcode, compressed
        return at + 4

    def _extend(self, chunk: Data) -> None:
        """Add a part of a frame's payload to the message under way."""
        if self._compressed and self._compression:
            chunk = self._compression.inflate(chunk, self._max_size - self._size)
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
            self._extend(END_OF_MESSAGE)
            self._compression.end_of_message()
        if self._opcode == TEXT:
            self._check_text(b"", final=True)
        opcode, pieces = self._opcode, self._pieces
        self._opcode, self._size, self._pieces = CONTINUATION, 0, []
        return opcode, [*pieces]

    def _check_text(self, chunk: Data, final: bool = False) -> None:
        """Check that text is UTF-8 as far as it has come (section 8.1)."""
        if self._rest or not chunk.isascii():
            data = self._rest + chunk
            try:
                self._rest = data[codecs.utf_8_decode(data, "strict", final)[1]:]
            except UnicodeDecodeError:
                self._rest = b"\xed\xa0"
            if b"\xed\xa0" <= self._rest < b"\xee":  # half a surrogate, which Python would wait for the end of
                raise ProtocolError(1007, "text that is not UTF-8 (section 8.1)") from None

    @staticmethod
    def _check_close(payload: bytes) -> None:
        """Check what a Close carries (sections 5.5.1 and 7.4)."""
        if payload and (len(payload) == 1 or int.from_bytes(payload[:2], "big") not in STATUS_CODES):
            raise ProtocolError(1002, "a Close without a status code that may be sent (section 7.4)")
        try:
            payload[2:].decode()
        except UnicodeDecodeError:
            raise ProtocolError(1007, "a reason that is not UTF-8 (section 5.5.1)") from None


# ==== Compression: permessage-deflate, bytes in, bytes out (RFC 7692) ==============================================

END_OF_MESSAGE = b"\0\0\xff\xff"  # is left out of each message (sections 7.2.1 and 7.2.2)


# A parameter of an offer: one that stands alone, or one with a value, which may be quoted
PARAMETER = re.compile("(server_no_context_takeover|client_no_context_takeover|client_max_window_bits)"
                       '|(server_max_window_bits|client_max_window_bits)[ \t]*=[ \t]*("?)([89]|1[0-5])\\3')


def negotiate(offers: Iterable[str]) -> Tuple[Optional[PerMessageDeflate], str]:
    """Take the first offer of permessage-deflate that can be taken; return it and the answer (section 7.1).

    An offer that is malformed, or has an unknown parameter, a bad value or a parameter twice, is declined.
    """
    for offer in offers:
        name, *items = [item.strip(" \t") for item in offer.split(";")]
        found = [PARAMETER.fullmatch(item) for item in items]
        parameters = {match[1] or match[2]: match[4] for match in found if match}
        if name == "permessage-deflate" and len(parameters) == len(items):
            if parameters.get("client_max_window_bits", "") is None:  # only says that the answer may set it
                del parameters["client_max_window_bits"]
            answer = [name, *(key if value is None else key + "=" + value for key, value in parameters.items())]
            return PerMessageDeflate(int(parameters.get("server_max_window_bits", 15)),
                                     int(parameters.get("client_max_window_bits", 15)),
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
        # No more than 12, and little memory: 32 KiB a client, not 256. zlib cannot do 8, but with 9 it looks
        # back 250 bytes at the most, which a window of 8 bits holds.
        self._server_bits, self._client_bits = max(9, min(server_bits, 12)), client_bits
        self._server_forgets, self._client_forgets = server_forgets, client_forgets  # no context takeover
        self._inflater: Optional[zlib._Decompress] = None
        self._deflater: Optional[zlib._Compress] = None

    def inflate(self, data: Data, room: int) -> bytearray:
        """Return what some of a message inflates to. Raises ProtocolError 1009 when that is more than `room`
        bytes, without making more of them, and 1007 for a broken stream."""
        self.used = True
        if self._inflater is None:
            self._inflater = zlib.decompressobj(-self._client_bits)
        try:
            inflated = bytearray(self._inflater.decompress(data, room + 1))
            while self._inflater.eof and len(inflated) <= room:  # after a block with BFINAL a new stream begins
                data, self._inflater = self._inflater.unused_data, zlib.decompressobj(-self._client_bits)
                inflated += self._inflater.decompress(data, room + 1 - len(inflated))
        except zlib.error:
            raise ProtocolError(1007, "a message that does not inflate (RFC 7692 section 7.2.2)") from None
        if len(inflated) > room:
            raise ProtocolError(1009, "a message that inflates to too many bytes")
        return inflated

    def end_of_message(self) -> None:
        """Check that the stream is between two blocks; forget what must not be carried over to the next message."""
        assert self._inflater
        probe = self._inflater.copy()
        with contextlib.suppress(zlib.error):
            probe.decompress(b"\3\0")  # an empty last block
        if not probe.eof:
            raise ProtocolError(1007, "a message that does not inflate (RFC 7692 section 7.2.2)")
        if self._client_forgets:
            self._inflater = None

    def deflate(self, payload: bytes) -> bytes:
        """Return a whole message, compressed."""
        if self._deflater is None:
            self._deflater = zlib.compressobj(zlib.Z_BEST_SPEED, zlib.DEFLATED, -self._server_bits, 5)
        data = self._deflater.compress(payload) + self._deflater.flush(zlib.Z_SYNC_FLUSH)
        if self._server_forgets:
            self._deflater = None
        return data[:-len(END_OF_MESSAGE)] or b"\0"  # of nothing twice in a row, zlib makes nothing


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
form, section { display: flex; flex-wrap: wrap; align-items: end; gap: .75rem; margin-top: 1rem; padding: 1.25rem;
  background: var(--card); border-radius: .75rem }
input, button { min-height: 2.75rem; padding: .25rem .875rem; border: 1px solid var(--edge); border-radius: .5rem;
  background: var(--card); color: var(--ink); font-size: 1rem }
button { flex: 1 0 auto } #send, #run { background: var(--accent); border-color: var(--accent); color: var(--card) }
:disabled { opacity: .5 } :focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
h1, #rate { font-size: 1.25rem; font-weight: 600 } label, figure { color: var(--soft); font-size: .875rem }
label { flex: 1 6rem } label:last-of-type, #rate { flex: 99 8rem; align-self: center }
label input { margin-top: .25rem } label input, p, #log, figure { width: 100% }
#state::before { content: "○ " } #state.open::before { content: "● "; color: var(--accent) }
#log { max-height: 13rem; overflow-y: auto; font: .75rem/1.75 ui-monospace, monospace; white-space: pre }
#log div { overflow: hidden; text-overflow: ellipsis } figure:has(#ticks:empty) { display: none }
figure { position: relative; line-height: 1.25rem } figcaption { position: absolute; right: 0; bottom: .5rem }
#ticks div { height: 1.75rem; border-top: 1px solid var(--page) } :empty:is(p, #log) { position: absolute }
svg { position: absolute; left: 5rem; width: calc(100% - 5rem); height: calc(100% - 1.75rem); overflow: visible }
path { stroke: var(--accent); stroke-width: 2.5; stroke-linecap: round; vector-effect: non-scaling-stroke }
</style>
<h1>Echo server</h1>
<form id="connection" method="dialog"> <!-- this method submits to nowhere -->
  <p id="state" role="status"></p>
  <label>Close code <input id="close-code" value="1000" inputmode="numeric" required pattern="1000|[34][0-9]{3}"
    title="1000, or 3000 to 4999"></label>
  <label>Reason <input id="close-reason" maxlength="41" autocomplete="off"></label>
  <button id="connect">Connect</button><p id="closed" role="status"></p></form>
<form id="message" method="dialog">
  <label>Message <input id="text" value="Hello" autocomplete="off"></label><button id="send">Send</button>
  <button id="choose" type="button">Send a file</button><input id="file" type="file" aria-label="File" hidden>
  <div id="log" role="log" aria-label="Messages"></div></form>
<section aria-label="Ping-pong">
  <p id="rate" role="status">Round-trip times</p><button id="run">Ping-pong 1000</button><p id="figures"></p>
  <figure><svg id="chart" viewBox="0 0 999 1" preserveAspectRatio="none" aria-hidden="true"><path id="dots"/></svg>
    <div id="ticks"></div><figcaption>message 1 to 1000</figcaption></figure></section>
<script>
const $ = (id) => document.getElementById(id);
const line = (textContent) => Object.assign(document.createElement("div"), { textContent });
const receive = ({ data }) => (waiting.length ? waiting.shift().resolve(data) : log("in", data));
const isOpen = () => socket.readyState === WebSocket.OPEN;
let socket, waiting; // `waiting` has one entry for each message under way: the echoes come in the same order

function connect() {
  waiting = [];
  socket = new WebSocket(location.href.replace("http", "ws").split("#")[0]);
  Object.assign(socket, { binaryType: "arraybuffer", onopen: () => show(), onmessage: receive, onclose: ended });
}
function ended({ code, reason, wasClean }) {
  show(`Closed: ${code} ${reason}`.trim() + (wasClean ? " (clean)" : " (not clean)"));
  for (const { reject } of waiting) reject(new Error("the connection closed"));
}
function show(closed = "") {
  const state = ["Connecting to", "Connected to", "Disconnecting from", "Not connected to"][socket.readyState];
  $("state").textContent = `${state} ${socket.url}`;
  $("state").className = isOpen() ? "open" : "";
  $("connect").textContent = socket.readyState === WebSocket.CLOSED ? "Connect" : "Disconnect";
  $("send").disabled = $("choose").disabled = $("run").disabled = !isOpen();
  $("closed").textContent = closed;
}
async function roundTrip(data) {
  const start = performance.now();
  socket.send(data);
  const echo = await new Promise((resolve, reject) => waiting.push({ resolve, reject }));
  return { echo, ms: performance.now() - start || 1 / 16 }; // a coarse clock may say 0, which has no logarithm
}
function send(data) {
  log("out", data);
  roundTrip(data).then(({ echo, ms }) => log("in", echo, `${ms.toFixed(1)} ms`), () => log("out", data, "lost"));
}
function log(direction, data, note = "") {
  const bytes = typeof data === "string" ? new TextEncoder().encode(data) : new Uint8Array(data);
  const hex = Array.from(bytes.subarray(0, 40), (byte) => byte.toString(16).padStart(2, "0")).join(" ");
  const [kind, start] = typeof data === "string" ? ["text  ", JSON.stringify(data.slice(0, 100))] : ["binary", hex];
  const columns = [direction.padEnd(3), kind, `${bytes.length} B`.padStart(8), note.padStart(8), start];
  $("log").prepend(line(columns.join(" ")));
  $("log").children[100]?.remove();
}
async function pingPong() {
  const times = [], start = performance.now(), drawing = setInterval(draw, 500, times);
  $("rate").textContent = "Running …";
  $("run").disabled = true;
  try {
    while (times.length < 1000) times.push((await roundTrip(`ping ${times.length}`)).ms);
    $("rate").textContent = `${Math.round(1e6 / (performance.now() - start))} messages/s`;
  } catch (error) {
    $("rate").textContent = `Stopped after ${times.length} messages: ${error.message}`;
  }
  clearInterval(drawing);
  draw(times);
  $("run").disabled = !isOpen();
  if (document.activeElement === document.body) $("run").focus({ preventScroll: true }); // which disabling took away
}
function draw(times) {
  if (!times.length) return;
  const sorted = Float64Array.from(times).sort();
  const rank = (share) => `${sorted[Math.ceil(share * sorted.length) - 1].toFixed(2)} ms`;
  const low = Math.floor(Math.log2(sorted[0])), high = Math.floor(Math.log2(sorted.at(-1))) + 1;
  $("figures").textContent = `Median ${rank(0.5)}, p99 ${rank(0.99)}, max ${rank(1)}`;
  $("dots").setAttribute("d", times.map((ms, i) => `M${i} ${(high - Math.log2(ms)) / (high - low)}h0`).join(""));
  $("ticks").replaceChildren(...Array.from({ length: high - low + 1 }, (_, i) => line(`${2 ** (high - i)} ms`)));
}

$("connection").onsubmit = () => {
  if (socket.readyState === WebSocket.CLOSED) connect();
  else socket.close($("close-code").value, $("close-reason").value);
  show();
};
$("message").onsubmit = () => send($("text").value);
$("run").onclick = pingPong;
$("choose").onclick = () => {
  $("file").value = ""; // or choosing the same file again would change nothing
  $("file").click();
};
$("file").onchange = async () => send(await $("file").files[0].arrayBuffer());
connect();
show();
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
