"""Compiled programs on disk: the next process neither traces nor compiles them.

A stored program is a pickle with machine code inside, so a folder of them is trusted
code, like JAX's compilation cache: keep them in the workdir of a run, and load no
workdir of somebody you would not run a program of. Each file begins with a line that
says what it was made with; where anything differs, or the file is damaged, the program
is compiled again and the file replaced.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pickle
import platform
from collections.abc import Callable
from pathlib import Path

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache


class Executables:
    """The stored programs of one folder, made with the same code and settings."""

    def __init__(self, folder: Path, **settings):
        """`settings`, JSON values, are what the programs depend on beside arguments."""
        self.folder = Path(folder)
        self._made_with = made_with() | {"settings": digest(json.dumps(settings))}

    def jit(self, function: Callable, **options) -> Callable:
        """`jax.jit(function, **options)`, stored under the function's name.

        One program per structure, shapes, types and placement of the arguments, which
        are positional arrays; the function must not close over anything that
        `settings` do not determine.
        """
        jitted, programs = jax.jit(function, **options), {}

        def call(*arguments):
            leaves, structure = jax.tree.flatten(arguments)
            key = (structure, *map(placed, leaves))
            if key not in programs:
                name = f"{function.__name__}-{digest(str(key))[:16]}.bin"
                programs[key] = self._program(jitted, self.folder / name, arguments)
            return programs[key](*arguments)

        return call

    def _program(self, jitted, path: Path, arguments) -> Callable:
        if path.exists():
            try:
                return load(path, self._made_with)
            except Exception as error:  # XLA and pickle raise many types.
                logging.warning("%s: compiling anew: %s", path, first_line(error))
        # Only what was compiled here can be stored: XLA:CPU serialises a program from
        # the compilation cache without some of its functions.
        with without_compilation_cache():
            compiled = jitted.lower(*arguments).compile()
        try:
            store(path, compiled, self._made_with)
        except Exception as error:  # A full disk, or a backend that cannot.
            logging.warning("%s: not stored: %s", path, first_line(error))
        return compiled


def store(path: Path, compiled: jax.stages.Compiled, made_with: dict) -> None:
    """Writes a compiled program, its checksum and what it was made with."""
    content = pickle.dumps(serialize_executable.serialize(compiled))
    head = {**made_with, "sha256": hashlib.sha256(content).hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(json.dumps(head).encode() + b"\n" + content)
    temporary.replace(path)


def load(path: Path, made_with: dict) -> Callable:
    """Reads what `store` wrote.

    Raises:
      ValueError: if the file is damaged or was made with something else; the content
        is not unpickled then.
    """
    line, _, content = path.read_bytes().partition(b"\n")
    try:
        head = json.loads(line)
        expected = head.pop("sha256")
    except (ValueError, KeyError, AttributeError):
        raise ValueError("the file is damaged") from None
    differing = [
        f"{name} was {head.get(name)!r} and is {made_with.get(name)!r}"
        for name in sorted(head.keys() | made_with.keys())
        if head.get(name) != made_with.get(name)
    ]
    if differing:
        raise ValueError(f"made with something else: {', '.join(differing)}")
    if hashlib.sha256(content).hexdigest() != expected:
        raise ValueError("the file is damaged: its checksum differs")
    return serialize_executable.deserialize_and_load(*pickle.loads(content))


def made_with() -> dict[str, str]:
    """Everything outside a program that its machine code depends on."""
    device = jax.devices()[0]
    flags = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    settings = ("jax_enable_x64", "jax_default_matmul_precision")
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "platform": device.client.platform_version,
        "device": device.device_kind,
        "devices": str(jax.device_count()),
        "processor": processor() if device.platform == "cpu" else "",
        "flags": " ".join(os.environ.get(name, "") for name in flags).strip(),
        "numbers": " ".join(str(getattr(jax.config, name)) for name in settings),
        "source": source_digest(),
    }


def processor() -> str:
    """The CPU's instruction sets as a digest: code for more of them would crash."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # Not Linux.
        return f"{platform.machine()} {platform.processor()}"
    features = [x for x in lines if x.startswith(("flags", "Features"))]
    return f"{platform.machine()} {digest(''.join(features[:1]))[:16]}"


@functools.cache
def source_digest() -> str:
    """Of this package's source."""
    package = Path(__file__).parents[1]
    parts = (
        f"{path.relative_to(package)}\n{path.read_text()}"
        for path in sorted(package.rglob("*.py"))
    )
    return digest("\n".join(parts))[:16]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def placed(leaf) -> str:
    """An array's shape, type and place, as far as a compiled program minds them."""
    if isinstance(leaf, jax.Array):
        return f"{jax.typeof(leaf)} weak={leaf.weak_type} {leaf.sharding}"
    return f"{leaf.shape} {leaf.dtype}"


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def without_compilation_cache():
    """Compiles inside are not taken from JAX's cache, nor put into it."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # Or the change is not seen.
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
