import warnings

import pytest
import torch

from gpt2rt.errors import RequestError
from gpt2rt.generation import (
    ConfidenceCriteria,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from gpt2rt.generation.stopping import StopStrings, StopTextFilter


def ends_after(strings, tokenizer, prompt, new):
    """How many of the new ids it takes to complete a stop text; None if none is."""
    stops = StopStrings(strings, tokenizer)
    state = stops.begin(prompt)
    for count, token in enumerate(new, 1):
        state, found = stops.put(state, token)
        if found:
            return count
    return None


def ids_of(tokenizer, *tokens):
    return tokenizer.convert_tokens_to_ids(list(tokens))


@pytest.mark.proves("fault:F39")
@pytest.mark.proves("G5")
@pytest.mark.parametrize(
    ("stop", "tokens", "expected"),
    [
        ("stop", ["stop"], 1),
        ("stop", ["st", "op"], 2),
        ("stop", ["s", "t", "o", "p", "on"], 4),
        # it begins and ends inside tokens
        ("to", ["a", "st", "on"], 3),
        ("to", ["stop"], 1),
        # only the token that completes it counts
        ("the", ["th", "e", "on"], 2),
        (["on", "the"], ["Ġthe"], 1),
        ("é", ["Ã", "©"], 2),
        ("é", ["Ã©"], 1),
        ("aé!", ["a", "Ã", "©", "!"], 4),
        # half a character is not that character
        ("é", ["Ã", "¨"], None),
        ("stop", ["st", "o", "on"], None),
        ("<|endoftext|>", ["a", "<|endoftext|>"], 2),
    ],
)
def test_stop_strings_on_bytes(stop, tokens, expected, tokenizer):
    assert ends_after(stop, tokenizer, [], ids_of(tokenizer, *tokens)) == expected


def test_stop_string_may_begin_in_the_prompt_but_not_end_there(tokenizer):
    assert ends_after("stop", tokenizer, ids_of(tokenizer, "a", "st"), ids_of(tokenizer, "op")) == 1
    assert ends_after("stop", tokenizer, ids_of(tokenizer, "stop"), ids_of(tokenizer, "a", "on")) is None


class OnlyDecodes:
    """A tokenizer of which only ``decode`` is known, as with transformers'."""

    def __init__(self, tokenizer):
        self.decode = tokenizer.decode


@pytest.mark.parametrize("tokens", [["st", "op"], ["a", "s", "top"], ["stop"], ["th", "e", "st", "on"], ["op", "st"]])
@pytest.mark.parametrize("stop", ["stop", "to", "é", "he"])
def test_stop_strings_without_bytes_agree(stop, tokens, tokenizer):
    ids = tokenizer.encode("".join(tokens)) + ids_of(tokenizer, "Ã", "©", "a")
    for prompt in ([], ids_of(tokenizer, "s")):
        assert ends_after(stop, OnlyDecodes(tokenizer), prompt, ids) == ends_after(stop, tokenizer, prompt, ids)


def test_same_ids_as_transformers(tokenizer, hf, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    theirs = hf.module.AutoTokenizer.from_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for stop in (["the"], ["st", "on"], ["xth"], ["top"]):
        reference = hf.module.StopStringCriteria(theirs, stop)
        for _ in range(20):
            letters = "".join("thestoponx"[i] for i in torch.randint(0, 10, (12,), generator=generator).tolist())
            ids = tokenizer.encode(letters)
            expected = next(
                (n for n in range(1, len(ids) + 1) if reference(torch.tensor([ids[:n]]), None).item()), None
            )
            assert ends_after(stop, tokenizer, [], ids) == expected, (stop, letters)


@pytest.mark.proves("fault:F39")
def test_text_filter_never_shows_a_part_of_a_stop_text():
    for text, stops, shown in [
        ("to be or not", ["or"], "to be "),
        ("aaab", ["aab"], "a"),
        ("abcabd", ["abd"], "abc"),
        ("no stop here, sto", ["stop!"], "no stop here, sto"),
        ("first wins", ["wins", "st"], "fir"),
        ("", ["x"], ""),
        ("all of it", [], "all of it"),
    ]:
        for size in (1, 2, 3, 100):
            stop_filter = StopTextFilter(stops)
            pieces = [stop_filter.put(text[i : i + size]) for i in range(0, len(text), size)]
            pieces.append(stop_filter.end())
            assert "".join(pieces) == shown, (text, size)


def test_text_filter_holds_back_no_more_than_it_must():
    stop_filter = StopTextFilter(["\nJULIET"])
    assert stop_filter.put("But soft\n") == "But soft"
    assert stop_filter.put("what") == "\nwhat"


def test_criteria_list():
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])

    class Ends(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == 4

    assert StoppingCriteriaList([Ends()])(ids, None).tolist() == [False, True, False]
    assert StoppingCriteriaList([Ends(), lambda ids, scores: True])(ids, None).tolist() == [True] * 3
    assert StoppingCriteriaList()(ids, None).tolist() == [False] * 3
    with pytest.raises(RequestError, match=r"function returned a tensor of shape \[2\], expected one bool or \[3\]"):
        StoppingCriteriaList([lambda ids, scores: torch.zeros(2, dtype=torch.bool)])(ids, None)


@pytest.mark.proves("G5")
def test_criteria_match_transformers(hf):
    generator = torch.Generator().manual_seed(0)
    scores = tuple(torch.randn(1, 9, generator=generator) for _ in range(3))
    for _ in range(20):
        ids = torch.randint(0, 9, (4, 7), generator=generator)
        for name, arguments, kwargs in [
            ("MaxLengthCriteria", (7,), {}),
            ("MaxLengthCriteria", (8,), {}),
            ("MaxTimeCriteria", (5.0, 0.0), {}),
            ("MaxTimeCriteria", (1e6,), {}),
            ("EosTokenCriteria", (3,), {}),
            ("EosTokenCriteria", ([3, 5],), {}),
            ("EosTokenCriteria", (torch.tensor([1, 3, 5]),), {"new_token_length": 2}),
        ]:
            theirs = getattr(hf.module.generation, name)(*arguments)(ids, None, **kwargs)
            assert torch.equal(globals()[name](*arguments)(ids, None, **kwargs), theirs), name
        for threshold in 0.05, 0.2, 0.9:
            theirs = hf.module.generation.stopping_criteria.ConfidenceCriteria(threshold)(ids[:1], scores)
            assert ConfidenceCriteria(threshold)(ids[:1], scores) is theirs


@pytest.mark.proves("G5")
@pytest.mark.parametrize("stop", ["the", " the s", ["!", "e\n"], "é", "ab c"])
def test_stop_string_criteria_match_transformers(stop, hf, test_data):
    from gpt2rt import GPT2Tokenizer

    folder = test_data / "gpt2"
    tokenizer, theirs = GPT2Tokenizer.from_pretrained(folder), hf.module.GPT2Tokenizer.from_pretrained(folder)
    text = "the theatre, bathe! é cafés ab cd the sea the\n end "
    ids = tokenizer(text)["input_ids"]
    ours = [StopStringCriteria(tokenizer, stop), StopStringCriteria(theirs, stop)]
    reference = hf.module.StopStringCriteria(theirs, stop)
    prefixes = [ids[:length] for length in range(4, len(ids) + 1)]
    found = []
    for prefix in prefixes:
        expected = reference(torch.tensor([prefix]), None)
        for criterion in ours:
            assert torch.equal(criterion(torch.tensor([prefix]), None), expected), tokenizer.decode(prefix)
        found += expected.tolist()
    assert any(found)
    assert not all(found)
    # rows with padding, and several at once
    width = max(len(prefix) for prefix in prefixes)
    padded = torch.tensor([[-1] * (width - len(prefix)) + prefix for prefix in prefixes])
    assert ours[0](padded, None).tolist() == found


def test_lists_and_wrong_arguments(tokenizer):
    assert StoppingCriteriaList([EosTokenCriteria(2), MaxLengthCriteria(7)]).max_length == 7
    assert StoppingCriteriaList([MaxTimeCriteria(7.0)]).max_length is None
    with pytest.raises(RequestError, match="eos_token_id must be"):
        EosTokenCriteria([-1])
    with pytest.raises(RequestError, match="stop_strings must be"):
        StopStringCriteria(tokenizer, ["a", ""])
    with pytest.raises(RequestError, match="looks at scores"):
        ConfidenceCriteria(0.5)(torch.tensor([[1]]), None)


def test_going_past_the_positions_is_said_once():
    criterion = MaxLengthCriteria(9, max_position_embeddings=3)
    with pytest.warns(UserWarning, match="4 tokens now, but the model has 3 positions"):
        criterion(torch.zeros((1, 4), dtype=torch.int64), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(torch.zeros((1, 5), dtype=torch.int64), None)
