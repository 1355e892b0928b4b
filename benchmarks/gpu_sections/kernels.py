"""(f) Each kernel by itself: error, time on cold data, share of bandwidth or peak; variants of tiles side by side."""

from __future__ import annotations

import torch

from gpt2rt.lab.measure import is_ours as is_form_of_ours
from gpt2rt.lab.measure import measure, size_text
from gpt2rt.lab.problem import Place
from gpt2rt.lab.registry import OPERATIONS
from gpt2rt.lab.timing import Times

from .persistent import time_grids
from .session import Session

#: copies of the data together, beyond every L2 cache
COLD_BYTES = 300_000_000
#: first what a step spends its time in
ORDER = ("linear_rows", "paged_decode_attention", "layer_norm", "quantized_linear", "head_argmax", "linear_tiles")


def label(form: str) -> str:
    """What a form is called among times: "gpt2rt" is Triton's; variants and other forms follow a comma."""
    if not is_form_of_ours(form):
        return form
    kind, _, variant = form.partition(": ")
    return ", ".join(["gpt2rt", *([] if kind == "Triton" else [kind]), *([variant] if variant else [])])


def run(session: Session) -> None:
    names = [*ORDER, *(name for name in OPERATIONS if name not in ORDER)]
    timer = session.timer(9)
    for name in names:
        operation = OPERATIONS[name]
        for size in (operation.toy,) if session.toy else operation.sizes:
            title = f"{name} {size_text(size)}"
            if session.over(title):
                continue
            session.need(3)
            # torch's own int4 product exists for bfloat16 alone
            int4 = name == "quantized_linear" and size.get("format") == "int4"
            dtype = torch.bfloat16 if int4 and not session.dry else session.dtype
            place = Place(session.device, dtype, cold_bytes=COLD_BYTES if session.timed else 0)
            with session.attempt(title):
                # without times the calls would only repeat those of the check
                limits = session.limits if session.timed else None
                # section a has checked the definition, whose time is nobody's aim
                result = measure(
                    operation, size, place, timer if session.timed else None, limits, definition=not session.timed
                )
                forms = result["forms"]
                times = {
                    label(form): Times(entry["us"], entry["p10_us"], timer.rounds, bool(entry["captured"]))
                    for form, entry in forms.items()
                    if entry["us"] is not None
                }
                failed = {
                    label(form): entry["failed"] or f"error {entry['error']}"
                    for form, entry in forms.items()
                    if entry["failed"] or entry["ok"] is False
                }
                session.times(
                    title,
                    times,
                    failed,
                    floor_us=result["limit_us"],
                    op=name,
                    size=size,
                    dtype=result["dtype"],
                    bytes=result["bytes"],
                    operations=result["operations"],
                    errors={form: entry["error"] for form, entry in forms.items()},
                )
    # last: no device has proven the barrier that its blocks wait in
    with torch.no_grad():
        time_grids(session)
