#!/usr/bin/env python3
"""A rolling restart of three echo servers behind HAProxy with TLS, by the configuration in README.md, under load.

It takes no arguments, prints what it counted and exits with a status other than 0 when an assertion fails.
It needs haproxy, openssl and the package websocket-client, and uses loopback only.
"""
import collections
import contextlib
import pathlib
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib

import websocket

TOP = pathlib.Path(__file__).resolve().parent.parent
SERVERS, CLIENTS = 3, 30
PAUSE = 0.02  # seconds of each client between an answer and its next message
CHECK = 2.0  # seconds after which HAProxy has surely checked a server that came back: more than its "inter"


class Proxied:
    """Echo servers behind HAProxy, each a process. A context manager that leaves nothing behind."""

    def __init__(self, folder):
        self.folder, self.log, self.pem = folder, folder / "haproxy.log", str(folder / "echo.pem")
        self.port, *self.ports = free_ports(1 + SERVERS)
        self.servers, self.haproxy = {}, None

    def __enter__(self):
        try:
            certificate(self.folder, self.pem)
            for port in self.ports:
                self.start(port)
            command = ["haproxy", "-f", str(self.configuration())]
            said = subprocess.check_output([*command, "-c"], stderr=subprocess.STDOUT, text=True)
            assert said == "Configuration file is valid\n", said  # no warning
            with self.log.open("w") as log:
                self.haproxy = subprocess.Popen([*command, "-db"], stdout=log, stderr=subprocess.STDOUT)
            wait_until(lambda: self.page() == 200)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in filter(None, [self.haproxy, *self.servers.values()]):
            process.kill()
            process.wait()

    def configuration(self):
        """Write the configuration with the ports and the certificate of this run; return where."""
        (text,) = re.findall("```haproxy\n(.*?)```", (TOP / "README.md").read_text(encoding="utf-8"), re.S)
        changes = [("bind :8443 ", "bind 127.0.0.1:%d " % self.port), (" /etc/haproxy/echo.pem ", " %s " % self.pem)]
        changes += [(" 127.0.0.1:%d" % (9001 + i), " 127.0.0.1:%d" % port) for i, port in enumerate(self.ports)]
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = self.folder / "haproxy.cfg"
        path.write_text(text)
        return path

    def start(self, port):
        """Start a server, and wait until its page is there."""
        self.servers[port] = subprocess.Popen([sys.executable, str(TOP / "echoserver.py"), str(port), "--host", "127.0.0.1"],
                                              stdout=subprocess.DEVNULL)
        wait_until(lambda: self.page("http://127.0.0.1:%d/" % port) == 200)

    def terminate(self, port):
        """End a server as a service manager does; return how long that took."""
        begin = time.monotonic()
        self.servers[port].send_signal(signal.SIGTERM)
        assert self.servers[port].wait(15) == 0
        return time.monotonic() - begin

    def page(self, url=None):
        """Return the HTTP status of the page, through the proxy or where the URL says; None if there is no answer."""
        url, context = url or "https://localhost:%d/" % self.port, ssl.create_default_context(cafile=self.pem)
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5, context=context) as answer:
            return answer.status if b"<title>" in answer.read() else None

    def connect(self, **options):
        """Return a client's WebSocket connection through the proxy."""
        return websocket.create_connection("wss://localhost:%d" % self.port, timeout=10,
                                           sslopt={"ca_certs": self.pem}, **options)

    def logged(self, words):
        return self.log.read_text().count(words)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def certificate(folder, pem):
    """Make a certificate for localhost, and write it and its key into one file, as HAProxy takes them."""
    key, cert = folder / "key", folder / "cert"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
                    "-keyout", str(key), "-out", str(cert)], check=True, stderr=subprocess.DEVNULL)
    pathlib.Path(pem).write_text(cert.read_text() + key.read_text())


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not within %g seconds" % seconds
        time.sleep(0.02)


def exchange(ws, message, tally):
    """Send a message; return the answer, or None when the connection ended instead. Count how it ended."""
    try:
        ws.send(message)
        opcode, data = ws.recv_data()  # answers a Close with a Close
    except (OSError, websocket.WebSocketException) as error:
        tally["lost: %r" % error] += 1
    else:
        if opcode != websocket.ABNF.OPCODE_CLOSE:
            return data.decode()
        tally["Close %d" % int.from_bytes(data[:2], "big")] += 1
    ws.shutdown()


def talk(proxied, name, done, tally):
    """Be a client: one numbered message after the other; reconnect, and send it again, until it is answered."""
    ws, number, attempts = None, 0, 0
    while not done.is_set():
        message, answer = "client %d, message %d" % (name, number), None
        while answer is None and attempts < 50:
            if ws is None:
                attempts += 1
                try:
                    ws = proxied.connect()
                    tally["connected"] += 1
                except (OSError, websocket.WebSocketException) as error:
                    tally["refused: %r" % error] += 1
                    time.sleep(0.1)
                    continue
            answer = exchange(ws, message, tally)
            if answer is None:
                ws = None
                tally["sent again"] += 1
        tally["answered" if answer == message else "unanswered" if answer is None else "wrong answer"] += 1
        number += 1
        time.sleep(PAUSE)
    with contextlib.closing(ws):  # nothing more may have come, but the answer to this Close
        ws.send_close(1000)
        tally["nothing left" if ws.recv_data() == (8, b"\x03\xe8") else "something left"] += 1


def visit(proxied, done, tally):
    """Be new clients, one after the other: each connects, has one message echoed and leaves; and see the page."""
    while not done.is_set():
        try:
            ws = proxied.connect()
        except (OSError, websocket.WebSocketException) as error:
            tally["refused: %r" % error] += 1
        else:
            tally["connected"] += 1
            if exchange(ws, "hello", tally) == "hello":
                tally["answered"] += 1
                ws.close()
        tally["page %s" % proxied.page()] += 1


def rolling_restart(proxied):
    """Restart each server in turn under load; return what the clients and the visitors counted."""
    done = threading.Event()
    clients, visitors = [collections.Counter() for _ in range(CLIENTS)], [collections.Counter() for _ in range(2)]
    threads = [threading.Thread(target=talk, args=(proxied, i, done, tally)) for i, tally in enumerate(clients)]
    threads += [threading.Thread(target=visit, args=(proxied, done, tally)) for tally in visitors]
    for thread in threads:
        thread.start()
    try:
        time.sleep(1)
        for port in proxied.ports:
            print("  a server ended with status 0 in %.2f s" % proxied.terminate(port))
            proxied.start(port)
            time.sleep(CHECK)
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return sum(clients, collections.Counter()), sum(visitors, collections.Counter())


def check_page_and_messages(proxied):
    assert proxied.page() == 200
    ws = proxied.connect(header=["Sec-WebSocket-Extensions: permessage-deflate"])
    for size in (0, 1, 125, 126, 65535, 65536, 2**20):
        ws.send_binary(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
        assert len(ws.recv()) == size
    big = "12345678" * 2**17
    ws.send(big)
    assert ws.recv() == big  # 1 MiB
    # Compression: websocket-client has none, so take the frame from below it.
    assert ws.getheaders()["sec-websocket-extensions"] == "permessage-deflate"
    deflater = zlib.compressobj(wbits=-15)
    packed = (deflater.compress(b"a" * 1000) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]
    ws.sock.sendall(websocket.ABNF(1, 1, 0, 0, websocket.ABNF.OPCODE_TEXT, 1, packed).format())
    answer = ws.sock.recv(4096)
    assert answer[0] == 0xC1 and answer[1] == len(answer) - 2 < 126  # FIN, RSV1: it is compressed
    assert zlib.decompressobj(wbits=-15).decompress(answer[2:] + b"\0\0\xff\xff") == b"a" * 1000
    ws.close()


def check_health(proxied):
    """A server that stays away is taken out, and taken in again when it is back; the others serve on."""
    time.sleep(CHECK)
    begin = time.monotonic()
    proxied.terminate(proxied.ports[1])
    wait_until(lambda: proxied.logged("Server echo/echo2 is DOWN"))
    down = time.monotonic() - begin
    assert [proxied.page() for _ in range(6)] == [200] * 6
    begin = time.monotonic()
    proxied.start(proxied.ports[1])
    wait_until(lambda: proxied.logged("Server echo/echo2 is UP"))
    print("  DOWN %.1f s after SIGTERM, UP %.1f s after the start" % (down, time.monotonic() - begin))


def main():
    with tempfile.TemporaryDirectory() as folder, Proxied(pathlib.Path(folder)) as proxied:
        check_page_and_messages(proxied)
        print("page, messages up to 1 MiB and compression: all right")
        check_health(proxied)
        begin = time.monotonic()
        clients, visitors = rolling_restart(proxied)
        print("rolling restart under load, %.1f s" % (time.monotonic() - begin))
        print("  %d clients: %s" % (CLIENTS, dict(sorted(clients.items()))))
        print("  visitors:   %s" % dict(sorted(visitors.items())))
        print("  HAProxy:    %d times DOWN, %d times UP" % (proxied.logged(" is DOWN"), proxied.logged(" is UP")))
        # Every message was answered, by its own echo and nothing else; every connection that ended was told
        # so by Close 1001; and no attempt to connect failed.
        reconnects = clients["connected"] - CLIENTS
        assert reconnects >= CLIENTS  # each server had clients, and the last one those of the others
        assert set(clients) == {"answered", "connected", "Close 1001", "sent again", "nothing left"}, clients
        assert clients["Close 1001"] == clients["sent again"] == reconnects
        assert clients["nothing left"] == CLIENTS and clients["answered"] > 10 * CLIENTS
        assert set(visitors) <= {"answered", "connected", "Close 1001", "page 200"}, visitors
        assert visitors["answered"] + visitors["Close 1001"] == visitors["connected"]
        assert proxied.logged("no server available") == 0


if __name__ == "__main__":
    main()
