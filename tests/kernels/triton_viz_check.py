"""Every kernel of the kernel lab under the sanitizer of triton-viz, which looks for reads and writes outside tensors.

    pip install --no-deps --target DIR triton==3.7.1 triton-viz z3-solver anytree cffi pycparser cairocffi flask \\
        flask_cloudflared werkzeug itsdangerous blinker click tqdm requests urllib3 pyarrow
    python tests/kernels/triton_viz_check.py DIR

The sanitizer (triton-viz 3.0) runs kernels on symbols instead of numbers, and knows the interpreter of Triton up to
3.7; some kernels use what it has no symbols for, and are listed as such. Exit code 1 when it finds a violation, or can
no longer check a kernel that it could.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

# what triton-viz 3.0 cannot do: 4-D reshapes, products of three dimensions, loaded loop bounds, blocks at a scalar
NOT_SUPPORTED = {
    "linear",
    "linear_gelu_new",
    "linear_residual",
    "quantized_linear",
    "linear_tiles",
    "head_argmax",
    "paged_decode_attention",
    "merge_splits",
    "sample",
    "log_probabilities",
}
# it takes a view with gaps between its rows (keys in a QKV matrix) for one without
WRONG = {"write_kv"}


def run(name: str) -> None:
    """Launch the Triton forms of one kernel at its toy size; the sanitizer has patched ``triton.jit`` before."""
    import torch

    from gpt2rt.lab.problem import Place
    from gpt2rt.lab.registry import OPERATIONS

    operation = OPERATIONS[name]
    problem = operation.problem(Place("cpu", torch.float16), operation.toy)
    for form, call in problem.forms.items():
        if form.startswith("Triton"):
            call(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=pathlib.Path, help="folder with triton and triton-viz")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for a kernel (default %(default)s)")
    options = parser.parse_args()
    tool = options.site / "bin" / "triton-sanitizer"
    if not tool.exists():
        parser.error(f"{options.site} has no bin/triton-sanitizer; see the commands in this file")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join((str(options.site), str(ROOT)))}
    sys.path.insert(0, str(ROOT))
    from gpt2rt.lab.registry import OPERATIONS

    bad = 0
    for name in OPERATIONS:
        command = [sys.executable, str(tool), __file__]
        child = {**environment, "GPT2RT_SANITIZED_KERNEL": name}
        try:
            done = subprocess.run(command, env=child, capture_output=True, text=True, timeout=options.timeout)
        except subprocess.TimeoutExpired:
            verdict, fault = f"no answer in {options.timeout:.0f} s", name not in NOT_SUPPORTED
        else:
            output = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
            if "ILLEGAL MEMORY ACCESS" in output:
                verdict, fault = "VIOLATION", name not in WRONG
                if fault:
                    print(output)
            elif done.returncode:
                verdict = f"not supported: {output.strip().splitlines()[-1][:90]}"
                fault = name not in NOT_SUPPORTED
            else:
                verdict, fault = "clean", False
        bad += fault
        print(f"{name:24s} {verdict}{' (known)' if verdict != 'clean' and not fault else ''}", flush=True)
    print(f"{len(OPERATIONS)} kernels, {bad} faults")
    return int(bad > 0)


if __name__ == "__main__":
    kernel = os.environ.get("GPT2RT_SANITIZED_KERNEL")
    if kernel is None:
        sys.exit(main())
    run(kernel)
