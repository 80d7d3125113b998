"""Bundle to ready with compiled code at hand, against the same with none.

Each load is a process of its own; three kinds take turns:
  cold    an empty compilation cache, and the bundle's compiled code left untouched: every program is compiled
  seeded  an empty compilation cache, filled from the bundle's cache/: the first start on a machine
  warm    the compilation cache of an earlier load: every later start

    python tools/bench_load.py build/models/dcn_v2/1 --devices 2 --rounds 5
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "measure"]

KINDS = ("cold", "seeded", "warm")

_NOT_IN_READY = ("tables", "replay", "profile")


def measure(bundle: Path, *, num_devices: int, rounds: int) -> dict[str, Any]:
    """Loads the bundle `rounds` times in each way, in turns.

    Args:
      bundle: version folder, compiled by this machine.
      num_devices: XLA host devices to load on.
      rounds: loads of each kind.

    Returns:
      ``loads``: by kind, the seconds of each load by step: imports; tables, compile, replay and profile of
      the load report; ready, which is the whole of `Engine.load` but tables, replay and profile. ``how``:
      what ready is, in words.

    Raises:
      subprocess.CalledProcessError: if a load fails.
    """
    loads: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        filled = Path(folder) / "filled"
        _load_in_a_process(bundle, filled, num_devices, "warm")
        for number in range(rounds):
            for kind in KINDS:
                cache = filled if kind == "warm" else Path(folder) / f"{kind}-{number}"
                loads[kind].append(_load_in_a_process(bundle, cache, num_devices, kind))
    how = (
        "each load in a fresh process; seconds of Engine.load with checksums, start of JAX and reading or "
        "filling of the cache, without imports, tables, golden replay and timing runs; warm (cache of an "
        "earlier load) over cold (empty cache, the bundle's compiled code not used)"
    )
    return {"how": how, "loads": loads}


def _load_in_a_process(bundle: Path, cache: Path, num_devices: int, kind: str) -> dict[str, float]:
    words = [__file__, str(bundle), "--devices", str(num_devices), "--once", kind, "--cache", str(cache)]
    done = subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _load(bundle: Path, cache: Path, num_devices: int, kind: str) -> dict[str, float]:
    begin = time.perf_counter()
    # Here, because the time that it takes is one of the results.
    engine_class = importlib.import_module("xlarank.runtime").Engine
    imported = time.perf_counter()
    engine = engine_class.load(
        bundle, num_devices=num_devices, compile_cache=cache, use_bundle_code=kind != "cold"
    )
    loaded = time.perf_counter()
    report = engine.load_report
    engine.close()
    if report.fingerprint_differences:
        raise SystemExit(f"{bundle} was compiled elsewhere: {report.fingerprint_differences}")
    ready = loaded - imported - sum(report.seconds[step] for step in _NOT_IN_READY)
    return {"imports": imported - begin, **report.seconds, "ready": ready}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="version folder of a bundle")
    parser.add_argument("--devices", type=int, default=2, help="XLA host devices (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="loads of each kind (%(default)s)")
    parser.add_argument("--once", choices=KINDS, help="load once, in this process")
    parser.add_argument("--cache", type=Path, help="compilation cache of --once")
    args = parser.parse_args()
    if args.once:
        print(json.dumps(_load(args.bundle, args.cache, args.devices, args.once)))
    else:
        print(json.dumps(measure(args.bundle, num_devices=args.devices, rounds=args.rounds)))


if __name__ == "__main__":
    main()
