"""langchain-openai against an OpenAI-compatible server; run.py starts it where both are.

``OPENAI_BASE_URL``, ``OPENAI_API_KEY`` and ``CLIENT_MODEL`` say where and what. Assertions are the checks; the last
line that it prints is what was answered, as JSON.
"""

import json
import os

from langchain_openai import OpenAI

PROMPT = "To be, or not to be"
model = OpenAI(model=os.environ["CLIENT_MODEL"], base_url=os.environ["OPENAI_BASE_URL"], temperature=0, max_tokens=12)

plain = model.invoke(PROMPT)
assert plain
streamed = list(model.stream(PROMPT))
assert "".join(streamed) == plain, (streamed, plain)
batched = model.batch([PROMPT, "Good morrow", PROMPT])
assert batched[0] == batched[2] == plain
until = model.invoke(PROMPT, stop=[plain[3:5]])
assert plain[3:5] not in until

print(json.dumps({"plain": plain, "stream_chunks": len(streamed), "batched": batched, "until": until}))
