"""Shares on the Hub what was trained or prepared: `unitok-hf push out/model me/apples --private true`.

    a model             weights, configuration, processor, text tokenizer, code for `trust_remote_code`, card, samples
    an image tokenizer  weights, configuration, card; as stock diffusers loads it
    Parquet             the data set of prepare-data, as `datasets.load_dataset` loads it

A model or tokenizer is one commit: an upload that is cut off leaves the repository as it was, and the next one sends only
what is missing. Checkpoints, optimizer states and arguments of the run stay at home. The card is made for the repository; a
README.md that somebody has written goes as it is.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer

from ..configuration.configuration_unitok import UniTokConfig
from ..hub import remote_code
from .cards import WEIGHTS, card, gallery, is_ours
from .collators import read_rows


SHARED = (
    "config.json", "generation_config.json", *WEIGHTS, "*.safetensors.index.json", "processor_config.json",
    "tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template.jinja", "adapter/*", "README.md",
)  # fmt: skip


@dataclass
class PushArguments:
    """Arguments of `push`: a folder or Parquet data, and the repository that is to have them."""

    folder: str = field(
        metadata={"help": "Folder of a model or an image tokenizer, or Parquet data.", "positional": True}
    )
    repo: str = field(
        metadata={"help": "Repository on the Hub, OWNER/NAME; made if there is none.", "positional": True}
    )
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to; made if there is none."})
    license: str | None = field(default=None, metadata={"help": "Licence for the card, such as apache-2.0."})
    message: str | None = field(default=None, metadata={"help": "Message of the commit."})

    def __post_init__(self):
        if self.repo.count("/") != 1:
            raise ValueError(f"the repository must be OWNER/NAME, got {self.repo!r}")


def files_to_share(folder: Path, repo: str, license: str | None) -> dict[str, Path | bytes]:
    """What a repository of this model or tokenizer holds: contents by name.

    Raises:
        FileNotFoundError: there is no saved model or tokenizer.
        ValueError: it is of another kind.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"no model, image tokenizer or Parquet data at {folder}")
    about = json.loads(config.read_text(encoding="utf-8"))
    kind = about.get("model_type") or about.get("_class_name") or "something else"
    if kind not in (UniTokConfig.model_type, "VQModel", "UniTokVQModel"):
        raise ValueError(f"{folder} holds no UniTok model or image tokenizer, but {kind}")
    found: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for pattern in SHARED for path in sorted(folder.glob(pattern))
    }
    if not any(name.endswith(".safetensors") for name in found):
        raise FileNotFoundError(f"no weights in {folder}; pickles are not shared")
    if is_ours(folder):
        found["README.md"] = card(folder, repo, license).encode()
    else:  # written on from the card that training left, which calls the model by its folder
        text = found["README.md"].read_text(encoding="utf-8")
        found["README.md"] = text.replace(f'from_pretrained("{folder}")', f'from_pretrained("{repo}")').encode()
    if kind == UniTokConfig.model_type:
        found |= remote_code(folder)
        found |= {name: picture for name, (_, picture) in gallery(folder).items()}
    return found


def push(args: PushArguments, token: str | None = None) -> str:
    """Upload as the arguments say, with a token or that of the login; prints and returns where it is now.

    Raises:
        OSError, ValueError: there is nothing to share; or the Hub said no, with its reason. Nothing has changed there.
    """
    folder = Path(args.folder)
    try:
        if folder.is_dir() and (folder / "config.json").is_file():
            url = _push_folder(args, files_to_share(folder, args.repo, args.license), token)
        elif folder.suffix == ".parquet" or (folder.is_dir() and any(folder.glob("*.parquet"))):
            url = _push_data(args, token)
        else:
            raise FileNotFoundError(f"no model, image tokenizer or Parquet data at {folder}")
    except HfHubHTTPError as error:
        raise ValueError(f"the Hub refused {args.repo}: {str(error).strip()}") from error
    print(url)
    return url


def push_run(trainer: Trainer) -> None:
    """Share what a finished run has left in its folder, when `--push_to_hub` asked for that."""
    args = trainer.args
    if args.push_to_hub:
        private = bool(args.hub_private_repo)
        push(PushArguments(args.output_dir, trainer.hub_model_id, private, args.hub_revision), args.hub_token)


def _push_folder(args: PushArguments, files: dict[str, Path | bytes], token: str | None) -> str:
    api = HfApi(token=token)
    api.create_repo(args.repo, private=args.private, exist_ok=True)
    if args.revision is not None:
        api.create_branch(args.repo, branch=args.revision, exist_ok=True)
    commit = api.create_commit(
        args.repo,
        [CommitOperationAdd(name, content) for name, content in files.items()],
        commit_message=args.message or f"Upload {Path(args.folder).name} with unitok-hf",
        revision=args.revision,
    )
    return commit.commit_url


def _push_data(args: PushArguments, token: str | None) -> str:
    if args.license is not None:
        raise ValueError("--license is for the card of a model; the card of a data set is written by `datasets`")
    commit = read_rows(args.folder).push_to_hub(
        args.repo,
        token=token,
        private=args.private,
        revision=args.revision,
        commit_message=args.message or "Upload data with unitok-hf",
    )
    return commit.commit_url
