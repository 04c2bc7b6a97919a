"""Reading safetensors files, whole and broken."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engines.reference.checkpoint import TensorFile, open_checkpoint, weight_paths
from penstock.errors import ConfigError


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


VALUES = np.array([[0.0, 1.0, -2.5], [0.15625, -0.0, 3.140625]], np.float32)  # exact in all three types


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        ("F32", VALUES.tobytes()),
        ("F16", VALUES.astype("<f2").tobytes()),
        ("BF16", (VALUES.view(np.uint32) >> 16).astype("<u2").tobytes()),
    ],
)
def test_every_dtype_becomes_float32(tmp_path: Path, dtype: str, data: bytes) -> None:
    header = {"__metadata__": {"format": "pt"}, "w": entry(dtype, [2, 3], 2, 2 + len(data))}
    file = TensorFile(write(tmp_path / "f", header, b"??" + data))
    array = file.read("w", (2, 3))
    file.close()
    assert array.dtype == np.float32
    assert np.array_equal(array, VALUES)
    assert np.signbit(array[1, 1])


def test_the_array_outlives_the_file(tmp_path: Path) -> None:
    file = TensorFile(write(tmp_path / "f", {"w": entry("F32", [6], 0, 24)}, VALUES.tobytes()))
    array = file.read("w", (6,))
    file.close()
    array += 1.0
    assert array[1] == 2.0


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1]",
        b"[" * 100_000,
        {"w": 5},
        {"w": {"dtype": "F32", "shape": [6]}},
        {"w": entry("F32", None, 0, 24)},
        {"w": entry("F32", [6], 0, 28)},
        {"w": entry("F32", [7], 0, 28)},
        {"w": entry("F32", [-6], 0, -24)},
        {"w": entry("F32", [True, 6], 0, 24)},
        {"w": entry("F32", [6], -24, 0)},
        {"w": entry("F32", [6], 0, 24.0)},
        {"w": entry("F32", [1 << 62, 1 << 62], 0, 24)},
        {"w": entry("I8", [24], 0, 24)},
        {"w": {"dtype": ["F32"], "shape": [6], "data_offsets": [0, 24]}},
    ],
)
def test_malformed_headers_name_the_file(tmp_path: Path, header: Any) -> None:
    with pytest.raises(ConfigError, match="broken"):
        TensorFile(write(tmp_path / "broken", header, VALUES.tobytes()))


def test_a_tensor_of_another_shape_or_name(tmp_path: Path) -> None:
    file = TensorFile(write(tmp_path / "f", {"w": entry("F32", [2, 3], 0, 24)}, VALUES.tobytes()))
    with pytest.raises(ConfigError, match=r"f: w: shape \(2, 3\), but config.json implies \(3, 2\)"):
        file.read("w", (3, 2))
    with pytest.raises(ConfigError, match="f: v: missing"):
        file.read("v", (3, 2))


def test_nan_in_the_weights_is_refused(tmp_path: Path) -> None:
    data = np.array([1.0, np.nan], np.float32).tobytes()
    file = TensorFile(write(tmp_path / "f", {"w": entry("F32", [2], 0, 8)}, data))
    with pytest.raises(ConfigError, match="f: w: holds NaN"):
        file.read("w", (2,))


@given(data=st.data())
def test_any_damage_is_a_config_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut the file anywhere, or overwrite some bytes: never another exception."""
    path = write(tmp_path_factory.mktemp("d") / "f", {"w": entry("F32", [6], 0, 24)}, VALUES.tobytes())
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        at = data.draw(st.integers(0, len(content) - 4))
        content[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    path.write_bytes(content)
    with suppress(ConfigError):
        file = TensorFile(path)
        file.read("w", (6,))
        file.close()


def test_tensors_are_read_from_the_file_that_the_index_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", {name: entry("F32", [6], 0, 24)}, VALUES.tobytes())
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as checkpoint:
        assert np.array_equal(checkpoint.read("b", (6,)), VALUES.ravel())
        assert checkpoint.unread() == {"a"}
        with pytest.raises(ConfigError, match="c: no weights file"):
            checkpoint.read("c", (6,))


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "../elsewhere"}}']
)
def test_malformed_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"index\.json"):
        weight_paths(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither"):
        weight_paths(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    with pytest.raises(ConfigError, match=r"a.safetensors: cannot be read"), open_checkpoint(tmp_path):
        raise AssertionError("not reached")
