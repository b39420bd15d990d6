"""The store of activations: what it returns, what it counts, what it drops first, and what damage does to it."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import reftheads.reuse.store
from reftheads.reuse.store import FORMAT, ActivationStore

KB = 256  # float32 numbers in a kilobyte
DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
]


def entry(value: float = 0.0, kilobytes: int = 1) -> dict[str, torch.Tensor]:
    return {"h": torch.full((kilobytes * KB,), float(value))}


def value(store: ActivationStore, key: str) -> float | None:
    found = store.get(key)
    return None if found is None else found["h"][0].item()


def on_disk(folder: Path, *keys: str, **options) -> ActivationStore:
    """A store that keeps nothing in memory, with one file a key; the value of key "a" is 10."""
    store = ActivationStore(0, folder, **{"disk_budget": 10**6, **options})
    for key in keys:
        store.put({key: entry(int(key, 16))})
    return store


def reopened(folder: Path) -> ActivationStore:
    return ActivationStore(0, folder, disk_budget=10**6)


def files(folder: Path) -> list[Path]:
    """By age, the oldest first."""
    return sorted(folder.glob("activations-*.safetensors"))


def assert_same_bits(found: torch.Tensor, put: torch.Tensor) -> None:
    assert found.dtype == put.dtype and found.shape == put.shape
    assert torch.equal(found.reshape(-1).view(torch.uint8), put.reshape(-1).view(torch.uint8))


# --- in memory --------------------------------------------------------------------------------------------


def test_the_least_recently_used_entry_goes_first():
    store = ActivationStore(3 * 1024)
    store.put({"a": entry(1), "b": entry(2), "c": entry(3)})
    store.get("a")
    store.put({"d": entry(4)})
    assert [key for key in "abcd" if key in store] == ["a", "c", "d"]
    store.put({"c": entry(5)})
    store.put({"e": entry(6), "f": entry(7)})
    assert [key for key in "abcdef" if key in store] == ["c", "e", "f"] and len(store) == 3


def test_asking_whether_a_key_is_there_counts_and_changes_nothing():
    store = ActivationStore(2 * 1024)
    store.put({"a": entry(), "b": entry()})
    assert "a" in store and "c" not in store
    assert store.hits == store.misses == 0
    store.put({"c": entry()})
    assert "a" not in store


def test_the_counters_tell_hits_misses_evictions_and_bytes():
    store = ActivationStore(2 * 1024)
    store.put({"a": entry(), "b": entry(), "c": entry()})
    for key in "aabc":
        store.get(key)
    assert store.counters() == {"hits": 2, "misses": 2, "bytes": 2048, "disk_bytes": 0, "evictions": 1}
    assert store.recomputed == 0


def test_the_budget_holds_to_the_byte():
    store = ActivationStore(1024)
    store.put({"a": entry()})
    assert store.bytes == 1024 and "a" in store
    store.put({"b": {"h": torch.zeros(1, dtype=torch.int8)}})
    assert store.bytes == 1 and "a" not in store


def test_a_view_of_a_large_tensor_is_copied_so_that_the_rest_is_freed():
    large = torch.randn(1000, 64)
    store = ActivationStore(10**6)
    store.put({"a": {"row": large[3], "columns": large[:, :2], "spread": large[0, :1].expand(5)}})
    found = store.get("a")
    assert found is not None
    assert sum(tensor.untyped_storage().nbytes() for tensor in found.values()) == 64 * 4 + 2000 * 4 + 5 * 4
    assert store.bytes == 64 * 4 + 2000 * 4 + 5 * 4
    assert torch.equal(found["row"], large[3]) and torch.equal(found["columns"], large[:, :2])


def test_a_tensor_that_is_no_view_is_not_copied():
    tensor = torch.randn(8, 4)
    store = ActivationStore(10**6)
    store.put({"a": {"h": tensor}})
    assert store.get("a")["h"].data_ptr() == tensor.data_ptr()


def test_what_is_kept_has_no_graph_and_serves_a_backward_pass():
    store = ActivationStore(10**6)
    weight = torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        inference = torch.ones(3) * 2
        store.put({"a": {"h": inference}})
    store.put({"b": {"h": weight * 2}})
    assert not store.get("b")["h"].requires_grad
    (store.get("a")["h"] * weight).sum().backward()
    assert weight.grad.tolist() == [2, 2, 2]


def test_what_is_read_from_disk_in_inference_mode_serves_a_backward_pass(tmp_path):
    store = on_disk(tmp_path, "a")
    with torch.inference_mode():
        found = store.get("a")["h"]
    assert not found.is_inference()


def test_an_entry_larger_than_the_budget_is_not_kept_and_pushes_nothing_out():
    store = ActivationStore(2 * 1024)
    store.put({"a": entry(1)})
    store.put({"b": entry(2, kilobytes=3)})
    assert "a" in store and "b" not in store and store.evictions == 0
    store.put({"a": entry(3, kilobytes=3)})
    assert store.get("a") is None, "the old value must not outlive a new one"
    assert store.bytes == 0


def test_the_dict_that_is_returned_is_the_callers_own():
    store = ActivationStore(10**6)
    store.put({"a": entry(1)})
    store.get("a").clear()
    assert value(store, "a") == 1


def test_entries_live_on_the_device_that_was_asked_for(tmp_path):
    store = ActivationStore(1024, tmp_path, 10**6, device="meta")
    store.put({"a": entry(1), "b": entry(2)})
    assert "a" in store and store.bytes == 1024, "b displaced a in memory, and both are on disk"
    found = store.get("a")
    assert found["h"].device.type == "meta" and store.bytes == 1024
    assert list(store._memory) == ["a"], "what another device read from disk is kept in memory again"
    assert value(reopened(tmp_path), "a") == 1, "what is on disk is what was put"


def test_without_budgets_half_of_what_is_free_is_taken(tmp_path):
    store = ActivationStore(directory=tmp_path)
    assert 10**6 < store.budget < 10**14 and 10**6 < store.disk_budget < 10**16


# --- on disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [10**6, 0], ids=["memory", "disk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype, budget):
    size = torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    bits = torch.randint(0, high, (6 * size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    put = {"h": bits.view(dtype).reshape(2, 3), "scalar": bits.view(dtype)[0], "empty": bits.view(dtype)[:0]}
    ActivationStore(budget, tmp_path, 10**6).put({"a": put})
    store = ActivationStore(budget, tmp_path, 10**6)
    for _ in range(2):
        found = store.get("a")
        assert found is not None and found.keys() == put.keys()
        for name in put:
            assert_same_bits(found[name], put[name])


def test_tensors_that_share_memory_or_are_not_contiguous_are_written(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    put = {"a": {"k": shared, "v": shared, "t": shared.T, "x/y": shared.expand(2, 2, 3)}, "b": {"k": shared}, "c": {}}
    store = ActivationStore(0, tmp_path, 10**6)
    store.put(put)
    for key in put:
        found = store.get(key)
        assert found.keys() == put[key].keys()
        assert all(torch.equal(found[name], put[key][name]) for name in found)


def test_one_put_writes_one_file_with_the_format_and_a_checksum_for_every_entry(tmp_path):
    on_disk(tmp_path).put({"a": entry(1), "b": entry(2)})
    assert os.listdir(tmp_path) == [path.name for path in files(tmp_path)]
    (path,) = files(tmp_path)
    with safe_open(path, framework="pt") as file:
        assert FORMAT == "reftheads activations 1"
        assert json.loads(file.metadata()[FORMAT]).keys() == {"a", "b"}


def test_what_memory_drops_is_read_from_disk(tmp_path):
    store = ActivationStore(1024, tmp_path, 10**6)
    store.put({"a": entry(1), "b": entry(2)})
    assert [value(store, key) for key in "abab"] == [1, 2, 1, 2]
    assert store.hits == 4 and store.misses == 0 and store.bytes == 1024 and len(store) == 2


def test_on_the_cpu_an_entry_is_mapped_and_writing_into_it_leaves_the_file_as_it_was(tmp_path):
    store = on_disk(tmp_path, "a")
    store.get("a")["h"].zero_()
    assert value(store, "a") == 10 and value(reopened(tmp_path), "a") == 10
    assert store.bytes == 0


def test_a_store_on_a_folder_with_files_starts_warm(tmp_path):
    first = on_disk(tmp_path, "a", "b")
    store = reopened(tmp_path)
    assert len(store) == 2 and "a" in store and store.disk_bytes == first.disk_bytes > 2048
    assert value(store, "a") == 10 and value(store, "b") == 11 and store.hits == 2


def test_a_key_that_is_put_again_replaces_its_file(tmp_path):
    store = on_disk(tmp_path)
    for new in range(5):
        store.put({"a": entry(new)})
    assert len(files(tmp_path)) == 1 and store.disk_bytes == files(tmp_path)[0].stat().st_size
    assert value(store, "a") == value(reopened(tmp_path), "a") == 4


def test_of_two_files_with_the_same_key_the_newer_one_counts(tmp_path):
    one, other = on_disk(tmp_path), on_disk(tmp_path)
    one.put({"a": entry(1)})
    other.put({"a": entry(2), "b": entry(3)})
    one.put({"b": entry(4)})
    store = reopened(tmp_path)
    assert value(store, "a") == 2 and value(store, "b") == 4 and len(files(tmp_path)) == 2


def test_whole_files_leave_the_disk_and_the_least_recently_used_go_first(tmp_path):
    store = on_disk(tmp_path)
    store.put({"a": entry(1), "b": entry(2)})
    size = store.disk_bytes
    store.put({"c": entry(3), "d": entry(4)})
    assert store.disk_bytes == 2 * size
    store.disk_budget = 2 * size
    store.get("b")  # so that the file of a and b is used more recently than that of c and d
    store.put({"e": entry(5), "f": entry(6)})
    assert [key for key in "abcdef" if key in store] == ["a", "b", "e", "f"]
    assert store.evictions == 2 and store.disk_bytes == 2 * size == sum(p.stat().st_size for p in files(tmp_path))
    store.disk_budget = 2 * size - 1
    store.put({"c": entry(7), "d": entry(8)})
    assert [key for key in "abcdef" if key in store] == ["c", "d"]


def test_a_hit_in_memory_keeps_the_file_on_disk_too(tmp_path):
    store = ActivationStore(10**6, tmp_path, 10**6)
    for key in "ab":
        store.put({key: entry()})
    store.get("a")
    store.disk_budget = store.disk_bytes
    store.put({"c": entry()})
    assert sorted(reopened(tmp_path)._path) == ["a", "c"]
    assert "b" in store, "it is still in memory"


def test_a_put_larger_than_the_disk_budget_writes_nothing_and_pushes_nothing_out(tmp_path):
    store = on_disk(tmp_path, "a")
    store.disk_budget = store.disk_bytes + 1
    store.put({"b": entry(2, kilobytes=10)})
    assert "a" in store and "b" not in store and store.evictions == 0 and len(os.listdir(tmp_path)) == 1


def test_a_folder_over_the_budget_is_brought_down_when_it_is_opened(tmp_path):
    size = on_disk(tmp_path, "a", "b", "c").disk_bytes // 3
    store = ActivationStore(0, tmp_path, disk_budget=2 * size)
    assert "a" not in store and "b" in store and "c" in store and len(files(tmp_path)) == 2


def test_clear_forgets_everything_and_removes_only_its_own_files(tmp_path):
    store = ActivationStore(10**6, tmp_path, 10**6)
    store.put({"a": entry(), "b": entry()})
    (tmp_path / "notes.txt").write_text("mine")
    store.clear()
    assert len(store) == store.bytes == store.disk_bytes == 0 and store.get("a") is None
    assert os.listdir(tmp_path) == ["notes.txt"]
    store.put({"a": entry(1)})
    assert value(store, "a") == 1


def test_two_stores_on_one_folder_leave_each_others_entries_alone(tmp_path):
    one, other = on_disk(tmp_path), on_disk(tmp_path)
    one.put({"a": entry(1)})
    other.put({"a": entry(2), "b": entry(3)})
    assert value(one, "a") == 1 and value(other, "a") == 2
    assert "b" not in one and "b" in reopened(tmp_path)


# --- damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True], ids=["same store", "opened again"])
@pytest.mark.parametrize("left", [0.99, 0.5, 0.1], ids=str)
def test_a_truncated_file_is_a_miss_and_is_removed(tmp_path, left, warm):
    store = on_disk(tmp_path, "a", "b")
    assert value(store, "a") == 10
    path = files(tmp_path)[0]
    os.truncate(path, int(path.stat().st_size * left))
    store = reopened(tmp_path) if warm else store
    assert store.get("a") is None and value(store, "b") == 11
    assert store.recomputed == 1 and not path.exists() and "a" not in store
    assert store.disk_bytes == sum(p.stat().st_size for p in files(tmp_path))
    store.put({"a": entry(1)})
    assert value(store, "a") == 1


def test_no_flipped_bit_anywhere_in_a_file_is_served_or_raises(tmp_path):
    put = {"ab": {"k": torch.arange(4.0), "v": torch.arange(4, dtype=torch.int32)}}
    on_disk(tmp_path).put(put)
    (path,) = files(tmp_path)
    sound = path.read_bytes()
    for place in range(len(sound)):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << place % 8]) + sound[place + 1 :])
        store = reopened(tmp_path)
        for key in [*store._path, "ab"]:
            found = store.get(key)
            if found is not None:  # an escape in JSON, or a space, may be written in two ways
                assert key == "ab" and found.keys() == put["ab"].keys(), place
                assert all(torch.equal(found[name], put["ab"][name]) for name in found), place
        assert "ab" in store or not path.exists() or place < 60, "only without its mark the file is not known as ours"


def test_a_flipped_bit_in_the_data_drops_the_whole_file(tmp_path):
    on_disk(tmp_path).put({"a": entry(1), "b": entry(2)})
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    store = reopened(tmp_path)
    assert len(store) == 2, "headers alone are read when a store is opened"
    assert store.get("b") is None and store.get("a") is None
    assert store.recomputed == 1 and store.misses == 2 and store.disk_bytes == 0 and not path.exists()


def test_a_key_that_is_put_again_is_verified_again(tmp_path):
    store = on_disk(tmp_path, "a")
    store.put({"b": entry(1), "a": entry(2)})
    assert value(store, "a") == 2
    store.put({"a": entry(3)})
    path = files(tmp_path)[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert store.get("a") is None and store.recomputed == 1 and value(store, "b") == 1


def test_an_entry_that_is_in_memory_survives_its_damaged_file(tmp_path):
    store = ActivationStore(10**6, tmp_path, 10**6)
    store.put({"a": entry(1)})
    os.truncate(files(tmp_path)[0], 100)
    assert value(store, "a") == 1 and store.recomputed == 0


def test_files_of_others_are_left_alone(tmp_path):
    save_file({"a/h": torch.zeros(4)}, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    save_file({"a/h": torch.zeros(4)}, tmp_path / "later.safetensors", metadata={"reftheads activations 2": "{}"})
    (tmp_path / "text.safetensors").write_text(f"all about {FORMAT}")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "folder.safetensors").mkdir()
    before = sorted(os.listdir(tmp_path))
    store = on_disk(tmp_path, "b")
    assert "a" not in store and store.get("a") is None and store.recomputed == 0
    store.clear()
    assert reopened(tmp_path).disk_bytes == 0
    assert sorted(os.listdir(tmp_path)) == before


def test_a_file_that_another_one_was_put_in_place_of_is_a_miss_and_is_left_alone(tmp_path):
    store = on_disk(tmp_path, "a")
    (path,) = files(tmp_path)
    path.write_text("not a safetensors file")
    assert store.get("a") is None and store.recomputed == 1 and path.exists() and "a" not in store


def test_a_file_that_vanished_is_a_miss_and_no_damage(tmp_path):
    store = on_disk(tmp_path, "a", "b")
    files(tmp_path)[0].unlink()
    assert store.get("a") is None and value(store, "b") == 11
    assert store.recomputed == 0 and store.misses == 1 and "a" not in store
    files(tmp_path)[0].unlink()
    store.clear()
    assert store.disk_bytes == 0


def test_a_mapped_entry_outlives_its_file(tmp_path):
    store = on_disk(tmp_path, "a")
    found = store.get("a")
    store.clear()
    assert found["h"].sum() == 10 * KB


def test_a_disk_that_is_full_is_an_oserror_that_leaves_no_file(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    store = on_disk(tmp_path, "a")
    monkeypatch.setattr(reftheads.reuse.store, "save_file", full)
    with pytest.raises(OSError, match="No space left on device.*free some space"):
        store.put({"b": entry()})
    assert "b" not in store and value(store, "a") == 10 and len(os.listdir(tmp_path)) == 1


@pytest.mark.slow
def test_a_process_killed_during_put_leaves_nothing_that_is_served_half(tmp_path):
    script = """
import sys, torch
from reftheads.reuse.store import ActivationStore
store = ActivationStore(0, sys.argv[1], 10**9)
print("ready", flush=True)
for i in range(10**6):
    store.put({f"{i:x}": {"h": torch.full((10**6,), float(i))}})
"""
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    while not files(tmp_path):
        time.sleep(0.01)
    time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    store = ActivationStore(0, tmp_path, 10**9)
    assert len(store) == len(files(tmp_path)) > 0
    assert all(torch.equal(store.get(key)["h"], torch.full((10**6,), float(int(key, 16)))) for key in list(store._path))
    assert store.recomputed == 0


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    left = tmp_path / ".activations-old"
    left.mkdir()
    (left / "activations-1.safetensors").write_bytes(b"half")
    store = reopened(tmp_path)
    assert len(store) == 0 and store.recomputed == 0
    assert not left.exists()


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"prompt 1": {}}, "'prompt 1' is not a hex string"),
        ({"": {}}, "not a hex string"),
        ({7: {}}, "7 is not a hex string"),
        ({"a": {"h": [1.0]}}, "'h': list; give tensors by name"),
        ({"a": {3: torch.zeros(1)}}, "3: Tensor; give tensors by name"),
        ({"a": {"h": torch.zeros(2, dtype=torch.complex128)}}, "complex128.*give dense, real tensors"),
        ({"a": {"h": torch.zeros(2).to_sparse()}}, "sparse_coo.*give dense, real tensors"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_changes(tmp_path, entries, said):
    store = ActivationStore(10**6, tmp_path, 10**6)
    with pytest.raises(ValueError, match=said):
        store.put({"b": entry(), **entries})
    assert len(store) == 0 and not os.listdir(tmp_path)


def test_budgets_and_folders_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="budget=-1: give a number of bytes"):
        ActivationStore(-1)
    with pytest.raises(ValueError, match="disk_budget=-5"):
        ActivationStore(1, tmp_path, -5)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: give a folder"):
        ActivationStore(1, tmp_path / "file")


def test_an_empty_put_writes_no_file(tmp_path):
    on_disk(tmp_path).put({})
    assert not os.listdir(tmp_path)


# --- against a plain dict ---------------------------------------------------------------------------------

_KEYS = st.sampled_from([f"{i:02x}" for i in range(6)])
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.dictionaries(_KEYS, st.integers(0, 40), max_size=3)),
        st.tuples(st.just("get"), _KEYS),
        st.tuples(st.just("clear"), st.none()),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(steps=_STEPS, budget=st.integers(0, 500), disk_budget=st.one_of(st.none(), st.integers(0, 2000)))
def test_get_returns_nothing_or_exactly_the_last_put(steps, budget, disk_budget):
    with tempfile.TemporaryDirectory() as folder:
        store = ActivationStore(budget, None if disk_budget is None else folder, disk_budget)
        last, gets, number = {}, 0, 0
        for what, argument in steps:
            if what == "put":
                entries = {}
                for key, length in argument.items():
                    number += 1
                    entries[key] = {"h": torch.full((length,), float(number)), "n": torch.tensor(number)}
                store.put(entries)
                last |= entries
            elif what == "clear":
                store.clear()
                last = {}
            else:
                gets += 1
                there = argument in store
                found = store.get(argument)
                assert (found is not None) == there
                if found is not None:
                    assert found.keys() == last[argument].keys()
                    assert all(torch.equal(found[name], last[argument][name]) for name in found)
            assert store.hits + store.misses == gets
            assert store.bytes == sum(t.nbytes for kept in store._memory.values() for t in kept.values()) <= budget
            assert store.disk_bytes == sum(path.stat().st_size for path in Path(folder).iterdir()) <= (disk_budget or 0)
            assert len(store) == sum(key in store for key in last) and store.recomputed == 0


@settings(deadline=None, max_examples=30)
@given(puts=st.lists(st.lists(_KEYS, max_size=4, unique=True), max_size=8))
def test_a_store_that_is_opened_again_holds_what_the_first_one_held(puts):
    with tempfile.TemporaryDirectory() as folder:
        store = ActivationStore(0, folder, 5000)
        for keys in puts:
            store.put({key: entry(int(key, 16)) for key in keys})
        again = ActivationStore(0, folder, 5000)
        assert again._path.keys() >= store._path.keys()
        assert all(value(again, key) == int(key, 16) for key in list(again._path))


def test_threads_share_a_store(tmp_path):
    store = ActivationStore(budget=8 * 1024, directory=tmp_path, disk_budget=10**6)
    keys = [f"{i:02x}" for i in range(24)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def use(seed: int) -> None:
        for key in random.Random(seed).choices(keys, k=150):
            found = store.get(key)
            assert found is None or found["h"].unique().tolist() == [int(key, 16)]
            if found is None:
                store.put({key: entry(int(key, 16))})

    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(use, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert store.hits + store.misses == 4 * 150
    assert store.bytes == sum(t.nbytes for kept in store._memory.values() for t in kept.values()) <= store.budget
    assert all(store.get(key)["h"].unique().tolist() == [int(key, 16)] for key in keys if key in store)
