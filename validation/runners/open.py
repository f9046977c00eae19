"""Open an artifact with the runner that was asked for."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass

from caliport.core.errors import InputError
from caliport.core.model_files.tokenizers import check_tokenizer_files
from caliport.export import runtime as runtimes
from caliport.export.artifact import Artifact
from caliport.validation.runners import engine as engines
from caliport.validation.runners.engine import PLAIN
from caliport.validation.runners.runner import Runner


@dataclass(frozen=True)
class Execution:
    """An artifact and how to run it.

    Attributes:
        artifact: What to run.
        threads: Threads of the runtime's own pool.
        composition: Of a bundle, the composition to run; None for its base, or for a fold.
        runner: A word of ``open_runner``, or a runner that is open already.
    """

    artifact: Artifact
    threads: int = 1
    composition: str | None = None
    runner: Runner | str = PLAIN

    def open(self) -> Runner:
        """The open runner; see ``open_runner``."""
        if not isinstance(self.runner, str):
            return self.runner
        return open_runner(self.artifact, self.threads, self.composition, self.runner)


def open_runner(
    artifact: Artifact, threads: int, composition: str | None = None, runner: str = PLAIN
) -> Runner:
    """Open an artifact of ours, whose hashes are checked first, or of another tool.

    Either may be a stranger's, so its program is checked before it is opened in this process.

    Args:
        artifact: What to run.
        threads: Threads of the runtime's own pool.
        composition: Of a bundle, the composition to run; None for its base alone.
        runner: ``plain``, the artifact's runtime itself; a word of ``Engine.alternatives``, such as
            ``genai``; or ``MODULE:FUNCTION``, an importable function of (directory, threads,
            composition) that returns any ``Runner``.

    Raises:
        InputError: An artifact whose files are not those that its manifest records, that its
            runtime cannot load or crashes on, or without such a composition; or see
            ``check_choice``.
    """
    check_choice(artifact, runner)
    if ":" in runner:
        found = pkgutil.resolve_name(runner)(artifact.directory, threads, composition)
        if not isinstance(found, Runner):
            raise InputError(
                f"--runner {runner}: gave {type(found).__name__}, expected an object with name, "
                "context, prefill, step and reset"
            )
        return found
    artifact.check()
    engine = engines.get(artifact.runtime)
    engine.try_program(artifact)
    return engine.open(artifact, threads, composition, runner)


def check_choice(artifact: Artifact, runner: str) -> None:
    """Refuse a runner that is unknown, or cannot run this artifact, before any work.

    Raises:
        InputError: See above.
    """
    known = engines.alternatives()
    if ":" in runner:
        try:
            pkgutil.resolve_name(runner)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(f"--runner {runner}: {error}; expected MODULE:FUNCTION") from None
    elif runner != PLAIN and runner not in known:
        words = ", ".join([PLAIN, *known])
        raise InputError(f"--runner is {runner!r}, expected {words} or MODULE:FUNCTION")
    elif runner != PLAIN and runner not in engines.get(artifact.runtime).alternatives:
        title = runtimes.get(artifact.runtime).title
        raise InputError(
            f"{artifact.directory}: is a program for {title}, which {known[runner]} cannot run; "
            f"expected --runner {PLAIN}"
        )


def stock_generate(
    artifact: Artifact, text: str, max_new_tokens: int, composition: str | None = None
) -> str:
    """What the runtime's stock runner (``Engine.stock``) writes after ``text``, greedily.

    Args:
        artifact: What to run; the hashes of one of ours are checked first.
        text: The whole prompt.
        max_new_tokens: Most tokens to write.
        composition: Of a bundle, the composition to run; see ``Engine.gap``.

    Raises:
        InputError: As ``open_runner``, a composition that the stock runner cannot run, or a file
            of the tokenizer that is not one (``check_tokenizer_files``).
    """
    engine = engines.get(artifact.runtime)
    if (gap := engine.gap(composition)) is not None:
        raise InputError(f"{artifact.directory}: {gap}")
    artifact.check()
    check_tokenizer_files(artifact.directory)
    engine.try_program(artifact)
    return engine.generate(artifact, text, max_new_tokens, composition)
