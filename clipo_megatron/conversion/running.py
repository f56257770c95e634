"""Does a conversion: threads that take units of work, signals that stop them, and the rename at the end."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from clipo_megatron.conversion.conversion import Conversion, ConversionError, SourceFile, Tick, WorkUnit
from clipo_megatron.conversion.progress import Meter
from clipo_megatron.conversion.work_folder import WorkFolder
from clipo_megatron.runtime.durable_files import sync

MOST_THREADS = 4
STALL_S = 900.0  # without a byte read or written: the disk hangs
_JOIN_S = 30.0  # how long the threads are waited for at the end
_READ_BYTES = 1 << 22

Item = TypeVar("Item")


class Interrupted(ConversionError):
    """A signal stopped the conversion. `exit_code` is 128 + its number, as in a shell."""

    def __init__(self, signum: int, target: object) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name}; there is no {target}, and the same command starts from the "
            "beginning"
        )
        self.exit_code = 128 + signum


class _Stopped(Exception):
    """Ends a thread whose work is no longer wanted."""


def convert(conversion: Conversion, *, threads: int | None = None) -> float:
    """Do a conversion and give the result its name; return the seconds it took.

    Nothing of an attempt that fails is left. One that is killed leaves a hidden folder, which the next one removes.

    Raises:
        ConversionError: it cannot be done, and the target is not there.
    """
    began, target = time.monotonic(), conversion.target
    meter = Meter()
    try:
        with _Signals() as signals, WorkFolder(target) as work:
            workers = WorkerPool(threads, meter, signals, target)
            work.check_space(conversion.nbytes)
            _check_source(conversion.source_files, workers)
            conversion.prepare(work.content)
            _write(conversion, work.content, workers)
            conversion.finish(work.content)
            workers.check()
            work.publish()
    except OSError as error:
        raise ConversionError(
            f"{target} cannot be written: {error}. Nothing is left of it; mend that or choose another place, and start "
            "again"
        ) from error
    finally:
        meter.end()
        conversion.close()
    return time.monotonic() - began


def _check_source(files: Sequence[SourceFile], workers: WorkerPool) -> None:
    """Compare the source's files with its manifest."""
    defects: list[str] = []

    def check(file: SourceFile, tick: Tick) -> None:
        try:
            with file.path.open("rb", buffering=0) as opened:
                size = os.fstat(opened.fileno()).st_size
                if size != file.nbytes:
                    defects.append(f"{file.path} has {size} bytes, {file.nbytes} were written")
                    return
                code, buffer = 0, memoryview(bytearray(min(_READ_BYTES, size) or 1))
                while count := opened.readinto(buffer):
                    code = zlib.crc32(buffer[:count], code)
                    tick(count)
                if code != file.crc32:
                    defects.append(f"the bytes of {file.path} are not those that were written")
        except OSError as error:
            defects.append(f"{file.path} cannot be read: {error.strerror}")

    workers.run("checking", files, check, sum(file.nbytes for file in files))
    if defects:
        raise ConversionError("the source is damaged: " + "; ".join(sorted(defects)) + ". Restore it from a copy")


def _write(conversion: Conversion, content: Path, workers: WorkerPool) -> None:
    def write(unit: WorkUnit, tick: Tick) -> None:
        to_disk.add(conversion.write(unit, content, tick))

    with _ToDisk(conversion.target) as to_disk:
        workers.run("writing", conversion.units, write, conversion.nbytes)
        to_disk.wait()


class _ToDisk:
    """Forces written files to disk in threads of its own: the writing threads would only wait for the disk."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._pool = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="to disk")
        self._begun: list[Future[None]] = []

    def __enter__(self) -> _ToDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def add(self, files: Sequence[Path]) -> None:
        """Force files to disk, sooner or later."""
        self._begun += [self._pool.submit(sync, file) for file in files]

    def wait(self) -> None:
        """Wait until all files are on disk.

        Raises:
            OSError: one could not be forced. ConversionError: the disk hangs.
        """
        for each in self._begun:
            try:
                each.result(STALL_S)
            except futures.TimeoutError:
                raise ConversionError(
                    f"{self._target} was not forced to disk within {STALL_S:.0f} s: the disk hangs. Choose another"
                ) from None


class WorkerPool:
    """The threads of a conversion, by default one more than there are processors, up to four."""

    def __init__(self, threads: int | None, meter: Meter, signals: _Signals, target: Path) -> None:
        self.threads = threads or min(MOST_THREADS, (os.cpu_count() or 1) + 1)
        self._meter, self._signals, self._target = meter, signals, target

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self._signals.received:
            raise Interrupted(self._signals.received, self._target)

    def run(self, phase: str, items: Sequence[Item], work: Callable[[Item, Tick], None], total: int) -> None:
        """Do `work(item, tick)` for every item, several at a time, and count the `total` bytes.

        Raises:
            The first error of a thread, or what `check` raises. All threads have ended then, unless the disk hangs.
        """
        todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
        for item in items:
            todo.put(item)
        stop, counting = threading.Event(), threading.Lock()
        errors: list[BaseException] = []
        done = 0

        def tick(count: int) -> None:
            nonlocal done
            with counting:
                done += count
            if stop.is_set():
                raise _Stopped

        def take() -> None:
            try:
                while not stop.is_set():
                    try:
                        item = todo.get_nowait()
                    except queue.Empty:
                        return
                    work(item, tick)
            except _Stopped:
                return
            except BaseException as error:
                errors.append(error)
                stop.set()

        self._meter.begin(phase, total)
        workers = [threading.Thread(target=take, daemon=True) for _ in range(min(self.threads, len(items)))]
        for worker in workers:
            worker.start()
        try:
            self._watch(workers, lambda: done, stop)
        finally:
            stop.set()
            for worker in workers:
                worker.join(_JOIN_S)
            self._meter.end()
        if errors:
            raise errors[0]

    def _watch(self, workers: Sequence[threading.Thread], done: Callable[[], int], stop: threading.Event) -> None:
        moved, last = time.monotonic(), -1
        while any(worker.is_alive() for worker in workers) and not stop.is_set():
            self.check()
            for worker in workers:
                worker.join(0.05)
            now = done()
            self._meter.show(now)
            if now != last:
                moved, last = time.monotonic(), now
            if time.monotonic() - moved > STALL_S:
                raise ConversionError(
                    f"nothing was read or written for {STALL_S:.0f} s: the disk of the source or of "
                    f"{self._target} hangs. Choose another"
                )


class _Signals:
    """Notes the first SIGINT or SIGTERM, to be asked for; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: Any) -> None:
        self.received = signum
        signal.signal(signum, signal.SIG_DFL)
