"""Which device runs which model's requests next: `Scheduler`.

Contract
  - Pure, as the batchers that it owns the turns of: no threads, no clock. The owner serialises the calls and
    hands in the time of each event. The server's threads and the simulator drive the same object.
  - One queue a model; a request is bound to a device when the device frees. Devices of one kind are alike,
    and a free one takes what is first in the queue.
  - Where devices differ, by their prices or as runs on one have come to take far longer, a request goes to
    the cheapest device whose predicted finish meets its deadline, else to the one that finishes soonest
    (ELSA, arXiv 2202.13481), counting what is ahead of it in the queue.
    So a free device is left idle only for requests that a cheaper one, busy now, still finishes in time, or a
    faster one sooner; no other case leaves a device idle while rows are queued. A turn that is overdue is
    expected to last as long again, so that others soon take over from a device that hangs. The time in which
    a device tells its callers of a turn is such a one, and no part of the turn.
  - A request with an affinity key has a home device, by rendezvous hashing of the key; it runs elsewhere when
    its home is busy and another device has nothing of its own to do, or once it has waited `max_skip_ms`.
    Where devices differ, the home is the right one if it finishes no later than `max_skip_ms` after the
    soonest.
  - Models that share a device take turns by the time of it that they have used (start-time fair queueing,
    Goyal et al. 1996). One that had nothing for it begins level with the one that ran there last, so that it
    can neither hoard turns nor pay for others than its last.
  - Admission is by prediction: a request that would finish after its deadline, or find the queue longer than
    allowed, is refused before any work is done for it. What runs take is learnt (`Slowdown`), and fades.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from xlarank.errors import DeadlineError, OverloadError, UnavailableError
from xlarank.runtime.batcher import Batch, Batcher
from xlarank.runtime.bucket_plan import BucketPlan
from xlarank.runtime.model_queue import ModelQueue, Turn
from xlarank.runtime.part_queue import Part, Ticket
from xlarank.runtime.slowdown import Slowdown
from xlarank.spec import DEFAULT_PRIORITY, RequestOptions
from xlarank.spec.serving import DispatchPolicy, QueueConfig

__all__ = ["BatcherMaker", "Scheduler"]

Item = TypeVar("Item", bound=Hashable)

BatcherMaker = Callable[..., Batcher[Any]]
"""Takes what `Batcher` takes: the plan, the config and `num_devices`."""

_ADAPT = 0.1
"""Share of the newest request in what came lately."""

_LEAST_RETRY_SECONDS = 0.001

_LEAST_GROWTH = 1.25
"""By which the least rows that came lately grow with a request of more: a small one counts for some tens."""

_MOST_TIMES_EXPECTED = 4.0
"""A turn counts as this many times what was expected of it at most: others must not go first for a stall."""

_RECENT_SECONDS = 60.0
"""For so long a priority that came is expected again."""

_UNEVEN = 4.0
"""Devices of a kind on which runs take so many times as long as on another are no longer alike: what is less
comes and goes, and alike devices are cheaper to serve."""

_MAX_LOOK = 256
"""Queued parts that are looked at for one device: bounds the time under the owner's lock."""


class _Device:
    """What the scheduler knows of one device."""

    def __init__(self, index: int, cost: float) -> None:
        self.index, self.cost = index, cost
        self.is_healthy = True
        self.is_suspended = False
        self.is_aside = False
        self.turn: Turn | None = None
        self.answers_since = math.inf  # when its last turn ended, while it tells callers of it
        self.look_at = math.inf  # when to ask again for it: a deferral ends, or another is overdue
        self.level_seconds = 0.0  # the greatest `used_seconds` that a turn began at
        self.slowdown = Slowdown()  # of all models' runs, to be shown
        self.num_turns = 0
        self.busy_seconds = 0.0

    @property
    def is_available(self) -> bool:
        """Whether it takes turns now, or once its own has ended."""
        return self.is_healthy and not self.is_suspended and not self.is_aside

    @property
    def is_busy(self) -> bool:
        """Whether it runs a turn, or tells callers of one."""
        return self._due_at < math.inf

    def free_at(self, now: float) -> float:
        """When it is predicted to be free: what is overdue is expected to be so for as long again."""
        return max(self._due_at, 2 * now - self._due_at) if self.is_busy else now

    def doubt_at(self, now: float, patience: float) -> float:
        """When to ask again whether it is worth waiting for; inf for one that isn't busy."""
        return max(self._due_at + patience, self.free_at(now))

    @property
    def _due_at(self) -> float:
        return self.turn.started_at + self.turn.expected_seconds if self.turn else self.answers_since


class Scheduler(Generic[Item]):
    """See the contract at the top of the file."""

    def __init__(
        self,
        num_devices: int,
        *,
        costs: Sequence[float] | None = None,
        make_batcher: BatcherMaker = Batcher,
    ) -> None:
        """
        Args:
          num_devices: numbered from 0.
          costs: what a second of each costs, so that the cheaper one that is fast enough is preferred; all
            alike by default.
          make_batcher: the queue of a model; another rule than `Batcher`'s to compare with.
        """
        self._make_batcher = make_batcher
        costs = [1.0] * num_devices if costs is None else costs
        self._devices = [_Device(index, cost) for index, cost in enumerate(costs)]
        self._queues: list[ModelQueue[Item]] = []
        self._has_costs = len(set(costs)) > 1

    @property
    def is_uniform(self) -> bool:
        """Whether any device that waits does for whatever is queued, so that waking one is enough.

        One that defers may take something else meanwhile, and then another must look after what it deferred.
        """
        return not any(map(self._has_preferences, self._queues)) and all(
            device.is_available and device.look_at == math.inf for device in self._devices
        )

    def _has_preferences(self, queue: ModelQueue[Item]) -> bool:
        """Whether it matters which device comes for what a model has queued."""
        return self._has_costs or queue.has_kinds or queue.batcher.num_tied_requests > 0

    @property
    def num_queued_requests(self) -> int:
        """Of all models."""
        return sum(queue.batcher.num_queued_requests for queue in self._queues)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued, and nothing runs on a device that works."""
        return not self.num_queued_requests and not self.turns()

    @property
    def num_healthy(self) -> int:
        """Devices that are given work."""
        return sum(device.is_healthy for device in self._devices)

    def attach(
        self, name: str, plans: Sequence[BucketPlan], config: QueueConfig, *, version: int = 0
    ) -> ModelQueue[Item]:
        """A queue for a model.

        Args:
          name: for messages and metrics.
          plans: prices by device, the same object for devices that are alike.
          config: how its requests wait.
          version: of the model, for metrics.
        """
        assert len(plans) == len(self._devices)
        fastest = min(plans, key=lambda plan: plan.seconds_a_row)
        batcher: Batcher[Item] = self._make_batcher(fastest, config, num_devices=len(plans))
        queue = ModelQueue(name, batcher, plans, version, [Slowdown() for _ in plans], [0.0] * len(plans))
        self._queues.append(queue)
        return queue

    def detach(self, queue: ModelQueue[Item]) -> None:
        """Takes a model out. Idempotent."""
        if queue in self._queues:
            self._queues.remove(queue)

    def submit(
        self, queue: ModelQueue[Item], item: Item, num_rows: int, options: RequestOptions, now: float
    ) -> None:
        """Queues a request, or refuses it.

        Args:
          queue: of its model.
          item: names it.
          num_rows: N >= 1.
          options: its deadline is on the clock of `now`.
          now: seconds.

        Raises:
          UnavailableError: if no device is healthy.
          OverloadError: if more would be queued than is allowed.
          DeadlineError: if it is predicted to finish after its deadline.
        """
        config = queue.batcher.config
        deadline = options.deadline
        if config.default_timeout_ms:
            deadline = min(deadline, now + config.default_timeout_ms / 1e3)
        self._count_arrival(queue, num_rows, options.priority, now)
        self._admit(queue, num_rows, options.priority, deadline, now)
        home = None if options.affinity_key is None else self._home(options.affinity_key)
        spread: list[int] = []
        if config.policy is DispatchPolicy.SPREAD:
            spread = [device.index for device in self._devices if device.is_healthy]
        queue.batcher.add(
            item,
            num_rows,
            now=now,
            priority=options.priority,
            deadline=deadline,
            home=home,
            spread_over=spread,
        )

    def next_turn(self, device_index: int, now: float) -> Turn[Item] | None:
        """What a free device runs now; None when there is nothing for it. Tell `finished` after it."""
        device = self._devices[device_index]
        assert device.turn is None
        if not device.is_available:
            return None
        device.look_at = math.inf
        for queue in sorted(self._queues, key=lambda queue: _level(queue, device)):
            if not queue.batcher.num_queued_requests:
                continue
            batch = self._next_batch(queue, device, now)
            if batch is not None:
                return self._begin(queue, batch, device, now)
            device.look_at = min(device.look_at, queue.batcher.deferred_until)
        return None

    def retry(self, turn: Turn[Item], device_index: int, now: float) -> Turn[Item]:
        """Has a free device run a batch that another one failed with. Tell `finished` after it."""
        return self._begin(turn.queue, turn.batch, self._devices[device_index], now, is_retry=True)

    def _begin(
        self,
        queue: ModelQueue[Item],
        batch: Batch[Item],
        device: _Device,
        now: float,
        *,
        is_retry: bool = False,
    ) -> Turn[Item]:
        assert device.turn is None
        device.look_at = math.inf
        seconds = queue.plans[device.index].run_seconds(batch.num_rows, len(batch.parts))
        device.level_seconds = _level(queue, device)
        queue.used_seconds[device.index] = device.level_seconds + seconds
        expected = queue.slowdowns[device.index].seconds(seconds, now)
        for slowdown in (device.slowdown, queue.slowdowns[device.index]):
            slowdown.begin(now)
        device.turn = Turn(queue, batch, device.index, now, seconds, expected, is_retry)
        return device.turn

    def finished(self, turn: Turn[Item], now: float) -> None:
        """Tells that a device is free again; from the time that its turn took later ones are predicted.

        Not from a retry's: what fails may take longer, or no time.
        """
        device = self._devices[turn.device]
        seconds = now - turn.started_at
        if device.turn is turn:  # and has not been given up
            device.turn = None
            charge = min(seconds, _MOST_TIMES_EXPECTED * turn.expected_seconds)
            turn.queue.used_seconds[turn.device] += charge - turn.predicted_seconds
        price = 0.0 if turn.is_retry else turn.predicted_seconds
        for slowdown in (device.slowdown, turn.queue.slowdowns[turn.device]):
            slowdown.end(now, price=price, taken=seconds)
        # That one is faster than it was measured, where another has yet to run, tells none apart.
        ratios = [turn.queue.slowdowns[d.index].ratio(now) for d in self._devices if d.is_healthy]
        turn.queue.is_uneven = bool(ratios) and max(ratios) >= _UNEVEN * max(1.0, min(ratios))
        device.num_turns += 1
        device.busy_seconds += seconds

    def turn_of(self, device_index: int) -> Turn[Item] | None:
        """What a device runs now."""
        return self._devices[device_index].turn

    def turns(self) -> list[Turn[Item]]:
        """What all devices run now."""
        return [device.turn for device in self._devices if device.turn is not None]

    @property
    def queues(self) -> Sequence[ModelQueue[Item]]:
        """Of the models that take part."""
        return self._queues

    def use_of(self, device_index: int, now: float) -> tuple[int, float, float, int]:
        """Turns that a device has ended, their seconds, what late ones took over what was predicted, and rows
        that it runs or that wait for it alone."""
        device = self._devices[device_index]
        held = [part for queue in self._queues for part in queue.batcher.held_by(device_index)]
        num_rows = sum(part.num_rows for part in held) + (device.turn.batch.num_rows if device.turn else 0)
        return device.num_turns, device.busy_seconds, device.slowdown.ratio(now), num_rows

    def set_healthy(self, device_index: int, is_healthy: bool) -> None:
        """Takes a device out of service, and what is bound to it to others; or puts it back."""
        device = self._devices[device_index]
        device.is_healthy = is_healthy
        if not is_healthy:
            device.turn = None
            for queue in self._queues:
                queue.batcher.release(device_index)

    def set_suspended(self, device_index: int, is_suspended: bool) -> None:
        """Has a device wait for a while, as if it were busy; what is bound to it stays."""
        self._devices[device_index].is_suspended = is_suspended

    def set_aside(self, device_index: int, is_aside: bool) -> None:
        """Has a device do something else for a while, as if it were busy."""
        self._devices[device_index].is_aside = is_aside

    def set_answering(self, device_index: int, since: float) -> None:
        """A device tells callers of the turn that it ended then; inf once it doesn't."""
        self._devices[device_index].answers_since = since

    def clear(self) -> list[tuple[ModelQueue[Item], list[Item]]]:
        """Takes everything out of the queues."""
        return [(queue, queue.batcher.clear()) for queue in self._queues]

    def take_late(self, now: float) -> list[tuple[ModelQueue[Item], Item]]:
        """Requests whose deadline passed in the queue, or that would have finished after it; each once."""
        late = []
        for queue in self._queues:
            queue.batcher.expire(now)
            late += [(queue, item) for item in queue.batcher.take_late()]
        return late

    def wake_at(self) -> float:
        """When to call `take_late`, or `next_turn` for every free device, though nothing happens; or inf."""
        times = [device.look_at for device in self._devices if device.is_available]
        return min([*times, *(queue.batcher.wake_at for queue in self._queues)], default=math.inf)

    def overload(self, num_arriving: int, now: float) -> OverloadError | None:
        """What a request that comes now would be refused with, before anything is known of it.

        It may be of any model and priority that came within the last minute, and of a single row.

        Args:
          num_arriving: requests that are on their way and haven't been submitted. They count as queued, but
            for as many as devices are free for: of the models and levels that came lately, with the least
            rows that did, or a row each while nothing is queued.
          now: seconds.

        Returns:
          A refusal that is true whichever model it is for: it names none, and asks to come again when one
          of the queues has room, as predicted. None if it may be taken, or would be refused for another
          reason.
        """
        is_empty = not self.num_queued_requests
        if is_empty:
            num_free = sum(device.is_available and not device.is_busy for device in self._devices)
            num_arriving = max(0, num_arriving - num_free)
        all_shares = sum(share for queue in self._queues for share in queue.shares.values())
        refusals = []
        for queue in self._queues:
            recent = [level for level, at in queue.seen_at.items() if now - at <= _RECENT_SECONDS]
            if not recent:
                continue
            level = min(recent)
            seconds = num_rows = 0.0
            for own in [own for own in queue.shares if own <= level]:
                count = num_arriving * queue.shares[own] / all_shares
                least = 1 if is_empty else round(queue.least_rows[own])
                seconds += count * queue.batcher.plan.work_seconds(least)
                num_rows += count * least
            wait = self.predicted_start(queue, now, level, seconds) - now
            refusal = self._refusal(queue, math.floor(num_rows) + 1, level, wait, now)
            if refusal is None or wait == math.inf:
                return None
            refusals.append(refusal)
        if not refusals:
            return None
        why, retry = min(refusals, key=lambda refusal: refusal[1])
        return OverloadError(f"the server's queues are full: where there is room again soonest, {why}", retry)

    def _count_arrival(self, queue: ModelQueue[Item], num_rows: int, level: int, now: float) -> None:
        queue.seen_at[level] = now
        queue.least_rows[level] = min(num_rows, _LEAST_GROWTH * queue.least_rows.get(level, 1.0))
        for each in self._queues:
            for own in each.shares:
                each.shares[own] *= 1 - _ADAPT
        queue.shares[level] = queue.shares.get(level, 0.0) + _ADAPT

    def predicted_start(
        self,
        queue: ModelQueue[Item],
        now: float,
        priority: int = DEFAULT_PRIORITY,
        arriving_seconds: float = 0.0,
    ) -> float:
        """When a request of this level would begin to run if it came now; inf without a healthy device.

        Ahead of it is what is queued before it, and what is arriving.
        """
        return self._start_behind(queue, queue.batcher.seconds_ahead(now, priority) + arriving_seconds, now)

    def _start_behind(self, queue: ModelQueue[Item], own: float, now: float) -> float:
        """When a model's next request would begin with so many seconds of its own work ahead.

        The work fills the devices up to a common level, each from when it is free on.
        """
        ahead = own
        own_ratio = self._ratio(queue, now)
        for other in self._queues:
            if other is not queue:  # it gets as many turns as this one, and may be the first
                scale = self._ratio(other, now) / own_ratio
                most = own + scale * other.batcher.plan.knee_seconds
                ahead += min(scale * other.batcher.queued_seconds, most)
        fastest = queue.batcher.plan.seconds_a_row

        def speed_of(index: int) -> float:
            return fastest / (queue.slowdowns[index].ratio(now) * queue.plans[index].seconds_a_row)

        free = sorted(
            (device.free_at(now), speed_of(device.index)) for device in self._devices if device.is_healthy
        )
        level, speed = math.inf, 0.0
        for free_at, own_speed in free:
            if free_at >= level:
                break
            ahead += free_at * own_speed
            speed += own_speed
            level = ahead / speed
        return level

    def _admit(
        self, queue: ModelQueue[Item], num_rows: int, priority: int, deadline: float, now: float
    ) -> None:
        start = self.predicted_start(queue, now, priority)
        if start == math.inf:
            raise UnavailableError(f"model {queue.name!r}: no device is healthy")
        refusal = self._refusal(queue, num_rows, priority, start - now, now)
        if refusal is not None:
            why, retry = refusal
            raise OverloadError(f"model {queue.name!r}: the queue is full: {why}", retry)
        if deadline < math.inf:
            finish = self._finish(queue, num_rows, start, now)
            if finish > deadline:
                left = (deadline - now) * 1e3
                when = f"is in {left:.1f} ms" if left >= 0 else f"passed {-left:.1f} ms ago"
                raise DeadlineError(
                    f"model {queue.name!r}: the answer would come in {(finish - now) * 1e3:.1f} ms, the "
                    f"deadline {when}"
                )

    def _refusal(
        self, queue: ModelQueue[Item], num_rows: int, priority: int, wait: float, now: float
    ) -> tuple[str, float] | None:
        """Why so many rows more, which would wait so long, are too many, and in how many seconds they may not
        be; None if they aren't. What is behind them doesn't count: low levels don't keep high ones out."""
        config = queue.batcher.config
        longest, most = config.max_queue_ms / 1e3, config.max_queued_rows
        is_near = queue.batcher.num_queued_rows + num_rows > most
        num_ahead = queue.batcher.rows_ahead(now, priority) if is_near else 0
        retry = wait - longest / 2 if wait > longest else 0.0
        if num_ahead and num_ahead + num_rows > most:
            why = f"{num_ahead} rows are queued, {num_rows} more would pass max_queued_rows, {most}"
            in_the_way = queue.batcher.seconds_of_first(min(num_ahead, num_ahead + num_rows - most))
            retry = max(retry, self._start_behind(queue, in_the_way, now) - now)
        elif wait > longest:
            why = f"a request would wait {wait * 1e3:.1f} ms, max_queue_ms is {config.max_queue_ms:g}"
        else:
            return None
        return why, max(_LEAST_RETRY_SECONDS, retry)

    def _finish(self, queue: ModelQueue[Item], num_rows: int, start: float, now: float) -> float:
        """When the soonest device would be through with a request that begins at `start` or after."""
        devices = [device for device in self._devices if device.is_healthy]
        if queue.batcher.config.policy is DispatchPolicy.SPREAD:
            num_rows = -(-num_rows // len(devices))
        return min(
            max(start, device.free_at(now)) + self._seconds(queue, device.index, num_rows, now)
            for device in devices
        )

    def _ratio(self, queue: ModelQueue[Item], now: float) -> float:
        """How much longer a model's runs take than its prices say, over the devices that work."""
        ratios = [queue.slowdowns[device.index].ratio(now) for device in self._devices if device.is_healthy]
        return sum(ratios) / len(ratios) if ratios else 1.0

    @staticmethod
    def _seconds(queue: ModelQueue[Item], device_index: int, num_rows: int, now: float) -> float:
        """What rows of a request are expected to take on a device."""
        return queue.plans[device_index].seconds_taken(queue.slowdowns[device_index].at(now), num_rows)

    def _home(self, key: str) -> int | None:
        """Rendezvous hashing: a device more or less moves only the keys that it wins or loses."""
        if len(self._devices) == 1:
            return None

        def weight(device: _Device) -> bytes:
            return hashlib.blake2b(f"{device.index}/{key}".encode(errors="replace"), digest_size=8).digest()

        return max(self._devices, key=weight).index

    def _next_batch(self, queue: ModelQueue[Item], device: _Device, now: float) -> Batch[Item] | None:
        batcher, plan = queue.batcher, queue.plans[device.index]
        workers = [other.index for other in self._devices if other.is_healthy]

        known: dict[int, float] = {}  # of each size queued; most batches ask for none

        def least_seconds(num_rows: int) -> float:
            if num_rows not in known:
                known[num_rows] = min(self._seconds(queue, index, num_rows, now) for index in workers)
            return known[num_rows]

        next_batch = functools.partial(
            batcher.next_batch,
            device.index,
            now,
            plan=plan,
            taken=queue.slowdowns[device.index].at(now),
            least_seconds=least_seconds,
            # Devices that are alike differ by noise: one that is left to another may find none that takes it.
            may_leave=queue.has_kinds or self._has_costs,
        )
        if not self._has_preferences(queue):
            return next_batch()
        if queue.has_kinds or self._has_costs:
            chosen = self._soonest_here(queue, device, now)
            batch = next_batch(claims=lambda part: part.ticket in chosen)
            if batch is None:  # left to others, one of which may hang
                patience = plan.seconds(1)
                doubts = [other.doubt_at(now, patience) for other in self._devices if other.is_available]
                device.look_at = min([device.look_at, *doubts])
            return batch
        skip = batcher.config.max_skip_ms / 1e3

        def is_own(part: Part[Item]) -> bool:
            return now - part.ticket.queued_at >= skip or self._is_home(part.ticket, device)

        def may_take(part: Part[Item]) -> bool:
            home = part.ticket.home
            return home is None or self._devices[home].is_busy

        for claims in (is_own, may_take):
            batch = next_batch(claims=claims)
            if batch is not None or batcher.deferred_until < math.inf:
                return batch
        # Left to homes that are free, which may not come for it.
        left = (part for part in itertools.islice(batcher.waiting(), _MAX_LOOK) if part.pin is None)
        ends = [part.ticket.queued_at + skip for part in left]
        device.look_at = min([device.look_at, *(end for end in ends if end > now)])
        return None

    def _is_home(self, ticket: Ticket[Item], device: _Device) -> bool:
        home = ticket.home
        return home is None or home == device.index or not self._devices[home].is_available

    def _soonest_here(self, queue: ModelQueue[Item], device: _Device, now: float) -> set[Ticket[Item]]:
        """What this device is the right one for, counting what is before each in the queue."""
        parts = (part for part in queue.batcher.waiting() if part.may_run_on(device.index))
        free = {other.index: other.free_at(now) for other in self._devices if other.is_available}
        skip = queue.batcher.config.max_skip_ms / 1e3
        here: set[Ticket[Item]] = set()
        num_rows = 0
        taken = {i: queue.slowdowns[i].at(now) for i in free}
        ratios = {i: queue.slowdowns[i].ratio(now) for i in free}

        @functools.cache  # of each size queued
        def seconds(num_rows: int) -> dict[int, float]:
            return {i: queue.plans[i].seconds_taken(taken[i], num_rows) for i in free}

        for part in itertools.islice(parts, _MAX_LOOK):
            own = seconds(part.num_rows)
            ends = {i: free[i] + own[i] for i in free if part.may_run_on(i)}
            home, deadline = part.ticket.home, part.ticket.deadline
            in_time = [i for i in ends if ends[i] <= deadline < math.inf]
            if in_time:
                choice = min(in_time, key=lambda i: (self._devices[i].cost, i != home, ends[i], free[i]))
            else:  # of equals the one that begins first, as the others have something to do
                choice = min(ends, key=lambda i: (ends[i] - skip * (i == home), free[i]))
            work = queue.plans[choice].work_seconds(part.num_rows)
            free[choice] += ratios[choice] * work
            if choice == device.index:
                here.add(part.ticket)
                num_rows += part.num_rows
            if num_rows >= queue.batcher.plan.ladder.max_rows:
                break  # more than one batch takes
        return here


def _level(queue: ModelQueue, device: _Device) -> float:
    """What a model's turn on a device begins at: what wasn't used while others were isn't made up for."""
    return max(queue.used_seconds[device.index], device.level_seconds)
