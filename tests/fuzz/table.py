"""Small examples of what once ended badly, each with whether only a refusal is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.fuzz.cases import EXPORT, TEMPLATES, YAMLS
from tests.fuzz.changes import (
    Change,
    Example,
    data_at,
    edit,
    first_line,
    index_of,
    key_twice,
    link_to,
    pipe_at,
    set_fields,
    signed,
    write,
)
from tests.fuzz.mutate import ANSI, Raw, deep, dump
from tests.fuzz.seeds import BASE, BOTH, DATA

MERGE = ("calibrate", *BOTH, "--method", "linear", "--out", "out")
TRAIN = ("calibrate", *BOTH, "--method", "lc", *DATA, "--out", "out")
FLIX = ("calibrate", *BASE, "--method", "flix", *DATA, "--rank", "x=2", "--out", "out")
AUDIT = ("audit", "first", "second")
RUN = ("run", "recipe.yaml")
REPORT = ("report", "runs/tiny")
SHOW = ("baseline", "show", "baseline.json")
QUICK = ("--prompt-tokens", "4", "--new-tokens", "2", "--repetitions", "1", "--threads", "1")
BENCH = ("bench", "onnx", *QUICK)
CHECK = ("validate", "onnx", *BASE, "--adapter", "first", "--no-latency")

_CONFIG, _SETTINGS = "second/adapter_config.json", "base/config.json"
_GENAI, _MANIFEST = "onnx/genai_config.json", "onnx/manifest.json"
_SESSION = "model__decoder__session_options__"
_NUMBERS: tuple[tuple[str, Any], ...] = (
    *(("lora_alpha", value) for value in (1e38, 1e308, True, None, "16", -(10**400), 10**400)),
    *(("lora_alpha", Raw(text)) for text in ("NaN", "Infinity", "1e400", "1" * 5000)),
    *(("r", value) for value in (2.5, True, 0, -2, 10**30, "2", None, Raw("2.0000001"))),
)
_INVALID = ("(", "*a", "x{99999999}")  # the others are valid and match nothing
_ADAPTERS = [
    *[Example(f"{k} = {str(v)[:12]}", edit(_CONFIG, **{k: v}), MERGE) for k, v in _NUMBERS],
    *[
        Example(f"{kind} {text!r}", edit(_CONFIG, **{kind: {text: 2}}), MERGE, text in _INVALID)
        for kind in ("rank_pattern", "alpha_pattern")
        for text in (*_INVALID, "(a+)+$", "(a|a)*b", "(.*)*(.*)*(.*)*(.*)*x")
    ],
    Example("rank_pattern a list", edit(_CONFIG, rank_pattern=[1]), MERGE),
    Example("rank 10^30 by pattern", edit(_CONFIG, rank_pattern={"q_proj": 10**30}), MERGE),
    Example("alpha NaN by pattern", edit(_CONFIG, alpha_pattern={"q_proj": Raw("NaN")}), MERGE),
    Example("peft_type with a newline", edit(_CONFIG, peft_type="LORA\n"), MERGE),
    Example("peft_type of escapes", edit(_CONFIG, peft_type=ANSI), MERGE),
    Example("peft_type a list", edit(_CONFIG, peft_type=["LORA"]), AUDIT),
    Example("bias of escapes", edit(_CONFIG, bias=ANSI), MERGE),
    Example("unknown key of escapes", edit(_CONFIG, **{ANSI: True}), MERGE, False),
    Example("a key of 1 MB", edit(_CONFIG, **{"k" * 10**6: True}), MERGE, False),
    Example("base of escapes", edit(_CONFIG, base_model_name_or_path=ANSI), MERGE, False),
    Example("r twice", key_twice(_CONFIG, "r", 3), MERGE, False),
    Example("nested 10,000 deep", edit(_CONFIG, more=deep(10_000)), MERGE),
    Example("settings a device", link_to(_CONFIG, "/dev/zero"), MERGE),
    Example("settings a pipe", pipe_at(_CONFIG), MERGE),
    Example("weights a pipe", pipe_at("second/adapter_model.safetensors"), MERGE),
    Example("weights a device", link_to("second/adapter_model.safetensors", "/dev/zero"), AUDIT),
    Example("settings outside", link_to(_CONFIG, "../../outside/secret"), MERGE),
    Example("weights outside", link_to("second/adapter_model.safetensors", "/etc/passwd"), MERGE),
    Example("weight 1e38", lambda _: None, (*MERGE, "--weight", "1e38", "--weight", "1e38")),
    Example("weight nan", lambda _: None, (*MERGE, "--weight", "nan", "--weight", "1")),
]
_BASES = [
    *[
        Example(f"a shard {str(shard)[:20]!r}", index_of(shard), command)
        for shard in (
            "../outside/secret",
            "/etc/passwd",
            5,
            None,
            "",
            ["a"],
            ANSI,
            "x\n",
            "/dev/zero",
        )
        for command in (EXPORT, TRAIN)
    ],
    Example("settings a device", link_to(_SETTINGS, "/dev/zero"), EXPORT),
    Example(
        "generation settings a device", link_to("base/generation_config.json", "/dev/zero"), EXPORT
    ),
    Example("generation settings a pipe", pipe_at("base/generation_config.json"), EXPORT),
    Example("generation settings cut", write("base/generation_config.json", '{"eos'), EXPORT),
    *[
        Example(
            f"end {str(end)[:9]}", edit("base/generation_config.json", eos_token_id=end), EXPORT
        )
        for end in (99999, -7, 10**30, "x", 1.5, True, [[2]], [2, -1], {"a": 2})
    ],
    Example(
        "code for a known type",
        edit(_SETTINGS, auto_map={"AutoModelForCausalLM": "modeling.Owned"}),
        TRAIN,
        False,
    ),
    Example(
        "code for an unknown type",
        edit(_SETTINGS, model_type="owned", auto_map={"AutoConfig": "modeling.Owned"}),
        TRAIN,
    ),
    Example("nested 10,000 deep", edit(_SETTINGS, more=deep(10_000)), EXPORT),
    Example("100 MB of settings", edit(_SETTINGS, more="x" * 10**8), EXPORT),
    *[
        Example(f"{key} = {str(value)[:12]}", edit(_SETTINGS, **{key: value}), command)
        for key, value in (
            *(("num_hidden_layers", v) for v in (10**12, -1, 0, "1", None, 1.5, True, 2)),
            *(("vocab_size", v) for v in (10**12, -1, 0, "300", 1.5)),
            *(("hidden_size", v) for v in (10**9, 0, -32, "32", 31)),
            *(("num_attention_heads", v) for v in (0, -1, 3, "2")),
            *(("rms_norm_eps", v) for v in ("x", Raw("NaN"), Raw("1e400"))),
            ("model_type", "nothing"),
            ("model_type", 5),
            ("model_type", ANSI),
            ("hidden_act", "nothing"),
            ("rope_scaling", {"rope_type": "nothing"}),
            ("max_position_embeddings", "x"),
            ("dtype", "nothing"),
        )
        for command in (EXPORT, TRAIN)
    ],
]
_TOKENIZERS = [
    *[
        Example(f"template {text[:40]!r}", write("base/chat_template.jinja", text), command, False)
        for text in TEMPLATES
        for command in (EXPORT, TRAIN)
    ],
    Example("template outside", link_to("base/chat_template.jinja", "/etc/passwd"), EXPORT),
    Example("template a device", link_to("base/chat_template.jinja", "/dev/zero"), EXPORT),
    Example("settings gone", link_to("base/tokenizer_config.json", "nowhere"), EXPORT),
    *[
        Example(f"tokenizer {key} {str(v)[:20]}", edit("base/tokenizer.json", **{key: v}), EXPORT)
        for key, v in (
            ("truncation", {"max_length": 0, "stride": 9, "strategy": "x", "direction": "Right"}),
            ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}),
            ("model", {"type": "Unigram", "vocab": [], "unk_id": 9}),
            ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}),
            ("version", "9"),
            ("added_tokens", [{"id": -1, "content": ""}]),
            ("model", None),
        )
    ],
]
_ARTIFACTS = [
    *[
        Example(f"{key} {str(value)[:20]}", signed(edit(_GENAI, **{key: value})), command)
        for key, value in (
            (_SESSION + "custom_ops_library", "owned.so"),
            (_SESSION + "enable_profiling", "../../../owned"),
            ("model__custom_ops_library", "owned.so"),
            ("model__decoder__num_hidden_layers", 10**12),
            ("model__decoder__num_hidden_layers", 2),
            ("model__decoder__num_hidden_layers", -1),
            ("model__decoder__num_key_value_heads", "x"),
            ("model__decoder__head_size", 10**9),
            ("model__decoder__filename", "../../outside/secret"),
            ("model__decoder__filename", None),
            ("model__eos_token_id", [[2]]),
            ("model__eos_token_id", deep(1000)),
            ("model__eos_token_id", [10**30]),
            ("model__vocab_size", 10**12),
            ("model__context_length", 10**18),
        )
        for command in (BENCH, CHECK)
    ],
    *[Example(f"data at {at}", data_at(at), BENCH) for at in ("../../outside/s", "/etc/passwd")],
    *[
        Example(
            f"manifest {key} {str(value)[:20]}", edit(_MANIFEST, **{key: value}), command, False
        )
        for key, value in (
            ("files", None),
            ("files", {"../../outside/secret": {"bytes": 1, "sha256": "x"}}),
            ("precision", ANSI),
            ("quantization", 5),
            ("context", 10**30),
            ("runtime", ["onnx"]),
            ("bundle", None),
            ("bundle", {"compositions": None}),
            ("bundle", {"compositions": {"one": None}}),
            ("bundle", {"compositions": {"one": {"file": "../../outside/secret"}}}),
            ("versions", [1]),
            ("inputs", "x"),
            ("lowering", None),
        )
        for command in (BENCH, CHECK)
    ],
    Example("no graph", lambda work: (work / "onnx/model.onnx").unlink(), BENCH),
]
_RECIPES = [
    *[
        Example(
            f"{field}={value[:20]}",
            lambda _: None,
            (*RUN, *set_fields(**{field: value})),
            True,
            ["runs"],
        )
        for field, value in (
            ("lora__train", "{steps: 1000000000000000000}"),
            ("calibration__lc__steps", "1" * 5000),
            ("calibration__examples", "1" * 5000),
            ("validation__limits", "{fp32: {kl: .nan}}"),
            ("validation__limits", "{fp32: {kl: .inf}}"),
            ("validation__limits", "{fp32: {nothing: 1}}"),
            ("validation__examples", "true"),
            ("validation__threads", str(10**30)),
            ("evaluation__max_new_tokens", str(10**18)),
            ("calibration__lc", "{steps: 1, learning_rate: .inf}"),
            ("lora__alpha", ".inf"),
            ("lora__rank", str(10**30)),
            ("export__context", str(10**18)),
            ("seed", str(10**400)),
            ("seed", "-1"),
            ("name", "'a\n'"),
            ("adapters__a", "/dev/zero"),
            ("data__files__a__train", "/dev/zero"),
            ("data__files__a__prompt", "constant"),
            ("base__path", "''"),
            ("nothing", "1"),
        )
    ],
    *[
        Example(f"YAML {text[:30]!r}", write("recipe.yaml", text), ("report", "recipe.yaml"))
        for text in YAMLS
    ],
]
_LINES = [
    *[
        Example(f"line {text[:30]!r}", first_line(text), command)
        for text in (
            r'{"input": "\ud800", "output": "x"}',
            '{"input": "' + "a" * 50_000_000 + '", "output": "x"}',
            '{"input": ' + "1" * 5000 + ', "output": "x"}',
            '{"input": "a", "output": "x", "more": ' + "1" * 5000 + "}",
            '{"input": "a", "output": "x", "more": NaN}',
            '{"input": "a", "output": "x", "more": ' + deep(10_000) + "}",
            '{"input": 5, "output": "x"}',
            '{"input": null, "output": "x"}',
            '{"output": "x"}',
            '["a"]',
            "5",
            "{",
            "\0",
        )
        for command in (TRAIN, (*CHECK, "--prompts", "data.jsonl"))
    ],
    *[
        Example(f"features {str(found)[:20]}", first_line(dump({**line, "features": found})), FLIX)
        for line in ({"input": "a", "output": "b"},)
        for found in ("f" * 10**6, ["f" * 10**6], ["../../owned"], ["/owned"], [5], None, [[]], {})
    ],
    Example("data a device", link_to("data.jsonl", "/dev/zero"), TRAIN),
    Example("data a pipe", pipe_at("data.jsonl"), TRAIN),
    Example("feature ../../owned", lambda _: None, (*FLIX, "--rank", "../../owned=2")),
]
_WORDS = [
    *[
        Example(
            f"result {key} = {str(v)[:20]}",
            edit("result.json", **{key: v}),
            ("@result", "result.json"),
        )
        for key, v in (
            ("answers__0__tokens", [-1, 2]),
            ("answers__0__tokens", [99999]),
            ("answers__0__rows__0__ids", [-1, 2]),
            ("answers__0__rows__0__ids", []),
            ("answers__0__rows__0__ids", [2, 2]),
            ("answers__0__rows__0__logits", [1.0]),
            ("answers__0__rows__0__logits", [Raw("NaN"), 1]),
            ("threads", 10**30),
            ("threads", -1),
            ("cores", [-1]),
            ("cores", [10**30]),
            ("load_seconds", -5),
            ("peak_bytes", -5),
            ("answers", []),
        )
    ],
    *[
        Example(f"job {key} = {str(v)[:20]}", edit("job.json", **{key: v}), ("@job", "job.json"))
        for key, v in (
            ("threads", 10**30),
            ("threads", 0),
            ("cores", [-1]),
            ("cores", [8000]),
            ("cores", [10**30]),
            ("prompts__0__tokens", []),
            ("prompts__0__tokens", [-1]),
            ("prompts__0__targets", [99999, 1]),
            ("max_new_tokens", 10**30),
            ("timing__prompt_lengths", [10**12]),
            ("timing__prompt_lengths", [10**6]),
            ("directory", "../outside"),
            ("directory", "onnx"),
            ("adapter", "gone"),
            ("runtime", "nothing"),
        )
    ],
    Example("job a pipe", pipe_at("job.json"), ("@job", "job.json")),
    Example("job a device", link_to("job.json", "/dev/zero"), ("@job", "job.json")),
]


def _reports() -> list[Example]:
    made = "runs/tiny/reports/"
    edits: tuple[tuple[str, dict[str, Any]], ...] = (
        ("parity.json", {"artifacts": None}),
        ("parity.json", {"artifacts__0__total__kl": Raw("NaN")}),
        ("parity.json", {"artifacts__0__total__kl": -1}),
        ("parity.json", {"artifacts__0__total__top1": 7}),
        ("parity.json", {"artifacts__0__passed": False}),
        ("parity.json", {"artifacts__0__gates__0__passed": False}),
        ("parity.json", {"artifacts__0__quantization__kl": 0.5}),
        ("parity.json", {"artifacts__0__bytes": -1}),
        ("parity.json", {"artifacts__0__examples": 10**400}),
        ("quality.json", {"compositions__a_b__examples": -1}),
        ("latency.json", {"artifacts__0__decode_rate": None}),
        ("latency.json", {"artifacts__0__threads": 10**30}),
        ("latency.json", {"artifacts__0__bytes": 10**400}),
    )
    found = [
        Example(
            f"{name}: {next(iter(c))} = {str(next(iter(c.values())))[:20]}",
            edit(made + name, **c),
            command,
        )
        for name, c in edits
        for command in (REPORT, ("compare", "sound", "runs/tiny"))
    ]
    found += [
        Example(f"{name} {text[:9]!r}", write(made + name, text), REPORT)
        for name in ("parity.json", "quality.json", "latency.json", "audit.json")
        for text in ("{", "", "[]", str(deep(100_000)), "null")
    ]
    found += [
        Example(
            "markup in a name",
            edit(made + "parity.json", artifacts__0__composition=text),
            REPORT,
            False,
        )
        for text in ("[/red]", "[bold]x", ANSI, "x" * 10**6)
    ]
    return [
        *(Example(e.what, e.change, e.arguments, e.refused, ["runs/tiny/reports"]) for e in found),
        *(Example(f"{t[:9]!r}", write("baseline.json", t), SHOW) for t in ("{", "", "[]", "null")),
        Example("a device", link_to("baseline.json", "/dev/zero"), SHOW),
        Example("a pipe", pipe_at("baseline.json"), SHOW),
        Example("nested deep", write("baseline.json", str(deep(100_000))), SHOW),
    ]


def _flags() -> list[Example]:
    nothing: Change = lambda _: None  # noqa: E731
    asked: tuple[Sequence[str], ...] = (
        ("sensitivity", *BASE, "--share", "nan"),
        ("sensitivity", *BASE, "--share", "-1"),
        ("sensitivity", *BASE, "--share", "inf"),
        ("bench", "onnx", "--prompt-tokens", str(2**31)),
        ("bench", "onnx", "--new-tokens", str(2**31)),
        ("bench", "onnx", "--threads", str(10**30)),
        ("bench", "onnx", "--repetitions", "9" * 5000),
        (*TRAIN[:-2], "--learning-rate", "nan", "--out", "out"),
        (*TRAIN[:-2], "--learning-rate", "inf", "--out", "out"),
        (*TRAIN[:-2], "--learning-rate", "-1", "--out", "out"),
        (*TRAIN[:-2], "--seed", str(10**30), "--out", "out"),
        (*TRAIN[:-2], "--prompt", "constant", "--out", "out"),
        (*EXPORT, "--context", str(10**30)),
        (*EXPORT, "--context", "99999999"),
        (*EXPORT[:-2], "--out", ""),
        (*EXPORT[:-2], "--out", "a\nb/\0"),
        (*EXPORT[:-2], "--out", "x" * 5000),
        (*EXPORT[:-2], "--out", "/dev/null"),
        (*EXPORT[:-2], "--out", "/dev/full/x"),
        (*EXPORT[:-2], "--out", "/proc/x"),
        (*MERGE[:-2], "--out", "/proc/self/x"),
        (*EXPORT, "--adapter", ""),
        (*EXPORT, "--base", ""),
        (*EXPORT, "--bundle", "../x=first"),
        (*EXPORT, "--bundle", "x\n=first"),
        (*EXPORT, "--bundle", "x" * 5000 + "=first"),
        (*AUDIT, "--out", "/dev/null"),
        (*AUDIT, "--weight", "nan", "--weight", "1"),
        (*AUDIT, "--weight", "1e400", "--weight", "1"),
        (*CHECK, "--prompt", "constant"),
        (*CHECK, "--runner", "os:system"),
        (*CHECK, "--runner", "nothing:nothing"),
        (*CHECK, "--runner", ":"),
        (*CHECK, "--out", "/dev/null"),
        (*CHECK, "--threads", str(10**30)),
        (*RUN, "--set", "a" * 100_000),
        (*RUN, "--set", "name=" + "a" * 100_000),
        (*RUN, "--set", 'name="a\\nb"'),
        (*RUN, "--runs", "/dev/null"),
        ("init", "/dev/null/x"),
        ("init", ""),
        ("init", "x" * 5000),
    )
    return [Example(f"{a[0]} {' '.join(a[-2:])[:50]!r}", nothing, a) for a in asked]


TABLE: tuple[Example, ...] = (
    *_ADAPTERS,
    *_BASES,
    *_TOKENIZERS,
    *_ARTIFACTS,
    *_RECIPES,
    *_LINES,
    *_WORDS,
    *_reports(),
    *_flags(),
)
