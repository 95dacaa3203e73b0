"""Chat templates: the text is transformers', a template's own refusal is heard, and none can do harm."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jinja2
import pytest
from chat_templates import CHATS, TEMPLATES, WEATHER
from tiny_models import write_tokenizer
from transformers import AutoTokenizer

from skv_export.errors import SkvError
from skv_export.runtime import chat_template, prompts
from skv_export.runtime.prompts import chat_prompt

ONE = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 96)
    path = folder / "tokenizer_config.json"
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}, "pad_token": "<pad>"}
    path.write_text(json.dumps(json.loads(path.read_text()) | special))
    return folder


def with_template(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def in_this_process(folder: Path, request: str) -> dict[str, str]:
    """Stands in for the process of its own, which is tested apart: 150 of them would take long."""
    values = json.loads(request)
    return chat_template.answer(values["template"], values["values"])


def options_of(chat: dict[str, Any]) -> dict[str, Any]:
    """A chat's arguments of ``apply_chat_template`` as those of ``chat_prompt``."""
    ours = ("messages", "tools", "documents", "add_generation_prompt")
    variables = {name: value for name, value in chat.items() if name not in ours}
    return {**{name: chat[name] for name in ours if name in chat}, "variables": variables}


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_render", in_this_process)
    tokenizer = AutoTokenizer.from_pretrained(with_template(folder, TEMPLATES[name]))
    rendered = 0
    for chat in CHATS.values():
        given = {"add_generation_prompt": True, **chat}
        messages = given.pop("messages")
        try:
            expected = tokenizer.apply_chat_template(messages, tokenize=False, **given)
        except (jinja2.TemplateError, TypeError, IndexError, AttributeError, KeyError) as error:
            with pytest.raises(SkvError, match=re.escape(str(error))):
                chat_prompt(folder, **options_of(chat))
        else:
            assert chat_prompt(folder, **options_of(chat)) == expected
            rendered += 1
    assert rendered >= 9


def test_the_process_of_its_own_gives_the_same_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(with_template(folder, TEMPLATES["qwen3"]))
    chat = CHATS["tool call"]
    expected = tokenizer.apply_chat_template(chat["messages"], tools=chat["tools"], tokenize=False)
    assert chat_prompt(folder, chat["messages"], tools=chat["tools"], add_generation_prompt=False) == expected


def test_the_templates_own_message_is_heard(folder: Path) -> None:
    with_template(folder, TEMPLATES["mistral"])
    with pytest.raises(SkvError, match="refuses these messages; got Only user and assistant roles are supported"):
        chat_prompt(folder, [{"role": "narrator", "content": "It rains."}])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for x in messages %}", r"TemplateSyntaxError.*line 1"),
        ("{{ messages.pop() }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% set ns = namespace(__init__=1) %}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ none.x.y }}", "UndefinedError"),
        ("{% include 'x' %}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ range(1000000) | list }}", "OverflowError"),
    ],
)
def test_faulty_and_hostile_templates_are_clear_errors(template: str, said: str, folder: Path) -> None:
    with pytest.raises(SkvError, match=f"its chat template can't be rendered; got .*{said}"):
        chat_prompt(with_template(folder, template), ONE)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10000000000 }}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'x'.center(2000000000) }}",
        "{{ 'x' * 30000000 }}",
    ],
)
def test_a_template_cannot_fill_the_memory(template: str, folder: Path) -> None:
    with pytest.raises(SkvError, match="exceeds its memory"):
        chat_prompt(with_template(folder, template), ONE)


def test_a_template_cannot_compute_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    program = Path(chat_template.__file__).read_text().replace("MAX_CPU_SECONDS = 5", "MAX_CPU_SECONDS = 1")
    (folder / "chat_template.py").write_text(program)
    (folder / "prompts.py").touch()
    monkeypatch.setattr(prompts, "__file__", str(folder / "prompts.py"))
    start = time.process_time()
    with pytest.raises(SkvError, match="exceeds the time that it may compute"):
        chat_prompt(with_template(folder, endless), ONE)
    assert time.process_time() - start < 1  # of this process: the other one computed
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 0.01)
    with pytest.raises(SkvError, match=r"exceeds 0\.01 seconds"):
        chat_prompt(folder, ONE)


def test_templates_for_tools_are_chosen_as_transformers_chooses_them(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].type }}"}]

    def both(tools: Any) -> tuple[str, str]:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        return tokenizer.apply_chat_template(ONE, tools=tools, tokenize=False), chat_prompt(tmp_path, ONE, tools=tools)

    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert both(None) == ("plain", "plain") and both([WEATHER]) == ("function", "function")
    with_template(tmp_path, "from the file")
    assert both([WEATHER]) == ("from the file", "from the file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("of the folder")
    assert both(None) == ("from the file", "from the file") and both([WEATHER]) == ("of the folder", "of the folder")


def test_wrong_messages_are_clear_errors(folder: Path) -> None:
    with_template(folder, TEMPLATES["chatml"])
    with pytest.raises(SkvError, match="a chat message; got str; expected a dictionary"):
        chat_prompt(folder, "hello")  # type: ignore[arg-type]
    with pytest.raises(SkvError, match="chat messages; got none"):
        chat_prompt(folder, [])
    with pytest.raises(SkvError, match="a tool as its JSON schema"):
        chat_prompt(folder, ONE, tools=[print])  # type: ignore[list-item]
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(SkvError, match="no chat template"):
        chat_prompt(folder, ONE)


def test_the_program_needs_jinja2_alone() -> None:
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1]);"
        "print(*{name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    )
    path = str(chat_template.__file__)
    output = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    assert not {"numpy", "torch", "transformers", "skv_export", "tokenizers"} & set(output.split())
