"""What eager models say, which artifacts are held against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.export.quantization.choices import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from caliport.calibrate import LowRankUpdate
    from caliport.validation.evaluation.evaluation import Answers, Evaluation
    from caliport.validation.gates.rounding import Expected
    from caliport.validation.gates.weights import Source


class References:
    """Eager answers that several artifacts are held against, made once and kept.

    Args:
        evaluation: What is asked.
        base: A Hugging Face directory or hub name.
        adapter: The composition's PEFT LoRA directory; None for the base.
        shared: PEFT LoRA directories that a bundle for ExecuTorch shares.
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
        self._kept: dict[tuple[Path | None, Quantization, str, bool, str | None], Answers] = {}
        self._expected: dict[tuple[Quantization, str, int, bool], Expected] = {}

    def answers(
        self,
        how: Quantization,
        runtime: str,
        *,
        alone: bool = False,
        beside: bool = False,
        rounds: str | None = None,
    ) -> Answers:
        """Of the composition, quantized, as a runtime rounds it; or of the base ``alone``.

        ``beside``: as in a bundle, with the composition beside the quantized base. ``rounds``:
        inputs are rounded as this runtime does it.
        """
        from caliport.validation.evaluation.evaluation import eager_answers

        adapter = None if alone else self.adapter
        same = how.precision == "fp32"
        wanted = (adapter, how, "executorch" if same else runtime, beside, None if same else rounds)
        if wanted not in self._kept:
            model = self._model(adapter, how, runtime, beside, rounds)
            name = f"eager {how.precision}{' base' if alone else ''}"
            streams = self._by_layer and not alone
            self._kept[wanted] = eager_answers(
                model, name, self.evaluation, write=not alone, streams=streams
            )
        return self._kept[wanted]

    def of_update(self, update: LowRankUpdate, name: str) -> Answers:
        """Of the fp32 base with an update folded in that stands in no directory."""
        from caliport.core.checkpoints import load_base
        from caliport.export.decoder.fold import fold
        from caliport.validation.evaluation.evaluation import eager_answers

        model = fold(load_base(self._base), update, name)
        return eager_answers(model, name, self.evaluation, streams=self._by_layer)

    def expected(
        self, how: Quantization, runtime: str, context: int, *, beside: bool = False
    ) -> Expected:
        """What an artifact of the composition should say, and what rounding does to that."""
        from caliport.validation.evaluation.probes import make_probes
        from caliport.validation.gates.rounding import expected_of

        wanted = (how, "executorch" if how.precision == "fp32" else runtime, context, beside)
        if wanted not in self._expected:
            answers = self.answers(how, runtime, beside=beside)
            model = self._model(self.adapter, how, runtime, beside)
            probes = make_probes(model.config.get_text_config().vocab_size, context)
            self._expected[wanted] = expected_of(model, answers, self.evaluation, probes)
        return self._expected[wanted]

    def graph(self, how: Quantization, context: int) -> Expected:
        """What an artifact's graph should say where nothing is rounded while it runs."""
        from caliport.export.quantization.tensors import dequantize
        from caliport.export.reference.folded import eager
        from caliport.validation.evaluation.evaluation import eager_answers
        from caliport.validation.evaluation.probes import make_probes
        from caliport.validation.gates.lowering import few_of
        from caliport.validation.gates.rounding import expected_of

        model = dequantize(eager(self._base, self.adapter, how))
        few = few_of(self.evaluation)
        answers = eager_answers(model, f"eager {how.precision}, float", few, write=False)
        probes = make_probes(model.config.get_text_config().vocab_size, context)
        return expected_of(model, answers, few, probes)

    def _model(
        self,
        adapter: Path | None,
        how: Quantization,
        runtime: str,
        beside: bool,
        rounds: str | None = None,
    ) -> PreTrainedModel:
        from caliport.export.reference import beside as bundle
        from caliport.export.reference import folded

        if beside:
            return bundle.reference(self._base, adapter, how, runtime, self._shared, rounds)
        return folded.reference(self._base, adapter, how, rounds or runtime)

    @property
    def source(self) -> Source:
        """What an artifact of the composition should be made from."""
        from caliport.validation.gates.weights import Source

        return Source(self._base, self.adapter)
