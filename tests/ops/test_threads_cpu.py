"""The thread pool: callers in several threads, forks, missing threads, the environment."""

import os
import threading

import pytest
import torch
from cpu_step_model import Config, StepModel

import gpt2rt.ops as ops
from gpt2rt import GPT2Config, GPT2LMHeadModel


def setup_model(num_tokens=60):
    model = StepModel(Config())
    tokens = [(7 * i) % 97 for i in range(num_tokens)]
    batch = model.batch([(tokens, 0)], [list(range(-(-num_tokens // 16)))])
    return model, batch


@pytest.mark.proves("fault:F61")
@pytest.mark.parametrize("num_threads", [1, 2, 3, 8, 64])
def test_any_number_of_threads(num_threads):
    model, batch = setup_model()
    expected = model.step(batch)[0]
    for _ in range(20):
        assert torch.equal(model.step(batch, num_threads=num_threads)[0], expected)


def test_several_python_threads_call_at_once():
    model, batch = setup_model()
    expected = model.step(batch)[0]
    wrong = []

    def work(num_threads):
        own, own_batch = setup_model()
        for _ in range(30):
            if not torch.equal(own.step(own_batch, num_threads=num_threads)[0], expected):
                wrong.append(num_threads)

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.proves("fault:F61")
def test_several_models_generate_at_once_beside_torchs_own_threads(monkeypatch):
    """Engines in one process share the pool; each has its own weights, cache and scratch memory."""
    monkeypatch.setenv("GPT2RT_NUM_THREADS", "3")
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        fields = {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 3, "bos_token_id": 1}
        models.append(GPT2LMHeadModel(GPT2Config(**fields, eos_token_id=2, initializer_range=0.3)).eval())
    prompts = [[5, 9, 12, 7], [33] * 20, [4, 8]]
    settings = [{}, {"kv_cache_dtype": "int8"}, {"num_beams": 2}, {"do_sample": True, "seed": 1}]
    settings = [{"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, **more} for more in settings]
    expected = {(m, s): models[m].generate(prompts, **settings[s]) for m in range(3) for s in range(len(settings))}
    wrong, stop = [], threading.Event()

    def work(offset):
        try:
            for i in range(8):
                key = (offset + i) % 3, (2 * offset + i) % len(settings)
                if not torch.equal(models[key[0]].generate(prompts, **settings[key[1]]), expected[key]):
                    wrong.append(key)
        except Exception as error:
            wrong.append(error)

    def torchs_own():
        a = torch.randn(200, 200)
        product = a @ a
        while not stop.is_set():
            if not torch.allclose(a @ a, product):
                wrong.append("torch.matmul")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        other = threading.Thread(target=torchs_own)
        for thread in (*threads, other):
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        other.join()
    finally:
        torch.set_num_threads(before)
    assert wrong == []


def test_a_refused_call_leaves_the_pool_usable():
    model, batch = setup_model()
    expected = model.step(batch)[0]
    bad = {**batch, "slot_mapping": batch["slot_mapping"] + 10**6}
    with pytest.raises(IndexError):
        model.step(bad, num_threads=3)
    assert torch.equal(model.step(batch, num_threads=3)[0], expected)


FORK = """
import os, sys, torch
from cpu_step_model import Config, StepModel
from gpt2rt import GPT2LMHeadModel

model = StepModel(Config())
batch = model.batch([(list(range(60)), 0)], [[0, 1, 2, 3]])
expected = model.step(batch, num_threads=3)[0]
gpt, prompt = GPT2LMHeadModel.from_pretrained("gpt2rt/tiny-gpt2"), [[5, 9, 12]]
tokens = gpt.generate(prompt, max_new_tokens=6, do_sample=False)
for _ in range(3):
    child = os.fork()
    if child == 0:
        # the parent's threads do not exist here; a pool that waits for them would hang
        same = all(torch.equal(model.step(batch, num_threads=n)[0], expected) for n in (3, 2, 5))
        # a model that has generated before the fork
        same = same and torch.equal(gpt.generate(prompt, max_new_tokens=6, do_sample=False), tokens)
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if torch.equal(model.step(batch, num_threads=2)[0], expected) else 1)
        same = same and os.waitpid(grandchild, 0)[1] == 0
        # by the ordinary way out, which stops the child's own threads
        sys.exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0, "the child failed"
    assert torch.equal(model.step(batch, num_threads=3)[0], expected)
print("ok")
"""


@pytest.mark.proves("fault:F61")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_pool_works_after_fork(run_python):
    done = run_python(FORK)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


NO_THREADS = """
import resource, sys, threading, torch
from cpu_step_model import Config, StepModel

torch.set_num_threads(1)
model = StepModel(Config())
batch = model.batch([(list(range(60)), 0)], [[0, 1, 2, 3]])
expected = model.step(batch, num_threads=1)[0]
pages = int(open("/proc/self/statm").read().split()[0])
# room for some work, but for less than a thread's stack
limit = pages * resource.getpagesize() + (4 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    threading.Thread(target=print).start()
    sys.exit("the limit does not keep threads from starting, so this test shows nothing")
except RuntimeError:
    pass
assert torch.equal(model.step(batch, num_threads=4)[0], expected)
print("ok")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the limit is set from /proc/self/statm")
def test_fewer_threads_when_the_system_gives_none(run_python):
    done = run_python(NO_THREADS)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


COUNT = """
import os, sys, torch
from cpu_step_model import Config, StepModel

torch.set_num_threads(int(sys.argv[1]))
model = StepModel(Config())
batch = model.batch([(list(range(60)), 0)], [[0, 1, 2, 3]])
before = len(os.listdir("/proc/self/task"))
model.step(batch, num_threads=int(sys.argv[2]))
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in /proc/self/task")
@pytest.mark.parametrize(
    ("torch_threads", "num_threads", "environment", "started"),
    [
        (1, 1, {}, 0),
        (1, 3, {}, 2),
        (1, 0, {}, 0),
        (1, 0, {"GPT2RT_NUM_THREADS": "4"}, 3),
        (1, 2, {"GPT2RT_NUM_THREADS": "4"}, 1),
    ],
)
def test_number_of_threads(run_python, torch_threads, num_threads, environment, started):
    done = run_python(COUNT, str(torch_threads), str(num_threads), **{"GPT2RT_NUM_THREADS": "", **environment})
    assert (done.returncode, done.stdout.strip()) == (0, str(started)), done.stderr


@pytest.mark.parametrize("value", ["0", "-1", "two", "1025", "2.5", "99999999999999999999"])
def test_bad_number_in_the_environment(monkeypatch, value):
    model, batch = setup_model()
    monkeypatch.setenv("GPT2RT_NUM_THREADS", value)
    with pytest.raises(ValueError, match=f"GPT2RT_NUM_THREADS is '{value}', expected a whole number from 1 to 1024"):
        model.step(batch, num_threads=0)


def test_results_do_not_depend_on_the_threads_of_single_ops(monkeypatch):
    x, weight, bias = torch.randn(300, 200), torch.randn(300, 200), torch.randn(300)
    results = []
    for num_threads in ("1", "2", "3"):
        monkeypatch.setenv("GPT2RT_NUM_THREADS", num_threads)
        results.append((ops.linear(x, weight, bias), ops.layer_norm(x, bias[:200], bias[:200], 1e-5)))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])
