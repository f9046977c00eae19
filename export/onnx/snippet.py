"""Python code for a model card that runs a graph with onnxruntime-genai from its directory."""

from __future__ import annotations

import json

BUNDLE_NOTE = (
    "Without `set_active_adapter` the base alone answers; one loaded model switches from "
    "composition to composition."
)
_CODE = """\
import json
import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # else ONNX Runtime sends usage events; an app too

import onnxruntime_genai as genai

model = genai.Model(".")
{load}tokenizer = genai.Tokenizer(model)
prompt = {prompt}
settings = genai.GeneratorParams(model)
settings.set_search_options(max_length={context}, do_sample=False)
generator = genai.Generator(model, settings)
{activate}generator.append_tokens(tokenizer.encode(prompt))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))"""
_LOAD = """\
adapters = genai.Adapters(model)
adapters.load("{composition}.onnx_adapter", "{composition}")
"""
_ACTIVATE = """\
generator.set_active_adapter(adapters, "{composition}")
"""
_CHAT = """\
tokenizer.apply_chat_template(
    json.dumps([{"role": "user", "content": {text}}]), add_generation_prompt=True
)"""


def code(composition: str | None, chat: bool, context: int, text: str) -> str:
    """Python code that runs a graph, with a composition of a bundle if one is named.

    Args:
        composition: Name of the composition; None for the graph without one.
        chat: Whether the tokenizer has a chat template.
        context: Maximum number of tokens, prompt and answer together.
        text: What the user says.
    """
    return _CODE.format(
        prompt=_CHAT.replace("{text}", json.dumps(text)) if chat else json.dumps(text + "\n"),
        context=context,
        load=_LOAD.format(composition=composition) if composition else "",
        activate=_ACTIVATE.format(composition=composition) if composition else "",
    )
