"""``gpt2rt warmup`` where it cannot run says why; tests/kernels runs it where it can."""

import pytest


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--batch-sizes", "1,x"), "--batch-sizes takes numbers between commas, got '1,x'"),
        (("--batch-sizes", "0"), "--batch-sizes takes numbers from 1 to 256, got '0'"),
        (("--prompt-lengths", ""), "--prompt-lengths takes numbers from 1 to 1048576, got ''"),
        (("--dtype", "int8"), "--dtype must be one of"),
    ],
)
def test_wrong_options(run, checkpoint, one_sentence, options, expected):
    code, _, err = run("warmup", checkpoint, *options)
    assert code == 2
    assert expected in one_sentence(err)


def test_the_kernels_need_a_gpu(run, checkpoint, one_sentence):
    code, _, err = run("warmup", checkpoint, "--device", "cpu")
    assert code == 1
    message = one_sentence(err)
    assert "the cuda executor cannot run this model" in message
    assert "the weights are on cpu" in message or "triton is not installed" in message
