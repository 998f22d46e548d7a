"""Files of weights, as name -> tensor: .npz, .safetensors and torch checkpoints.

A torch checkpoint is a pickle, which can run any code when it is read. `read_torch`
therefore has its own reader, which knows tensors and plain containers and refuses
everything else; torch is not needed. What a file unfolds to is measured before it is
unfolded, and may be a small multiple of the model.
"""

import collections
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

MOST = 2**31  # Bytes, where no model is known.


def _check_size(path: Path, size: int, most: int) -> None:
    if size > most:
        raise ValueError(
            f"{path} holds {size / 1e6:.0f} MB, more than the {most / 1e6:.0f} MB that "
            "weights of this network may have; is it the right file?"
        )


def _check_unzipped(path: Path, most: int) -> None:
    """`_check_size` of a file and of all that a zip file declares to hold."""
    _check_size(path, path.stat().st_size, most)
    try:
        with zipfile.ZipFile(path) as archive:
            # What zipfile returns of a member is never longer than declared here.
            size = sum(info.file_size for info in archive.infolist())
    except Exception:
        return  # No zip file, or a damaged one: its reader will say so.
    _check_size(path, size, most)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_npz(path: Path, most: int = MOST) -> dict[str, np.ndarray]:
    """Reads the arrays of a .npz file; ValueError if unreadable or too large."""
    _check_unzipped(path, most)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # zipfile and NumPy raise many kinds.
        raise ValueError(
            f"{path} is no readable .npz of arrays: {_one_line(error)}"
        ) from None


def read_safetensors(path: Path, most: int = MOST) -> dict[str, np.ndarray]:
    """Reads a .safetensors file; ValueError if unreadable or too large."""
    try:
        from safetensors import numpy as safetensors
    except ImportError:
        raise ImportError(f"{path} needs pip install safetensors") from None
    _check_size(path, path.stat().st_size, most)
    try:
        return safetensors.load_file(path)
    except Exception as error:  # A dtype that NumPy lacks is a KeyError.
        raise ValueError(
            f"{path} is no readable safetensors file: {_one_line(error)}"
        ) from None


def read_torch(path: Path, most: int = MOST) -> dict[str, np.ndarray]:
    """Reads the tensors of a torch checkpoint, new (zip) or old form, without torch.

    A checkpoint that holds its weights under "state_dict" or "model" is unwrapped, and
    the prefix "module." of data-parallel training is dropped.

    Raises:
      ValueError: damaged, not a torch checkpoint, larger than `most` bytes, or holding
        anything but tensors and plain containers; nothing of the file is executed.
    """
    _check_unzipped(path, most)
    try:
        data = path.read_bytes()
        zipped = zipfile.is_zipfile(io.BytesIO(data))
        content, storages = (_read_zip if zipped else _read_old)(data)
        for key in ("state_dict", "model"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if not isinstance(content, dict) or not content:
            raise ValueError("it holds no dictionary of tensors")
        views = {}
        for name, value in content.items():
            if not isinstance(name, str) or not isinstance(value, _Tensor):
                raise ValueError(f"{name!r} is not a tensor")
            views[name.removeprefix("module.")] = value.view(storages)
        if sum(view.nbytes for view in views.values()) > most:
            raise ValueError(f"its tensors take more than {most / 1e6:.0f} MB")
        return {name: view.copy() for name, view in views.items()}
    # A damaged pickle may raise almost anything.
    except Exception as error:
        raise ValueError(
            f"{path} is not a torch checkpoint of tensors alone ({_one_line(error)}); "
            "save its state_dict() afresh, or convert it to .safetensors where it was "
            "made"
        ) from None


_TYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, storages: dict[str, bytes]) -> np.ndarray:
        key, dtype, count = self.storage
        numbers = (self.offset, count, *self.shape, *self.strides)
        if not all(isinstance(n, int) and abs(n) < 2**40 for n in numbers):
            raise ValueError("a tensor has a shape that is none")
        flat = np.frombuffer(storages[key], dtype)
        extents = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        if (
            min((self.offset, *self.shape, *self.strides)) < 0
            or self.offset + sum(extents) >= max(min(count, flat.size), 1)
            or math.prod(self.shape) > flat.size
        ):
            raise ValueError(f"a tensor reaches outside its storage {key}")
        strides = [s * flat.itemsize for s in self.strides]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides)


class _Unpickler(pickle._Unpickler):
    """Knows dictionaries, torch's two ways to rebuild a tensor, and its storages.

    The unpickler in Python, as the one in C sizes its memo by a number in the file and
    hashes any key: forty nested tuples would take it years.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.types: dict[str, np.dtype] = {}  # Of every storage met so far.

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TYPES:
            return name
        known = {
            # Without arguments: its items follow, through `_set_items`.
            ("collections", "OrderedDict"): lambda *_: collections.OrderedDict(),
            # Made anew each time: a pickle can set attributes of what it is given.
            ("torch._utils", "_rebuild_tensor_v2"): lambda *a: _Tensor(*a[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in known:
            raise ValueError(f"it asks for {module}.{name}, which is not allowed")
        return known[module, name]

    def persistent_load(self, pid: tuple) -> _Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or any(view):
            raise ValueError("it refers to something else than a plain storage")
        if not isinstance(dtype, str) or not isinstance(key, str):
            raise ValueError("a storage has no name or type")
        self.types[key] = np.dtype(_TYPES[dtype])
        return _Storage(key, self.types[key], count)

    def _set_items(self) -> None:
        _check_keys(self.stack[::2])
        pickle._Unpickler.load_setitems(self)

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        pickle._Unpickler.load_setitem(self)

    def _make_dict(self) -> None:
        _check_keys(self.stack[::2])
        pickle._Unpickler.load_dict(self)

    def _refuse(self) -> None:
        raise ValueError("it holds a set")

    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.SETITEMS[0]: _set_items,
        pickle.SETITEM[0]: _set_item,
        pickle.DICT[0]: _make_dict,
        pickle.ADDITEMS[0]: _refuse,
        pickle.FROZENSET[0]: _refuse,
    }


def _check_keys(keys: list) -> None:
    if not all(isinstance(key, str | int) for key in keys):
        raise ValueError("a dictionary has keys that are neither names nor numbers")


def _read_zip(data: bytes) -> tuple[Any, dict[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it holds {len(pickles)} data.pkl, expected one")
        root = pickles[0].removesuffix("data.pkl")
        order = root + "byteorder"  # Absent before torch 2.1.
        if order in names and archive.read(order) != b"little":
            raise ValueError("it is big-endian")
        content = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
        start = root + "data/"
        storages = {
            name.removeprefix(start): archive.read(name)
            for name in names
            if name.startswith(start)
        }
    return content, storages


def _read_old(data: bytes) -> tuple[Any, dict[str, bytes]]:
    file = io.BytesIO(data)
    magic, version, system = (_Unpickler(file).load() for _ in range(3))
    if magic != 0x1950A86A20F9469CFC6C or version != 1001:
        raise ValueError("its first bytes are not torch's")
    if not system["little_endian"]:
        raise ValueError("it is big-endian")
    reader = _Unpickler(file)
    content = reader.load()
    storages = {}
    for key in _Unpickler(file).load():
        if not isinstance(key, str):
            raise ValueError("a storage has no name")
        count = int.from_bytes(file.read(8), "little")
        storages[key] = file.read(count * reader.types[key].itemsize)
    return content, storages
