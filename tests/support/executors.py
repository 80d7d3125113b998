"""Executors in front of a real one, for tests: faults are injected here, not by flags of the product."""

import threading


class Gated:
    """Waits before each batch until the gate is open; tells when one has come."""

    def __init__(self, inner):
        self.inner = inner
        self.gate = threading.Event()
        self.has_come = threading.Semaphore(0)

    def run(self, bucket, leaves):
        self.has_come.release()
        assert self.gate.wait(60)
        return self.inner.run(bucket, leaves)


def wrap(engine, wrapper):
    """Puts `wrapper(executor)` in the place of each executor of an engine; returns them, by device."""
    executors = [wrapper(executor) for executor in engine._execution._executors]
    engine._execution._executors = executors
    return executors


class Faulty:
    """Does what `fault(bucket, leaves, scores)` makes of each batch's scores; None leaves them."""

    def __init__(self, inner):
        self.inner = inner
        self.fault = None

    def run(self, bucket, leaves):
        scores = self.inner.run(bucket, leaves)
        if self.fault is None:
            return scores
        changed = {task: values.copy() for task, values in scores.items()}
        return self.fault(bucket, leaves, changed)
