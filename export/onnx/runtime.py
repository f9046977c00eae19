"""The runtime ``onnx``: ONNX Runtime on CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError
from caliport.export.onnx import snippet
from caliport.export.onnx.costs import OnnxCosts
from caliport.export.onnx.files import GENAI_CONFIG, GRAPH
from caliport.export.request import Request
from caliport.export.runtime import Costs, Rounding, Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from caliport.export.decoder.shipped import ShippedDecoder
    from caliport.export.quantization.choices import Form


class Onnx:
    """See ``caliport.export.runtime.Runtime``."""

    name = "onnx"
    title = "ONNX Runtime"
    label = "ONNX"
    package = "onnxruntime"
    needs: tuple[str, ...] = ("onnxruntime-genai",)
    modules: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime", "onnxruntime_genai")
    rounding: Rounding = "block"
    program = GRAPH
    shares_adapters = False
    has_int8_cache = False
    bundle_note = snippet.BUNDLE_NOTE
    costs: Costs = OnnxCosts()

    def recognizes(self, directory: Path) -> bool:
        """Whether the directory has a ``genai_config.json``, which names the graph."""
        return (directory / GENAI_CONFIG).is_file()

    def check_name(self, name: str) -> None:
        """Check a composition's name: it becomes a file name."""
        from caliport.export.onnx.bundle import check_name

        check_name(name)

    def check(self, request: Request) -> None:
        """Refuse shared adapters and int8 caches, which this runtime does not support."""
        if request.quantization.cache_bits is not None:
            raise InputError(
                "cache_bits: found 8 with onnx, expected none: ONNX Runtime's GroupQueryAttention "
                "takes a scale for each tensor or channel, fixed by calibration, and none by token"
            )
        if request.bundle is None:
            return
        if request.bundle.shared:
            raise InputError(
                "shared adapters: found with onnx, expected none: an .onnx_adapter holds all of a "
                "composition"
            )
        for name in request.bundle.compositions:
            self.check_name(name)

    def check_model(self, request: Request, model: PreTrainedModel) -> None:
        """No checks beyond those for every runtime."""

    def lower(
        self,
        decoder: ShippedDecoder,
        directory: Path,
        request: Request,
        context: int,
        tokenizer: PreTrainedTokenizerBase,
    ) -> dict[str, Any]:
        """Write ``model.onnx``, its weights, ``genai_config.json`` and a bundle's adapters."""
        from caliport.export.onnx import bundle, lower

        if request.bundle is None:
            return {"lowering": lower.lower(decoder, directory, context, tokenizer)}
        return bundle.lower_request(decoder, directory, request, context, tokenizer)

    def adapter_form(self, precision: str) -> Form | None:
        """None: adapters are float32."""
        return None

    def code(self, composition: str | None, chat: bool, context: int, text: str) -> str:
        """Code for onnxruntime-genai, with a composition's adapter if one is named."""
        return snippet.code(composition, chat, context, text)

    def runner_words(self, bundle: bool) -> str:
        """onnxruntime-genai runs folds and bundles alike."""
        return "own runner"


RUNTIME: Runtime = Onnx()
