"""Turns queued requests into device batches: `Batcher`, the queue of one model.

Contract
  - Pure: no threads, no clock, no I/O. The owner serialises the calls and hands in the time of each event,
    in seconds; a fake clock drives it as well as a real one.
  - Work-conserving: `next_batch` answers whenever something is queued that the device may run. A lone
    request never waits for company; batches grow only because devices were busy. The one exception is
    `QueueConfig.max_defer_ms`, off by default.
  - Order: by priority with ageing. A level counts as `ageing_ms` of waiting, so a request of a lower level
    that has waited that much longer comes first, and nothing starves. Equal levels: first come, first served.
  - Smaller requests go ahead of one that doesn't fit what is left of a batch, until that one has waited
    `max_skip_ms`; from then on nothing overtakes it.
  - Rows are counted and requests are counted. Requests are merged up to the knee of the measured times, into
    the buckets that are cheapest for all that could run: 12 rows run as 8 and 4 where that takes less time
    than 16, 500 as 256 and 256 where it takes less than 512; more runs must save `LEAST_GAIN`. Beyond the
    knee only requests of one level are merged that fill runs within it so badly that one run, of
    `_MOST_KNEES` at most, saves `_LEAST_SAVING`: of 170 rows each, three in 512 where each would have 256
    to itself.
  - A request is bound to a device when the device frees, not at arrival. All parts of one that runs in
    several run on the device that took the first. Each keeps the request's place in the order, so that a
    higher level waits for one run of a huge request at most, until that has aged past it: then for all its
    rest. The last part takes company along. (Policy spread pins parts to devices at arrival.)
  - A request whose deadline no device can meet any more is never handed out: it goes to `take_late`. Nor is
    one in a run that is expected to end after its deadline: a quick run goes first if that makes fewer rows
    of its level late and less than a full run of them waits behind; else it is left out, and others take its
    place. What is late on this device alone is left to another if the owner says so (`may_leave`). What is
    cheapest is told by prices; what ends when, by what runs of such a price take lately.
  - Every queued row comes out exactly once, in order within its request, unless the request is dropped or
    late.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from xlarank.errors import BucketError
from xlarank.runtime.bucket_plan import LEAST_GAIN, BucketPlan
from xlarank.runtime.part_queue import Part, PartQueue, Ticket
from xlarank.spec import DEFAULT_PRIORITY, Bucket
from xlarank.spec.serving import QueueConfig

__all__ = ["Batch", "Batcher"]

Item = TypeVar("Item", bound=Hashable)

_MAX_LOOK = 256
"""Queued parts that are looked at for one batch: bounds the time under the owner's lock."""

_MAX_LOOKS = 16
"""Looks for one batch, but for those that find late ones: most often one or two are enough."""

_LEAST_SAVING = 0.1
"""Share of the time that a run beyond the knee must save over runs within it: it answers all at its end."""

_MOST_KNEES = 2.5
"""Longest run beyond the knee, in runs of the knee: whoever comes next waits for its end."""

_MARGIN = 0.05
"""Of a run's time, that one of several requests is to end before their deadlines: runs of a bucket differ."""

_HIGH_LOAD = 0.7
"""Share of the devices' time that is asked for; from there on a batch may be deferred."""


def _as_priced(seconds: float) -> float:
    return seconds


@dataclasses.dataclass(frozen=True)
class Batch(Generic[Item]):
    """What one device runs at once."""

    bucket: Bucket
    """Holds the parts."""

    parts: tuple[Part[Item], ...]
    """At most one a request; part i is context i of the batch."""

    @property
    def num_rows(self) -> int:
        """Valid rows; the rest of the bucket is padding."""
        return _num_rows(self.parts)


class Batcher(Generic[Item]):
    """See the contract at the top of the file."""

    def __init__(self, plan: BucketPlan, config: QueueConfig | None = None, *, num_devices: int = 1) -> None:
        """
        Args:
          plan: buckets and prices of the fastest device.
          config: limits; `QueueConfig()` by default.
          num_devices: that take turns at this queue; sets how long a batch may be deferred.
        """
        self.plan = plan
        self.config = config or QueueConfig()
        self._num_devices = num_devices
        self._queue: PartQueue[Item] = PartQueue()
        self._open: dict[Item, list[Part[Item]]] = {}  # what is in _queue; never an empty list
        # A heap of deadlines and places of arrival; may name requests long gone, but holds none of them.
        self._deadlines: list[tuple[float, int]] = []
        self._hurried: dict[int, Ticket[Item]] = {}  # by place of arrival: those of _open with a deadline
        self._late: list[Item] = []
        self._count = itertools.count()
        self._load = _Load()
        self._num_queued_rows = self._num_tied = 0
        self._deferred_until = math.inf

    @property
    def num_queued_rows(self) -> int:
        """Rows accepted and not yet in a batch."""
        return self._num_queued_rows

    @property
    def num_queued_requests(self) -> int:
        """Requests with rows not yet in a batch."""
        return len(self._open)

    @property
    def num_tied_requests(self) -> int:
        """Of them, those that have a home, or a share for each device."""
        return self._num_tied

    @property
    def queued_seconds(self) -> float:
        """Device time that they will take, by the plan."""
        return self._queue.seconds

    @property
    def deferred_until(self) -> float:
        """When to ask again, where the last `next_batch` deferred; inf otherwise."""
        return self._deferred_until

    @property
    def next_deadline(self) -> float:
        """The earliest of what is queued; inf when there is none."""
        while self._deadlines and self._deadlines[0][1] not in self._hurried:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else math.inf

    @property
    def wake_at(self) -> float:
        """When to call `take_late` though nothing happens: a deadline; -inf for late ones."""
        return -math.inf if self._late else self.next_deadline

    def waiting(self) -> Iterator[Part[Item]]:
        """What is queued, in order; what is left of a request that a device has begun is pinned to it."""
        return iter(self._queue)

    def add(
        self,
        item: Item,
        num_rows: int,
        *,
        now: float,
        priority: int = DEFAULT_PRIORITY,
        deadline: float = math.inf,
        home: int | None = None,
        spread_over: Sequence[int] = (),
    ) -> None:
        """Queues a request of at least one row.

        Args:
          item: names it; not queued already.
          num_rows: N.
          now: seconds.
          priority: level, 1 the highest.
          deadline: seconds, on the clock of `now`.
          home: the device that it prefers.
          spread_over: devices that run an equal share of its rows each; none to keep it on one.
        """
        if num_rows < 1:
            raise BucketError(f"expected a request of at least one row, got {num_rows}")
        assert item not in self._open
        head_start = self._head_start(priority)
        order = (now + head_start, next(self._count))
        ticket = Ticket(item, now, deadline, order, home, bool(spread_over), head_start)
        self._load.add(self.plan.work_seconds(num_rows), now)
        devices = spread_over[:num_rows]
        if not devices:
            self._insert(Part(ticket, 0, num_rows))
        for place, device in enumerate(devices):
            begin, end = (num_rows * i // len(devices) for i in (place, place + 1))
            self._insert(Part(ticket, begin, end, pin=device))
        if deadline < math.inf:
            heapq.heappush(self._deadlines, (deadline, order[1]))
            if len(self._deadlines) > 2 * len(self._hurried) + _MAX_LOOK:  # deadlines are far, answers quick
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._hurried]
                heapq.heapify(self._deadlines)

    def held_by(self, device: int) -> list[Part[Item]]:
        """What no other device may run: the rest of a request that it has begun, and its shares of others."""
        return [part for part in self._queue if part.pin == device]

    def release(self, device: int) -> None:
        """Lets other devices run what is held by one that is out of service."""
        for part in self.held_by(device):
            self._remove(part)
            self._insert(dataclasses.replace(part, pin=None))

    def drop(self, item: Item) -> bool:
        """Forgets what is still queued of a request; returns whether there was something."""
        parts = list(self._open.get(item, ()))
        for part in parts:
            self._remove(part)
        return bool(parts)

    def clear(self) -> list[Item]:
        """Forgets everything; returns the requests that had something queued."""
        items = list(self._open)
        for item in items:
            self.drop(item)
        return items

    def expire(self, now: float) -> None:
        """Moves requests whose deadline has passed to the late ones."""
        while self.next_deadline <= now:
            self._set_late(self._hurried[self._deadlines[0][1]])

    def take_late(self) -> list[Item]:
        """Requests that were not run, or not to their end, as they would have been late; each once."""
        late, self._late = self._late, []
        return late

    def seconds_ahead(self, now: float, priority: int) -> float:
        """Device time of all that a request of this level would find before it, if it came now."""
        return self._queue.seconds_before(now + self._head_start(priority))

    def rows_ahead(self, now: float, priority: int) -> int:
        """Rows of all that."""
        return self._queue.rows_before(now + self._head_start(priority))

    def seconds_of_first(self, num_rows: int) -> float:
        """Device time of so many rows that come first."""
        return self._queue.seconds_of_first(num_rows)

    def next_batch(
        self,
        device: int,
        now: float,
        *,
        plan: BucketPlan | None = None,
        claims: Callable[[Part[Item]], bool] | None = None,
        taken: Callable[[float], float] = _as_priced,
        least_seconds: Callable[[int], float] | None = None,
        may_leave: bool = False,
    ) -> Batch[Item] | None:
        """The batch that a free device runs now; None when nothing is queued for it, or it is deferred.

        Args:
          device: its number.
          now: seconds.
          plan: prices of this device; the queue's own by default.
          claims: whether the device may take a part that isn't pinned to it; any by default.
          taken: what a run of a price is expected to take on it.
          least_seconds: in which some device is expected to run so many rows; this one's by default.
          may_leave: whether what is late here alone is left to another device; else it is run all the same.
        """
        plan = plan or self.plan
        forecast = _Forecast(now, plan, taken)
        least_seconds = least_seconds or forecast.seconds
        self._deferred_until = math.inf
        oldest = now - self.config.max_skip_ms / 1e3
        left_out: set[Ticket[Item]] = set()
        least_deadline = -math.inf
        quick: tuple[Part[Item], int, Sequence[Part[Item]]] | None = None
        num_looks = 0
        while True:
            head, company, others, late = self._choose(
                device, forecast, claims, least_seconds, may_leave, left_out, least_deadline
            )
            for ticket in late:
                self._set_late(ticket)
            if late:  # whoever was chosen, in this look or before, may be among them; more may be behind
                left_out, least_deadline, quick = set(), -math.inf, None
                continue
            if head is None and quick is not None:  # there are only those who would be late for a longer run
                head, num_rows, chosen = quick
                break
            if head is None or self._defers([head, *company], forecast):
                return None
            num_rows, chosen = self._cut(head, company, plan, oldest)
            if plan.fills_buckets and len(others) > len(company):
                num_rows, chosen = _widened(head, others, forecast, oldest) or (num_rows, chosen)
            hurt = _late_for(head, num_rows, chosen, forecast)
            if not hurt:
                break
            first = self._cut(head, company, plan, oldest, forecast)
            if self._saves_rows(first, [head, *chosen], hurt, forecast):
                num_rows, chosen = first
                break
            quick = quick or (head, *first)
            num_looks += 1
            if num_looks == _MAX_LOOKS:
                head, num_rows, chosen = quick
                break
            left_out.update(hurt)
            least_deadline = max(least_deadline, forecast.end(num_rows, 1 + len(chosen)))
        for part in (head, *chosen):
            self._remove(part)
        if num_rows < head.num_rows:
            middle = head.begin + num_rows
            self._insert(dataclasses.replace(head, begin=middle, pin=device))
            head = dataclasses.replace(head, end=middle)
        bucket = plan.bucket(num_rows, 1 + len(chosen))
        assert bucket is not None  # _cut chose a run that has a price
        return Batch(bucket, (head, *chosen))

    def _choose(
        self,
        device: int,
        forecast: _Forecast,
        claims: Callable[[Part[Item]], bool] | None,
        least_seconds: Callable[[int], float],
        may_leave: bool,
        left_out: Collection[Ticket[Item]],
        least_deadline: float,
    ) -> tuple[Part[Item] | None, list[Part[Item]], list[Part[Item]], list[Ticket[Item]]]:
        """What runs next, what could run with it up to the limit, in order, and with what didn't fit it; and
        what is late."""
        head: Part[Item] | None = None
        company: list[Part[Item]] = []
        others: list[Part[Item]] = []
        num_rows = limit = num_others = 0
        now, plan = forecast.now, forecast.plan
        most, max_rows = plan.max_requests, plan.ladder.max_rows
        is_closed = False
        late: list[Ticket[Item]] = []
        eligible = (part for part in self._queue if part.may_run_on(device))
        for part in itertools.islice(eligible, _MAX_LOOK):
            if claims is not None and part.pin is None and not claims(part):
                continue
            deadline = part.ticket.deadline
            is_hard = deadline < math.inf and now + forecast.seconds(part.num_rows) > deadline
            if is_hard and (part.pin is not None or now + least_seconds(part.num_rows) > deadline):
                late.append(part.ticket)
            elif (is_hard and may_leave) or part.ticket in left_out or deadline < least_deadline:
                continue
            elif head is None:
                head, num_rows, limit = part, part.num_rows, _limit(part, plan)
            elif num_rows >= limit or len(company) + 1 >= most or (is_closed and num_others >= max_rows):
                break
            else:
                others.append(part)
                num_others += part.num_rows
                if is_closed:
                    continue
                if num_rows + part.num_rows <= limit:
                    company.append(part)
                    num_rows += part.num_rows
                else:  # nothing overtakes one that has waited for long
                    is_closed = now - part.ticket.queued_at >= self.config.max_skip_ms / 1e3
        return head, company, others, late

    @staticmethod
    def _cut(
        head: Part[Item],
        company: Sequence[Part[Item]],
        plan: BucketPlan,
        oldest: float,
        forecast: _Forecast | None = None,
    ) -> tuple[int, Sequence[Part[Item]]]:
        """Rows of the next run and who joins the head in it, so that all of them take the least time; by a
        forecast, of the runs that make nobody late. There is one, as a head can be run in time alone."""
        is_lone = not company and forecast is None
        if is_lone and head.num_rows in plan.lone_runs:
            return plan.lone_runs[head.num_rows], ()
        total = head.num_rows + _num_rows(company)
        best: tuple[int, Sequence[Part[Item]]] = (0, company)
        best_seconds, least_gain, best_is_late, last = math.inf, 0.0, True, None
        # Of capacities that hold everything, the first does for all.
        num_counts = bisect.bisect_left(plan.row_counts, total) + 1
        for capacity in reversed(plan.row_counts[:num_counts]):
            if capacity < head.num_rows:
                run = (capacity, ())
            else:
                chosen = _fill(head, company, capacity, plan, oldest, forecast)
                run = (head.num_rows + _num_rows(chosen), chosen)
            shape = (run[0], 1 + len(run[1]))
            if shape == last:
                continue
            last = shape
            num_left = 1 + len(company) - shape[1] + (run[0] < head.num_rows)
            own = plan.run_seconds(*shape)
            seconds = own + plan.seconds(total - run[0], max(1, num_left))
            is_late = forecast is not None and bool(_late_for(head, *run, forecast))
            if is_late < best_is_late or (is_late == best_is_late and seconds < best_seconds - least_gain):
                best, best_seconds, best_is_late, least_gain = run, seconds, is_late, LEAST_GAIN * own
        if is_lone:
            plan.lone_runs[head.num_rows] = best[0]
        return best

    def _saves_rows(
        self,
        first: tuple[int, Sequence[Part[Item]]],
        run: Sequence[Part[Item]],
        hurt: Collection[Ticket[Item]],
        forecast: _Forecast,
    ) -> bool:
        """Whether fewer are late if a quick run goes first, for those whom the run of all would make late.

        What counts is the highest level among these: lower ones wait.
        """
        num_rows, company = first
        gone = {run[0].ticket, *(part.ticket for part in company)}
        in_run = {part.ticket for part in run}
        if in_run <= gone:
            return True
        level = min(ticket.head_start for ticket in hurt)
        seen = itertools.islice(self._queue, _MAX_LOOK)
        peers = [p for p in seen if p.ticket.head_start <= level and p.ticket.deadline < math.inf]
        behind = [part for part in peers if part.ticket not in in_run]
        plan = forecast.plan
        if _num_rows(behind) >= plan.knee_rows or len(behind) >= plan.max_requests:
            return False  # of a long queue others would pay for a run that isn't full
        rest = [part for part in peers if part.ticket in in_run - gone]
        end = forecast.end(num_rows, len(gone)) + forecast.seconds(_num_rows(rest), max(1, len(rest)))
        lost = [part for part in rest if end > part.ticket.deadline]
        return _num_rows(lost) < _num_rows(part for part in peers if part.ticket in hurt)

    def _defers(self, parts: Sequence[Part[Item]], forecast: _Forecast) -> bool:
        """Whether the device waits for company: only if it may, under high load, short of the knee."""
        num_rows = _num_rows(parts)
        now, plan = forecast.now, forecast.plan
        if (
            not self.config.max_defer_ms
            or num_rows >= plan.knee_rows
            or self._load.at(now) < _HIGH_LOAD * self._num_devices
        ):
            return False
        # So that each device gets a batch in the time of one (PREBA, arXiv 2411.19114, time_queue), and
        # none of these is late for it.
        longest = min(self.config.max_defer_ms / 1e3, plan.knee_seconds / self._num_devices)
        until = min(part.ticket.queued_at for part in parts) + longest
        latest = min(part.ticket.deadline for part in parts) - forecast.taken(plan.knee_seconds)
        self._deferred_until = min(until, latest)
        if self._deferred_until > now:
            return True
        self._deferred_until = math.inf
        return False

    def _set_late(self, ticket: Ticket[Item]) -> None:
        if self.drop(ticket.item):
            self._late.append(ticket.item)

    def _head_start(self, priority: int) -> float:
        return (priority - 1) * self.config.ageing_ms / 1e3

    def _insert(self, part: Part[Item]) -> None:
        self._queue.insert(part, self.plan.work_seconds(part.num_rows))
        parts = self._open.setdefault(part.item, [])
        self._num_tied += part.ticket.is_tied and not parts
        parts.append(part)
        if part.ticket.deadline < math.inf:
            self._hurried[part.ticket.order[1]] = part.ticket
        self._num_queued_rows += part.num_rows

    def _remove(self, part: Part[Item]) -> None:
        parts = self._open[part.item]
        parts.remove(part)
        if not parts:
            del self._open[part.item]
            self._num_tied -= part.ticket.is_tied
            self._hurried.pop(part.ticket.order[1], None)
        self._num_queued_rows -= part.num_rows
        self._queue.remove(part)


class _Forecast:
    """What begins now on a device, and when it ends."""

    def __init__(self, now: float, plan: BucketPlan, taken: Callable[[float], float]) -> None:
        self.now, self.plan, self.taken = now, plan, taken

    def end(self, num_rows: int, num_requests: int) -> float:
        """By when a run is through, and one of several requests to be so."""
        seconds = self.taken(self.plan.run_seconds(num_rows, num_requests))
        return self.now + (seconds if num_requests == 1 else (1 + _MARGIN) * seconds)

    def seconds(self, num_rows: int, num_requests: int = 1) -> float:
        """What rows take."""
        return self.plan.seconds_taken(self.taken, num_rows, num_requests)


class _Load:
    """Device seconds that arrive a second, of about the last second."""

    def __init__(self) -> None:
        self._seconds, self._last = 0.0, 0.0

    def at(self, now: float) -> float:
        return self._seconds * math.exp(self._last - now)

    def add(self, seconds: float, now: float) -> None:
        self._seconds, self._last = self.at(now) + seconds, now


def _late_for(head: Part, num_rows: int, chosen: Sequence[Part], forecast: _Forecast) -> list[Ticket]:
    """Those in a run that end after their deadline; the head with its rows that come in later runs."""
    end = forecast.end(num_rows, 1 + len(chosen))
    late = [part.ticket for part in chosen if end > part.ticket.deadline]
    if end + forecast.seconds(max(0, head.num_rows - num_rows)) > head.ticket.deadline:
        late.append(head.ticket)
    return late


def _num_rows(parts: Iterable[Part]) -> int:
    return sum(part.num_rows for part in parts)


def _limit(head: Part, plan: BucketPlan) -> int:
    """Rows of a batch that a part begins: up to the knee, or what its own bucket holds anyhow."""
    if not plan.fills_buckets:
        return plan.knee_rows
    bucket = plan.bucket(min(head.num_rows, plan.ladder.max_rows), 1)
    return max(plan.knee_rows, 0 if bucket is None else bucket.rows)


def _widened(
    head: Part, others: Sequence[Part], forecast: _Forecast, oldest: float
) -> tuple[int, Sequence[Part]] | None:
    """Rows of the least run beyond the limit that saves enough, and who joins the head in it; None for none.

    Not for requests of lower levels than the head's, and not where it makes one late that is in it or that it
    overtakes.
    """
    plan = forecast.plan
    limit, longest = _limit(head, plan), _MOST_KNEES * plan.knee_seconds
    peers = [part for part in others if part.ticket.head_start <= head.ticket.head_start]
    for capacity in plan.row_counts[bisect.bisect_right(plan.row_counts, limit) :]:
        chosen = _fill(head, peers, capacity, plan, oldest)
        run = [head, *chosen]
        num_rows = _num_rows(run)
        if not limit < num_rows <= capacity:
            continue
        seconds = plan.run_seconds(num_rows, len(run))
        if seconds > longest:
            return None
        if seconds > (1 - _LEAST_SAVING) * _seconds_within(run, plan, oldest):
            continue
        end = forecast.end(num_rows, len(run))
        is_late = any(end > part.ticket.deadline for part in run) or any(
            end + forecast.seconds(part.num_rows) > part.ticket.deadline
            for part in others
            if part.ticket.deadline < math.inf and part not in chosen
        )
        return None if is_late else (num_rows, chosen)
    return None


def _seconds_within(parts: Sequence[Part], plan: BucketPlan, oldest: float) -> float:
    """What parts take in runs within the limit, each whole where it fits."""
    seconds = 0.0
    while parts:
        head, *rest = parts
        chosen = _fill(head, rest, _limit(head, plan), plan, oldest)
        seconds += plan.seconds(head.num_rows + _num_rows(chosen), 1 + len(chosen))
        gone = {part.ticket for part in chosen}  # one part of a ticket at most is in a run
        parts = [part for part in rest if part.ticket not in gone]
    return seconds


def _fill(
    head: Part,
    company: Sequence[Part],
    capacity: int,
    plan: BucketPlan,
    oldest: float,
    forecast: _Forecast | None = None,
) -> Sequence[Part]:
    """Those of the company, in order, that fit beside the head and, by a forecast, make nobody late; no two
    of one request, and none behind one that doesn't fit and has been queued since `oldest`."""
    chosen: list[Part] = []
    tickets = {head.ticket}
    num_rows, deadline = head.num_rows, head.ticket.deadline
    for part in company:
        shape = num_rows + part.num_rows, 2 + len(chosen)
        if (
            shape[0] <= capacity
            and part.ticket not in tickets
            and plan.bucket(*shape) is not None
            and (forecast is None or forecast.end(*shape) <= min(deadline, part.ticket.deadline))
        ):
            chosen.append(part)
            tickets.add(part.ticket)
            num_rows += part.num_rows
            deadline = min(deadline, part.ticket.deadline)
        elif part.ticket.queued_at <= oldest and part.ticket not in tickets:
            break
    return chosen
