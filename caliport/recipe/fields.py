"""The types of a recipe's fields: numbers within bounds, names, and paths that can be ones."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    StringConstraints,
)

from caliport.core.errors import InputError
from caliport.core.places import check_path
from caliport.core.prompts import check_prompt
from caliport.core.untrusted import check_name
from caliport.export.quantization.quantizers.registry import of_int4
from caliport.export.runtime import names
from caliport.recipe import bounds
from caliport.recipe.methods import MERGED, dora_rank, parse
from caliport.validation.gates.limits import Limits


def _runtime(name: str) -> str:
    if name not in names():
        raise ValueError(f"expected one of {', '.join(names())}")
    return name


Runtime = Annotated[str, AfterValidator(_runtime)]
Precision = Literal["fp32", "int8", "int4"]


def _merge(name: str) -> str:
    if name not in MERGED:
        raise ValueError(f"expected one of {', '.join(MERGED)}")
    return name


def _quantizer(name: str) -> str:
    if name not in of_int4():
        raise ValueError(f"expected one of {', '.join(of_int4())}")
    return name


QuantizerName = Annotated[str, AfterValidator(_quantizer)]
MergeName = Annotated[str, AfterValidator(_merge)]


def _dora(text: str) -> str:
    dora_rank(text)
    return text


DoraForm = Annotated[str, AfterValidator(_dora)]
MethodName = Annotated[str, AfterValidator(lambda name: parse(name).name)]
Metric = Literal["rougeL", "chrf", "weighted_rouge"]


def _number(value: object) -> object:
    if isinstance(value, bool):  # pydantic would take it for 0 or 1
        raise ValueError(f"found {str(value).lower()}, expected a number")
    return value


def _path(path: Path) -> Path:
    try:
        check_path(path)
    except InputError as error:
        raise ValueError(str(error)) from None
    return path


def checked_name(name: str, what: str) -> None:
    """Check a name as pydantic wants it; ``ValueError`` where it is not one."""
    try:
        check_name(name, what)
    except InputError as error:
        raise ValueError(str(error)) from None


def _limit(name: str) -> str:
    known = [field.name for field in fields(Limits)]
    if name not in known:
        raise ValueError(f"expected one of {', '.join(known)}")
    return name


Limit = Annotated[str, AfterValidator(_limit)]
Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number)]
Size = Annotated[ByteSize, BeforeValidator(_number)]
Count = Annotated[Whole, Field(gt=0, le=bounds.COUNT)]
Tokens = Annotated[Whole, Field(gt=0, le=bounds.TOKENS)]
Rank = Annotated[Whole, Field(gt=0, le=bounds.RANK)]
Width = Annotated[Whole, Field(gt=0, le=1 << 18)]
Layers = Annotated[Whole, Field(gt=0, le=1000)]
Rate = Annotated[Real, Field(gt=0, le=bounds.RATE)]
Place = Annotated[Path, AfterValidator(_path)]
Text = Annotated[str, StringConstraints(max_length=10_000)]


def _template(text: str) -> str:
    try:
        return check_prompt(text, "prompt")
    except InputError as error:
        raise ValueError(str(error)) from None


PromptTemplate = Annotated[Text, AfterValidator(_template)]


class Part(BaseModel):
    """A part of a recipe, without unknown fields and numbers that are not finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )
