"""A real `mlflow server` of one's own, which a test can kill, stop or slow down."""

import contextlib
import http.client
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.ports import free_ports


class TrackingServer:
    """An mlflow server behind a proxy that can be slow, or answer 500."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port, proxy_port = free_ports(2)
        self.delay_s, self.is_broken = 0.0, False
        self.start()
        outer = self

        class Proxy(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                time.sleep(outer.delay_s)
                status, answer = outer.ask(self.command, self.path, body, dict(self.headers))
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = do

        self._proxy = http.server.ThreadingHTTPServer(("127.0.0.1", proxy_port), Proxy)
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.uri = f"http://127.0.0.1:{proxy_port}"

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        if self.is_broken:
            return 500, b'{"error_code": "INTERNAL_ERROR", "message": "out of order"}'
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            connection.request(method, path, body, {**headers, "Host": f"127.0.0.1:{self._port}"})
            response = connection.getresponse()
            return response.status, response.read()
        except OSError:
            return 502, b"{}"
        finally:
            connection.close()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/server.db"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self._folder, start_new_session=True
            )
        deadline = time.monotonic() + 360
        while True:
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                pytest.fail((self._folder / "log.txt").read_text()[-2000:])
            time.sleep(0.3)

    def signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()

    def close(self) -> None:
        self._proxy.shutdown()
        self.signal(signal.SIGKILL)
