"""Packed weights kept between processes: found again, never mistaken, never in the way."""

import errno
import logging
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from gpt2rt import GPT2Config, GPT2LMHeadModel, ops
from gpt2rt.generation.runtime import executor_for
from gpt2rt.graph import packed_cache
from gpt2rt.graph.packed_cache import PackedCache, cache_folder, cache_limit, open_cache
from gpt2rt.graph.packed_file import TRAILER_BYTES, UnusableFileError

pytestmark = pytest.mark.skipif(not ops.extension_status().loaded, reason="the C++ extension is not built")

RECIPE = b"how it is made"
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def new_sources(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(24, 40, generator=generator), torch.randn(24, generator=generator)]


def new_payload(size=5000, seed=0):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def packs(folder):
    packed_cache.wait_for_writes()
    return sorted(folder.glob("*.pack"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "packed"


@pytest.fixture
def cache(folder):
    return PackedCache(folder)


@pytest.fixture
def turned_on(tmp_path, monkeypatch):
    """The cache as users have it, in a folder of this test, for models of any size."""
    monkeypatch.setenv("GPT2RT_PACKED_CACHE", "1")
    monkeypatch.setenv("GPT2RT_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(packed_cache, "MIN_BYTES", 0)
    return tmp_path / "home" / "packed"


@pytest.fixture
def packings(monkeypatch):
    """How many matrices were packed."""
    counts = [0]
    plain = ops.pack_linear

    def counting(*args):
        counts[0] += 1
        return plain(*args)

    monkeypatch.setattr(ops, "pack_linear", counting)
    return counts


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=32, n_embd=48, n_head=3, n_layer=2, eos_token_id=None)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(checkpoint, **kwargs):
    return GPT2LMHeadModel.from_pretrained(checkpoint, **kwargs)


def logits(model):
    with torch.no_grad():
        result = model.generate(
            IDS, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    packed_cache.wait_for_writes()
    return torch.stack(result.logits)


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_what_was_stored_is_loaded(cache, folder):
    key, payload = cache.key(RECIPE, new_sources()), new_payload()
    assert cache.load(key, 5000) is None
    assert cache.store(key, payload)
    assert torch.equal(cache.load(key, 5000), payload)
    assert torch.equal(PackedCache(folder).load(key, 5000), payload)
    assert torch.equal(cache.load(key, None), payload)
    assert cache.load(key, 4999) is None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_key_is_the_content(cache, monkeypatch):
    sources = new_sources()
    key = cache.key(RECIPE, sources)
    assert cache.key(bytes(RECIPE), [source.clone() for source in sources]) == key
    others = {
        "one weight": [sources[0] + torch.eye(24, 40) * 1e-6, sources[1]],
        "order": sources[::-1],
        "one fewer": sources[:1],
        "shape": [sources[0].view(40, 24), sources[1]],
        "dtype": [sources[0].view(torch.int32), sources[1]],
        "rows and columns swapped": [sources[0].view(40, 24).t(), sources[1]],
    }
    keys = {name: cache.key(RECIPE, other) for name, other in others.items()}
    keys["recipe"] = cache.key(RECIPE[:-1], sources)
    with monkeypatch.context() as patch:
        patch.setattr(packed_cache, "version", lambda: "0.0.1")
        keys["version"] = cache.key(RECIPE, sources)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "cpu_isa", lambda: "another")
        keys["isa"] = cache.key(RECIPE, sources)
    with monkeypatch.context() as patch:
        patch.setattr(packed_cache, "_extension_digest", lambda: bytes(32))
        keys["extension"] = cache.key(RECIPE, sources)
    assert len({key, *keys.values()}) == 1 + len(keys), keys


def test_transposed_views_are_hashed_without_a_copy_and_strided_ones_with(cache, monkeypatch):
    whole = torch.randn(16, 10)
    assert cache.key(RECIPE, [whole.t()]) == cache.key(RECIPE, [whole.clone().t()])
    assert cache.key(RECIPE, [whole[::2]]) == cache.key(RECIPE, [whole[::2].clone()])


def test_folders_have_secrets_of_their_own(cache, folder, tmp_path):
    other = PackedCache(tmp_path / "other")
    assert other.key(RECIPE, new_sources()) != cache.key(RECIPE, new_sources())
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", ["short", "readable by others"])
def test_a_damaged_secret_is_drawn_anew(cache, folder, damage):
    key = cache.key(RECIPE, new_sources())
    if damage == "short":
        (folder / "secret").write_bytes(b"short")
    else:
        (folder / "secret").chmod(0o644)
    again = PackedCache(folder)
    assert again.key(RECIPE, new_sources()) != key
    assert PackedCache(folder).key(RECIPE, new_sources()) == again.key(RECIPE, new_sources())


def test_a_folder_that_others_may_write_to_is_not_used(folder, monkeypatch, caplog):
    folder.mkdir(parents=True)
    folder.chmod(0o770)
    with pytest.raises(UnusableFileError, match="others may write"):
        PackedCache(folder)
    folder.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(UnusableFileError, match="belongs to user"):
        PackedCache(folder)


def test_a_damaged_entry_is_ignored_and_written_anew(cache, caplog):
    key, payload = cache.key(RECIPE, new_sources()), new_payload()
    assert cache.store(key, payload)
    (path,) = packs(cache.folder)
    data = bytearray(path.read_bytes())
    data[77] ^= 4
    path.write_bytes(data)
    with caplog.at_level(logging.DEBUG, "gpt2rt"):
        assert cache.load(key, 5000) is None
    assert "payload fails its check" in caplog.text
    assert cache.store(key, payload)
    assert torch.equal(cache.load(key, 5000), payload)


def test_the_entry_used_longest_ago_goes_first(folder):
    size = 5000 + TRAILER_BYTES
    cache = PackedCache(folder, limit=3 * size)
    keys = [bytes([i]) * 32 for i in range(4)]
    for i, key in enumerate(keys[:3]):
        assert cache.store(key, new_payload())
        os.utime(cache._path(key), (1000 + i, 1000 + i))
    # the oldest is used, so the second is now the one
    assert cache.load(keys[0], 5000) is not None
    assert cache.store(keys[3], new_payload())
    assert [cache.load(key, 5000) is not None for key in keys] == [True, False, True, True]


def test_what_is_larger_than_the_limit_is_not_kept_and_displaces_nothing(folder, monkeypatch):
    small = PackedCache(folder)
    assert small.store(bytes(32), new_payload(100))
    cache = PackedCache(folder, limit=5000)
    assert not cache.store(bytes([1]) * 32, new_payload(5000))
    assert small.load(bytes(32), 100) is not None


def test_left_overs_of_killed_processes_are_removed(cache, folder):
    old, new = folder / ".a.pack.1.tmp", folder / ".b.pack.2.tmp"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    assert cache.store(bytes(32), new_payload())
    assert not old.exists()
    assert new.exists()


@pytest.mark.parametrize("call", ["open", "write", "replace"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_is_no_error(cache, folder, monkeypatch, call, code):
    plain = getattr(os, call)

    def fail(*args, **kwargs):
        if call == "open" and args[1] & os.O_WRONLY == 0:
            return plain(*args, **kwargs)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    assert not cache.store(bytes(32), new_payload())
    monkeypatch.undo()
    assert os.listdir(folder) == ["secret"]


def test_a_nearly_full_disk_is_left_alone(cache, folder, monkeypatch):
    plain = os.statvfs(folder)
    values = list(plain)
    # f_bavail
    values[4] = 2
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(values))
    assert not cache.store(bytes(32), new_payload(2 * plain.f_frsize))
    assert packs(folder) == []


def _work(folder, barrier, results, key, size):
    # torch's own threads do not outlive a fork, and a child that asked for them would wait for ever
    torch.set_num_threads(1)
    cache = PackedCache(folder)
    payload = new_payload(size)
    barrier.wait(60)
    good = 0
    for _ in range(10):
        cache.store(key, payload)
        found = cache.load(key, size)
        good += found is not None and bool(torch.equal(found, payload))
    results.put((good, cache.key(RECIPE, new_sources())))


def test_what_is_stored_soon_is_there_in_the_end(cache, folder, monkeypatch):
    payloads = {bytes([number]) * 32: new_payload(seed=number) for number in range(4)}
    own = os.getpriority(os.PRIO_PROCESS, 0)
    going = threading.Event()
    plain = cache.store

    def slow(key, payload, fingerprint):
        going.wait()
        # it gives way to threads that compute, and is the only one that writes
        assert sys.platform != "linux" or os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == 19
        assert packed_cache._one_writes.locked()
        return plain(key, payload, fingerprint)

    monkeypatch.setattr(cache, "store", slow)
    for key, payload in payloads.items():
        cache.store_soon(key, payload)
    assert list(folder.glob("*.pack")) == []
    going.set()
    packed_cache.wait_for_writes()
    assert len(packs(folder)) == 4
    for key, payload in payloads.items():
        assert torch.equal(cache.load(key, payload.numel()), payload)
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_no_thread_to_store_in_is_no_error(cache, folder, monkeypatch, caplog):
    def full(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    with caplog.at_level(logging.DEBUG, "gpt2rt"):
        cache.store_soon(bytes(32), new_payload())
    assert "are not kept: can't start new thread" in caplog.text
    packed_cache.wait_for_writes()
    assert packs(folder) == []


def test_a_fork_meanwhile_neither_waits_nor_writes_twice(cache, folder, monkeypatch):
    going, begun = threading.Event(), threading.Event()
    plain = cache.store

    def slow(*arguments):
        begun.set()
        going.wait()
        return plain(*arguments)

    monkeypatch.setattr(cache, "store", slow)
    cache.store_soon(bytes(32), new_payload())
    begun.wait()
    child = os.fork()
    if not child:
        # the lock was held
        going.set()
        cache.store_soon(bytes([1]) * 32, new_payload(seed=1))
        packed_cache.wait_for_writes()
        os._exit(len(list(folder.glob("*.pack"))))
    deadline = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 1
    going.set()
    assert len(packs(folder)) == 2


def test_a_process_that_ends_writes_the_rest(folder):
    script = """
        import sys, time
        from pathlib import Path
        import torch
        from gpt2rt.graph.packed_cache import PackedCache

        class Slow(PackedCache):
            def store(self, *arguments):
                time.sleep(0.3)
                return super().store(*arguments)

        Slow(Path(sys.argv[1])).store_soon(bytes(32), torch.arange(100, dtype=torch.uint8))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(folder)], check=True)
    assert torch.equal(PackedCache(folder).load(bytes(32), 100), torch.arange(100, dtype=torch.uint8))


def test_processes_at_once_read_whole_files(folder):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    args = (folder, barrier, results, bytes(32), 300_000)
    processes = [context.Process(target=_work, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [good for good, _ in answers] == [10] * 3
    # all three found the folder without a secret, and agree on one
    assert len({key for _, key in answers}) == 1
    assert sorted(os.listdir(folder)) == [f"{bytes(32).hex()}.pack", "secret"]


# ---- the settings --------------------------------------------------------------------------------------------------


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("GPT2RT_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "gpt2rt" / "packed"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "gpt2rt" / "packed"
    monkeypatch.setenv("GPT2RT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "packed"


def test_switch_and_bounds(turned_on, monkeypatch):
    assert open_cache(1000).folder == turned_on
    monkeypatch.setenv("GPT2RT_PACKED_CACHE_BYTES", "999")
    assert cache_limit() == 999
    assert open_cache(1000) is None
    monkeypatch.setenv("GPT2RT_PACKED_CACHE_BYTES", "1 GB")
    with pytest.raises(ValueError, match="GPT2RT_PACKED_CACHE_BYTES is '1 GB', expected a whole number"):
        open_cache(1000)
    monkeypatch.delenv("GPT2RT_PACKED_CACHE_BYTES")
    monkeypatch.setattr(packed_cache, "MIN_BYTES", 1001)
    assert open_cache(1000) is None
    monkeypatch.setenv("GPT2RT_PACKED_CACHE", "0")
    assert open_cache(10**8) is None
    monkeypatch.setenv("GPT2RT_PACKED_CACHE", "yes")
    with pytest.raises(ValueError, match="GPT2RT_PACKED_CACHE is 'yes', expected 0"):
        open_cache(10**8)


def test_no_place_for_it_is_no_error(turned_on, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPT2RT_CACHE", str(tmp_path / "file"))
    assert open_cache(1000) is None
    monkeypatch.delenv("GPT2RT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(packed_cache.Path, "home", homeless)
    assert open_cache(1000) is None


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_start_packs_nothing_and_gives_the_same_numbers(turned_on, checkpoint, packings, dtype):
    first = logits(load(checkpoint, dtype=dtype))
    assert packings[0] > 0
    assert len(packs(turned_on)) == 1
    packings[0] = 0
    assert torch.equal(logits(load(checkpoint, dtype=dtype)), first)
    assert packings[0] == 0


def test_off_means_off(turned_on, checkpoint, monkeypatch):
    monkeypatch.setenv("GPT2RT_PACKED_CACHE", "0")
    logits(load(checkpoint))
    assert not turned_on.exists()


def test_a_changed_checkpoint_with_the_old_size_and_date(turned_on, checkpoint):
    first = logits(load(checkpoint))
    path = checkpoint / "model.safetensors"
    status = path.stat()
    data = bytearray(path.read_bytes())
    # the lowest exponent bit of one float32
    data[-4 * 48 * 50 + 3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = load(checkpoint)
    expected = changed(IDS).logits[:, -1]
    assert not torch.equal(logits(changed), first)
    torch.testing.assert_close(logits(load(checkpoint))[0], expected, rtol=1e-4, atol=1e-5)
    assert len(packs(turned_on)) == 2


def test_weights_changed_behind_torchs_back_are_never_mistaken(turned_on, checkpoint):
    logits(load(checkpoint))
    model = load(checkpoint)
    # no version is counted, and the one element is not among those that are looked at
    model.transformer.h[1].mlp.c_fc.weight.data[17, 101] += 3.0
    got = logits(model)
    torch.testing.assert_close(got[0], model(IDS).logits[:, -1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(got, logits(load(checkpoint)))


def test_changed_weights_are_not_kept(turned_on, checkpoint):
    model = load(checkpoint)
    with torch.no_grad():
        model.transformer.wte.weight[5] += 1.0
    logits(model)
    assert not turned_on.exists()
    # nor those of a model that was never loaded, or from tensors
    logits(GPT2LMHeadModel(model.config))
    logits(GPT2LMHeadModel.from_pretrained(None, config=model.config, state_dict=model.state_dict()))
    assert not turned_on.exists()
    # a change after the first step ends it too
    model = load(checkpoint)
    logits(model)
    assert len(packs(turned_on)) == 1
    with torch.no_grad():
        model.transformer.wte.weight[5] += 1.0
    logits(model)
    assert len(packs(turned_on)) == 1


def test_a_damaged_entry_is_replaced_on_the_next_start(turned_on, checkpoint, packings):
    first = logits(load(checkpoint))
    (path,) = packs(turned_on)
    good = path.read_bytes()
    os.truncate(path, 1000)
    packings[0] = 0
    assert torch.equal(logits(load(checkpoint)), first)
    assert packings[0] > 0
    assert path.read_bytes() == good


def test_the_arithmetic_is_part_of_the_key(turned_on, checkpoint, monkeypatch):
    for arithmetic in ("fast", "exact"):
        monkeypatch.setenv("GPT2RT_CPU_ARITHMETIC", arithmetic)
        assert executor_for(load(checkpoint, dtype=torch.bfloat16), "cpu").arithmetic == arithmetic
    assert len(packs(turned_on)) == 2
