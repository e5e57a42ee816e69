"""Whole files or none; nothing but safetensors is read."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pagoda.errors import ArtifactError, ResourceError
from pagoda.files import (
    atomic_path,
    check_disk,
    hash_file,
    hash_json,
    load_tensors,
    save_tensors,
    write_bytes_atomic,
    write_text_atomic,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    write_text_atomic(target, "old")

    def write_half_and_stop() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half_and_stop()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_full_disk_becomes_a_resource_error_and_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    write_text_atomic(target, "old")
    with pytest.raises(ResourceError, match=r"became full while .*state\.json"), atomic_path(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_text() == "old"


def test_a_dead_process_leaves_its_temporary_file_to_the_next_writer(tmp_path: Path) -> None:
    target = tmp_path / "weights.bin"
    code = """
import os, sys
from pagoda.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_bytes(b"x")
    os._exit(9)
"""
    subprocess.run(
        [sys.executable, "-c", code, str(target)],
        check=False,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
    )
    assert len(os.listdir(tmp_path)) == 1
    assert not target.exists()
    write_bytes_atomic(target, b"whole")
    assert os.listdir(tmp_path) == ["weights.bin"]


def test_temporary_files_of_running_processes_are_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "weights.bin"
    with atomic_path(target) as first:
        first.write_bytes(b"mine")
        other = first.with_name(first.name.replace(str(os.getpid()), str(os.getppid())))
        other.write_bytes(b"theirs")
        write_bytes_atomic(tmp_path / "another.bin", b"")
    assert other.read_bytes() == b"theirs"
    write_bytes_atomic(target, b"again")
    assert other.exists()


def test_json_hash_ignores_key_order_and_nothing_else() -> None:
    assert hash_json({"a": 1, "b": [1, 2]}) == hash_json({"b": [1, 2], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 2})
    assert hash_json([1, 2]) != hash_json([2, 1])
    assert len(hash_json(None)) == 16
    with pytest.raises(ValueError, match="not JSON compliant"):
        hash_json(float("nan"))


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    write_bytes_atomic(tmp_path / "empty", b"")
    assert hash_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_disk_check_names_what_wants_space(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "yet", 1, "the cache")
    with pytest.raises(ResourceError, match=r"the cache needs [\d,.]+ MiB"):
        check_disk(tmp_path / "not" / "yet", 1 << 60, "the cache")


def test_tensors_come_back_bitwise_with_metadata_even_when_they_share_memory(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    tensors = {"a": weight, "tied": weight, "turned": weight.t(), "half": weight.half(), "part": weight[1:]}
    save_tensors(tmp_path / "t.safetensors", tensors, {"made": "here"})
    loaded, metadata = load_tensors(tmp_path / "t.safetensors")
    assert metadata == {"made": "here"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.arange(10)})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError, match=r"t\.safetensors"):
            load_tensors(path)


def test_pickles_and_torch_archives_are_refused_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ArtifactError, match="is a pickle"):
        load_tensors(path)
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(ArtifactError, match="zip archive"):
        load_tensors(path)
    path.write_text("hello, this is a text file and no safetensors")
    with pytest.raises(ArtifactError, match="not a complete safetensors file"):
        load_tensors(path)
    with pytest.raises(ArtifactError, match="does not exist"):
        load_tensors(tmp_path / "nothing.safetensors")


def test_a_header_length_that_looks_like_a_pickle_is_still_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    heads = set()
    for length in range(0, 264, 8):  # sweep the length of the header until its first byte is that of a pickle
        save_tensors(path, {"a": torch.ones(1)}, {"note": "x" * length})
        heads.add(path.read_bytes()[0])
        assert load_tensors(path)[1]["note"] == "x" * length
    assert 0x80 in heads
