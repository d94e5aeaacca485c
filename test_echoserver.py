"""Tests of echoserver: through real sockets and a real client (websocket-client), and of the pure core with bytes.

    python -m pytest                # all of it, in under a minute

ECHOSERVER_TEST_SCALE=10 makes ten times as many random frames, resets and slow openers.
"""
import contextlib
import functools
import gc
import http.client
import importlib.util
import inspect
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
import types
import weakref
import zlib
from unittest import mock

import pytest
import websocket
from websocket_server import WebsocketServer

import echoserver
from echoserver import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, EchoServer, Server

# No thread may end with an exception, in no test.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

HERE = pathlib.Path(__file__).resolve().parent
README = (HERE / "README.md").read_text(encoding="utf-8")
PATIENCE = 10  # seconds after which a wait has failed; a passing test never waits that long
SCALE = int(os.environ.get("ECHOSERVER_TEST_SCALE", "1"))
KEY = b"\x37\xfa\x21\x3d"
REQUEST = (b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
           b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")


# ==== Tools ============================================================================================


def wait_for(condition, what="it", seconds=PATIENCE):
    """Wait until condition() is true, and return its value. The only wait by polling, for what sends no signal."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, "waited %g s for %s" % (seconds, what() if callable(what) else what)
        time.sleep(0.005)


def open_sockets():
    """The sockets of this process, where the system shows them."""
    found = set()
    with contextlib.suppress(OSError):
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink("/proc/self/fd/" + number))
    return {target for target in found if target.startswith("socket:")}


def serving():
    """The threads that serve connections."""
    return [thread for thread in threading.enumerate() if thread.name == "echoserver connection"]


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No thread and no socket outlives a test."""
    threads, sockets = set(threading.enumerate()), open_sockets()
    yield

    def all_closed():
        if not open_sockets() <= sockets:
            gc.collect()
        return open_sockets() <= sockets

    wait_for(lambda: set(threading.enumerate()) <= threads, lambda: "threads to end: %s" % threading.enumerate())
    wait_for(all_closed, "sockets to be closed")


@pytest.fixture
def serve():
    """A function that starts a server of any class, which is closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda kind=EchoServer, **options: stack.enter_context(kind(port=0, host="127.0.0.1", **options))


@contextlib.contextmanager
def real_client(url, **options):
    """A client of websocket-client's."""
    client = websocket.create_connection(url, timeout=PATIENCE, **options)
    try:
        yield client
    finally:
        client.close()
        client.shutdown()  # it leaves its socket open where the server's Close came first


def only_client(server):
    """The server's only client: its dictionary."""
    (client,) = wait_for(lambda: server.clients)
    return client


def connect(server):
    """A TCP connection to the server."""
    return socket.create_connection(("127.0.0.1", server.port), PATIENCE)


def read_all(sock):
    """Everything until the connection ends; a reset is an error."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def answer_to(server, sent):
    """Everything that the server answers to these bytes."""
    with connect(server) as sock:
        sock.sendall(sent)
        return read_all(sock)


def client_frame(opcode, payload=b"", fin=True, rsv=0, key=KEY, length=None, masked=True):
    """A frame from a client; built here apart from the server's code, and able to be wrong."""
    size = len(payload)
    if length is None:
        length = bytes([size]) if size < 126 else (
            b"\x7e" + struct.pack("!H", size) if size < 65536 else b"\x7f" + struct.pack("!Q", size))
    length = bytes([length[0] | 0x80 * masked]) + length[1:]
    if masked:
        payload = key + (payload if key == b"\0\0\0\0" else bytes(byte ^ key[i % 4] for i, byte in enumerate(payload)))
    return bytes([0x80 * fin | rsv << 4 | opcode]) + length + payload


def length64(size):
    """A length in 64 bits."""
    return b"\x7f" + struct.pack("!Q", size)


def status(code, reason=b""):
    """What a Close frame carries."""
    return struct.pack("!H", code) + reason


def client_close(code, reason=b""):
    """A Close frame from a client."""
    return client_frame(CLOSE, status(code, reason))


def whole(opcode, payload=b""):
    """A whole message or control frame, as Raw.frame() returns it."""
    return 0x80, opcode, payload


def closing(code, reason=b""):
    """A Close frame, as Raw.frame() returns it."""
    return whole(CLOSE, status(code, reason))


def close_code(frames):
    """The status code of the Close that must be the last frame."""
    assert frames and frames[-1][:2] == (0x80, CLOSE), frames
    return int.from_bytes(frames[-1][2][:2], "big")


GOOD, ECHO = client_frame(TEXT, b"good"), whole(TEXT, b"good")  # a message and its echo
FLOOD = client_frame(BINARY, b"x" * 65536, key=b"\0\0\0\0") * 8


class Raw:
    """A bare socket that has done the opening handshake, for what no client sends."""

    def __init__(self, server, request=REQUEST, early=b"", context=None, patience=PATIENCE):
        self.socket = socket.create_connection(("127.0.0.1", server.port), patience)
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

    def frames(self, number=None):
        """So many frames, or all until the connection ends; a reset is an error."""
        return list(iter(self.frame, None)) if number is None else [self.frame() for _ in range(number)]

    def echoes(self):
        """Whether a message comes back."""
        return self.send(GOOD).frame() == ECHO

    def fill(self):
        """Send, and read nothing, until the server takes no more."""
        self.socket.settimeout(0.2)
        with contextlib.suppress(OSError):
            while True:
                self.send(FLOOD)

    def reset(self):
        """Let the connection end by a reset when this is closed."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self):
        self.file.close()
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Recorder(EchoServer):
    """An echo server that keeps what it was called with."""

    def __init__(self, *args, **options):
        self.calls, self.messages, self.threads = [], [], set()
        self.changed = threading.Event()
        super().__init__(*args, **options)

    def new_client(self, client, server):
        super().new_client(client, server)
        self.threads.add(threading.get_ident())
        self.calls.append(("new", client["id"], client in server.clients))

    def message_received(self, client, server, message):
        self.messages.append(message)
        self.threads.add(threading.get_ident())
        super().message_received(client, server, message)

    def client_left(self, client, server):
        super().client_left(client, server)
        self.threads.add(threading.get_ident())
        self.calls.append(("left", client["id"], client in server.clients))
        self.changed.set()


def override(base=EchoServer, **methods):
    """A subclass with these methods."""
    return type("Override", (base,), methods)


def blocking(go_on):
    """A server that echoes a message and then waits for an event."""
    return override(message_received=lambda self, client, server, message: (
        server.send_message(client, message), go_on.wait(PATIENCE)))


def send_in_background(server, client, message):
    """Send a message from a thread of its own; return the thread."""
    thread = threading.Thread(target=server.send_message, args=(client, message), daemon=True)
    thread.start()
    return thread


def zeros(size, fin=True, opcode=BINARY):
    """A long frame from a client, made fast."""
    length = b"\x7e" + struct.pack("!H", size) if size < 65536 else b"\x7f" + struct.pack("!Q", size)
    return client_frame(opcode, fin=fin, length=length, key=b"\0\0\0\0") + bytes(size)


def first_bytes(port, sent):
    """The first bytes of the answer to a request, b"" if the connection ends without one."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.sendall(sent)
        return sock.recv(4096)


def python(script, *arguments, **options):
    """Run a script in an interpreter of its own, which finds the module; return what it did."""
    return subprocess.run([sys.executable, "-u", "-c", textwrap.dedent(script), *map(str, arguments)], cwd=str(HERE),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                          timeout=6 * PATIENCE, **options)


class Mute:
    """The least that a client's handler has to be for the list."""
    state = echoserver.State.OPEN


CAME_AND_LEFT = [("new", 1, True), ("left", 1, False)]
BOTH = pytest.mark.parametrize("kind", [EchoServer, Recorder])  # the fast path, and an override


# ==== The echo =========================================================================================

SIZES = [0, 1, 125, 126, 127, 255, 256, 511, 512, 1023, 1024, 65535, 65536, 130000, 2**20 + 3]


def noise(size, seed=1):
    """Random bytes, the same in every run."""
    return random.Random(seed).getrandbits(8 * size + 1).to_bytes(size + 1, "big")[1:]


@BOTH
@pytest.mark.parametrize("size", SIZES)
def test_text_and_binary_come_back(serve, kind, size):
    text, binary = ("a" * size)[:-2] + "é" * (size > 2), noise(size + 1)
    with real_client(serve(kind).url) as client:
        client.send(text)
        client.send_binary(binary)
        assert client.recv_data() == (TEXT, text.encode())
        assert client.recv_data() == (BINARY, binary)


def test_an_override_gets_str_and_bytes_of_every_size(serve):
    server = serve(Recorder)
    with Raw(server) as raw:
        for size in SIZES:
            half = size // 2
            raw.send(*(client_frame(opcode, b"x" * size, key=b"\0\0\0\0") for opcode in (TEXT, BINARY)),
                     client_frame(BINARY, b"x" * half, False, key=b"\0\0\0\0"),
                     client_frame(CONTINUATION, b"x" * (size - half), key=b"\0\0\0\0"))
            raw.frames(3)
        assert server.messages == [message for size in SIZES for message in ("x" * size, b"x" * size, b"x" * size)]
        assert [type(message) for message in server.messages] == [str, bytes, bytes] * len(SIZES)


def test_16_mib_come_back_and_nothing_longer(serve):
    with Raw(serve()) as raw:
        message = b"x" * 2**24
        assert raw.send(client_frame(BINARY, message, key=b"\0\0\0\0")).frame() == whole(BINARY, message)
        assert close_code(raw.send(client_frame(BINARY, length=length64(2**24 + 1))).frames()) == 1009


@BOTH
@pytest.mark.parametrize("chop", [1, 3, 1000])
def test_fragments_with_control_frames_between_them(serve, kind, chop):
    """However TCP cuts the bytes up, and wherever fragments end."""
    sent = b"".join([
        client_frame(TEXT, "Füße".encode()[:2], fin=False), client_frame(PING, b"\xff\0ping"),
        client_frame(CONTINUATION, "Füße".encode()[2:3], fin=False), client_frame(PONG, b"unasked"),
        client_frame(CONTINUATION, "Füße".encode()[3:]), client_frame(BINARY, b""), client_frame(TEXT, b"a" * 300),
        client_frame(BINARY, b"", fin=False), client_frame(CONTINUATION, b""),
        client_frame(BINARY, b"\xfe", fin=False), client_frame(CONTINUATION, b"\xff"),
        client_close(3000, "tschüß".encode())])
    with Raw(serve(kind)) as raw:
        for at in range(0, len(sent), chop):
            raw.send(sent[at:at + chop])
        assert raw.frames() == [
            whole(PONG, b"\xff\0ping"), whole(TEXT, "Füße".encode()), whole(BINARY), whole(TEXT, b"a" * 300),
            whole(BINARY), whole(BINARY, b"\xfe\xff"), closing(3000, "tschüß".encode())]


def test_many_messages_in_one_write_come_back_in_order(serve):
    messages = [(TEXT if i % 2 else BINARY, b"%d" % i * (i % 90)) for i in range(500)]
    messages[250] = PING, b"half"
    with Raw(serve(), early=client_frame(*messages[0])) as raw:  # it may come with the request
        raw.send(*(client_frame(*message, key=os.urandom(4)) for message in messages[1:]), client_frame(CLOSE))
        messages[250] = PONG, b"half"
        assert raw.frames() == [*(whole(*message) for message in messages), whole(CLOSE)]


@pytest.mark.parametrize("looks", [0, 64])
def test_ping_pong_with_and_without_looking(serve, looks):
    server = serve(override(looks=looks))
    with Raw(server) as raw:
        assert all(raw.echoes() for _ in range(100))
        with Raw(server) as other:
            assert all(raw.echoes() and other.echoes() for _ in range(40))


# ==== What fails the connection ========================================================================

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
    "64-bit length below 65536": (1002, client_frame(BINARY, b"x" * 9, length=length64(65535))),
    "64-bit length with its highest bit": (1002, client_frame(BINARY, length=b"\x7f" + b"\xff" * 8)),
    "Close of 1 byte": (1002, client_frame(CLOSE, b"\x03")),
    "Close with a reason that is not UTF-8": (1007, client_close(1000, b"\xff")),
    "text that is not UTF-8": (1007, client_frame(TEXT, b"caf\xe9")),
    "long text that is not UTF-8": (1007, client_frame(TEXT, b"caf\xe9" * 50)),
    "text that ends too early": (1007, client_frame(TEXT, b"\xc3")),
    "a surrogate": (1007, client_frame(TEXT, b"\xed\xa0\x80")),
    "half a surrogate": (1007, client_frame(TEXT, b"a\xed\xa0", fin=False)),
    "wrong text in mid-frame": (1007, client_frame(TEXT, b"a\xffb" + b"c" * 200)[:12]),
    "wrong text in mid-fragment": (1007, client_frame(TEXT, "é".encode(), fin=False)
                                   + client_frame(CONTINUATION, b"\xc3(", fin=False)),
    "too long by its header": (1009, client_frame(BINARY, length=length64(2**62))[:10]),
    "too long in fragments": (1009, client_frame(BINARY, b"x" * 200, fin=False) + client_frame(CONTINUATION, b"x" * 101)),
    **{"Close with code %d" % code: (1002, client_close(code))
       for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535)},
}


@BOTH
@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_gets_its_close_code(serve, kind, name):
    """What was valid is echoed first; then comes the right Close, and the end without a reset."""
    code, sent = VIOLATIONS[name]
    with Raw(serve(kind, max_size=300)) as raw:
        frames = raw.send(GOOD, sent).frames()
        assert frames[0] == ECHO and len(frames) == 2
        assert close_code(frames) == code


@pytest.mark.parametrize("payload", [b"", *map(status, (1000, 1003, 1007, 1014, 3000, 4999))])
def test_a_close_is_answered_with_its_code(serve, payload):
    with Raw(serve()) as raw:
        assert raw.send(client_frame(CLOSE, payload), GOOD).frames() == [whole(CLOSE, payload)]


def test_max_size_bounds_short_messages_too(serve):
    with Raw(serve(max_size=4)) as raw:
        frames = raw.send(GOOD, client_frame(TEXT, b"toolong")).frames()
        assert frames[0] == ECHO and close_code(frames) == 1009


# ==== The pure core ====================================================================================

def masked(data, key):
    """Section 5.3, as it is written."""
    return bytes(byte ^ key[i % 4] for i, byte in enumerate(data))


UNMASK_SIZES = [0, 1, 2, 3, 4, 5, 255, 256, 511, 512, 513, 1023, 1024, 1025, 1026, 1027, 20000]


@pytest.mark.parametrize("missing", [None, "ctypes"])
def test_unmask_does_what_the_rfc_defines(monkeypatch, missing):
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)  # no interpreter without it can be had for a test
    echoserver.xor_in_c.cache_clear()
    assert not missing or echoserver.xor_in_c() is None
    for size in UNMASK_SIZES:
        for key in (KEY, b"\0\0\0\0", b"\xff\0\x80\x01"):
            data = noise(size)
            assert echoserver.unmask(masked(data, key), key) == echoserver.unmask(memoryview(masked(data, key)), key) == data
    echoserver.xor_in_c.cache_clear()


@pytest.mark.parametrize("size, header", [
    (0, b"\x82\0"), (125, b"\x82\x7d"), (126, b"\x82\x7e\0\x7e"), (65535, b"\x82\x7e\xff\xff"),
    (65536, b"\x82\x7f\0\0\0\0\0\1\0\0")])
def test_a_frame_has_its_length_in_the_fewest_bytes(size, header):
    assert echoserver.frame_header(BINARY, size) == header


@pytest.mark.parametrize("code, reason, error", [
    (1005, "", ValueError), (1006, "", ValueError), (1015, "", ValueError), (999, "", ValueError), (5000, "", ValueError),
    (1000, "x" * 124, ValueError), (1000, "é" * 62, ValueError), (1000, b"\xff", UnicodeDecodeError)])
def test_what_a_close_frame_may_not_carry(code, reason, error):
    with pytest.raises(error):
        echoserver.close_payload(code, reason)


def test_a_request_is_taken_when_its_last_byte_is_here():
    assert [echoserver.parse_request(REQUEST[:size]) for size in range(len(REQUEST))] == [None] * len(REQUEST)
    request, rest = echoserver.parse_request(REQUEST + GOOD)
    assert (request.method, request.path, request.headers["host"], rest) == ("GET", "/", "localhost", GOOD)


def test_one_byte_fragments_take_no_more_memory_than_their_message():
    tracemalloc = pytest.importorskip("tracemalloc")
    receiver, fragments = echoserver.Receiver(2**20), client_frame(CONTINUATION, b"y", fin=False) * 50
    list(receiver.feed(client_frame(BINARY, b"x", fin=False)))
    tracemalloc.start()
    try:
        for _ in range(400):
            assert not list(receiver.feed(fragments))
        assert tracemalloc.get_traced_memory()[0] < 50000  # for 20,000 bytes
    finally:
        tracemalloc.stop()


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


# ==== The opening handshake ============================================================================

def opening(*changes, line=b"GET / HTTP/1.1"):
    """The request with fields (b"Name: value") put in place of those of the same name; b"Name" takes one out."""
    fields = dict(field.split(b": ", 1) for field in REQUEST.split(b"\r\n")[1:-2])
    extra = []
    for change in changes:
        name, colon, value = change.partition(b": ")
        fields.pop(name, None)
        if colon:
            extra.append(change)
    return b"\r\n".join([line, *(b": ".join(field) for field in fields.items()), *extra, b"", b""])


def offering(*offers):
    """The request with these fields Sec-WebSocket-Extensions."""
    return opening(*(b"X: %d\r\nSec-WebSocket-Extensions: %s" % (i, offer.encode()) for i, offer in enumerate(offers)))


REFUSALS = {
    "POST": (405, opening(line=b"POST / HTTP/1.1"), b"Allow: GET"),
    "garbage": (400, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03 a TLS handshake", b""),
    "lines without CR": (400, b"GET / HTTP/1.1\nHost: a\n\n", b""),
    "request line": (400, opening(line=b"GET /"), b""),
    "fragment in the path": (400, opening(line=b"GET /#x HTTP/1.1"), b""),
    "HTTP/2": (400, opening(line=b"PRI * HTTP/2.0"), b""),
    "HTTP/1.0": (400, opening(line=b"GET / HTTP/1.0"), b""),
    "malformed field": (400, opening(b"Bad Name: x"), b""),
    "folded field": (400, opening(b" folded: x"), b""),
    "control character": (400, opening(b"X: a\0b"), b""),
    "cut off": (400, REQUEST[:-2], b""),
    "HTTP/2, by its preface": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b""),
    "asterisk": (400, opening(line=b"GET * HTTP/1.1"), b""),
    "NUL in the authority": (400, opening(line=b"GET http://a\0/ HTTP/1.1"), b""),
    "invalid Host": (400, opening(b"Host: a b/../@:x"), b""),
    "no Host": (400, opening(b"Host"), b""),
    "two Hosts": (400, opening(b"X: y\r\nHost: other"), b""),
    "HEAD elsewhere": (426, b"HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n", b"Upgrade: websocket"),
    "a body": (400, opening(b"Content-Length: 5"), b""),
    "a chunked body": (400, opening(b"Transfer-Encoding: chunked"), b""),
    "no Connection: Upgrade": (400, opening(b"Connection: close"), b""),
    "no key": (400, opening(b"Sec-WebSocket-Key"), b""),
    "short key": (400, opening(b"Sec-WebSocket-Key: c2hvcnQ="), b""),
    "two keys": (400, opening(b"X: y\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="), b""),
    "version 8": (426, opening(b"Sec-WebSocket-Version: 8"), b"Sec-WebSocket-Version: 13"),
    "no version": (426, opening(b"Sec-WebSocket-Version"), b"Sec-WebSocket-Version: 13"),
    "plain HTTP": (426, b"GET /favicon.ico HTTP/1.1\r\nHost: a\r\n\r\n", b"Upgrade: websocket"),
    "bad subprotocol": (400, opening(b"Sec-WebSocket-Protocol: chat, a b"), b""),
    "empty subprotocol": (400, opening(b"Sec-WebSocket-Protocol: "), b""),
    "other origin": (403, opening(b"Origin: http://evil.example"), b""),
    "origin null": (403, opening(b"Origin: null"), b""),
    "malformed origin": (403, opening(b"Origin: http://good.example:x"), b""),
    "101 fields": (431, opening(*(b"X: %d" % i for i in range(101))), b""),
    "16 KiB and more": (431, REQUEST[:-2] + b"X: " + b"x" * 16384, b""),
    **{"extensions " + offer: (400, offering(offer), b"") for offer in (
        "", "@@@", ",, ;=", "foo bar", "permessage-deflate;", "permessage-deflate; server_max_window_bits=9\"",
        'a="x, permessage-deflate', r'x; v="a\", permessage-deflate, b"', 'x-foo; y="a, permessage-deflate, b"')},
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_opening_handshake_gets_a_complete_http_answer(serve, name):
    """Then comes the end; and the connection never was a client."""
    code, sent, field = REFUSALS[name]
    server = serve(Recorder, origin=["http://good.example"])
    with connect(server) as sock:
        sock.sendall(sent)
        if name == "cut off":
            sock.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(sock, method=sent[:4].strip().decode("latin-1"))
        response.begin()
        body = response.read()
        assert (response.status, response.getheader("Connection").split(",")[0]) == (code, "close")
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
def test_a_good_opening_handshake_is_accepted(serve, changes, line):
    with Raw(serve(origin="http://good.example"), opening(*changes, line=line)) as raw:
        assert raw.head.startswith(b"HTTP/1.1 101 ") and b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in raw.head


def test_the_client_dictionary(serve):
    server = serve()
    with Raw(server, opening(b"Sec-WebSocket-Protocol: chat, superchat", b"User-Agent: a", b"X-Two: 1\r\nx-two: 2",
                             line=b"GET /room?x=1 HTTP/1.1")) as raw:
        assert b"Sec-WebSocket-Protocol: chat\r\n" in raw.head
        client = only_client(server)
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
    with connect(serve(open_timeout=0.3)) as sock:
        begin = time.monotonic()
        sock.settimeout(0.05)
        answer = b""
        while not answer:
            with contextlib.suppress(socket.timeout):
                sock.sendall(b"G")
                answer = sock.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 ") and 0.25 < time.monotonic() - begin < 3


@pytest.mark.parametrize("sent", [b"", REQUEST[:9], REQUEST])
def test_a_client_that_is_gone_before_the_101_never_was_one(serve, caplog, sent):
    accepted = []

    def verify_request(self, request, _):
        request.shutdown(socket.SHUT_WR)
        return not accepted.append(request)

    server = serve(override(Recorder, verify_request=verify_request))
    with connect(server) as sock:
        sock.sendall(sent)
    wait_for(lambda: accepted and not serving())
    assert server.calls == [] and server.clients == [] and not caplog.records


def test_a_fault_before_there_is_a_client_ends_its_connection_only(serve, caplog):
    server = serve()
    with Raw(server) as before:
        server.open_timeout = None
        assert answer_to(server, REQUEST)[:9] in (b"", b"HTTP/1.1 ")  # no frame to one that is no client
        wait_for(lambda: "client None" in caplog.text)
        assert before.echoes()


@pytest.mark.skipif(not hasattr(socket, "TCP_CORK"), reason="this system cannot hold the 101 back")
def test_a_client_that_has_its_101_is_on_the_list(serve):
    server = serve(override(new_client=lambda *args: time.sleep(0.03) or EchoServer.new_client(*args)))
    for _ in range(5):
        with Raw(server) as raw:
            assert [client["address"] for client in server.clients] == [raw.socket.getsockname()]
            raw.send(client_frame(CLOSE)).frames()


# ==== The life of a connection =========================================================================

def test_callbacks_come_in_order_and_in_the_connections_own_thread(serve):
    server = serve(Recorder)
    with real_client(server.url) as client:
        assert only_client(server)["id"] == 1
        client.send("hi")
        assert client.recv() == "hi"
        client.close()
        assert server.clients == []  # a client that was sent a Close is on no list
    assert server.changed.wait(PATIENCE)
    assert server.calls == CAME_AND_LEFT and server.messages == ["hi"]
    assert len(server.threads) == 1 and threading.get_ident() not in server.threads


@pytest.mark.parametrize("first, act, after", [
    ("client", lambda handler: None, echoserver.OPEN), ("server", lambda handler: handler.send_close(), echoserver.CLOSING),
    (None, lambda handler: handler.abort(), echoserver.CLOSED)])
def test_a_connection_has_the_states_of_the_rfc_and_knows_who_closed_first(serve, first, act, after):
    seen = []

    def look(self, client, server, *message):
        seen.append(client["handler"].state)
        if message:
            act(client["handler"])
            seen.append(client["handler"].state)

    server = serve(override(message_received=look, client_left=look))
    assert echoserver.Connection.state is echoserver.CONNECTING
    with Raw(server) as raw:
        handler = only_client(server)["handler"]
        raw.send(GOOD, client_frame(CLOSE)).frames()
    wait_for(lambda: not serving())
    assert seen == [echoserver.OPEN, after, max(after, echoserver.CLOSING)]
    assert (handler.state, handler.closed_first) == (echoserver.CLOSED, first)


@pytest.mark.parametrize("how", ["reset", "end", "end in mid-frame", "half-close", "unread", "reset while it is busy",
                                 "reset after a silence"])
def test_a_client_that_leaves_without_a_close(serve, caplog, how):
    server = serve(Recorder, ping_interval=0.03 if "silence" in how else 20)
    with Raw(server) as raw:
        raw.send(GOOD)
        if how != "unread":
            assert raw.frame() == ECHO
        if "silence" in how:
            assert raw.frame() == whole(PING)
        if how == "end in mid-frame":
            raw.send(GOOD[:4])
        if how == "reset while it is busy":
            assert all(raw.echoes() for _ in range(100))
        if how.startswith("reset"):
            raw.reset()
        if how == "half-close":
            raw.send(GOOD, GOOD).socket.shutdown(socket.SHUT_WR)
            assert raw.frames() == [ECHO, ECHO]
    assert server.changed.wait(PATIENCE)
    assert server.calls == CAME_AND_LEFT and not caplog.records


def test_a_silent_client_is_pinged_and_dropped_and_any_traffic_is_a_sign_of_life(serve):
    server = serve(Recorder, ping_interval=0.1, ping_timeout=0.2)
    with Raw(server) as lively, Raw(server) as silent:
        for _ in range(6):
            assert lively.frame() == whole(PING)
            lively.send(client_frame(PONG))
        assert [frame for frame in silent.frames() if frame != whole(PING)] == [closing(1011, b"no answer to a Ping")]
        assert server.changed.wait(PATIENCE) and only_client(server)["id"] == 1


@pytest.mark.parametrize("interval, timeout, close", [(0.25, 0.2, 0.15), (0.2, 0.19, 5), (0.2, 0.2, 0.19), (0.1, 0.3, 0.2)])
def test_the_ping_and_the_end_come_in_time(serve, interval, timeout, close):
    """Also where the times are no multiples of each other."""
    with Raw(serve(ping_interval=interval, ping_timeout=timeout, close_timeout=close)) as raw:
        begin = time.monotonic()
        assert raw.frame() == whole(PING)
        pinged = time.monotonic()
        assert close_code(raw.frames()) == 1011
        ended = time.monotonic()
        assert -0.02 < pinged - begin - interval < 0.5 and -0.02 < ended - pinged - timeout < 0.5


def test_pings_without_a_timeout_drop_nobody(serve):
    with Raw(serve(ping_interval=0.03, ping_timeout=0)) as raw:
        assert raw.frames(4) == [whole(PING)] * 4
        assert raw.send(GOOD).frame() == ECHO


@pytest.mark.parametrize("name", ["new_client", "message_received", "client_left"])
def test_an_exception_in_an_override_ends_its_own_connection_only(serve, caplog, name):
    """It is logged with its traceback, its client gets Close 1011, and the others notice nothing."""
    def fail(self, client, server, *message):
        if client["id"] == 2:
            raise ConnectionError("on purpose")
        getattr(Recorder, name)(self, client, server, *message)

    server = serve(override(Recorder, **{name: fail}))
    with Raw(server) as good, Raw(server) as bad:
        frames = bad.send(GOOD, GOOD, client_frame(CLOSE)).frames()
        if name == "client_left":
            assert frames == [ECHO, ECHO, whole(CLOSE)]
        else:
            assert close_code(frames) == 1011 and len(frames) == 1
        assert good.echoes()
    server.close()
    (record,) = caplog.records
    assert "client 2" in record.getMessage() and "on purpose" in caplog.text and "Traceback" in caplog.text


@pytest.mark.parametrize("name", ["message_received", "client_left"])
def test_sys_exit_in_an_override_leaks_nothing(serve, caplog, name):
    server = serve(override(**{name: lambda *_: sys.exit()}), max_clients=1)
    for _ in range(3):  # each has the place of the one before it
        with Raw(server) as raw:
            raw.send(GOOD, client_frame(CLOSE)).frames()
        wait_for(lambda: not serving())
    assert caplog.text.count("\nSystemExit") == 3


def test_what_an_override_sends_is_on_the_wire_before_it_blocks(serve):
    go_on = threading.Event()

    with Raw(serve(blocking(go_on))) as raw:
        assert raw.send(GOOD, GOOD).frame() == ECHO
        go_on.set()
        assert raw.frame() == ECHO


def run_together(*functions):
    """Start a thread for each function; return what waits for their end."""
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    return lambda: [thread.join() for thread in threads]


def test_frames_from_many_threads_are_not_torn(serve):
    server = serve()
    with Raw(server) as raw:
        client = only_client(server)
        payloads = [bytes([65 + i]) * size for i, size in enumerate((1, 300, 70000, 200000))]
        join = run_together(*(lambda p=p: [server.send_message(client, p) for _ in range(50)] for p in payloads))
        got = raw.frames(50 * len(payloads))
        join()
        assert sorted(got) == sorted([whole(BINARY, p) for p in payloads] * 50)


def test_a_handler_sends_by_hand(serve):
    server = serve()
    with Raw(server) as raw:
        client = only_client(server)
        handler = client["handler"]

        def between():
            yield "é"
            handler.send_ping(b"?")
            with pytest.raises(RuntimeError, match="5.4"):
                handler.send_message("no")
            yield "!"

        assert handler.send_message("a") and handler.send_text(b"b") and handler.send_ping(b"c")
        assert handler.send_pong("d")
        assert handler.send_message(bytearray(b"e")) and handler.send_fragments(between()) and handler.send_fragments([])
        assert handler.send_fragments([b"f"]) and handler.send_frame(BINARY, b"g", fin=False)
        assert raw.frames(13) == [
            whole(TEXT, b"a"), whole(TEXT, b"b"), whole(PING, b"c"), whole(PONG, b"d"), whole(BINARY, b"e"),
            (0, TEXT, "é".encode()), whole(PING, b"?"), (0, CONTINUATION, b"!"), whole(CONTINUATION), whole(BINARY),
            (0, BINARY, b"f"), whole(CONTINUATION), (0, BINARY, b"g")]
        for wrong, error in ((lambda: server.send_message(client, 5), TypeError), (lambda: handler.send_ping(b"x" * 126), ValueError),
                             (lambda: handler.send_close(1005), ValueError),
                             (lambda: server.send_message(client, "\ud800"), UnicodeEncodeError)):
            with pytest.raises(error):
                wrong()
        with pytest.raises(TypeError):
            handler.send_fragments(["text", b"binary"])
        assert raw.frames(2) == [(0, TEXT, b"text"), closing(1011, b"internal error")]
        assert raw.send(client_frame(CLOSE)).frames() == []
        assert not handler.send_message("late") and not handler.send_close() and not server.send_message(client, "late")


@pytest.mark.parametrize("last_words", [b"", b"\x81\x7e"])
def test_abort_cuts_the_connection_after_its_last_words(serve, last_words):
    def rude(self, client, server, message):
        Recorder.message_received(self, client, server, message)
        client["handler"].abort(last_words)

    server = serve(override(Recorder, message_received=rude))
    with Raw(server) as raw:
        assert raw.send(GOOD, GOOD).frame() == ECHO
        assert raw.file.read() == last_words
    assert server.changed.wait(PATIENCE) and server.messages == ["good"]


def test_nothing_is_taken_after_a_close_was_sent(serve):
    def enough(self, client, server, message):
        Recorder.message_received(self, client, server, message)
        client["handler"].send_close(3333, "enough")

    server = serve(override(Recorder, message_received=enough))
    with Raw(server) as raw:
        handler = only_client(server)["handler"]
        assert raw.send(GOOD, GOOD, client_frame(PING)).frames(2) == [ECHO, closing(3333, b"enough")]
        assert server.clients == server.open_clients == []
        raw.send(GOOD)
        handler.abort(b"late")
        assert raw.frames() == [] and server.messages == ["good"]


def test_the_fast_path_answers_nothing_after_a_close(serve):
    server = serve()
    with Raw(server) as raw:
        server.disconnect_clients_gracefully()
        assert raw.frame() == closing(1000)
        assert raw.send(GOOD, client_frame(CLOSE)).frames() == []


@BOTH
def test_a_close_that_is_not_answered_ends_after_close_timeout(serve, kind):
    server = serve(kind, close_timeout=0.2)
    with Raw(server) as raw:
        begin = time.monotonic()
        server.disconnect_clients_gracefully(4000, b"bye")
        assert raw.frames() == [closing(4000, b"bye")] and time.monotonic() - begin < 3
        wait_for(lambda: not serving())


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


def test_a_client_that_does_not_read_is_dropped_and_holds_back_nobody(serve):
    server = serve(Recorder, send_timeout=0.3)
    with Raw(server) as stuck, Raw(server) as other:
        stuck.fill()
        assert other.echoes()
        assert server.changed.wait(PATIENCE) and only_client(server)["id"] == 2


def test_a_connection_that_is_over_is_not_kept(serve):
    server = serve(Recorder)
    with Raw(server) as raw:
        assert raw.echoes()
        kept = weakref.ref(only_client(server)["handler"])
    wait_for(lambda: [gc.collect()] and kept() is None, "the connection to be freed")


def test_fragments_without_an_end_end_with_the_connection(serve):
    server = serve(override(message_received=lambda self, client, *_: client["handler"].send_fragments(
        "x" for _ in iter(int, 1))))
    with Raw(server) as raw:
        assert raw.send(GOOD).frame() == (0, TEXT, b"x")
        raw.reset()
    wait_for(lambda: not serving())


def test_fragments_that_do_not_come_hold_up_nobody(serve):
    """An iterator that waits in another thread keeps only its own connection from being closed in order."""
    go_on = threading.Event()
    server = serve(close_timeout=0.2)
    with Raw(server) as raw:
        handler = only_client(server)["handler"]

        def pieces():
            yield "first"
            go_on.wait(PATIENCE)
            yield "second"

        join = run_together(lambda: handler.send_fragments(pieces()))
        assert raw.frame() == (0, TEXT, b"first")
        handler.abort()
        assert raw.frames() == []
        server.close()
        wait_for(lambda: not serving())
        go_on.set()
        join()


# ==== The life of the server ===========================================================================

def test_close_sends_1001_to_all_and_leaves_nothing(serve):
    server = serve(Recorder)
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(Raw(server)) for _ in range(20)]
        join = run_together(server.close)
        for raw in raws:
            assert raw.frame() == closing(1001)
            assert raw.send(client_close(1001)).frames() == []
        join()
        assert server.closed.is_set() and server.clients == [] and len(server.calls) == 40
        server.close()
        with pytest.raises(ConnectionError):
            connect(server)
        with pytest.raises(RuntimeError, match="make a new one"):
            server.serve_forever()
        with pytest.raises(RuntimeError, match="make a new one"):
            server.start()


def test_close_cuts_who_does_not_answer_in_time(serve, caplog):
    """Silent, opening, and stuck in a send: all are gone when close() returns, and it returns in time."""
    server = serve(close_timeout=2)
    with Raw(server), Raw(server) as stuck, connect(server):
        stuck.fill()
        begin = time.monotonic()
        server.close()
        assert 1 < time.monotonic() - begin < 2 and not caplog.records and not serving()


def test_close_in_an_override_waits_for_all_but_its_own_thread(serve):
    """A second call waits for the first, but not where that would wait for it."""
    server = serve(override(message_received=lambda self, client, server, message: (self.close(4001, message), self.close()),
                            client_left=lambda self, *_: self.close()))
    with Raw(server) as one, Raw(server) as other:
        one.send(GOOD)
        for raw in (one, other):
            assert raw.frame() == closing(4001, b"good")
            raw.send(client_frame(CLOSE))
        assert one.frames() == other.frames() == []
        assert server.closed.wait(PATIENCE)


def test_a_later_close_waits_for_what_an_earlier_one_in_an_override_could_not(serve):
    server = serve(override(message_received=lambda self, *_: self.close()), close_timeout=0.5)
    with Raw(server) as raw:
        assert raw.send(GOOD).frame() == closing(1001)
        server.close()
        assert not serving()


def test_an_override_that_does_not_return_is_left_behind(serve, caplog):
    go_on = threading.Event()
    server = serve(blocking(go_on), close_timeout=0.1)
    with Raw(server) as raw:
        assert raw.echoes()
        server.close()
        assert [r.getMessage() for r in caplog.records] == ["closed, but threads that have not ended: 1"]
        go_on.set()


def test_start_and_close_come_in_any_order():
    never = EchoServer(port=0)
    never.close()
    assert never.closed.is_set()
    twice = EchoServer(port=0, host="127.0.0.1")
    twice.run_forever(threaded=True)
    with twice, Raw(twice) as raw:
        twice.shutdown_abruptly()
        assert raw.frames() == [] and twice.closed.is_set()
    with pytest.raises(ValueError):
        twice.close(1006)
    for _ in range(50):  # closed while its thread begins
        at_once = EchoServer(port=0, host="127.0.0.1")
        at_once.start()
        at_once.close()
        assert at_once.closed.is_set()


def test_stop_closes_a_server_in_the_background(serve):
    server = serve()
    with Raw(server) as raw:
        server.stop()
        assert raw.frame() == closing(1001)
        raw.send(client_frame(CLOSE)).frames()
    assert server.closed.wait(PATIENCE)


@pytest.mark.parametrize("poll_interval", [None, 0])
def test_serving_is_no_busy_loop(caplog, poll_interval):
    with contextlib.closing(EchoServer(port=0, ping_interval=0.02)) as server:
        join = run_together(lambda: server.serve_forever(poll_interval))
        before = time.process_time()
        time.sleep(0.1)
        assert time.process_time() - before < 0.08
        Raw(server).close()
    join()
    assert not caplog.records


def test_serve_forever_returns_when_all_is_closed():
    server = EchoServer(port=0, host="127.0.0.1")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with Raw(server) as raw:
        join = run_together(server.close)
        assert raw.frame() == closing(1001)
        assert thread.is_alive()
    thread.join(PATIENCE)
    join()
    assert server.closed.is_set() and not thread.is_alive()


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < max(2, os.cpu_count() or 0)
                    or not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="there is nothing to choose here")
@pytest.mark.parametrize("secure", [False, True])
def test_one_processor_holds_the_threads_that_do_not_encrypt(certificate, secure):
    def where(self, client, server, message):
        server.send_message(client, "%d" % len(os.sched_getaffinity(0)))

    def serve():
        with echoserver.one_processor() as server.processors:
            server.serve_forever()

    before = os.sched_getaffinity(0)
    context = echoserver.tls_context(*certificate) if secure else None
    server = override(message_received=where)(port=0, host="127.0.0.1", ssl_context=context)
    thread = threading.Thread(target=serve)
    thread.start()
    with contextlib.closing(server), Raw(server, context=trusting(certificate) if secure else None) as raw:
        assert raw.send(GOOD).frame() == whole(TEXT, b"%d" % (os.cpu_count() if secure else 1))
        assert os.sched_getaffinity(0) == before
    thread.join()


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < max(2, os.cpu_count() or 0)
                    or not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="there is nothing to choose here")
def test_a_process_takes_a_processor_that_no_other_has():
    def claim(number):
        with contextlib.suppress(OSError):
            name.bind("\0echoserver on processor %d" % number)
            return True

    free = []
    for number in sorted(os.sched_getaffinity(0)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as name:
            free += [number] * bool(claim(number))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as name:
        taken = free[:1] if free and claim(free[0]) else []
        process, _ = run(0, "--host", "127.0.0.1")
        with process:
            (place,) = os.sched_getaffinity(process.pid)
            process.terminate()
    assert place in free[1:] or len(free) < 2, (place, taken, free)


def test_handle_request_serves_one_connection():
    """socketserver's method, without serve_forever()."""
    with contextlib.closing(EchoServer(port=0, host="127.0.0.1")) as server:
        join = run_together(server.handle_request)
        with Raw(server) as raw:
            assert raw.echoes()
            connection = only_client(server)["handler"].connection
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        join()


def test_what_accept_may_do_does_not_end_the_server(serve):
    """On macOS a connection that is gone already has no address."""
    class Strange(EchoServer):
        def get_request(self):
            return super().get_request()[0], None

        def verify_request(self, request, client_address):
            if not self.id_counter:
                self.id_counter = 1
                raise ValueError("on purpose")
            return True

    server = serve(Strange)
    with connect(server) as first:
        assert first.recv(1) == b""
    with Raw(server) as second:
        assert second.echoes() and only_client(server)["address"] == ("", 0)


def test_the_interface_of_websocket_server(serve):
    server = serve(Recorder)
    with Raw(server) as one, Raw(server) as two:
        server.send_message_to_all("all")
        assert one.frame() == two.frame() == whole(TEXT, b"all")
        server.set_fn_message_received(lambda client, server, message: server.send_message(client, message[::-1]))
        assert one.send(GOOD).frame() == whole(TEXT, b"doog")
        server.deny_new_connections(1013, b"later")
        with Raw(server) as denied:
            assert denied.frames() == [closing(1013, b"later")]
        server.allow_new_connections()
        server.disconnect_clients_gracefully()
        for raw in (one, two):
            assert raw.frame() == closing(1000)
            assert raw.send(client_frame(CLOSE)).frames() == []
        with Raw(server) as three:
            server.disconnect_clients_abruptly()
            assert three.frames() == []
        with Raw(server) as four:
            join = run_together(lambda: server.shutdown_gracefully(1012, b"back soon"))
            assert four.frame() == closing(1012, b"back soon")
            assert four.send(client_frame(CLOSE)).frames() == []
            join()
    server.close()
    assert len(server.calls) == 8


def test_run_forever_returns_at_ctrl_c():
    def interrupt(self, request, client_address):
        request.close()
        raise KeyboardInterrupt

    server = override(process_request=interrupt)(port=0, host="127.0.0.1")
    connect(server).close()
    server.run_forever()
    assert server.closed.is_set()


def test_over_max_clients_there_is_503(serve):
    """Those in their opening handshake count; one that is gone leaves room at once."""
    server = serve(max_clients=2)
    with Raw(server) as one, connect(server):
        wait_for(lambda: len(serving()) == 2)
        answer = answer_to(server, REQUEST)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"\r\nRetry-After: 5\r\n" in answer
        assert one.send(client_frame(CLOSE)).frame() == whole(CLOSE)
        with Raw(server) as third:
            assert third.echoes()


def test_a_connection_that_was_not_let_in_frees_no_place(serve):
    refusing = []
    server = serve(override(verify_request=lambda *_: not refusing), max_clients=1)
    refusing.append(True)
    for _ in range(3):
        with connect(server) as sock:
            assert sock.recv(1) == b""
    refusing.clear()
    with Raw(server) as raw:
        assert answer_to(server, REQUEST).startswith(b"HTTP/1.1 503 ") and raw.echoes()


def test_far_over_max_clients_connections_are_dropped(serve):
    server = serve(override(spare_threads=0), max_clients=1)
    with Raw(server), connect(server) as second:
        assert second.recv(1) == b""


def test_out_of_threads_the_server_keeps_what_it_has(serve, caplog):
    """It says so once, and goes on when there is room."""
    server = serve()
    with Raw(server) as before:
        size = threading.stack_size(2**46)  # more than there is
        try:
            for _ in range(3):
                with connect(server) as refused:
                    assert refused.recv(1) == b""
        finally:
            threading.stack_size(size)
        assert before.echoes()
        with Raw(server) as after:
            assert after.echoes()
    assert [record.getMessage() for record in caplog.records] == [
        "no room for another connection: can't start new thread; 1 stay, new ones wait"]


def test_out_of_files_the_server_keeps_what_it_has(serve, caplog):
    """It waits without spinning, and accepts when there is room."""
    resource = pytest.importorskip("resource", reason="this system has no such limit")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = serve()
    with Raw(server) as before:
        with socket.socket() as free:
            lowest = free.fileno()  # the next file takes this number
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, limits[1]))
        try:
            with connect(server) as waiting:
                wait_for(lambda: caplog.records)
                used = time.process_time()
                assert before.echoes()
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


needs_reuse_port = pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="this system cannot share a port")


@needs_reuse_port
def test_two_servers_share_a_port_where_the_system_can(serve, monkeypatch):
    server = serve(reuse_port=True)
    with EchoServer(port=server.port, host="127.0.0.1", reuse_port=True) as second:
        assert second.port == server.port
    monkeypatch.delattr(socket, "SO_REUSEPORT")  # as on Windows
    with pytest.raises(OSError, match="cannot share a port"):
        EchoServer(port=0, reuse_port=True)


def has_ipv6():
    """Whether this machine can listen on ::1."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            return not sock.bind(("::1", 0))
    except OSError:
        return False


@pytest.mark.parametrize("host, url, address", [
    ("0.0.0.0", "ws://127.0.0.1:", "127.0.0.1"), ("localhost", "ws://localhost:", "localhost"), ("", "ws://127.0.0.1:", "127.0.0.1"),
    ("::", "ws://[::1]:", "::1"), ("::", "ws://[::1]:", "127.0.0.1"), ("::1", "ws://[::1]:", "::1")])
def test_the_server_listens_on_its_host(host, url, address):
    if ":" in host and not has_ipv6():
        pytest.skip("no IPv6 here")
    with EchoServer(0, host=host) as server:
        assert server.url == url + str(server.port)
        socket.create_connection((address, server.port)).close()
        with real_client(server.url) as client:
            client.send("hi")
            assert client.recv() == "hi"


@pytest.mark.parametrize("options, error, message", [
    ({"port": 70000}, ValueError, "port must be from 0 to 65535, not 70000"), ({"max_clients": 0}, ValueError, "max_clients must be"),
    ({"ping_interval": float("nan")}, ValueError, "ping_interval must be"), ({"open_timeout": 0}, ValueError, "open_timeout must be"),
    ({"send_timeout": -1}, ValueError, "send_timeout must be"), ({"max_pending": -1}, ValueError, "max_pending must be"),
    ({"ssl_context": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}, ValueError, "for a server"), ({"max_sise": 5}, TypeError, "'max_sise'"),
    ({"origin": "https://example.org/path"}, ValueError, "origin")])
def test_bad_options_are_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        EchoServer(**{"port": 0, **options})


def test_debug_output_has_a_line_for_each_event(serve, caplog):
    server = serve(debug=True)
    with real_client(server.url) as client:
        for message in ("hi\n\x1b[31m\u202e", "x" * 1000):
            client.send(message)
            client.recv()
        client.send_binary(b"\0hi")
        client.recv()
    server.close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "Echoserver listening on port %d" % server.port
    assert re.fullmatch(r"newConnection: client 1 from 127.0.0.1 port \d+", lines[1]) and server.id_counter == 1
    assert lines[2:] == [
        r"Message received: client 1: 'hi\n\x1b[31m\u202e' (9 characters)",
        "Message received: client 1: '%s' … '%s' (1000 characters)" % ("x" * 40, "x" * 20),
        r"Binary Message received: client 1: b'\x00hi' (3 bytes)", "socketDisconnected: client 1"]


def test_debug_output_goes_to_stderr_where_logging_was_not_set_up(capsys):
    logger = logging.getLogger("echoserver")
    before = list(logger.handlers)
    logger.propagate = False  # away from pytest's handlers, which are at the root
    try:
        EchoServer(port=0, debug=True).close()
    finally:
        logger.propagate, logger.handlers[:] = True, before
    assert "Echoserver listening on port" in capsys.readouterr().err


# ==== Compression (RFC 7692) ===========================================================================

DEFLATE = "permessage-deflate"
compressed = functools.partial(client_frame, rsv=4)


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
    (["x-foo; y=\"a\\b\" , , " + DEFLATE + " , ,"], DEFLATE),
    ([DEFLATE + "; server_max_window_bits"], None), ([DEFLATE + "; server_max_window_bits=16"], None),
    ([DEFLATE + "; server_max_window_bits=09"], None), ([DEFLATE + "; server_no_context_takeover=1"], None),
    ([DEFLATE + "; server_no_context_takeover" * 2], None), (["x-" + DEFLATE], None), (["x; y=" + DEFLATE], None)])
def test_an_offer_is_taken_or_declined(serve, offers, answer):
    """One that cannot be taken is declined; only one that does not fit the ABNF fails the handshake."""
    with Raw(serve(), offering(*offers)) as raw:
        found = re.search(b"Sec-WebSocket-Extensions: (.*)\r\n", raw.head)
        assert (found and found[1].decode()) == answer
        assert raw.echoes()


def deflater(bits=15):
    stream = zlib.compressobj(wbits=-bits)
    return lambda payload: (stream.compress(payload) + stream.flush(zlib.Z_SYNC_FLUSH))[:-4]


def compressing(server, parameters=""):
    """A client that has agreed on compression."""
    return Raw(server, offering(DEFLATE + parameters))


@BOTH
@pytest.mark.parametrize("parameters, bits", [
    ("", 15), ("; server_no_context_takeover; client_no_context_takeover", 15),
    ("; server_max_window_bits=8; client_max_window_bits=8", 8)])
def test_compressed_messages_come_back_compressed(serve, kind, parameters, bits):
    with compressing(serve(kind), parameters) as raw:
        assert raw.echoes()  # a client that does not compress gets it plain
        deflate, inflater = deflater(max(9, bits)), zlib.decompressobj(-bits)
        data = noise(3000)
        for payload in (b"", b"again and again", b"again and again", data * 2, b"x" * 200000, data[:600] * 100):
            if "no_context" in parameters:
                deflate, inflater = deflater(), zlib.decompressobj(-15)
            message = deflate(payload)
            cut = len(message) // 2
            raw.send(compressed(BINARY, message[:cut], fin=False), client_frame(PING), client_frame(CONTINUATION, message[cut:]))
            assert raw.frame() == whole(PONG)
            flags, opcode, answer = raw.frame()
            assert (flags, opcode) == (0xC0, BINARY)
            assert inflater.decompress(answer + b"\0\0\xff\xff") == payload
        assert raw.send(compressed(TEXT, deflate("é".encode()))).frame()[:2] == (0xC0, TEXT)


def test_a_client_that_never_compresses_costs_no_compressor(serve):
    tracemalloc = pytest.importorskip("tracemalloc")
    server, number = serve(), 10
    tracemalloc.start()
    try:
        with contextlib.ExitStack() as stack:
            raws = [stack.enter_context(compressing(server)) for _ in range(number)]
            assert all(raw.echoes() for raw in raws)
            plain = tracemalloc.get_traced_memory()[0]
            assert all(raw.send(compressed(TEXT, deflater()(b"hi"))).frame() for raw in raws)
            growth = (tracemalloc.get_traced_memory()[0] - plain) / number
            assert growth > 2**15  # a window and more, which it did not have before
    finally:
        tracemalloc.stop()


def test_no_compression_declines_every_offer(serve):
    with compressing(serve(compression=False)) as raw:
        assert b"Sec-WebSocket-Extensions" not in raw.head
        assert close_code(raw.send(compressed(TEXT, b"x")).frames()) == 1002


@pytest.mark.parametrize("code, sent", [
    (1002, compressed(PING, b"x")), (1002, compressed(TEXT, b"\0", fin=False) + compressed(CONTINUATION, b"\0")),
    (1007, compressed(BINARY, b"\xff\xff\xff")), (1007, compressed(TEXT, deflater()(b"caf\xe9 au lait") * 50, fin=False)),
    (1007, compressed(BINARY, b"")), (1007, compressed(BINARY, bytes.fromhex("f248cd"))),
    (1009, compressed(BINARY, deflater()(b"\0" * 2**26))),
    (1009, compressed(BINARY, deflater()(bytes(200)) + b"\0\0\xff\xff", fin=False)
     + client_frame(CONTINUATION, deflater()(bytes(200))))])
def test_a_violation_in_compressed_messages_gets_its_close_code(serve, code, sent):
    with compressing(serve(max_size=300)) as raw:
        frames = raw.send(GOOD, sent).frames()
        assert frames[0] == ECHO and close_code(frames) == code and len(frames) == 2


def test_a_bomb_never_gets_its_memory():
    tracemalloc = pytest.importorskip("tracemalloc")
    bomb = compressed(BINARY, deflater()(b"\0" * 2**27))
    tracemalloc.start()
    try:
        with pytest.raises(echoserver.ProtocolError):
            list(echoserver.Receiver(2**20, echoserver.PerMessageDeflate({})).feed(bomb))
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_a_block_with_bfinal_is_taken(serve):
    """RFC 7692 section 7.2.3.4."""
    stream = zlib.compressobj(wbits=-15)
    final = stream.compress(b"Hello") + stream.flush()
    with compressing(serve()) as raw:
        for message in (final + b"\0", final + final + b"\0", final * 50 + b"\0", bytes.fromhex("f248cdc9c90700")):
            assert raw.send(compressed(TEXT, message)).frame()[:2] == (0xC0, TEXT)


# ==== TLS ==============================================================================================

@pytest.fixture(scope="session")
def certificate():
    """README's command makes a certificate: (certificate file, key file)."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl here to make a certificate with")
    (command,) = re.findall(r"^openssl req .*?[^\\]$", README, re.M | re.S)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, shell=True, cwd=folder, check=True, stderr=subprocess.DEVNULL)
        yield os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")


@pytest.fixture
def tls(certificate, serve):
    """Like `serve`, for wss://."""
    return lambda kind=EchoServer, **options: serve(kind, ssl_context=echoserver.tls_context(*certificate), **options)


def trusting(certificate):
    """A client's context that trusts the certificate."""
    return ssl.create_default_context(cafile=certificate[0])


@BOTH
def test_tls_echoes(tls, certificate, kind):
    server = tls(kind)
    assert server.url.startswith("wss://")
    with real_client(server.url.replace("127.0.0.1", "localhost"), sslopt={"ca_certs": certificate[0]}) as client:
        for message in ("hi", "x" * 70000, b"", b"y" * 2**20):
            (client.send if isinstance(message, str) else client.send_binary)(message)
            assert client.recv() == message
    with Raw(server, context=trusting(certificate)) as raw:
        assert close_code(raw.send(GOOD, client_frame(TEXT, b"\xff")).frames()) == 1007  # and a clean end, by close_notify
        assert raw.socket.version() in ("TLSv1.2", "TLSv1.3")


def test_tls_records_are_not_torn_while_others_send(tls, certificate):
    server = tls()
    with Raw(server, context=trusting(certificate)) as raw:
        client = only_client(server)
        join = run_together(*[lambda: [server.send_message(client, b"z" * 40000) for _ in range(30)]] * 3)
        raw.send(*[client_frame(TEXT, b"a" * 2000)] * 50)
        got = raw.frames(140)
        join()
        assert got.count(whole(BINARY, b"z" * 40000)) == 90 and got.count(whole(TEXT, b"a" * 2000)) == 50


def test_openssl_s_client_is_served(tls):
    done = subprocess.run(["openssl", "s_client", "-quiet", "-connect", "127.0.0.1:%d" % tls().port], timeout=PATIENCE,
                          input=REQUEST + GOOD + client_frame(CLOSE), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert done.returncode == 0 and done.stdout.endswith(b"\r\n\r\n\x81\x04good\x88\0")


def test_clear_text_to_the_tls_port_is_dropped_quietly(tls, caplog):
    server = tls(Recorder)
    assert b"HTTP" not in answer_to(server, REQUEST)
    server.close()
    assert server.calls == [] and not caplog.records


def test_a_silent_tls_client_holds_up_nobody(tls, certificate):
    server = tls(open_timeout=0.3)
    with connect(server) as silent:
        with Raw(server, context=trusting(certificate)) as raw:
            assert raw.echoes()
        assert silent.recv(1) == b""
    with connect(server) as half:
        half.sendall(b"\x16\x03\x01")
        half.shutdown(socket.SHUT_WR)
        assert b"HTTP" not in half.recv(100)


def test_tls_records_without_plaintext_do_not_outlast_a_close(tls, certificate):
    """Parts of a record never become plaintext."""
    server = tls(Recorder, close_timeout=0.3)
    with Raw(server, context=trusting(certificate)) as raw:
        server.disconnect_clients_gracefully()
        assert raw.frame() == closing(1000)
        begin = time.monotonic()
        with contextlib.suppress(OSError):
            part = b"\x17\x03\x03\x40\0"
            while time.monotonic() - begin < PATIENCE:
                socket.socket.sendall(raw.socket, part)
                time.sleep(0.02)
                part = b"\0"
        assert server.changed.wait(PATIENCE) and time.monotonic() - begin < 3


def test_a_tls_client_that_vanishes_or_sends_no_records(tls, certificate):
    server = tls(Recorder)
    with Raw(server, context=trusting(certificate)) as raw:
        raw.reset()
    assert server.changed.wait(PATIENCE)
    with Raw(server, context=trusting(certificate)) as raw:
        socket.socket.sendall(raw.socket, b"this is no TLS record")
        with contextlib.suppress(OSError):
            raw.file.read()
    wait_for(lambda: len(server.calls) == 4)


# ==== The command line =================================================================================

def run(*arguments, **options):
    """Start the program; return its process and the line that it begins with."""
    return start_python(str(HERE / "echoserver.py"), *map(str, arguments), **options)


def start_python(*arguments, **options):
    """Start Python; return its process and the first line that it prints."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=str(HERE),
                               universal_newlines=True, **options)
    return process, process.stdout.readline()


@contextlib.contextmanager
def program(*arguments, start=run):
    """The running program, with `process.line` and `process.port`; killed if it has not ended by itself."""
    process, line = start(*arguments)
    with process:
        try:
            process.line, process.port = line, int(re.search(r"port (\d+)", line)[1])
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_program_with_1001_and_status_0(number):
    with program(0, "--host", "127.0.0.1") as process:
        assert process.line == "Echo server listening on 127.0.0.1 port %d: ws://127.0.0.1:%d (Ctrl-C stops it)\n" % (
            process.port, process.port)
        with Raw(process) as raw:
            assert raw.echoes()
            process.send_signal(number)
            assert raw.frame() == closing(1001)
            assert raw.send(client_close(1001)).frames() == []
        assert process.wait(PATIENCE) == 0 and process.communicate() == ("", "")


def test_a_second_signal_ends_the_program_at_once():
    with program(0, "--host", "127.0.0.1") as process, Raw(process) as raw:
        process.terminate()
        assert raw.frame() == closing(1001)
        process.terminate()
        assert process.wait(2) == -signal.SIGTERM


@pytest.mark.parametrize("number, last_lines", [
    (signal.SIGTERM, "signal.signal(signal.SIGTERM, lambda *_: server.stop()); say(); server.serve_forever()"),
    (signal.SIGINT, "signal.signal(signal.SIGINT, signal.default_int_handler); say(); server.run_forever()")])
def test_a_script_of_ones_own_ends_in_order(number, last_lines):
    """By stop() in its own signal handler, or by Ctrl-C in run_forever()."""
    script = textwrap.dedent("""
        import signal
        from echoserver import EchoServer
        server = EchoServer(port=0, host="127.0.0.1")
        def say():
            print("port", server.port, flush=True)
        %s
        assert server.closed.is_set()
    """) % last_lines
    with program("-c", script, start=start_python) as process, Raw(process) as raw:
        assert raw.echoes()
        process.send_signal(number)
        assert raw.frame() == closing(1001)
        assert raw.send(client_close(1001)).frames() == []
        assert process.wait(PATIENCE) == 0 and process.communicate() == ("", "")


@needs_reuse_port
def test_two_processes_share_the_load_of_a_port():
    clients, shares = 60, []
    with program(0, "-d", "--host", "127.0.0.1", "--reuse-port") as one, \
            program(one.port, "-d", "--host", "127.0.0.1", "--reuse-port") as two, contextlib.ExitStack() as stack:
        raws = [stack.enter_context(Raw(one)) for _ in range(clients)]
        for i in range(5):
            message = b"%d" % i * 1000
            for raw in raws:
                raw.send(client_frame(TEXT, message))
            assert [raw.frame() for raw in raws] == [whole(TEXT, message)] * clients
        for raw in raws:
            assert raw.send(client_frame(CLOSE)).frames() == [whole(CLOSE)]
        for process in (one, two):
            process.terminate()
            shares.append(process.communicate(timeout=PATIENCE)[1].count("newConnection"))
    assert sum(shares) == clients and all(shares)


def test_main_leaves_the_process_as_it_was(capsys):
    """In this process; the signal comes when the start line does."""
    def state():
        return (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sys.getswitchinterval(),
                getattr(os, "sched_getaffinity", id)(0))

    class Stdout(io.StringIO):
        def flush(self):
            if "Ctrl-C" in self.getvalue():
                self.truncate(0)
                os.kill(os.getpid(), signal.SIGTERM)

    before = state()
    with contextlib.redirect_stdout(Stdout()):
        assert echoserver.main(["0", "--host", "127.0.0.1", "--no-compression"]) == 0
    assert state() == before


@pytest.mark.parametrize("arguments, code, message", [
    (["port"], 2, "argument port: invalid int value: 'port'"), (["70000"], 2, "port must be from 0 to 65535, not 70000"),
    (["--max-size", "-1"], 2, "max_size must be"), (["--nonsense"], 2, "unrecognized arguments"),
    (["--ping-interval", "nan"], 2, "ping_interval must be"), (["--keyfile", "x"], 2, "a key goes with a certificate"),
    (["0", "--host", "no.such.host.invalid"], 1, "cannot listen on no.such.host.invalid port 0"),
    (["0", "--host", "192.0.2.1"], 1, "or an address of this machine"),
    (["PORT"], 1, "choose another port"),
    (["0", "--certfile", "missing.pem"], 1, "cannot use the certificate in 'missing.pem': "),
    (["0", "--certfile", "CERT"], 1, "cannot use the certificate in"),
    (["0", "--certfile", "CERT", "--keyfile", "OTHER"], 1, "key values mismatch"),
    (["0", "--certfile", "CERT", "--keyfile", "ENCRYPTED"], 1, "not encrypted")])
def test_an_error_is_one_line_on_stderr(request, capsys, serve, tmp_path, arguments, code, message):
    words = {"PORT": lambda: str(serve().port)}
    if "CERT" in arguments:
        cert, key = request.getfixturevalue("certificate")
        other, encrypted = str(tmp_path / "other.pem"), str(tmp_path / "encrypted.pem")
        for command in (["genrsa", "-out", other, "2048"], ["rsa", "-aes128", "-passout", "pass:secret", "-in", key, "-out", encrypted]):
            subprocess.run(["openssl", *command], check=True, stderr=subprocess.DEVNULL)
        words.update(CERT=lambda: cert, OTHER=lambda: other, ENCRYPTED=lambda: encrypted)
    with pytest.raises(SystemExit) as ended:
        echoserver.main([words.get(word, lambda word=word: word)() for word in arguments])
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("echoserver: error: ") and message in err and err.count("\n") == 1


def test_importing_changes_nothing_and_debug_shows_something():
    """Not the host program's logging, signals, stack size or socket defaults."""
    script = textwrap.dedent("""
        import logging, signal, socket, sys, threading
        def state():
            return (list(logging.getLogger().handlers), logging.getLogger().level,
                    logging.getLogger("websocket_server").level,
                    [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], threading.stack_size(),
                    sys.getswitchinterval(), socket.getdefaulttimeout(), threading.enumerate())
        before = state()
        import echoserver
        assert state() == before, state()
        assert "numpy" not in sys.modules and "asyncio" not in sys.modules
        with echoserver.EchoServer(port=0, host="127.0.0.1", debug=True):
            pass
    """)
    done = subprocess.run([sys.executable, "-c", script], cwd=str(HERE), stderr=subprocess.PIPE, check=True)
    assert re.fullmatch(rb"Echoserver listening on port \d+\r?\n", done.stderr)


# ==== Defaults =========================================================================================

DEFAULTS = {  # option: (value, as the help and README show it)
    "max_size": (16 * 2**20, "16 MiB"), "max_pending": (256 * 2**20, "256 MiB"), "max_clients": (10000, "10000"), "open_timeout": (10, "10"),
    "close_timeout": (10, "10"), "send_timeout": (20, "20"), "ping_interval": (20, "20"), "ping_timeout": (20, "20")}


def shown_by(option, capsys):
    """What the command line shows for an option, with all white space as spaces."""
    with pytest.raises(SystemExit) as ended:
        echoserver.main([option])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_defaults_of_the_class_and_the_help_agree(capsys):
    assert shown_by("--version", capsys) == "echoserver " + echoserver.__version__
    text = shown_by("-h", capsys)
    for name, (value, shown) in DEFAULTS.items():
        assert getattr(echoserver.Server, name) == value
        assert re.search(r" --%s [A-Z]+ [^()]*\(default %s\)" % (name.replace("_", "-"), shown), text), name
    assert "(default 1234)" in text and "(default 0.0.0.0" in text
    assert echoserver.Server.compression and echoserver.Server.origin is None
    assert not (echoserver.Server.debug or echoserver.Server.reuse_port)


def test_readme_has_every_option_with_its_default(capsys):
    rows = dict(re.findall(r"^\|[^|]*`--([a-z-]+)[^|]*\| *([^|]*?) *\|", README, re.M))
    for option in re.findall(r" --([a-z-]+)", shown_by("-h", capsys)):
        assert "`--%s" % option in README or option in ("help", "version"), option
    for name, (_, shown) in DEFAULTS.items():
        assert re.fullmatch(r"`?%s`?( s)?" % shown, rows[name.replace("_", "-")].replace(",", "")), name
    assert rows["host"].strip("`") == "0.0.0.0"


# ==== Limits and care ==================================================================================

def resident():
    """This process's resident memory in bytes, 0 where the system does not show it."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def test_slow_openers_resets_and_random_frames_leave_nothing(serve, caplog):
    """Afterwards the server still echoes, with the threads and the memory that it had."""
    server, rng = serve(Recorder, max_clients=2000, max_size=1000, close_timeout=2), random.Random(11)
    sizes = []
    for _ in range(4):  # what one round takes may stay, in caches and in the allocator's reserve; a leak grows in each
        with contextlib.ExitStack() as stack:
            for _ in range(100 * SCALE):
                stack.enter_context(connect(server)).sendall(b"GET / HT")
            with Raw(server) as raw:
                assert raw.echoes()
        for _ in range(100 * SCALE):
            with Raw(server) as raw:
                raw.send(GOOD[:7]).reset()
        for _ in range(250 * SCALE):
            with Raw(server) as raw:
                raw.reset()
                with contextlib.suppress(OSError):
                    raw.send(*some_frames(rng, 20))
        wait_for(lambda: not serving())
        with Raw(server) as raw:
            assert raw.echoes()
        del server.messages[:], server.calls[:]
        gc.collect()
        sizes.append(resident())
    assert min(after - before for before, after in zip(sizes, sizes[1:])) < 2**22 and not caplog.records


def test_nothing_from_a_client_gets_into_an_answer_or_the_log(serve, caplog):
    """No line of its own making: neither in the headers of an answer nor in the debug output."""
    server = serve(debug=True)
    for field in (b"Sec-WebSocket-Protocol: a\x0bSet-Cookie: x", b"Sec-WebSocket-Protocol: a\x85b", b"Origin: a\x0ab"):
        assert answer_to(server, opening(field)).startswith(b"HTTP/1.1 400 ")
    with Raw(server, opening(b"User-Agent: \xe2\x80\xa8\x85 x")) as raw:
        raw.send(client_frame(TEXT, "a\r\n\u2028\x85b".encode())).frame()
    server.close()
    for record in caplog.records:
        assert len(record.getMessage().splitlines()) == 1


# ==== What must not show through from websocket-server 0.6.4 ===========================================
# Each check holds here and fails against the bare package. `start` starts a server that echoes as that one's README
# has it. A check against the bare package often waits in vain, so it does not wait long.

FAULTS = {}
FAULTS_IN_FRAMES = {  # what is sent, and what must come back
    "binary frames, which put the stream out of step (32)": ([client_frame(BINARY, b"\0\xff"), GOOD], [whole(BINARY, b"\0\xff"), ECHO]),
    "fragments": ([client_frame(TEXT, b"Hel", fin=False), client_frame(CONTINUATION, b"lo")], [whole(TEXT, b"Hello")]),
    "Pings decoded as UTF-8": ([client_frame(PING, b"\xff\xfe")], [whole(PONG, b"\xff\xfe")]),
    "Pongs decoded as UTF-8": ([client_frame(PONG, b"\xff\xfe"), GOOD], [ECHO]),
    "no answer to a Close": ([client_close(1000)], [closing(1000)]),
    "unbounded payloads": ([client_frame(TEXT, length=length64(2**40))], [closing(1009, b"a message longer than 16777216 bytes")]),
}
FAULTS_IN_ANSWERS = {
    "assertion errors for a bad handshake": (b"POST / HTTP/1.1\r\n\r\n", b"HTTP/1.1 405 "),
    "unbounded headers": (REQUEST[:-2] + b"X: %s\r\n\r\n" % (b"x" * 100000), b"HTTP/1.1 431 "),
}


def fault(check):
    FAULTS[check.__name__] = check
    return check


def hasty(server):
    """A client with little patience."""
    return Raw(server, patience=1)


@fault
def long_messages_and_messages_partly_sent(start):
    """Its issues 103 and 89: with a socket timeout, socket.send() sends what fits and returns."""
    socket.setdefaulttimeout(5)
    try:
        with hasty(start()) as raw:
            message = b"long" * 15 * 2**18  # 15 MiB: more than TCP takes at once, however fast the client reads
            raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            assert raw.send(client_frame(TEXT, message, key=b"\0\0\0\0")).frame() == whole(TEXT, message)
    finally:
        socket.setdefaulttimeout(None)


@fault
def the_list_of_clients_is_scanned_for_every_message(start):
    class Watched:
        """Stands for a handler, and notes when it is looked at."""
        seen = False

        def __eq__(self, _):
            Watched.seen = True

        __hash__ = None

        def __getattr__(self, _):
            Watched.seen = True

    server = start()
    with hasty(server) as first, hasty(server) as second:
        assert first.echoes() and second.echoes()
        client = server.clients[0]
        handler, client["handler"] = client["handler"], Watched()
        assert second.echoes()
        client["handler"] = handler
        assert not Watched.seen


@fault
def freezing_in_send(start):
    """Its issue 77: a client that does not read stops everybody who sends to it, for ever."""
    server = start()
    with hasty(server):
        client = only_client(server)

        def send():
            with contextlib.suppress(OSError):
                for _ in range(100):
                    server.send_message(client, "x" * 2**20)

        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        sending.join(1.5)
        assert not sending.is_alive()


@fault
def client_left_none(start):
    """Its issues 68 and 118: for what never became a client."""
    server, left = start(), []
    server.set_fn_client_left(lambda client, server: left.append(client))
    answer_to(server, b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\n\r\n")
    with hasty(server) as raw:
        raw.send(client_frame(CLOSE)).file.read()
    wait_for(lambda: left)
    assert None not in left


@fault
def every_second_client_skipped_at_disconnect(start):
    """Its issue 116."""
    server = start()
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(hasty(server)) for _ in range(4)]
        server.disconnect_clients_abruptly()
        assert [raw.frame() for raw in raws] == [None] * 4


@fault
def listen_queue_of_5(start):
    assert start().request_queue_size >= 1024


@fault
def tls_with_a_bad_certificate_does_not_end_the_start(start):
    with pytest.raises(OSError):
        start(key="missing.pem", cert="missing.pem")


@fault
def nagles_delay(start):
    server = start()
    with hasty(server):
        assert only_client(server)["handler"].request.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@fault
def deadlock_of_shutdown(start):
    """In the thread that serves, or before it does, it waits for itself."""
    server = start(run=False)
    stopping = threading.Thread(target=server.shutdown, daemon=True)
    stopping.start()
    stopping.join(1)
    stopped = not stopping.is_alive()
    if not stopped:
        server.serve_forever()  # ends at once, and the thread with it
    assert stopped


@pytest.fixture
def start(kind):
    """A function that starts a server of this kind, which is closed after the test."""
    servers, files, bare = [], [], kind is WebsocketServer

    def begin(run=True, **options):
        server = kind("127.0.0.1", 0, **options, **({"loglevel": logging.CRITICAL} if bare else {"send_timeout": 0.5}))
        servers.append(server)
        server.set_fn_message_received(lambda client, server, message: server.send_message(client, message))
        if bare:  # it leaves these open
            server.set_fn_new_client(lambda client, server: files.append(client["handler"].rfile))
        if run and bare:  # looks every 10 ms whether to stop; run_forever() does every 500
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        elif run:
            server.run_forever(threaded=True)
        return server

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()
    for file in files:
        file.close()


@pytest.mark.parametrize("kind", [echoserver.Server, pytest.param(WebsocketServer, marks=pytest.mark.xfail(
    strict=True, raises=(AssertionError, OSError, pytest.fail.Exception), reason="the fault in the bare package"))])
@pytest.mark.parametrize("name", [*FAULTS, *FAULTS_IN_FRAMES, *FAULTS_IN_ANSWERS])
def test_a_fault_of_websocket_server_is_not_here(start, name):
    """Against the bare package an unexpected success is a failure."""
    if name in FAULTS:
        FAULTS[name](start)
    elif name in FAULTS_IN_ANSWERS:
        sent, expected = FAULTS_IN_ANSWERS[name]
        with connect(start()) as sock:
            sock.sendall(sent)
            assert sock.recv(len(expected)) == expected
    else:
        sent, expected = FAULTS_IN_FRAMES[name]
        with hasty(start()) as raw:
            assert raw.send(*sent).frames(len(expected)) == expected


# ==== The pattern is what runs =========================================================================

# Each way in which a message arrives: (what the client sends, how many echoes it gets)
SHAPES = {
    "short": ([client_frame(TEXT, b"hello")], 1),
    "pipelined": ([client_frame(TEXT, b"hello") * 20], 20),
    "in fragments": ([client_frame(TEXT, b"he", fin=False) + client_frame(PING), client_frame(CONTINUATION, b"llo")], 1),
    "in two packets": ([client_frame(TEXT, b"hello")[:7], client_frame(TEXT, b"hello")[7:]], 1),
    "long": ([client_frame(TEXT, b"hello" * 20000)], 1)}


def answers(raw):
    """All that comes back for "hello", sent in each way; without the repetition."""
    found = []
    for parts, number in SHAPES.values():
        for part in parts:
            raw.send(part)
        messages = []
        while len(messages) < number:
            frame = raw.frame()
            if frame[1] != PONG:
                messages.append(frame[2])
        found += messages
    return {message[:5] for message in found}


def edited(folder, line):
    """The module's EchoServer, with this line in the place of the one that sends the message back."""
    source = pathlib.Path(echoserver.__file__).read_text(encoding="utf-8")
    before, pattern = source.split("class EchoServer(")
    assert pattern.count("server.send_message(client, message)\n") == 1
    copy = folder / "edited_echoserver.py"
    copy.write_text(before + "class EchoServer(" + pattern.replace("server.send_message(client, message)\n", line + "\n"),
                    encoding="utf-8")
    spec = importlib.util.spec_from_file_location(copy.stem, str(copy))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EchoServer


def shout(client, server, message):
    server.send_message(client, message.upper())


class Shouting(EchoServer):
    def message_received(self, client, server, message):
        shout(client, server, message)


class ShoutingBelow(EchoServer):
    """What the pattern's line calls is overridden."""
    def send_message(self, client, msg):
        return super().send_message(client, msg.upper())


def wrapped(callback):
    """A decorator as careful ones are written: it copies the attributes of what it wraps."""
    @functools.wraps(callback)
    def wrapper(client, server, message):
        callback(client, server, message.upper())
    return wrapper


CHANGES = {
    "set_fn_message_received": lambda server: server.set_fn_message_received(shout),
    "an attribute": lambda server: setattr(server, "message_received", shout),
    "a mock": lambda server: server.set_fn_message_received(mock.Mock(side_effect=shout)),
    "a decorator": lambda server: server.set_fn_message_received(wrapped(server.message_received))}


@pytest.mark.parametrize("line", ["server.send_message(client, message.upper())",
                                  "message = message.upper(); server.send_message(client, message)"])
def test_the_pattern_edited_in_place_shows(serve, tmp_path, line):
    """The line above the method stays as it is, and still nothing goes round the method."""
    with Raw(serve(edited(tmp_path, line))) as raw:
        assert answers(raw) == {b"HELLO"}


def test_the_pattern_edited_in_place_to_send_twice(serve, tmp_path):
    with Raw(serve(edited(tmp_path, "server.send_message(client, message); server.send_message(client, message)"))) as raw:
        raw.send(GOOD, GOOD)
        assert [raw.frame() for _ in range(4)] == [ECHO] * 4


def test_the_copy_that_is_edited_echoes_when_it_is_not(serve, tmp_path):
    kind = edited(tmp_path, "server.send_message(client, message)")
    with Raw(serve(kind)) as raw:
        assert answers(raw) == {b"hello"} and kind.message_received.only_echoes


@pytest.mark.parametrize("kind", [Shouting, ShoutingBelow])
def test_an_override_shows(serve, kind):
    with Raw(serve(kind)) as raw:
        assert answers(raw) == {b"HELLO"}


@pytest.mark.parametrize("change", CHANGES)
def test_a_callback_set_later_shows_at_once(serve, change):
    server = serve()
    with Raw(server) as raw:
        assert answers(raw) == {b"hello"}
        CHANGES[change](server)
        assert answers(raw) == {b"HELLO"}


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_debug_shows_each_message(serve, caplog, later, shape):
    """From the start, or from when it is set on the server."""
    server = serve(debug=not later)
    parts, number = SHAPES[shape]
    with Raw(server) as raw:
        assert raw.echoes()
        server.debug = True
        caplog.clear()
        for part in parts:
            raw.send(part)
        while number:
            number -= raw.frame()[1] == TEXT
    shown = [record for record in caplog.records if record.getMessage().startswith("Message received: client 1: 'hello")]
    assert len(shown) == SHAPES[shape][1]


def test_only_the_pattern_itself_is_marked_as_an_echo():
    assert EchoServer.message_received.only_echoes
    assert not getattr(Shouting.message_received, "only_echoes", False)
    for layer in (Server, echoserver.Connection, echoserver.Receiver, echoserver.whole_frames):
        assert "EchoServer" not in inspect.getsource(layer), "a lower layer knows the pattern"


SETTINGS = {  # name: (value, what the next client sends, what it gets)
    "ping_interval": (0.1, REQUEST, whole(PING)),
    "max_size": (3, REQUEST + GOOD, closing(1009, b"a message longer than 3 bytes"))}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_changed_on_the_server_acts(serve, name):
    """`server.ping_interval = 1` is no attribute of something else."""
    server = serve()
    value, sent, expected = SETTINGS[name]
    setattr(server, name, value)
    with Raw(server, sent) as raw:
        raw.socket.settimeout(2)
        assert raw.frame() == expected


# ==== The list of clients ==============================================================================


def test_the_list_is_in_order_of_arrival(serve):
    """Also where the first one's new_client takes its time, and when some have left."""
    go_on = threading.Event()

    class Slow(EchoServer):
        def new_client(self, client, server):
            if client["id"] == 1:
                assert go_on.wait(PATIENCE)
            super().new_client(client, server)

    server = serve(Slow)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Raw(server))
        raws = [stack.enter_context(Raw(server)) for _ in range(6)]
        go_on.set()
        wait_for(lambda: [client["id"] for client in server.clients] == [1, 2, 3, 4, 5, 6, 7], "the list")
        for raw in (raws[1], first, raws[4]):
            raw.send(client_frame(CLOSE)).frames()
        assert [client["id"] for client in server.clients] == [2, 4, 5, 7]


def test_an_override_without_super_loses_only_its_own_entry(serve):
    """Everything that goes to all still reaches that client."""
    class Forgetful(EchoServer):
        def new_client(self, client, server):
            if client["id"] != 1:
                super().new_client(client, server)

        def client_left(self, client, server):
            pass

    server = serve(Forgetful)
    for end, code in ((server.disconnect_clients_gracefully, 1000), (server.disconnect_clients_abruptly, None),
                      (server.close, 1001)):
        server.id_counter = 0
        with Raw(server) as one, Raw(server) as two:
            assert [client["id"] for client in server.clients] == [2]
            server.send_message_to_all("all")
            assert one.frame() == two.frame() == whole(TEXT, b"all")
            ending = threading.Thread(target=end)
            ending.start()
            for raw in (one, two):
                assert raw.frame() == (code and closing(code))
                with contextlib.suppress(OSError):
                    raw.send(client_frame(CLOSE)).frames()
            ending.join()
            assert server.clients == []


def test_the_list_is_right_from_any_thread_while_clients_come_and_go(serve):
    server, done, wrong = serve(), threading.Event(), []

    def look():
        while not done.is_set():
            numbers = [client["id"] for client in server.clients]
            if numbers != sorted(set(numbers)):
                wrong.append(numbers)

    def come_and_go():
        for _ in range(10 * SCALE):
            with Raw(server) as raw:
                mine = raw.socket.getsockname()[:2]
                there = [client for client in server.clients if client["address"] == mine]
                raw.send(client_frame(CLOSE)).frames()
                left = [client for client in server.clients if client["address"] == mine]
                if len(there) != 1 or left:
                    wrong.append((there, left))

    looking = [threading.Thread(target=look) for _ in range(2)]
    going = [threading.Thread(target=come_and_go) for _ in range(8)]
    for thread in looking + going:
        thread.start()
    for thread in going:
        thread.join()
    done.set()
    for thread in looking:
        thread.join()
    assert wrong == [] and server.clients == []


def test_ten_thousand_departures_in_random_order():
    """They cost well under a second in all."""
    with contextlib.closing(EchoServer(port=0, host="127.0.0.1")) as server:
        clients = [{"id": number, "handler": Mute} for number in range(1, 10001)]
        for client in clients:
            server.new_client(client, server)
        assert server.clients == clients
        leaving = random.Random(8).sample(clients, len(clients))
        begin = time.process_time()
        for client in leaving[:-3]:
            server.client_left(client, server)
        assert time.process_time() - begin < 0.5
        assert server.clients == sorted(leaving[-3:], key=lambda client: client["id"])


# ==== In the place of WebsocketServer ==================================================================


def test_the_constructor_takes_what_websocket_server_takes():
    ours, theirs = (list(inspect.signature(kind).parameters.values()) for kind in (Server, WebsocketServer))
    assert [(p.name, p.default) for p in ours[:5]] == [(p.name, p.default) for p in theirs]


def test_key_and_cert_serve_tls(certificate):
    cert, key = certificate
    with contextlib.closing(Server("127.0.0.1", 0, logging.ERROR, key, cert)) as server:
        server.set_fn_message_received(shout)
        server.run_forever(threaded=True)
        assert server.url.startswith("wss://")
        with Raw(server, context=trusting(certificate)) as raw:
            assert raw.send(GOOD).frame() == whole(TEXT, b"GOOD")
            raw.send(client_frame(CLOSE)).frames()


@pytest.mark.parametrize("key, cert", [("missing.pem", "missing.pem"), ("KEY", "missing.pem"), ("missing.pem", "CERT"),
                                       ("CERT", "KEY"), ("", ""), (None, "")])
def test_a_bad_key_or_cert_is_an_error(certificate, key, cert):
    """And never a server in clear text."""
    files = {"CERT": certificate[0], "KEY": certificate[1]}
    with pytest.raises(OSError, match="cannot use the certificate"):
        Server("127.0.0.1", 0, key=files.get(key, key), cert=files.get(cert, cert)).close()


def test_the_thread_is_known_when_run_forever_returns():
    with contextlib.closing(Server()) as server:
        server.run_forever(threaded=True)
        assert server.thread.is_alive() and server.daemon
    assert not server.thread.is_alive()


@pytest.mark.parametrize("method, code", [("disconnect_clients_gracefully", 1000), ("disconnect_clients_abruptly", None)])
def test_nobody_is_on_the_list_after_a_disconnect(serve, method, code):
    """Though the clients have not answered; and the server goes on."""
    server = serve()
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(Raw(server)) for _ in range(10)]
        getattr(server, method)()
        assert server.clients == []
        for raw in raws:
            assert raw.frame() == (code and closing(code))
            with contextlib.suppress(OSError):
                raw.send(client_frame(CLOSE)).frames()
        with Raw(server) as raw:
            assert raw.echoes()


def test_the_handler_has_what_websocket_servers_has(serve):
    server = serve()
    with Raw(server) as raw:
        (client,) = server.clients
        handler = client["handler"]
        assert handler.server is server and handler.client_address == client["address"]
        assert handler.connection is handler.request and handler.connection.getpeername() == raw.socket.getsockname()
        assert handler.keep_alive and handler.handshake_done and handler.valid_client
        assert server.handler_to_client(handler) is client
        handler.send_text("text")
        handler.send_text(b"bytes")
        handler.send_text("as a pong", 0xA)
        handler.send_pong("pong")
        handler.send_message("message")
        handler.send_close(1001, b"reason")
        assert [raw.frame() for _ in range(6)] == [
            whole(TEXT, b"text"), whole(TEXT, b"bytes"), whole(PONG, b"as a pong"), whole(PONG, b"pong"),
            whole(TEXT, b"message"), closing(1001, b"reason")]
        assert not handler.keep_alive and server.handler_to_client(handler) is None
        raw.send(client_frame(CLOSE)).frames()


def test_a_program_ends_a_connection_by_keep_alive(serve):
    """As websocket-server's own code does."""
    class Ending(EchoServer):
        def message_received(self, client, server, message):
            client["handler"].keep_alive = False

    with Raw(serve(Ending)) as raw:
        assert close_code([raw.send(GOOD).frame()]) in (1000, 1001)
        raw.send(client_frame(CLOSE)).frames()


def test_a_subclass_overrides_the_callbacks_of_the_bare_server():
    class Own(Server):
        def new_client(self, client, server):
            server.send_message_to_all("new %d" % client["id"])

        def message_received(self, client, server, message):
            server.send_message(client, message)

    with contextlib.closing(Own()) as server:
        server.run_forever(threaded=True)
        with Raw(server) as raw:
            assert raw.frame() == whole(TEXT, b"new 1")
            assert raw.echoes()
            raw.send(client_frame(CLOSE)).frames()


def test_deny_and_allow(serve):
    server = serve()
    server.deny_new_connections(1013, b"later")
    with Raw(server) as denied:
        assert denied.frames() == [closing(1013, b"later")]
    server.deny_new_connections()
    with Raw(server) as denied:
        assert close_code(denied.frames()) == 1000
    server.allow_new_connections()
    with Raw(server) as raw:
        assert raw.echoes()
        assert len(server.clients) == 1


@pytest.mark.parametrize("method, code", [("shutdown_gracefully", 1000), ("shutdown_abruptly", None)])
def test_shutdown(method, code):
    server = Server()
    server.run_forever(threaded=True)
    with Raw(server) as raw:
        ending = threading.Thread(target=getattr(server, method))
        ending.start()
        assert raw.frame() == (code and closing(code))
        with contextlib.suppress(OSError):
            raw.send(client_frame(CLOSE)).frames()
        ending.join()
        assert server.clients == [] and not server.thread.is_alive()
        with pytest.raises(ConnectionError):
            socket.create_connection(("127.0.0.1", server.port))


# From websocket-server 0.6.4, with the import and the port changed
README_EXAMPLE = """
import logging
from echoserver import Server as WebsocketServer

def new_client(client, server):
	server.send_message_to_all("Hey all, a new client has joined us")

server = WebsocketServer(host='127.0.0.1', port=PORT, loglevel=logging.INFO)
server.set_fn_new_client(new_client)
server.run_forever()
"""
SERVER_PY = """
from echoserver import Server as WebsocketServer

# Called for every client connecting (after handshake)
def new_client(client, server):
	print("New client connected and was given id %d" % client['id'])
	server.send_message_to_all("Hey all, a new client has joined us")


# Called for every client disconnecting
def client_left(client, server):
	print("Client(%d) disconnected" % client['id'])


# Called when a client sends a message
def message_received(client, server, message):
	if len(message) > 200:
		message = message[:200]+'..'
	print("Client(%d) said: %s" % (client['id'], message))


PORT=9001
server = WebsocketServer(port = PORT)
server.set_fn_new_client(new_client)
server.set_fn_client_left(client_left)
server.set_fn_message_received(message_received)
server.run_forever()
"""
SERVER_PY_SAYS = """New client connected and was given id 1
New client connected and was given id 2
Client(1) said: good
Client(1) said: %s..
Client(1) disconnected
Client(2) disconnected
""" % ("x" * 200)


@pytest.mark.parametrize("source, says", [(README_EXAMPLE, ""), (SERVER_PY, SERVER_PY_SAYS)])
def test_websocket_servers_own_examples_run(source, says):
    """The README's example and server.py, ended by Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = subprocess.Popen([sys.executable, "-u", "-c", source.replace("PORT=9001\n", "").replace("PORT", str(port))],
                               cwd=str(HERE), stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    with program:
        try:
            hey = whole(TEXT, b"Hey all, a new client has joined us")

            address = types.SimpleNamespace(port=port)
            wait_for(lambda: accepts(port), "the program to listen")
            with Raw(address) as one:
                assert one.frame() == hey
                with Raw(address) as two:
                    assert one.frame() == two.frame() == hey
                    one.send(GOOD, client_frame(TEXT, b"x" * 300), client_frame(CLOSE)).frames()
                    said = "".join(program.stdout.readline() for _ in says.splitlines()[:-1])  # all but the end of two
                    program.send_signal(signal.SIGINT)
                    assert two.frame() == closing(1001)
                    two.send(client_frame(CLOSE)).frames()
                    rest, err = program.communicate(timeout=PATIENCE)
                    assert (said + rest, err, program.returncode) == (says, "", 0)
        finally:
            program.kill()


def accepts(port):
    """Whether somebody listens there."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_ctrl_c_while_a_connection_starts_is_a_clean_close(monkeypatch):
    """KeyboardInterrupt may come in the accepting thread before Thread.start() returns: there is a client all the same."""
    server, start, got = EchoServer(port=0, host="127.0.0.1"), threading.Thread.start, []

    def interrupted(thread):
        start(thread)
        if thread.name == "echoserver connection":
            wait_for(lambda: server.clients)
            raise KeyboardInterrupt

    def connect_and_wait():
        with Raw(server) as raw:
            got.append(raw.frame())
            raw.send(client_frame(CLOSE)).frames()

    client = threading.Thread(target=connect_and_wait)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    client.start()
    server.run_forever()
    client.join()
    assert got == [closing(1001)]


ORDERS = {
    "start, close": "server.start(); server.close()",
    "close": "server.close()",
    "close, close": "server.close(); server.close()",
    "server_close": "server.server_close()",
    "server_close, start, close": "server.server_close(); server.start(); server.close()",
    "server_close, serve": "server.server_close(); server.serve_forever()",
    "run threaded, shutdown": "server.run_forever(threaded=True); server.shutdown()",
    "run threaded, shutdown_gracefully": "server.run_forever(threaded=True); server.shutdown_gracefully()",
    "run threaded, shutdown_abruptly": "server.run_forever(threaded=True); server.shutdown_abruptly()",
    "run threaded, server_close": "server.run_forever(threaded=True); server.server_close(); server.thread.join(9)",
    "run threaded, stop": "server.run_forever(threaded=True); server.stop(); server.thread.join(9)",
    "run threaded twice": "server.run_forever(threaded=True); server.run_forever(threaded=True); server.shutdown()",
    "stop, serve": "server.stop(); server.serve_forever()",
    "stop, start, close": "server.stop(); server.start(); server.close()",
    "in a block": "with server: pass",
    "closed by another thread": "closing = threading.Thread(target=server.close); closing.start(); server.start(); closing.join()",
    "started by another thread": "starting = threading.Thread(target=start, args=(server,)); starting.start(); server.close();"
                                 " starting.join(); server.close()",
    "with a client": "server.start(); client = socket.create_connection(('127.0.0.1', server.port)); server.close();"
                     " client.close()"}
START_AND_STOP = """
    import contextlib, json, socket, sys, threading, time
    from echoserver import EchoServer
    def start(server):
        with contextlib.suppress(RuntimeError):  # it may be closed already
            server.start()
    for name, order in json.loads(sys.argv[1]).items():
        for _ in range(int(sys.argv[2])):
            server = EchoServer(port=0, host="127.0.0.1", close_timeout=5)
            with contextlib.suppress(RuntimeError):
                exec(order)
        end = time.monotonic() + 5
        while threading.active_count() > 1 and time.monotonic() < end:
            time.sleep(0.005)
        assert threading.active_count() == 1, "%s: %s" % (name, threading.enumerate()[1:])
"""


def test_starting_and_stopping_in_any_order_and_at_any_speed():
    """Hundreds of times; nothing is complained about, and no thread is left."""
    done = python(START_AND_STOP, json.dumps(ORDERS), 20 * SCALE)
    assert done.returncode == 0 and done.stderr == ""


def test_all_are_disconnected_at_once(serve):
    """Nobody waits behind five that do not read and are being sent to."""
    server = serve(close_timeout=1)
    with contextlib.ExitStack() as stack:
        stuck = [stack.enter_context(Raw(server)) for _ in range(5)]
        sending = [send_in_background(server, client, bytes(2**24)) for client in server.clients]
        sixth = stack.enter_context(Raw(server))
        time.sleep(0.1)  # so that they fill TCP's buffers
        disconnecting = threading.Thread(target=server.disconnect_clients_gracefully)
        begin = time.monotonic()
        disconnecting.start()
        assert sixth.frame() == closing(1000) and time.monotonic() - begin < 1
        sixth.send(client_frame(CLOSE)).frames()
        disconnecting.join()
        assert server.clients == [] and time.monotonic() - begin < 3
        for thread in sending:
            thread.join()
        assert stuck


FORK = """
    import os, signal, sys, time
    import websocket
    from echoserver import EchoServer

    def echoes(client):
        client.send("hello")
        return client.recv() == "hello"

    before = []
    server = EchoServer(port=0, host="127.0.0.1", close_timeout=3)
    server.start()
    if sys.argv[1] == "later":  # and not before the accepting thread has run its first line
        before = [websocket.create_connection(server.url, timeout=9)]
        assert echoes(before[0])
    child = os.fork()
    if not child:
        signal.alarm(2)  # ends it if it hangs
        try:
            exec(sys.argv[2])
        finally:  # as at the end of a `with` block
            server.close()
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the child did not return at once"
    assert not server.closed.is_set() and len(server.clients) == len(before)
    clients = before + [websocket.create_connection(server.url, timeout=9) for _ in range(3)]
    assert all(map(echoes, clients))
    used = time.process_time()
    time.sleep(0.05)
    assert time.process_time() - used < 0.025, "the accepting thread does not rest any more"
    for client in clients:
        client.close()
    server.close()
    print("whole")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("when, how", [("later", "sys.exit(0)"), ("later", "server.close()"), ("later", "server.stop()"),
                                       ("later", "server.server_close()"), ("later", "server.start()"), ("at once", "pass"), ("at once", "server.stop()")])
def test_a_forked_child_that_stops_harms_nothing(when, how):
    """It returns at once, and the parent's clients, and new ones, go on."""
    done = python(FORK, when, how, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert (done.stdout, done.stderr) == ("whole\n", "")


# ==== Fragments from many threads ======================================================================


def test_two_clients_that_send_to_each_other_between_fragments_both_end(serve):
    """Each holds up the other until send_timeout, and no longer."""
    both = threading.Barrier(2)

    class Crossed(EchoServer):
        def message_received(self, client, server, message):
            (other,) = [other for other in server.clients if other is not client]

            def pieces():
                yield "first"
                both.wait(PATIENCE)
                server.send_message(other, "across")
                yield "last"

            client["handler"].send_fragments(pieces())

    server = serve(Crossed, send_timeout=0.3)
    with Raw(server) as one, Raw(server) as two:
        begin = time.monotonic()
        for raw in (one, two):
            raw.send(GOOD)
        for raw in (one, two):
            assert [raw.frame() for _ in range(2)] == [(0, TEXT, b"first"), (0, CONTINUATION, b"last")]
            assert raw.frame() == whole(CONTINUATION)
        assert time.monotonic() - begin < 2


def test_a_message_waits_for_the_last_fragment_and_a_ping_does_not(serve):
    server, waiting, go_on = serve(), threading.Event(), threading.Event()
    with Raw(server) as raw:
        (client,) = server.clients

        def pieces():
            yield "first"
            waiting.set()
            assert go_on.wait(PATIENCE)
            yield "last"

        fragments = threading.Thread(target=client["handler"].send_fragments, args=(pieces(),))
        fragments.start()
        assert waiting.wait(PATIENCE)
        message = send_in_background(server, client, "message")
        echo = raw.send(GOOD)
        client["handler"].send_ping(b"ping")
        assert [raw.frame(), raw.frame()] == [(0, TEXT, b"first"), whole(PING, b"ping")]
        time.sleep(0.05)
        assert message.is_alive()
        go_on.set()
        assert [echo.frame(), echo.frame()] == [(0, CONTINUATION, b"last"), whole(CONTINUATION)]
        assert sorted([raw.frame(), raw.frame()]) == sorted([whole(TEXT, b"message"), ECHO])
        fragments.join()
        message.join()


@BOTH
def test_no_echo_comes_between_fragments_that_waited_for_their_turn(serve, kind):
    """Section 5.4. A long message is on its way to a client that does not read yet; behind it wait a message in
    fragments, and then an echo."""
    server, waiting, go_on = serve(kind), threading.Event(), threading.Event()

    def pieces():
        yield "first"
        waiting.set()
        go_on.wait(PATIENCE)
        yield "last"

    with Raw(server) as raw:
        (client,) = server.clients
        sending = [send_in_background(server, client, bytes(2**24)),
                   threading.Thread(target=client["handler"].send_fragments, args=(pieces(),))]
        time.sleep(0.1)  # so that TCP's buffers are full
        sending[1].start()
        time.sleep(0.1)  # so that it waits
        raw.send(GOOD)
        time.sleep(0.1)  # so that the echo waits, too
        found = [raw.frame()]
        assert waiting.wait(PATIENCE)
        time.sleep(0.1)  # in which the echo would come
        go_on.set()
        found += [raw.frame() for _ in range(4)]
        for thread in sending:
            thread.join()
    fragments = [(0, TEXT, b"first"), (0, CONTINUATION, b"last"), whole(CONTINUATION)]
    assert found[0] == whole(BINARY, bytes(2**24)) and found[1:] in ([ECHO] + fragments, fragments + [ECHO])


# ==== Slow readers, and what the server holds for its clients ==========================================


@pytest.mark.parametrize("secure", [False, True])
@BOTH
def test_a_client_that_does_not_read_is_gone_in_time(request, certificate, kind, secure):
    """Within send_timeout, not that for each part of the message."""
    class Timed(kind):
        def client_left(self, client, server):
            super().client_left(client, server)
            left.append(time.monotonic())

    left = []
    server = request.getfixturevalue("tls" if secure else "serve")(Timed, send_timeout=0.8)
    with Raw(server, context=trusting(certificate) if secure else None) as raw:
        raw.send(zeros(8 * 2**20))
        begin = time.monotonic()
        wait_for(lambda: left, "the client to be dropped")
        assert left[0] - begin < 1.5


def test_a_client_that_reads_a_trickle_is_gone_too(serve):
    """Some progress is not enough: there is a least rate."""
    server = serve(Recorder, send_timeout=0.5)
    with Raw(server) as raw:
        raw.send(zeros(12 * 2**20))
        begin = time.monotonic()
        while not server.changed.is_set() and time.monotonic() < begin + 5:
            raw.socket.recv(2048)
            server.changed.wait(0.05)
        assert time.monotonic() - begin < 2


@pytest.mark.parametrize("piece", [4096, 20000, 65536])
def test_the_least_rate_is_that_of_the_whole_message(serve, piece):
    """However the client cut the message up when it sent it: 256 KiB in each send_timeout."""
    server = serve(Recorder, send_timeout=0.5)
    with Raw(server) as raw:
        size = 12 * 2**20
        whole_message, at = zeros(size), 0
        while at < len(whole_message):
            raw.send(whole_message[at:at + piece])
            at += piece
            time.sleep(0)
        begin = time.monotonic()
        while not server.changed.is_set() and time.monotonic() < begin + 4:
            raw.socket.recv(20 * 1024)  # 200 KiB in each send_timeout
            server.changed.wait(0.05)
        assert time.monotonic() - begin < 3


def test_a_slow_reader_costs_those_who_broadcast_a_bounded_time(serve):
    server = serve(send_timeout=0.5)
    with Raw(server) as slow, Raw(server) as other:
        begin = time.monotonic()
        broadcasting = threading.Thread(target=server.send_message_to_all, args=(bytes(2**24),))
        broadcasting.start()
        assert other.frame() == whole(BINARY, bytes(2**24)) and time.monotonic() - begin < 2
        broadcasting.join()
        assert [client["id"] for client in server.clients] == [2] and slow


def hold(raw, size):
    """Begin a message of `size` bytes, and wait until the server has it."""
    return raw.send(zeros(size, fin=False), client_frame(PING)).frame()


# How a client that holds something leaves
LEAVING = {
    "Close": lambda raw: raw.send(client_frame(CLOSE)).frames(),
    "end": lambda raw: raw.socket.shutdown(socket.SHUT_RDWR),
    "reset": lambda raw: raw.reset(),
    "violation": lambda raw: raw.send(client_frame(3)).frames(),
    "end of the message": lambda raw: raw.send(client_frame(CONTINUATION)).frame()}


@BOTH
@pytest.mark.parametrize("leaving", LEAVING)
def test_max_pending(serve, kind, leaving):
    """Who would exceed it gets Close 1013; the others go on; what they hold is given back."""
    server = serve(kind, max_pending=100000)
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(Raw(server)) for _ in range(6)]
        for raw in raws[:5]:
            assert hold(raw, 18000) == whole(PONG)
        assert close_code(raws[5].send(zeros(18000, fin=False)).frames()) == 1013
        for raw in raws[:5]:
            LEAVING[leaving](raw)
    wait_for(lambda: server.clients == [], "the clients to leave")

    def as_much_again():
        with Raw(server) as later:
            found = hold(later, 95000)
            later.send(client_frame(CLOSE)).frames()
            return found == whole(PONG)

    wait_for(as_much_again, "all to be given back")


def test_max_pending_counts_what_a_message_inflates_to(serve):
    with Raw(serve(max_pending=100000), opening(b"Sec-WebSocket-Extensions: permessage-deflate")) as raw:
        stream = zlib.compressobj(wbits=-15)
        small = (stream.compress(bytes(200000)) + stream.flush(zlib.Z_SYNC_FLUSH))[:-4]
        assert close_code(raw.send(client_frame(BINARY, small, rsv=4)).frames()) == 1013


def test_max_pending_counts_answers_that_are_not_read(serve):
    """What such a client holds no other can have, until it is dropped."""
    server = serve(max_pending=2**24, send_timeout=1)
    with Raw(server) as stuck:
        sending = send_in_background(server, server.clients[0], bytes(2**24 - 2**20))

        def hold_15_mib():
            with Raw(server) as other:
                return hold(other, 15 * 2**20)[1]

        wait_for(lambda: hold_15_mib() == CLOSE, "TCP's buffers to fill")
        sending.join()
        assert hold_15_mib() == PONG and stuck


def test_no_bound_on_what_is_pending(serve):
    with Raw(serve(max_pending=0)) as raw:
        assert hold(raw, 1000000) == whole(PONG)
    assert vars(echoserver.command_line().parse_args(["--max-pending", "0"]))["max_pending"] == 0


# ==== The opening handshake, attacked ==================================================================

MALFORMED = ["@@@", "permessage-deflate;", "foo bar", 'a="x, permessage-deflate', r'x; v="a\", permessage-deflate, b"']


@pytest.mark.parametrize("value", MALFORMED)
def test_extensions_that_do_not_fit_the_abnf(serve, value):
    """Section 9.1: the handshake fails, and nothing is negotiated out of a quoted string."""
    assert first_bytes(serve().port, opening(b"Sec-WebSocket-Extensions: " + value.encode())).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("value", MALFORMED + [
    "", ",", " , ,", ";", "a;", "a;;b", "; a", "a; =1", "a; b=", 'a; b=""', 'a; b="x y"', 'a; b="1', 'a; b=1"', 'a; b="1"2',
    "a; b=1 2", "a; b=1=2", "a=1", '"a"', 'a; "b"', "a; b c", "a b", "a; b=(1)", 'a; b="(1)"', 'a; b="\\', 'a; b="\\"',
    'a; b="1\\"', 'a; b="\\\\"', "a, @", "@, a", "a/b", "a\x80", 'a; b="\xe9"', "a; b=1, c d", "a; b\t= 1; c;"])
def test_malformed_extensions(value):
    with pytest.raises(echoserver.HTTPAnswer, match="400"):
        echoserver.parse_extensions(value)


@pytest.mark.parametrize("value, expected", [
    ("a", [("a", [])]), ("a, b", [("a", []), ("b", [])]), (" ,a ,, b\t, ", [("a", []), ("b", [])]),
    ("a; b", [("a", [("b", None)])]), ("a;b=1;c=2, d;e", [("a", [("b", "1"), ("c", "2")]), ("d", [("e", None)])]),
    ('a; b="10"', [("a", [("b", "10")])]), (r'a; b="1\0"', [("a", [("b", "10")])]), (r'a; b="\1\0"', [("a", [("b", "10")])]),
    ("a; b=1; b=2", [("a", [("b", "1"), ("b", "2")])]), ("!#$%&'*+-.^_`|~; 0=1", [("!#$%&'*+-.^_`|~", [("0", "1")])]),
    ("a ;\tb = 1 ; c", [("a", [("b", "1"), ("c", None)])]), ('a; b="x"; c, d', [("a", [("b", "x"), ("c", None)]), ("d", [])])])
def test_well_formed_extensions(value, expected):
    assert echoserver.parse_extensions(value) == expected


@pytest.mark.parametrize("offer, answer", [
    ("x-unknown; y", None), ("permessage-deflate; server_max_window_bits=7", None), ("permessage-deflate; unknown", None),
    ("permessage-deflate; server_no_context_takeover=1", None), ("permessage-deflate; server_max_window_bits", None),
    ('permessage-deflate; server_max_window_bits="10"', "permessage-deflate; server_max_window_bits=10"),
    (r'permessage-deflate; server_max_window_bits="1\0"', "permessage-deflate; server_max_window_bits=10")])
def test_a_well_formed_offer_is_declined_or_taken(serve, offer, answer):
    with Raw(serve(), opening(b"Sec-WebSocket-Extensions: " + offer.encode())) as raw:
        found = re.search(b"Sec-WebSocket-Extensions: (.*)\r\n", raw.head)
        assert raw.head.startswith(b"HTTP/1.1 101 ") and (found and found[1].decode()) == answer
        assert raw.echoes()


def test_no_extension_header_takes_long():
    """16 KiB of what makes a careless pattern try everything."""
    size = echoserver.MAX_HEAD
    begin = time.process_time()
    for part, end in (("a;", "@"), ("a; b=1;", "@"), ("a,", "@"), (" ", "@"), ("a ", "@"), (" ,", "@"), ("a; b" + " " * 99, "@"),
                      (r"\a", '"'), ('a; b="', "@"), ("a", " @"), ("a; b = ", "@"), ("permessage-deflate,", "a"), ("a;b ", "=")):
        for start in ("", "a", 'a; b="', "a; b"):
            with contextlib.suppress(echoserver.HTTPAnswer):
                echoserver.negotiate(echoserver.parse_extensions((start + part * size)[:size] + end))
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("sent, status", [
    (REQUEST[:-2] + b"X: y\r\n" * 95 + b"\r\n", b"101"),  # 100 in all
    (REQUEST[:-2] + b"X: y\r\n" * 96 + b"\r\n", b"431"),
    (REQUEST[:-2] + b"a:\r\n" * 2900, b"431"),  # with no end: the answer does not wait for it
    (b"GET /" + b"\r" * 20000, b"431")])
def test_the_number_of_header_fields(serve, sent, status):
    assert first_bytes(serve().port, sent).startswith(b"HTTP/1.1 %s " % status)


@pytest.mark.parametrize("sent", [
    REQUEST, REQUEST[:-2] + b"X: y\r\n" * 95 + b"\r\n", REQUEST[:-2] + b"X: %s\r\n\r\n" % (b"x" * (16384 - len(REQUEST) - 1)),
    b"\r\n" + REQUEST])
def test_a_request_is_the_same_wherever_tcp_cuts_it(sent):
    """What is taken as a whole is not refused while it is still coming."""
    assert echoserver.parse_request(sent)
    for end in range(1, len(sent)):
        assert echoserver.parse_request(sent[:end]) is None, sent[end - 9:end]


@pytest.mark.parametrize("before, status", [(b"", b"101"), (b"\r\n", b"101"), (b"\r\n\r\n", b"400"), (b"\r", b"400"), (b"\n", b"400")])
def test_an_empty_line_before_the_request(serve, before, status):
    """RFC 9112 section 2.2: one is ignored."""
    assert first_bytes(serve().port, before + REQUEST).startswith(b"HTTP/1.1 %s " % status)


@pytest.mark.parametrize("origin", [
    "https://Example.org/", "https://example.org/", "https://example.org:443", "http://example.org:80", "example.org",
    "HTTPS://example.org", "https://", "https://user@example.org", "https://example.org?x",
    "//example.org", "*", ""])
def test_an_origin_that_no_browser_sends_is_refused(origin):
    for origins in (origin, ["https://good.example", origin]):
        with pytest.raises(ValueError, match="origin"):
            EchoServer(port=0, origin=origins).close()


@pytest.mark.parametrize("origin", ["https://example.org", "http://localhost:8080", "null", "http://[::1]:8080"])
def test_origins_are_compared_as_they_are(serve, origin):
    server = serve(origin=origin)
    for sent, status in ((origin, b"101"), (origin.upper(), b"403"), (origin + "/", b"403"), (origin + ".", b"403")):
        assert first_bytes(server.port, opening(b"Origin: " + sent.encode())).startswith(b"HTTP/1.1 %s " % status), sent


# ==== Limits, attacked =================================================================================


def test_a_client_after_many_answered_requests_gets_an_answer(serve):
    """Requests for the page whose clients do not end TCP hold no place."""
    server = serve(max_clients=1)
    with contextlib.ExitStack() as stack:
        for _ in range(130):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), PATIENCE))
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(4096).startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 503 "))
        assert first_bytes(server.port, REQUEST).startswith((b"HTTP/1.1 101 ", b"HTTP/1.1 503 "))


TLS_ENDS = {
    "TCP's half": lambda sock: socket.socket.shutdown(sock, socket.SHUT_WR),
    "close_notify": lambda sock: sock.unwrap()}  # which waits for the server's


@pytest.mark.parametrize("how", TLS_ENDS)
@pytest.mark.parametrize("unfinished", [b"", GOOD[:3], client_frame(TEXT, b"x", fin=False)])
def test_a_tls_client_that_ends_without_a_close_gets_close_notify(tls, certificate, how, unfinished):
    """RFC 8446 section 6.1: or it would be told of a truncation."""
    with Raw(tls(close_timeout=1), context=trusting(certificate)) as raw:
        raw.socket.suppress_ragged_eofs = False  # an end without close_notify is an error
        assert raw.send(GOOD, unfinished).frame() == ECHO
        TLS_ENDS[how](raw.socket)
        assert how == "close_notify" or raw.socket.recv(1) == b""


def test_a_tls_client_that_ends_before_its_request_does_gets_the_answer(tls, certificate):
    with socket.create_connection(("127.0.0.1", tls().port), PATIENCE) as tcp:
        with trusting(certificate).wrap_socket(tcp, server_hostname="localhost", suppress_ragged_eofs=False) as sock:
            sock.sendall(REQUEST[:-2])
            socket.socket.shutdown(sock, socket.SHUT_WR)
            assert read_all(sock).startswith(b"HTTP/1.1 400 ")


def link_local():
    """An address of this machine with its scope, None if there is none."""
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as file:
        for line in file:
            address, _, _, scope, _, interface = line.split()
            if scope == "20":
                return ":".join(re.findall("....", address)) + "%" + interface
    return None


@pytest.mark.skipif(not link_local(), reason="there is no link-local IPv6 address here")
def test_an_ipv6_address_with_a_scope():
    with EchoServer(0, host=link_local()) as server:
        with socket.create_connection((link_local(), server.port), PATIENCE) as sock:
            sock.sendall(opening(b"Host: [%s]" % link_local().split("%")[0].encode()) + GOOD)
            wait_for(lambda: server.clients)
            assert sock.recv(12) == b"HTTP/1.1 101"
            (client,) = server.clients
            assert ":" in client["address"][0]
        assert re.fullmatch(r"ws://\[fe80[0-9a-f:]+%%25\w+\]:%d" % server.port, server.url)


# ==== The program, attacked ============================================================================


def ended(*arguments, stdout=subprocess.PIPE):
    """Run the command line to its end, which must come by itself; return (status, stdout, stderr)."""
    process = subprocess.Popen([sys.executable, str(HERE / "echoserver.py"), "0", "--host", "127.0.0.1", *arguments],
                               stdout=stdout, stderr=subprocess.PIPE, universal_newlines=True)
    try:
        out, err = process.communicate(timeout=3)
        return process.returncode, out, err
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("arguments", [["--certfile", ""], ["--certfile", "", "--keyfile", ""]])
def test_an_empty_certfile_is_an_error(arguments):
    """An unset variable must not serve in clear text."""
    code, out, err = ended(*arguments)
    assert (code, out) == (1, "") and err.startswith("echoserver: error: cannot use the certificate") and err.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_standard_output_that_is_full():
    with open("/dev/full", "w") as full:
        code, _, err = ended(stdout=full)
    assert code == 1 and err.startswith("echoserver: error: ") and err.count("\n") == 1


def test_standard_output_that_nobody_reads():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        code, _, err = ended(stdout=writing)
    finally:
        os.close(writing)
    assert code == 1 and err == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["-h"], ["--version"]])
@pytest.mark.parametrize("stdout", ["full", "closed"])
def test_help_that_cannot_be_written(monkeypatch, arguments, stdout, unbuffered):
    """No traceback, and one line at most."""
    if stdout == "full" and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full" if stdout == "full" else writing, "w", closefd=stdout == "full") as file:
        _, _, err = ended(*arguments, stdout=file)
    os.close(writing)
    assert err.count("\n") <= (stdout == "full") and "Traceback" not in err and "Exception" not in err


ENDING = """
    import atexit, logging, sys, time
    from echoserver import EchoServer
    logging.basicConfig(level=logging.DEBUG)
    atexit.register(time.sleep, 0.3)  # in which Python 3.12 starts no thread any more
    server = EchoServer(port=0, host="127.0.0.1", debug=True)
    server.start()
    print(server.port)
    sys.stdin.readline()
"""


def test_a_program_that_ends_under_load_is_silent():
    """It does not close the server; clients still come while the interpreter ends."""
    process = subprocess.Popen([sys.executable, "-u", "-c", textwrap.dedent(ENDING)], cwd=str(HERE), stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    with process:
        port, reading = int(process.stdout.readline()), []
        reader = threading.Thread(target=lambda: reading.extend(process.stderr))
        reader.start()
        with contextlib.suppress(OSError):
            assert first_bytes(port, REQUEST + GOOD).startswith(b"HTTP/1.1 101 ")
            process.stdin.write("end\n")
            process.stdin.flush()
            while process.poll() is None:
                first_bytes(port, REQUEST + GOOD)
        reader.join()
    assert process.returncode == 0 and reading
    for line in reading:
        assert line.startswith("DEBUG:echoserver:"), line


# ==== Many clients at once =============================================================================


def test_broadcasts_joins_and_leaves_at_once(serve):
    """Nothing is lost, nothing is doubled and nothing changes places.

    Each client counts each broadcast that began after it was connected and ended before it left. Meant to be run on
    a free-threaded interpreter, ten times over: ECHOSERVER_TEST_SCALE=10.
    """
    server, done, faults, sessions = serve(Recorder), threading.Event(), [], []
    broadcasts = {}  # name: (when it began, when it had been sent to all)

    def broadcast(number):
        count = 0
        while not done.is_set():
            name, begin = b"%d %d" % (number, count), time.perf_counter()
            server.send_message_to_all(name)
            broadcasts[name] = begin, time.perf_counter()
            count += 1
            time.sleep(0.001)

    def join_and_leave(number):
        for session in range(6 * SCALE):
            got, own = [], [b"echo %d %d %d" % (number, session, message) for message in range(20)]
            with Raw(server) as raw:
                joined = time.perf_counter()
                for message in own:
                    raw.send(client_frame(TEXT, message))
                    while not got or got[-1] != message:
                        got.append(raw.frame()[2])
                leaving = time.perf_counter()
                frames = raw.send(client_frame(CLOSE)).frames()
                got += [payload for _, opcode, payload in frames if opcode != CLOSE]
                if frames[-1] != whole(CLOSE):
                    faults.append("the Close is not the last")
            if [message for message in got if message.startswith(b"echo")] != own:
                faults.append("echoes lost, doubled or of others")
            sessions.append((joined, leaving, [message for message in got if not message.startswith(b"echo")]))

    broadcasting = [threading.Thread(target=broadcast, args=(number,)) for number in range(3)]
    joining = [threading.Thread(target=join_and_leave, args=(number,)) for number in range(10)]
    for thread in broadcasting + joining:
        thread.start()
    for thread in joining:
        thread.join()
    done.set()
    for thread in broadcasting:
        thread.join()
    assert len(sessions) == 60 * SCALE and faults == []
    counted = 0
    for joined, leaving, got in sessions:
        certain = {name for name, (begin, end) in broadcasts.items() if joined < begin and end < leaving}
        assert certain <= set(got) <= set(broadcasts) and len(got) == len(set(got))
        for number in range(3):
            mine = [int(name.split()[1]) for name in got if name.startswith(b"%d " % number)]
            assert mine == sorted(mine)
        counted += len(certain)
    assert counted
    wait_for(lambda: len(server.calls) == 120 * SCALE, "all to leave")
    assert sorted(call[1] for call in server.calls if call[0] == "new") == list(range(1, 60 * SCALE + 1))
    assert sorted(call[1] for call in server.calls if call[0] == "left") == list(range(1, 60 * SCALE + 1))
    assert server.clients == [] and len(server.messages) == 1200 * SCALE


# ==== The page =========================================================================================

def test_the_page_is_served_and_loads_nothing_from_elsewhere(serve):
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
        wait_for(lambda: shutil.rmtree(profile, True) or not os.path.exists(profile), "the profile's end")


class Page:
    """A page in Chromium, and what went wrong in it (`complaints`)."""

    def __init__(self, profile, process, url):
        port_file = pathlib.Path(profile, "DevToolsActivePort")

        def address():
            assert process.poll() is None, "chromium ended with status %s" % process.returncode
            return port_file.exists() and re.fullmatch(r"(\d+)\n(/\S+)", port_file.read_text())

        self.socket = websocket.create_connection(
            "ws://127.0.0.1:%s%s" % wait_for(address, "chromium", 60).groups(), timeout=60, suppress_origin=True)
        self.session, self.number, self.complaints = {}, 0, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(domain + ".enable")
        self.call("Page.navigate", url=url)
        self.until("location.href != 'about:blank' && document.readyState == 'complete'")

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
                self.complaints.append(" ".join(str(arg.get("value", arg.get("description"))) for arg in params["args"]))

    def evaluate(self, expression):
        """Return the value of an expression of JavaScript."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, "%s: %s" % (expression, result["exceptionDetails"])
        return result["result"].get("value")

    def until(self, expression):
        """Return when an expression is true (by wait_for)."""
        wait_for(lambda: self.evaluate("Boolean(%s)" % expression), lambda: "%s; the page shows: %s" % (
            expression, self.evaluate("document.body && document.body.innerText")), 60)

    def text(self, selector, pattern=""):
        """Return the text of an element, when it has a match for a pattern (of JavaScript)."""
        self.until("/%s/.test(document.querySelector(%s).textContent)" % (pattern or "(?:)", json.dumps(selector)))
        return self.evaluate("document.querySelector(%s).textContent" % json.dumps(selector))

    def enter(self, selector, text):
        """Replace what an input has, and press Enter."""
        self.evaluate("document.querySelector(%s).select()" % json.dumps(selector))
        self.call("Input.insertText", text=text)
        for kind, more in (("keyDown", {"text": "\r"}), ("keyUp", {})):
            self.call("Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13, **more)

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
        chooser = self.call("Runtime.evaluate", expression="document.querySelector(%s)" % json.dumps(selector))["result"]
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=chooser["objectId"])


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no Chromium here")
@pytest.mark.parametrize("fixture", ["serve", "tls"])
def test_the_page_in_a_browser(request, fixture):
    """Use each control of the page as a person would, over ws and wss; nothing may be complained about."""
    server = request.getfixturevalue(fixture)(close_timeout=2)
    url = server.url.replace("ws", "http", 1) + "/"
    with chromium(url) as page, tempfile.NamedTemporaryFile(suffix=".bin") as file:
        assert page.text("title") == "Echo server"
        page.text("#state", "^● Connected")
        page.until("!document.querySelector('#send').disabled")

        page.enter("#text", "Grüße, <b>Welt</b> 🌍")
        page.text("#log", r"in +text +25 B +[\d.]+ ms +.Grüße, <b>Welt<\/b> 🌍.*out +text +25 B")

        file.write(bytes(range(256)) * 400)
        file.flush()
        page.choose("#file", file.name)
        page.text("#log", r"in +binary +102400 B +[\d.]+ ms +00 01 02 03.*out +binary +102400 B")

        page.evaluate("document.querySelector('#reason').value = 'bye'")
        page.enter("#code", "1001")  # a browser may not send that one
        assert not page.evaluate("document.querySelector('#connection').checkValidity()")
        page.text("#state", "^● Connected")
        page.enter("#code", "4321")
        page.text("#state", r"^○ Not connected to wss?:.*\. Closed: 4321 bye \(clean\)$")
        assert page.evaluate("document.querySelector('#choose').disabled && document.querySelector('#send').disabled")

        page.click("#connect")
        page.text("#state", r"^● Connected to wss?:[^ ]*$")
        page.enter("#text", "again")
        page.text("#log", r"in +text +5 B +[\d.]+ ms +.again.")

        page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
        page.until("innerWidth == 360 && document.documentElement.scrollWidth == 360")
        assert page.complaints == [], page.complaints


# ==== README ===========================================================================================

BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def run_block(source):
    """Run a block of README as it stands; return its names."""
    names = {}
    exec(compile(source, "README.md", "exec"), names)
    return names


def recipe(name):
    """The class of this name."""
    (source,) = [block for block in BLOCKS if "class %s(" % name in block]
    return run_block(source)[name]


@pytest.mark.parametrize("name, messages, answer, seconds", [
    ("Slow", 1, b"\x81\x04good\x88\0", 0.4), ("ThreeOnly", 4, b"\x81\x04good" * 3 + b"\x88\x08\x03\xf3enough", 0),
    ("Vanishing", 2, b"\x81\x05Hel", 0), ("Fragments", 1, b"\x01\x02go\x89\x0cstill there?\0\x02od\x80\0\x88\0", 0)])
def test_recipe_to_misbehave(serve, name, messages, answer, seconds):
    with Raw(serve(recipe(name))) as raw:
        begin = time.monotonic()
        assert raw.send(GOOD * messages, client_frame(CLOSE)).file.read() == answer
        assert seconds <= time.monotonic() - begin < 5


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
    for path, answer in ((b"/echo?x=1", ECHO), (b"/upper", whole(TEXT, b"GOOD")), (b"/", closing(4404, b"no such path"))):
        with Raw(server, opening(line=b"GET %s HTTP/1.1" % path)) as raw:
            assert raw.send(GOOD).frame() == answer
            raw.send(client_frame(CLOSE)).frames()


def test_readme_try_it(serve, capsys):
    """As it stands, but for the port."""
    (source,) = [block for block in BLOCKS if "ws://localhost:1234" in block]
    names = run_block(source.replace("1234", str(serve().port)))
    assert "hello" in capsys.readouterr().out
    names["client"].close()


def test_readme_in_a_program(serve):
    blocks = [block for block in BLOCKS if "with EchoServer(port=0" in block and "fixture" not in block]
    for block in blocks:
        run_block(block)
    assert blocks


def test_readme_as_a_fixture(tmp_path):
    (fixture,) = [block for block in BLOCKS if "@pytest.fixture" in block]
    (tmp_path / "test_it.py").write_text(fixture, encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=str(tmp_path), stdout=subprocess.PIPE,
                          env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0 and b"1 passed" in done.stdout, done.stdout
