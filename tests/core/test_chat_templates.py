"""Chat templates: as transformers renders them, and ended in one line where they are hostile."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import caliport
from caliport.core.checkpoints import encode_prompt, render_prompt
from caliport.core.errors import InputError
from caliport.core.model_files import chat_templates
from caliport.core.model_files.chat_templates import render_chat
from caliport.core.model_files.templates_child import TODAY
from tests.commands import ENVIRONMENT

LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|system|>Today Date: " + date_string + "\\n" + system_message }}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '\\n\\n' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n\\n' }}{%- endif %}"""
GEMMA = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate') }}{% endif %}
{{ '<turn>' + ('model' if message['role'] == 'assistant' else message['role']) }}
{{ message['content'] | trim }}<end>
{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"""
OTHERS = """{% set ns = namespace(found=false, seen=dict(a=1)) %}{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
{% generation %}{{ m | tojson(indent=2) }}{{ m.content | tojson }}{% endgeneration %}
{% set ns.found = true %}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}
{% macro show(x) %}[{{ x }}]{% endmacro %}{{ show(ns.found) }}{{ tools is none }}{{ documents }}
{{ pad_token }}{{ unknown }}{{ messages | map(attribute='role') | list }}{{ ns.seen }}"""
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(9999) %}"


@pytest.fixture(scope="module")
def tokenizer(base_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base_dir)


@pytest.mark.parametrize(
    "template",
    [None, LLAMA, GEMMA, OTHERS, {"default": PLAIN, "tool_use": "{{ 1 / 0 }}"}],
    ids=["ours", "llama", "gemma", "others", "list"],
)
@pytest.mark.parametrize("text", ["Hi", "", "  ä中😀 \u2028 <|end|> {{ 1 }}\r\n"])
def test_renders_as_transformers_does(
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    template: str | dict[str, str] | None,
    text: str,
) -> None:
    if template is not None:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    turns = [{"role": "user", "content": text}]
    if template != GEMMA:
        turns = [{"role": "system", "content": "Be kind."}, *turns]
    user = [{"role": "user", "content": text}]

    def theirs(chat: list[dict[str, str]], asks: bool) -> str:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=asks)
        return str(text).replace(f"{datetime.now():%d %b %Y}", f"{TODAY:%d %b %Y}")

    assert render_chat(tokenizer, turns) == theirs(turns, True)
    assert render_chat(tokenizer, turns, asks=False) == theirs(turns, False)
    assert render_prompt(tokenizer, text) == theirs(user, True)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (f"{LOOPS}{{% endfor %}}{{% endfor %}}{{% endfor %}}", "renders for more than"),
        ("{{ ('a' * 10000000000) | length }}", "takes more than 1,024 MB of memory"),
        ("{{ 'a' * 50000000 }}", "expected at most 1,000,000"),
        ("{{ range(1000000000) | list }}", "OverflowError: Range too big"),
        ("{% set x = [0] * 1000000000 %}{{ x }}", "takes more than 1,024 MB of memory"),
        ("{{ 9 ** (9 ** 9) > 1 }}", "renders for more than"),
        ("{{ lipsum(n=1000000) }}", "'lipsum' is undefined"),
        ("{{ lipsum.__globals__['os'].popen('touch /tmp/x') }}", "'lipsum' is undefined"),
        ("{{ [1, 2] | random }}", "No filter named 'random'"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ raise_exception('no\n\x1b[31msystem') }}", "TemplateError: no \\x1b[31msystem"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{% include '/etc/passwd' %}", "no loader for this environment"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 100_000 + ")" * 100_000 + " }}", "chat template: "),
        ({"rag": PLAIN, "tool_use": PLAIN}, "found only rag, tool_use; expected one named default"),
        (7, "found int, expected text"),
    ],
)
def test_a_hostile_template_ends_in_one_line(
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    template: object,
    expected: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", template)
        with pytest.raises(InputError) as caught:
            encode_prompt(tokenizer, "Hi")
    said = str(caught.value)
    assert expected in said
    assert said.startswith(f"{tokenizer.name_or_path}: chat template: ")
    assert len(said) < 500
    assert render_prompt(tokenizer, "Hi"), "the next one is rendered"


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ range(1000000000) | list }}"])
def test_no_artifact_ships_one_that_cannot_be_rendered(
    base_dir: Path, tmp_path: Path, template: str
) -> None:
    base = shutil.copytree(base_dir, tmp_path / "base")
    (base / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match="base: chat template: "):
        caliport.export(base, tmp_path / "out", runtime="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_many_are_rendered_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    render_prompt(tokenizer, "warm")
    start = time.process_time()
    for number in range(200):
        render_prompt(tokenizer, f"text {number}")
    assert time.process_time() - start < 0.4


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.usefixtures("ctrl_c")
def test_the_child_ends_with_its_parent(base_dir: Path, how: signal.Signals) -> None:
    code = f"""
import time
from caliport.core import checkpoints
from caliport.core.model_files import chat_templates
checkpoints.render_prompt(checkpoints.load_tokenizer({str(base_dir)!r}), "Hi")
print(*[child.pid for child in chat_templates._children.values()], flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(how)
    parent.wait(timeout=20)
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(process: int) -> bool:
    """Whether a process is there, zombies not counted."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_forked_process_has_a_child_of_its_own(tokenizer: PreTrainedTokenizerBase) -> None:
    expected = render_prompt(tokenizer, "Hi")
    read, write = os.pipe()
    if (forked := os.fork()) == 0:
        os.write(write, str(render_prompt(tokenizer, "Hi") == expected).encode())
        chat_templates._end_all()
        os._exit(0)
    os.close(write)
    assert os.read(read, 10) == b"True"
    os.close(read)
    os.waitpid(forked, 0)
    assert render_prompt(tokenizer, "Hi") == expected
