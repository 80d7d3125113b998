"""JAX set-up of a process: devices, dispatch mode, compilation cache, fingerprint."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from jax.experimental.compilation_cache import compilation_cache

from xlarank.errors import ConfigError
from xlarank.spec import PlatformOptions, Precision

if TYPE_CHECKING:  # jax.Device is this class, under a name that type checkers don't take
    from jaxlib._jax import Device

_log = logging.getLogger(__name__)

__all__ = [
    "compile_cache_at",
    "compile_cache_files",
    "compile_cache_folder",
    "compiler_options",
    "configure",
    "default_compile_cache",
    "device_kind",
    "device_memory",
    "devices",
    "export_platform",
    "fingerprint",
    "half_precision",
    "has_own_memory",
    "platforms_of",
    "seed_compile_cache",
]


def default_compile_cache() -> Path:
    """``$XDG_CACHE_HOME/xlarank/compiled``, by default below ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "xlarank" / "compiled"


def configure(
    *,
    num_devices: int | None = None,
    platforms: Sequence[PlatformOptions] = (),
    compile_cache: Path | None = None,
) -> None:
    """Prepares JAX for serving; call it before anything else of the process touches a device.

    Args:
      num_devices: on a CPU host, the number of XLA host devices to make; elsewhere the number of
        accelerators that must be there. None leaves what there is.
      platforms: instead of that, the devices that must be there; see `devices`.
      compile_cache: the process's one compilation cache; None keeps the one that JAX is configured with,
        else takes `default_compile_cache`.

    Raises:
      ConfigError: if JAX already runs with fewer devices or hasn't such ones, or the cache folder can't be
        made.
    """
    # Dispatch from one thread a device, inline: a pool thread in between costs up to 500 us at p99.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if num_devices is not None:
        _make_cpu_devices(num_devices)
    for platform_options in platforms:
        if platform_options.name == "cpu" and platform_options.devices is not None:
            _make_cpu_devices(platform_options.devices, platform_options.name)
    if compile_cache is None and jax.config.jax_compilation_cache_dir is None:
        compile_cache = default_compile_cache()
    if compile_cache is not None:
        _use_compile_cache(compile_cache)
    if num_devices is not None and len(jax.devices()) < num_devices:
        raise ConfigError(
            f"{num_devices} devices were asked for, JAX has {len(jax.devices())} of kind "
            f"{device_kind(jax.devices()[0])!r}"
        )
    if platforms:
        devices(platforms=platforms)


def devices(num_devices: int | None = None, platforms: Sequence[PlatformOptions] = ()) -> list[Device]:
    """The first `num_devices` local devices, all by default.

    Args:
      num_devices: of JAX's default platform: its accelerators where there are some.
      platforms: instead of that, where devices are taken from, in this order.

    Raises:
      ConfigError: if there aren't such devices.
    """
    if platforms:
        found = [own for options in platforms for own in _devices_of(options)]
        if len(set(found)) < len(found):
            raise ConfigError(
                f"platforms: expected each device once, got some twice of {', '.join(map(str, platforms))}"
            )
        return found
    found = jax.local_devices()
    if num_devices is not None and not 1 <= num_devices <= len(found):
        raise ConfigError(f"expected 1 to {len(found)} devices, got {num_devices}")
    return found[:num_devices]


def platforms_of(found: Iterable[Device]) -> list[PlatformOptions]:
    """The platforms of devices, with all devices that each has here: so many as another process must make for
    the compiled code of these to be the code of its own."""
    names = dict.fromkeys(device.platform for device in found)
    return [PlatformOptions(name=name, devices=len(jax.local_devices(backend=name))) for name in names]


def device_kind(device: Device) -> str:
    """JAX's name of the device's make, such as ``cpu`` or ``NVIDIA H100 80GB HBM3``."""
    return device.device_kind


def export_platform(device: Device) -> str:
    """The platform that jax.export makes a program for, such as ``cuda``, if it is to run on a device."""
    return "cuda" if device.platform == "gpu" else device.platform


def has_own_memory(device: Device) -> bool:
    """Whether a device's inputs and outputs are transferred: CPUs read and write them where they lie."""
    return device.platform != "cpu"


def device_memory(device: Device) -> int | None:
    """Bytes that a device says that it has for arrays; None where it says nothing, as CPUs."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def half_precision(device: Device) -> Precision:
    """The 16-bit float format that a device multiplies in: bfloat16, float16 where it has none.

    NVIDIA GPUs have bfloat16 from compute capability 8.0 on; a CPU without it emulates it.
    """
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability is not None and float(capability) < 8:
        return Precision.FLOAT16
    return Precision.BFLOAT16


def compile_cache_folder() -> Path:
    """The process's compilation cache, as `configure` set it."""
    return Path(jax.config.jax_compilation_cache_dir or default_compile_cache())


def compile_cache_files() -> set[str]:
    """Names of the files of code in it."""
    with contextlib.suppress(FileNotFoundError):
        return {name for name in os.listdir(compile_cache_folder()) if not name.startswith(".")}
    return set()


@contextlib.contextmanager
def compile_cache_at(folder: Path) -> Iterator[None]:
    """Compiles into `folder` for a while: how a bundle's cache/ is filled."""
    before = jax.config.jax_compilation_cache_dir
    _use_compile_cache(folder)
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def seed_compile_cache(files: Iterable[Path], *, is_newer: bool = False) -> None:
    """Copies compiled code into the process's compilation cache, each file whole or not at all.

    A file that is there stays, unless it is shorter: it may have been cut off.

    Args:
      files: as JAX wrote them into another cache folder, from a source as trusted as this program.
      is_newer: whether they take the place of what is there in any case.
    """
    folder = compile_cache_folder()
    for file in files:
        target = folder / file.name
        if not is_newer and target.exists() and target.stat().st_size >= file.stat().st_size:
            continue
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".seed-", delete=False) as copy:
            copy.write(file.read_bytes())
        os.replace(copy.name, target)


@functools.cache
def compiler_options(platform_name: str, *, has_int8: bool = False) -> dict[str, str | bool]:
    """XLA options that every program of ours is compiled with, in training as in serving.

    jaxlib 0.11 and later hand reductions on CPU to YNNPACK, which reads out of bounds when an operand was
    broadcast: wrong scores that differ from run to run (google/XNNPACK pull request 11243; measured on
    0.12.0). Its matmuls are right and fast, so they stay.

    On a GPU jaxlib 0.11.2 lets Triton multiply int8, and gets it wrong at some sizes (8 x 7 x 5 and
    16 x 33 x 7 of ten tried on an H100); cuBLAS, which does it instead, is right.

    Args:
      platform_name: of the device, such as ``cpu``.
      has_int8: whether the program has matrices of int8.

    Returns:
      For `compiler_options` of `jax.jit` and `Lowered.compile`; empty where the options don't exist.
    """
    release = tuple(int(part) for part in _jaxlib_version().split(".")[:2])
    # A model's own bfloat16 rounds where the model says, fused or not: only then can it equal the reference.
    options: dict[str, str | bool] = {"xla_allow_excess_precision": False}
    if platform_name == "cpu" and release >= (0, 11):
        options["xla_cpu_experimental_ynn_fusion_type"] = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
    if platform_name == "gpu" and has_int8:
        options["xla_gpu_enable_triton_gemm"] = False
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        for name in list(options):
            try:
                lowered = jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((), "float32"))
                lowered.compile(compiler_options={name: options[name]})
            except jax.errors.JaxRuntimeError as error:  # a later release without the option
                _log.warning("XLA no longer knows %s: %s", name, error)
                del options[name]
    return options


def fingerprint(device: Device | None = None) -> dict[str, str]:
    """What compiled code depends on: toolchain, flags, device (by default JAX's first) and CPU features."""
    return _fingerprint(jax.local_devices()[0] if device is None else device)


@functools.cache
def _fingerprint(device: Device) -> dict[str, str]:
    return {
        "jax": jax.__version__,
        "jaxlib": _jaxlib_version(),
        "platform_version": device.client.platform_version.replace("\n", " "),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "compiler_options": " ".join(f"{k}={v}" for k, v in compiler_options(device.platform).items()),
        "device_kind": device_kind(device),
        "machine": platform.machine(),
        "cpu_features": _cpu_features(),
    }


def _jaxlib_version() -> str:
    return importlib.metadata.version("jaxlib")


def _devices_of(options: PlatformOptions) -> list[Device]:
    try:
        found = jax.local_devices(backend=options.name)
    except RuntimeError as error:
        raise ConfigError(f"platform {options.name!r}: expected one that JAX has here: {error}") from error
    if options.devices is not None and len(found) < options.devices:
        raise ConfigError(
            f"platform {options.name!r}: expected {options.devices} devices, JAX has {len(found)}"
        )
    return found[: options.devices]


def _make_cpu_devices(num_devices: int, backend: str | None = None) -> None:
    """Makes so many, or is content with those of the default platform, or `backend`, if it runs already."""
    if num_devices < 1:
        raise ConfigError(f"num_devices must be >= 1; was {num_devices}")
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError as error:  # the backend runs already
        if (there := len(jax.devices(backend))) < num_devices:
            raise ConfigError(
                f"{num_devices} devices were asked for after JAX started with {there}; "
                f"ask before anything uses JAX"
            ) from error


def _use_compile_cache(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"compile cache {folder}: can't be written: {error.strerror}") from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Every program is worth keeping: start-up is their sum.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # XLA's own GPU caches would put this folder's path into every key, and no bundle's code would fit.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    # JAX binds the folder at the first compile of the process; bind it anew.
    compilation_cache.reset_cache()


def _cpu_features() -> str:
    """Digest of the CPU's feature flags, which XLA:CPU compiles for."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    flags = next(
        (line.split(":", 1)[1] for line in text.splitlines() if line.startswith(("flags", "Features"))), ""
    )
    return hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:16]
