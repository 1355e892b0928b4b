"""Question answering, against a plain restatement of what transformers did before it dropped the pipeline."""

import numpy as np
import pytest
import torch

from gpt2rt import BertTokenizer, pipeline

from .conftest import make_tokenizer

pytestmark = pytest.mark.proves("L7")
KIND = "ForQuestionAnswering"
QUESTION = "where is the rain?"
CONTEXT = "the rain in the inner town is thin, and on the mountain there is a fire. Grüße in the café, then on and on"
SHORT = "the rain is in a town"


def reference(
    model,
    tokenizer,
    question,
    context,
    top_k=1,
    doc_stride=None,
    max_answer_len=15,
    max_seq_len=None,
    handle_impossible_answer=False,
    align_to_words=True,
):
    """One window after another, every span one after another."""
    max_seq_len = max_seq_len or min(tokenizer.model_max_length, 384)
    stride = min(max_seq_len // 2, 128) if doc_stride is None else doc_stride
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=max_seq_len,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    answers, null_score = [], 1000000.0
    for row, ids in enumerate(encoded["input_ids"]):
        with torch.no_grad():
            inputs = {name: torch.tensor(encoded[name][row])[None] for name in tokenizer.model_input_names}
            out = model(**inputs)
        inside = np.array([which == 1 for which in encoded.sequence_ids(row)])
        if getattr(tokenizer, "cls_token_id", None) is not None:
            # stands for "no answer"
            inside |= np.array(ids) == tokenizer.cls_token_id
        start, end = (np.where(inside, x[0].float().numpy(), -10000.0) for x in (out.start_logits, out.end_logits))
        start, end = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (start, end))
        null_score = min(null_score, start[0] * end[0])
        start[0] = end[0] = 0.0
        spans = [
            (start[a] * end[b], a, b)
            for a in range(len(ids))
            for b in range(a, min(a + max_answer_len, len(ids)))
            if inside[a] and inside[b] and a > 0
        ]
        spans.sort(key=lambda span: -span[0])
        for score, a, b in spans[: 2 * top_k + 10 if align_to_words else top_k]:
            first, last = encoded["offset_mapping"][row][a][0], encoded["offset_mapping"][row][b][1]
            if align_to_words:
                first = encoded.word_to_chars(row, encoded.token_to_word(row, a), 1)[0]
                last = encoded.word_to_chars(row, encoded.token_to_word(row, b), 1)[1]
            text = context[first:last]
            known = next((answer for answer in answers if answer["answer"].lower() == text.lower()), None)
            if known:
                known["score"] += score
            else:
                answers.append({"score": score, "start": first, "end": last, "answer": text})
    if handle_impossible_answer:
        answers.append({"score": null_score, "start": 0, "end": 0, "answer": ""})
    answers = sorted(answers, key=lambda answer: answer["score"], reverse=True)[:top_k]
    return answers[0] if len(answers) == 1 else answers


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(KIND)


@pytest.fixture(scope="module")
def pipe(model, tokenizer):
    return pipeline("question-answering", model=model, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 5},
        {"top_k": 3, "align_to_words": False},
        {"max_answer_len": 2, "top_k": 4},
        {"max_seq_len": 48, "top_k": 4},
        {"max_seq_len": 40, "doc_stride": 5, "top_k": 6},
        {"max_seq_len": 40, "doc_stride": 0},
        {"handle_impossible_answer": True, "top_k": 99},
    ],
    ids=str,
)
def test_equals_the_reference(pipe, model, tokenizer, same, options):
    for context in (SHORT, CONTEXT):
        expected = reference(model, tokenizer, QUESTION, context, **options)
        same(pipe(question=QUESTION, context=context, **options), expected)


def test_no_answer_with_a_token_for_it(make_model, tmp_path, same):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "rain", "##s", "in", "town", "is", "where", "?", "a", ","]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    tokenizer = BertTokenizer(vocab_file=tmp_path / "vocab.txt", model_max_length=64)
    model = make_model(KIND, vocab_size=len(pieces))
    pipe = pipeline("question-answering", model=model, tokenizer=tokenizer)
    context = "the rains in a town, the rain is in the town"
    for options in ({"top_k": 20}, {"max_seq_len": 14, "doc_stride": 2, "top_k": 20}):
        options = {"handle_impossible_answer": True, **options}
        answers = pipe("where is rain ?", context, **options)
        same(answers, reference(model, tokenizer, "where is rain ?", context, **options))
        [empty] = [answer for answer in answers if answer["answer"] == ""]
        assert empty["score"] > 0


def test_the_answer_is_in_the_context(pipe):
    for answer in pipe(QUESTION, CONTEXT, top_k=5):
        assert CONTEXT[answer["start"] : answer["end"]] == answer["answer"]
        assert 0 < answer["score"] < 1
        # whole words
        assert answer["end"] == len(CONTEXT) or not (CONTEXT[answer["end"] - 1] + CONTEXT[answer["end"]]).isalpha()


def test_every_way_to_ask(pipe):
    example = {"question": QUESTION, "context": SHORT}
    one = pipe(question=QUESTION, context=SHORT)
    assert list(one) == ["score", "start", "end", "answer"]
    assert pipe(example) == pipe([example]) == pipe(QUESTION, SHORT) == pipe(data=example) == pipe(X=[example]) == one
    other = pipe("on?", SHORT)
    assert pipe(question=[QUESTION, "on?"], context=SHORT) == [one, other]
    assert pipe(question=[QUESTION, "on?"], context=[SHORT, SHORT]) == [one, other]
    assert pipe([example, {"question": "on?", "context": SHORT}], batch_size=2) == [one, other]
    assert list(pipe(example for _ in range(2))) == [one, one]


def test_batches_do_not_change_results(pipe):
    questions = [QUESTION, "on?", "is the fire in a town or on a mountain"]
    alone = [pipe(question, CONTEXT, top_k=3, max_seq_len=56) for question in questions]
    for batch_size in (2, 3, 50):
        assert pipe(question=questions, context=CONTEXT, batch_size=batch_size, top_k=3, max_seq_len=56) == alone


def test_context_first(model, same):
    """A tokenizer that pads on the left puts the context first; question tokens are no answers there either."""
    tokenizer = make_tokenizer(padding_side="left")
    pipe = pipeline("question-answering", model=model, tokenizer=tokenizer)
    encoded = tokenizer(SHORT, QUESTION, return_tensors="pt", return_offsets_mapping=True)
    count = len(tokenizer(SHORT)["input_ids"])
    with torch.no_grad():
        out = model(encoded["input_ids"])
    start, end = (x[0, :count].softmax(-1) for x in (out.start_logits, out.end_logits))
    scores = (start[:, None] * end[None, :]).triu()
    a, b = divmod(int(scores.argmax()), count)
    offsets = encoded["offset_mapping"][0].tolist()
    expected = {"score": float(scores.max()), "start": offsets[a][0], "end": offsets[b][1]}
    answer = pipe(QUESTION, SHORT, align_to_words=False, max_answer_len=99)
    same({key: answer[key] for key in expected}, expected)


def test_long_questions_are_cut_if_asked(pipe, tokenizer):
    question = QUESTION * 3
    kept = tokenizer(question, return_offsets_mapping=True)["offset_mapping"][5][1]
    assert pipe(question, SHORT, max_question_len=6) == pipe(question[:kept], SHORT)
    assert pipe(question, SHORT, max_question_len=6) != pipe(question, SHORT)


def test_refusals(pipe):
    with pytest.raises(KeyError, match=r"context.* is missing"):
        pipe({"question": "a"})
    with pytest.raises(ValueError, match="question = '', but it must be a text that is not empty"):
        pipe("", SHORT)
    with pytest.raises(ValueError, match="context = None"):
        pipe(question="a", context=None)
    with pytest.raises(ValueError, match="there are 2 questions and 1 contexts"):
        pipe(question=["a", "b"], context=["c"])
    with pytest.raises(ValueError, match="got question"):
        pipe(question="a")
    with pytest.raises(ValueError, match="given by position and as question"):
        pipe({"question": "a", "context": "b"}, question="c")
    with pytest.raises(ValueError, match="top_k = 0, but it must be an integer >= 1"):
        pipe("a", SHORT, top_k=0)
    with pytest.raises(ValueError, match="doc_stride = 60 is larger than max_seq_len = 40"):
        pipe("a", SHORT, doc_stride=60, max_seq_len=40)
    with pytest.raises(
        ValueError, match="the question has 13 tokens and leaves no room for its context in max_seq_len = 9"
    ):
        pipe(QUESTION, SHORT, max_seq_len=9)
    with pytest.raises(TypeError, match="no keyword 'aggregation_strategy'; its own are align_to_words, doc_stride"):
        pipe("a", SHORT, aggregation_strategy="max")
    with pytest.warns(UserWarning, match="topk is an older name of top_k"):
        assert len(pipe("a", SHORT, topk=2)) == 2
