"""Tests of echoserver: through real sockets and a real client (websocket-client), and of the pure core.

    python -m pytest                        # all but the benchmark, under half a minute
    python -m pytest -m benchmark -s        # the benchmark: this server, plain websocket-server, bare TCP
"""
import contextlib
import gc
import http.client
import io
import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
import weakref
import zlib

import pytest
import websocket
from websocket_server import WebsocketServer

import echoserver
from echoserver import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, EchoServer

HERE = pathlib.Path(__file__).resolve().parent
PATIENCE = 10  # seconds after which a wait has failed; none of them is waited for in a passing test
README = (HERE / "README.md").read_text(encoding="utf-8")
SCALE = int(os.environ.get("ECHOSERVER_TEST_SCALE", "1"))  # 10: 1,000 slow openers and resets, 100,000 frames
KEY = b"\x37\xfa\x21\x3d"
REQUEST = (b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
           b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")

with warnings.catch_warnings():  # there is no visible settings file in which the mark could be registered
    warnings.simplefilter("ignore")
    benchmark = pytest.mark.benchmark


# ==== Tools ============================================================================================


def wait_for(condition, what="it"):
    """Wait until condition() is true; the only wait by polling, for what sends no signal."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain for %s" % what
        time.sleep(0.005)


def open_sockets():
    """The sockets of this process, where the system shows them."""
    found = set()
    with contextlib.suppress(OSError):
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink("/proc/self/fd/" + number)
                if target.startswith("socket:"):
                    found.add(target)
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind(request):
    """No thread and no socket outlives a test, but for those of the bare package."""
    if "start_bare" in request.node.name:
        yield
        return
    threads, sockets = set(threading.enumerate()), open_sockets()
    yield
    wait_for(lambda: set(threading.enumerate()) <= threads, "threads to end: %s" % threading.enumerate())
    wait_for(lambda: open_sockets() <= sockets or (gc.collect() and False), "sockets to be closed")


@pytest.fixture
def serve():
    """A function that starts a server, of any class, to be closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda kind=EchoServer, **options: stack.enter_context(kind(port=0, host="127.0.0.1", **options))


@pytest.fixture
def client(serve):
    """A real client of a plain server."""
    connection = websocket.create_connection(serve().url, timeout=PATIENCE)
    yield connection
    connection.close()
    connection.shutdown()  # it leaves its socket open where the server's Close came first


def client_frame(opcode, payload=b"", fin=True, rsv=0, key=KEY, length=None, masked=True):
    """A frame from a client; built here apart from the server's code, and able to be wrong."""
    size = len(payload)
    if length is None:
        length = bytes([size]) if size < 126 else (
            b"\x7e" + struct.pack("!H", size) if size < 65536 else b"\x7f" + struct.pack("!Q", size))
    length = bytes([length[0] | 0x80 * masked]) + length[1:]
    if masked:
        payload = key + bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))
    return bytes([0x80 * fin | rsv << 4 | opcode]) + length + payload


class Raw:
    """A bare socket that has done the opening handshake, for what no client sends."""

    def __init__(self, server, request=REQUEST, early=b"", context=None):
        self.socket = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
        if context:
            self.socket = context.wrap_socket(self.socket, server_hostname="localhost")
        self.file = self.socket.makefile("rb")
        self.send(request + early)
        self.head = b""
        while not self.head.endswith(b"\r\n\r\n"):
            line = self.file.readline()
            assert line, self.head
            self.head += line

    def send(self, *frames):
        self.socket.sendall(b"".join(frames))
        return self

    def frame(self):
        """The next frame: (first byte's flags, opcode, payload); None at the end of the connection."""
        head = self.file.read(2)
        if not head:
            return None
        assert not head[1] & 0x80, "a server does not mask"
        size = head[1]
        if size > 125:
            size = int.from_bytes(self.file.read(2 if size == 126 else 8), "big")
        return head[0] & 0xF0, head[0] & 0x0F, self.file.read(size)

    def frames(self):
        """All frames until the connection ends; a reset is an error."""
        return list(iter(self.frame, None))

    def close(self):
        self.file.close()
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def whole(opcode, payload=b""):
    return 0x80, opcode, payload


def close_code(frames):
    """The status code of the Close that must be the last frame."""
    assert frames and frames[-1][:2] == (0x80, CLOSE), frames
    return int.from_bytes(frames[-1][2][:2], "big")


class Recorder(EchoServer):
    """An echo server that keeps what it was called with."""

    def __init__(self, *args, **options):
        self.calls, self.messages = [], []
        self.changed = threading.Event()
        super().__init__(*args, **options)

    def new_client(self, client, server):
        self.calls.append(("new", client["id"], client in server.clients))

    def message_received(self, client, server, message):
        self.messages.append(message)
        super().message_received(client, server, message)

    def client_left(self, client, server):
        self.calls.append(("left", client["id"], client in server.clients))
        self.changed.set()


# ==== The echo =========================================================================================

SIZES = [0, 1, 125, 126, 127, 255, 256, 65535, 65536, 130000, 2**20 + 3]
BOTH = pytest.mark.parametrize("kind", [EchoServer, Recorder])  # the fast path, and the overrides


@BOTH
@pytest.mark.parametrize("size", SIZES)
def test_echoes_text_and_binary(serve, kind, size):
    with contextlib.closing(websocket.create_connection(serve(kind).url, timeout=PATIENCE)) as client:
        text, binary = ("a" * size)[:-2] + "é" * (size > 2), random.Random(size).getrandbits(8 * size + 1).to_bytes(size + 1, "big")
        client.send(text)
        client.send_binary(binary)
        assert client.recv_data() == (TEXT, text.encode())
        assert client.recv_data() == (BINARY, binary)


def test_echoes_16_mib_and_nothing_longer(client):
    message = b"x" * 2**24
    client.send_binary(message)
    assert client.recv() == message
    client.sock.sendall(client_frame(BINARY, length=b"\x7f" + struct.pack("!Q", 2**24 + 1)))
    assert client.recv_data()[1][:2] == struct.pack("!H", 1009)


@BOTH
@pytest.mark.parametrize("chop", [1, 3, 1000])
def test_fragments_with_control_frames_between(serve, kind, chop):
    """However TCP cuts the bytes up, and wherever fragments end."""
    sent = b"".join([
        client_frame(TEXT, "Füße".encode()[:2], fin=False), client_frame(PING, b"\xff\0ping"),
        client_frame(CONTINUATION, "Füße".encode()[2:3], fin=False), client_frame(PONG, b"unasked"),
        client_frame(CONTINUATION, "Füße".encode()[3:]), client_frame(BINARY, b""), client_frame(TEXT, b"a" * 300),
        client_frame(BINARY, b"", fin=False), client_frame(CONTINUATION, b""),
        client_frame(BINARY, b"\xfe", fin=False), client_frame(CONTINUATION, b"\xff"),
        client_frame(CLOSE, struct.pack("!H", 3000) + "tschüß".encode())])
    with Raw(serve(kind)) as raw:
        for at in range(0, len(sent), chop):
            raw.send(sent[at:at + chop])
        assert raw.frames() == [
            whole(PONG, b"\xff\0ping"), whole(TEXT, "Füße".encode()), whole(BINARY), whole(TEXT, b"a" * 300),
            whole(BINARY), whole(BINARY, b"\xfe\xff"), whole(CLOSE, struct.pack("!H", 3000) + "tschüß".encode())]


def test_many_messages_in_one_write_come_back_in_order(serve):
    with Raw(serve()) as raw:
        messages = [client_frame(TEXT if i % 2 else BINARY, b"%d" % i * (i % 90), key=os.urandom(4)) for i in range(500)]
        messages[250] = client_frame(PING, b"half")
        raw.send(*messages, client_frame(CLOSE))
        expected = [whole(TEXT if i % 2 else BINARY, b"%d" % i * (i % 90)) for i in range(500)]
        expected[250] = whole(PONG, b"half")
        assert raw.frames() == [*expected, whole(CLOSE)]


def test_frames_behind_the_request_in_one_packet(serve):
    with Raw(serve(), early=client_frame(TEXT, b"early")) as raw:
        assert raw.frame() == whole(TEXT, b"early")


def test_numpy_or_not(monkeypatch):
    """Both ways to unmask long payloads give what the definition gives."""
    data = random.Random(1).getrandbits(8 * 20000).to_bytes(20000, "big")
    for missing in (True, False):
        if missing:
            monkeypatch.setitem(sys.modules, "numpy", None)
        else:
            monkeypatch.undo()
            pytest.importorskip("numpy", reason="the other half needs NumPy, which is never required")
        echoserver.numpy.cache_clear()
        for size in (0, 1, 3, 255, 256, 8191, 8192, 8193, 8194, 8195, 20000):
            masked = bytes(byte ^ KEY[i % 4] for i, byte in enumerate(data[:size]))
            assert echoserver.unmask(masked, KEY) == data[:size]
    echoserver.numpy.cache_clear()


# ==== What fails the connection ========================================================================

GOOD = client_frame(TEXT, b"good")
VIOLATIONS = {
    "unmasked frame": (1002, client_frame(TEXT, b"x", masked=False)),
    "unmasked, by its first two bytes": (1002, b"\x81\x01"),
    "reserved bit 1": (1002, client_frame(TEXT, b"x", rsv=4)),
    "reserved bit 2": (1002, client_frame(TEXT, b"x", rsv=2)),
    "reserved bit 3": (1002, client_frame(PING, b"x", rsv=1)),
    "reserved opcode 3": (1002, client_frame(3)),
    "reserved opcode 11": (1002, client_frame(11)),
    "Ping of 126 bytes": (1002, client_frame(PING, b"x" * 126)),
    "Ping in fragments": (1002, client_frame(PING, fin=False)),
    "continuation of nothing": (1002, client_frame(CONTINUATION, b"x")),
    "message inside another": (1002, client_frame(TEXT, b"x", fin=False) + client_frame(TEXT, b"x")),
    "16-bit length below 126": (1002, client_frame(BINARY, b"x" * 125, length=b"\x7e\0\x7d")),
    "64-bit length below 65536": (1002, client_frame(BINARY, b"x" * 9, length=b"\x7f" + struct.pack("!Q", 65535))),
    "64-bit length with its highest bit": (1002, client_frame(BINARY, length=b"\x7f" + b"\xff" * 8)),
    "Close of 1 byte": (1002, client_frame(CLOSE, b"\x03")),
    "Close with a reason that is not UTF-8": (1007, client_frame(CLOSE, b"\x03\xe8\xff")),
    "text that is not UTF-8": (1007, client_frame(TEXT, b"caf\xe9")),
    "text that ends too early": (1007, client_frame(TEXT, b"\xc3")),
    "a surrogate": (1007, client_frame(TEXT, b"\xed\xa0\x80")),
    "half a surrogate": (1007, client_frame(TEXT, b"a\xed\xa0", fin=False)),
    "wrong text in mid-frame": (1007, client_frame(TEXT, b"a\xffb" + b"c" * 200)[:12]),
    "wrong text in mid-fragment": (1007, client_frame(TEXT, "é".encode(), fin=False)
                                   + client_frame(CONTINUATION, b"\xc3(", fin=False)),
    "too long by its header": (1009, client_frame(BINARY, length=b"\x7f" + struct.pack("!Q", 2**62))[:10]),
    "too long in fragments": (1009, client_frame(BINARY, b"x" * 200, fin=False) + client_frame(CONTINUATION, b"x" * 101)),
    **{"Close with code %d" % code: (1002, client_frame(CLOSE, struct.pack("!H", code)))
       for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535)},
}


@BOTH
@pytest.mark.parametrize("name", VIOLATIONS)
def test_violation(serve, kind, name):
    """What was valid is echoed first; then comes the right Close, and the end without a reset."""
    code, sent = VIOLATIONS[name]
    with Raw(serve(kind, max_size=300)) as raw:
        frames = raw.send(GOOD, sent).frames()
        assert frames[0] == whole(TEXT, b"good") and len(frames) == 2
        assert close_code(frames) == code


@pytest.mark.parametrize("code", [1000, 1003, 1007, 1014, 3000, 4999, None])
def test_close_is_answered_with_its_code(serve, code):
    payload = b"" if code is None else struct.pack("!H", code)
    with Raw(serve()) as raw:
        assert raw.send(client_frame(CLOSE, payload), GOOD).frames() == [whole(CLOSE, payload)]


def test_max_size_also_bounds_short_messages(serve):
    with Raw(serve(max_size=4)) as raw:
        frames = raw.send(GOOD, client_frame(TEXT, b"toolong")).frames()
        assert frames[0] == whole(TEXT, b"good") and close_code(frames) == 1009


def test_one_byte_fragments_take_no_more_memory_than_their_message():
    receiver = echoserver.Receiver(2**20)
    list(receiver.feed(client_frame(BINARY, b"x", fin=False)))
    for _ in range(1000):
        assert not list(receiver.feed(client_frame(CONTINUATION, b"y", fin=False) * 50))
    assert len(receiver._pieces) == 1


# ==== The opening handshake ============================================================================

def request(*changes, line=b"GET / HTTP/1.1"):
    """The request with fields (b"Name: value") put in place of those of the same name; b"Name" takes one out."""
    fields = dict(field.split(b": ", 1) for field in REQUEST.split(b"\r\n")[1:-2])
    extra = []
    for change in changes:
        name, colon, value = change.partition(b": ")
        fields.pop(name, None)
        if colon:
            extra.append(change)
    return b"\r\n".join([line, *(b": ".join(field) for field in fields.items()), *extra, b"", b""])


REFUSALS = {
    "POST": (405, request(line=b"POST / HTTP/1.1"), b"Allow: GET"),
    "garbage": (400, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03 a TLS handshake", b""),
    "lines without CR": (400, b"GET / HTTP/1.1\nHost: a\n\n", b""),
    "request line": (400, request(line=b"GET /"), b""),
    "fragment in the path": (400, request(line=b"GET /#x HTTP/1.1"), b""),
    "HTTP/2": (400, request(line=b"PRI * HTTP/2.0"), b""),
    "HTTP/1.0": (400, request(line=b"GET / HTTP/1.0"), b""),
    "malformed field": (400, request(b"Bad Name: x"), b""),
    "folded field": (400, request(b" folded: x"), b""),
    "control character": (400, request(b"X: a\0b"), b""),
    "cut off": (400, REQUEST[:-2], b""),
    "HTTP/2, by its preface": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b""),
    "asterisk": (400, request(line=b"GET * HTTP/1.1"), b""),
    "NUL in the authority": (400, request(line=b"GET http://a\0/ HTTP/1.1"), b""),
    "invalid Host": (400, request(b"Host: a b/../@:x"), b""),
    "no Host": (400, request(b"Host"), b""),
    "two Hosts": (400, request(b"X: y\r\nHost: other"), b""),
    "HEAD elsewhere": (426, b"HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n", b"Upgrade: websocket"),
    "a body": (400, request(b"Content-Length: 5"), b""),
    "a chunked body": (400, request(b"Transfer-Encoding: chunked"), b""),
    "no Connection: Upgrade": (400, request(b"Connection: close"), b""),
    "no key": (400, request(b"Sec-WebSocket-Key"), b""),
    "short key": (400, request(b"Sec-WebSocket-Key: c2hvcnQ="), b""),
    "two keys": (400, request(b"X: y\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="), b""),
    "version 8": (426, request(b"Sec-WebSocket-Version: 8"), b"Sec-WebSocket-Version: 13"),
    "no version": (426, request(b"Sec-WebSocket-Version"), b"Sec-WebSocket-Version: 13"),
    "plain HTTP": (426, b"GET /favicon.ico HTTP/1.1\r\nHost: a\r\n\r\n", b"Upgrade: websocket"),
    "bad subprotocol": (400, request(b"Sec-WebSocket-Protocol: chat, a b"), b""),
    "empty subprotocol": (400, request(b"Sec-WebSocket-Protocol: "), b""),
    "other origin": (403, request(b"Origin: http://evil.example"), b""),
    "16 KiB and more": (431, REQUEST[:-2] + b"X: " + b"x" * 16384, b""),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(serve, name):
    """A complete HTTP answer, then the end; and the connection never was a client."""
    status, sent, field = REFUSALS[name]
    server = serve(Recorder, origin=["http://good.example"])
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
        sock.sendall(sent)
        if name == "cut off":
            sock.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(sock, method=sent[:4].strip().decode("latin-1"))
        response.begin()
        body = response.read()
        assert (response.status, response.getheader("Connection").split(",")[0]) == (status, "close")
        assert response.getheader("Content-Type") == "text/plain; charset=utf-8" and response.getheader("Date")
        assert sent[:4] == b"HEAD" or (body.endswith(b".\n") and body.count(b"\n") == 1 and b"\r" not in body)
        assert not field or field in ("\r\n".join(map(": ".join, response.getheaders()))).encode()
        assert sock.recv(1) == b""
        response.close()
    server.close()
    assert server.calls == []


@pytest.mark.parametrize("changes, line", [
    ((), b"GET / HTTP/1.1"), ((b"Connection: keep-alive, upgrade", b"Upgrade: WebSocket"), b"GET /any/path?x=1 HTTP/1.1"),
    ((b"Origin: http://good.example",), b"GET http://localhost/x HTTP/1.1"), ((b"Content-Length: 0",), b"GET / HTTP/1.1"),
    ((b"X: \xe9  ",), b"GET / HTTP/1.1"), ((b"Host: [::1]:80",), b"GET HTTP://localhost?x=1 HTTP/1.9"),
    ((b"Sec-WebSocket-Protocol: , chat,",), b"GET / HTTP/1.1")])
def test_accepted(serve, changes, line):
    with Raw(serve(origin="http://good.example"), request(*changes, line=line)) as raw:
        assert raw.head.startswith(b"HTTP/1.1 101 ") and b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in raw.head


def test_client_dictionary(serve):
    server = serve()
    with Raw(server, request(b"Sec-WebSocket-Protocol: chat, superchat", b"User-Agent: a", b"X-Two: 1\r\nx-two: 2",
                             line=b"GET /room?x=1 HTTP/1.1")) as raw:
        assert b"Sec-WebSocket-Protocol: chat\r\n" in raw.head
        (client,) = server.clients
        assert (client["id"], client["path"], client["subprotocol"]) == (1, "/room?x=1", "chat")
        assert client["address"] == raw.socket.getsockname()[:2]
        headers = client["headers"]
        assert headers["User-Agent"] == headers["user-agent"] == headers.get("USER-AGENT") == "a"
        assert headers["x-two"] == "1, 2" and headers.get("none", 5) == 5 and "X-TWO" in headers and "none" not in headers
        with pytest.raises(KeyError):
            headers["none"]
        assert server.handler_to_client(client["handler"]) is client


def test_open_timeout_is_for_the_whole_request(serve):
    """A byte now and then does not extend it."""
    server = serve(open_timeout=0.3)
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
        begin = time.monotonic()
        sock.settimeout(0.05)
        answer = b""
        while not answer:
            with contextlib.suppress(socket.timeout):
                sock.sendall(b"G")
                answer = sock.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 ") and 0.25 < time.monotonic() - begin < 3


def test_gone_before_the_request_ends(serve, caplog):
    server = serve(Recorder)
    socket.create_connection(("127.0.0.1", server.port)).close()
    wait_for(lambda: not server.server._connections)
    assert server.calls == [] and not caplog.records


# ==== The life of a connection =========================================================================

def test_calls_in_order_and_in_the_connections_own_thread(serve):
    threads = []

    class Threads(Recorder):
        def new_client(self, client, server):
            threads.append(threading.current_thread())
            super().new_client(client, server)

        def client_left(self, client, server):
            threads.append(threading.current_thread())
            super().client_left(client, server)

    server = serve(Threads)
    client = websocket.create_connection(server.url, timeout=PATIENCE)
    assert [c["id"] for c in server.clients] == [1]
    client.close()
    assert server.clients == []  # whoever has the answer to its Close is on no list any more
    assert server.changed.wait(PATIENCE)
    assert server.calls == [("new", 1, True), ("left", 1, False)]
    assert threads[0] is threads[1] is not threading.main_thread()


@pytest.mark.parametrize("how", ["reset", "end", "end in mid-frame", "half-close", "unread"])
def test_gone_without_a_close(serve, caplog, how):
    server = serve(Recorder)
    with Raw(server) as raw:
        raw.send(GOOD)
        if how != "unread":
            assert raw.frame() == whole(TEXT, b"good")
        if how == "end in mid-frame":
            raw.send(GOOD[:4])
        if how == "reset":
            raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how == "half-close":
            raw.send(GOOD, GOOD).socket.shutdown(socket.SHUT_WR)
            assert raw.frames() == [whole(TEXT, b"good")] * 2
    assert server.changed.wait(PATIENCE)
    assert server.calls == [("new", 1, True), ("left", 1, False)] and not caplog.records


def test_silence_is_pinged_and_any_traffic_is_a_sign_of_life(serve):
    server = serve(Recorder, ping_interval=0.1, ping_timeout=0.2)
    with Raw(server) as lively, Raw(server) as silent:
        for _ in range(6):
            assert lively.frame() == whole(PING)
            lively.send(client_frame(PONG))
        assert [frame for frame in silent.frames() if frame != whole(PING)] == [
            whole(CLOSE, struct.pack("!H", 1011) + b"no answer to a Ping")]
        assert server.changed.wait(PATIENCE) and [c["id"] for c in server.clients] == [1]


@pytest.mark.parametrize("interval, timeout, close", [(0.25, 0.2, 0.15), (0.2, 0.19, 5), (0.2, 0.2, 0.19), (0.1, 0.3, 0.2)])
def test_a_ping_and_the_end_come_in_time(serve, interval, timeout, close):
    """Also where the times are no multiples of each other."""
    with Raw(serve(ping_interval=interval, ping_timeout=timeout, close_timeout=close)) as raw:
        begin = time.monotonic()
        assert raw.frame() == whole(PING)
        pinged = time.monotonic()
        assert close_code(raw.frames()) == 1011
        ended = time.monotonic()
        assert -0.02 < pinged - begin - interval < 0.5 and -0.02 < ended - pinged - timeout < 0.5


def test_pings_without_a_timeout(serve):
    with Raw(serve(ping_interval=0.03, ping_timeout=0)) as raw:
        assert [raw.frame() for _ in range(4)] == [whole(PING)] * 4
        assert raw.send(GOOD).frame() == whole(TEXT, b"good")


@pytest.mark.parametrize("name", ["new_client", "message_received", "client_left"])
def test_exception_in_an_override(serve, caplog, name):
    """It is logged with its traceback, its client gets Close 1011, and the others notice nothing."""
    class Faulty(Recorder):
        pass

    def fail(self, client, server, *message):
        if client["id"] == 2:
            raise ConnectionError("on purpose")
        getattr(Recorder, name)(self, client, server, *message)

    setattr(Faulty, name, fail)
    server = serve(Faulty)
    with Raw(server) as good, Raw(server) as bad:
        frames = bad.send(GOOD, GOOD, client_frame(CLOSE)).frames()
        if name == "client_left":
            assert frames == [whole(TEXT, b"good")] * 2 + [whole(CLOSE)]
        else:
            assert close_code(frames) == 1011 and len(frames) == 1
        assert good.send(GOOD).frame() == whole(TEXT, b"good")
    server.close()
    (record,) = caplog.records
    assert "client 2" in record.getMessage() and "on purpose" in caplog.text and "Traceback" in caplog.text


@pytest.mark.parametrize("name", ["message_received", "client_left"])
def test_sys_exit_in_an_override_leaks_nothing(serve, caplog, name):
    server = serve(type("Exiting", (EchoServer,), {name: lambda *_: sys.exit()}))
    with Raw(server) as raw:
        raw.send(GOOD, client_frame(CLOSE)).frames()
    wait_for(lambda: not server.server._connections)
    assert server.server._slots == 0 and "SystemExit" in caplog.text


def test_what_an_override_sends_is_on_the_wire_before_it_blocks(serve):
    go_on = threading.Event()

    class Blocking(EchoServer):
        def message_received(self, client, server, message):
            server.send_message(client, message)
            assert go_on.wait(PATIENCE)

    with Raw(serve(Blocking)) as raw:
        assert raw.send(GOOD, GOOD).frame() == whole(TEXT, b"good")
        go_on.set()
        assert raw.frame() == whole(TEXT, b"good")


def test_sending_from_many_threads(serve):
    """No frame is torn by another."""
    server = serve()
    with Raw(server) as raw:
        (client,) = server.clients
        payloads = [bytes([65 + i]) * size for i, size in enumerate((1, 300, 70000, 200000))]
        threads = [threading.Thread(target=lambda p=p: [server.send_message(client, p) for _ in range(50)]) for p in payloads]
        for thread in threads:
            thread.start()
        got = [raw.frame() for _ in range(50 * len(payloads))]
        for thread in threads:
            thread.join()
        assert sorted(got) == sorted([whole(BINARY, p) for p in payloads] * 50)


def test_sending_by_hand(serve):
    server = serve()
    with Raw(server) as raw:
        (client,) = server.clients
        handler = client["handler"]

        def between():
            yield "é"
            handler.send_ping(b"?")
            with pytest.raises(RuntimeError, match="5.4"):
                handler.send_message("no")
            yield "!"

        assert handler.send_message("a") and handler.send_frame(TEXT, b"b") and handler.send_ping(b"c")
        assert handler.send_frame(PONG, b"d")
        assert handler.send_message(bytearray(b"e")) and handler.send_fragments(between()) and handler.send_fragments([])
        assert handler.send_fragments([b"f"]) and handler.send_frame(BINARY, b"g", fin=False)
        assert [raw.frame() for _ in range(13)] == [
            whole(TEXT, b"a"), whole(TEXT, b"b"), whole(PING, b"c"), whole(PONG, b"d"), whole(BINARY, b"e"),
            (0, TEXT, "é".encode()), whole(PING, b"?"), (0, CONTINUATION, b"!"), whole(CONTINUATION), whole(BINARY),
            (0, BINARY, b"f"), whole(CONTINUATION), (0, BINARY, b"g")]
        for wrong, error in ((lambda: server.send_message(client, 5), TypeError), (lambda: handler.send_ping(b"x" * 126), ValueError),
                             (lambda: handler.send_close(1005), ValueError), (lambda: handler.send_close(1000, "x" * 124), ValueError),
                             (lambda: server.send_message(client, "\ud800"), UnicodeEncodeError),
                             (lambda: handler.send_close(1000, b"\xff"), UnicodeDecodeError)):
            with pytest.raises(error):
                wrong()
        with pytest.raises(TypeError):
            handler.send_fragments(["text", b"binary"])
        assert (raw.frame(), raw.frame()) == ((0, TEXT, b"text"), whole(CLOSE, struct.pack("!H", 1011) + b"internal error"))
        assert raw.send(client_frame(CLOSE)).frames() == []
        assert not handler.send_message("late") and not handler.send_close() and not server.send_message(client, "late")


@pytest.mark.parametrize("last_words", [b"", b"\x81\x7e"])
def test_abort(serve, last_words):
    class Rude(Recorder):
        def message_received(self, client, server, message):
            super().message_received(client, server, message)
            client["handler"].abort(last_words)

    server = serve(Rude)
    with Raw(server) as raw:
        assert raw.send(GOOD, GOOD).frame() == whole(TEXT, b"good")
        assert raw.file.read() == last_words
    assert server.changed.wait(PATIENCE) and server.messages == ["good"]


def test_nothing_is_taken_after_a_close_was_sent(serve):
    class Closing(Recorder):
        def message_received(self, client, server, message):
            super().message_received(client, server, message)
            client["handler"].send_close(3333, "enough")

    server = serve(Closing)
    with Raw(server) as raw:
        assert raw.send(GOOD, GOOD, client_frame(PING)).frame() == whole(TEXT, b"good")
        assert raw.frame() == whole(CLOSE, struct.pack("!H", 3333) + b"enough")
        assert [c["id"] for c in server.clients] == [1]  # the closing handshake is not over
        raw.send(GOOD)
        server.clients[0]["handler"].abort(b"late")
        assert raw.frames() == [] and server.messages == ["good"]


def test_the_fast_path_answers_nothing_after_a_close(serve):
    server = serve()
    with Raw(server) as raw:
        server.disconnect_clients_gracefully()
        assert raw.frame() == whole(CLOSE, struct.pack("!H", 1000))
        assert raw.send(GOOD, client_frame(CLOSE)).frames() == []


@pytest.mark.skipif(not hasattr(socket, "MSG_DONTWAIT"), reason="this system cannot look without waiting")
def test_a_connection_looks_before_it_sleeps_only_while_that_pays():
    """Each receive in a letter: "." slept at once, a digit found it at that look, "x" looked in vain."""
    class Socket:
        def recv(self, size, flags=0):
            self.looks += 1 if flags else 0
            if flags and self.looks != self.found_at:
                raise BlockingIOError
            return b"found" if flags else b"slept"

    def receive(found_at=1):
        wire.looks, wire.found_at = 0, found_at
        found = connection._receive()
        return str(wire.looks) if found == b"found" else "x" if wire.looks else "."

    with contextlib.closing(EchoServer(port=0)) as server:
        wire = Socket()
        connection = echoserver.Connection(wire, None, server.server)
        assert "".join(receive() for _ in range(35)) == "." * 33 + "11"
        assert receive(found_at=3) == "3"
        assert receive(found_at=None) == "x" and wire.looks == connection._looks
        assert "".join(receive() for _ in range(34)) == "." * 32 + "11"
        server.server.latest = None  # as after another client's message
        assert "".join(receive() for _ in range(35)) == "." * 33 + "11"
        connection._looks = 0  # as with TLS
        assert receive() == "."


def test_a_reset_found_by_looking(serve, caplog):
    server = serve(Recorder)
    client = Raw(server)
    for _ in range(100):
        assert client.send(client_frame(TEXT, b"quick")).frame()
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert server.changed.wait(PATIENCE) and not caplog.records


def test_reset_after_a_silence(serve, caplog):
    server = serve(Recorder, ping_interval=0.03, ping_timeout=PATIENCE)
    with Raw(server) as raw:
        assert raw.frame() == whole(PING)
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert server.changed.wait(PATIENCE) and not caplog.records


def test_gone_before_the_answer(serve, monkeypatch):
    """Who does not get the 101 never was a client."""
    server = serve(Recorder)
    monkeypatch.setattr(echoserver.Connection, "_write", lambda *_: False)
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
        sock.sendall(REQUEST)
        assert sock.recv(1) == b""
    assert server.calls == [] and server.clients == []


def test_a_fault_before_there_is_a_client(serve, monkeypatch, caplog):
    server = serve()
    monkeypatch.setattr(echoserver, "parse_request", None)
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
        sock.sendall(REQUEST)
        assert sock.recv(1) == b""
    assert "client None" in caplog.text


@pytest.mark.parametrize("kind", [EchoServer, Recorder])
def test_a_close_that_is_not_answered_ends_after_close_timeout(serve, kind):
    server = serve(kind, close_timeout=0.2)
    with Raw(server) as raw:
        begin = time.monotonic()
        server.disconnect_clients_gracefully(4000, b"bye")
        assert raw.frames() == [whole(CLOSE, struct.pack("!H", 4000) + b"bye")] and time.monotonic() - begin < 3
        wait_for(lambda: server.clients == [])


def test_a_close_that_is_answered_with_everything_else_ends_too(serve):
    server = serve(Recorder, close_timeout=0.3)
    with Raw(server) as raw:
        server.disconnect_clients_gracefully()
        begin = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - begin < PATIENCE:
                raw.send(client_frame(PING))
                time.sleep(0.02)
        assert server.changed.wait(PATIENCE) and 0.2 < time.monotonic() - begin < 3


def test_a_client_that_does_not_read_is_dropped(serve, monkeypatch):
    """It holds back nobody else, and takes no more memory than the message it is sent."""
    monkeypatch.setattr(echoserver.Server, "send_timeout", 0.3)
    server = serve(Recorder)
    with Raw(server) as stuck, Raw(server) as other:
        stuck.socket.settimeout(0.2)
        with contextlib.suppress(OSError):
            while True:
                stuck.send(client_frame(BINARY, b"x" * 65536, key=b"\0\0\0\0") * 8)
        assert other.send(GOOD).frame() == whole(TEXT, b"good")
        assert server.changed.wait(PATIENCE) and [c["id"] for c in server.clients] == [2]


# ==== The life of the server ===========================================================================

def test_close_sends_1001_and_leaves_nothing(serve):
    server = serve(Recorder)
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(Raw(server)) for _ in range(20)]
        closing = threading.Thread(target=server.close)
        closing.start()
        for raw in raws:
            assert raw.frame() == whole(CLOSE, struct.pack("!H", 1001))
            raw.send(client_frame(CLOSE, struct.pack("!H", 1001)))
            assert raw.frames() == []
        closing.join()
        assert server.closed.is_set() and server.clients == [] and len(server.calls) == 40
        server.close()
        with pytest.raises(ConnectionError):
            socket.create_connection(("127.0.0.1", server.port))
        with pytest.raises(RuntimeError):
            server.serve_forever()


def test_close_cuts_who_does_not_answer_in_time(serve, monkeypatch, caplog):
    """Silent, opening, and stuck in a send: all are gone when close() returns, and it returns in time."""
    server = serve(close_timeout=2)
    with Raw(server), Raw(server) as stuck, socket.create_connection(("127.0.0.1", server.port)):
        stuck.socket.settimeout(0.2)
        with contextlib.suppress(OSError):
            while True:
                stuck.send(client_frame(BINARY, b"x" * 65536, key=b"\0\0\0\0") * 8)
        begin = time.monotonic()
        server.close()
        assert 1 < time.monotonic() - begin < 2 and not caplog.records


def test_close_in_an_override(serve):
    """Of the thread that calls it, close() cannot wait for the end; of all others it does. A second call waits
    for the first, but not where that would wait for it."""
    class Quit(EchoServer):
        def message_received(self, client, server, message):
            self.close(4001, message)
            self.close()

        def client_left(self, client, server):
            self.close()

    server = serve(Quit)
    with Raw(server) as one, Raw(server) as other:
        one.send(GOOD)
        for raw in (one, other):
            assert raw.frame() == whole(CLOSE, struct.pack("!H", 4001) + b"good")
            raw.send(client_frame(CLOSE))
        assert one.frames() == other.frames() == []
        assert server.closed.wait(PATIENCE)


def test_an_override_that_does_not_return_is_left(serve, caplog):
    go_on = threading.Event()

    class Stuck(EchoServer):
        def message_received(self, client, server, message):
            server.send_message(client, message)
            go_on.wait(PATIENCE)

    server = serve(Stuck, close_timeout=0.1)
    with Raw(server) as raw:
        assert raw.send(GOOD).frame() == whole(TEXT, b"good")
        server.close()
        assert [r.getMessage() for r in caplog.records] == ["closed, but 1 threads have not ended"]
        go_on.set()


def test_close_before_the_start_and_in_every_order():
    never = EchoServer(port=0)
    never.close()
    assert never.closed.is_set()
    twice = EchoServer(port=0, host="127.0.0.1")
    twice.start()
    with twice:
        Raw(twice).close()
    with pytest.raises(ValueError):
        EchoServer.close(twice, 1006)


def test_the_switch_interval_grows_with_the_connections(serve, monkeypatch):
    """Or thousands of threads wake each other up and do nothing else; with few, a flood would hold up the others."""
    intervals = []
    monkeypatch.setattr(sys, "setswitchinterval", intervals.append)
    server = serve().server
    with Raw(server):
        assert intervals == []
        for server.switch_interval in (0.01, 50e-6, 1):
            Raw(server).close()
            wait_for(lambda: len(server.clients) == 1)
    assert intervals == [pytest.approx(0.02), 0.005, 0.5]


def test_a_connection_that_is_over_is_not_kept(serve):
    server = serve(Recorder)
    with Raw(server) as raw:
        assert raw.send(client_frame(TEXT, b"hello")).frame() == whole(TEXT, b"hello")
        kept = weakref.ref(server.clients[0]["handler"])
    wait_for(lambda: [gc.collect()] and kept() is None, "the connection to be freed")


@pytest.mark.parametrize("poll_interval", [None, 0])
def test_a_listening_socket_without_poll(caplog, poll_interval):
    """There accept() waits as long as the socket's own options say: no busy loop, no complaint."""
    with contextlib.closing(EchoServer(port=0, ping_interval=0.02)) as server:
        thread = threading.Thread(target=server.server.serve_forever, args=(poll_interval,))
        before = time.process_time()
        thread.start()
        time.sleep(0.1)
        assert time.process_time() - before < 0.08
        Raw(server).close()
    thread.join(PATIENCE)
    assert not caplog.records


def test_closed_before_its_thread_has_begun(capsys):
    server = EchoServer(port=0).server
    with server._lock:  # the thread waits for this
        server.start()
        server._closing = True  # as in close()
        server.server_close()
    server._background.join(PATIENCE)
    assert not server._background.is_alive() and capsys.readouterr().err == ""
    with pytest.raises(RuntimeError):
        server.serve_forever()


def test_no_start_after_the_close(serve):
    server = serve()
    server.close()
    with pytest.raises(RuntimeError, match="make a new one"):
        server.start()


def test_a_later_close_waits_for_what_an_earlier_one_in_an_override_could_not(serve):
    class Quit(EchoServer):
        def message_received(self, client, server, message):
            self.close()

    server = serve(Quit, close_timeout=0.5)
    with Raw(server) as raw:
        assert raw.send(GOOD).frame() == whole(CLOSE, struct.pack("!H", 1001))
        server.close()
        assert not server.server._connections


def test_fragments_that_do_not_come_hold_up_nobody(serve, caplog):
    """A generator that waits in another thread keeps only its own connection from being closed in order."""
    go_on = threading.Event()
    server = serve(close_timeout=0.2)
    with Raw(server) as raw:
        (client,) = server.clients

        def pieces():
            yield "first"
            go_on.wait(PATIENCE)
            yield "second"

        feeding = threading.Thread(target=client["handler"].send_fragments, args=(pieces(),))
        feeding.start()
        assert raw.frame() == (0, TEXT, b"first")
        client["handler"].abort()
        assert raw.frames() == []
        server.close()
        wait_for(lambda: "echoserver connection" not in {thread.name for thread in threading.enumerate()})
        go_on.set()
        feeding.join()


def test_the_options_of_a_socket_are_the_same_inherited_or_not():
    """Not inherited: socketserver's handle_request() accepts one connection without serve_forever()."""
    found = []
    for run in (lambda server: server.start(), lambda server: threading.Thread(target=server.handle_request).start()):
        with contextlib.closing(EchoServer(port=0, host="127.0.0.1")) as server:
            run(server)
            with Raw(server) as raw:
                assert raw.send(client_frame(TEXT, b"hello")).frame() == whole(TEXT, b"hello")
                sock = server.clients[0]["handler"].request
                found.append([sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0] + [
                    sock.getsockopt(socket.SOL_SOCKET, option, 16) for option in (
                        socket.SO_RCVTIMEO, socket.SO_SNDTIMEO)])
    assert found[0] == found[1] and found[0][0] and found[0][1].strip(b"\0") and found[0][2].strip(b"\0")


def test_what_accept_and_threads_may_do_does_not_end_the_server(serve, monkeypatch):
    """On macOS a connection that is gone already has no address."""
    server = serve()
    made, connection = [], echoserver.Connection

    def strange(request, client_address, server):
        made.append(1)
        if len(made) == 1:
            request.close()
            raise ValueError("on purpose")
        return connection(request, None, server)

    monkeypatch.setattr(echoserver, "Connection", strange)
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as first:
        assert first.recv(1) == b""
    with Raw(server) as second:
        assert second.send(GOOD).frame() == whole(TEXT, b"good") and server.clients[0]["address"] == ("", 0)


def test_serve_forever_returns_when_all_is_closed():
    server = EchoServer(port=0, host="127.0.0.1")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with Raw(server) as raw:
        threading.Thread(target=server.close).start()
        assert raw.frame() == whole(CLOSE, struct.pack("!H", 1001))
        assert thread.is_alive()
    thread.join(PATIENCE)
    assert server.closed.is_set() and not thread.is_alive()


def test_the_interface_of_websocket_server(serve):
    server = serve(Recorder)
    with Raw(server) as one, Raw(server) as two:
        server.send_message_to_all("all")
        assert one.frame() == two.frame() == whole(TEXT, b"all")
        server.deny_new_connections(1013, b"later")
        with Raw(server) as denied:
            assert denied.frames() == [whole(CLOSE, struct.pack("!H", 1013) + b"later")]
        server.allow_new_connections()
        server.disconnect_clients_gracefully()
        for raw in (one, two):
            assert raw.frame() == whole(CLOSE, struct.pack("!H", 1000))
            assert raw.send(client_frame(CLOSE)).frames() == []
        with Raw(server) as three:
            server.disconnect_clients_abruptly()
            assert three.frames() == []
        with Raw(server) as four:
            threading.Thread(target=server.shutdown_gracefully, args=(1012, b"back soon")).start()
            assert four.frame() == whole(CLOSE, struct.pack("!H", 1012) + b"back soon")
            assert four.send(client_frame(CLOSE)).frames() == []
    server.close()
    assert len(server.calls) == 8


def test_shutdown_abruptly_and_run_forever():
    server = EchoServer(port=0, host="127.0.0.1")
    server.run_forever(threaded=True)
    with Raw(server) as raw:
        server.shutdown_abruptly()
        assert raw.frames() == [] and server.closed.is_set()

    interrupted = EchoServer(port=0, host="127.0.0.1")
    interrupted.server._wait_for_room = interrupted.server.process_request = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    socket.create_connection(("127.0.0.1", interrupted.port)).close()
    interrupted.run_forever()
    assert interrupted.closed.is_set()


def test_callbacks_can_be_registered_as_websocket_server_does(serve):
    server = serve()
    server.set_fn_message_received(lambda client, server, message: server.send_message(client, message[::-1]))
    with Raw(server) as raw:
        assert raw.send(GOOD).frame() == whole(TEXT, b"doog")


def test_max_clients(serve):
    """Over it 503 with Retry-After; those in their opening handshake count; who is gone leaves room at once."""
    server = serve(max_clients=2)
    with Raw(server) as one, socket.create_connection(("127.0.0.1", server.port)):
        wait_for(lambda: server.server._slots == 2)
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as third:
            third.sendall(REQUEST)
            answer = b"".join(iter(lambda: third.recv(4096), b""))
            assert answer.startswith(b"HTTP/1.1 503 ") and b"\r\nRetry-After: 5\r\n" in answer
        assert one.send(client_frame(CLOSE)).frame() == whole(CLOSE)
        with Raw(server) as fourth:
            assert fourth.send(GOOD).frame() == whole(TEXT, b"good")


def test_far_over_max_clients_connections_are_dropped(serve, monkeypatch):
    monkeypatch.setattr(echoserver.Server, "spare_threads", 0)
    server = serve(max_clients=1)
    with Raw(server), socket.create_connection(("127.0.0.1", server.port), PATIENCE) as second:
        assert second.recv(1) == b""


def test_out_of_threads(serve, monkeypatch, caplog):
    """The server keeps what it has, says so once, and goes on when there is room."""
    server = serve()

    def no_room(self):
        raise RuntimeError("can't start new thread")

    with Raw(server) as before:
        monkeypatch.setattr(echoserver.threading.Thread, "start", no_room)
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as refused:
                assert refused.recv(1) == b""
        monkeypatch.undo()
        assert before.send(GOOD).frame() == whole(TEXT, b"good")
        with Raw(server) as after:
            assert after.send(GOOD).frame() == whole(TEXT, b"good")
    assert [record.getMessage() for record in caplog.records] == [
        "no room for another connection: can't start new thread; 1 stay, new ones wait"]


def test_out_of_files(serve, caplog):
    """A real limit: the server keeps what it has, waits without spinning, and accepts when there is room."""
    resource = pytest.importorskip("resource", reason="this system has no such limit")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = serve()
    with Raw(server) as before:
        with socket.socket() as free:
            lowest = free.fileno()  # the next file takes this number
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, limits[1]))
        try:
            with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as waiting:
                wait_for(lambda: caplog.records)
                used = time.process_time()
                assert before.send(GOOD).frame() == whole(TEXT, b"good")
                waiting.settimeout(0.2)
                with pytest.raises(socket.timeout):
                    waiting.recv(1)
                assert time.process_time() - used < 0.1
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                waiting.settimeout(PATIENCE)
                waiting.sendall(REQUEST)
                assert waiting.recv(12) == b"HTTP/1.1 101"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(caplog.records) == 1 and "Too many open files" in caplog.text


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="this system cannot share a port")
def test_reuse_port(serve, monkeypatch):
    server = serve(reuse_port=True)
    with EchoServer(port=server.port, host="127.0.0.1", reuse_port=True) as second:
        assert second.port == server.port
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    with pytest.raises(OSError, match="cannot share a port"):
        EchoServer(port=0, reuse_port=True)


@pytest.mark.parametrize("host, url, address", [
    ("0.0.0.0", "ws://127.0.0.1:", "127.0.0.1"), ("localhost", "ws://localhost:", "localhost"), ("", "ws://127.0.0.1:", "127.0.0.1"),
    ("::", "ws://[::1]:", "::1"), ("::", "ws://[::1]:", "127.0.0.1"), ("::1", "ws://[::1]:", "::1")])
def test_hosts(host, url, address):
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with EchoServer(0, host=host) as server:
        assert server.url == url + str(server.port)
        socket.create_connection((address, server.port)).close()
        client = websocket.create_connection(server.url, timeout=PATIENCE)
        client.send("hi")
        assert client.recv() == "hi"
        client.close()


@pytest.mark.parametrize("options, message", [
    ({"port": 70000}, "port must be from 0 to 65535, not 70000"), ({"max_clients": 0}, "max_clients must be"),
    ({"ping_interval": float("nan")}, "ping_interval must be"), ({"open_timeout": 0}, "open_timeout must be")])
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        EchoServer(**{"port": 0, **options})


def test_debug_output(serve, caplog):
    server = serve(debug=True)
    with contextlib.closing(websocket.create_connection(server.url, timeout=PATIENCE)) as client:
        for message in ("hi\n\x1b[31m\u202e", "x" * 1000):
            client.send(message)
            client.recv()
        client.send_binary(b"\0hi")
        client.recv()
    server.close()
    number = server.server.id_counter
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "Echoserver listening on port %d" % server.port
    assert re.fullmatch(r"newConnection: client 1 from 127.0.0.1 port \d+", lines[1]) and number == 1
    assert lines[2:] == [
        r"Message received: client 1: 'hi\n\x1b[31m\u202e' (9 characters)",
        "Message received: client 1: '%s' … '%s' (1000 characters)" % ("x" * 40, "x" * 20),
        r"Binary Message received: client 1: b'\x00hi' (3 bytes)", "socketDisconnected: client 1"]


def test_debug_output_where_logging_was_not_set_up(monkeypatch, capsys):
    monkeypatch.setattr(echoserver.logger, "hasHandlers", lambda: False)
    before = list(echoserver.logger.handlers)
    EchoServer(port=0, debug=True).close()
    (added,) = [handler for handler in echoserver.logger.handlers if handler not in before]
    echoserver.logger.removeHandler(added)
    assert "Echoserver listening on port" in capsys.readouterr().err


def test_no_attribute_of_a_server_that_could_not_be_made():
    assert not hasattr(EchoServer.__new__(EchoServer), "port")


# ==== Compression (RFC 7692) ===========================================================================

DEFLATE = "permessage-deflate"


@pytest.mark.parametrize("offers, answer", [
    ([DEFLATE], DEFLATE),
    ([DEFLATE + "; client_max_window_bits"], DEFLATE),
    ([DEFLATE + "; client_max_window_bits=10"], DEFLATE + "; client_max_window_bits=10"),
    ([DEFLATE + '; server_max_window_bits="9" ;server_no_context_takeover'],
     DEFLATE + "; server_max_window_bits=9; server_no_context_takeover"),
    ([DEFLATE + "; client_no_context_takeover; server_max_window_bits=8"],
     DEFLATE + "; client_no_context_takeover; server_max_window_bits=8"),
    (["x-unknown, " + DEFLATE + "; unknown, " + DEFLATE], DEFLATE),
    ([DEFLATE + "; server_max_window_bits=7", DEFLATE + "; client_no_context_takeover"], DEFLATE + "; client_no_context_takeover"),
    ([DEFLATE + "; server_max_window_bits"], None), ([DEFLATE + "; server_max_window_bits=16"], None),
    ([DEFLATE + "; server_max_window_bits=09"], None), ([DEFLATE + "; server_max_window_bits=9\""], None),
    ([DEFLATE + "; server_no_context_takeover=1"], None), ([DEFLATE + "; server_no_context_takeover" * 2], None),
    (['x-foo; y="a, %s, b"' % DEFLATE], None), ([DEFLATE + ";"], None), ([",, ;="], None), (["x-" + DEFLATE], None)])
def test_negotiation(serve, offers, answer):
    """An offer that cannot be taken is declined, and never fails the handshake."""
    with Raw(serve(), request(*(b"X: %d\r\nSec-WebSocket-Extensions: %s" % pair for pair in enumerate(map(str.encode, offers))))) as raw:
        found = re.search(b"Sec-WebSocket-Extensions: (.*)\r\n", raw.head)
        assert (found and found[1].decode()) == answer
        assert raw.send(GOOD).frame() == whole(TEXT, b"good")


def deflater(bits=15):
    stream = zlib.compressobj(wbits=-bits)
    return lambda payload: (stream.compress(payload) + stream.flush(zlib.Z_SYNC_FLUSH))[:-4]


@contextlib.contextmanager
def compressing(server, parameters=b""):
    with Raw(server, request(b"Sec-WebSocket-Extensions: permessage-deflate" + parameters)) as raw:
        yield raw


@BOTH
@pytest.mark.parametrize("parameters, forgets", [
    (b"", False), (b"; server_no_context_takeover; client_no_context_takeover", True),
    (b"; server_max_window_bits=8; client_max_window_bits=8", False)])
def test_compressed_messages(serve, kind, parameters, forgets):
    with compressing(serve(kind), parameters) as raw:
        assert raw.send(GOOD).frame() == whole(TEXT, b"good")  # a client that does not compress gets it plain
        deflate, inflater = deflater(9 if b"bits" in parameters else 15), zlib.decompressobj(-8 if b"bits" in parameters else -15)
        data = random.Random(3).getrandbits(8 * 3000).to_bytes(3000, "big")
        for payload in (b"", b"again and again", b"again and again", data * 2, b"x" * 200000, data[:600] * 100):
            if forgets:
                deflate, inflater = deflater(), zlib.decompressobj(-15)
            message = deflate(payload)
            cut = len(message) // 2
            raw.send(client_frame(BINARY, message[:cut], fin=False, rsv=4), client_frame(PING), client_frame(CONTINUATION, message[cut:]))
            assert raw.frame() == whole(PONG)
            flags, opcode, answer = raw.frame()
            assert (flags, opcode) == (0xC0, BINARY)
            assert inflater.decompress(answer + b"\0\0\xff\xff") == payload
        raw.send(client_frame(TEXT, deflate("é".encode()), rsv=4))
        assert raw.frame()[:2] == (0xC0, TEXT)


def test_a_client_that_never_compresses_costs_no_compressor(serve):
    server = serve()
    with compressing(server) as raw:
        raw.send(GOOD).frame()
        compression = server.clients[0]["handler"].compression
        assert compression._inflater is None and compression._deflater is None


def test_no_compression(serve):
    with compressing(serve(compression=False)) as raw:
        assert b"Sec-WebSocket-Extensions" not in raw.head
        assert close_code(raw.send(client_frame(TEXT, b"x", rsv=4)).frames()) == 1002


FINAL = zlib.compressobj(wbits=-15)
FINAL = FINAL.compress(b"Hello") + FINAL.flush()  # its last block has BFINAL set


@pytest.mark.parametrize("code, sent", [
    (1002, client_frame(PING, b"x", rsv=4)),
    (1002, client_frame(TEXT, b"\0", fin=False, rsv=4) + client_frame(CONTINUATION, b"\0", rsv=4)),
    (1007, client_frame(BINARY, b"\xff\xff\xff", rsv=4)),
    (1007, client_frame(TEXT, deflater()(b"caf\xe9 au lait") * 50, fin=False, rsv=4)),
    (1007, client_frame(BINARY, b"", rsv=4)), (1007, client_frame(BINARY, bytes.fromhex("f248cd"), rsv=4)),
    (1009, client_frame(BINARY, deflater()(b"\0" * 2**26), rsv=4)),
    (1009, client_frame(BINARY, deflater()(bytes(200)) + b"\0\0\xff\xff", fin=False, rsv=4)
     + client_frame(CONTINUATION, deflater()(bytes(200))))])
def test_compressed_violation(serve, code, sent):
    with compressing(serve(max_size=300)) as raw:
        frames = raw.send(GOOD, sent).frames()
        assert frames[0] == whole(TEXT, b"good") and close_code(frames) == code and len(frames) == 2


def test_a_bomb_never_gets_its_memory():
    bomb, compression = deflater()(b"\0" * 2**27), echoserver.PerMessageDeflate()
    tracemalloc = pytest.importorskip("tracemalloc")
    tracemalloc.start()
    try:
        with pytest.raises(echoserver.ProtocolError):
            list(echoserver.Receiver(2**20, compression).feed(client_frame(BINARY, bomb, rsv=4)))
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_block_with_bfinal(serve):
    """RFC 7692 section 7.2.3.4."""
    with compressing(serve()) as raw:
        for message in (FINAL + b"\0", FINAL + FINAL + b"\0", FINAL * 50 + b"\0"):
            assert raw.send(client_frame(TEXT, message, rsv=4)).frame()[:2] == (0xC0, TEXT)
        assert raw.send(client_frame(TEXT, bytes.fromhex("f248cdc9c90700"), rsv=4)).frame()[:2] == (0xC0, TEXT)


# ==== TLS ==============================================================================================

@pytest.fixture(scope="session")
def certificate():
    """The README's command makes a certificate: (certificate file, key file)."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl here to make a certificate with")
    (command,) = re.findall(r"^openssl req .*?[^\\]$", README, re.M | re.S)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, shell=True, cwd=folder, check=True, stderr=subprocess.DEVNULL)
        yield os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")


@pytest.fixture
def tls(certificate, serve):
    return lambda kind=EchoServer, **options: serve(kind, ssl_context=echoserver.tls_context(*certificate), **options)


def trusting(certificate):
    return ssl.create_default_context(cafile=certificate[0])


@BOTH
def test_tls(tls, certificate, kind):
    server = tls(kind)
    assert server.url.startswith("wss://")
    client = websocket.create_connection(server.url.replace("127.0.0.1", "localhost"), timeout=PATIENCE,
                                         sslopt={"ca_certs": certificate[0]})
    for message in ("hi", "x" * 70000, b"", b"y" * 2**20):
        (client.send if isinstance(message, str) else client.send_binary)(message)
        assert client.recv() == message
    client.close()
    with Raw(server, context=trusting(certificate)) as raw:
        assert close_code(raw.send(GOOD, client_frame(TEXT, b"\xff")).frames()) == 1007  # and a clean end, by close_notify
        assert raw.socket.version() in ("TLSv1.2", "TLSv1.3")


def test_tls_while_others_send(tls, certificate):
    """Other threads send while the connection's own receives and echoes; no record is torn."""
    server = tls()
    with Raw(server, context=trusting(certificate)) as raw:
        (client,) = server.clients
        threads = [threading.Thread(target=lambda: [server.send_message(client, b"z" * 40000) for _ in range(30)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        raw.send(*[client_frame(TEXT, b"a" * 2000)] * 50)
        got = [raw.frame() for _ in range(140)]
        for thread in threads:
            thread.join()
        assert got.count(whole(BINARY, b"z" * 40000)) == 90 and got.count(whole(TEXT, b"a" * 2000)) == 50


def test_openssl_s_client(tls):
    server = tls()
    process = subprocess.Popen(["openssl", "s_client", "-quiet", "-connect", "127.0.0.1:%d" % server.port], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with process:
        process.stdin.write(REQUEST + GOOD)
        process.stdin.flush()
        while process.stdout.readline() not in (b"\r\n", b""):
            pass
        assert process.stdout.read(6) == b"\x81\x04good"
        process.stdin.write(client_frame(CLOSE))
        process.stdin.flush()
        assert process.stdout.read(2) == b"\x88\x00"
        process.stdin.close()
        assert process.wait(PATIENCE) == 0


def test_clear_text_to_the_tls_port_is_dropped_quietly(tls, caplog):
    server = tls(Recorder)
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
        sock.sendall(REQUEST)
        assert b"HTTP" not in b"".join(iter(lambda: sock.recv(4096), b""))
    server.close()
    assert server.calls == [] and not caplog.records


def test_a_silent_tls_client_holds_up_nobody(tls, certificate):
    server = tls(open_timeout=0.3)
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as silent:
        with Raw(server, context=trusting(certificate)) as raw:
            assert raw.send(GOOD).frame() == whole(TEXT, b"good")
        assert silent.recv(1) == b""
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as half:
        half.sendall(b"\x16\x03\x01")
        half.shutdown(socket.SHUT_WR)
        assert b"HTTP" not in half.recv(100)


def test_a_context_for_clients_is_refused_at_once():
    with pytest.raises(ValueError, match="for a server"):
        EchoServer(port=0, ssl_context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


def test_tls_records_without_plaintext_do_not_outlast_a_close(tls, certificate):
    """In TLS 1.2 a request to renegotiate is refused with an alert, and never becomes plaintext."""
    context = trusting(certificate)
    server = tls(Recorder, close_timeout=0.3)
    with Raw(server, context=context) as raw:
        server.disconnect_clients_gracefully()
        assert raw.frame() == whole(CLOSE, struct.pack("!H", 1000))
        begin = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begin < PATIENCE:  # parts of a record, and so never any plaintext
                socket.socket.sendall(raw.socket, b"\x17\x03\x03\x40\0" if time.monotonic() == begin else b"\0")
                time.sleep(0.02)
        assert server.changed.wait(PATIENCE) and time.monotonic() - begin < 3


def test_tls_client_that_vanishes(tls, certificate):
    server = tls(Recorder)
    raw = Raw(server, context=trusting(certificate))
    raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()
    assert server.changed.wait(PATIENCE)
    with Raw(server, context=trusting(certificate)) as raw:
        socket.socket.sendall(raw.socket, b"this is no TLS record")
        with contextlib.suppress(OSError):
            raw.file.read()
    wait_for(lambda: len(server.calls) == 4)


# ==== The command line =================================================================================

def run(*arguments, **options):
    """Start the program; return its process and the line that it begins with."""
    process = subprocess.Popen([sys.executable, str(HERE / "echoserver.py"), *map(str, arguments)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, universal_newlines=True, **options)
    return process, process.stdout.readline()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_program(number):
    process, line = run(0, "--host", "127.0.0.1")
    with process:
        port = int(re.fullmatch(r"Echo server listening on 127.0.0.1 port (\d+): ws://127.0.0.1:\1 \(Ctrl-C stops it\)\n", line)[1])
        client = websocket.create_connection("ws://127.0.0.1:%d" % port, timeout=PATIENCE)
        client.send("hi")
        assert client.recv() == "hi"
        process.send_signal(number)
        assert client.recv_data() == (CLOSE, struct.pack("!H", 1001))
        client.shutdown()
        assert process.wait(PATIENCE) == 0 and process.communicate() == ("", "")


def test_a_second_signal_ends_the_program_at_once():
    process, line = run(0, "--host", "127.0.0.1")
    with process, socket.create_connection(("127.0.0.1", int(re.search(r"port (\d+)", line)[1])), PATIENCE) as sock:
        sock.sendall(REQUEST)
        sock.recv(4096)
        process.terminate()
        assert sock.recv(4096) == b"\x88\x02\x03\xe9"
        process.terminate()
        assert process.wait(2) == -signal.SIGTERM


def test_main(capsys, monkeypatch):
    """In this process, for the coverage: the signal comes when the start line does."""
    before, interval, made = signal.getsignal(signal.SIGTERM), sys.getswitchinterval(), []

    class Kept(EchoServer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    class Stdout(io.StringIO):
        def flush(self):
            if "Ctrl-C" in self.getvalue():
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(echoserver, "EchoServer", Kept)
    with contextlib.redirect_stdout(Stdout()):
        assert echoserver.main(["0", "--host", "127.0.0.1", "--no-compression"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before and sys.getswitchinterval() == interval
    assert made[0].switch_interval > 0 == echoserver.Server.switch_interval


@pytest.mark.parametrize("arguments, status, message", [
    (["port"], 2, "argument port: invalid int value: 'port'"), (["70000"], 2, "port must be from 0 to 65535, not 70000"),
    (["--max-size", "-1"], 2, "max_size must be"), (["--nonsense"], 2, "unrecognized arguments"),
    (["--ping-interval", "nan"], 2, "ping_interval must be"), (["--keyfile", "x"], 2, "--keyfile goes with --certfile"),
    (["0", "--host", "no.such.host.invalid"], 1, "cannot listen on no.such.host.invalid port 0"),
    (["0", "--host", "192.0.2.1"], 1, "choose an address of this machine"),
    (["PORT"], 1, "choose another port or stop the program that has this one"),
    (["0", "--certfile", "missing.pem"], 1, "cannot use the certificate in missing.pem: No such file or directory"),
    (["0", "--certfile", "CERT"], 1, "cannot use the certificate in"),
    (["0", "--certfile", "CERT", "--keyfile", "OTHER"], 1, "key values mismatch"),
    (["0", "--certfile", "CERT", "--keyfile", "ENCRYPTED"], 1, "not encrypted")])
def test_errors_are_one_line(request, capsys, serve, tmp_path, arguments, status, message):
    if "--certfile" in arguments and "CERT" in arguments:
        cert, key = request.getfixturevalue("certificate")
        other, encrypted = str(tmp_path / "other.pem"), str(tmp_path / "encrypted.pem")
        for command in (["genrsa", "-out", other, "2048"], ["rsa", "-aes128", "-passout", "pass:secret", "-in", key, "-out", encrypted]):
            subprocess.run(["openssl", *command], check=True, stderr=subprocess.DEVNULL)
        arguments = [{"CERT": cert, "OTHER": other, "ENCRYPTED": encrypted}.get(word, word) for word in arguments]
    arguments = [str(serve().port) if word == "PORT" else word for word in arguments]
    with pytest.raises(SystemExit) as ended:
        echoserver.main(arguments)
    assert ended.value.code == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("echoserver: error: ") and message in err and err.count("\n") == 1


def test_version_and_help(capsys):
    for option, text in (("--version", "echoserver " + echoserver.__version__), ("-h", "--ping-timeout")):
        with pytest.raises(SystemExit) as ended:
            echoserver.main([option])
        assert ended.value.code == 0 and text in capsys.readouterr().out


def test_file_limit(monkeypatch):
    resource = pytest.importorskip("resource")
    limits, tried = resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limits[1]), limits[1]))
    echoserver.raise_file_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    def refuse(_, wanted):
        tried.append(wanted[0])
        raise ValueError

    monkeypatch.setattr(resource, "setrlimit", refuse)
    echoserver.raise_file_limit()
    assert tried == [limits[1], 10240]
    monkeypatch.setitem(sys.modules, "resource", None)
    echoserver.raise_file_limit()


def test_importing_changes_nothing_and_debug_shows_something():
    """Not the host program's logging, signals, stack size or socket defaults."""
    script = textwrap.dedent("""
        import logging, signal, socket, sys, threading
        def state():
            return (logging.getLogger().handlers, logging.getLogger().level, logging.getLogger("websocket_server").level,
                    [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], threading.stack_size(),
                    socket.getdefaulttimeout(), threading.enumerate())
        before = state()
        import echoserver
        with echoserver.EchoServer(port=0, host="127.0.0.1"):
            pass
        assert state() == before, state()
        assert "numpy" not in sys.modules and "asyncio" not in sys.modules
        with echoserver.EchoServer(port=0, host="127.0.0.1", debug=True):
            pass
    """)
    done = subprocess.run([sys.executable, "-c", script], cwd=str(HERE), stderr=subprocess.PIPE, check=True)
    assert re.fullmatch(rb"Echoserver listening on port \d+\r?\n", done.stderr)


# ==== Limits and care ==================================================================================

def some_frames(rng, number):
    """Frames at random, mostly right: some mutated, cut off, or garbage altogether."""
    for _ in range(number):
        opcode = rng.choice([TEXT, TEXT, BINARY, BINARY, BINARY, CONTINUATION, PING, PONG, rng.randrange(16)])
        payload = bytes(rng.getrandbits(7 + (opcode != TEXT)) for _ in range(rng.choice([0, 1, 5, 40, 125, 126, 300])))
        data = client_frame(opcode, payload, fin=rng.random() < 0.9, rsv=rng.choice([0] * 30 + [4, 7]),
                            key=rng.getrandbits(32).to_bytes(4, "big"))
        chance = rng.random()
        if chance < 0.05:
            at = rng.randrange(len(data))
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1:]
        elif chance < 0.07:
            data = data[:rng.randrange(len(data))]
        yield data


def test_the_fast_path_takes_what_the_full_one_takes():
    """For mutated frames cut up at random: the same messages, then the same fault."""
    def outcome(chunks, fast):
        receiver, got = echoserver.Receiver(300), []
        try:
            for chunk in chunks:
                if fast and receiver.between_messages:
                    frames, used = echoserver.whole_frames(chunk, 300)
                    for header, payload in zip(frames[::2], frames[1::2]):
                        assert header == echoserver.frame_header(header[0] & 15, len(payload))
                        got.append((header[0] & 15, bytes(payload)))
                    chunk = chunk[used:]
                for opcode, pieces in receiver.feed(chunk):
                    got.append((opcode, b"".join(pieces)))
        except echoserver.ProtocolError as error:
            got.append(error.args[0])
        return got

    rng = random.Random(7)
    for _ in range(200 * SCALE):
        data = b"".join(some_frames(rng, 12))
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(4)))
        chunks = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]
        assert outcome(chunks, True) == outcome([data], False)


def resident():
    """This process's resident memory in bytes, 0 where the system does not show it."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def test_slow_openers_resets_and_random_frames(serve, caplog):
    """Through sockets: afterwards the server still echoes, with the threads and the memory that it had."""
    server, rng = serve(Recorder, max_clients=2000, max_size=1000, close_timeout=2), random.Random(11)
    reset = struct.pack("ii", 1, 0)
    before = 0
    for _ in range(2):  # what the first round takes is there to stay: caches and the allocator's reserve
        with contextlib.ExitStack() as stack:
            openers = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(100 * SCALE)]
            for sock in openers:
                sock.sendall(b"GET / HT")
            with Raw(server) as raw:
                assert raw.send(GOOD).frame() == whole(TEXT, b"good")
        for _ in range(100 * SCALE):
            with Raw(server) as raw:
                raw.send(GOOD[:7]).socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        for _ in range(250 * SCALE):
            with Raw(server) as raw, contextlib.suppress(OSError):
                raw.send(*some_frames(rng, 20)).socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        wait_for(lambda: not server.server._connections)
        with Raw(server) as raw:
            assert raw.send(GOOD).frame() == whole(TEXT, b"good")
        del server.messages[:], server.calls[:]
        gc.collect()
        growth, before = resident() - before, resident()
    assert growth < 2**23 and not caplog.records


def test_nothing_from_a_client_gets_into_an_answer_or_the_log(serve, caplog):
    """No line of its own making: neither in the headers of an answer nor in the debug output."""
    server = serve(debug=True)
    for field in (b"Sec-WebSocket-Protocol: a\x0bSet-Cookie: x", b"Sec-WebSocket-Protocol: a\x85b", b"Origin: a\x0ab"):
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
            sock.sendall(request(field))
            assert sock.recv(4096).startswith(b"HTTP/1.1 400 ")
    with Raw(server, request(b"User-Agent: \xe2\x80\xa8\x85 x")) as raw:
        raw.send(client_frame(TEXT, "a\r\n\u2028\x85b".encode())).frame()
    server.close()
    for record in caplog.records:
        assert len(record.getMessage().splitlines()) == 1


# ==== What must not show through from websocket-server 0.6.4 ===========================================

def echoing(server):
    """Let websocket-server's server echo and run, as its README does."""
    server.set_fn_message_received(lambda client, server, message: server.send_message(client, message))
    server.run_forever(threaded=True)
    return server


FAULTS = {}


def fault(check):
    FAULTS[check.__name__] = check
    return check


@fault
def binary_frames(start):
    """Its issue 32: they are dropped, and the stream is out of step from there on."""
    with Raw(start()) as raw:
        assert raw.send(client_frame(BINARY, b"\0\xff"), GOOD).frame() == whole(BINARY, b"\0\xff")
        assert raw.frame() == whole(TEXT, b"good")


@fault
def continuation_frames(start):
    with Raw(start()) as raw:
        raw.send(client_frame(TEXT, b"Hel", fin=False), client_frame(CONTINUATION, b"lo"))
        assert raw.frame() == whole(TEXT, b"Hello")


@fault
def long_messages_and_messages_partly_sent(start):
    """Its issues 103 and 89: with a socket timeout, socket.send() sends what fits and returns."""
    socket.setdefaulttimeout(5)
    try:
        with Raw(start()) as raw:
            message = b"long" * 2**21
            raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            raw.send(client_frame(TEXT, message, key=b"\0\0\0\0")).socket.settimeout(1)
            assert raw.frame() == whole(TEXT, message)
    finally:
        socket.setdefaulttimeout(None)


@fault
def the_list_of_clients_is_scanned_for_every_message(start):
    server = start()

    class Watched(dict):
        seen = []

        def __getitem__(self, key):
            self.seen.append(key)
            return super().__getitem__(key)

    with Raw(server) as first, Raw(server) as second:
        assert first.send(GOOD).frame() == second.send(GOOD).frame() == whole(TEXT, b"good")
        registered = getattr(server, "_clients", None)
        if registered is None:
            server.clients[0] = Watched(server.clients[0])
        else:
            registered[1] = Watched(registered[1])
        assert second.send(GOOD).frame() == whole(TEXT, b"good")
        assert Watched.seen == []


@fault
def freezing_in_send(start):
    """Its issue 77: a client that does not read stops everybody who sends to it, for ever."""
    echoserver.Server.send_timeout, before = 0.2, echoserver.Server.send_timeout
    try:
        server = start()
        with Raw(server):
            wait_for(lambda: server.clients)  # the bare package enters it after its answer
            (client,) = server.clients

            def send():
                with contextlib.suppress(OSError):
                    for _ in range(100):
                        server.send_message(client, "x" * 2**20)

            sending = threading.Thread(target=send, daemon=True)
            sending.start()
            sending.join(2)
            assert not sending.is_alive()
    finally:
        echoserver.Server.send_timeout = before


@fault
def pings_decoded_as_utf8(start):
    with Raw(start()) as raw:
        assert raw.send(client_frame(PING, b"\xff\xfe")).frame() == whole(PONG, b"\xff\xfe")


@fault
def pongs_decoded_as_utf8(start):
    with Raw(start()) as raw:
        assert raw.send(client_frame(PONG, b"\xff\xfe"), GOOD).frame() == whole(TEXT, b"good")


@fault
def no_close_reply(start):
    with Raw(start()) as raw:
        assert raw.send(client_frame(CLOSE, struct.pack("!H", 1000))).frames() == [whole(CLOSE, struct.pack("!H", 1000))]


@fault
def client_left_none(start):
    """Its issues 68 and 118: for what never became a client."""
    server, left = start(), []
    server.set_fn_client_left(lambda client, server: left.append(client))
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\n\r\n")
        while sock.recv(4096):
            pass
    with Raw(server) as raw:
        raw.send(client_frame(CLOSE)).file.read()
    wait_for(lambda: left)
    assert None not in left


@fault
def every_second_client_skipped_at_disconnect(start):
    """Its issue 116."""
    server = start()
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(Raw(server)) for _ in range(4)]
        server.disconnect_clients_abruptly()
        for raw in raws:
            raw.socket.settimeout(1)
            assert raw.frame() is None


@fault
def listen_queue_of_5(start):
    assert start().request_queue_size >= 1024


@fault
def tls_with_a_bad_certificate_falls_back_to_clear_text(start):
    if start is start_bare:
        server = start(key="missing.pem", cert="missing.pem")
        with pytest.raises(AssertionError), Raw(server):
            pass
    else:
        with pytest.raises(OSError):
            echoserver.tls_context("missing.pem")


@fault
def assertion_errors_for_a_bad_handshake(start):
    server = start()
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 405 ")


@fault
def unbounded_headers(start):
    server = start()
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
        sock.sendall(REQUEST[:-2] + b"X: %s\r\n\r\n" % (b"x" * 100000))
        assert sock.recv(12) == b"HTTP/1.1 431"


@fault
def unbounded_payloads(start):
    with Raw(start()) as raw:
        assert close_code(raw.send(client_frame(TEXT, length=b"\x7f" + struct.pack("!Q", 2**40))).frames()) == 1009


@fault
def nagles_delay(start):
    server = start()
    with Raw(server):
        wait_for(lambda: server.clients)
        (client,) = server.clients
        assert client["handler"].request.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@fault
def deadlock_of_shutdown(start):
    """In the thread that serves, or before it does, it waits for itself."""
    server = start(run=False)
    stopping = threading.Thread(target=server.shutdown, daemon=True)
    stopping.start()
    stopping.join(1)
    stopped = not stopping.is_alive()
    if not stopped:  # so that the test ends
        server.run_forever(threaded=True)
    assert stopped


def start_ours(run=True, **options):
    server = echoserver.Server("127.0.0.1", 0, **options)
    return echoing(server) if run else server


def start_bare(run=True, **options):
    server = WebsocketServer("127.0.0.1", 0, loglevel=logging.CRITICAL, **options)
    return echoing(server) if run else server


@pytest.mark.parametrize("start", [start_ours, pytest.param(start_bare, marks=pytest.mark.xfail(
    strict=True, raises=(AssertionError, OSError, pytest.fail.Exception), reason="the fault in the bare package"))])
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fault_of_websocket_server(start, name, monkeypatch, capsys):
    """Each check holds here and fails against the bare package (strictly: an unexpected success is a failure)."""
    monkeypatch.setattr(sys.modules[__name__], "PATIENCE", 1)
    started = []

    def keep(**options):
        started.append(start(**options))
        return started[-1]

    try:
        FAULTS[name](keep if name[:3] != "tls" else start)
    finally:
        for server in started:
            if start is start_bare:
                server.server_close()
                server._BaseServer__shutdown_request = True
            else:
                server.close()


# ==== The page =========================================================================================

def test_page(serve):
    """HTML that may load nothing from anywhere else; without content for HEAD."""
    server = serve()
    for method in ("GET", "HEAD"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, "/?x=1")
            answer = connection.getresponse()
            body = answer.read().decode()
            assert answer.status == 200 and answer.getheader("Content-Type") == "text/html; charset=utf-8"
            assert "default-src 'none'" in answer.getheader("Content-Security-Policy")
            assert body == ("" if method == "HEAD" else echoserver.PAGE + "\n")
            assert int(answer.getheader("Content-Length")) == len((echoserver.PAGE + "\n").encode())


FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-port=0 --ignore-certificate-errors""".split()


def poll(attempt, seconds, what):
    """Return what `attempt` returns, as soon as that is true."""
    deadline = time.monotonic() + seconds
    while True:
        result = attempt()
        if result:
            return result
        assert time.monotonic() < deadline, "waited %g s for %s" % (seconds, what() if callable(what) else what)
        time.sleep(0.02)


@contextlib.contextmanager
def chromium(url, program="chromium"):
    """Show the page in a Chromium of its own; end that, and remove its profile, whatever happens."""
    profile = tempfile.mkdtemp(prefix="drive-")
    process = subprocess.Popen([program, *FLAGS, "--user-data-dir=" + profile], start_new_session=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    page = None
    try:
        page = Page(profile, process, url)
        yield page
    finally:
        with contextlib.suppress(Exception):  # in peace if it can be
            page.call("Browser.close")
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own, which its helpers are in
        process.wait(10)
        poll(lambda: shutil.rmtree(profile, True) or not os.path.exists(profile), 10, "the profile's end")


class Page:
    """A page in Chromium, and what went wrong in it (`complaints`)."""

    def __init__(self, profile, process, url):
        port_file = pathlib.Path(profile, "DevToolsActivePort")

        def address():
            assert process.poll() is None, "chromium ended with status %s" % process.returncode
            return port_file.exists() and re.fullmatch(r"(\d+)\n(/\S+)", port_file.read_text())

        self.socket = websocket.create_connection(
            "ws://127.0.0.1:%s%s" % poll(address, 60, "chromium").groups(), timeout=60, suppress_origin=True)
        self.session, self.number, self.complaints = {}, 0, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(domain + ".enable")
        self.call("Page.navigate", url=url)
        self.wait("location.href != 'about:blank' && document.readyState == 'complete'")

    def call(self, method, **params):
        """Call a method of the DevTools protocol."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params, **self.session}))
        while True:
            message = json.loads(self.socket.recv())
            params = message.get("params", {})
            if message.get("id") == self.number:
                assert "error" not in message, "%s: %s" % (method, message["error"])
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.complaints.append(details.get("exception", {}).get("description") or details["text"])
            elif message.get("method") == "Log.entryAdded":  # a violation of the policy is one of these
                self.complaints.append(params["entry"]["text"])
            elif message.get("method") == "Runtime.consoleAPICalled":
                shown = [str(arg.get("value", arg.get("description"))) for arg in params["args"]]
                self.complaints.append(" ".join(shown))

    def evaluate(self, expression):
        """Return the value of an expression of JavaScript."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, "%s: %s" % (expression, result["exceptionDetails"])
        return result["result"].get("value")

    def wait(self, expression, seconds=30):
        """Wait until an expression is true."""
        def seen():
            return "%s; the page shows: %s" % (expression, self.evaluate("document.body && document.body.innerText"))
        return poll(lambda: self.evaluate("Boolean(%s)" % expression), seconds, seen)

    def text(self, selector):
        """Return the text of an element."""
        return self.evaluate("document.querySelector(%s).textContent" % json.dumps(selector))

    def wait_text(self, selector, pattern, seconds=30):
        """Wait until the text of an element has a match for a pattern (of JavaScript)."""
        self.wait("/%s/.test(document.querySelector(%s).textContent)" % (pattern, json.dumps(selector)), seconds)
        return self.text(selector)

    def type(self, selector, text):
        """Replace what an input has, and press Enter."""
        self.evaluate("document.querySelector(%s).select()" % json.dumps(selector))
        self.call("Input.insertText", text=text)
        self.press("Enter", "\r")

    def press(self, key, text=""):
        """Press a key."""
        code = {"Enter": 13, "Tab": 9, " ": 32}[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                      **({"text": text} if text and kind == "keyDown" else {}))

    def click(self, selector):
        """Click on the middle of an element, which must be visible there and not disabled."""
        box = self.evaluate("""(() => {
            const element = document.querySelector(%s);
            element.scrollIntoView({ block: "center" });
            const box = element.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
            return element.contains(document.elementFromPoint(x, y)) && !element.disabled && [x, y];
        })()""" % json.dumps(selector))
        assert box, selector + " cannot be clicked"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def choose(self, selector, path):
        """Choose a file in a file chooser."""
        chooser = self.call("Runtime.evaluate", expression="document.querySelector(%s)" % json.dumps(selector))
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=chooser["result"]["objectId"])


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no Chromium here")
@pytest.mark.parametrize("secure", [False, True])
def test_page_in_a_browser(request, secure):
    """Use each control of the page as a person would, over ws and wss; nothing may be complained about."""
    server = request.getfixturevalue("tls" if secure else "serve")(close_timeout=2)
    url = server.url.replace("ws", "http", 1) + "/"
    with chromium(url) as page, tempfile.NamedTemporaryFile(suffix=".bin") as file:
        assert page.text("title") == "Echo server"
        page.wait_text("#state", "^Connected")
        page.wait("!document.querySelector('#run').disabled")

        page.type("#text", "Grüße, <b>Welt</b> 🌍")
        page.wait_text("#log", r"in +text +25 B +[\d.]+ ms +.Grüße, <b>Welt<\/b> 🌍.*out +text +25 B")

        file.write(bytes(range(256)) * 400)
        file.flush()
        page.choose("#file", file.name)
        page.wait_text("#log", r"in +binary +102400 B +[\d.]+ ms +00 01 02 03.*out +binary +102400 B")

        page.click("#run")
        rate = float(page.wait_text("#rate", r"^\d+ messages\/s$", seconds=120).split()[0])
        page.wait("document.querySelector('#chart path').getAttribute('d').split('h0').length == 1001")
        page.wait("!document.querySelector('#run').disabled")
        assert rate > 10

        page.evaluate("document.querySelector('#close-reason').value = 'bye'")
        page.type("#close-code", "1001")  # a browser may not send that one
        assert not page.evaluate("document.querySelector('#connection').checkValidity()")
        page.wait_text("#state", "^Connected")
        page.type("#close-code", "4321")
        page.wait_text("#closed", r"^Closed: 4321 bye \(clean\)$")
        page.wait_text("#state", "^Not connected")
        assert page.evaluate("document.querySelector('#run').disabled && document.querySelector('#send').disabled")

        page.click("#connect")
        page.wait_text("#state", "^Connected")
        assert page.text("#closed") == ""
        page.evaluate("for (const id of ['run', 'connect']) document.getElementById(id).click()")  # closes during it
        page.wait_text("#rate", r"^Stopped after \d+ messages: the connection closed$")
        page.wait_text("#closed", "^Closed: 4321")
        page.click("#connect")
        page.wait("!document.querySelector('#run').disabled")
        page.type("#text", "again")
        page.wait_text("#log", r"in +text +5 B +[\d.]+ ms +.again.")

        page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
        page.wait("innerWidth == 360 && document.documentElement.scrollWidth == 360")
        assert page.complaints == [], page.complaints


# ==== The README =======================================================================================

def recipe(name):
    """The class of this name, as it stands in the README."""
    (source,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "class %s(" % name in block]
    namespace = {"EchoServer": EchoServer}
    exec(compile("import time\n" + source, "README.md", "exec"), namespace)
    return namespace[name]


def test_recipe_answer_after_a_delay(serve):
    with Raw(serve(recipe("Slow"))) as raw:
        begin = time.monotonic()
        assert raw.send(GOOD).frame() == whole(TEXT, b"good")
        assert 0.4 < time.monotonic() - begin < 5


def test_recipe_close_after_three_messages(serve):
    with Raw(serve(recipe("ThreeOnly"))) as raw:
        raw.send(GOOD, GOOD, GOOD, GOOD, client_frame(CLOSE))
        assert raw.frames() == [whole(TEXT, b"good")] * 3 + [whole(CLOSE, struct.pack("!H", 1011) + b"enough")]


def test_recipe_vanish_in_mid_frame(serve):
    with Raw(serve(recipe("Vanishing"))) as raw:
        assert raw.send(GOOD).file.read() == b"\x81\x05Hel"


def test_recipe_fragments_with_a_ping_between(serve):
    with Raw(serve(recipe("Fragments"))) as raw:
        raw.send(GOOD)
        assert [raw.frame() for _ in range(4)] == [
            (0, TEXT, b"go"), whole(PING, b"still there?"), (0, CONTINUATION, b"od"), whole(CONTINUATION)]


def test_recipe_chat(serve):
    server = serve(recipe("Chat"))
    with Raw(server) as one:
        assert one.frame() == whole(TEXT, b"1 joined")
        with Raw(server) as two:
            assert one.frame() == two.frame() == whole(TEXT, b"2 joined")
            two.send(GOOD)
            assert one.frame() == two.frame() == whole(TEXT, b"2: good")
        assert one.frame() == whole(TEXT, b"2 left")


def test_recipe_route_by_path(serve):
    server = serve(recipe("Routes"))
    for path, answer in ((b"/echo?x=1", whole(TEXT, b"good")), (b"/upper", whole(TEXT, b"GOOD")),
                         (b"/", whole(CLOSE, struct.pack("!H", 4404) + b"no such path"))):
        with Raw(server, request(line=b"GET %s HTTP/1.1" % path)) as raw:
            assert raw.send(GOOD).frame() == answer
            raw.send(client_frame(CLOSE)).frames()


def test_readme_in_a_program_and_as_a_fixture(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    (program,) = [block for block in blocks if "with EchoServer(port=0" in block and "fixture" not in block]
    (fixture,) = [block for block in blocks if "@pytest.fixture" in block]
    exec(compile(program, "README.md", "exec"), {})
    (tmp_path / "test_it.py").write_text(fixture)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=str(tmp_path), stdout=subprocess.PIPE,
                          env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0 and b"1 passed" in done.stdout, done.stdout


def test_readme_names_every_option(capsys):
    with pytest.raises(SystemExit):
        echoserver.main(["-h"])
    for option in re.findall(r"--[a-z-]+", capsys.readouterr().out):
        assert "`%s" % option in README or option in ("--help", "--version"), option


# ==== The benchmark ====================================================================================

BARE_TCP = """
import socket, sys, threading
def echo(connection):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while True:
        data = connection.recv(65536)
        if not data:
            return
        connection.sendall(data)
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(4096)
print("port", listener.getsockname()[1], flush=True)
while True:
    threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()
"""
PLAIN = """
from websocket_server import WebsocketServer
server = WebsocketServer(host="127.0.0.1", port=0)
server.set_fn_message_received(lambda client, server, message: server.send_message(client, message))
print("port", server.port, flush=True)
server.run_forever()
"""
CONTESTANTS = {"echoserver": [str(HERE / "echoserver.py"), "0", "--host", "127.0.0.1"],
               "websocket-server": ["-c", PLAIN], "bare TCP": ["-c", BARE_TCP]}
# name: (opcode, bytes, messages in flight, the figure)
WORKLOADS = {"ping-pong 32 B": (TEXT, 32, 1, "messages/s"), "pipelined 32 B": (TEXT, 32, 100, "messages/s"),
             "64 KiB binary": (BINARY, 65536, 1, "MB/s"), "1 MiB binary": (BINARY, 2**20, 1, "MB/s"),
             "1 MiB text": (TEXT, 2**20, 1, "MB/s")}


def rate(port, bare, opcode, size, depth, seconds=0.7):
    """Messages per second, each checked; None where the server does not echo."""
    payload = (b"abcdefghijklmnopqrstuvwxyz" * (size // 26 + 1))[:size]
    sent = client_frame(opcode, payload)
    expected = (sent if bare else echoserver.frame(opcode, payload)) * depth
    with socket.create_connection(("127.0.0.1", port), 3) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not bare:
            sock.sendall(REQUEST)
            sock.recv(4096)
        got, view = bytearray(len(expected)), None
        view, rounds, begin = memoryview(got), 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            sock.sendall(sent * depth)
            at = 0
            while at < len(got):
                received = sock.recv_into(view[at:])
                if not received:
                    return None
                at += received
            if got != expected:
                return None
            rounds += 1
        return rounds * depth / (time.perf_counter() - begin)


@benchmark
def test_benchmark(request):
    """Print this server's speed beside plain websocket-server's and bare TCP's, in one run, in turns."""
    if "benchmark" not in (request.config.option.markexpr or ""):
        pytest.skip("the benchmark runs with -m benchmark -s")
    results = {}
    for _ in range(3):
        for name, command in CONTESTANTS.items():
            with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=str(HERE)) as process:
                port = int(re.search(rb"port (\d+)", process.stdout.readline())[1])
                for title, (opcode, size, depth, _) in WORKLOADS.items():
                    with contextlib.suppress(OSError):
                        results.setdefault((title, name), []).append(rate(port, name == "bare TCP", opcode, size, depth))
                process.kill()
    print("\n%-16s" % "" + "".join("%28s" % name for name in CONTESTANTS))
    for title, (_, size, _, unit) in WORKLOADS.items():
        line = "%-16s" % title
        for name in CONTESTANTS:
            mine, bare = (sorted(filter(None, results.get((title, who), []))) for who in (name, "bare TCP"))
            figure = mine[len(mine) // 2] if mine else 0
            shown = figure if unit == "messages/s" else figure * size / 1e6
            line += "%28s" % ("%.0f %s (%.2f)" % (shown, unit, figure / bare[len(bare) // 2]) if mine else "does not echo it")
        print(line)
    print("(medians of 3; in brackets the ratio to bare TCP; the load is this Python process, which bounds them all)")
    assert results["ping-pong 32 B", "echoserver"]
