"""The page stands alone, is well formed, and opens in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from turnout.audit import audit, audit_decoder, models
from turnout.audit.html import comparison_page, page
from turnout.audit.report import AuditReport
from turnout.audit.svg import dataflow

pytest.importorskip("transformers")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_NO_END = {"meta", "br", "rect", "path"}


class Balanced(HTMLParser):
    """Fails on an end tag without its start."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in _NO_END:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in _NO_END:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report() -> AuditReport:
    model = models.small_gemma4(torch.bfloat16, num_hidden_layers=2)
    return audit_decoder(model, prefill=16, decode=1)


def test_the_page_is_balanced_and_asks_nothing_of_the_network(report) -> None:
    text = page(report)
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert not re.search(r"(src|href)=|@import|url\((?!#)|<script", text)


def test_the_picture_shows_the_layer_from_router_to_experts_with_its_redundant_copies(report) -> None:
    kinds = [node.kind for node in report.picture.nodes]
    assert report.picture.layer == "model.layers.0"
    assert kinds.count("dtype mismatch") == 2  # logits, and ids counted by histc
    assert kinds.count("repeated") == 3  # two norms of one input, and a norm's weight
    svg = dataflow(report.picture)
    assert svg.count("<title>") == len(report.picture.nodes)


def test_every_edge_goes_from_an_earlier_operator_to_a_later_one(report) -> None:
    assert report.picture.edges
    assert all(writer < reader for writer, reader in report.picture.edges)


def test_what_comes_from_the_program_is_escaped() -> None:
    def program(x):
        raise ValueError("<script>alert(1)</script>")

    assert "<script" not in page(audit(program, torch.ones(2)))


def test_a_comparison_has_a_bar_for_each_side(report) -> None:
    text = comparison_page(report, report)
    assert "Before" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(set(ids)) == len(ids) == 2
    assert set(re.findall(r"url\(#([^)]+)\)", text)) == set(ids)
    assert text.count('fill-opacity="0.35"') == text.count('fill-opacity="1.0"') > 0


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; Debian's package is called chromium")
def test_chromium_opens_the_page_and_draws_every_box(report, tmp_path: Path) -> None:
    file, shot = tmp_path / "report.html", tmp_path / "report.png"
    file.write_text(page(report), encoding="utf-8")
    common = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dom = subprocess.run(
        [*common, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert dom.stdout.count('class="op"') == len(report.picture.nodes)
    subprocess.run([*common, "--window-size=1100,1600", f"--screenshot={shot}", file.as_uri()],
                   capture_output=True, timeout=120, check=True)  # fmt: skip
    image = pytest.importorskip("PIL.Image").open(shot).convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert image.size == (1100, 1600)
    assert {(0xC6, 0x28, 0x28), (0xE6, 0x51, 0x00)} <= colours  # dtype mismatch and repeated stand out
