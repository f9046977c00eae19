"""Answers of eager models, which artifacts are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.directories import MANIFEST
from caliport.core.errors import InputError
from caliport.export.quantization.choices import Quantization
from caliport.export.runtime import Rounding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from caliport.calibrate import LowRankUpdate
    from caliport.export.artifact import Artifact
    from caliport.validation.evaluation.evaluation import Answers, Evaluation
    from caliport.validation.gates.rounding import Expected
    from caliport.validation.gates.weights import Source
    from caliport.validation.runners.weights import ArtifactIntegers

FP32 = Quantization("fp32")


@dataclass(frozen=True)
class _Model:
    """An eager model: what is folded in or beside, and how it is quantized and rounded."""

    adapter: Path | None
    how: Quantization
    runtime: str | None
    beside: bool
    rounding: Rounding | None
    integers: ArtifactIntegers | None = None

    @property
    def key(self) -> object:
        """Equal for models with equal logits: nothing depends on the runtime in fp32."""
        if self.how.precision != FP32.precision:
            return self
        return (self.adapter, self.how, self.beside)


class EagerReferences:
    """Eager answers that several artifacts are compared with, made once and kept.

    Args:
        evaluation: What is asked.
        base: A Hugging Face directory or hub name.
        adapter: The composition's PEFT LoRA directory; None for the base.
        shared: PEFT LoRA directories that a bundle stores once for all its compositions.
        by_layer: Keep residual streams of the answers too.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        base: str | Path,
        adapter: Path | None,
        shared: Mapping[str, Path] | None = None,
        by_layer: bool = False,
    ) -> None:
        self.evaluation = evaluation
        self.adapter = adapter
        self._base = base
        self._shared = shared
        self._by_layer = by_layer
        self._answers: dict[object, Answers] = {}
        self._expected: dict[object, Expected] = {}

    def answers(
        self,
        how: Quantization,
        runtime: str | None = None,
        *,
        alone: bool = False,
        beside: bool = False,
        rounding: Rounding | None = None,
    ) -> Answers:
        """Answers of the composition, or of the base.

        Args:
            how: How it is quantized.
            runtime: Whose rounding of activations it has; None in fp32, which has none.
            alone: The base without the composition.
            beside: As in a bundle, with the composition beside the quantized base.
            rounding: In place of the runtime's own.
        """
        adapter = None if alone else self.adapter
        wanted = _Model(adapter, how, runtime, beside, rounding)
        return self._kept_answers(wanted, alone)

    def of_update(self, update: LowRankUpdate, name: str) -> Answers:
        """Answers of the fp32 base with an update folded in that is in no directory."""
        from caliport.core.checkpoints import load_base
        from caliport.export.decoder.fold import fold
        from caliport.validation.evaluation.evaluation import eager_answers

        model = fold(load_base(self._base), update, name)
        return eager_answers(model, name, self.evaluation, streams=self._by_layer)

    def expected(self, artifact: Artifact) -> Expected:
        """The answers that an artifact of the composition should give, and the noise of rounding.

        Raises:
            InputError: The manifest does not say the context.
        """
        from caliport.validation.evaluation.probes import make_probes
        from caliport.validation.gates.rounding import expected_of

        context = _context_of(artifact)
        wanted = _Model(
            self.adapter,
            artifact.quantization,
            artifact.runtime,
            artifact.is_bundle,
            None,
            self._integers(artifact),
        )
        key = (wanted.key, context)
        if key not in self._expected:
            model = self._model(wanted)
            answers = self._kept_answers(wanted, alone=False, model=model)
            probes = make_probes(model.config.get_text_config().vocab_size, context)
            self._expected[key] = expected_of(model, answers, self.evaluation, probes)
        return self._expected[key]

    def graph(self, artifact: Artifact) -> Expected:
        """The answers that an artifact should give when its program rounds no activations.

        Raises:
            InputError: The manifest does not say the context.
        """
        from caliport.export.quantization.tensors import dequantize
        from caliport.export.reference.folded import eager
        from caliport.validation.evaluation.evaluation import eager_answers
        from caliport.validation.evaluation.probes import make_probes
        from caliport.validation.gates.lowering import few_of
        from caliport.validation.gates.rounding import expected_of

        known = self._integers(artifact)
        model = dequantize(eager(self._base, self.adapter, artifact.quantization, known))
        few = few_of(self.evaluation)
        answers = eager_answers(model, f"eager {artifact.precision}, float", few, write=False)
        vocabulary = model.config.get_text_config().vocab_size
        return expected_of(model, answers, few, make_probes(vocabulary, _context_of(artifact)))

    @property
    def source(self) -> Source:
        """What an artifact of the composition should be made from."""
        from caliport.validation.gates.weights import Source

        return Source(self._base, self.adapter)

    def _kept_answers(
        self, wanted: _Model, alone: bool, model: PreTrainedModel | None = None
    ) -> Answers:
        from caliport.validation.evaluation.evaluation import eager_answers

        if wanted.key not in self._answers:
            fp32 = wanted.how.precision == FP32.precision
            known = self.evaluation.written if fp32 and not alone else None
            name = f"eager {wanted.how.precision}{' base' if alone else ''}"
            streams, write = self._by_layer and not alone, not alone and known is None
            model = model if model is not None else self._model(wanted)
            answers = eager_answers(model, name, self.evaluation, write=write, streams=streams)
            self._answers[wanted.key] = (
                answers if known is None else replace(answers, generated=known)
            )
        return self._answers[wanted.key]

    def _model(self, wanted: _Model) -> PreTrainedModel:
        from caliport.export.reference import beside, folded

        adapter, how, rounding = wanted.adapter, wanted.how, wanted.rounding
        if wanted.runtime is None:
            return folded.eager(self._base, adapter, how)
        if wanted.beside:
            return beside.reference(
                self._base, adapter, how, wanted.runtime, self._shared, rounding, wanted.integers
            )
        return folded.reference(self._base, adapter, how, wanted.runtime, rounding, wanted.integers)

    def _integers(self, artifact: Artifact) -> ArtifactIntegers | None:
        """The artifact's own, where a base alone does not give them again."""
        from caliport.validation.runners.weights import ArtifactIntegers

        return ArtifactIntegers(artifact, self._base) if artifact.calibrated else None


def _context_of(artifact: Artifact) -> int:
    if artifact.context is None:
        place = artifact.directory / MANIFEST
        raise InputError(f"{place}: context is missing, expected a number of tokens")
    return artifact.context
