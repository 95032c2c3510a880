"""From sampled tokens to outputs that are handed over: each live request's response is fed, ended and delivered here.

Owns the responses of live requests, and the outputs that nobody has taken yet. Does not own which of them run (``Scheduler``), nor what
they say (``Response``).
"""

from __future__ import annotations

from collections.abc import Mapping

from pagedkv.errors import PagedKVError
from pagedkv.outputs import RequestOutput
from pagedkv.plan import Int64Array
from pagedkv.prompt_work import PromptWork
from pagedkv.responses import Response
from pagedkv.sampling import SampledTokens
from pagedkv.scheduling import Scheduler
from pagedkv.seating import Seating


class Outbox:
    """Keeps the responses of one engine.

    Args:
        scheduler: told which continuations end by what they brought; says which others have ended.
        seating: whose row is whose.
        prompts: looks after requests as long as they are in here.
    """

    def __init__(self, scheduler: Scheduler, seating: Seating, prompts: PromptWork) -> None:
        self._scheduler = scheduler
        self._seating = seating
        self._prompts = prompts
        self._responses: dict[str, Response] = {}
        self._ready: list[RequestOutput] = []

    @property
    def responses(self) -> Mapping[str, Response]:
        """Of live requests, by their ids; to read."""
        return self._responses

    @property
    def has_ready(self) -> bool:
        """Whether there is an output to take."""
        return bool(self._ready)

    def add(self, request_id: str, response: Response) -> None:
        """A request lives from now on."""
        self._responses[request_id] = response
        self._prompts.add(request_id, response)

    def fail(self, row: int, error: PagedKVError) -> None:
        """End the continuation in a row with an error."""
        response, index = self._seating.owner(row)
        self._scheduler.finish(response.record.request.request_id, index, "error", error=error)

    def feed(self, rows: Int64Array, sampled: SampledTokens) -> None:
        """Take a step's tokens, those of ``rows [n]``; the requests that stream have an output ready then."""
        self._collect(self._watch(rows, sampled) if self._seating.watched[rows].any() else {})

    def collect(self) -> None:
        """Make the outputs of all requests ready that have ended."""
        self._collect({})

    def take(self) -> list[RequestOutput]:
        """Hand over what is ready, and leave nothing."""
        ready, self._ready = self._ready, []
        return ready

    def clear(self) -> None:
        """Forget all requests; what is ready stays."""
        self._responses.clear()
        self._prompts.clear()

    def _watch(self, rows: Int64Array, sampled: SampledTokens) -> dict[str, None]:
        """Feed new tokens to the requests that look at each, and end those that met a stop string."""
        touched: dict[str, None] = {}
        for index in self._seating.watched[rows].nonzero()[0].tolist():
            token = int(sampled.token_ids[index])
            response, branch_index = self._seating.owner(int(rows[index]))
            if token < 0:
                continue
            request_id = response.record.request.request_id
            touched[request_id] = None
            completion = response.completion(branch_index)
            if sampled.logprobs is not None and (entry := sampled.logprobs[index]) is not None:
                completion.logprobs.append(completion.with_texts(entry))
            branch = next(branch for branch in response.record.branches if branch.index == branch_index)
            if branch.finish_reason is not None:
                continue  # its last token is booked with its end, which knows whether it belongs to the text
            stop = completion.append([token])
            if completion.failure is not None:
                self._scheduler.finish(request_id, branch_index, "error", error=completion.failure)
            elif stop is not None:
                self._scheduler.finish(request_id, branch_index, "stop", stop_reason=stop)
        return touched

    def _collect(self, touched: dict[str, None]) -> None:
        """Make ready an output for every request that ended, and for those touched that stream; in a fixed order."""
        for branch in self._scheduler.take_ended():
            response = self._responses.get(branch.request.request_id)
            if response is not None:
                response.end(branch)
                touched[branch.request.request_id] = None
        for request_id in touched:
            response = self._responses[request_id]
            if response.record.finished:
                del self._responses[request_id]
                self._prompts.discard(request_id)
            elif not response.stream:
                continue
            self._ready.append(response.output())
