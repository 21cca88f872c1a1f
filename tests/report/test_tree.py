"""Every chain in its block, with its line, what is done and saved, or the reason why nothing is."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from memopt.ir import ChainReport, Explanation
from memopt.report import explanation_document, print_explanation

MIB = 2**20


@pytest.fixture
def explanation(make_chain: Callable[..., ChainReport]) -> Explanation:
    first = [replace(make_chain(1, number), saved_bytes=number * MIB) for number in (1, 2)]
    last = replace(make_chain(1, 3, "exit"), saved_bytes=4 * MIB, numerics="fast")
    left = [make_chain(2, 1, reason="too [bold]small[/bold]"), make_chain(0, 9, reason="of no block")]
    return Explanation(True, True, False, (left[1], *first, last, left[0]), ("A note.",))


def test_the_tree_has_a_branch_for_each_block(explanation: Explanation) -> None:
    out = io.StringIO()

    print_explanation(explanation, "model.py:Net", out, width=110)

    assert out.getvalue().splitlines() == [
        "model.py:Net",
        "",
        "5 chains found, 3 rewritten, 2 left alone, 7.00 MiB less saved",
        "├── dense block 1: 3 of 3 rewritten, 7.00 MiB less saved",
        "│   ├── block1.layer1.norm1 (model.py:53): recomputes layer exactly, 1.00 MiB less saved",
        "│   ├── block1.layer2.norm1 (model.py:53): recomputes layer exactly, 2.00 MiB less saved",
        "│   └── block1.layer3.norm1 exit (model.py:53): recomputes layer on fused kernels, 4.00 MiB less saved",
        "├── dense block 2: 0 of 1 rewritten",
        "│   └── block2.layer1.norm1 (model.py:53): left alone, because too [bold]small[/bold]",
        "└── in no dense block: 0 of 1 rewritten",
        "    └── block0.layer9.norm1 (model.py:53): left alone, because of no block",
        "",
        "Less saved: what eager saves for backward and these chains do not, by its shapes alone; what memopt saves",
        "instead is not taken off. What a whole step takes, before and after, is predicted by memopt optimize.",
        "",
        "Note: A note.",
    ]


def test_files_below_the_working_directory_are_named_from_there(
    make_chain: Callable[..., ChainReport], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = (f"{tmp_path}/nets/model.py:7", "/elsewhere/model.py:8", "<stdin>:9")
    chains = tuple(replace(make_chain(1, number), source=source) for number, source in enumerate(sources))
    out = io.StringIO()

    print_explanation(Explanation(True, True, False, chains, ()), "model.py:Net", out, width=110)

    assert all(f"({place})" in out.getvalue() for place in ("nets/model.py:7", "/elsewhere/model.py:8", "<stdin>:9"))


def test_a_reason_of_several_chains_is_said_once(make_chain: Callable[..., ChainReport]) -> None:
    shared, own = "keeping more would exceed the budget", "keeping 2.00 MiB spares 54 µs"
    planned = [replace(make_chain(1, n), reason=reason) for n, reason in enumerate((own, own, shared, shared))]
    left = [make_chain(1, n, reason="it is read elsewhere") for n in (4, 5)]
    out = io.StringIO()

    print_explanation(Explanation(True, True, False, (*planned, *left), ()), "model.py:Net", out, width=200)

    assert out.getvalue().splitlines()[3:-1] == [
        f"└── dense block 1: 4 of 6 rewritten; 2 at their level because {shared}; "
        "2 left alone because it is read elsewhere",
        f"    ├── block1.layer0.norm1 (model.py:53): recomputes layer exactly; {own}",
        f"    ├── block1.layer1.norm1 (model.py:53): recomputes layer exactly; {own}",
        "    ├── block1.layer2.norm1 (model.py:53): recomputes layer exactly",
        "    ├── block1.layer3.norm1 (model.py:53): recomputes layer exactly",
        "    ├── block1.layer4.norm1 (model.py:53): left alone",
        "    └── block1.layer5.norm1 (model.py:53): left alone",
    ]


def test_the_document_has_every_chain_in_bytes(explanation: Explanation) -> None:
    document = json.loads(json.dumps(explanation_document(explanation, "model.py:Net")))

    assert document["chains"] == {"found": 5, "rewritten": 3, "saved_bytes": 7 * MIB}
    assert [block["block"] for block in document["blocks"]] == [1, 2, 0]
    assert [chain["saved_bytes"] for chain in document["blocks"][0]["chains"]] == [MIB, 2 * MIB, 4 * MIB]
    assert document["blocks"][1]["chains"][0]["reason"] == "too [bold]small[/bold]"
    assert document["notes"] == ["A note."]
