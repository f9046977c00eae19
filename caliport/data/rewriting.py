"""Make the targets of the paper's compositional sets: translate texts or change their tone.

One sequence-to-sequence model per language translates (the paper: OpusMT), and a causal language
model changes the tone (the paper: RedPajama-INCITE-Base-3B tuned for tone). Results are cached in a
JSON Lines file by everything they depend on, so a killed run resumes and several runs share the
work.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from caliport.core.checkpoints import encode_prompt, eos_ids, load_base, load_tokenizer
from caliport.core.directories import content_hash
from caliport.core.errors import InputError
from caliport.core.model_files.base_model import check_loaded
from caliport.core.places import check_place
from caliport.core.progress import progress
from caliport.core.untrusted import check_regular
from caliport.data.paper import LANGUAGES, TONES
from caliport.data.published import read_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The prompts that the paper's tone model was tuned on (llm-toys), and the end of its answers.
_TUNED = "### Instruction:\n{task}\n\n### Input:\n{input}\n\n### Response:\n"
_TUNED_TONE = "Change the tone of the following Input sentence to {tone}."
_TUNED_PARAPHRASE = "Generate a paraphrase for the following Input sentence."
_MARK = "###"
# Prompts for a model with a chat template.
_CHAT_TONE = "Change the tone of the following text to {tone}. Answer with the new text alone.\n"
_CHAT_PARAPHRASE = "Paraphrase the following text. Answer with the new text alone.\n"
# Language codes of multilingual OpusMT models, in a token before the text.
_CODES = {"es": ("es", "spa"), "fr": ("fr", "fra"), "de": ("de", "deu")}
_BEGINS = b'{"key": "'
_VERSION = 1  # increase when prompts or decoding change

Write = Callable[[list[str]], list[str]]
"""Rewrites a batch of texts."""


@dataclass(frozen=True)
class Rewriter:
    """Rewrites English texts in a form with a recipe's models; call it as a function.

    Attributes:
        translation: Sequence-to-sequence models from English, by the code of the language: a
            Hugging Face directory, or a hub name if a hub can be reached.
        tone: A causal language model, given likewise, or None.
        cache: JSON Lines file of results; created if it is missing.
        batch_size: Texts per pass; a kill loses at most this many.
        max_new_tokens: Maximum length of a result in tokens.
    """

    translation: Mapping[str, str]
    tone: str | None
    cache: Path
    batch_size: int = 16
    max_new_tokens: int = 256

    def __call__(self, form: str, texts: Sequence[str]) -> list[str]:
        """Rewrite each text in a form: a code of LANGUAGES or a tone of TONES.

        Decoding is greedy or uses beams as in the model's generation settings; never sampled.

        Raises:
            InputError: The form is unknown or has no model, a model cannot be loaded, a text is
                too long for it, or the cache is damaged, in use or not writable.
        """
        if form not in (*LANGUAGES, *TONES):
            raise InputError(
                f"found the form {form!r}; use one of: {', '.join((*LANGUAGES, *TONES))}"
            )
        model = self.translation.get(form) if form in LANGUAGES else self.tone
        if model is None:
            field = f"translation.{form}" if form in LANGUAGES else "tone"
            raise InputError(f"data.paper.{field}: missing; name the model that writes {form}")
        base = [_VERSION, _identity(model), form, self.max_new_tokens]
        keys = [_key([*base, text]) for text in texts]
        with _opened(self.cache) as stream:
            known = _read(self.cache)
            missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
            if missing:
                make = translator if form in LANGUAGES else tone_changer
                write = make(model, form, self.max_new_tokens)
                known |= self._fill(write, missing, stream, form)
        return [known[key] for key in keys]

    def _fill(
        self, write: Write, missing: Mapping[str, str], stream: BinaryIO, form: str
    ) -> dict[str, str]:
        """Rewrite the missing texts, the longest first, and append each batch to the cache."""
        order = sorted(missing, key=lambda key: len(missing[key]), reverse=True)
        written: dict[str, str] = {}
        with progress(f"writing {form}", len(order)) as advance:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                outputs = dict(zip(batch, write([missing[key] for key in batch]), strict=True))
                _append(stream, outputs)
                written |= outputs
                advance(len(written), "")
        return written


def translator(path: str, code: str, max_new_tokens: int) -> Write:
    """A function that translates a batch from English with a sequence-to-sequence model.

    Args:
        path: Hugging Face directory, or hub name. Only safetensors are read.
        code: A code of LANGUAGES; selected by a token if the model is multilingual.
        max_new_tokens: Maximum length of a translation in tokens.

    Raises:
        InputError: The model cannot be loaded. The function raises it for a text that is too long.
    """
    import torch

    model, tokenizer = _translation_model(path)
    vocabulary = tokenizer.get_vocab()
    mark = next((f">>{c}<< " for c in _CODES[code] if f">>{c}<<" in vocabulary), "")
    longest = int(getattr(model.config, "max_position_embeddings", 0) or tokenizer.model_max_length)

    def write(texts: list[str]) -> list[str]:
        rows = [list(tokenizer(mark + text)["input_ids"]) for text in texts]
        _check_lengths(rows, texts, longest, path)
        ids, mask = _padded(rows, tokenizer, left=False)
        with torch.inference_mode():
            tokens = model.generate(  # type: ignore[operator]
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=min(max_new_tokens, longest - 1),
                max_length=None,
                do_sample=False,
            )
        outputs = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [str(text).strip() for text in outputs]

    return write


def tone_changer(path: str, tone: str, max_new_tokens: int) -> Write:
    """A function that rewrites a batch in a tone with a causal language model.

    A model with a chat template is prompted in a user's turn, any other one with the prompt that
    the paper's model was tuned on.

    Args:
        path: Hugging Face directory, or hub name. Only safetensors are read.
        tone: One of TONES.
        max_new_tokens: Maximum length of a result in tokens, and at most half of the model's
            context.

    Raises:
        InputError: The model cannot be loaded. The function raises it for a text that is too long.
    """
    import torch

    model, tokenizer = _tone_model(path)
    context = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 20)
    most = min(max_new_tokens, context // 2)
    ends = eos_ids(model) or [i for i in [tokenizer.eos_token_id] if i is not None]

    def write(texts: list[str]) -> list[str]:
        rows = [_tone_prompt(tokenizer, tone, text) for text in texts]
        _check_lengths(rows, texts, context - most, path)
        ids, mask = _padded(rows, tokenizer, left=True)
        with torch.inference_mode():
            tokens = model.generate(  # type: ignore[operator]
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=most,
                max_length=None,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=ends[0] if ends else 0,
                eos_token_id=ends or None,
                stop_strings=[_MARK],
                tokenizer=tokenizer,
            )
        outputs = tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
        return [str(text).partition(_MARK)[0].strip() for text in outputs]

    return write


def _tone_prompt(tokenizer: PreTrainedTokenizerBase, tone: str, text: str) -> list[int]:
    if tokenizer.chat_template:
        ask = _CHAT_PARAPHRASE if tone == "paraphrase" else _CHAT_TONE.replace("{tone}", tone)
        return encode_prompt(tokenizer, ask + text)
    task = _TUNED_PARAPHRASE if tone == "paraphrase" else _TUNED_TONE.replace("{tone}", tone)
    return list(tokenizer.encode(_TUNED.replace("{task}", task).replace("{input}", text)))


# The last model of each kind stays loaded, since several tasks use it one after the other.
@lru_cache(maxsize=1)
def _translation_model(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForSeq2SeqLM
    from transformers.utils import logging

    tokenizer = load_tokenizer(path)
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise InputError(
            f"{path}: not loadable as a translation model ({' '.join(str(error).split())[:200]})"
        ) from error
    check_loaded(path, info, model.config)
    return model.eval().to(_device()), tokenizer


@lru_cache(maxsize=1)
def _tone_model(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = load_base(path)
    tokenizer = load_tokenizer(path, model)
    model.to(_device())  # type: ignore[arg-type]
    return model, tokenizer


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_lengths(rows: list[list[int]], texts: list[str], most: int, path: str) -> None:
    """Refuse texts that are too long: truncating them would silently give wrong targets."""
    for row, text in zip(rows, texts, strict=True):
        if len(row) > most:
            raise InputError(
                f"{path}: a text of {len(row)} tokens, it takes {most}; "
                f"leave out the one that begins with {text[:60]!r}"
            )


def _padded(
    rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 [rows, longest]."""
    import torch

    length = max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = torch.full((len(rows), length), 0 if pad is None else int(pad))
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        place = slice(length - len(tokens), length) if left else slice(0, len(tokens))
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    return ids, mask


@lru_cache(maxsize=16)
def _identity(model: str) -> str:
    """A directory's content hash; a hub name is used as it is."""
    return content_hash(Path(model)) if os.path.exists(model) else f"name:{model}"


def _key(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@contextmanager
def _opened(cache: Path) -> Iterator[BinaryIO]:
    """Open the cache for appending, locked, and drop a partial line that a kill left."""
    try:
        check_place(cache, "a file of rewritten texts")
        cache.parent.mkdir(parents=True, exist_ok=True)
        if cache.exists():
            _check_ours(cache)
        with cache.open("a+b") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{cache}: another run is writing it; wait for that or name another cache"
                ) from None
            _drop_partial_line(stream)
            yield stream
    except OSError as error:
        raise InputError(
            f"{cache}: cannot be written ({error.strerror}); name a writable place"
        ) from None


def _check_ours(cache: Path) -> None:
    check_regular(cache)
    with cache.open("rb") as stream:
        begins = stream.read(len(_BEGINS))
    if not _BEGINS.startswith(begins):
        raise InputError(
            f"{cache}: not a cache of rewritten texts, which would be appended to it; name a new "
            "file"
        )


def _drop_partial_line(stream: BinaryIO) -> None:
    end = stream.seek(0, os.SEEK_END)
    kept = end
    while kept:
        step = min(kept, 1 << 16)
        stream.seek(kept - step)
        newline = stream.read(step).rfind(b"\n")
        if newline >= 0:
            kept += newline + 1 - step
            break
        kept -= step
    if kept < end:
        stream.truncate(kept)
    stream.seek(0, os.SEEK_END)


def _append(stream: BinaryIO, outputs: Mapping[str, str]) -> None:
    rows = [{"key": key, "output": output} for key, output in outputs.items()]
    stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    stream.flush()
    os.fsync(stream.fileno())


def _read(cache: Path) -> dict[str, str]:
    known: dict[str, str] = {}
    for row in read_rows(cache):
        key, output = row.fields.get("key"), row.fields.get("output")
        if not isinstance(key, str) or not isinstance(output, str):
            raise InputError(f"{row.where}: expected key and output, two strings; remove the file")
        known[key] = output
    return known
