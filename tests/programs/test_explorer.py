"""Tests of explorer.html in a real browser: `python -m unittest tests/programs/test_explorer.py`."""

import functools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
import unittest

import torch

from bmnist import binarize
from pictures import explorer
from pictures.latent_space import plane
from sources.rendered_digits import rendered_digits
from tests.helpers import SeededTest
from train_pl import VAE
from utils import active_units

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
TIMEOUT = 60  # seconds


class Browser:
    """
    A headless Chromium with one page, controlled by the Chrome DevTools Protocol over a pipe
    (https://chromedevtools.github.io/devtools-protocol/): JSON messages, each ended by a zero byte. `requests` are the
    addresses that the page requested, `errors` its exceptions and its messages on the console.
    """

    def __init__(self, add_cleanup):
        self.number, self.requests, self.errors, self.unread, self.is_down, self.session = 0, [], [], b"", False, {}
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        add_cleanup(folder.cleanup)
        for_browser, self.to_browser = os.pipe()
        self.from_browser, of_browser = os.pipe()
        shell = ["sh", "-c", f'exec "$@" 3<&{for_browser} 4>&{of_browser}', "sh"]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        pipes = {"pass_fds": [for_browser, of_browser], "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([*shell, CHROMIUM, *flags, f"--user-data-dir={folder.name}"], **pipes)
        add_cleanup(self.process.wait)
        add_cleanup(self.process.kill)
        for pipe in [self.to_browser, self.from_browser]:
            add_cleanup(os.close, pipe)
        for pipe in [for_browser, of_browser]:
            os.close(pipe)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ["Page", "Runtime", "Log", "Network"]:
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        """Sends a command and returns its result. Events before the result are stored in `requests` and `errors`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            elif answer.get("method") in ["Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"]:
                self.errors.append(answer["params"])
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def receive(self):
        """Receives the next message and returns it."""
        while b"\0" not in self.unread:
            is_ready = select.select([self.from_browser], [], [], TIMEOUT)[0]
            part = os.read(self.from_browser, 2**20) if is_ready else b""
            if not part:
                raise RuntimeError("the browser does not answer or has ended")
            self.unread += part
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def open(self, path, width=1280, height=900):
        """Opens a file in a window of this size, in pixels."""
        self.resize(width, height)
        self.send("Page.navigate", url=path.as_uri())
        self.wait_for("document.readyState === 'complete' && typeof vae === 'object'")
        self.next_frame()

    def resize(self, width, height):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.wait_for(f"innerWidth === {width}")

    def run(self, expression):
        """Returns the value of a JavaScript expression as plain data. Waits if the value is a promise."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description"))
        return result["result"].get("value")

    def next_frame(self):
        """Waits until the page shows the effect of the last action."""
        self.run("new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => resolve(true))))")

    def pixels(self, canvas):
        """Returns the first 28x28 pixels of a canvas: red, green, blue and opacity of each, from 0 to 255."""
        copy = "Object.assign(document.createElement('canvas'), {width: 28, height: 28}).getContext('2d')"
        image = f"document.getElementById('{canvas}')"
        return self.run(f"(c => (c.drawImage({image}, 0, 0), [...c.getImageData(0, 0, 28, 28).data]))({copy})")

    def wait_for(self, expression):
        """Waits until a JavaScript expression is true."""
        end = time.monotonic() + TIMEOUT
        while not self.run(expression):
            if time.monotonic() > end:
                raise AssertionError(f"this expression did not become true: {expression}")
            time.sleep(0.05)

    def box(self, selector):
        """Returns a dict of the left, top, width and height of an element's box, in pixels."""
        return self.run(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")

    def place(self, selector, x, y):
        """Returns a dict of the pixel coordinates x and y of the point at the fractions x and y of an element's box."""
        box = self.box(selector)
        return {"x": box["left"] + x * box["width"], "y": box["top"] + y * box["height"]}

    def mouse(self, kind, selector, x, y):
        """Moves the mouse, or presses or releases its left button, at the fractions x and y of an element's box."""
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'nearest'}})")
        self.is_down = kind == "mousePressed" or (self.is_down and kind == "mouseMoved")
        button = {"button": "left" if self.is_down or kind == "mouseReleased" else "none", "buttons": int(self.is_down)}
        button["clickCount"] = int(kind != "mouseMoved")
        self.send("Input.dispatchMouseEvent", type=kind, **self.place(selector, x, y), **button)

    def click(self, selector, x=0.5, y=0.5):
        """Clicks at the fractions x and y of an element's box."""
        for kind in ["mouseMoved", "mousePressed", "mouseReleased"]:
            self.mouse(kind, selector, x, y)
        self.next_frame()

    def key(self, key):
        """Presses and releases a key."""
        text = {" ": {"text": " "}, "Enter": {"text": "\r"}}.get(key, {})
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.next_frame()


@unittest.skipUnless(CHROMIUM, "Chromium is not installed (Debian: apt install chromium)")
class TestExplorer(SeededTest):
    @classmethod
    def setUpClass(cls):
        cls.browser = Browser(cls.addClassCleanup)

    @torch.no_grad()
    def open(self, model, **facts):
        """Writes and opens the page of a model with 300 digits. Returns the digits."""
        images, labels = rendered_digits(300)
        imgs = binarize(images)
        means, _ = model.eval().encoder(imgs)
        known = {"run": "run", "dataset": "rendered", "model": "MLP", "legend": "digit"}
        known["active_units"] = active_units(means).sum().item()
        facts = {**dict.fromkeys(explorer.FACTS, 1.5), **known, **facts}
        self.path = self.folder / "explorer.html"
        explorer.write_explorer(self.path, model.encoder, model.decoder, imgs, means, plane(means, labels), facts)
        self.browser.requests, self.browser.errors = [], []
        self.browser.open(self.path)
        self.addCleanup(self.assert_quiet)
        return imgs

    @torch.no_grad()
    def vae(self, *args):
        """Returns a VAE whose latents and pixels vary like those of a trained VAE."""
        model = VAE(*args, lr=1e-3)
        for net in [model.encoder, model.decoder]:
            weights = [layer.weight for layer in net.net if hasattr(layer, "weight")]
            for weight in weights:
                weight.mul_(2 if len(weights) > 2 else 4)
        return model

    def assert_quiet(self):
        """Asserts that the page requested nothing else and had no errors."""
        self.assertEqual(self.browser.errors, [])
        requests = {address for address in self.browser.requests if not address.startswith("data:")}
        self.assertEqual(requests, {self.path.as_uri()})

    def picture(self, canvas="image"):
        """Returns the grey values [28,28] of a canvas, from 0 to 255."""
        self.browser.next_frame()
        return torch.tensor(self.browser.pixels(canvas)).view(28, 28, 4)[..., 0]

    def tensor(self, expression):
        """Returns the value of a JavaScript expression as a tensor."""
        return torch.tensor(self.browser.run(expression))

    latents = functools.partialmethod(tensor, "Array.from(shown)")  # the latents that the page shows

    def assert_shows_latents(self):
        """Asserts that the picture is the decoder's output for the latents, and that the sliders show the latents."""
        means = self.tensor("vae.decode(shown)").view(28, 28)
        self.assertLessEqual((self.picture() / 255 - means).abs().max().item(), 1 / 255)
        sliders = self.tensor("sliders.map(({input, unit}) => [unit, input.valueAsNumber])")
        torch.testing.assert_close(sliders[sliders[:, 0].argsort(), 1], self.latents(), atol=1e-4, rtol=0)

    def test_decode_and_encode_agree_with_torch(self):
        """They agree for latents and for images, with every kind of network and of activation."""
        for name, hidden_dims, z_dim in [("MLP", [512], 20), ("MLP", [300, 200, 100], 2), ("CNN", None, 20)]:
            with self.subTest(name, hidden_dims=hidden_dims):
                model = self.vae(name, hidden_dims, 32, z_dim)
                if z_dim == 2:  # other activations, too
                    for net in [model.encoder.net, model.decoder.net]:
                        net[1], net[3] = torch.nn.Tanh(), torch.nn.SiLU()
                imgs, z = self.open(model)[:30], torch.randn(30, z_dim)
                with torch.no_grad():
                    x_mean, posterior = torch.sigmoid(model.decoder(z)), torch.cat(model.encoder(imgs), dim=1)
                self.assertGreater(min(x_mean.std(dim=0).mean(), posterior.std(dim=0).mean()), 0.01)
                decoded = self.tensor(f"{z.tolist()}.map(vae.decode)")
                torch.testing.assert_close(decoded, x_mean.flatten(start_dim=1), atol=2e-3, rtol=0)
                pixels = imgs.flatten(start_dim=1).tolist()
                encoded = self.tensor(f"{pixels}.map(vae.encode).map((p) => [...p.mean, ...p.log_std])")
                torch.testing.assert_close(encoded, posterior, atol=2e-3, rtol=0)
        for call in ["vae.decode([1])", "vae.encode(Array(784).fill('a'))"]:
            with self.assertRaisesRegex(RuntimeError, r"RangeError: (latents|pixels) must be \d+ numbers"):
                self.browser.run(call)

    def test_a_click_keeps_a_point_and_a_second_click_shows_the_images_on_the_line_between_them(self):
        """Without a click, the page decodes the point below the pointer."""
        self.open(self.vae("MLP", [64], 32, 3))
        before, start = self.picture(), self.latents()
        self.browser.mouse("mouseMoved", "#plane", 0.9, 0.2)
        self.assertGreater((self.picture() - before).abs().max().item(), 10)
        self.assert_shows_latents()
        place = self.tensor("toPlane(shown).map((x, axis) => (x - data.low[axis]) / spans[axis])")
        torch.testing.assert_close(place, torch.tensor([0.9, 0.8]), atol=0.01, rtol=0)
        self.browser.mouse("mouseMoved", "#title", 0.5, 0.5)
        self.assertTrue(torch.equal(self.picture(), before))
        torch.testing.assert_close(self.latents(), start)
        self.browser.click("#plane", 0.2, 0.3)
        first = self.latents()
        self.browser.click("#plane", 0.8, 0.6)
        self.browser.wait_for("playing === null")
        second = self.latents()
        torch.testing.assert_close(self.tensor("line.map((z) => [...z])"), torch.stack([first, second]))
        self.browser.run("duration = 1e5")
        self.browser.click("#play")
        self.browser.wait_for("shown[0] !== line[0][0]")
        share = (self.latents() - first) / (second - first)
        self.assertLess(share.max().item(), 1)
        torch.testing.assert_close(share, share[0].expand(3), atol=1e-3, rtol=0)
        self.browser.run("duration = 1")
        self.browser.wait_for("playing === null")
        self.assert_shows_latents()

    def test_sliders_and_samples_of_the_prior_change_the_latents(self):
        self.open(self.vae("MLP", [64], 32, 3))
        before = self.latents()
        self.browser.click("#active input", 0.9, 0.5)
        self.assertEqual((self.latents() != before).nonzero().tolist(), [[self.browser.run("sliders[0].unit")]])
        self.assert_shows_latents()
        self.browser.click("#prior")
        self.assertTrue((self.latents() != before).all())
        self.assert_shows_latents()
        self.browser.click("input[value=sample]")
        self.assertEqual(self.picture().unique().tolist(), [0, 255])
        self.browser.click("input[value=means]")
        self.assert_shows_latents()

    @torch.no_grad()
    def check_drawing(self, model):
        """Checks that the drawing is centred and has a posterior, a reconstruction, an ellipse and an ELBO."""
        seen = (self.picture("seen") / 255).float()
        self.assertEqual(seen.unique().tolist(), [0, 1])
        places = seen.nonzero().float()
        torch.testing.assert_close(places.mean(dim=0), torch.full((2,), 13.5), atol=0.6, rtol=0)
        self.assertAlmostEqual((places.amax(dim=0) - places.amin(dim=0) + 1).max().item(), 20, delta=1)
        imgs = seen.view(1, 1, 28, 28)
        mean, log_std = model.encoder(imgs)
        losses = torch.stack([sum(model.terms(imgs)[:2]) for _ in range(1_000)])
        torch.testing.assert_close(self.latents(), mean[0], atol=2e-3, rtol=0)
        difference = self.picture("reconstruction") / 255 - model.reconstruct(imgs)
        self.assertLess(difference.abs().max().item(), 0.01)
        self.browser.wait_for("/ELBO -[0-9.]+ nats, [0-9.]+ bpd/.test(document.getElementById('elbo').textContent)")
        elbo = self.browser.run("parseFloat(document.getElementById('elbo').textContent.slice(5))")
        self.assertAlmostEqual(elbo, -losses.mean().item(), delta=5 * losses.std().item() / 32**0.5 + 0.1)
        ellipse = self.browser.run("ellipse(posterior)")
        scale = self.tensor("[plane.width / spans[0], plane.height / spans[1]]").diag()
        axes = torch.linalg.svdvals(scale @ self.tensor("data.directions") @ log_std[0].exp().diag())
        torch.testing.assert_close(torch.tensor([ellipse["major"], ellipse["minor"]]), axes, rtol=0.01, atol=0.1)

    def test_a_drawing_with_mouse_finger_or_keyboard_is_encoded(self):
        model = self.vae("MLP", [64], 32, 3)
        self.open(model)
        steps = [0.03 * step for step in range(9)]
        corner = [(0.1 + step, 0.2) for step in steps] + [(0.34 - step / 3, 0.2 + step) for step in steps]
        for kind, places in [("mousePressed", corner[:1]), ("mouseMoved", corner), ("mouseReleased", corner[-1:])]:
            for x, y in places:
                self.browser.mouse(kind, "#field", x, y)
        self.check_drawing(model)
        self.browser.click("#clear")
        self.assertEqual(self.picture("seen").max().item(), 0)
        self.assertIsNone(self.browser.run("posterior"))

        for kind, (x, y) in zip(["touchStart", *["touchMove"] * len(corner)], corner):
            points = [self.browser.place("#field", x, y)]
            self.browser.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)
        self.browser.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.check_drawing(model)

        self.browser.run("field.focus()")
        for key in ["Delete", " ", *["ArrowDown"] * 9, *["ArrowRight"] * 4, " ", "ArrowUp"]:
            self.browser.key(key)
        self.assertEqual(self.browser.run("strokes.map((points) => points.length)"), [14])
        self.check_drawing(model)
        self.browser.click("#active input", 0.9, 0.5)  # the first click after a drawing takes effect
        moved = self.latents()
        self.assertNotEqual(moved.tolist(), self.browser.run("[...posterior.mean]"))
        self.browser.run("field.focus()")
        self.browser.key("ArrowLeft")  # the pen is up
        self.assertTrue(torch.equal(self.latents(), moved))

    def test_the_plane_can_be_used_with_the_keyboard(self):
        self.open(self.vae("MLP", [64], 32, 2))
        self.browser.run("plane.focus()")
        before = self.latents()
        for key in ["Enter", *["ArrowRight"] * 5, "ArrowUp"]:
            self.browser.key(key)
        torch.testing.assert_close(self.latents() - before, self.tensor("[0.1 * spans[0], 0.02 * spans[1]]"))
        self.assert_shows_latents()
        for key in ["Enter", " "]:
            self.browser.run("playing = null, duration = 1e9")
            self.browser.key(key)
            self.assertTrue(self.browser.run("playing !== null"))
        self.browser.key("Escape")
        self.assertEqual(self.browser.run("[playing, line, anchor]"), [None] * 3)

    def test_the_page_fits_windows_of_a_phone_and_of_a_projector(self):
        self.open(self.vae("CNN", None, 4, 20), run="a-long-name-without-any-space-in-it" * 4)
        for width, height in [(320, 568), (640, 360), (768, 1024), (3840, 2160)]:
            self.browser.resize(width, height)
            self.browser.next_frame()
            self.assertLessEqual(self.browser.run("document.documentElement.scrollWidth"), width)
            self.assertTrue(self.browser.run("plane.width === plane.clientWidth && plane.width > 100"))
            for canvas in ["#image", "#plane", "#field"]:  # there is space above and below them to scroll
                self.assertLess(self.browser.box(canvas)["height"], 0.8 * height, (canvas, width))

    def test_facts_are_shown_as_text_and_the_network_is_blocked(self):
        """Not even a script in the page could send data."""
        name = "</script><script>alert(1)</script><img src=x onerror=alert(1)>'\"`${1}"
        facts = {"test_bpd": 0.17581, "log_likelihood": -91.234, "test_images": 10_000, "iw_samples": 2, "epoch": 1}
        self.open(self.vae("MLP", [8], 32, 1), run=name, dataset=name, **facts)
        text = self.browser.run("document.body.innerText")
        words = [f"Latent space of {name}", f"MLP, 1 latent, {name}, after 1 epoch: ", "10,000 test images"]
        for part in [*words, "nats (2 samples)", "0.1758 ± 1.5", "-91.23 ± 1.5"]:
            self.assertIn(part, text)
        self.assertEqual(self.browser.run("document.images.length + document.scripts.length"), 3)
        self.browser.mouse("mouseMoved", "#plane", 0.8, 0.1)
        self.assert_shows_latents()
        place = self.tensor("onCanvas(toPlane(shown)).map((place) => place / plane.width)")
        # A single latent is shown in the middle
        torch.testing.assert_close(place, torch.tensor([0.8, 0.5]), atol=0.01, rtol=0)
        self.assert_quiet()
        with self.assertRaisesRegex(RuntimeError, "Failed to fetch"):
            self.browser.run("fetch('http://127.0.0.1:9/')")
        self.assertIn("Content Security Policy", json.dumps(self.browser.errors))
        self.browser.errors.clear()
