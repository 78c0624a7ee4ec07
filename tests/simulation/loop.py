"""An event loop whose clock jumps, threads that take turns with it, and processes that can be stopped and killed.

Nothing waits in real time: where the loop has nothing to do, its clock jumps to the next timer. A blocking call that
production hands to a thread runs while the loop stands still, so a run is decided by its seed alone; where such a call
waits (a lock, a coroutine on the loop, a slow disk), the loop goes on. Everything that belongs to one simulated worker
runs in the context of its SimulatedProcess, which is how kill -9 and SIGSTOP find it.
"""

from __future__ import annotations

import asyncio
import contextvars
import selectors
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError as CallCancelledError
from contextlib import ExitStack, contextmanager
from functools import partial
from random import Random
from typing import Any
from unittest import mock

_process: contextvars.ContextVar[SimulatedProcess | None] = contextvars.ContextVar("process", default=None)
_this = threading.local()
_BURIAL_ROUNDS_MAX = 100
_TICK_SECONDS = 1e-9


class KilledError(BaseException):
    """What a killed process's threads end with; nothing in it may handle that."""


class InvariantError(AssertionError):
    """The simulation found something that must never happen. `number` is the invariant of DESIGN, section 2."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(f"invariant {number}: {what}")
        self.number = number


def current_process() -> SimulatedProcess | None:
    """The process that this code runs in; None for the world around them."""
    return _process.get()


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Virtual time. Every fault that no task handles ends up in `faults`."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.faults: list[str] = []
        self.violations: list[InvariantError] = []
        #: By id of the newest task with it.
        self.owners: dict[int, SimulatedProcess | None] = {}
        #: Who did what and when: equal for two runs of one seed.
        self.trace: list[tuple[float, str, str]] = []
        self._now = 0.0
        self._world = contextvars.copy_context()
        super().__init__(_JumpingSelector(self))
        self.set_exception_handler(self._note_fault)
        self.set_task_factory(_task_of_process)

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def violation(self, number: int, what: str) -> InvariantError:
        """An error to raise; it is kept as well, because supervision in the worker would handle it."""
        self.violations.append(InvariantError(number, what))
        return self.violations[-1]

    def call_in_world(self, seconds: float, callback: Callable[[], None]) -> None:
        """Calls it later, whatever becomes of the process that asks for it."""
        self.call_later(seconds, callback, context=self._world)

    def jump(self, seconds: float) -> None:
        """Called where nothing is left to do for so long."""
        self._now += seconds

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """As ever, but the callbacks of a process that does not run are held back."""
        context = context if context is not None else contextvars.copy_context()
        process = context.get(_process)
        if process is None:
            return super().call_soon(callback, *args, context=context)
        guarded = _Guarded(process, callback, args)
        guarded.handle = super().call_soon(guarded, context=context)
        return guarded.handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """See `call_soon`."""
        context = context if context is not None else contextvars.copy_context()
        process = context.get(_process)
        if process is None:
            return super().call_at(when, callback, *args, context=context)
        guarded = _Guarded(process, callback, args)
        handle = super().call_at(when, guarded, context=context)
        guarded.handle = handle
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """No thread runs beside this loop, so none has to wake it."""
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Any, *args: Any
    ) -> asyncio.Future[Any]:
        """Runs the call in a SimulatedThread, whatever executor is meant, with a pause before and after it."""
        del executor
        future = self.create_future()
        process = current_process()
        if process is not None and process.is_dead:
            future.cancel()
        else:
            if process is not None:
                process.keep(process.calls, future)
            thread = SimulatedThread(self, process, partial(func, *args), future)
            self.call_later(self._pause(process), thread.resume)
        return future

    def pause_of_thread(self, process: SimulatedProcess | None) -> float:
        """Seconds between two things that a thread does."""
        return self._pause(process)

    def _note_fault(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        process = self.owners.get(id(context.get("future")))
        if process is None or not process.is_dead:
            self.faults.append(f"{process and process.name}: {context}")

    def _pause(self, process: SimulatedProcess | None) -> float:
        if process is not None and process.is_slow and self.random.random() < 0.3:
            return self.random.uniform(0.5, 5.0)
        return self.random.choice((0.0, 0.0, 0.001, 0.01))


class _JumpingSelector(selectors.SelectSelector):
    """Nothing is ever readable; waiting is jumping."""

    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        """Raises RuntimeError where production would hang for ever."""
        if timeout is None:
            raise RuntimeError("everything waits and nothing is due: a deadlock")
        # Never 0: who waits for less than the clock can tell apart would wait for ever.
        self._loop.jump(max(timeout, _TICK_SECONDS))
        return []


class _Guarded:
    """A callback of a process: runs only while the process does."""

    def __init__(self, process: SimulatedProcess, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.handle: asyncio.Handle | None = None
        self._process = process
        self._callback = callback
        self._args = args

    def __call__(self) -> None:
        if self._process.is_held:
            self._process.held.append(self)
        elif self.handle is None or not self.handle.cancelled():
            self._callback(*self._args)


class SimulatedProcess:
    """What one kill -9 ends and one SIGSTOP holds back: tasks, timers and threads of one context."""

    def __init__(self, loop: SimulatedLoop, name: str) -> None:
        self.name = name
        self.loop = loop
        self.is_dead = False
        self.is_stopped = False
        self.is_slow = False
        #: Effects that it may still have before it is killed; None while it is to live.
        self.effects_left: int | None = None
        #: Called at the very moment of its death, wherever it was.
        self.at_death: Callable[[], None] = lambda: None
        self.held: deque[_Guarded] = deque()
        self.tasks: dict[asyncio.Future[Any], None] = {}
        self.calls: dict[asyncio.Future[Any], None] = {}
        self.threads: dict[SimulatedThread, None] = {}
        self._is_buried = False
        self._context = contextvars.copy_context()
        self._context.run(_process.set, self)

    @property
    def is_held(self) -> bool:
        """True while nothing of it may run."""
        return self.is_stopped or (self.is_dead and not self._is_buried)

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs `work` in this process."""
        return self.loop.create_task(work, context=self._context)

    def stop(self) -> None:
        """SIGSTOP."""
        self.is_stopped = True

    def go_on(self) -> None:
        """SIGCONT."""
        self.is_stopped = False
        self._release_held()

    def passes(self, effect: str) -> None:
        """Between two effects: the process may die here. Raises KilledError then, and ever after."""
        if self.is_dead:
            raise KilledError
        self.loop.trace.append((round(self.loop.time(), 6), self.name, effect))
        if self.effects_left is not None:
            self.effects_left -= 1
            if self.effects_left < 0:
                self.kill()
                raise KilledError

    async def has_effect(self, effect: str) -> None:
        """The same for coroutines, which do not come back from it when the process dies."""
        try:
            self.passes(effect)
        except KilledError:
            await asyncio.Event().wait()

    def kill(self) -> None:
        """kill -9, at this moment."""
        if not self.is_dead:
            self.is_dead = True
            self.at_death()

    async def bury(self) -> None:
        """Ends what is left of a dead process; nothing of it has an effect any more. Called by the world."""
        assert self.is_dead
        self._is_buried, self.is_stopped = True, False
        self._release_held()
        for _ in range(_BURIAL_ROUNDS_MAX):
            for thread in list(self.threads):
                thread.end()
            tasks = list(self.tasks)
            if not tasks:
                return
            for ending in (*self.calls, *tasks):
                ending.cancel()
            await asyncio.wait(tasks, timeout=0.1)
        raise AssertionError(f"{self.name} does not end: {list(self.tasks)}")

    def keep(self, where: dict[asyncio.Future[Any], None], future: asyncio.Future[Any]) -> None:
        """Remembers it until it is done."""
        where[future] = None
        future.add_done_callback(lambda done: where.pop(done, None))

    def _release_held(self) -> None:
        while self.held:
            guarded = self.held.popleft()
            if guarded.handle is not None and not guarded.handle.cancelled():
                self._context.run(self.loop.call_soon, guarded)


class SimulatedThread:
    """A blocking call. It runs between `resume` and the moment it waits, and the loop stands still meanwhile."""

    def __init__(
        self,
        loop: SimulatedLoop,
        process: SimulatedProcess | None,
        call: Callable[[], Any],
        future: asyncio.Future[Any],
    ) -> None:
        self._loop = loop
        self._process = process
        self._future = future
        # Each is held until the other side lets go: the baton, passed back and forth.
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._is_started = False
        self._is_ended = False
        self._is_killed = False
        self._worker = threading.Thread(target=contextvars.copy_context().run, args=(self._run, call), daemon=True)
        if process is not None:
            process.threads[self] = None

    def resume(self) -> None:
        """Called on the loop; returns when the call ends or waits."""
        if self._is_ended:
            return
        if not self._is_started:
            self._is_started = True
            self._worker.start()
        else:
            self._go.release()
        self._back.acquire()

    def resume_soon(self) -> None:
        """Called from anywhere."""
        self._loop.call_soon(self.resume)

    def wait(self) -> None:
        """Called by the call: lets the loop go on until somebody resumes this thread."""
        self._back.release()
        self._go.acquire()
        if self._is_killed:
            raise KilledError

    def sleep(self, seconds: float) -> None:
        """Called by the call."""
        self._loop.call_later(seconds, self.resume)
        self.wait()

    def end(self) -> None:
        """After its process died: unwinds the call without an effect."""
        self._is_killed = True
        if self._is_started:
            self.resume()
        else:
            self._end(None)

    def _run(self, call: Callable[[], Any]) -> None:
        _this.thread = self
        deliver: Callable[[], None] | None = None
        try:
            try:
                result = call()
            except KilledError:
                pass
            except BaseException as error:  # noqa: BLE001  # as an executor does
                deliver = partial(self._settle, self._future.set_exception, error)
            else:
                deliver = partial(self._settle, self._future.set_result, result)
        finally:
            self._end(deliver)
            self._back.release()

    def _end(self, deliver: Callable[[], None] | None) -> None:
        self._is_ended = True
        if self._process is not None:
            self._process.threads.pop(self, None)
        if deliver is not None:
            self._loop.call_later(self._loop.pause_of_thread(self._process), deliver)

    def _settle(self, settle: Callable[[Any], None], outcome: Any) -> None:
        if not self._future.done():
            settle(outcome)


class _CallOfLoop:
    """What a thread gets for a coroutine that it has the loop run: stands in for concurrent.futures.Future."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task

    def cancel(self) -> None:
        """See concurrent.futures.Future."""
        self._task.cancel()

    def result(self) -> Any:
        """See concurrent.futures.Future."""
        thread = this_thread()
        self._task.add_done_callback(lambda _: thread.resume())
        thread.wait()
        if self._task.cancelled():
            raise CallCancelledError
        return self._task.result()


def _run_coroutine_in_turn(work: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> _CallOfLoop:
    return _CallOfLoop(loop.create_task(work))


@contextmanager
def threads_in_turn() -> Iterator[None]:
    """While it lasts, asyncio.run_coroutine_threadsafe lets no thread run beside the loop."""
    with mock.patch.object(asyncio, "run_coroutine_threadsafe", _run_coroutine_in_turn):
        yield


class _Clock:
    """The functions of `time` that the processes call."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self.monotonic = self.perf_counter = self.time = loop.time

    def time_ns(self) -> int:
        """See `time`."""
        return int(self.time() * 1_000_000_000)


@contextmanager
def virtual_time(loop: SimulatedLoop) -> Iterator[None]:
    """While it lasts, the processes read the loop's clock."""
    with ExitStack() as patches:
        for name, module in list(sys.modules.items()):
            if name.startswith("streams.processes.") and getattr(module, "time", None) is time:
                patches.enter_context(mock.patch.object(module, "time", _Clock(loop)))
        yield


def this_thread() -> SimulatedThread:
    """The thread that calls."""
    thread: SimulatedThread | None = getattr(_this, "thread", None)
    assert thread is not None, "the event loop itself would wait"
    return thread


def _task_of_process(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
    context: contextvars.Context | None = options.get("context")
    process = _process.get() if context is None else context.get(_process)
    task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, **options)
    assert isinstance(loop, SimulatedLoop)
    loop.owners[id(task)] = process
    if process is not None:
        process.keep(process.tasks, task)
    return task


class SimulatedLock:
    """threading.Lock for SimulatedThreads."""

    def __init__(self) -> None:
        self._is_held = False
        self._waiting: deque[SimulatedThread] = deque()

    def acquire(self, blocking: bool = True) -> bool:
        """See threading.Lock."""
        while self._is_held:
            if not blocking:
                return False
            thread = this_thread()
            self._waiting.append(thread)
            thread.wait()
        self._is_held = True
        return True

    def release(self) -> None:
        """See threading.Lock."""
        self._is_held = False
        if self._waiting:
            self._waiting.popleft().resume_soon()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()
