"""Doing a conversion: threads that take units, signals that stop them, and what is done at the end."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from clipo_megatron.conversion.plan import Check, Conversion, ConversionError, Record, WorkUnit
from clipo_megatron.conversion.progress import Meter
from clipo_megatron.conversion.ranks import Ranks
from clipo_megatron.conversion.work import WorkFolder, crc32_of
from clipo_megatron.runtime.durable_files import sync

MOST_THREADS = 4
_LAST_S = 30.0  # for threads to end
STALL_S = 900.0  # without a byte read or written anywhere: the disk hangs

Item = TypeVar("Item")
Work = Callable[[Any, Callable[[int], None]], None]


class Interrupted(ConversionError):
    """A signal came. `exit_code` is the shell's, 128 + its number."""

    def __init__(self, signum: int, target: object, *, shared: bool) -> None:
        why = " (a launcher sends it to all ranks when one of them has ended)" if shared else ""
        super().__init__(
            f"stopped by {signal.Signals(signum).name}{why}; there is no {target} yet, and the same command goes on "
            "from what is done"
        )
        self.exit_code = 128 + signum


class _Stopped(Exception):
    """Ends a thread whose work is not wanted any more."""


def convert(conversion: Conversion, *, threads: int | None = None, ranks: Ranks | None = None) -> float:
    """Do a conversion, or what is left of it, and give the result its name. Every rank calls it.

    Returns:
        Seconds it took.

    Raises:
        ConversionError: it cannot be done; the target is not there, and what is done is kept for another try.
    """
    began = time.monotonic()
    with ranks or Ranks() as ranks, _Signals() as signals:
        meter = Meter(enabled=ranks.leads)
        team = Team(threads, ranks, meter, signals, conversion.target)
        work = WorkFolder(conversion.target)
        try:
            if ranks.leads:
                if said := work.claim(conversion.facts):
                    meter.say(said)
                _make_ready(conversion, work, meter)
            ranks.meet("ready", team.check)
            _check_source(conversion, ranks, team)
            _write(conversion, work, ranks, team, meter)
            ranks.meet("written", team.check)
            if ranks.leads:
                conversion.finish(work.content, _all_records(conversion, work))
                team.check()
                work.publish()
            ranks.meet("published", team.check)
        except BaseException as error:
            ranks.fail(str(error) or type(error).__name__)
            if isinstance(error, OSError):
                raise ConversionError(
                    f"{conversion.target} cannot be written: {error}. The same command goes on from what is done"
                ) from error
            raise
        finally:
            meter.end()
            work.release()
            conversion.close()
    return time.monotonic() - began


def _make_ready(conversion: Conversion, work: WorkFolder, meter: Meter) -> None:
    known = work.records()
    done = [unit for unit in conversion.units if unit.name in known]
    if done:
        meter.say(f"going on: {len(done)} of {len(conversion.units)} parts were written before")
    work.check_space(conversion.nbytes - sum(unit.nbytes for unit in done))
    conversion.prepare(work.content)


def _check_source(conversion: Conversion, ranks: Ranks, team: Team) -> None:
    """Compare the source's files with its manifest."""
    defects: list[str] = []

    def check(item: Check, tick: Callable[[int], None]) -> None:
        try:
            with item.file.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != item.nbytes:
                    defects.append(f"{item.file} has {size} bytes, {item.nbytes} were written")
                elif crc32_of(file.fileno(), 0, size, tick) != item.crc32:
                    defects.append(f"the bytes of {item.file} are not those that were written")
        except OSError as error:
            defects.append(f"{item.file} cannot be read: {error.strerror}")

    total = sum(item.nbytes for item in conversion.checks)
    team.run("checking", ranks.share(conversion.checks), check, total)
    if defects:
        raise ConversionError("the source is damaged: " + "; ".join(sorted(defects)) + ". Restore it from a copy")


def _write(conversion: Conversion, work: WorkFolder, ranks: Ranks, team: Team, meter: Meter) -> None:
    known = work.records()
    mine = ranks.share(conversion.units)
    changed: list[str] = []

    def write(unit: WorkUnit, tick: Callable[[int], None]) -> None:
        if unit.name in known:
            counted = 0

            def within(count: int) -> None:  # metadata counts too: never beyond what the unit stands for
                nonlocal counted
                tick(max(min(count, unit.nbytes - counted), 0))
                counted += count

            if work.holds(known[unit.name], within):
                tick(max(unit.nbytes - counted, 0))
                return
            changed.append(unit.name)
            tick(-min(counted, unit.nbytes))
        forcing.add(conversion.write(unit, work.content, tick))

    with _Forcing(work, ranks.rank) as forcing:
        team.run("writing", mine, write, conversion.nbytes)
        forcing.wait()
    if changed:
        meter.say(f"wrote {len(changed)} parts again that had changed since they were written")


class _Forcing:
    """Forces what units wrote to disk and notes them in the journal, beside the threads that write: those would only
    wait, and a disk takes several files at once."""

    def __init__(self, work: WorkFolder, rank: int) -> None:
        self._work, self._journal, self._noting = work, work.journal(rank), threading.Lock()
        self._pool = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="to disk")
        self._begun: list[Future[None]] = []

    def __enter__(self) -> _Forcing:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False)
        futures.wait(self._begun, _LAST_S)  # what was written is not lost when a conversion is stopped
        self._journal.close()

    def add(self, record: Record) -> None:
        """A unit that was written."""
        self._begun.append(self._pool.submit(self._force, record))

    def wait(self) -> None:
        """Until all of them are on disk.

        Raises:
            OSError: one could not be. ConversionError: the disk hangs.
        """
        for each in self._begun:
            try:
                each.result(STALL_S)
            except futures.TimeoutError:
                raise ConversionError(
                    f"{self._work.target} was not forced to disk within {STALL_S:.0f} s: the disk hangs. The same "
                    "command goes on from what is done"
                ) from None

    def _force(self, record: Record) -> None:
        for name in sorted({span.file for span in record.spans}):
            sync(self._work.content / name)
        with self._noting:
            self._journal.note(record)


def _all_records(conversion: Conversion, work: WorkFolder) -> Sequence[Record]:
    known = work.records()
    missing = [unit.name for unit in conversion.units if unit.name not in known]
    if missing:
        raise ConversionError(
            f"the journal in {work.folder} lacks {', '.join(missing[:5])}: all ranks must see the same folder"
        )
    return [known[unit.name] for unit in conversion.units]


class Team:
    """This process's threads."""

    def __init__(
        self,
        threads: int | None,
        ranks: Ranks,
        meter: Meter,
        signals: _Signals,
        target: object,
        stall_s: float = STALL_S,
    ) -> None:
        self.threads = threads or min(MOST_THREADS, (os.cpu_count() or 1) + 1)
        self._ranks, self._meter, self._signals, self._target = ranks, meter, signals, target
        self._stall_s = stall_s

    def check(self) -> None:
        """Raise when the conversion is to stop."""
        if self._signals.came:
            raise Interrupted(self._signals.came, self._target, shared=self._ranks.world > 1)
        self._ranks.raise_if_lost()

    def run(self, phase: str, items: Sequence[Item], work: Work, total: int) -> None:
        """Do `work(item, tick)` for every item, several at a time; `total` bytes are counted over all ranks.

        Raises:
            The first error that a thread met, or what `check` raises; all threads have ended then, but for those that
            hang in the disk.
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

        self._ranks.count(0)
        self._meter.begin(phase, total)
        workers = [threading.Thread(target=take, daemon=True) for _ in range(min(self.threads, len(items)))]
        for worker in workers:
            worker.start()
        try:
            self._watch(workers, lambda: done, stop)
        finally:
            stop.set()
            for worker in workers:
                worker.join(_LAST_S)
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
            self._ranks.count(now)
            self._meter.show(self._ranks.total)
            if now != last:
                moved, last = time.monotonic(), now
            if time.monotonic() - moved > self._stall_s:
                raise ConversionError(
                    f"nothing was read or written for {self._stall_s:.0f} s: the disk of the source or of "
                    f"{self._target} hangs. The same command goes on from what is done"
                )


class _Signals:
    """Ctrl-C and SIGTERM as a wish, once; a second one ends the process at once."""

    def __init__(self) -> None:
        self.came = 0
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
        self.came = signum
        signal.signal(signum, signal.SIG_DFL)
