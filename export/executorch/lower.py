"""Lower a decoder to an ExecuTorch program for XNNPACK that the stock LLM runners can run.

The traced module is ``caliport.export.executorch.decoder.Decoder``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.patching import quiet
from caliport.export.decoder.shipped import ShippedDecoder, every, group
from caliport.export.decoder.skeleton import CannotRepeat, Layers, furnish, shape_of, skeleton
from caliport.export.executorch.files import PROGRAM
from caliport.export.executorch.patches.fast_lowering import fast_lowering
from caliport.export.executorch.patches.tied_tables import shared_tables
from caliport.export.executorch.repeat import repeat
from caliport.export.executorch.steps import (
    Lowered,
    count_delegated,
    finish,
    lower_skeleton,
    with_weights,
)

if TYPE_CHECKING:
    from executorch.exir import EdgeProgramManager
    from transformers import PreTrainedModel

_LOWERED: OrderedDict[Hashable, Lowered] = OrderedDict()
_MOST = 4


def lower(
    decoder: ShippedDecoder, directory: Path, context: int, eos_ids: list[int], bos_id: int | None
) -> dict[str, Any]:
    """Write ``directory/model.pte``: one method for prefill, chunked prefill and decode steps.

    ``forward(tokens int64 [1, n], input_pos int64 [1]) -> float32 [1, 1, vocab]``: the logits of
    the last of n tokens at positions input_pos … input_pos + n - 1, for any n >= 1 with
    input_pos + n <= context. Keys and values stay in the program; starting again at position 0
    discards them.

    Args:
        decoder: The decoder and its weights as they ship.
        directory: Where to write; must exist.
        context: Cache length in tokens.
        eos_ids: Token ids that end generation.
        bos_id: Id of the begin-of-text token, if there is one. The stock runner puts it before a
            prompt only when told to.

    Returns:
        Manifest entries: methods, constant methods, delegate counts.

    Raises:
        RuntimeError: XNNPACK did not take a matrix product, which would run in ExecuTorch's slow
            reference kernels.
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
    """Lower a skeleton of ``layers.kept`` and repeat it to the program of the whole decoder.

    Raises:
        CannotRepeat: See ``caliport.export.executorch.repeat.repeat``.
    """
    lowered = _lowered_once(decoder, layers, context)
    program, used = repeat(lowered, layers, decoder.weights)
    return with_weights({"forward": program}, constants, decoder.weights, used, lowered.constants)


def _lowered_once(decoder: ShippedDecoder, layers: Layers, context: int) -> Lowered:
    """Lower a skeleton; decoders of one shape, as the compositions of a run are, share it."""
    names = decoder.names()
    small = skeleton(decoder.whole.config, layers)
    key = (shape_of(small, layers, decoder.forms), context, decoder.cache_bits)
    if key not in _LOWERED:
        model = furnish(small, layers, decoder.forms)
        lowered = lower_skeleton(
            model,
            layers,
            context,
            lambda name: layers.whole_name(name) in names,
            cache_bits=decoder.cache_bits,
        )
        if len(_LOWERED) == _MOST:
            _LOWERED.popitem(last=False)
        _LOWERED[key] = lowered
    return _LOWERED[key]


def constant_methods(
    model: PreTrainedModel, context: int, eos_ids: list[int], bos_id: int | None
) -> dict[str, Any]:
    """The constant methods that the stock runners read a program's properties from."""
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
