"""The page in a real browser: it draws, follows its controls, shows windows, says errors, and asks nothing of other machines."""

from __future__ import annotations

import os
import socket
import threading
from urllib.parse import urlsplit

import numpy as np
import pytest

from helpers.play_server import MISSING, NEEDED, Server, browser, requests_of, until

pytestmark = pytest.mark.skipif(bool(MISSING) and os.environ.get("CI") != "true", reason=f"missing: {MISSING}")

RADIUS, SIDE, SCALE, PX = 3, 64, 8, 8
FAST = (
    "--size",
    "64x64",
    "--size",
    "64x96",
    "--steps",
    "2",
    "--text-len",
    "16",
    "--backend",
    "sdpa",
    "--device",
    "cpu",
)
OWN = "the model's own"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    assert not MISSING, f"continuous integration has {', '.join(NEEDED)}"
    started = Server(tmp_path_factory.mktemp("play"), "--r", str(RADIUS), *FAST)
    yield started
    started.end()


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as driver:
        driver.get(server.address)
        found = Page(driver, server)
        until(found.is_drawn, "the first images")
        yield found


class Page:
    """What a visitor sees and does."""

    def __init__(self, driver, server):
        self.driver, self.server = driver, server

    def find(self, css):
        return self.driver.find_element("css selector", css)

    @property
    def sources(self):
        """Addresses of both images."""
        # In one go: elements are exchanged while it is drawn.
        script = "return [...document.querySelectorAll('#dense img, #windowed img')].map(image => image.src)"
        return tuple(self.driver.execute_script(script))

    @property
    def text(self):
        return self.driver.execute_script("return document.body.innerText")

    @property
    def rows(self):
        """The table's rows by their first cell."""
        script = (
            "return [...document.querySelectorAll('#facts tr')].map(row => [...row.cells].map(cell => cell.innerText))"
        )
        return {row[0]: row[1:] for row in self.driver.execute_script(script)}

    @property
    def window(self):
        """Heading of the windowed image in the table."""
        return self.rows.get("", ["", ""])[1]

    def is_drawn(self):
        return len(self.sources) == 2 and "PSNR to dense" in self.rows

    def pixels(self):
        """Both images as arrays."""
        return [np.asarray(self.server.image(source)) for source in self.sources]

    def type(self, css, text):
        field = self.find(css)
        self.driver.execute_script("arguments[0].select()", field)
        field.send_keys(text)

    def choose(self, css, text):
        self.find(f"{css} input").click()
        until(lambda: self.driver.find_elements("css selector", f"{css} li, ul[role=listbox] li"), "the choices")
        [option] = [
            one
            for one in self.driver.find_elements("css selector", "ul[role=listbox] li")
            if one.text.strip().endswith(text)
        ]
        option.click()

    def changed(self, before):
        """Both images, once new ones are there: which are new."""
        until(lambda: self.is_drawn() and self.sources != before, "new images")


def test_the_page_shows_both_images_with_times_and_work(page):
    dense, windowed = page.pixels()
    assert dense.shape == windowed.shape == (SIDE * SCALE, SIDE * SCALE, 3)
    assert dense.std() > 10
    assert (dense != windowed).any()
    rows = page.rows
    assert page.window == f"window, r = {RADIUS}"
    assert all("ms" in cell or " s" in cell for cell in rows["time per step"])
    assert rows["pairs that attention executes"] == ["100%", "100.0% (masked SDPA)"]
    share = float(rows["pairs of tokens that see each other"][1].rstrip("%"))
    assert abs(share - 100 * share_of_pairs(SIDE // PX, 16, RADIUS)) < 0.06


def share_of_pairs(side, text, radius):
    """Pairs that the window allows, as a share of all, by its definition."""
    y, x = np.divmod(np.arange(side * side), side)
    near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2
    allowed = near.sum() + 2 * side * side * text + text * text
    return allowed / (side * side + text) ** 2


def test_the_radius_redraws_the_window_and_the_steps_redraw_both(page):
    before = page.sources
    page.type("#radius input[type=number]", "5")
    until(lambda: page.window == "window, r = 5", "the other radius")
    assert [new == old for new, old in zip(page.sources, before, strict=True)] == [True, False]

    before = page.sources
    page.find("#steps input[type=range]").send_keys("\ue014")  # arrow right
    until(lambda: "median of 2" in str(page.rows.get("time per step")), "three steps")
    assert [new == old for new, old in zip(page.sources, before, strict=True)] == [False, False]


@pytest.mark.parametrize("clicked", ["#dense", "#windowed"])
def test_a_click_draws_the_window_of_the_token_over_the_image(page, clicked):
    page.type("#radius input[type=number]", str(RADIUS))
    page.find("#draw").click()
    until(lambda: page.window == f"window, r = {RADIUS}" and "Click an image" in page.text, "images without a window")
    before, sources = page.pixels(), page.sources

    from selenium.webdriver import ActionChains

    image = page.find(f"{clicked} img")
    token = (2, 6)
    shown = image.rect["width"] / (SIDE // PX)
    place = [int((at + 0.5) * shown - image.rect["width"] / 2) for at in token]
    ActionChains(page.driver).move_to_element_with_offset(image, place[1], place[0]).click().perform()
    until(lambda: page.sources != sources and "sees" in page.find("#token").text, "the window")

    rows, columns = np.indices((SIDE // PX, SIDE // PX))
    seen = (rows - token[0]) ** 2 + (columns - token[1]) ** 2 < RADIUS**2
    assert f"row 2, column 6 sees {seen.sum()} of 64 image tokens" in page.find("#token").text
    side = PX * SCALE
    inner = slice(side // 4, -side // 4)
    for name, old, new in zip(("dense", "windowed"), before, page.pixels(), strict=True):
        for place in np.ndindex(seen.shape):
            old_token, new_token = (
                pixels.reshape(SIDE // PX, side, SIDE // PX, side, 3)[place[0], :, place[1]][inner, inner].astype(int)
                for pixels in (old, new)
            )
            if seen[place] or name == "dense":
                assert (new_token == old_token).all(), (name, place)
            else:
                assert abs(new_token - (0.28 * old_token + 0.72 * 255)).max() <= 1, (name, place)
    marked = page.pixels()[0].reshape(SIDE // PX, side, SIDE // PX, side, 3)[token[0], :, token[1]]
    assert (marked[0] == 255).all(), "the token has a white rim"


def test_sizes_and_weights_are_chosen_from_what_the_model_has(page):
    before = page.sources
    page.choose("#size", "64 x 96")
    page.changed(before)
    until(lambda: [image.shape[:2] for image in page.pixels()] == [(384, 576)] * 2, "images of the other size")

    page.choose("#weights", "distilled for r = 4")
    until(lambda: page.window == "window, r = 4, distilled for r = 4", "the distilled weights")
    assert page.find("#radius input[type=number]").get_attribute("value") == "4", "the radius is theirs"
    page.type("#radius input[type=number]", "2")
    until(lambda: "trained for r = 4" in page.text, "a remark on the other radius")


def test_an_error_is_said_on_the_page_and_the_next_request_is_drawn(page):
    page.type("#seed input", "-3")
    until(lambda: "the seed must be from 0 to" in page.text, "the message")
    page.type("#seed input", "7")
    until(page.is_drawn, "images after an error")
    page.type("#prompt textarea", "")
    page.find("#prompt textarea").send_keys("\ue003" * 60)
    page.find("#draw").click()
    until(lambda: "write a prompt first" in page.text, "the message")
    page.type("#prompt textarea", "a rocket zzyzx")
    page.find("#draw").click()
    until(lambda: "not trained on: zzyzx" in page.text, "images after an error")
    assert page.server.said == "loading embedded\n", "a visitor's mistake is no news on the terminal"


def test_two_requests_at_once_wait_for_each_other_and_both_are_right(server):
    requests = [
        ("a sunflower on a white background", "64 x 64", 4, "distilled for r = 4", 1, 2),
        ("a rocket on a yellow background", "64 x 96", 5, OWN, 2, 3),
    ]

    def images(address):
        dense, windowed, *_ = server.result(address)
        return [
            np.asarray(server.image(one["url"] if "url" in one else one["value"]["url"])) for one in (dense, windowed)
        ]

    alone = [images(server.begin(*request)) for request in requests]
    together = [None, None]

    def ask(number):
        together[number] = images(server.begin(*requests[number]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for wanted, got in zip(alone, together, strict=True):
        assert all((a == b).all() for a, b in zip(wanted, got, strict=True))
    assert alone[0][0].shape != alone[1][0].shape


@pytest.mark.parametrize(
    ("changed", "what"),
    [({1: "72 x 72"}, "72 x 72"), ({2: 0}, "minimum"), ({2: 99}, "maximum"), ({3: "others"}, "others")],
    ids=["size", "radius 0", "radius 99", "weights"],
)
def test_what_the_page_does_not_offer_is_refused(server, changed, what):
    request = ["a rocket", "64 x 64", 4, OWN, 0, 2]
    for place, value in changed.items():
        request[place] = value
    with pytest.raises(RuntimeError, match=what):
        server.result(server.begin(*request))
    assert server.process.poll() is None


def test_nothing_is_asked_of_another_machine(page, server):
    page.driver.get(server.address)
    until(page.is_drawn, "the images")
    asked = requests_of(page.driver)
    hosts = {urlsplit(address).netloc for address in asked}
    assert len(asked) > 20
    assert hosts == {urlsplit(server.address).netloc}
    assert "127.0.0.1" in server.asked, "the notes work: Gradio looks whether its own server is there"
    assert server.asked <= {"127.0.0.1", "localhost"}


def test_ctrl_c_ends_it_while_it_draws(server):
    request = server.begin("a rocket", "64 x 96", 4, OWN, 3, 50)
    assert server.interrupt() == 130
    assert server.said.splitlines()[-1] == "flexclear: interrupted"
    assert list(server.temporary.iterdir()) == []
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind(("127.0.0.1", urlsplit(server.address).port))
    with pytest.raises(OSError, match="refused"):
        server.result(request)
