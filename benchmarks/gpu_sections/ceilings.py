"""(b) What the device gives: bandwidth, products, and what a launch costs."""

from __future__ import annotations

import time

import torch

from gpt2rt.lab.timing import matmul_peak

from .session import Session

#: empty kernels in one measurement
LAUNCHES = 200


def run(session: Session) -> None:
    if session.dry:
        _dry(session)
        return
    timer, device = session.timer(9, max_calls=4), session.device
    megabyte = 1 << 20
    for name, size in (("memory", 2048 * megabyte), ("8 MiB, in L2", 8 * megabyte)):
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        calls = 1 if size > 1 << 28 else 50
        times, _ = timer.compare(
            {
                "copy": lambda _, c=calls, t=target, s=source: [t.copy_(s) for _ in range(c)],
                "read": lambda _, c=calls, s=source: [s.sum() for _ in range(c)],
            }
        )
        session.value(f"copy, {name}", 2 * size * calls / times["copy"].median * 1e-6, "TB/s")
        session.value(f"read, {name}", size * calls / times["read"].median * 1e-6, "TB/s")
        del source, target
    for size in (1024, 2048, 8192):
        for dtype in (torch.float16, torch.bfloat16):
            word = str(dtype).removeprefix("torch.")
            session.value(f"product {size} {word}", matmul_peak(device, dtype, size) * 1e-12, "TFLOP/s")
    session.value("limits: bandwidth", session.limits["bytes_per_s"] * 1e-12, "TB/s")
    _launches(session)


def _launches(session: Session) -> None:
    from .probes import empty_kernel

    device = session.device
    x = torch.zeros(1024, dtype=torch.int32, device=device)
    pdl_options = (False, True) if torch.cuda.get_device_capability(device) >= (9, 0) else (False,)
    for grid in (1, 132, 528):
        for pdl in pdl_options:
            options = {"launch_pdl": True} if pdl else {}

            def several(_: int, grid=grid, pdl=pdl, options=options) -> None:
                for _ in range(LAUNCHES):
                    empty_kernel[(grid,)](x, PDL=pdl, num_warps=4, **options)

            times, failed = session.timer(9, max_calls=1).compare({"node": several})
            name = f"graph node, {grid} programs" + (", PDL" if pdl else "")
            if failed:
                session.check(name, False, error=failed["node"])
            else:
                session.value(name, times["node"].median / LAUNCHES, "us")
    for name, call in (
        ("host, one Triton launch", lambda: empty_kernel[(1,)](x, PDL=False, num_warps=4)),
        ("host, one torch call", lambda: x.add_(1)),
    ):
        for _ in range(50):
            call()
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(2000):
            call()
        session.value(name, (time.perf_counter() - start) / 2000 * 1e6, "us")
        torch.cuda.synchronize(device)


def _dry(session: Session) -> None:
    from .probes import empty_kernel

    x = torch.zeros(1024, dtype=torch.int32)
    empty_kernel[(3,)](x, PDL=False)
    session.check("an empty kernel runs", bool((x == 0).all()))
    session.value("copy", 1.0, "TB/s")
