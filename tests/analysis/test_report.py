"""The page of results: it holds everything itself; in a browser its sliders work and it fits a phone."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess

import pytest
from PIL import Image
from typer.testing import CliRunner

from flexclear.analysis.report import from_markdown, write_report
from flexclear.cli import app

from helpers.evaluation_pictures import disturbed, picture

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def results(tmp_path):
    """What ``eval``, ``eval run`` and ``analyze`` leave behind, with a table that is wider than a phone."""
    folder = tmp_path / "results <1>"
    for name in ("a", "b"):
        (folder / "pictures" / name).mkdir(parents=True)
    for number in range(2):
        picture(number, 128, 96).save(folder / "pictures" / "a" / f"{number}.png")
        disturbed(picture(number, 128, 96), number).save(folder / "pictures" / "b" / f"{number}.png")
    variants = [{"name": name, "pictures": None} for name in ("a", "b")]
    (folder / "results.json").write_text(json.dumps({"config": {"variants": variants, "steps": 7}}))
    wide = "| | " + " | ".join(f"a long column {n}" for n in range(12)) + " |"
    row = "| a < b | " + " | ".join("1.25" for _ in range(12)) + " |"
    (folder / "results.md").write_text(
        f"Model: x.\n\n## Table\n\n{wide}\n{'|---' * 13}|\n{row}\n\n- a note: {'y' * 300}\n"
    )
    below = folder / "cost"
    below.mkdir()
    (below / "cost.md").write_text("| px | window |\n|---|---|\n| 1024 | dense |\n")
    Image.new("RGB", (3000, 500), "green").save(below / "cost.png")
    return folder


def test_the_page_holds_tables_pairs_and_pictures_and_nothing_from_elsewhere(results):
    done = CliRunner().invoke(app, ["report", str(results)])
    assert done.exit_code == 0, done.output
    page = (results / "report.html").read_text()
    assert page.count('type="range"') == 2
    assert page.count("data:image/png;base64,") == 5
    assert "<td>a &lt; b</td>" in page
    assert re.search(r"<td>1024</td>\s*<td>dense</td>", page)
    assert "<h2>Cost: cost</h2>" in page
    assert '"steps": 7' in html.unescape(page)
    assert "<title>flexclear: results &lt;1&gt;</title>" in page
    assert "---" not in re.sub('base64,[^"]*', "", page)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", page)
    assert 'width="2048"' in page, "large images are scaled down"
    assert write_report(results, 1).read_text().count('type="range"') == 1


def test_markdown_is_text_tables_lists_and_headings_and_nothing_else():
    shown = from_markdown(
        "Model: *x* <script>alert(1)</script> [a](http://b).\nSecond line.\n\n## In_the_layout_of `Table` 2\n\n"
        "| a \\| b | c |\n|---|---|\n| ![d](e) | &amp; |\n\n- one\n- two\n"
    )
    assert "<h3>In_the_layout_of `Table` 2</h3>" in shown
    assert "<p>Model: *x* &lt;script&gt;alert(1)&lt;/script&gt; [a](http://b).<br>" in shown.replace("<br />", "<br>")
    assert "<th>a | b</th>" in shown
    assert "<td>![d](e)</td>" in shown
    assert "<td>&amp;amp;</td>" in shown
    assert shown.count("<li>") == 2
    assert '<div class="wide"><table>' in shown
    assert not re.search("<(script|a|img|em)", shown)


def test_a_bar_in_a_variant_s_name_stays_in_its_cell():
    from flexclear.evaluation.tables import TABLES, markdown

    shown = from_markdown(markdown(TABLES[5], {"r = 8 | pooled": {"psnr": 1.0}}))
    assert "<td>r = 8 | pooled</td>" in shown
    assert shown.count("<td>") == 1 + len(TABLES[5].columns)


def test_a_folder_without_results_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no results of flexclear eval"):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_report(tmp_path / "nothing")


CHECK = """<!doctype html><body><iframe style="width:360px;height:640px;border:0" srcdoc="{page}"></iframe><script>
addEventListener('load', () => {{
  const page = document.querySelector('iframe').contentDocument, found = {{}};
  const slider = page.querySelector('input[type=range]'), upper = page.querySelector('.upper');
  found.before = page.defaultView.getComputedStyle(upper).clipPath;
  slider.value = 20; slider.dispatchEvent(new Event('input'));
  found.after = page.defaultView.getComputedStyle(upper).clipPath;
  found.other = page.defaultView.getComputedStyle(page.querySelectorAll('.upper')[1]).clipPath;
  found.width = page.documentElement.scrollWidth;
  found.drawn = [...page.images].every(image => image.complete && image.naturalWidth > 0);
  const [low, high] = page.querySelectorAll('.pair img');
  found.same = JSON.stringify(low.getBoundingClientRect()) === JSON.stringify(high.getBoundingClientRect());
  found.finger = slider.getBoundingClientRect().height;
  const told = document.createElement('pre'); told.id = 'told'; told.textContent = JSON.stringify(found);
  document.body.append(told);
}});
</script></body>"""


@pytest.mark.skipif(BROWSER is None and os.environ.get("CI") != "true", reason="no Chromium on this machine")
def test_in_a_browser_of_a_phone_s_width_sliders_move_and_nothing_sticks_out(results, tmp_path):
    assert BROWSER is not None, "continuous integration installs Chromium"
    page = write_report(results).read_text()
    outer = tmp_path / "outer.html"
    outer.write_text(CHECK.format(page=html.escape(page)))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=5000", "--dump-dom", outer.as_uri()],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout)
    assert told is not None, done.stderr[-2000:]
    found = json.loads(html.unescape(told[1]))
    assert found["before"] == found["other"] == "inset(0px 0px 0px 50%)"
    assert found["after"] == "inset(0px 0px 0px 20%)"
    assert found["width"] <= 360
    assert found["drawn"]
    assert found["same"]
    assert found["finger"] >= 36
