"""Make an artifact from a request: fold, quantize, lower, write tokenizer, settings and card."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError
from caliport.core.model_files.base_model import check_base
from caliport.core.model_files.inputs import input_hash
from caliport.core.outputs import check_output, new_directory
from caliport.export import runtime as runtimes
from caliport.export.calibrated.requests import calibrated, check_text, decided
from caliport.export.quantization.choices import NORMS
from caliport.export.request import Request
from caliport.export.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make(request: Request, out: Path) -> None:
    """Make an artifact at ``out``; an existing one is replaced.

    Raises:
        InputError: The request cannot be met, or ``out`` cannot be written; no partial output
            remains.
    """
    runtimes.get(request.runtime).check(request)
    check_text(request)
    check_output(out, "export", request.inputs().values())
    check_base(request.base)
    inputs = {label: input_hash(path) for label, path in request.inputs().items()}
    with new_directory(out, "export", inputs, request.settings()) as (partial, extra):
        fill(partial, extra, request)


def fill(
    directory: Path,
    extra: dict[str, Any],
    request: Request,
    runtime: Runtime | None = None,
    integers: Path | None = None,
) -> None:
    """Write an artifact's files into a directory and its manifest entries into ``extra``.

    Args:
        directory: Where to write; must exist.
        extra: Receives the manifest entries.
        request: What to export.
        runtime: The runtime that lowers it; default the request's.
        integers: Where calibrated integers are kept; default a directory that is removed.

    Raises:
        InputError: The base or an adapter cannot be read or exported as asked; a chat template that
            cannot be rendered.
    """
    from rich.text import Text

    from caliport.core.checkpoints import eos_ids, load_tokenizer, longest_context, render_prompt
    from caliport.core.errors import printable
    from caliport.core.model_files.answers import end_trouble
    from caliport.core.model_files.base_files import local
    from caliport.core.model_files.chat_templates import start_ahead
    from caliport.core.model_files.tokenizers import check_tokenizer_files
    from caliport.core.progress import console
    from caliport.export.decoder.checks import check_exportable
    from caliport.export.decoder.shipped import shipped_decoder
    from caliport.export.decoder.terms import read_updates
    from caliport.export.package.card import describe, write_card
    from caliport.export.package.generation import save_generation_config
    from caliport.export.package.tokenizer import save_tokenizer
    from caliport.export.preflight import artifact_bytes
    from caliport.export.quantization.cache import SCHEME
    from caliport.export.quantization.tensors import scheme

    runtime = runtime or runtimes.get(request.runtime)
    base = request.base

    def context_of(model: PreTrainedModel) -> int:
        return longest_context(model.config) if request.context is None else request.context

    def check(model: PreTrainedModel) -> None:
        check_exportable(model, context_of(model))
        runtime.check_model(request, model)

    if (directory_of_base := local(base)) is not None:
        check_tokenizer_files(directory_of_base)
        start_ahead(directory_of_base)
    if request.bundle is not None:  # before the base's weights are read and quantized
        read_updates(base, {**request.bundle.shared, **request.bundle.compositions})
    with TemporaryDirectory(dir=directory, prefix="integers-") as scratch, ExitStack() as stack:
        place = integers or Path(scratch) / "found"
        request, source, bits = decided(request, place, artifact_bytes, check)
        how = request.quantization
        decoder = stack.enter_context(
            shipped_decoder(base, request.adapter, how, directory, check=check, integers=source)
        )
        model = decoder.whole
        tokenizer = load_tokenizer(base, model)
        render_prompt(tokenizer, "Hello")  # else validation refuses the chat template afterwards
        if trouble := end_trouble(tokenizer, eos_ids(model)):
            console.print(Text(printable(trouble, 2000), "yellow"), soft_wrap=True)
        context = context_of(model)
        lowered = runtime.lower(decoder, directory, request, context, tokenizer)
        sizes = decoder.sizes()
        if how.tune_norms:
            copyfile(place / NORMS, directory / NORMS)
        calibration = {} if source is None else {"calibration": calibrated(decoder, request)}
    save_tokenizer(tokenizer, directory)
    save_generation_config(base, model.config, directory, eos_ids(model), tokenizer.bos_token_id)
    extra |= lowered | {
        "runtime": request.runtime,
        "precision": how.precision,
        "context": context,
        "scheme": scheme(how.precision, runtime.rounding, how.quantizer)
        | ({"cache": SCHEME} if how.cache_bits else {}),
        "quantization": how.choices(),
        **calibration,
        **bits,
        "sizes": sizes,
        **describe(base, model.config, request.adapter),
    }
    write_card(directory, extra)
    _check_size(request, directory)


def _check_size(request: Request, directory: Path) -> None:
    """Check that an artifact is no larger than its goal; the estimate that decided may be wrong."""
    most = None if request.goal is None else request.goal.most_bytes
    size = sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
    if most is not None and size > most:
        raise InputError(
            f"size: came out as {size:,} bytes, expected at most {most:,}; ask for "
            f"{2 * most - size:,}"
        )
