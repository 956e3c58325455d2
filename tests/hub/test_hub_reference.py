"""What is taken for a Hub reference, what for a path, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.checkpoint.hub_reference import parse_reference
from sparsity_audit.errors import UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "repo_id", "revision", "subfolder"),
    [
        ("org/model", "org/model", None, ""),
        ("org/model@main", "org/model", "main", ""),
        (f"org/model@{COMMIT}", "org/model", COMMIT, ""),
        ("org/Model-1.5B_v2", "org/Model-1.5B_v2", None, ""),
        ("hf://org/model", "org/model", None, ""),
        ("hf://org/model/", "org/model", None, ""),
        ("hf://org/model@v1.0/a/b", "org/model", "v1.0", "a/b"),
        ("hf://org/model/a b/c", "org/model", None, "a b/c"),
        ("org/model@refs/pr/12", "org/model", "refs/pr/12", ""),
        ("hf://org/model@refs/pr/12/sub", "org/model", "refs/pr/12", "sub"),
        ("hf://org/model@feature%2Fx/sub", "org/model", "feature/x", "sub"),
    ],
)
def test_the_accepted_forms_are_split_into_their_parts(text, repo_id, revision, subfolder):
    reference = parse_reference(text)
    assert (reference.repo_id, reference.revision, reference.subfolder) == (repo_id, revision, subfolder)
    assert reference.text == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "model", "./org/model", "../model", "/org/model", "~/model", "a/b/c", "a/b/c@main"),
        *("runs/model.safetensors", "runs/policy.pt", "C:\\models/x"),
    ],
)
def test_what_can_only_be_a_path_is_left_to_the_file_system(text):
    assert parse_reference(text) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hf://", "two parts"),
        ("hf://model", "two parts"),
        ("hf://model@main", "two parts"),
        ("hf:///model", "empty name"),
        ("org/", "empty name"),
        ("org/model@", "empty revision"),
        ("hf://org/model@/sub", "empty revision"),
        ("hf://org/model/sub@main", "before the folder"),
        ("org/mo del", "'mo del' is not a name"),
        ("org/model--x", "'model--x' is not a name"),
        ("org/..", "'..' is not a name"),
        ("org/model.git", "'model.git' is not a name"),
        ("org/" + "m" * 97, "is not a name"),
        ("org/modèle", "is not a name"),
        ("org/model@a b", "'a b' is not a branch"),
        ("org/model@a..b", "'a..b' is not a branch"),
        ("org/model@main@main", "is not a branch"),
        ("org/model@main/sub", "needs the hf:// form"),
        ("hf://org/model@main/../x", "is not a folder"),
        ("hf://org/model//x", "is not a folder"),
        ("hf://org/model/a\\b", "is not a folder"),
    ],
)
def test_a_malformed_reference_is_refused_with_the_accepted_forms(text, found):
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    message = str(caught.value)
    assert found in message
    assert "hf://org/model[@revision][/subfolder]" in message
    assert repr(text) in message


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="ab0./@-_~:% \\h\n", max_size=20), st.booleans())
def test_any_text_is_a_reference_a_path_or_a_usage_error_and_the_uri_round_trips(text, has_scheme):
    try:
        reference = parse_reference(("hf://" if has_scheme else "") + text)
    except UsageError:
        return
    assert reference is not None or not has_scheme
    if reference is not None:
        again = parse_reference(reference.uri)
        assert (again.repo_id, again.revision, again.subfolder) == (
            reference.repo_id,
            reference.revision,
            reference.subfolder,
        )
        assert ".." not in reference.path_of("x").split("/")
