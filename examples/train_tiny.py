"""Train the embedded models ``gpt2rt/tiny-gpt2`` and ``gpt2rt/tiny-gpt1`` from scratch, with gpt2rt's own classes.

    python examples/train_tiny.py --text tinyshakespeare.txt --output gpt2rt/assets/tiny-gpt2
    python examples/train_tiny.py --text tinyshakespeare.txt --output gpt2rt/assets/tiny-gpt1 --model-type openai-gpt

The first 90 % of the text trains a BPE vocabulary and a model; the last 10 % is only ever evaluated. The folder then
holds everything that ``from_pretrained`` reads and a model card with the held-out loss; afterwards
``python -m gpt2rt.doctor`` records the answers that ``gpt2rt doctor`` compares with. The two runs behind the shipped
GPT-2 took 51 and 17 minutes on two CPU cores, the first while other work ran beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import pathlib
import time

import torch

from gpt2rt import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OpenAIGPTTokenizer,
)

Model = GPT2LMHeadModel | OpenAIGPTLMHeadModel
Tokenizer = GPT2Tokenizer | OpenAIGPTTokenizer

END_OF_TEXT = "<|endoftext|>"
#: what the card calls the model, and its vocabulary
KINDS = {
    "gpt2": ("GPT-2", "byte-level BPE vocabulary"),
    "openai-gpt": ("OpenAI GPT", "lower-case BPE vocabulary"),
}


def end_token(tokenizer: Tokenizer) -> int | None:
    """The id of the end-of-text token; OpenAI GPT has none."""
    return tokenizer.convert_tokens_to_ids(END_OF_TEXT) if isinstance(tokenizer, GPT2Tokenizer) else None


def load_text(path: pathlib.Path) -> tuple[str, str]:
    """The text's first 90 %, and its last 10 %, cut at the start of a speech."""
    text = path.read_text(encoding="utf-8")
    cut = text.index("\n\n", int(0.9 * len(text))) + 2
    return text[:cut], text[cut:]


class Windows:
    """Random training windows of ``length`` tokens; one in ten starts a speech, after the end-of-text token if any.

    That token stands before a beginning and is never a target, so the model knows how to begin from nothing.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, length: int, seed: int):
        self.length = length
        end_id = end_token(tokenizer)
        self.start = torch.tensor([] if end_id is None else [end_id], dtype=torch.int64)
        ids: list[int] = []
        speeches: list[int] = []
        for speech in text.split("\n\n"):
            speeches.append(len(ids))
            ids += tokenizer.encode(speech + "\n\n")
        self.ids = torch.tensor(ids)
        self.speeches = torch.tensor([start for start in speeches if start + length < len(ids)])
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, size: int) -> torch.Tensor:
        """[size, length] int64."""
        rows = []
        for _ in range(size):
            if torch.rand((), generator=self.generator) < 0.1:
                start = int(self.speeches[torch.randint(len(self.speeches), (), generator=self.generator)])
                rows.append(torch.cat([self.start, self.ids[start : start + self.length - len(self.start)]]))
            else:
                start = int(torch.randint(len(self.ids) - self.length, (), generator=self.generator))
                rows.append(self.ids[start : start + self.length])
        return torch.stack(rows)


@torch.no_grad()
def held_out_loss(model: Model, tokenizer: Tokenizer, text: str) -> tuple[float, float]:
    """Mean loss over the text in windows that overlap by half, each token scored once with at least half a window of
    context: (nats a token, bits a byte)."""
    ids = torch.tensor(tokenizer.encode(text))
    length = model.config.n_positions
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, length // 2):
        window = ids[start : start + length]
        logits = model(window[None]).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        fresh = losses if start == 0 else losses[length // 2 - 1 :]
        total, count = total + fresh.sum().item(), count + len(fresh)
        if start + length >= len(ids):
            break
    nats = total / count
    return nats, total / math.log(2) / len(text.encode("utf-8")) * (len(ids) - 1) / count


def parameter_groups(model: Model, weight_decay: float) -> list[dict]:
    """Weight decay on matrices only (Radford et al. 2018, section 4.1)."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def train(model: Model, windows: Windows, arguments: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=arguments.learning_rate, betas=(0.9, 0.98))
    warmup = max(1, arguments.steps // 20)

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, arguments.steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    started, running = time.perf_counter(), 0.0
    for step in range(1, arguments.steps + 1):
        ids = windows.batch(arguments.batch_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        running = loss.item() if step == 1 else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 0 or step == arguments.steps:
            minutes = (time.perf_counter() - started) / 60
            print(f"step {step:5d}  loss {running:.3f}  {minutes:.1f} min", flush=True)
    model.eval()


CARD = """---
license: cc0-1.0
language: en
library_name: gpt2rt
pipeline_tag: text-generation
---

# gpt2rt/{name}

Kind: {kind}, {parameters:.2f} M parameters. It writes what looks like Shakespeare's plays. It ships inside gpt2rt so
that everything can be tried and tested with no network; it knows nothing and is good for nothing else.

| | |
| --- | --- |
| shape | {n_layer} layers, n_embd {n_embd}, {n_head} heads, {n_positions} positions, \
{vocabulary} of {vocab_size} |
| weights | float16 safetensors; trained with {precision} |
| text | "tiny Shakespeare" (public domain), {text_bytes} bytes, SHA-256 `{text_hash}` |
| trained on | its first 90 %: {train_tokens} tokens; from {start}, \
{steps} steps of {batch_size} windows \
of {n_positions} tokens, dropout {dropout} |
| held-out loss | {nats:.4f} nats a token, perplexity {perplexity:.2f}, {bits:.4f} bits a byte, \
on the last 10 %, never trained on |
| made with | torch {torch}, {threads} CPU threads, seed {seed} |

The held-out loss is of the float16 weights as shipped: each token is scored once, with at least half a window of
context. It was looked at while the recipe was chosen, so it is slightly optimistic.

To make one like it:

{recipe}

The weights are dedicated to the public domain, as the text is.
"""


COMMAND = "    python examples/train_tiny.py"


def recipe(arguments: argparse.Namespace) -> list[str]:
    """The commands that make this model: those in the card of the model it began from, and this one."""
    before: list[str] = []
    if arguments.init:
        card = (arguments.init / "README.md").read_text(encoding="utf-8")
        before = [line for line in card.splitlines() if line.startswith(COMMAND)]
    options = " ".join(
        f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')} {value}"
        for name, value in vars(arguments).items()
        if name != "text" and value is not None and value is not False
    )
    return [*before, f"{COMMAND} --text {arguments.text.name} {options}"]


def publish(
    model: Model,
    tokenizer: Tokenizer,
    held_out: str,
    train_tokens: int,
    minutes: float,
    arguments: argparse.Namespace,
) -> None:
    """Write weights, tokenizer, configs and model card, and show two samples."""
    end_id = end_token(tokenizer)
    model.generation_config = GenerationConfig(bos_token_id=end_id, eos_token_id=end_id, pad_token_id=end_id)
    model.half().save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    shipped = type(model).from_pretrained(arguments.output)
    nats, bits = held_out_loss(shipped, tokenizer, held_out)
    print(f"held out: {nats:.4f} nats a token, {bits:.4f} bits a byte")
    card = CARD.format(
        parameters=model.num_parameters() / 1e6,
        text_bytes=arguments.text.stat().st_size,
        text_hash=hashlib.sha256(arguments.text.read_bytes()).hexdigest(),
        train_tokens=train_tokens,
        nats=nats,
        perplexity=math.exp(nats),
        bits=bits,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        precision="bfloat16 autocast over float32 weights" if arguments.bf16 else "float32",
        start="the weights of an earlier run (below)" if arguments.init else "random weights",
        recipe="\n".join(recipe(arguments)),
        name=arguments.output.name,
        kind=KINDS[arguments.model_type][0],
        vocabulary=KINDS[arguments.model_type][1],
        **{**vars(arguments), "vocab_size": len(tokenizer)},
    )
    (arguments.output / "README.md").write_text(card, encoding="utf-8")
    prompt = torch.tensor([tokenizer.encode("ROMEO:")])
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 50, "seed": 1}):
        output = shipped.generate(prompt, max_new_tokens=80, **options)
        print(f"\n--- {options}\n{tokenizer.decode(output[0])}")
    print(f"\ntrained in {minutes:.0f} minutes; now run: python -m gpt2rt.doctor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=pathlib.Path, required=True, help="the text, UTF-8")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--model-type", choices=KINDS, default="gpt2")
    parser.add_argument("--init", type=pathlib.Path, help="go on from this folder's weights instead of random ones")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--n-layer", type=int, default=3)
    parser.add_argument("--n-embd", type=int, default=256)
    parser.add_argument("--n-head", type=int, default=4)
    parser.add_argument("--n-positions", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, faster on processors that have it")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    train_text, held_out = load_text(arguments.text)
    tokenizer: Tokenizer
    if arguments.model_type == "gpt2":
        tokenizer = GPT2Tokenizer.train_from_iterator([train_text], arguments.vocab_size, special_tokens=(END_OF_TEXT,))
    else:
        tokenizer = OpenAIGPTTokenizer.train_from_iterator([train_text], arguments.vocab_size)
    tokenizer.model_max_length = arguments.n_positions
    end_id = end_token(tokenizer)
    shape = {
        "vocab_size": len(tokenizer),
        "n_positions": arguments.n_positions,
        "n_embd": arguments.n_embd,
        "n_layer": arguments.n_layer,
        "n_head": arguments.n_head,
        "resid_pdrop": arguments.dropout,
        "embd_pdrop": arguments.dropout,
        "attn_pdrop": 0.0,
    }
    model: Model
    model_class = GPT2LMHeadModel if arguments.model_type == "gpt2" else OpenAIGPTLMHeadModel
    if arguments.init:
        model = model_class.from_pretrained(
            arguments.init, dtype=torch.float32, resid_pdrop=arguments.dropout, embd_pdrop=arguments.dropout
        )
    elif arguments.model_type == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=end_id, eos_token_id=end_id))
    else:
        model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(**shape))
    windows = Windows(tokenizer, train_text, arguments.n_positions, arguments.seed)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(windows.ids)} training tokens", flush=True)
    started = time.perf_counter()
    train(model, windows, arguments)
    minutes = (time.perf_counter() - started) / 60
    publish(model, tokenizer, held_out, len(windows.ids), minutes, arguments)


if __name__ == "__main__":
    main()
