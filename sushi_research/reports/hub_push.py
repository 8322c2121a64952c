"""Uploads an adapter file of a run to a repository of the Hugging Face hub, with a model card and its pictures, in one commit.

What the author has written on the card since stays: the licence and every other entry of its metadata that the run does not make,
and the text outside the marked part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sushi_research.adapters import bundled
from sushi_research.errors import UserError, first_line
from sushi_research.reports.model_card import LICENCE, ModelCard, model_card
from sushi_research.runs.run_folder import RunFolder

BEGIN, END = "<!-- made from the run: begin; a new upload replaces this part -->", "<!-- made from the run: end -->"
CARD = "README.md"


@dataclass(frozen=True)
class Pushed:
    """What was uploaded: the address of the repository, the files of new tokens, the number of pictures, and a sentence about a
    card that was left alone."""

    url: str
    token_files: tuple[str, ...]
    pictures: int
    note: str | None


def push(run: RunFolder, adapter: Path, repository: str, *, public: bool = False) -> Pushed:
    """Uploads `adapter`, a file of the run, to `repository` ("owner/name", or "name" for the user's own), with a file for each of
    its new tokens.

    A repository that is not there is made, private unless `public`; of one that is there, nothing but these files changes.
    UserError if the card cannot be made, or if the hub cannot be reached or refuses it; the repository is then as it was.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    model_card(run, adapter, repository)  # an error of the run's files comes before a repository is made
    tokens = list(bundled.files_from(adapter).values())
    api = HfApi(library_name="sushi-research")
    with _refusals(repository):
        made = api.create_repo(repository, private=not public, exist_ok=True)
    card = model_card(run, adapter, made.repo_id)
    with _refusals(repository):
        text, note = merged(_text_there(api, made.repo_id), card)
        operations = [CommitOperationAdd(adapter.name, str(adapter))]
        operations += [CommitOperationAdd(name, content) for name, content in tokens]
        if text is not None:
            operations += [CommitOperationAdd(name, str(path)) for name, path in card.pictures.items()]
            operations.append(CommitOperationAdd(CARD, text.encode()))
        api.create_commit(made.repo_id, operations, commit_message=f"Upload {adapter.name}")
    return Pushed(str(made), tuple(name for name, _ in tokens), len(card.pictures) if text is not None else 0, note)


def merged(there: str | None, card: ModelCard) -> tuple[str | None, str | None]:
    """(the text of the card to upload, a sentence to say). The text is None if the card that is there is not ours to change."""
    from huggingface_hub import ModelCard as HubCard

    ours = f"{BEGIN}\n\n{card.text}\n\n{END}"
    if there is None:
        return _with_data(card.data, f"{ours}\n\n{LICENCE}"), None
    alone = f"its {CARD} is left as it is"
    try:
        found = HubCard(there, ignore_metadata_errors=False)
        data = found.data.to_dict()
    except Exception as error:  # YAML has errors of many classes
        return None, f"{alone}, because its metadata cannot be read ({first_line(error)})"
    before, begin, rest = found.text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return None, f"{alone}, because it has not the marked part that an earlier upload wrote"
    if "license" in data:
        after = after.replace(LICENCE, "")
    tags = [*(data.get("tags") or []), *card.data["tags"]]
    kept = {key: value for key, value in data.items() if key != "widget"}
    body = f"{before.strip()}\n\n{ours}\n\n{after.strip()}".strip()
    return _with_data({**kept, **card.data, "tags": [*dict.fromkeys(tags)]}, body), None


def _with_data(data: Mapping[str, Any], text: str) -> str:
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{text}\n"


def _text_there(api: Any, repository: str) -> str | None:
    """The repository's card; None if it has none."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(api.hf_hub_download(repository, CARD)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return None


@contextlib.contextmanager
def _refusals(repository: str) -> Iterator[None]:
    """A block in which every error of the hub is a UserError."""
    try:
        yield
    except Exception as error:  # those of the hub, its network library and the disk have no common base class
        raise UserError(
            f"{repository} could not be uploaded to the hub ({type(error).__name__}: {first_line(error)}): check the name, the "
            "connection, and that `hf auth login` (or HF_TOKEN) has a token that may write."
        ) from error
