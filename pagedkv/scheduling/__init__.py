"""Which request runs next, and why: numpy and the core, never torch.

Start with ``Scheduler`` and ``Request``; order of admission is a ``SchedulingPolicy`` object.
"""

from pagedkv.scheduling.config import SchedulerConfig
from pagedkv.scheduling.events import Event, EventKind, MissReason, WaitReason
from pagedkv.scheduling.policies import Candidate, FirstComeFirstServed, LongestCachedPrefix, Priority, SchedulingPolicy
from pagedkv.scheduling.request import Branch, FinishReason, Request, RequestRecord, Status
from pagedkv.scheduling.scheduler import Assignment, Scheduler

__all__ = [
    "Assignment",
    "Branch",
    "Candidate",
    "Event",
    "EventKind",
    "FinishReason",
    "FirstComeFirstServed",
    "LongestCachedPrefix",
    "MissReason",
    "Priority",
    "Request",
    "RequestRecord",
    "Scheduler",
    "SchedulerConfig",
    "SchedulingPolicy",
    "Status",
    "WaitReason",
]
