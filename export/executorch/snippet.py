"""Python code for a model card that runs a program from its directory."""

from __future__ import annotations

import json

BUNDLE_NOTE = (
    "Every composition is a method of this form, and `forward` is the base alone. "
    "`TextLLMRunner` runs `forward` in Python; in C++ `create_text_llm_runner` takes the name of a "
    "method."
)
_STOCK = """\
import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
prompt = {prompt}
settings = GenerationConfig(
    max_new_tokens=64, temperature=0.0, echo=False, num_bos={begins}, num_eos=0
)
TextLLMRunner("model.pte", "tokenizer.json").generate(prompt, settings)  # it prints"""
_METHOD = """\
import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized
import torch
from executorch.extension.pybindings.portable_lib import _load_for_executorch
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
program = _load_for_executorch("model.pte")
prompt = {prompt}
tokens = tokenizer(prompt, add_special_tokens={special})["input_ids"]
ends = set(program.run_method("get_eos_ids", []))
position, written = 0, []
while len(written) < 64 and not ends.intersection(written):
    inputs = [torch.tensor([tokens]), torch.tensor([position])]
    logits = program.run_method("{composition}", inputs)[0]
    position, tokens = position + len(tokens), [int(logits.argmax())]
    written += tokens
print(tokenizer.decode(written))"""
_CHAT = """\
tokenizer.apply_chat_template(
    [{"role": "user", "content": {text}}], tokenize=False, add_generation_prompt=True
)"""


def code(composition: str | None, chat: bool, text: str) -> str:
    """Python code that runs a program, or a composition of a bundle.

    Args:
        composition: A method of the program; None runs ``forward`` with the stock runner.
        chat: Whether the tokenizer has a chat template.
        text: What the user says.
    """
    return (_STOCK if composition is None else _METHOD).format(
        prompt=_CHAT.replace("{text}", json.dumps(text)) if chat else json.dumps(text + "\n"),
        begins=0 if chat else 1,
        special=not chat,
        composition=composition,
    )
