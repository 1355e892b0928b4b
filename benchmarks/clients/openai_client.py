"""The openai client against an OpenAI-compatible server; run.py starts it where both are.

``OPENAI_BASE_URL``, ``OPENAI_API_KEY`` and ``CLIENT_MODEL`` say where and what. Assertions are the checks; the last
line that it prints is what was answered, as JSON.
"""

import json
import os

import openai

MODEL = os.environ["CLIENT_MODEL"]
PROMPT = "To be, or not to be"
client = openai.OpenAI()

names = [model.id for model in client.models.list()]
assert MODEL in names, names

plain = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, seed=7)
text = plain.choices[0].text
assert text
assert plain.choices[0].finish_reason in ("length", "stop")
assert plain.usage.completion_tokens == 12
assert plain.usage.total_tokens == plain.usage.prompt_tokens + 12

pieces, usage = [], None
with client.completions.create(
    model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
) as stream:
    for chunk in stream:
        pieces += [choice.text for choice in chunk.choices]
        usage = chunk.usage or usage
assert "".join(pieces) == text, (pieces, text)
assert usage.completion_tokens == 12

scored = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, temperature=0, logprobs=3, echo=True)
logprobs = scored.choices[0].logprobs
assert scored.choices[0].text.startswith(PROMPT)
assert "".join(logprobs.tokens) == scored.choices[0].text
assert logprobs.token_logprobs[0] is None
assert all(value <= 0 for value in logprobs.token_logprobs[1:])

several = client.completions.create(model=MODEL, prompt=[PROMPT, "Good morrow"], n=2, max_tokens=6, seed=1, stop=["\n"])
assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
assert not any("\n" in choice.text for choice in several.choices)

ids = client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=2, temperature=0)
assert ids.usage.prompt_tokens == 3

refused = {}
for name, wrong in {"temperature": -1, "max_tokens": 10**6, "model": "no-such-model"}.items():
    try:
        client.completions.create(**{"model": MODEL, "prompt": PROMPT, "max_tokens": 2, name: wrong})
    except (openai.BadRequestError, openai.NotFoundError) as error:
        refused[name] = {"status": error.status_code, "message": str(error.body["message"])[:200]}
assert set(refused) == {"temperature", "max_tokens", "model"}, refused

vectors = client.embeddings.create(model=MODEL, input=["one", "two"])
assert len(vectors.data) == 2
norm = sum(value * value for value in vectors.data[0].embedding)

print(
    json.dumps(
        {
            "models": names,
            "plain": text,
            "stream_chunks": len(pieces),
            "logprobs": logprobs.token_logprobs[1:],
            "several": [choice.text for choice in several.choices],
            "refused": refused,
            "embedding": {"length": len(vectors.data[0].embedding), "squared_norm": norm},
        }
    )
)
