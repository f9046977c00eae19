"""``caliport.compose``, ``load``, ``generate`` and ``calibration_text``: the stages from Python.

``caliport.export`` is in ``caliport.export.api``, ``caliport.validate`` in
``caliport.validation.api``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.export.artifact import Artifact

if TYPE_CHECKING:
    from caliport.export.quantization.text import CalibrationText
    from caliport.stages.sources import Source
    from caliport.validation.runners.runner import Runner


def compose(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    method: str = "linear",
    data: str | Path | Source | None = None,
    weights: Sequence[float] | str = (),
    merge: str | None = None,
    target_modules: Sequence[str] = (),
    any_base: bool = False,
    training: Mapping[str, Any] | None = None,
    prompt: str | None = None,
    dora: str | None = None,
    force: bool = False,
) -> Path:
    """Compose adapters into one: merge them, or merge them and train a correction.

    A composition that is there already, made from the same inputs, is kept.

    Args:
        base: A Hugging Face directory or hub name.
        adapters: PEFT LoRA directories of the base, at least one.
        out: The PEFT LoRA directory to appear; ``PeftModel.from_pretrained(base, out)`` loads it.
        method: A merge such as ``linear``, a search for weights such as ``lorahub``, or a
            correction such as ``lc++``, with variants such as ``lc++-int4``; docs/calibrate.md
            lists them.
        data: Examples of the composition, for methods that need them: JSON Lines with ``input`` and
            ``output``, or a ``Source`` that has a prompt too.
        weights: Of a merge, also under a correction, one for each adapter; or ``search``, which
            tries 0.5 and 1 for each and keeps the best on a fifth of ``data``, held out; default
            equal weights.
        merge: The merge under a correction; default ``linear``, or ``exact`` for adapters of
            different ranks or modules.
        target_modules: Last names of layers that a correction reaches besides the adapters' own.
        any_base: Take adapters that name different bases, if their shapes fit ``base``.
        training: Fields of ``TrainSettings``: ``steps`` (300), ``batch_size`` (32),
            ``learning_rate`` (5e-4, the peak), ``seed`` (0).
        prompt: The composition's prompt, with ``{input}``, put around each input of ``data`` and
            recorded in the output; default the ``Source``'s, or none.
        dora: ``svd`` or ``svd=RANK`` replaces adapters with DoRA, which is no low-rank update, by
            the nearest one, of twice their rank or of this one; the manifest states the error.
        force: Replace ``out`` even if caliport did not make it; an input is never replaced.

    Returns:
        ``out``.

    Raises:
        InputError: Invalid input; nothing is left behind.

    Example:
        ::

            import caliport

            caliport.compose(
                "models/my-base",
                ["adapters/summarize", "adapters/translate_es"],
                "composed/summarize_es",
                method="lc++",
                data="summarize_es.jsonl",
            )
    """
    from caliport.core.errors import InputError
    from caliport.core.outputs import forced
    from caliport.core.prompts import check_prompt
    from caliport.flags.calibrate import Steering, calibrate_one, inputs_of
    from caliport.stages.compose import CompositionInputs
    from caliport.stages.sources import Source

    defaults = {"steps": 300, "batch_size": 32, "learning_rate": 5e-4, "seed": 0}
    paths = [Path(adapter) for adapter in adapters]
    if isinstance(data, Source):
        if prompt not in (None, data.prompt):
            raise InputError("compose: prompt is another than that of the Source; give one of them")
        numbered = {str(index): path for index, path in enumerate(paths, start=1)}
        inputs = CompositionInputs(numbered, data, data.prompt)
    else:
        if prompt is not None:
            check_prompt(prompt, "prompt")
        inputs = inputs_of(paths, None if data is None else Path(data), prompt)
    settings = {**defaults, **(training or {})}
    with forced(force):
        calibrate_one(
            str(base),
            inputs,
            method,
            settings,
            Steering(merge, weights, targets=tuple(target_modules), any_base=any_base),
            Path(out),
            dora,
        )
    return Path(out)


def calibration_text(
    files: str | Path | Mapping[str, str | Path],
    *,
    prompt: str | None = None,
    tokens: int | None = None,
) -> CalibrationText:
    """Text that ``caliport.export`` calibrates int4 on.

    Args:
        files: JSON Lines with ``input`` and ``output`` (``.jsonl``), or plain text; for a bundle
            one file for each composition, by name.
        prompt: Put around each input, with ``{input}``; default the input alone.
        tokens: Most tokens to run; default 8192.

    Raises:
        InputError: A prompt without ``{input}``, or too few tokens.
    """
    from caliport.export.quantization.text import TOKENS, CalibrationText
    from caliport.stages.sources import text_from

    named = files if isinstance(files, Mapping) else {"": files}
    sources = {name: text_from(Path(path), prompt) for name, path in named.items()}
    return CalibrationText(sources, TOKENS if tokens is None else tokens)


def load(
    artifact: str | Path | Artifact, *, threads: int | None = None, composition: str | None = None
) -> Runner:
    """Open an artifact to feed it token by token.

    Args:
        artifact: An artifact or its directory, of caliport's or of another tool.
        threads: Threads of the runtime; default the cores that this process may use.
        composition: Of a bundle, the composition to run; None for its base, or for a fold.

    Returns:
        A runner: ``prefill(tokens)`` and ``step(token)`` give logits, float32 [vocab];
        ``context`` is the most tokens that it takes.

    Raises:
        InputError: No artifact, one whose files have changed or cannot be loaded, or one without
            this composition.

    Example:
        ::

            runner = caliport.load("artifacts/summarize_es")
            logits = runner.prefill([1, 42, 17])
            logits = runner.step(int(logits.argmax()))
    """
    from caliport.validation.records.reports import this_machine
    from caliport.validation.runners.open import Execution

    found = artifact if isinstance(artifact, Artifact) else Artifact.read(artifact)
    return Execution(found, threads or this_machine().cores, composition).open()


def generate(
    artifact: str | Path | Artifact,
    text: str,
    *,
    max_new_tokens: int = 256,
    threads: int | None = None,
    composition: str | None = None,
    prompt: str | None = None,
) -> str:
    """What an artifact answers to one user turn, greedily.

    The tokenizer is the artifact's own. ``text`` is put into the prompt that the artifact records,
    unless it is in it already, and then into the tokenizer's chat template if it has one, else it
    is followed by a line break.

    Args:
        artifact: An artifact or its directory.
        text: What to work on.
        max_new_tokens: Most tokens to write; fewer where the context is full.
        threads: As for ``load``.
        composition: As for ``load``.
        prompt: A template with ``{input}`` in place of the recorded one; ``{input}`` for none.

    Raises:
        InputError: As ``load``, no tokenizer beside the program, or a text that exceeds the
            context.

    Example:
        ::

            print(caliport.generate("artifacts/summarize_es", "Anna: Tennis on Friday? …"))
    """
    from caliport.core.checkpoints import encode_prompt
    from caliport.core.prompts import prompted
    from caliport.export.package.tokenizer import read_tokenizer
    from caliport.validation.evaluation.quality import decode
    from caliport.validation.runners import engine
    from caliport.validation.runners.runner import greedy

    found = artifact if isinstance(artifact, Artifact) else Artifact.read(artifact)
    tokenizer = read_tokenizer(found.directory)
    ends = engine.get(found.runtime).ends(found)
    runner = load(found, threads=threads, composition=composition)
    (whole,) = prompted([text], prompt, found.prompt(composition))
    written = greedy(runner, encode_prompt(tokenizer, whole), max_new_tokens, ends)
    return decode(tokenizer, [written])[0]
