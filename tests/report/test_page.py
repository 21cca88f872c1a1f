"""The page as text, and as a browser shows it."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from memopt.ir import MemoryPlan, PlannedLayer
from memopt.measure import CATEGORIES, Comparison, Holding, Timeline
from memopt.report.page import comparison_page, timeline_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def line(peak_mib: int) -> Timeline:
    def moment(activations_mib: int) -> tuple[int, ...]:
        return tuple(2**20 * {"activations": activations_mib, "parameters": 5}.get(name, 0) for name in CATEGORIES)

    moments = tuple(moment(size) for size in (0, peak_mib // 2, peak_mib - 5, peak_mib // 3, 0))
    holding = Holding("activations", "aten.cat.default  model.py:3 forward<&>", 7, (peak_mib - 5) * 2**20)
    return Timeline(moments, (("forward", 0), ("backward", 2), ("update", 4)), 2, (holding,))


@pytest.fixture
def compared(comparison: Comparison) -> Comparison:
    return replace(comparison, timeline_before=line(200), timeline_after=line(50))


def test_the_page_holds_the_report_and_asks_the_network_for_nothing(compared: Comparison) -> None:
    page = comparison_page(compared, "model.py:<Net>")
    assert "<h1>model.py:&lt;Net&gt;</h1>" in page
    assert "<td>activations</td><td>195.0 MiB</td><td>45.0 MiB</td><td>0.231 ×</td>" in page
    assert "forward&lt;&amp;&gt;" in page
    assert "At the peak, by category" in page
    for note in compared.notes:
        assert note in page
    assert "<strong>Predicted for a GPU, memopt does not pay" in page
    # Names of namespaces are no requests.
    addresses = set(re.findall(r'https?://[^"\s<)]+', page))
    assert all(
        address.startswith(
            ("http://www.w3.org/", "http://purl.org/", "http://creativecommons.org/", "https://matplotlib.org/")
        )
        for address in addresses
    )
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\((?!#)", page)


def test_the_page_says_what_the_terminal_says_of_plans_and_checks(comparison: Comparison) -> None:
    layers = tuple(PlannedLayer(f"block.{n}", 1, "layer" if n else "concat", 2**20, 1e-4, 0.0, 0.0) for n in range(3))
    plan = MemoryPlan(300 * 2**20, "GPU", "fast", layers, 2**28, 2**28, None, 5e-4)
    page = comparison_page(replace(comparison, plan=plan), "model.py:Net")
    assert '<td>1</td><td class="text">1</td><td class="text">concat</td><td>1.00 MiB</td>' in page
    assert "Level &quot;layer&quot; keeps the features alone" in page
    assert f"Checked on {', '.join('x'.join(map(str, shape)) for shape in comparison.checked_shapes)}." in page
    untouched = replace(comparison, explanation=replace(comparison.explanation, chains=()))
    assert "Nothing was rewritten" in comparison_page(untouched, "model.py:Net")
    assert "Nothing was rewritten" not in page
    assert "Memory plan" not in comparison_page(comparison, "model.py:Net")


def test_a_comparison_without_prediction_has_a_page_without_a_timeline(comparison: Comparison) -> None:
    assert "<svg" not in comparison_page(comparison, "model")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page was not looked at in a browser")
def test_a_browser_shows_the_page_whole(compared: Comparison, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(comparison_page(compared, "model.py:Net"), encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [f"--user-data-dir={tmp_path}/profile", "--host-resolver-rules=MAP * ~NOTFOUND"]
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", f"<script>{_PROBE}</script></body>"))
    dump = subprocess.run(
        [*command, "--window-size=1200,900", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    seen = dict(re.findall(r'data-([a-z]+)="([^"]*)"', dump.partition("<body")[2].partition(">")[0]))
    width, height, texts = (int(seen[name]) for name in ("width", "height", "texts"))
    assert width > 600  # the picture is as wide as the page
    assert height > 200
    assert texts > 0
    assert int(seen["overflow"]) == 0  # nothing runs out of the page to the right
    assert int(seen["requests"]) == 0
    assert int(seen["rows"]) >= 15


_PROBE = """
const box = document.querySelector("svg").getBoundingClientRect();
const set = (name, value) => { document.body.dataset[name] = Math.round(value); };
set("width", box.width);
set("height", box.height);
set("texts", document.querySelectorAll("svg g[id^=text], svg text").length);
set("overflow", Math.max(0, document.documentElement.scrollWidth - window.innerWidth));
set("requests", performance.getEntriesByType("resource").length);
set("rows", [...document.querySelectorAll("tr")].filter(row => row.getBoundingClientRect().height > 0).length);
"""


def test_the_timeline_has_a_page_of_its_own() -> None:
    page = timeline_page(line(200), None, "Net")
    assert page.count("<svg") == 1
    assert "<td>activations</td><td>195.0 MiB</td><td>—</td>" in page
