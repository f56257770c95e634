"""Connections to servers: kept between calls that follow each other, and not until the server closes them."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from clipo_megatron.rollout.servers.http import EventLoop, JsonClient


def test_an_idle_connection_is_given_up_before_its_server_closes_it() -> None:
    ports: list[int] = []

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            ports.append(self.client_address[1])
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    loop, client = EventLoop("test"), JsonClient(f"http://127.0.0.1:{server.server_port}")
    try:
        for idle_s in (0.0, 0.0, 3.0):  # servers close idle connections after 5 s
            time.sleep(idle_s)
            loop.run(client.get("/", deadline_s=10), deadline_s=20)
    finally:
        loop.run(client.close(), deadline_s=10)
        loop.close()
        server.shutdown()
        server.server_close()
    assert ports[0] == ports[1] != ports[2]
