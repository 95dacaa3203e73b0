"""Chat templates written for the tests with the constructs of published ones, and the chats that they are held to."""

from __future__ import annotations

from typing import Any

CHATML = """
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
"""SmolLM2, Qwen2."""

LLAMA3 = """
{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not tools_in_user_message is defined %}{% set tools_in_user_message = true %}{% endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{% set messages = messages[1:] %}
{%- else %}{% set system_message = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{ "Environment: ipython\\n" }}{% endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {{- "You may call: " }}{% for t in tools %}{{ t | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}
{%- endif %}
{{- system_message }}{{ "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}{% set messages = messages[1:] %}
    {%- else %}{{ raise_exception("Cannot put tools in the first user message when there is none!") }}{% endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer with a call as JSON.\\n\\n' -}}
    {%- for t in tools %}{{ t | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}{{ first_user_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}{{ tool_call.arguments | tojson }}{{ "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}
        {%- else %}{{ message.content }}{% endif %}{{ "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
"""Llama 3.1 to 3.3: a date, tools in the first message, one call at a time."""

MISTRAL = """
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{% set loop_messages = messages[1:] %}
{%- else %}{% set loop_messages = messages %}{% endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}{% set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if message.role in ["user", "assistant"] and message.tool_calls is not defined %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}{% set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{ '"' + key + '": "' + val + '"' }}
                    {%- else %}{{ '"' + key + '": ' + val|tojson }}{% endif %}
                    {%- if not loop.last %}{{ ", " }}{% endif %}
                {%- endfor %}{{ "}}" }}{% if not loop.last %}{{ ", " }}{% else %}{{ "]" }}{% endif %}
            {%- endfor %}{{ "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{ "[INST] " + message["content"] + "[/INST]" }}{% endif %}
    {%- elif message["role"] == "assistant" and message.tool_calls is defined %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}{{ tool_call.function|tojson }}{% endfor %}{{ "]" + eos_token }}
    {%- elif message["role"] == "assistant" %}{{ " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] in ["tool_results", "tool"] %}
        {%- set content = message.content.content if message.content.content is defined else message.content %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + "}[/TOOL_RESULTS]" }}
    {%- else %}{{ raise_exception("Only user and assistant roles are supported, got " + message["role"]) }}{% endif %}
{%- endfor %}
"""
"""Mistral v0.3: alternation through a namespace, filters of a loop, selectattr."""

GEMMA = """
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% if messages[0]['content'] is string %}
{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{% else %}
{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{% endif %}
{%- set loop_messages = messages[1:] -%}{% else %}
{%- set first_user_prefix = "" -%}{% set loop_messages = messages -%}{% endif %}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}
"""
"""Gemma 3: content in parts, the system prompt inside the first message."""

SMOLLM3 = """
{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{%- set reasoning_mode = "/think" if enable_thinking else "/no_think" %}
{{- "<|im_start|>system\\n## Metadata\\n\\nToday Date: " ~ strftime_now("%d %B %Y") ~ "\\n" }}
{{- "Reasoning Mode: " + reasoning_mode + "\\n\\n" -}}
{%- if messages[0].role == "system" %}
    {%- set custom = messages[0].content.replace("/no_think", "").replace("/think", "").rstrip() %}{{ custom + "\\n" }}
{%- endif %}
{%- if xml_tools or tools %}
    {%- set ns = namespace(xml_tool_string="<tools>\\n") %}
    {%- for tool in (xml_tools or tools) %}
        {%- set ns.xml_tool_string = ns.xml_tool_string ~ (tool | string) ~ "\\n" %}
    {%- endfor %}{{ ns.xml_tool_string + "</tools>\\n" }}
{%- endif %}
{{- "<|im_end|>\\n" }}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else "" %}
    {%- if message.role == "user" %}{{ "<|im_start|>user\\n" + content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" %}
        {%- generation %}
        {%- set inner = content.lstrip("\\n") %}
        {{- "<|im_start|>assistant\\n" + (inner if enable_thinking else "<think>\\n\\n</think>\\n" + inner) }}
        {{- "<|im_end|>\\n" }}
        {%- endgeneration %}
    {%- elif message.role == "tool" %}{{ "<|im_start|>user\\n" + content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" if enable_thinking else "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" }}
{%- endif %}
"""
"""SmolLM3: the date of today, {% generation %}, a switch for thinking."""

QWEN3 = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- "# Tools\\n<tools>" }}{% for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{% endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and
           not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{% set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{% set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content.lstrip('\\n') }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{ tool_call.arguments }}
            {%- else %}{{ tool_call.arguments | tojson }}{% endif %}{{ '}\\n</tool_call>' }}
        {%- endfor %}{{ '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
"""Qwen3: a loop from the end, thinking that is kept after the last question only, tool answers joined."""

DEEPSEEK = """
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(is_first=false, is_tool=false, system_prompt='', is_first_sp=true) %}
{%- for message in messages %}{% if message['role'] == 'system' %}
{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}
{%- set ns.is_first_sp = false %}
{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{% endif %}
{%- endif %}{% endfor %}{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{% continue %}{% endif %}
{%- if message['role'] == 'user' %}{% set ns.is_tool = false %}{{ '<｜User｜>' + message['content'] }}{% endif %}
{%- if message['role'] == 'assistant' and 'tool_calls' in message %}
    {%- set ns.is_tool = false %}
    {%- for tool in message['tool_calls'] %}
        {{- '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n```json\\n' }}
        {{- tool['function']['arguments']|tojson(ensure_ascii=true, sort_keys=true, separators=[',', ':']) }}
        {{- '\\n```<｜tool▁call▁end｜>' }}
    {%- endfor %}
{%- elif message['role'] == 'assistant' %}
    {%- set content = message['content'] %}
    {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
    {{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
{%- endif %}
{%- if message['role'] == 'tool' %}
    {%- set ns.is_tool = true %}{{ '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}
{%- endif %}
{%- if loop.index > 100 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.is_tool %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}
"""
"""DeepSeek: continue and break, JSON with options, no line ends but its own."""

PHI = """
{%- if messages and messages[0]['role'] == 'system' and 'tools' in messages[0] and messages[0]['tools'] is not none %}
{{- '<|system|>' + messages[0]['content'] + '<|tool|>' + messages[0]['tools'] + '<|/tool|>' + '<|end|>' }}
{%- endif %}
{%- for message in messages %}
{%- if message['content'] %}{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}
"""
"""Phi 4 mini: tools as text in the system message, empty content."""

RAG = """
{%- macro show(document, number=0) %}Document: {{ number }}
{{ document.title }} {{ document['text'] | replace('<', '&lt;') }}
{% endmacro %}
{%- set d = dict(count=documents | length) if documents else dict.fromkeys(['count'], 0) %}
{{- pad_token ~ (unk_token or 'no unk') ~ (sep_token is defined) ~ '\\n' ~ d.count ~ '\\n' }}
{%- for document in documents or [] %}{{ show(document, loop.index0) }}{% endfor %}
{%- for message in messages if message.role != 'system' %}
{%- for part in message.content.split('\\n') %}{% if part == 'STOP' %}{% break %}{% endif %}
{{- loop.index ~ (': %s' | format(part)) | indent(2, true) }}
{%- endfor %}{% endfor %}
{%- set x = 1 %}{% for i in range(3) %}{% set x = i %}{% endfor %}{{ x }}
{%- generation %}{% set x = 7 %}{{ x }}{% endgeneration %}{{ x }}{{ nothing }}{{ nothing is defined }}
{{- {'b': '<&>é', 'a': [1, 2.5, none, true]} | tojson }}
{{- add_generation_prompt }}
"""
"""Command R and corner cases: documents, macros, dict, what is set where, what is not defined."""

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "smollm3": SMOLLM3,
    "qwen3": QWEN3,
    "deepseek": DEEPSEEK,
    "phi": PHI,
    "rag": RAG,
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather at a place, in \u00b0C <or> \u00b0F & more.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "enum": ["Zürich", "東京"]}, "days": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
_CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"place": "東京", "days": 2}}}
_DIALOGUE = [
    {"role": "user", "content": "  What is <b>1 & 1</b>?\nSTOP\nnaïve 🙂 "},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\nTwo. "},
    {"role": "user", "content": 'And "two" and two?'},
]
CHATS: dict[str, dict[str, Any]] = {
    "one question": {"messages": [{"role": "user", "content": "Hi there"}]},
    "dialogue": {"messages": _DIALOGUE},
    "system": {"messages": [{"role": "system", "content": "Be brief. /no_think "}, *_DIALOGUE]},
    "no generation prompt": {"messages": _DIALOGUE[:2], "add_generation_prompt": False},
    "tools": {"messages": [{"role": "user", "content": "Weather?"}], "tools": [WEATHER, WEATHER]},
    "tool call": {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "get_weather", "content": '{"rain": true}'},
        ],
        "tools": [WEATHER],
    },
    "two tool calls": {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [_CALL] * 2}]
    },
    "system and tools": {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}],
        "tools": [WEATHER],
        "tools_in_user_message": False,
        "date_string": "1 Jan 2020",
    },
    "thinking off": {"messages": _DIALOGUE, "enable_thinking": False},
    "reasoning": {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2", "reasoning": "one and one"},
        ]
    },
    "documents": {
        "messages": [{"role": "user", "content": "Who?"}],
        "documents": [{"title": "A", "text": "It was <him>."}, {"title": "B", "text": "Or her."}],
    },
    "parts": {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What? "}]}]},
    "roles do not alternate": {"messages": [_DIALOGUE[0], _DIALOGUE[0]]},
    "an unknown role": {"messages": [{"role": "narrator", "content": "It rains."}]},
}
"""What is passed to ``apply_chat_template`` and to ``chat_prompt`` alike."""
