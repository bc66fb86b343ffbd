"""`make docs`: the site builds without a warning, holds every page and setting, and asks nothing of a network."""

import ast
import dataclasses
import functools
import html
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml

import configs
from cluster.config import RunConfig
from cluster.config_check import leaf_keys
from cluster.errors import OUR_PACKAGES
from tests.conftest import ROOT

DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "hooks"))

import figures


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built strictly: a link, an anchor or a page outside the navigation that is wrong is an error (mkdocs.yml, validation)."""
    out = tmp_path_factory.mktemp("docs") / "site"
    # A proxy that nobody is behind: the build must not need the network.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")}
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


class Loaded(HTMLParser):
    """What a page makes a browser load."""

    def __init__(self, page):
        super().__init__()
        self.urls = []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        link = tag == "link" and given.get("rel") not in ("next", "prev", "canonical")
        self.urls += [given[name] for name in ("src", "srcset", "data", "poster") if given.get(name)] + ([given["href"]] if link else [])


def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        urls = Loaded(page).urls
        assert len(urls) > 3 and not [u for u in urls if re.match(r"(\w+:)?//", u)], page
        assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", page.read_text()), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", sheet.read_text()), sheet


def test_the_search_has_its_index_as_a_script(site):
    """A page opened from a file may not fetch; docs/assets/iframe-worker.js is the search's worker there."""
    assert (site / "search/search_index.js").read_text().startswith("var __index = {")
    assert "assets/iframe-worker.js" in (site / "index.html").read_text()


def navigation(entries):
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else navigation(value)


def test_every_page_is_in_the_navigation(site):
    text = (ROOT / "mkdocs.yml").read_text()
    named = list(navigation(yaml.safe_load(text)["nav"]))
    assert sorted(named) == sorted({*(p.name for p in DOCS.glob("*.md")), "index.md", "configuration.md", "recipes.md", "third_party.md"})
    assert all((site / name.replace(".md", ".html")).is_file() for name in named)
    validation = yaml.safe_load(text)["validation"]
    assert {value for kind in validation.values() for value in kind.values()} == {"warn"}, "which --strict makes an error"


def words(page):
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def test_the_configuration_page_has_every_setting(site):
    page = (site / "configuration.html").read_text()
    missing = [key for key in leaf_keys(RunConfig) if f'id="{key}"' not in page]
    assert not missing and 'id="reward.preset"' in page and 'id="serve-segmentation.roots"' in page and 'id="sample-frames.htfs.intervals"' in page
    text = " ".join(words(site / "configuration.html").split())
    for section in (RunConfig().learner, RunConfig().loop, RunConfig().reward.weights):
        for field in dataclasses.fields(section):
            assert " ".join(field.metadata["help"].replace("`", "").split()) in text, field.name
    assert "learner.clip_low a number; 0 .. 1; default 0.2 Probability ratios below 1 - clip_low are clipped" in text


def test_the_start_page_is_the_readme_and_the_recipes_are_the_files(site):
    assert "What the paper leaves open is decided in Rewards and said there." in " ".join(words(site / "index.html").split())
    text = words(site / "recipes.html")
    assert all(name in text and (configs.path(name)).read_text().splitlines()[-1].strip() in text for name in configs.names())


def test_files_outside_of_docs_are_part_of_the_site(site):
    assert (site / "files/examples/cluster/node.sh").read_text() == (ROOT / "examples/cluster/node.sh").read_text()
    assert (site / "files/CITATION.cff").is_file()


@functools.cache
def texts_of_the_source():
    """Every text of our packages, with `...` where an f-string has a value."""
    found = []
    for path in (path for package in OUR_PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted_messages():
    return re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("message", quoted_messages())
def test_the_messages_that_troubleshooting_quotes_are_in_the_source(message):
    parts = [part for part in message.split("...") if part]
    assert max(map(len, parts)) >= 8
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    assert any(pattern.search(text) for text in texts_of_the_source()), f"no message of the program reads {message!r}"


def test_troubleshooting_has_the_likely_errors():
    text = (DOCS / "troubleshooting.md").read_text()
    assert len(quoted_messages()) >= 25 and text.count("\n### ") == len(quoted_messages())


def test_the_figures_are_those_of_the_run_of_all_benchmarks(site):
    page, run = (DOCS / "performance.md").read_text(), json.loads((DOCS / "bench-all.json").read_text())
    assert figures.with_figures(page, run) == page, "python docs/hooks/figures.py"
    for comment in ("the run", "targets", *(f"figures of {name}" for name in figures.FIGURES)):
        assert page.count(f"<!-- {comment} -->") == 1
    text = " ".join(words(site / "performance.html").split())
    assert text.count("medians, and least to most") == len(figures.FIGURES) == 20
    recorded = run["benchmarks"]["openmp_waiting"]["record"]["beside_a_busy_process"]["default_over_ours"]
    assert f"beside a busy process {recorded['median']:.3g} ({recorded['min']:.3g} to {recorded['max']:.3g}) times the time" in text


def test_a_figure_that_changes_changes_its_table_and_what_holds():
    page, run = (DOCS / "performance.md").read_text(), json.loads((DOCS / "bench-all.json").read_text())
    run["benchmarks"]["whole_loop_small"]["record"]["times_as_fast_as_trl"]["ours"] = {"median": 2.96, "min": 2.5, "max": 3.25}
    made = figures.with_figures(page, run)
    assert made.count("2.96 (2.5 to 3.25)") == 2 and "| at least 3 times as fast | 2.96 (2.5 to 3.25) | **does not hold** |" in made
    assert figures.with_figures(made, json.loads((DOCS / "bench-all.json").read_text())) == page
    del run["benchmarks"]["whole_loop_small"]["record"]["times_as_fast_as_trl"]
    with pytest.raises(LookupError):
        figures.with_figures(page, run)
