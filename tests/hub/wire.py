"""HTTP: reads requests, has them answered, and lets faults happen on the way."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from hub.answers import Answer, Call, Refusal, as_json
from hub.blobs import Blob, Slice
from hub.control import routes as control_routes
from hub.faults import Fault
from hub.journal import Record
from hub.routes import Routes

if TYPE_CHECKING:
    from hub.server import Hub

_STEP = 1 << 18
_RESET = struct.pack("ii", 1, 0)


class Origin(ThreadingHTTPServer):
    """One of the two origins, on a free port of the loopback interface."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, hub: Hub, name: str, host: str, routes: Routes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        self.name = name
        self.routes = routes
        # Two names: huggingface_hub 1.x takes two ports of one name for one origin, and sends its token to both.
        self.url = f"http://{host}:{self.server_address[1]}"
        self._open: set[socket.socket] = set()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name=f"hub-{name}", daemon=True)
        self._thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        # After SO_LINGER has been set to zero, a plain close resets the connection; a shutdown would end it orderly.
        linger = request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(_RESET)) if request.fileno() >= 0 else b""
        if linger == _RESET:
            self.close_request(request)
        else:
            super().shutdown_request(request)
        with self._changed:
            self._open.discard(request)
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A connection that breaks between two requests is nothing to report.
        if not isinstance(sys.exception(), OSError):
            self.hub.errors.append(traceback.format_exc())

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
        with self._changed:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            if not self._changed.wait_for(lambda: not self._open, timeout=10):
                self.hub.errors.append(f"{len(self._open)} connections to {self.name} did not end")


class Handler(BaseHTTPRequestHandler):
    """Serves one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Origin

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        record = Record(
            origin=self.server.name,
            method=self.command,
            path=path,
            query=query,
            authorization="Authorization" in self.headers,
            range=self.headers.get("Range"),
            time=time.time(),
        )
        try:
            if path.startswith("/_ctl/"):
                self._control(record)
            else:
                self._exchange(record)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the client went away
        except Exception:  # noqa: BLE001 - tests look at the list of errors
            self.server.hub.errors.append(traceback.format_exc())
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _serve  # noqa: N815 - named by http.server

    def _exchange(self, record: Record) -> None:
        hub = self.server.hub
        where = (record.origin, record.method, record.path)
        fault, delay = hub.faults.of_request(*where)
        kind = fault.kind if fault is not None else None
        if fault is not None and kind == "drop-upload":
            self._skip(record, fault.after)
            self._hang_up(record, fault)
            return
        body, sha256 = self._receive(record)
        hub.pause(hub.latency + delay)
        call = Call(record.method, record.path, record.query, self.headers, body, sha256)
        if fault is not None and kind == "drop":
            hub.forget(body)
            self._hang_up(record, fault)
        elif fault is not None and kind == "status":
            hub.forget(body)
            text = fault.headers.get("X-Error-Message", HTTPStatus(fault.status).phrase)
            self._send(record, as_json({"error": text}, status=fault.status, headers=fault.headers), None)
        else:
            answer = self._perform(call, self.server.routes)
            if record.origin == "hub" or answer.status >= 300:
                hub.forget(body)  # only the storage keeps what it receives
            if fault is not None:  # its reply is lost
                self._hang_up(record, fault)
                return
            hit = None
            if 200 <= answer.status < 300 and record.method != "HEAD":
                hit = hub.faults.of_body(*where, len(answer.body))
            self._send(record, answer, hit)

    def _control(self, record: Record) -> None:
        """Neither logged nor delayed nor hit by faults."""
        body, sha256 = self._receive(record)
        call = Call(record.method, record.path, record.query, self.headers, body, sha256)
        self._send(record, self._perform(call, control_routes), None, log=False)

    def _perform(self, call: Call, routes: Routes) -> Answer:
        hub = self.server.hub
        try:
            return routes.find(hub, call) or Refusal(404, f"Nothing is served at {call.path}").answer()
        except Refusal as refusal:
            return refusal.answer()
        except Exception as error:  # noqa: BLE001 - tests look at the list of errors
            hub.errors.append(traceback.format_exc())
            return Refusal(500, f"{type(error).__name__}: {error}").answer()

    # Reading

    def _incoming(self) -> Iterator[bytes | memoryview]:
        """The request's body in pieces."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self.rfile.readline(1024).split(b";")[0] or b"0", 16):
                yield from self._read(size)
                self.rfile.readline(16)
            while self.rfile.readline(1024).strip():
                pass
        else:
            yield from self._read(int(self.headers.get("Content-Length", "0")))

    def _read(self, size: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(size, _STEP)))
        while size:
            got = self.rfile.readinto(buffer[: min(size, _STEP)])
            if not got:
                raise ConnectionResetError("the client went away in the middle of its request")
            size -= got
            yield buffer[:got]

    def _receive(self, record: Record) -> tuple[Blob, str]:
        hub, spool, started = self.server.hub, self.server.hub.spool(), time.monotonic()
        try:
            for chunk in self._incoming():
                spool.write(chunk)
                record.received += len(chunk)
                self._throttle(record.received, started)
        except BaseException:
            hub.journal.note(record)
            spool.discard()
            raise
        return spool.finish()

    def _skip(self, record: Record, count: int) -> None:
        """Reads as much of the body as that and keeps none of it."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            for chunk in self._incoming():
                record.received += len(chunk)
                if record.received >= count:
                    return
        else:
            for chunk in self._read(min(count, int(self.headers.get("Content-Length", "0")))):
                record.received += len(chunk)

    # Writing

    def _hang_up(self, record: Record, fault: Fault) -> None:
        if record.status == 0:
            self.server.hub.journal.note(record)
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.close_connection = True

    def _send(self, record: Record, answer: Answer, fault: Fault | None, *, log: bool = True) -> None:
        body = answer.body
        if fault is not None and fault.kind == "truncate":
            body = body.cut(fault.after)
        headers = {"Date": self.date_time_string(), "Content-Length": str(len(body)), **answer.headers}
        phrase = HTTPStatus(answer.status).phrase
        lines = [f"HTTP/1.1 {answer.status} {phrase}", *(f"{name}: {value}" for name, value in headers.items())]
        head = "\r\n".join([*lines, "\r\n"]).encode("latin-1", "replace")
        record.status = answer.status
        if log:
            self.server.hub.journal.note(record)
        if record.method == "HEAD":
            self.connection.sendall(head)
        elif fault is not None and fault.kind == "drop-body":
            self._send_body(record, head, body.cut(fault.after), None)
            self._hang_up(record, fault)
        else:
            flip = fault.after if fault is not None and fault.kind == "flip" else None
            self._send_body(record, head, body, flip)

    def _send_body(self, record: Record, head: bytes, body: Slice, flip: int | None) -> None:
        rate, started = self._rate(), time.monotonic()
        chunks = body.chunks(_STEP if rate is None else max(1, min(_STEP, int(rate / 20))))
        with contextlib.closing(chunks):
            for chunk in chunks:
                data: bytes | bytearray | memoryview = chunk
                if flip is not None and record.sent <= flip < record.sent + len(chunk):
                    data = bytearray(chunk)
                    data[flip - record.sent] ^= 1
                self._throttle(record.sent + len(data), started)
                record.sent += len(data)
                # The head goes with the first piece: two small packets would cost a small answer a second wake-up.
                try:
                    self.connection.sendall(b"".join([head, data]) if head else data)
                except BaseException:
                    record.sent -= len(data)
                    raise
                head = b""
        if head:
            self.connection.sendall(head)

    def _rate(self) -> float | None:
        return self.server.hub.bytes_per_second if self.server.name == "storage" else None

    def _throttle(self, count: int, started: float) -> None:
        if (rate := self._rate()) is not None:
            self.server.hub.pause(count / rate - (time.monotonic() - started))
