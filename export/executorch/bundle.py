"""One .pte for many compositions: one method each, over weights that are stored once.

Every method is the base's program with low-rank terms beside its linear layers. XNNPACK keys a
delegate's constants by the hash of their content, so methods share the base's weights, the
single-task adapters and any correction that is the same in all layers. All methods use the same
memory for the key-value cache. A structure is lowered once; its compositions differ only in keys.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from caliport.core.patching import quiet
from caliport.export.decoder.shipped import ShippedDecoder, every, forms_of
from caliport.export.decoder.skeleton import (
    CannotRepeat,
    Layers,
    furnish,
    group_layers,
    matrix_stand_in,
    skeleton,
)
from caliport.export.decoder.stored import put_matrix
from caliport.export.decoder.terms import Composed, halves, read_updates, split
from caliport.export.executorch.files import PROGRAM
from caliport.export.executorch.lower import constant_methods
from caliport.export.executorch.patches.fast_lowering import fast_lowering
from caliport.export.executorch.patches.quantize_once import quantized_once
from caliport.export.executorch.patches.tied_tables import shared_tables
from caliport.export.executorch.repeat import repeat
from caliport.export.executorch.steps import count_delegated, finish, lower_skeleton, with_weights

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from transformers import PreTrainedModel

    from caliport.calibrate.low_rank import LowRankUpdate
    from caliport.export.decoder.shipped import ShippedDecoder
    from caliport.export.executorch.steps import Lowered
    from caliport.export.quantization.choices import Form
    from caliport.export.request import Bundle

BASE_METHOD = "forward"
# Name parts of a module's terms: shared terms are numbered, its own term is not.
_SHARED, _OWN = "shared", "own"


@dataclass(frozen=True)
class Terms:
    """The low-rank terms that a bundle computes beside its base.

    Attributes:
        adapters: The shared adapters by name.
        compositions: What each composition adds to the base, by the name of its method.
        form: How the shared adapters ship: ``int8`` or None for float32. A composition's own terms
            are float16, or float32 if ``form`` is None.
    """

    adapters: Mapping[str, LowRankUpdate]
    compositions: Mapping[str, Composed]
    form: Form | None = "int8"


def read_terms(base: str | Path, bundle: Bundle, form: Form | None) -> Terms:
    """Read a bundle's adapters; shared ones that no composition contains are left out.

    Raises:
        InputError: See ``read_updates``.
    """
    single = read_updates(base, bundle.shared)
    composed = {n: split(u, single) for n, u in read_updates(base, bundle.compositions).items()}
    used = {name for parts in composed.values() for name in parts.adapters}
    return Terms({name: single[name] for name in single if name in used}, composed, form)


def lower_bundle(
    decoder: ShippedDecoder,
    terms: Terms,
    directory: Path,
    context: int,
    eos_ids: list[int],
    bos_id: int | None,
) -> dict[str, Any]:
    """Write ``directory/model.pte``: ``forward`` runs the base, and each composition is a method.

    Every method has the signature of the one from ``caliport.export.executorch.lower.lower``. All
    methods share one key-value cache.

    Args:
        decoder: The base with nothing folded in.
        terms: The low-rank terms of the methods.
        directory: Where to write; must exist.
        context: Cache length in tokens.
        eos_ids: Token ids that end generation.
        bos_id: Id of the begin-of-text token, if there is one.

    Returns:
        Manifest entries: methods, constant methods, bytes by part.
    """
    adapters, compositions = terms.adapters, terms.compositions
    constants = constant_methods(decoder.whole, context, eos_ids, bos_id)
    sizes = _store(decoder, adapters, compositions, terms.form)
    programs: dict[str, ExportedProgram] = {}
    used: set[str] = set()
    held: dict[str, bytes] = {}
    with quiet(), fast_lowering(), quantized_once():
        wanted = {BASE_METHOD: None, **compositions}
        for names in _alike(wanted, adapters):
            structure = _Structure(wanted[names[0]], adapters, terms.form)
            layers = group_layers(decoder.whole, partial(structure.kind, decoder))
            try:
                lowered, repeated = _methods(decoder, structure, layers, names, wanted, context)
            except CannotRepeat:
                layers = every(decoder)
                lowered, repeated = _methods(decoder, structure, layers, names, wanted, context)
            held |= lowered.constants
            for name, (program, stored) in repeated.items():
                programs[name] = program
                used |= stored
        edge = with_weights(programs, constants, decoder.weights, used, held)
        counts = count_delegated(edge)
        with shared_tables(decoder):
            program = finish(edge, share_cache=True)
    with (directory / PROGRAM).open("wb") as stream:
        program.write_to_file(stream)
    return {
        "backend": "xnnpack",
        "methods": list(programs),
        "constant_methods": constants,
        "sizes": sizes,
        **counts,
    }


def _methods(
    decoder: ShippedDecoder,
    structure: _Structure,
    layers: Layers,
    names: list[str],
    wanted: Mapping[str, Composed | None],
    context: int,
) -> tuple[Lowered, dict[str, tuple[ExportedProgram, set[str]]]]:
    """Lower one structure and repeat it for each of its methods."""
    stored = decoder.names()
    model = furnish(skeleton(decoder.whole.config, layers), layers, decoder.forms)
    structure.attach(model, layers)
    lowered = lower_skeleton(
        model,
        layers,
        context,
        lambda name: ".low_rank." in name or layers.whole_name(name) in stored,
        cache_bits=decoder.cache_bits,
    )
    return lowered, {
        name: repeat(lowered, layers, decoder.weights, _where(name, wanted[name])) for name in names
    }


def _store(
    decoder: ShippedDecoder,
    adapters: Mapping[str, LowRankUpdate],
    compositions: Mapping[str, Composed],
    form: Form | None,
) -> dict[str, Any]:
    """Store all matrices of the terms; return the bytes of each part, counting shared ones once."""
    weights = decoder.weights
    sizes: dict[str, Any] = {"base": weights.nbytes, "adapters": {}, "compositions": {}}
    for name, update in adapters.items():
        sizes["adapters"][name] = _put(decoder, f"adapter {name}", update, form)
    for name, composed in compositions.items():
        own = composed.own
        put_own = _put if form is None else _put_halves
        sizes["compositions"][name] = 0 if own is None else put_own(decoder, f"own {name}", own)
    return sizes


def _put(
    decoder: ShippedDecoder, owner: str, update: LowRankUpdate, form: Form | None = None
) -> int:
    return sum(
        put_matrix(decoder.weights, f"{owner} {module} {part}.weight", matrix, form)
        for module in update.modules
        for part, matrix in (("A", update.a[module]), ("B", update.b[module]))
    )


def _put_halves(decoder: ShippedDecoder, owner: str, update: LowRankUpdate) -> int:
    """Store an update in float16; XNNPACK computes with it in float32."""
    before = decoder.weights.nbytes
    for module in update.modules:
        for part, matrix in zip("AB", halves(update.a[module], update.b[module]), strict=True):
            decoder.weights.put(f"{owner} {module} {part}.weight.half", [matrix], len(matrix))
    return decoder.weights.nbytes - before


def _where(name: str, composed: Composed | None) -> Any:
    """A function from a weight's name in a method to the name that it is stored under."""

    def stored(full: str) -> str:
        module, mark, rest = full.rpartition(".low_rank.")
        if not mark or composed is None:
            return full
        owner, part, ending = rest.split(".", 2)
        if owner == _OWN:
            return f"own {name} {module} {part}.{ending}"
        adapter = composed.adapters[int(owner.removeprefix(_SHARED))]
        return f"adapter {adapter} {module} {part}.{ending}"

    return stored


def _alike(
    wanted: Mapping[str, Composed | None], adapters: Mapping[str, LowRankUpdate]
) -> list[list[str]]:
    """Group method names by structure: the same modules with terms of the same ranks."""
    found: dict[Hashable, list[str]] = defaultdict(list)
    for name, composed in wanted.items():
        found[_Structure(composed, adapters, None).key()].append(name)
    return list(found.values())


class _Structure:
    """The structure of a composition's terms: the parts of ``Composed`` that shape the program."""

    def __init__(
        self,
        composed: Composed | None,
        adapters: Mapping[str, LowRankUpdate],
        form: Form | None,
    ) -> None:
        self.form = form
        self.count = 0 if composed is None else len(composed.adapters)
        self.factor = 1.0 if composed is None else composed.weight**2
        self.shared = adapters[composed.adapters[0]] if composed and composed.adapters else None
        self.own = None if composed is None else composed.own

    def of(self, module: str) -> tuple[int, int]:
        """Ranks of the shared and the own term of a module; 0 for none."""
        ranks = [
            update.rank(module) if update is not None and module in update.modules else 0
            for update in (self.shared, self.own)
        ]
        return ranks[0], ranks[1]

    def key(self) -> Hashable:
        names = {n for u in (self.shared, self.own) if u is not None for n in u.modules}
        return (self.count, self.factor, tuple((n, self.of(n)) for n in sorted(names)))

    def kind(self, decoder: ShippedDecoder, layer: int) -> Hashable:
        """The forms and ranks in a layer; layers that share a program must agree in them."""
        path = f"{every(decoder).path}.{layer}."
        linears = (n for n, m in decoder.whole.named_modules() if isinstance(m, nn.Linear))
        ranks = tuple(self.of(name) for name in linears if name.startswith(path))
        return forms_of(decoder, layer), ranks

    def attach(self, model: PreTrainedModel, layers: Layers) -> None:
        """Give the skeleton's linear layers their terms."""
        for name, module in list(model.named_modules()):
            shared, own = self.of(layers.whole_name(name))
            if isinstance(module, nn.Linear) and (shared or own):
                terms = nn.ModuleDict()
                for index in range(self.count if shared else 0):
                    terms[f"{_SHARED}{index}"] = _pair(module, shared, self.form)
                if own:
                    terms[_OWN] = _pair(module, own, None, in_half=self.form is not None)
                module.low_rank = terms
                module.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        terms: Any = module.low_rank
        shared = [pair for name, pair in terms.items() if name != _OWN]
        if shared:
            inner = _sum([pair["A"](args[0]) for pair in shared])
            output = output + _sum([pair["B"](inner) for pair in shared]) * self.factor
        if _OWN in terms:
            output = output + terms[_OWN]["B"](terms[_OWN]["A"](args[0]))
        return output


def _sum(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _pair(module: nn.Linear, rank: int, form: Form | None, in_half: bool = False) -> nn.ModuleDict:
    pair = nn.ModuleDict()
    for name, rows, width in (("A", rank, module.in_features), ("B", module.out_features, rank)):
        weight = nn.Parameter(matrix_stand_in(rows, width, form), requires_grad=False)
        if in_half:
            pair[name] = _InHalf(weight)
            continue
        linear = nn.Linear(1, 1, bias=False)
        linear.weight = weight
        pair[name] = linear
    return pair


class _InHalf(nn.Module):
    """A linear layer whose weight ships in float16, marked by its name (``weight_keys``)."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight_half = weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight_half)


def describe(terms: Terms, bundle: Bundle, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Manifest entries for a bundle's shared adapters and compositions."""
    from caliport.export.package.card import describe_adapter

    return {
        "adapters": {name: {"bytes": size} for name, size in sizes["adapters"].items()},
        "compositions": {
            name: {
                "bytes": sizes["compositions"][name],
                "stands_on": list(terms.compositions[name].adapters),
                "lora": describe_adapter(path),
            }
            for name, path in bundle.compositions.items()
        },
    }
