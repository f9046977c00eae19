"""The runtime ``executorch``: ExecuTorch with XNNPACK."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError
from caliport.export.executorch import snippet
from caliport.export.executorch.costs import ExecuTorchCosts
from caliport.export.executorch.files import PROGRAM
from caliport.export.request import Request
from caliport.export.runtime import Costs, Rounding, Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from caliport.export.decoder.shipped import ShippedDecoder
    from caliport.export.quantization.choices import Form

_METHOD = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")


class ExecuTorch:
    """See ``caliport.export.runtime.Runtime``."""

    name = "executorch"
    title = "ExecuTorch"
    label = "ExecuTorch"
    package = "executorch"
    needs: tuple[str, ...] = ("executorch", "transformers")
    modules: tuple[str, ...] = (
        "executorch.exir",
        "executorch.extension.llm.custom_ops.custom_ops",
        "executorch.kernels.quantized",
        "executorch.extension.llm.runner",
    )
    rounding: Rounding = "token"
    program = PROGRAM
    shares_adapters = True
    has_int8_cache = True
    bundle_note = snippet.BUNDLE_NOTE
    costs: Costs = ExecuTorchCosts()

    def recognizes(self, directory: Path) -> bool:
        """Whether the directory has a ``.pte``."""
        return any(directory.glob("*.pte"))

    def check_name(self, name: str) -> None:
        """Check a composition's name: it becomes a method of the program."""
        if _METHOD.fullmatch(name) is None or name == "forward":
            raise InputError(
                f"bundle: found the name {name!r}, expected letters, digits and _ (not forward)"
            )

    def check(self, request: Request) -> None:
        """Check that a bundle has a composition, since a finished program cannot be extended."""
        if request.bundle is None:
            return
        if not request.bundle.compositions:
            raise InputError("bundle: found no composition, expected at least one NAME=DIR")
        for name in request.bundle.compositions:
            self.check_name(name)

    def check_model(self, request: Request, model: PreTrainedModel) -> None:
        """Refuse an int8 cache for soft-capped attention scores."""
        capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        if request.quantization.cache_bits is not None and capped is not None:
            raise InputError(
                f"cache_bits: found 8, expected none for config.json's attn_logit_softcapping of "
                f"{capped}: ExecuTorch's kernel for int8 caches does not cap scores"
            )

    def lower(
        self,
        decoder: ShippedDecoder,
        directory: Path,
        request: Request,
        context: int,
        tokenizer: PreTrainedTokenizerBase,
    ) -> dict[str, Any]:
        """Write ``model.pte``, with a method for each composition of a bundle."""
        from caliport.core.checkpoints import eos_ids
        from caliport.export.executorch import bundle, lower

        ends, begin = eos_ids(decoder.whole), tokenizer.bos_token_id
        if request.bundle is None:
            return {"lowering": lower.lower(decoder, directory, context, ends, begin)}
        terms = bundle.read_terms(
            request.base, request.bundle, self.adapter_form(request.quantization.precision)
        )
        lowered = bundle.lower_bundle(decoder, terms, directory, context, ends, begin)
        facts = bundle.describe(terms, request.bundle, lowered["sizes"])
        return {"bundle": facts, "lowering": lowered}

    def adapter_form(self, precision: str) -> Form | None:
        """8 bits beside a quantized base, float32 otherwise."""
        return None if precision == "fp32" else "int8"

    def code(self, composition: str | None, chat: bool, context: int, text: str) -> str:
        """Code for ``TextLLMRunner``, or for a composition's method."""
        return snippet.code(composition, chat, text)

    def runner_words(self, bundle: bool) -> str:
        """The stock runner's Python binding only runs ``forward``, so bundles use the runtime."""
        return "runtime" if bundle else "own runner"


RUNTIME: Runtime = ExecuTorch()
