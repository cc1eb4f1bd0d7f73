"""Which model a person means who names a repository, a file, or a part of the name of one."""

from __future__ import annotations

import re

import pytest

from trio_cluster.engines._gguf_files import choose_model, find_models
from trio_cluster.engines._hub import HubReference

PATHS = [
    "README.md",
    "Qwen-Q4_K_M.gguf",
    "Qwen-UD-Q4_K_XL.gguf",
    "Qwen.Q8_0.GGUF",
    "mmproj-F16.gguf",
    "BF16/Qwen-BF16-00002-of-00002.gguf",
    "BF16/Qwen-BF16-00001-of-00002.gguf",
    "F32/Qwen-F32-00001-of-00003.gguf",
]


def test_parts_are_one_model_and_other_files_are_none() -> None:
    assert [(model.name, list(model.files), model.missing) for model in find_models(PATHS)] == [
        ("Qwen-BF16", ["BF16/Qwen-BF16-00001-of-00002.gguf", "BF16/Qwen-BF16-00002-of-00002.gguf"], 0),
        ("Qwen-F32", ["F32/Qwen-F32-00001-of-00003.gguf"], 2),
        ("Qwen-Q4_K_M", ["Qwen-Q4_K_M.gguf"], 0),
        ("Qwen-UD-Q4_K_XL", ["Qwen-UD-Q4_K_XL.gguf"], 0),
        ("Qwen.Q8_0", ["Qwen.Q8_0.GGUF"], 0),
    ]


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        (None, "Qwen-Q4_K_M"),
        ("Q4_K_M", "Qwen-Q4_K_M"),
        ("q8_0", "Qwen.Q8_0"),
        ("Q4_K_XL", "Qwen-UD-Q4_K_XL"),
        ("UD-Q4_K_XL", "Qwen-UD-Q4_K_XL"),
        ("Qwen-Q4_K_M.gguf", "Qwen-Q4_K_M"),
        ("qwen-q4_k_m", "Qwen-Q4_K_M"),
        ("BF16", "Qwen-BF16"),
        ("BF16/Qwen-BF16-00001-of-00002.gguf", "Qwen-BF16"),
        ("BF16/Qwen-BF16", "Qwen-BF16"),
    ],
)
def test_a_model_is_found_by_what_people_type(wanted: str | None, name: str) -> None:
    assert choose_model(find_models(PATHS), wanted).name == name


def test_the_only_model_needs_no_name() -> None:
    assert choose_model(find_models(["x.gguf", "mmproj-x.gguf"]), None).name == "x"


@pytest.mark.parametrize(
    ("paths", "wanted", "expected"),
    [
        ([], None, "it has no .gguf files"),
        (["a.gguf", "b.gguf"], None, "it has several .gguf files; name one: a.gguf, b.gguf"),
        (["a.gguf", "b.gguf"], "c", "no file is meant by 'c': a.gguf, b.gguf"),
        (
            ["a-Q8.gguf", "b-Q8.gguf", "c.gguf"],
            "Q8",
            "'Q8' is in the names of several files: a-Q8.gguf, b-Q8.gguf",
        ),
        (PATHS, "Q4_K", "no file is meant by 'Q4_K': "),
        (PATHS, "F32", "2 of the files of F32/Qwen-F32 are missing"),
        ([f"{number:02}.gguf" for number in range(30)], "x", "19.gguf and 10 more"),
    ],
)
def test_what_is_not_clear_is_an_error_that_lists_what_there_is(
    paths: list[str], wanted: str | None, expected: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        choose_model(find_models(paths), wanted)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/models/x.gguf", None),
        ("hf:owner/repo", HubReference("owner/repo")),
        ("hf:gpt2", HubReference("gpt2")),
        ("hf:owner/repo:Q4_K_M", HubReference("owner/repo", "main", "Q4_K_M")),
        (
            "hf:owner/repo:a/b-00001-of-00002.gguf",
            HubReference("owner/repo", "main", "a/b-00001-of-00002.gguf"),
        ),
        ("hf:owner/repo@v1.0:x.gguf", HubReference("owner/repo", "v1.0", "x.gguf")),
        ("hf:owner/repo@0123abc", HubReference("owner/repo", "0123abc")),
    ],
)
def test_a_reference_is_read(text: str, expected: HubReference | None) -> None:
    assert HubReference.parse(text) == expected
    if expected is not None:
        assert str(expected) == text


@pytest.mark.parametrize("text", ["hf:", "hf:a/b/c", "hf:a b", "hf:a/b:", "hf:a/b:c:d", "hf:/x", "hf:../x/y"])
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected hf:REPO or hf:REPO:FILE"):
        HubReference.parse(text)
