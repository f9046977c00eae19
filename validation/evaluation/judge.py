"""A language model as a judge: does a text do all that was asked? Yes or no, per example.

The paper (arXiv 2507.16083) reports the share of yes by Llama 3.1 70B Instruct; it does not print
the question, so that the one here is ours and shares are to be compared within one judge only.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from caliport.core.checkpoints import encode_prompt, load_base, load_tokenizer
from caliport.core.errors import InputError
from caliport.core.progress import Advance

if TYPE_CHECKING:
    import requests

Verdict = bool | None
"""Whether the text does what was asked; None where the judge said neither yes nor no."""

_QUESTION = """\
You judge an answer to a request. It is right only if it does everything that the request asks \
for, in the language and the tone asked for, says nothing that contradicts the text, and leaves \
out nothing essential. The example of a right answer is one of many possible ones.

Request: {request}

Example of a right answer: {reference}

Answer to judge: {output}

Is the answer right? Say only yes or no."""
# The word alone or ended by a mark: "yes and no" and "no doubt it is right" are no verdicts.
_VERDICT = re.compile(r"[\s*_\"'`]*(yes|no)[\s*_\"'`]*(?:$|[.,;:!\n])", re.IGNORECASE)
_LARGEST_ANSWER = 1 << 20
_TOKENS = 8


@dataclass(frozen=True)
class Question:
    """What one example asks, a right answer, and the answer to judge, all as text."""

    request: str
    reference: str
    output: str

    def text(self) -> str:
        """What the judge is asked."""
        parts = {"request": self.request, "reference": self.reference, "output": self.output}
        return re.sub(r"\{(\w+)\}", lambda match: parts[match[1]], _QUESTION)


class Judge(Protocol):
    """Gives one verdict a question, in their order; ``progress`` gets the number done."""

    def __call__(
        self, questions: Sequence[Question], progress: Advance | None = None
    ) -> list[Verdict]:
        """One verdict a question."""


@dataclass(frozen=True)
class Judgement:
    """Verdicts counted.

    Attributes:
        yes, no, none: How many; none counts answers that were neither.
        share: Percentage of yes among all examples, those without a verdict included.
    """

    yes: int
    no: int
    none: int

    @property
    def share(self) -> float:
        """Percentage of yes among all examples."""
        return 100 * self.yes / (self.yes + self.no + self.none)


def count(verdicts: Sequence[Verdict]) -> Judgement:
    """Count verdicts.

    Raises:
        InputError: There are none.
    """
    if not verdicts:
        raise InputError("no verdicts to count; expected at least one example")
    return Judgement(
        yes=sum(v is True for v in verdicts),
        no=sum(v is False for v in verdicts),
        none=sum(v is None for v in verdicts),
    )


def verdict(answer: str | None) -> Verdict:
    """The verdict at the beginning of a judge's answer; None where it is neither yes nor no."""
    match = _VERDICT.match(answer or "")
    return None if match is None else match[1].lower() == "yes"


@dataclass(frozen=True)
class LocalJudge:
    """A causal language model on this machine, decoded greedily.

    Attributes:
        path: Hugging Face directory, or a hub name where a hub can be reached.
        batch_size: Questions a pass.
    """

    path: str
    batch_size: int = 8

    def __call__(
        self, questions: Sequence[Question], progress: Advance | None = None
    ) -> list[Verdict]:
        """One verdict a question.

        Raises:
            InputError: The model cannot be loaded, or a question is longer than its context.
        """
        from caliport.validation.evaluation.quality import decode, generate

        model = load_base(self.path)
        tokenizer = load_tokenizer(self.path, model)
        prompts = [encode_prompt(tokenizer, question.text()) for question in questions]
        context = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 20)
        longest = max(map(len, prompts), default=0)
        if longest + _TOKENS > context:
            raise InputError(
                f"{self.path}: a question of {longest} tokens does not fit the context of "
                f"{context}; use a judge with a longer one"
            )
        answers = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=_TOKENS,
            batch_size=self.batch_size,
            progress=progress,
        )
        return [verdict(answer) for answer in decode(tokenizer, answers)]


@dataclass(frozen=True)
class EndpointJudge:
    """A model behind an endpoint of OpenAI's chat completions, as many servers offer them.

    Attributes:
        base_url: With the version, such as ``http://localhost:8000/v1``.
        model: The name that the server knows it by.
        key_variable: Environment variable that holds the key; None for a server without keys.
        timeout: Seconds until an answer must be complete in one try.
        tries: Tries a question, of failures that may pass: no connection, timeouts, HTTP 408,
            429 and 5xx.
        pause: Seconds before the second try; doubled before each further one.
    """

    base_url: str
    model: str
    key_variable: str | None = None
    timeout: float = 60
    tries: int = 5
    pause: float = 1

    def __call__(
        self, questions: Sequence[Question], progress: Advance | None = None
    ) -> list[Verdict]:
        """One verdict a question.

        Raises:
            InputError: The address or the key is missing or refused, no try was answered, or what
                came back is not of the form.
        """
        import requests

        key = self._key()
        if urlsplit(self.base_url).scheme not in ("http", "https"):
            raise InputError(
                f"{self.base_url}: no address of an endpoint; expected http:// or https://"
            )
        found = []
        with requests.Session() as session:
            # A function: requests would else prefer what a .netrc says over the header.
            session.auth = _Key(key)
            for number, question in enumerate(questions, start=1):
                found.append(verdict(self._ask(session, question.text())))
                if progress is not None:
                    progress(number, "")
        return found

    def _key(self) -> str | None:
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise InputError(
                f"environment variable {self.key_variable}: not set; put the judge's key there"
            )
        return key

    def _ask(self, session: requests.Session, text: str) -> str | None:
        """The answer's text. The key and the text never stand in a message."""
        problem = ""
        for number in range(self.tries):
            if number:
                time.sleep(self.pause * 2 ** (number - 1))
            try:
                status, body = self._post(session, text)
            except _Passing as error:
                problem = str(error)
                continue
            if status == 200:
                return self._content(body)
            problem = f"HTTP {status}"
            if status not in (408, 429) and status < 500:
                raise InputError(
                    f"{self.base_url}: found {problem} for the model {self.model}; check the "
                    "address, the model's name and the key"
                )
        raise InputError(
            f"{self.base_url}: no answer in {self.tries} tries ({problem}); "
            "start the endpoint or raise the timeout"
        )

    def _post(self, session: requests.Session, text: str) -> tuple[int, bytes]:
        import requests

        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": _TOKENS,
        }
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        limit = time.monotonic() + self.timeout
        body = b""
        try:
            with session.post(
                url, json=request, timeout=self.timeout, stream=True, allow_redirects=False
            ) as response:
                for chunk in response.iter_content(1 << 16):
                    body += chunk
                    if time.monotonic() > limit:
                        raise _Passing(f"more than {self.timeout:g} s")
                    if len(body) > _LARGEST_ANSWER:
                        raise InputError(
                            f"{self.base_url}: found an answer over {_LARGEST_ANSWER} bytes; "
                            "expected a chat completion"
                        )
                return response.status_code, body
        except requests.Timeout:
            raise _Passing(f"more than {self.timeout:g} s") from None
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            raise _Passing(type(error).__name__) from None
        except requests.RequestException as error:
            raise InputError(
                f"{self.base_url}: cannot be asked ({type(error).__name__}); check the address"
            ) from None

    def _content(self, body: bytes) -> str | None:
        try:
            message: Any = json.loads(body)["choices"][0]["message"]
            content = message["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise InputError(
                f"{self.base_url}: the answer is no chat completion of OpenAI's form; "
                "give the base address of an endpoint that has them"
            ) from None
        return content if isinstance(content, str) else None


class _Passing(Exception):
    """A failure that another try may not meet."""


class _Key:
    """Puts the key on a request of requests' own making."""

    def __init__(self, key: str | None) -> None:
        self.key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.key is not None:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request
