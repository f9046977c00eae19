"""Push an artifact to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from caliport.core.directories import check_files
from caliport.core.errors import InputError, one_line


def check_repo_id(repo_id: str) -> None:
    """Check the form of a repository's name; needs no network.

    Raises:
        InputError: Not a ``NAME`` or ``OWNER/NAME`` that the Hub accepts.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {repo_id}: {_line(error)}; expected OWNER/NAME") from None


def push(directory: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload an artifact to a repository, which is created if it does not exist.

    Other files in the repository are kept. The endpoint and the token are those of
    huggingface_hub: ``HF_ENDPOINT``, ``HF_TOKEN`` or a stored login.

    Args:
        directory: A finished artifact; its hashes are checked first.
        repo_id: ``OWNER/NAME``.
        private: Whether a newly created repository is private.

    Returns:
        The URL of the commit.

    Raises:
        InputError: The Hub refuses the upload or cannot be reached. The artifact is unchanged.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    check_repo_id(repo_id)
    check_files(directory)
    disable_progress_bars()
    api = HfApi(library_name="caliport")
    try:
        made = api.create_repo(repo_id, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=directory,
            commit_message=f"caliport export: {directory.name}",
            ignore_patterns=[".*", "*/.*"],
        )
    except Exception as error:  # httpx, huggingface_hub, or ValueError for malformed responses
        raise InputError(
            f"--push-to-hub {repo_id}: {_line(error)}; the artifact stays in {directory}"
        ) from error
    return str(commit.commit_url)


def _line(error: Exception) -> str:
    return one_line(error, 300) or type(error).__name__
