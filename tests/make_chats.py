"""What `transformers` makes of chats by templates like those that are published: tests/golden/chats.json.

Not part of the tests, which need no transformers. To make the fixture again (no PyTorch is needed):

    python3 -m venv /tmp/peer && /tmp/peer/bin/pip install transformers==5.23.0 jinja2
    /tmp/peer/bin/python tests/make_chats.py
"""

import itertools
import json
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "chats.json"

# ChatML with the answers marked, a system prompt where none is given, and whitespace control around all of it
CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# as Llama 3's: headers, trimmed contents, and blocks whose line ends the environment must take away
LLAMA3 = """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}
    {{ raise_exception('unknown role ' + message['role']) }}
{% endif %}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>{% endfor %}
{% if add_generation_prompt %}
<|start_header_id|>assistant<|end_header_id|>

{% endif %}
"""
# tools (asked for by `is not none`, as many do), calls as JSON, answers of tools gathered into one turn, thoughts in the last turn
TOOLS = """\
{%- set state = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set state.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools is not none %}
    {{- '<|system|>\\nTools:' }}
    {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
    {{- '<|end|>\\n' }}
{%- endif %}
{%- if documents is not none %}{{ '<|documents|>' }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{ '<|user|>\\n' }}{% endif %}
        {{- '<result>' + message.content + '</result>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|end|>\\n' }}{% endif %}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|>\\n' }}
        {%- if message.reasoning_content is defined and loop.index0 > state.last %}
            {{- '<think>' + message.reasoning_content + '</think>' }}
        {%- endif %}
        {%- if message.content is defined %}{{ message.content }}{% endif %}
        {%- for call in message.tool_calls | default([]) %}
            {{- '<call>' + call.function.name + ' ' + (call.function.arguments | tojson(indent=1)) + '</call>' }}
        {%- endfor %}
        {{- '<|end|>\\n' }}
    {%- else %}
        {{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "tools": TOOLS}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather <in> a städtchen & more",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


def said(role, content=None, **more):
    """A message; what is None stays in it, as tables leave it."""
    return dict(role=role, content=content, **more)


def call(**arguments):
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


TALKS = {
    "two turns": [said("user", " hi\n"), said("assistant", "hello"), said("user", "bye"), said("assistant", "so long\n")],
    "system": [said("system", 'be <kind> & "short"'), said("user", "héllo"), said("assistant", "☀")],
    "empty fields": [
        said("user", "hi", tool_calls=None, name=None),
        said("assistant", "hello", tool_calls=None, thinking=None),
    ],
    "calls": [
        said("user", "rain?"),
        said("assistant", None, tool_calls=[call(place="Ulm"), call(place="<Köln>")], thinking="I must look"),
        said("tool", "dry", tool_calls=None),
        said("tool", "wet", tool_calls=None),
        said("assistant", "In Köln.", tool_calls=None, reasoning="dry & wet"),
    ],
}
CASES = [
    (template, talk, tools)
    for template, talk, tools in itertools.product(TEMPLATES, TALKS, (False, True))
    if talk != "calls" or template == "tools"
]


def letters(texts):
    """A tokenizer with a token for each letter: its mask of what the assistant says is one of letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(set("".join(texts)))
    fast = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(["[U]", *alphabet])}, unk_token="[U]"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>")


def main():
    made, codec = [], letters(["<s>"])
    for template, talk, tools in CASES:
        messages = TALKS[talk]
        options = dict(chat_template=TEMPLATES[template], tools=[WEATHER] if tools else None)
        first = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
        text = codec.apply_chat_template(messages, tokenize=False, **options)
        prompt = codec.apply_chat_template(messages[:first], tokenize=False, add_generation_prompt=True, **options)
        found = {"template": template, "talk": talk, "tools": tools, "text": text, "prompt": prompt}
        if "endgeneration" in TEMPLATES[template]:
            mask = letters([text]).apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
            runs = itertools.groupby(zip(text, mask["assistant_masks"], strict=True), key=lambda pair: pair[1])
            found["said"] = ["".join(letter for letter, _ in run) for counted, run in runs if counted]
        made.append(found)
    GOLDEN.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
