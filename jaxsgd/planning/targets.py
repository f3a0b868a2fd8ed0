"""Compilers for hardware that is not there: ``lookup("v5e:4x4").compile(lowered)``.

The TPU compiler is in libtpu, the CUDA compiler in jaxlib's plugin with NVIDIA's assembler. Both run on any machine.
Their programs cannot run without the hardware.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import Mesh

from jaxsgd.planning.devices import Device, Topology
from jaxsgd.planning.devices import lookup as describe

__all__ = ["DoesNotFit", "Target", "available", "lookup", "prepare"]

ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # cuDNN and its kin are needed to run, not to compile
}
"""What the compilers want to be told where their hardware is not; read when they are first used."""


PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


class DoesNotFit(Exception):
    """The compiler's answer that a program needs more memory than the device has.

    Attributes:
      needs, has: bytes on a device.
      text: the program as far as it was compiled, or "".
      largest: what the compiler names as the largest allocations, ``(bytes, shape, where)``.
    """

    def __init__(self, needs: int, has: int, text: str, largest: list[tuple[int, str, str]]) -> None:
        super().__init__(f"needs {needs} bytes, has {has}")
        self.needs, self.has, self.text, self.largest = needs, has, text, largest


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: of the topology, in its full form.
      description: what they are.
      device: one of them.
      devices: all of them, as JAX knows them.
    """

    name: str
    device: Device
    devices: tuple[Any, ...]

    @property
    def description(self) -> str:
        count = len(self.devices)
        return f"{count} x {self.device.title}" if count > 1 else self.device.title

    def mesh(self, axes: Mapping[str, int] | None = None) -> Mesh:
        """The devices as a mesh with Auto axes: ``mesh({"data": -1, "model": 4})``.

        Args:
          axes: names and sizes, of which one may be -1 for all the rest; by default one axis ``"data"``.

        Raises:
          ValueError: sizes that do not make up the number of devices.
        """
        axes = {"data": -1} if axes is None else dict(axes)
        count, given = len(self.devices), math.prod(size for size in axes.values() if size != -1)
        free = [name for name, size in axes.items() if size == -1]
        if len(free) > 1 or any(size < 1 and size != -1 for size in axes.values()):
            raise ValueError(f"mesh_axes={axes}: sizes are 1 or more, and one of them may be -1 for the rest")
        if count % given or not free and given != count:
            raise ValueError(f"mesh_axes={axes}: {self.name} has {count} devices, the sizes make up {given}")
        sizes = {name: count // given if size == -1 else size for name, size in axes.items()}
        return Mesh(np.reshape(np.array(self.devices, dtype=object), tuple(sizes.values())), tuple(sizes))

    def compile(self, lowered: Any) -> Any:
        """A `jax.stages.Compiled` that can be read and not run (on the CPU it could).

        Raises:
          DoesNotFit: the compiler found that the program needs more memory than the device has. The CUDA compiler does
            not look; compare what it says with `Device.memory`.
        """
        with _uncached():
            try:
                return lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise _does_not_fit(lowered, str(error)) from None


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without JAX's cache of compiled programs: what comes from it cannot be loaded where its devices are not there."""
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX looks at the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        reset_cache()


UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _bytes(text: str) -> int:
    """``15.75G`` in bytes."""
    number, unit = re.fullmatch(r"([\d.]+)([BKMGT]?)i?B?", text).groups()  # type: ignore[union-attr]
    return round(float(number) * UNITS[unit])


def _does_not_fit(lowered: Any, message: str) -> Exception:
    """The compiler's refusal in numbers."""
    early = re.search(
        r"total memory required for HLO temporaries \(([\d.]+\w*)\) exceeds available HBM \(([\d.]+\w*)\)", message
    )
    late = re.search(r"Used ([\d.]+\w*) of ([\d.]+\w*) hbm", message)
    found = early or late or re.search(r"Requires ([\d.]+\w*), has ([\d.]+\w*) available", message)
    if found is None:
        return jax.errors.JaxRuntimeError(message)
    named = re.findall(r"Size: ([\d.]+\w*)\s+(?:Operator: (.*?)\s+)?(?:Shape: (\S+))?", message)
    largest = [(_bytes(size), shape, operator.strip("op_name=\"' ")) for size, operator, shape in named]
    text = _written(lowered) if early else ""
    return DoesNotFit(_bytes(found[1]), _bytes(found[2]), text, largest)


def _written(lowered: Any) -> str:
    """The program as the compiler had it when it gave up: it says so in seconds, and writes it down if asked."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            lowered.compile(compiler_options={"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError:
            files = sorted(pathlib.Path(folder).glob("*after_optimizations.txt"))
            return files[-1].read_text() if files else ""
    return ""


def available(platform: str) -> bool:
    """Whether the compiler for a platform is installed: ``"tpu"``, ``"cuda"`` or ``"cpu"``."""
    return not _missing(platform)


def _missing(platform: str) -> str:
    """The package that is missing, or ""."""

    if platform == "tpu" and not _there("libtpu"):
        return "libtpu"
    if platform == "cuda" and not any(_there(name) for name in PLUGINS):
        return "the CUDA plugin of jaxlib"
    return ""


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def prepare() -> None:
    """Tell the compilers that their hardware is not here, in the environment, unless a variable is set already.

    `lookup` calls it. Call it yourself before the first use of JAX to silence the compilers' complaints about missing
    hardware.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@functools.cache
def lookup(topology: str) -> Target:
    """The compiler's target of a name such as ``"v5e:4x4"``, ``"h100:8"``, ``"cpu"``.

    `jaxsgd.planning.devices.lookup` reads the name.

    Raises:
      ValueError: an unknown name; more CPU devices than this process has.
      ImportError: the compiler is not installed; the extra that brings it is named.
      RuntimeError: the compiler is installed and refuses its target.
    """
    described = describe(topology)
    if described.name != topology:
        return lookup(described.name)
    device = described.device
    if device.platform == "cpu":
        return Target(described.name, device, _cpus(described.count))
    missing = _missing(device.platform)
    if missing:
        raise ImportError(
            f"topology={topology!r} needs the compiler for {device.title}, and {missing} is not installed: "
            f"pip install 'jaxsgd[{device.platform}]'"
        )
    prepare()
    try:
        devices = _tpus(described) if device.platform == "tpu" else _gpus(described)
    except Exception as error:
        hint = "" if device.platform == "tpu" else "; JAX_PLATFORMS=cpu in the environment helps where no GPU is"
        raise RuntimeError(f"topology={topology!r}: the compiler refuses it: {error}{hint}") from error
    return Target(described.name, device, tuple(devices))


def _cpus(count: int) -> tuple[Any, ...]:
    there = jax.devices("cpu")
    if len(there) < count:
        raise ValueError(
            f"topology='cpu:{count}': of CPU devices this process has {len(there)}; say "
            f"jax.config.update('jax_num_cpu_devices', {count}) before JAX is first used"
        )
    return tuple(there[:count])


def _tpus(topology: Topology) -> Any:
    from jax.experimental import topologies

    sizes = (*topology.shape, 1)[:3]
    bounds = [2 if size % 2 == 0 else 1 for size in sizes[:2]] + [1]  # the chips of one host
    options = {"chips_per_host_bounds": bounds, **topology.device.options}
    return topologies.get_topology_desc(topology.name, platform="tpu", **options).devices


def _gpus(topology: Topology) -> Any:
    from jax.experimental import topologies

    hosts, each = topology.shape
    options: dict[str, Any] = {"target_config": target_config(topology.device), "topology": f"1x{hosts}x{each}"}
    make = functools.partial(topologies.get_topology_desc, topology.device.name, platform="cuda", **options)
    try:
        return make().devices
    except NotImplementedError:
        # JAX looked for GPUs before `prepare` could say that there need not be any, and left the plugin out.
        plugin = next(name for name in PLUGINS if _there(name))
        importlib.import_module(plugin).initialize()
        return make().devices


def target_config(device: Device) -> str:
    """A GPU for the CUDA compiler: its ``GpuTargetConfigProto`` as text.

    The properties that these GPUs share are from the CUDA C++ Programming Guide's table of compute capabilities.
    """
    own = dict(device.target)
    name, major, minor, links = (own.pop(k) for k in ("name", "major", "minor", "active_links"))
    alike = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048,
        "shared_memory_per_block": 49152, "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
        "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64, "device_address_bits": 64,
    }  # fmt: skip
    texts = dict.fromkeys(("driver_version", "runtime_version", "compile_time_toolkit_version"), "13.0.0")
    texts |= {"dnn_version": "9.12.0", "name": name, "device_vendor": "NVIDIA Corporation"}
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    inside = [f"{k}: {v}" for k, v in (alike | own).items()] + [f'{k}: "{v}"' for k, v in texts.items()]
    inside += [
        "ecc_enabled: true",
        f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}",
        f"device_interconnect_info {{ active_links: {links} }}",
    ]
    return (
        f'gpu_device_info {{ {" ".join(inside)} }} platform_name: "CUDA" '
        f'dnn_version_info {{ major: 9 minor: 12 patch: 0 }} device_description_str: "{name}"'
    )
