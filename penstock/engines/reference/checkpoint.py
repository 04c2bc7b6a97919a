"""Reading safetensors files: one, or several behind `model.safetensors.index.json`.

A safetensors file is an unsigned 64-bit little-endian length N, N bytes of JSON
(`{name: {dtype, shape, data_offsets: [begin, end]}}`, offsets counted from the end of the header), and
the tensors' bytes, little-endian and C-contiguous
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from penstock.engines.reference.tiles import Floats
from penstock.errors import ConfigError

MAX_HEADER_BYTES = 100_000_000  # as in the reference implementation
MAX_SHARDS = 1024
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


class _Entry(msgspec.Struct, frozen=True):
    """Where one tensor lies: a dtype name, its shape, and absolute byte positions in its file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """One memory-mapped safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:  # mmap's answer to an empty file
            raise ConfigError(f"{path}: the file is empty") from error
        try:
            self._entries = self._read_header()
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        self._bytes.close()

    def names(self) -> list[str]:
        return list(self._entries)

    def read(self, name: str, shape: tuple[int, ...]) -> Floats:
        """The tensor as a new float32 array.

        Raises:
            ConfigError: it is missing, has another shape or dtype, or holds NaN or infinity.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise ConfigError(f"{self.path}: {name}: missing")
        if entry.shape != shape:
            raise self._error(name, f"shape {entry.shape}, but config.json implies {shape}")
        array = _to_float32(self._bytes[entry.begin : entry.end], entry.dtype).reshape(shape)
        if not np.isfinite(array).all():
            raise self._error(name, "holds NaN or infinite values")
        return array

    def _error(self, name: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.path}: {name}: {problem}")

    def _read_header(self) -> dict[str, _Entry]:
        size = len(self._bytes)
        length = int.from_bytes(self._bytes[:8], "little")
        if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise ConfigError(f"{self.path}: not a safetensors file, or truncated in its header")
        try:
            header = json.loads(self._bytes[8 : 8 + length])
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.path}: header is not JSON: {error}") from error
        if not isinstance(header, dict):
            raise ConfigError(f"{self.path}: header is not a JSON object")
        header.pop("__metadata__", None)
        return {name: self._entry(name, fields, 8 + length) for name, fields in header.items()}

    def _entry(self, name: str, fields: Any, start: int) -> _Entry:
        try:
            dtype, shape = fields["dtype"], tuple(fields["shape"])
            begin, end = fields["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._error(name, "malformed header entry") from error
        if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
            raise self._error(name, f"dtype {dtype!r}; expected one of {', '.join(_ITEM_BYTES)}")
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise self._error(name, "malformed shape or data_offsets")
        if start + end > len(self._bytes):
            raise self._error(name, "its bytes lie beyond the end of the file; truncated?")
        if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
            raise self._error(name, f"{end - begin} bytes do not make shape {shape} of {dtype}")
        return _Entry(dtype, shape, start + begin, start + end)


class Checkpoint:
    """All tensors of a model folder. Remembers what was read, so that leftovers are noticed."""

    def __init__(self, files: list[TensorFile], file_of: dict[str, TensorFile], folder: Path) -> None:
        self._files = files
        self._file_of = file_of
        self._folder = folder
        self._unread = set(file_of)

    def read(self, name: str, shape: tuple[int, ...]) -> Floats:
        """See `TensorFile.read`."""
        if name not in self._file_of:
            raise ConfigError(f"{self._folder}: {name}: no weights file holds this tensor")
        self._unread.discard(name)
        return self._file_of[name].read(name, shape)

    def unread(self) -> set[str]:
        """Names of tensors that nothing asked for."""
        return self._unread


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """Map the weights of a folder; they are unmapped at the end of the `with` block.

    Raises:
        ConfigError: files are missing, truncated, malformed or do not match their index.
    """
    files: list[TensorFile] = []
    try:
        for path in weight_paths(folder):
            files.append(TensorFile(path))  # noqa: PERF401 - what was opened must be closed on failure
        file_of = {name: file for file in files for name in file.names()}
        yield Checkpoint(files, file_of, folder)
    finally:
        for file in files:
            file.close()


def weight_paths(folder: Path) -> list[Path]:
    """The folder's safetensors files, by name. Raises ConfigError when there are none."""
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if len(names) > MAX_SHARDS or any(Path(name).name != name for name in names):
            raise ConfigError(f"{index}: weight_map names too many files, or files elsewhere")
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is here") from error
    except OSError as error:
        raise ConfigError(f"{index}: cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{index}: malformed: {error!r}") from error
    return [folder / name for name in names]


def _to_float32(content: bytes, dtype: str) -> Floats:
    if dtype == "F32":
        return np.frombuffer(content, "<f4").astype(np.float32)
    if dtype == "F16":
        return np.frombuffer(content, "<f2").astype(np.float32)
    # bfloat16 is the upper half of a float32.
    return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
