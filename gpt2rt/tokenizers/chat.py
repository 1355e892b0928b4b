"""Chats written out by a checkpoint's template.

A template is a program in Jinja's language, and it comes with the checkpoint. It runs in Jinja's sandbox, which reaches
no attribute of Python's internals and changes nothing; the messages it sees are rebuilt from plain values, so that
it meets no object with methods of its own. Its size, its numeric loops, its repetitions and the text it writes out are
bounded; a single expression can still ask for much memory.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gpt2rt.errors import TokenizerError

if TYPE_CHECKING:
    from jinja2 import Template

MAX_TEMPLATE_CHARACTERS = 2**20
# what one rendering may loop over in all, and write
MAX_LOOP_STEPS = 100_000
MAX_TEXT_CHARACTERS = 2**24


class ChatTemplates:
    """The part of a tokenizer that writes chats."""

    #: Jinja text; name -> text when there are several; None
    chat_template: str | dict[str, str] | None
    special_tokens_map: dict[str, str]

    def _set_chat_template(self, value: Any) -> None:
        if isinstance(value, list | tuple):
            if not all(isinstance(item, Mapping) and {"name", "template"} <= item.keys() for item in value):
                raise TokenizerError("chat_template is a list, so each item must have 'name' and 'template'")
            value = {item["name"]: item["template"] for item in value}
        texts = value if isinstance(value, Mapping) else {} if value is None else {"default": value}
        for name, text in texts.items():
            if not isinstance(name, str) or not isinstance(text, str):
                raise TokenizerError(f"chat_template {name!r} is {type(text).__name__}, expected Jinja text")
        self.chat_template = dict(value) if isinstance(value, Mapping) else value

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The Jinja text that :meth:`apply_chat_template` uses.

        Args:
            chat_template: the text itself, or the name of one of several templates.
            tools: with tools, a template named "tool_use" is preferred.
        Raises:
            ValueError: there is none, or none of several is the default.
        """
        known = self.chat_template
        if isinstance(known, dict):
            if chat_template is not None:
                return known.get(chat_template, chat_template)
            for name in ("tool_use", "default") if tools is not None else ("default",):
                if name in known:
                    return known[name]
            raise TokenizerError(
                f"the tokenizer has several chat templates and no default: {', '.join(sorted(known))}; pass "
                "chat_template= with one of these names or with Jinja text"
            )
        found = known if chat_template is None else chat_template
        if found is None:
            raise TokenizerError(
                "the tokenizer has no chat template: GPT-2 and OpenAI GPT were not trained on chats, so there is no "
                "right one. Set tokenizer.chat_template, or pass chat_template= with Jinja text"
            )
        return found

    def apply_chat_template(
        self,
        conversation: Any,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The token ids, or the text, of a chat.

        Args:
            conversation: messages, each a dictionary with "role" and "content"; or a list of such chats.
            tools, documents: given to the template; tools are JSON schemas.
            chat_template: see :meth:`get_chat_template`.
            add_generation_prompt: end with what begins the assistant's next message.
            continue_final_message: leave the last message open, so that a model goes on with it; a string names the
                field of the message to go on with.
            tokenize: False gives the text.
            padding, truncation, max_length, return_tensors: as in calling the tokenizer.
            return_dict: give the whole :class:`BatchEncoding`, not its ``input_ids`` alone.
            return_assistant_tokens_mask: not supported.
            tokenizer_kwargs: further keywords of the call.
            **kwargs: further variables of the template.
        Returns:
            a BatchEncoding, ids or text; a list of them (or a batch) for a list of chats. No special tokens are
            added to those that the template writes.
        Raises:
            ValueError: no template or an unsafe one, an empty chat, or arguments that contradict each other.
        """
        if return_assistant_tokens_mask:
            raise TokenizerError("return_assistant_tokens_mask is not supported; mark the assistant's text yourself")
        if continue_final_message and add_generation_prompt:
            raise TokenizerError(
                "add_generation_prompt begins a new message and continue_final_message goes on with the last one; "
                "choose one of them"
            )
        template = self.get_chat_template(chat_template, tools)
        if not isinstance(conversation, list | tuple) or not conversation:
            raise TokenizerError(f"the chat is {conversation!r}, expected a list with at least one message")
        batched = isinstance(conversation[0], list | tuple)
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        texts = []
        for chat in conversation if batched else [conversation]:
            messages = _messages(chat)
            text = render(
                template,
                {
                    **self.special_tokens_map,
                    **{name: _plain(value) for name, value in kwargs.items()},
                    "messages": messages,
                    "tools": _plain(tools),
                    "documents": _plain(documents),
                    "add_generation_prompt": bool(add_generation_prompt),
                },
            )
            texts.append(_open_end(text, messages[-1], field) if continue_final_message else text)
        if not tokenize:
            return texts if batched else texts[0]
        encoding = self(  # type: ignore[operator]
            texts if batched else texts[0],
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            add_special_tokens=False,
            return_tensors=return_tensors,
            **(tokenizer_kwargs or {}),
        )
        return encoding if return_dict else encoding["input_ids"]


def _messages(chat: Any) -> list[dict[str, Any]]:
    if not isinstance(chat, list | tuple) or not chat or not all(isinstance(message, Mapping) for message in chat):
        raise TokenizerError("a chat is a list of messages, each a dictionary with 'role' and 'content'")
    # APIs send content=None or tool_calls=None, where templates expect the key to be absent
    return [{key: value for key, value in _plain(message).items() if value is not None} for message in chat]


def _open_end(text: str, message: Mapping[str, Any], field: str) -> str:
    """The text up to the end of its last message's content."""
    content = message.get(field)
    if isinstance(content, list | tuple):
        parts = [part["text"] for part in content if isinstance(part, Mapping) and "text" in part]
        content = parts[-1] if parts else None
    if not isinstance(content, str):
        raise TokenizerError(f"continue_final_message: the last message has no text in {field!r}")
    at = text.rfind(content.strip())
    if at < 0:
        raise TokenizerError(
            "continue_final_message: the template does not write the last message as it is, so where it ends is unknown"
        )
    end = at + len(content.strip())
    # white space at the end of the message counts if the template kept it
    return text[: end + len(content) - len(content.rstrip())] if text.startswith(content.lstrip(), at) else text[:end]


def _plain(value: Any) -> Any:
    """The value rebuilt from strings, numbers, lists and dictionaries."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TokenizerError(
        f"a chat holds {type(value).__name__}, but templates see only text, numbers, lists and dictionaries"
    )


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that a Jinja template makes of these variables.

    Raises:
        TokenizerError: the template is too long, no Jinja, or breaks a rule of the sandbox; or it refuses the chat.
    """
    from jinja2.exceptions import TemplateError

    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise TokenizerError(
            f"the chat template has {len(template)} characters, expected at most {MAX_TEMPLATE_CHARACTERS}"
        )
    try:
        out, length = [], 0
        for piece in _compile(template).generate(range=_bounded_range(), **variables):
            length += len(piece)
            if length > MAX_TEXT_CHARACTERS:
                raise TokenizerError(f"the chat template writes more than {MAX_TEXT_CHARACTERS} characters")
            out.append(piece)
        return "".join(out)
    except TokenizerError:
        raise
    except TemplateError as error:
        raise TokenizerError(f"the chat template failed: {type(error).__name__}: {error}") from error
    # what expressions of the template raise on these messages
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        raise TokenizerError(f"the chat template failed on this chat: {type(error).__name__}: {error}") from error


def _bounded_range() -> Any:
    left = MAX_LOOP_STEPS

    def bounded(*arguments: int) -> Iterator[int]:
        nonlocal left
        steps = range(*arguments)
        left -= len(steps)
        if left < 0:
            raise TokenizerError(f"the chat template loops over more than {MAX_LOOP_STEPS} numbers")
        return iter(steps)

    return bounded


@lru_cache(maxsize=16)
def _compile(template: str) -> "Template":
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's text for training; here it only has to be understood."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if operator == "**" and not (numbers and abs(right) <= 64 and abs(left) < 2**32):
                raise SecurityError(f"{left!r} ** {right!r} is not allowed")
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, Sequence) and isinstance(times, int) and len(sequence) * times > MAX_LOOP_STEPS:
                    raise SecurityError(f"a repetition to {len(sequence) * times} items is not allowed")
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise TokenizerError(f"the chat template refuses this chat: {message}")

    def to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
        # unlike Jinja's own filter: no HTML escapes
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = _now
    environment.globals.pop("lipsum")
    return environment.from_string(template)


def _now(layout: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(layout)
