"""The server's page, as a person sees it: texts or an image in, the answers of dense and sliced side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import open_browser, open_page
from bundles_tiny import make_exported
from PIL import Image

pytest.importorskip("tritonclient", reason="the extra 'serve' is not installed")
from servers_tiny import running

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for head in ("classification", "qa"):
        made[head] = make_exported(tmp_path_factory.mktemp("page") / head, kind=head).root
    return made


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1200, 900), (360, 740)], ids=["desktop", "phone"])
def test_dense_and_sliced_side_by_side(
    browser: Any, bundles: dict[str, Path], scheme: str, size: tuple[int, int]
) -> None:
    trouble: list[str] = []
    with running({"m": bundles["classification"]}, compare=True) as server:
        page = open_page(browser, trouble, viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.fill("#text", "a fine film <b>indeed</b>")
        page.click("button")
        page.wait_for_selector(".model:nth-child(2)")
        assert page.locator(".model h2").all_text_contents() == ["m", "m-dense"]
        for label, time in zip(
            page.locator(".label").all_text_contents(), page.locator(".soft").all_text_contents()[1:], strict=True
        ):
            assert re.fullmatch(r"\w+, [01]\.\d{4}", label)
            assert re.fullmatch(r"\d+\.\d ms \(median of 5\), version 1", time)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert not page.locator("#second").is_visible()
        page.click("summary")
        page.fill("#second", "and another film")
        page.click("button")
        page.wait_for_selector("#said:empty", state="attached")
        assert page.locator(".error").count() == 0
        page.close()
    assert trouble == []


def test_questions_have_their_context(browser: Any, bundles: dict[str, Path]) -> None:
    trouble: list[str] = []
    with running({"asks": bundles["qa"]}) as server:
        page = open_page(browser, trouble)
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector("#second", state="visible")
        page.fill("#text", "who is it")
        page.fill("#second", "it was a warm scene")
        page.click("button")
        page.wait_for_selector(".model pre")
        assert '"answer"' in page.locator(".model pre").text_content()
        page.close()
    assert trouble == []


def test_the_page_asks_for_the_token(browser: Any, bundles: dict[str, Path]) -> None:
    with running({"m": bundles["classification"]}, token=TOKEN) as server:
        page = open_page(browser, [])  # the browser itself complains of the first refusal
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector("#token", state="visible")
        page.fill("#token", TOKEN)
        page.click("button")
        page.wait_for_selector(".model .label")
        page.close()


def test_an_image_is_answered(browser: Any, bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = make_exported(tmp_path / "vit", "vit", variants=("sliced",))
    Image.new("RGB", (20, 24), (200, 30, 30)).save(tmp_path / "red.png")
    trouble: list[str] = []
    with running({"vit": bundle.root}) as server:
        page = open_page(browser, trouble)
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector("#file", state="visible")
        page.click("button")
        page.get_by_text("Choose an image.").wait_for()
        page.set_input_files("#file", str(tmp_path / "red.png"))
        page.click("button")
        page.wait_for_selector(".model .label")
        assert not page.locator("#text").is_visible()
        page.close()
    assert trouble == []
    with running({"texts": bundles["classification"], "vit": bundle.root}) as server:  # the texts were once hidden
        page = open_page(browser, trouble)
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector("#file", state="visible")
        page.fill("#text", "a fine film")
        page.click("button")
        page.wait_for_selector(".model .label")
        assert page.locator(".model h2").all_text_contents() == ["texts"]
        page.set_input_files("#file", str(tmp_path / "red.png"))
        page.click("button")
        page.wait_for_selector(".model:nth-child(2) .label")
        assert page.locator(".model h2").all_text_contents() == ["texts", "vit"]
        page.close()
    assert trouble == []
