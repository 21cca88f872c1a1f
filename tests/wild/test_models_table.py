"""The README's table of models says what the committed rows say, and no row hides a failure."""

from tests.wild.models_table import ROOT, load, render, written


def test_readme_shows_the_committed_rows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    assert "<!-- models -->" in text
    assert written(text, render(load())) == text


def test_every_model_is_bit_identical_and_no_chain_half_done() -> None:
    for row in load():
        assert row["equivalent"] == "bit-identical", row
        assert row["rewritten"] in (row["found"], "0"), row
        assert row["torch"], row
        assert row["commit"], row


def test_dense_models_save_memory_and_look_alikes_are_left() -> None:
    rows = {row["model"]: row for row in load()}
    saving = [row for row in rows.values() if int(row["rewritten"])]

    assert len(saving) >= 20
    for row in saving:
        assert int(row["saved_after"]) < int(row["saved_before"]) or "memory_efficient" in row["model"], row
    for name in ("U-Net", "PeleeNet", "HarDNet", "RDN", "MSDNet"):
        assert rows[f"{name} (tests/wild)"]["found"] == "0"
