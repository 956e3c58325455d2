"""Turn what a user typed into a `Catalogue`.

Contract: a directory of safetensors or torch files with or without an index, a single file, or a Hub
reference; a local path wins over a Hub name, safetensors over torch files, and a note says so. An index is
believed only where the shards confirm it: a named shard that is missing, or a tensor that is not in its
shard, is an error. A directory may also hold what a trainer writes (`trainer_folders`); `REF#master` asks
for the fp32 copy of its weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsity_audit.checkpoint.access import Access, current_access
from sparsity_audit.checkpoint.adapter import merge_adapter
from sparsity_audit.checkpoint.formats import GGUF_REMEDY
from sparsity_audit.checkpoint.hub import fetch
from sparsity_audit.checkpoint.hub_reference import SCHEME, HubReference, parse_reference
from sparsity_audit.checkpoint.joining import (
    MAX_JSON_BYTES,
    confirm_index,
    gathered,
    join_contents,
    parse_object,
    weight_map_of,
)
from sparsity_audit.checkpoint.layout import (
    ADAPTER_CONFIG,
    choose_layout,
    is_adapter,
    missing_shards,
    unread_note,
)
from sparsity_audit.checkpoint.object_store import is_object_reference, open_objects
from sparsity_audit.checkpoint.spelling import MASTER, adapted_parts, local_path, scheme_remedy
from sparsity_audit.checkpoint.store import Catalogue, FileEntry
from sparsity_audit.checkpoint.trainer_folders import (
    TrainerKind,
    inner_folder,
    open_trainer_folder,
    trainer_kind,
)
from sparsity_audit.errors import (
    CheckpointNotFoundError,
    UnsupportedFormatError,
    UsageError,
)

__all__ = ["open_checkpoint"]


def open_checkpoint(reference: str | Path) -> Catalogue:
    """The catalogue of a checkpoint directory, file, Hub reference or object store; reads headers only.

    Args:
        reference: A local path, or text that names a model on the Hub; a `Path` is always local.

    Raises:
        CheckpointNotFoundError: Nothing is there, or a shard is missing.
        HubError: The Hub refused, failed, or does not have it.
        ObjectStoreError: The object store refused or failed.
        MissingExtraError: The object store's library is not installed.
        UsageError: Shaped like a Hub reference, but not one.
        CorruptCheckpointError: A header or the index contradicts the files.
        UnsupportedFormatError: A file of a kind that is not read, with the way to convert it.
        UnsafePickleError: A torch file asks for more than tensors.
    """
    if reference == "":
        raise UsageError("reference", "the text is empty", expected="a path or a Hub reference; '.' is here")
    text, path = str(reference), local_path(reference)
    if text.endswith(MASTER) and not path.exists():
        return _open_master(text.removesuffix(MASTER))
    parts = adapted_parts(text) if not path.exists() else None
    if parts is not None:
        return merge_adapter(*(open_checkpoint(part) for part in parts))
    if isinstance(reference, str) and is_object_reference(reference):
        return open_objects(reference)
    is_hub_only = isinstance(reference, str) and text.startswith(SCHEME)
    if path.is_dir() and not is_hub_only:
        catalogue = _with_note_on_unread(_open_directory(path, reference=text), _file_names(path))
    elif path.is_file() and not is_hub_only:
        catalogue = _catalogue([path], folder=path.parent, reference=text, resolved=path)
    else:
        hub_reference = parse_reference(text) if isinstance(reference, str) else None
        if hub_reference is None:
            raise CheckpointNotFoundError(
                text,
                "no such file or directory",
                expected="a checkpoint directory or file, a Hub reference such as org/model@revision, or "
                "s3://bucket/prefix",
                remedy=scheme_remedy(text),
            )
        return _open_hub(hub_reference)
    return replace(catalogue, notes=(*catalogue.notes, *_shadow_note(reference)))


def _open_master(text: str) -> Catalogue:
    """The fp32 copy of the weights of a trainer's folder."""
    path = local_path(text)
    parts = adapted_parts(text) if not path.exists() else None
    if parts is not None:
        return merge_adapter(*(open_checkpoint(part) for part in parts), rounded=False)
    if not path.is_dir():
        raise CheckpointNotFoundError(
            text + MASTER,
            f"{text} is no directory here",
            expected="a trainer's checkpoint directory, which holds optimizer state",
            remedy="leave #master out to read the weights as they are stored",
        )
    catalogue = _open_directory(path, reference=text, master=True)
    return replace(catalogue, reference=text + MASTER, resolved=catalogue.resolved + MASTER)


def _open_hub(reference: HubReference) -> Catalogue:
    if current_access() is not Access.DOWNLOAD:
        from sparsity_audit.checkpoint.hub_stream import open_streamed

        return open_streamed(reference)
    snapshot = fetch(reference)
    catalogue = _open_directory(snapshot.folder, reference=reference.text)
    return replace(
        catalogue,
        resolved=snapshot.reference.uri,
        files=tuple(replace(f, name=snapshot.reference.path_of(f.name)) for f in catalogue.files),
        notes=(*snapshot.notes, *catalogue.notes),
    )


def _shadow_note(reference: str | Path) -> tuple[str, ...]:
    try:
        if not isinstance(reference, str) or parse_reference(reference) is None:
            return ()
    except UsageError:
        return ()
    return (f"{reference}: the local path of this name was used; write {SCHEME}{reference} for the Hub",)


def _open_directory(folder: Path, *, reference: str, master: bool = False) -> Catalogue:
    names = _file_names(folder)
    kind = trainer_kind(names, master=master)
    if kind is not None:
        return _open_trainer(folder, names, kind, master=master, reference=reference)
    layout = choose_layout(names)
    inner = inner_folder(folder) if layout is None or master else None
    if inner is not None:
        catalogue = _open_directory(inner, reference=reference, master=master)
        return replace(catalogue, notes=(*catalogue.notes, f"{reference}: read its folder {inner.name}"))
    if master and layout is not None and is_adapter(layout.files):
        return _open_directory(folder, reference=reference)
    if master:
        raise UnsupportedFormatError(
            reference + MASTER,
            "holds no optimizer state that is read",
            expected="a distributed checkpoint (.metadata) or DeepSpeed's *_optim_states.pt",
            remedy="leave #master out to read the weights as they are stored",
        )
    if layout is None and any(name.endswith(".gguf") for name in names):
        raise UnsupportedFormatError(str(folder), "holds GGUF files alone", remedy=GGUF_REMEDY)
    if layout is None:
        raise CheckpointNotFoundError(
            str(folder),
            f"holds no checkpoint ({len(names)} files, no weights among them)" if names else "holds no files",
            expected="*.safetensors, pytorch_model*.bin, *.pt, *.pth, or a trainer's sharded checkpoint",
            remedy="name the directory that holds the weights, or one file",
        )
    if layout.index is not None:
        index = folder / layout.index
        weight_map = weight_map_of(_read_json(index), subject=str(index))
        shards = sorted(folder / shard for shard in set(weight_map.values()))
        for shard in shards:
            if not shard.is_file():
                raise CheckpointNotFoundError(
                    str(index),
                    f"names the shard {shard.name}, which is not there",
                    remedy="fetch the missing shard",
                )
        catalogue = _catalogue(shards, folder=folder, reference=reference, resolved=folder)
        confirm_index(str(index), weight_map, catalogue)
        return catalogue
    for shard in missing_shards(layout.files):
        raise CheckpointNotFoundError(
            str(folder),
            f"lacks {shard}, which the shard numbering promises",
            remedy="fetch the missing shard",
        )
    paths = [folder / name for name in layout.files]
    catalogue = _catalogue(paths, folder=folder, reference=reference, resolved=folder)
    if is_adapter(layout.files) and ADAPTER_CONFIG in names:
        return replace(catalogue, adapter=_read_json(folder / ADAPTER_CONFIG))
    return catalogue


def _open_trainer(
    folder: Path, names: list[str], kind: TrainerKind, *, master: bool, reference: str
) -> Catalogue:
    files, contents = open_trainer_folder(folder, names, kind, master=master)
    beside = [folder / "config.json", folder / "huggingface" / "config.json"]
    config = next((path for path in beside if path.is_file()), beside[0])
    resolved = str(folder.resolve())
    return gathered(files, contents, reference=reference, resolved=resolved, config=_read_config(config))


def _file_names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir() if path.is_file()]
    except OSError as error:
        raise CheckpointNotFoundError(
            str(folder), error.strerror or "cannot be listed", expected="a readable directory"
        ) from error


def _with_note_on_unread(catalogue: Catalogue, names: list[str]) -> Catalogue:
    read = [entry.path.name for entry in catalogue.files]
    return replace(catalogue, notes=(*catalogue.notes, *unread_note(catalogue.reference, names, read)))


def _catalogue(paths: list[Path], *, folder: Path, reference: str, resolved: Path) -> Catalogue:
    files = tuple(FileEntry.from_path(path) for path in paths)
    contents = join_contents(files, subject=str(folder))
    config = _read_config(folder / "config.json")
    return gathered(files, contents, reference=reference, resolved=str(resolved.resolve()), config=config)


def _read_config(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointNotFoundError(
            str(path), error.strerror or "cannot be read", expected="a readable file"
        ) from error
    return parse_object(raw, subject=str(path))
