import asyncio
import queue
import threading

import pytest
import torch

from gpt2rt.generation import AsyncTextIteratorStreamer, BaseStreamer, TextIteratorStreamer, TextStreamer


class Collector(TextStreamer):
    """Keeps what would be printed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pieces, self.ends = [], 0

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append(text)
        self.ends += stream_end


def feed(streamer, prompt, ids):
    streamer.put(torch.tensor([prompt]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()


@pytest.mark.proves("G11")
@pytest.mark.parametrize("skip_prompt", [False, True])
@pytest.mark.parametrize("text", ["plain words the stop", "é and 日本 and 🤗🏽", "a\nb\n\n"])
def test_pieces_are_whole_characters_and_add_up(skip_prompt, text, tokenizer):
    prompt, ids = tokenizer.encode("the prompt "), tokenizer.encode(text)
    streamer = Collector(tokenizer, skip_prompt)
    feed(streamer, prompt, ids)
    assert "".join(streamer.pieces) == ("" if skip_prompt else "the prompt ") + text
    assert not any("\ufffd" in piece for piece in streamer.pieces)
    assert streamer.ends == 1
    # a streamer can be used again
    feed(streamer, prompt, ids)
    assert streamer.ends == 2


def test_foreign_tokenizer(tokenizer):
    class OnlyDecodes:
        decode = tokenizer.decode

    text = "two lines\nof é and 🤗 text"
    streamer = Collector(OnlyDecodes(), skip_prompt=True)
    feed(streamer, tokenizer.encode("p"), tokenizer.encode(text))
    assert "".join(streamer.pieces) == text
    assert not any("\ufffd" in piece for piece in streamer.pieces)


def test_special_tokens(tokenizer):
    ids = [*tokenizer.encode("on"), tokenizer.eos_token_id]
    for skip, expected in [(False, "on<|endoftext|>"), (True, "on")]:
        streamer = Collector(tokenizer, skip_prompt=True, skip_special_tokens=skip)
        feed(streamer, [0], ids)
        assert "".join(streamer.pieces) == expected


def test_text_streamer_prints_at_once(tokenizer, capsys):
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    streamer.put(torch.tensor([[5]]))
    streamer.put(torch.tensor(tokenizer.encode("x")))
    assert capsys.readouterr().out == "x"
    streamer.end()
    assert capsys.readouterr().out == "\n"


def test_bad_options(tokenizer):
    with pytest.raises(ValueError, match="clean up spaces"):
        TextStreamer(tokenizer, clean_up_tokenization_spaces=True)
    with pytest.raises(ValueError, match="colour"):
        TextStreamer(tokenizer, colour=1)
    TextStreamer(tokenizer, clean_up_tokenization_spaces=False)
    with pytest.raises(ValueError, match="shows one row, got 2"):
        TextStreamer(tokenizer).put(torch.tensor([[1], [2]]))


def test_base_class_needs_its_methods():
    with pytest.raises(NotImplementedError, match="put"):
        BaseStreamer().put(torch.tensor([1]))
    with pytest.raises(NotImplementedError, match="end"):
        BaseStreamer().abort(ValueError())


@pytest.mark.proves("G11")
def test_iterator_yields_in_another_thread(tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    ids = tokenizer.encode("the stop é")
    worker = threading.Thread(target=feed, args=(streamer, [1], ids))
    worker.start()
    pieces = list(streamer)
    worker.join()
    assert "".join(pieces) == "the stop é"
    assert len(pieces) > 1
    assert "" not in pieces


def test_iterator_times_out_and_passes_errors_on(tokenizer):
    streamer = TextIteratorStreamer(tokenizer, timeout=0.01)
    with pytest.raises(queue.Empty):
        next(streamer)
    streamer.abort(RuntimeError("the model failed"))
    with pytest.raises(RuntimeError, match="the model failed"):
        list(streamer)


@pytest.mark.proves("G11")
def test_async_iterator(tokenizer):
    async def consume(fail):
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)

        def work():
            feed(streamer, [1], tokenizer.encode("the stop é"))

        worker = threading.Thread(target=streamer.abort if fail else work, args=(OSError("gone"),) if fail else ())
        worker.start()
        try:
            return [piece async for piece in streamer]
        finally:
            worker.join()

    assert "".join(asyncio.run(consume(False))) == "the stop é"
    with pytest.raises(OSError, match="gone"):
        asyncio.run(consume(True))

    async def wait():
        await anext(AsyncTextIteratorStreamer(tokenizer, timeout=0.01))

    with pytest.raises(TimeoutError):
        asyncio.run(wait())


@pytest.mark.proves("G11")
@pytest.mark.parametrize("skip_prompt", [False, True])
def test_the_same_text_as_transformers(skip_prompt, tokenizer, byte_model, hf, capsys):
    """Ours and theirs, each inside both libraries' generate."""
    theirs = hf.copy_of(byte_model)
    ids = torch.tensor([tokenizer.encode("the stop ")])
    printed = []
    for where in byte_model, theirs:
        for module in hf.module, None:
            streamer = (TextStreamer if module is None else module.TextStreamer)(tokenizer, skip_prompt=skip_prompt)
            where.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, streamer=streamer, pad_token_id=0
            )
            printed.append(capsys.readouterr().out)
    assert printed == printed[:1] * 4
    assert len(printed[0]) > 5
