"""Whether what an engine holds is freed, and by reference counts alone."""

import contextlib
import gc
import threading
import weakref


class Parts:
    """What holds an engine's memory."""

    def __init__(self, engine):
        replica = engine._execution._executors[0]
        tables = [table.rows for table in engine._gatherer._tables.values()]
        parts = (engine, replica, engine._gatherer, *tables, *replica.prepared)
        self._freed = [(type(part).__name__, threading.Event()) for part in parts]
        self._refs = [
            weakref.ref(part, lambda _, freed=freed: freed.set())
            for part, (_, freed) in zip(parts, self._freed, strict=True)
        ]

    def left(self):
        """Names of those that aren't freed, once the device's thread has had time to leave its last batch."""
        return [name for name, freed in self._freed if not freed.wait(10)]


@contextlib.contextmanager
def no_collector():
    """Cycles stay as long as it is open: what is freed then needs no luck."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
