"""apply_chat_template: as transformers renders, in a sandbox, and not without a template (T14)."""

import json

import pytest
import torch

from gpt2rt import AutoTokenizer, GPT2Tokenizer, TokenizerError

pytestmark = pytest.mark.proves("T14")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EVERYTHING = """{%- if tools %}{{ tools | tojson(indent=2) }}{% endif -%}
{{ bos_token }}
{%- for message in messages -%}
  {%- if loop.index0 > 5 %}{% break %}{% endif -%}
  {%- if message.role == 'assistant' -%}
    {% generation %}{{ message.content | trim }}{% endgeneration %}
  {%- else -%}
    [{{ message.role | upper }}] {{ message['content'].strip() }} {{ 'x' in message }}
  {%- endif -%}
{%- endfor -%}
{%- set ns = namespace(n=0) -%}
{%- for i in range(3) %}{% set ns.n = ns.n + i * 2 ** 3 %}{% endfor -%}
{{ ns.n }}{{ extra }}{{ [1, "é"] | tojson }}{{ documents[0].title if documents }}"""
CHAT = [
    {"role": "user", "content": " Hi there ", "name": None},
    {"role": "assistant", "content": "Hello é "},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture
def theirs(small, hf, tmp_path):
    GPT2Tokenizer(*small).save_pretrained(tmp_path / "for_them")
    return hf.module.AutoTokenizer.from_pretrained(tmp_path / "for_them")


def test_there_is_none_by_default(tokenizer):
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match="has no chat template: GPT-2 and OpenAI GPT were not trained on chats"):
        tokenizer.apply_chat_template(CHAT)


@pytest.mark.parametrize("template", [CHATML, EVERYTHING], ids=["chatml", "everything"])
@pytest.mark.parametrize("prompt", [False, True])
def test_rendered_as_transformers_does(tokenizer, theirs, template, prompt):
    call = {
        "chat_template": template,
        "add_generation_prompt": prompt,
        "extra": "more",
        "tools": [{"name": "f", "q": "<&>"}],
        "documents": [{"title": "T", "text": "t"}],
    }
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, **call)
    assert text == theirs.apply_chat_template(CHAT, tokenize=False, **call)
    ours, other = tokenizer.apply_chat_template(CHAT, **call), theirs.apply_chat_template(CHAT, **call)
    assert ours["input_ids"] == other["input_ids"] == tokenizer.encode(text)
    assert tokenizer.apply_chat_template(CHAT, return_dict=False, **call) == ours["input_ids"]


def test_batches_and_tensors(tokenizer, theirs):
    chats = [CHAT, CHAT[:1]]
    for one in (tokenizer, theirs):
        one.pad_token = one.eos_token
        one.chat_template = CHATML
    call = {"padding": True, "return_tensors": "pt", "truncation": True, "max_length": 60}
    ours, other = tokenizer.apply_chat_template(chats, **call), theirs.apply_chat_template(chats, **call)
    assert torch.equal(ours["input_ids"], other["input_ids"])
    assert torch.equal(ours["attention_mask"], other["attention_mask"])
    assert tokenizer.apply_chat_template(chats, tokenize=False) == theirs.apply_chat_template(chats, tokenize=False)


@pytest.mark.parametrize("last", ["Hello", "Hello there  ", " spaced "])
def test_going_on_with_the_last_message(tokenizer, theirs, last):
    chat = [*CHAT, {"role": "assistant", "content": last}]
    for template in (CHATML, CHATML.replace("message['content']", "message['content'] | trim")):
        call = {"chat_template": template, "continue_final_message": True, "tokenize": False}
        assert tokenizer.apply_chat_template(chat, **call) == theirs.apply_chat_template(chat, **call)


def test_where_templates_come_from(tokenizer, hf, tmp_path):
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "chat_template.jinja").read_text() == CHATML
    assert AutoTokenizer.from_pretrained(tmp_path / "one").chat_template == CHATML
    assert hf.module.AutoTokenizer.from_pretrained(tmp_path / "one").chat_template == CHATML
    tokenizer.chat_template = {"default": CHATML, "short": "{{ messages[0].content }}"}
    tokenizer.save_pretrained(tmp_path / "two")
    for loaded in (
        AutoTokenizer.from_pretrained(tmp_path / "two"),
        hf.module.AutoTokenizer.from_pretrained(tmp_path / "two"),
    ):
        assert loaded.apply_chat_template(CHAT, tokenize=False).startswith("<|im_start|>user\n Hi there ")
        assert loaded.apply_chat_template(CHAT, chat_template="short", tokenize=False) == " Hi there "
    config = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    (tmp_path / "one" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "old"}))
    assert AutoTokenizer.from_pretrained(tmp_path / "one").chat_template == CHATML, "the file of its own wins"
    (tmp_path / "one" / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path / "one").chat_template == "old"
    tokenizer.chat_template = {"a": "x", "tool_use": "t"}
    assert tokenizer.apply_chat_template(CHAT, tools=[], tokenize=False) == "t"
    with pytest.raises(TokenizerError, match="several chat templates and no default: a, tool_use"):
        tokenizer.apply_chat_template(CHAT)


ATTACKS = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "builtins": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "changing a message": "{% do messages.append(1) %}{{ messages.append(1) }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "endless numbers": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(1000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}",
    "long text": "{{ 'x' * 10**9 }}",
    "long list": "{{ [0] * 999999 }}",
    "powers": "{{ 10 ** 10 ** 10 }}",
    "much text": "{% set x = 'x' * 99999 %}{% for i in range(999) %}{{ x }}{% endfor %}",
    "lipsum": "{{ lipsum(1000) }}",
    "syntax": "{{ messages",
    "unknown tag": "{% exec 1 %}",
    "type": "{{ 1 + 'a' }}",
    "zero": "{{ 1 / 0 }}",
    "conversion": "{{ '%d' | format('a') }}",
    "its own refusal": "{{ raise_exception('no system message') }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("template", ATTACKS.values(), ids=ATTACKS)
def test_templates_that_reach_too_far(tokenizer, template):
    if template in [ATTACKS[name] for name in ("attr filter", "globals", "format_map")]:
        # the sandbox gives nothing for an attribute that it hides
        assert tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False) == ""
        return
    with pytest.raises(TokenizerError, match="the chat template"):
        tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)
    assert len(CHAT) == 3


def test_bad_calls(tokenizer):
    for chat in ([], "hello", [[]], ["hello"], [CHAT, "x"], None):
        with pytest.raises(TokenizerError, match="chat is"):
            tokenizer.apply_chat_template(chat, chat_template=CHATML)
    with pytest.raises(TokenizerError, match="choose one of them"):
        tokenizer.apply_chat_template(
            CHAT, chat_template=CHATML, add_generation_prompt=True, continue_final_message=True
        )
    with pytest.raises(TokenizerError, match="return_assistant_tokens_mask is not supported"):
        tokenizer.apply_chat_template(CHAT, chat_template=CHATML, return_assistant_tokens_mask=True)
    with pytest.raises(TokenizerError, match="does not write the last message as it is"):
        tokenizer.apply_chat_template(CHAT, chat_template="fixed", continue_final_message=True)
    with pytest.raises(TokenizerError, match="the last message has no text in 'reasoning'"):
        tokenizer.apply_chat_template(CHAT, chat_template=CHATML, continue_final_message="reasoning")
    with pytest.raises(TokenizerError, match="a chat holds object, but templates see only text"):
        tokenizer.apply_chat_template([{"role": "user", "content": object()}], chat_template=CHATML)
    with pytest.raises(TokenizerError, match="has 1048577 characters, expected at most 1048576"):
        tokenizer.apply_chat_template(CHAT, chat_template="x" * (2**20 + 1))
