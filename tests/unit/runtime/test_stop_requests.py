"""Requests to end: which signals are one request, when each came, and what is raised where."""

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
import zlib

import pytest
from progress import end_of, wait_until
from random_stops import handles_signals

from clipo_megatron.runtime import stop_requests
from clipo_megatron.runtime.stop_requests import ALL, SIGNALS, StopRequested, StopRequests, asked_by

WINDOW_S = 0.3


@pytest.fixture
def requests(monkeypatch):
    monkeypatch.setattr(stop_requests, "AGAIN_AFTER_S", WINDOW_S)
    return StopRequests()


def test_signals_within_a_while_are_one_request_and_a_later_one_is_another(requests):
    with requests.handled(tolerated=ALL):
        for number in (signal.SIGTERM, *SIGNALS, signal.SIGTERM):
            signal.raise_signal(number)
        assert (requests.count, requests.signum) == (1, signal.SIGTERM)
        time.sleep(1.1 * WINDOW_S)
        signal.raise_signal(signal.SIGHUP)
        assert (requests.count, requests.signum) == (2, signal.SIGTERM)
    assert (requests.count, requests.signum) == (0, 0)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_is_not_tolerated_is_raised_once(requests):
    with requests.handled(tolerated=1):
        signal.raise_signal(signal.SIGUSR1)
        time.sleep(1.1 * WINDOW_S)
        with pytest.raises(StopRequested, match=r"another signal, .* after SIGUSR1") as caught:
            signal.raise_signal(signal.SIGINT)
        assert caught.value.exit_code == 138
        signal.raise_signal(signal.SIGINT)  # part of the same request
    with requests.handled(tolerated=0), pytest.raises(StopRequested, match="stopped by SIGHUP; there was nothing"):
        signal.raise_signal(signal.SIGHUP)


def test_the_time_of_a_signal_is_when_it_came_not_when_python_had_time_for_it(requests):
    """The second one comes while the main thread is in C, and its handler runs long after the window."""

    def send_again():
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    data = os.urandom(1 << 20) * 40
    with requests.handled(tolerated=ALL):
        signal.raise_signal(signal.SIGTERM)
        began = time.monotonic()
        sender = threading.Thread(target=send_again)
        sender.start()
        zlib.compress(data, 6)
        assert time.monotonic() - began > 1.5 * WINDOW_S, "it has to take longer than the window"
        sender.join()
        assert requests.count == 1


def test_what_the_parent_ignores_stays_ignored_but_for_ctrl_c(requests):
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        with requests.handled(tolerated=ALL):
            signal.raise_signal(signal.SIGHUP)
            assert requests.count == 0
            signal.raise_signal(signal.SIGINT)
            assert requests.count == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("code", "number"),
    [
        (0, 0),
        (1, 0),
        (2, 0),
        (70, 0),
        (137, 0),
        (-9, 0),
        (129, 1),
        (130, 2),
        (138, 10),
        (143, 15),
        (-15, 15),
        (-10, 10),
    ],
)
def test_exit_codes_that_a_signal_explains(code, number):
    assert asked_by(code) == number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_a_command_starts_is_one_line_and_its_exit_code(number, tmp_path):
    """Held back until the first lines, as for ranks; the command would end with another code."""
    command = [sys.executable, "-m", "clipo_megatron.cli", "train", str(tmp_path / "none.yaml")]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=stop_requests.block, start_new_session=True
    )
    try:
        process.send_signal(number)
        process.send_signal(number)
        assert end_of(process) == 128 + number
        said = process.stderr.read()
        assert said == f"clipo: stopped by {signal.Signals(number).name}; there was nothing to save\n"
    finally:
        process.kill()
        process.stderr.close()


def test_a_command_that_has_ended_is_not_ended_by_a_signal():
    ends = (
        "import os, signal, sys; from clipo_megatron.cli import __main__ as command\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, me=os.getpid(), usr1=signal.SIGUSR1): kill(me, usr1)\n"
        "os.late, sys.argv = Late(), ['clipo', 'settings', 'clipo']\n"
        "sys.exit(command.start())"
    )
    done = subprocess.run([sys.executable, "-c", ends], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_that_does_not_unwind_is_ended_all_the_same():
    hangs = (
        "import clipo_megatron.runtime.stop_requests as stops\n"
        "stops.AGAIN_AFTER_S, stops._UNWIND_S = 0.1, 0.1\n"
        "stops.REQUESTS.install(tolerated=1)\n"
        "import ctypes; libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "print(flush=True)\n"
        "libc.pthread_mutex_lock(mutex); libc.pthread_mutex_lock(mutex)\n"  # not even a signal ends this wait
    )
    with subprocess.Popen([sys.executable, "-c", hangs], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        assert handles_signals(process.pid)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: process.poll() is not None, "its end")
        assert process.returncode == 143


@pytest.mark.parametrize("where", ["a weak reference's callback", "a destructor"])
def test_a_request_that_python_ignores_is_raised_again(requests, where, capfd):
    """Imports are full of such callbacks; there an exception is printed, and the command would go on to its end."""

    def ask(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    class Thing:
        if where == "a destructor":
            __del__ = ask

    thing = Thing()
    watched = weakref.ref(thing, ask) if where != "a destructor" else None
    with requests.handled(tolerated=0), pytest.raises(StopRequested, match="stopped by SIGTERM"):
        del thing
        wait_until(lambda: False, "the request")
    assert watched is None or watched() is None
    assert capfd.readouterr().err == "" and requests.count == 0
