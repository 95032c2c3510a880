"""Two threads that submit and abort while a third steps, in both ways that the engine's documentation names."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import pytest
from identity_support import hash_runner, params

from pagedkv.engine import Engine, EngineConfig
from pagedkv.outputs import RequestOutput
from pagedkv.testing.hash_model import continuation

NUM_REQUESTS = 25
Command = Callable[[Engine], object]


class Locked:
    """One lock around every call."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock = engine, threading.Lock()

    def give(self, command: Command) -> None:
        with self._lock:
            command(self._engine)

    def step(self) -> list[RequestOutput]:
        with self._lock:
            return self._engine.step()


class HandedOver:
    """A queue of commands, emptied between two steps by the thread that steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def give(self, command: Command) -> None:
        self._commands.put(command)

    def step(self) -> list[RequestOutput]:
        while not self._commands.empty():
            self._commands.get()(self._engine)
        return self._engine.step()


def _submit_and_abort(guard: Locked | HandedOver, thread: int) -> None:
    def submit(name: str, prompt: list[int]) -> Command:
        return lambda engine: engine.add_request(name, prompt, params(5))

    def abort(name: str) -> Command:
        return lambda engine: engine.abort(name)

    for number in range(NUM_REQUESTS):
        guard.give(submit(f"{thread}.{number}", [5, 6, 7, 8, thread, number]))
        if number % 3 == 2:
            guard.give(abort(f"{thread}.{number - 1}"))


@pytest.mark.parametrize("kind", [Locked, HandedOver])
def test_two_threads_submit_and_abort_while_a_third_steps(kind: Callable[[Engine], Locked | HandedOver]) -> None:
    engine = Engine(hash_runner(), EngineConfig(num_blocks=20, max_num_batched_tokens=16, max_model_len=32, max_num_seqs=8))
    guard = kind(engine)
    threads = [threading.Thread(target=_submit_and_abort, args=(guard, thread)) for thread in range(2)]
    for each in threads:
        each.start()
    ended: dict[str, RequestOutput] = {}
    while any(each.is_alive() for each in threads) or len(ended) < 2 * NUM_REQUESTS:
        ended.update((output.request_id, output) for output in guard.step() if output.finished)
    for each in threads:
        each.join()
    engine.check()
    assert engine.num_blocks_in_use == 0
    for name, output in ended.items():
        (completion,) = output.outputs
        expected = tuple(continuation(output.prompt_token_ids, 5, vocab_size=61))
        aborted = completion.finish_reason == "abort"
        assert completion.token_ids == (expected[: len(completion.token_ids)] if aborted else expected), name
        assert not aborted or int(name.split(".")[1]) % 3 == 1
