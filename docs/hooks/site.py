"""MkDocs hook: pages made from other files of the project, and links to files outside of docs/, which become files of the site."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import pages

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)\)")
NAMED_BY_FILE = re.compile(r"\[(?:docs/)?[\w-]+\.md\]\(([\w-]+\.md)((?:#[\w-]+)?)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = {"index.md": _readme(), "third_party.md": (ROOT / "THIRD_PARTY.md").read_text(), "configuration.md": pages.configuration(), "recipes.md": pages.recipes()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    texts = [file.content_string for file in files.documentation_pages()]
    for path in sorted({path for text in texts for path in OUTSIDE.findall(text) if (ROOT / path).is_file()}):
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return NAMED_BY_FILE.sub(lambda link: f"[{_title(files, link[1])}]({link[1]}{link[2]})", OUTSIDE.sub(r"](files/\1)", markdown))


def _title(files: Files, name: str) -> str:
    found = files.get_file_from_path(name)
    return found.page.title if found and found.page and found.page.title else name


def _readme() -> str:
    """With the links that it needs inside docs/."""
    text = (ROOT / "README.md").read_text().replace("](docs/", "](").replace("](THIRD_PARTY.md)", "](third_party.md)")
    return text.replace("](CITATION.cff)", "](../CITATION.cff)")
