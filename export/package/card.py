"""The model card of an artifact: ``README.md``, written from its manifest entries.

The card has no dates, times or paths, so that the same inputs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.directories import MANIFEST, read_manifest, versions
from caliport.core.errors import printable
from caliport.core.files import ADAPTER_CONFIG, CHAT_TEMPLATE
from caliport.core.model_files.gguf_base import is_gguf
from caliport.core.prompts import PLAIN, PROMPT, put_in, recorded_prompt
from caliport.core.untrusted import read_object
from caliport.export import runtime as runtimes
from caliport.export.decoder.parts import cache_shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CARD = "README.md"

_TEMPLATE = "card.md.j2"
_LONGEST = 80  # characters of a module's name, and
_MODULES = 64  # names of modules that a card lists


def describe(
    base: str | Path, config: PreTrainedConfig, adapter: str | Path | None
) -> dict[str, Any]:
    """Manifest entries ``base`` and ``adapter``, which describe what was exported.

    A base is named only if it was given by hub name, or as a ``.gguf`` file, by the file's: a local
    path means nothing elsewhere.
    """
    text = config.get_text_config()
    heads, head_size = cache_shape(config)
    name = str(base) if isinstance(base, str) and not Path(base).exists() else None
    file = {"file": printable(Path(base).name, _LONGEST)} if is_gguf(base) else {}
    return {
        "base": {
            "name": name,
            **file,
            "architecture": (config.architectures or [type(config).__name__])[0],
            "layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "vocab_size": text.vocab_size,
            "cache_values": 2 * text.num_hidden_layers * heads * head_size,  # of one token
        },
        "adapter": None if adapter is None else describe_adapter(Path(adapter)),
    }


def describe_adapter(directory: Path) -> dict[str, Any]:
    """Ranks and target modules from ``adapter_config.json``; method and parts from its manifest."""
    config = read_object(directory / ADAPTER_CONFIG)
    settings = config if "peft_type" in config else config.get("lora_parameters") or {}  # mlx-lm
    modules = settings.get("keys") or config.get("target_modules") or []
    if isinstance(modules, list):
        modules = {str(name).rpartition(".")[2] for name in modules}
    else:
        modules = {str(modules)}
    ranks = {settings.get("r", settings.get("rank")), *(config.get("rank_pattern") or {}).values()}
    facts: dict[str, Any] = {
        "type": config.get("peft_type", "LORA"),
        "ranks": sorted(ranks),
        "modules": sorted(printable(name, _LONGEST) for name in modules)[:_MODULES],
    }
    if (directory / MANIFEST).is_file():
        facts |= {"method": None, "composed_of": []} | origin_of(read_manifest(directory))
    prompt = recorded_prompt(directory)
    return facts if prompt is None else facts | {PROMPT: prompt}


def origin_of(manifest: Mapping[str, Any], composition: str | None = None) -> dict[str, Any]:
    """By what ``method`` an adapter was made and what it was ``composed_of``, where known.

    Args:
        manifest: Of the adapter, or of a training for several compositions.
        composition: Of several, the one whose parts are asked for.
    """
    chosen = manifest.get("chosen", manifest)  # of a sweep, the training that was kept
    inputs, settings = (_object(_object(chosen).get(name)) for name in ("inputs", "settings"))
    labels = [label.partition("adapter ") for label in inputs]
    parts = manifest.get("composed_of") or sorted(
        part for name, mark, part in labels if mark and composition in (None, name.strip())
    )
    method = manifest.get("method") or settings.get("method")
    found: dict[str, Any] = {}
    if isinstance(method, str):
        found["method"] = method
    if isinstance(parts, list) and parts and all(isinstance(part, str) for part in parts):
        found["composed_of"] = parts
    return found


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def write_card(directory: Path, facts: Mapping[str, Any]) -> None:
    """Write ``README.md``, a Hugging Face model card, beside an artifact's other files.

    Args:
        directory: The artifact, complete except for its card and manifest.
        facts: The manifest entries: runtime, precision, context, scheme, lowering, those of
            ``describe``, and ``bundle`` if it is one.
    """
    from huggingface_hub import ModelCard, ModelCardData

    precision, base = facts["precision"], facts["base"]
    runtime = runtimes.get(facts["runtime"])
    sizes = sorted((p.name, p.stat().st_size) for p in directory.iterdir() if p.is_file())
    chat = any(name == CHAT_TEMPLATE for name, _ in sizes)
    found = versions()
    compositions = facts.get("bundle", {}).get("compositions", {})
    kind, adapter = "A decoder", _adapter_words(facts["adapter"])
    if compositions:
        kind, adapter = "A decoder with LoRA compositions beside it", "none folded in"
    elif facts["adapter"]:
        kind = "A decoder with a LoRA adapter folded in"
    adapters = {name: c["lora"] for name, c in compositions.items()} or {"": facts["adapter"] or {}}
    prompts = {name: lora.get(PROMPT, PLAIN) for name, lora in adapters.items()}
    asked = put_in(next(iter(prompts.values())), "Hello")
    data = ModelCardData(
        base_model=base["name"],
        library_name=runtime.name,
        pipeline_tag="text-generation",
        tags=[
            "caliport",
            runtime.name,
            precision,
            *(["lora"] if facts["adapter"] or compositions else []),
        ],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name(_TEMPLATE)),
        title=runtime.title,
        kind=kind,
        architecture=base["architecture"],
        base=base,
        adapter_line=adapter,
        compositions=[(name, _composition_words(c)) for name, c in compositions.items()],
        precision=precision,
        backend=facts["lowering"]["backend"],
        parts=[(part, _scheme_words(scheme)) for part, scheme in facts["scheme"].items()],
        context=facts["context"],
        chat=chat,
        sizes=sizes,
        needs=", ".join(f"{package} {found[package]}" for package in runtime.needs),
        runner=runtime.runner_words(bool(compositions)),
        prompts=[(name, _indented(prompt)) for name, prompt in prompts.items() if prompt != PLAIN],
        code=runtime.code(next(iter(compositions), None), chat, facts["context"], asked),
        note=runtime.bundle_note if compositions else None,
        versions=found,
        packages=sorted(found.items()),
    )
    (directory / CARD).write_text(card.content.strip() + "\n", encoding="utf-8")


def _indented(prompt: str) -> str:
    """A prompt as an indented block of Markdown, in which nothing is markup."""
    return "\n".join("    " + printable(line, len(line) + 1) for line in prompt.split("\n"))


def _composition_words(facts: Mapping[str, Any]) -> str:
    words = f"{_adapter_words(facts['lora'])}; {facts['bytes']:,} bytes of its own"
    if facts.get("stands_on"):
        words += f", on the shared {', '.join(facts['stands_on'])}"
    return words


def _adapter_words(adapter: Mapping[str, Any] | None) -> str:
    if adapter is None:
        return "none, the base alone"
    words = f"{adapter['type']} of rank {', '.join(map(str, adapter['ranks']))}"
    words += f" on {', '.join(f'`{name}`' for name in adapter['modules'])}"
    if adapter.get("method"):
        words += f", made by `{adapter['method']}`"
    if adapter.get("composed_of"):
        words += f" from {', '.join(adapter['composed_of'])}"
    return words


def _scheme_words(scheme: Mapping[str, Any]) -> str:
    """Format a scheme: ``4 bits per group of 32, hqq_scale_only, symmetric, scale bfloat16``."""
    words = f"{scheme['bits']} bits"
    if "granularity" in scheme:
        words += f" per {scheme['granularity']}"
    if "group_size" in scheme:
        words += f" of {scheme['group_size']}"
    rest = [str(scheme[key]) for key in ("kind", "algorithm") if key in scheme]
    if "symmetric" in scheme:
        rest.append("symmetric" if scheme["symmetric"] else "asymmetric")
    if "scale" in scheme:
        rest.append(f"scale {scheme['scale']}")
    return ", ".join([words, *rest])
