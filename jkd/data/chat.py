"""Conversations as a model's own chat template writes them, and which of their text the assistant says."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jkd.data.texts import Written
from jkd.data.tokenizer import File, Tokenizer
from jkd.errors import InputError, MissingExtra

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]
# Where {% generation %} … {% endgeneration %} begins and ends; noncharacters, which no text has.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template.

    Args:
        text: in Jinja, as published with models. It runs in a sandbox: it sees the messages and nothing of this machine. There is
            no clock either (``strftime_now``), which would make other tokens tomorrow.
        special: names of special tokens that it may write, such as ``bos_token``.
        tool_use: another one, for conversations that come with tools; None: the same.
    """

    text: str
    special: tuple[tuple[str, str], ...] = ()
    tool_use: str | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str | None = None) -> Template:
        """The template that is published with a tokenizer (chat_template.jinja, or in tokenizer_config.json), or this text.

        Raises:
            InputError: there is none.
        """
        described: dict[str, Any] = {}
        published: dict[str, str | None] = {}
        if isinstance(tokenizer, File):
            path = Path(tokenizer.path)
            folder = path if path.is_dir() else path.parent
            config, beside = folder / "tokenizer_config.json", folder / "chat_template.jinja"
            described = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
            found = beside.read_text(encoding="utf-8") if beside.exists() else described.get("chat_template")
            several: list[Any] = found if isinstance(found, list) else [{"name": "default", "template": found}]
            published = {one["name"]: one["template"] for one in several}
        if text is not None:
            published = {"default": text}
        if (text := published.get("default")) is None:
            raise InputError(
                "messages need a chat template: give template='…', or a tokenizer whose folder holds a chat_template.jinja (or a "
                "tokenizer_config.json with chat_template)"
            )
        tokens = {name: value for name, value in described.items() if name.endswith("_token") and value is not None}
        plain = {name: value["content"] if isinstance(value, dict) else value for name, value in tokens.items()}
        special = tuple(sorted((name, value) for name, value in plain.items() if isinstance(value, str)))
        return cls(text, special, published.get("tool_use"))

    def __call__(self, messages: Sequence[Message], tools: Tools | None = None) -> Written:
        """``(not counted, counted, not counted, …)``: what the assistant says, its end of turn included, is counted.

        That is what the template marks with ``{% generation %}``; of a template without it, what comes after the prompt that it
        would write for generation, up to and with what it writes after the answer's words. The template sees what transformers
        shows it: ``tools`` and ``documents`` are None where there are none, and so are not undefined.

        Args:
            messages: dicts with ``role`` and ``content``, and whatever else the template reads.
            tools: their JSON schemas.

        Raises:
            InputError: no assistant speaks, the template refuses the messages, or it writes them so that the assistant's part
                cannot be told.
        """
        messages = [_plain(message) for message in messages]
        if not any(message.get("role") == "assistant" for message in messages):
            raise InputError("no message has the role 'assistant', so that nothing is learnt")
        whole = self._render(messages, tools)
        if _OPEN in whole:
            return Written(re.split(f"[{_OPEN}{_CLOSE}]", whole))
        pieces, at = [], 0
        for place, message in enumerate(messages):
            if message.get("role") == "assistant":
                start, stop = self._turn(messages, tools, place, whole, at)
                pieces += [whole[at:start], whole[start:stop]]
                at = stop
        return Written([*pieces, whole[at:]])

    def _turn(self, messages: Sequence[Message], tools: Tools | None, place: int, whole: str, after: int) -> tuple[int, int]:
        """Where an assistant's turn begins and ends in the whole conversation."""
        head, alone = self._render(messages[:place], tools, prompt=True), self._render(messages[: place + 1], tools)
        content = messages[place].get("content")
        said = content.strip() if isinstance(content, str) else ""
        start = len(head)
        if whole.startswith(head) and start >= after:
            if whole.startswith(ended := alone.rstrip()) and len(ended) > start:
                return start, len(ended)
            # the turn is written otherwise where it is not the last one (its thoughts are left out, say)
            tail = alone[alone.rfind(said) + len(said) :].rstrip() if said in alone else None
            found = whole.find(said, start) + len(said)
            if said and tail is not None and found >= start + len(said) and whole.startswith(tail, found):
                return start, found + len(tail)
        raise InputError(
            "the chat template writes assistants' turns so that they cannot be told from the rest; mark them in it with "
            "{% generation %} … {% endgeneration %} and give it as template="
        )

    def _render(self, messages: Sequence[Message], tools: Tools | None, *, prompt: bool = False) -> str:
        import jinja2

        compiled = _compiled(self.text if tools is None or self.tool_use is None else self.tool_use)
        seen = dict(messages=list(messages), tools=tools, documents=None, add_generation_prompt=prompt)
        try:
            return compiled.render(**dict(self.special) | seen)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise InputError(f"the chat template refuses the messages: {error}") from error


def _plain(message: Message) -> dict[str, Any]:
    """A message as transformers hands it to a template: fields that are None are not there (tables fill in such), and thoughts
    stand under every name that templates look for."""
    plain = {name: value for name, value in message.items() if value is not None}
    thoughts = next((plain[name] for name in ("reasoning_content", "thinking", "reasoning") if name in plain), None)
    return plain if thoughts is None else {"thinking": thoughts, **plain, "reasoning_content": thoughts}


@functools.lru_cache(maxsize=16)
def _compiled(text: str) -> Any:
    try:
        import jinja2
        from jinja2 import ext, nodes, sandbox
    except ImportError as error:
        raise MissingExtra('chat templates need jinja2: pip install "jkd[train]"') from error

    class Generation(ext.Extension):
        """``{% generation %} … {% endgeneration %}``, as transformers has it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}"

    def refuse(message: str) -> str:
        raise jinja2.TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = as_json  # jinja's own escapes what HTML would misread
    made.globals["raise_exception"] = refuse
    try:
        return made.from_string(text)
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template is no template: {error}") from error
