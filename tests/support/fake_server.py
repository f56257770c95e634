"""A program that starts, answers and fails like the server of an engine, for tests of the supervisor.

    python fake_server.py PORT FOLDER      behaves as the files in FOLDER say, which may be added and removed:

    exit-N      ends with code N at once             start-slowly   is never ready
    busy        its engine does not answer           deaf           its HTTP process does not answer
    stubborn    ignores SIGTERM                      say-WORD       prints the word at its start

At each start it appends a line to FOLDER/starts. It has a child process, whose id is in FOLDER/child.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT, FOLDER = int(sys.argv[1]), Path(sys.argv[2])


def told(word: str) -> bool:
    return (FOLDER / word).exists()


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        while told("deaf") or (told("busy") and self.path == "/is_sleeping"):
            time.sleep(0.05)
        if self.path == "/health" and told("start-slowly"):
            self.send_response(503)
        else:
            self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments):
        """Log nothing."""


def main() -> None:
    with (FOLDER / "starts").open("a") as file:
        file.write(f"{os.getpid()} {time.monotonic()}\n")
    for file in FOLDER.glob("say-*"):
        print(f"the word is {file.name[4:]}!", flush=True)
    for file in FOLDER.glob("exit-*"):
        print("something is wrong", flush=True)
        sys.exit(int(file.name[5:]))
    if told("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    (FOLDER / "child").write_text(str(child.pid))
    ThreadingHTTPServer(("127.0.0.1", PORT), Answers).serve_forever()


main()
