"""Lower a decoder to an ExecuTorch program for XNNPACK, as the stock LLM runners expect it.

The traced module is ``caliport.export.executorch.decoder.Decoder``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.patching import quiet
from caliport.export.decoder.shipped import ShippedDecoder, every, group
from caliport.export.decoder.skeleton import CannotRepeat, Layers, furnish, skeleton
from caliport.export.executorch.files import PROGRAM
from caliport.export.executorch.patches.fast_lowering import fast_lowering
from caliport.export.executorch.patches.tied_tables import shared_tables
from caliport.export.executorch.repeat import repeat
from caliport.export.executorch.steps import count_delegated, finish, lower_skeleton, with_weights

if TYPE_CHECKING:
    from executorch.exir import EdgeProgramManager
    from transformers import PreTrainedModel


def lower(
    decoder: ShippedDecoder, directory: Path, context: int, eos_ids: list[int], bos_id: int | None
) -> dict[str, Any]:
    """Write ``directory/model.pte``: one method that serves prefill, chunks and single steps.

    ``forward(tokens int64 [1, n], input_pos int64 [1]) -> float32 [1, 1, vocab]``: the logits of
    the last of n tokens that stand at positions input_pos … input_pos + n - 1, for any n from 1
    while input_pos + n <= context. Keys and values stay in the program; starting at position 0
    again forgets them.

    Args:
        decoder: Its weights as they ship, and what they are the weights of.
        directory: Where to; must exist.
        context: Cache length in tokens.
        eos_ids: Token ids that end a generation.
        bos_id: The token id that begins a text, if there is one. The stock runner puts it before
            a prompt only when it is told to.

    Returns:
        Manifest entries: methods, constant methods, delegate counts.

    Raises:
        RuntimeError: A matrix product is left to ExecuTorch's slow reference kernels.
    """
    constants = constant_methods(decoder.whole, context, eos_ids, bos_id)
    with quiet(), fast_lowering():
        try:
            edge = whole_program(decoder, group(decoder), context, constants)
        except CannotRepeat:
            edge = whole_program(decoder, every(decoder), context, constants)
        counts = count_delegated(edge)
        with shared_tables(decoder):
            program = finish(edge)
    with (directory / PROGRAM).open("wb") as stream:
        program.write_to_file(stream)
    return {
        "backend": "xnnpack",
        "methods": ["forward"],
        "constant_methods": constants,
        **counts,
    }


def whole_program(
    decoder: ShippedDecoder, layers: Layers, context: int, constants: dict[str, Any]
) -> EdgeProgramManager:
    """The lowered program of the whole decoder, by way of a skeleton of ``layers.kept``.

    Raises:
        CannotRepeat: See ``caliport.export.executorch.repeat.repeat``.
    """
    names = decoder.names()
    model = furnish(skeleton(decoder.whole.config, layers), layers, decoder.forms)
    lowered = lower_skeleton(
        model,
        layers,
        context,
        lambda name: layers.whole_name(name) in names,
        cache_bits=decoder.cache_bits,
    )
    program, used = repeat(lowered, layers, decoder.weights)
    return with_weights({"forward": program}, constants, decoder.weights, used, lowered.constants)


def constant_methods(
    model: PreTrainedModel, context: int, eos_ids: list[int], bos_id: int | None
) -> dict[str, Any]:
    """What the stock runners ask a program about itself."""
    config = model.config.get_text_config()
    methods = {
        "get_max_seq_len": context,
        "get_max_context_len": context,
        "get_n_layers": config.num_hidden_layers,
        "get_vocab_size": config.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_eos_ids": list(eos_ids),
    }
    return methods if bos_id is None else {**methods, "get_bos_id": bos_id}
