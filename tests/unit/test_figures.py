"""Tests of pictures/figures.py: `python -m unittest tests/unit/test_figures.py`."""

from unittest import mock

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave

from pictures import figures
from tests.helpers import SeededTest


class FiguresTest(SeededTest):
    """A test that draws a figure of each kind."""

    def setUp(self):
        for name in ["a", "b"]:
            imsave(self.folder / f"{name}.png", np.full((8, 8, 3), 0.5))
        self.inputs = set(self.folder.iterdir())

    def curves(self, path):
        figures.bpd_curves(path, {1: 0.3, 2: 0.2}, {0: 1.0, 1: 0.4, 2: 0.25}, 0.24, "MLP")

    def pictures(self, path):
        figures.side_by_side(path, {"before": self.folder / "a.png", "after": self.folder / "b.png"})

    def settings(self, path):
        figures.bpd_by_setting(path, {"z_dim 2": [0.2, 0.24], "z_dim 20": [0.15]})

    def table(self, name, **options):
        images = np.arange(6).reshape(2, 3, 1, 1) / 6 * np.ones((2, 3, 4, 5))
        figures.image_table(name, images, rows=["x", "y"], columns=["1", "2", "3"], title="T", **options)

    def latents(self, name):
        labels = np.array([0, 1, 1, 9])
        figures.latent_space(name, np.arange(8.0).reshape(4, 2), labels, ["first", "second"], "Means")


class TestFigures(FiguresTest):
    """That each function writes readable files, and draws what it was given."""

    def drawn(self, draw, *args, **options):
        """The axes of the figure that a function would write."""
        with mock.patch.object(figures, "save") as save:
            draw("name", *args, **options)
        return save.call_args.args[0].axes

    def written(self):
        """The names of the files that are there but for the pictures that were given."""
        return sorted(path.name for path in set(self.folder.iterdir()) - self.inputs)

    def test_files_are_readable(self):
        for draw in [self.curves, self.pictures, self.settings]:
            draw(self.folder / "one.png")
        for draw in [self.table, self.latents]:
            draw(self.folder / draw.__name__)
        self.settings(str(self.folder / "plot"))  # as `summary.py --plot plot` asks for it
        names = ["latents.pdf", "latents.png", "one.png", "plot", "table.pdf", "table.png"]
        self.assertEqual(self.written(), names)
        for name in names:
            path = self.folder / name
            if name.endswith("pdf"):
                self.assertEqual(path.read_bytes()[:5], b"%PDF-")
                self.assertEqual(path.read_bytes().rstrip()[-5:], b"%%EOF")
            else:
                picture = imread(path, format="png")
                self.assertGreater(min(picture.shape[:2]), 150, name)
                self.assertGreater(picture[..., :3].std(), 0.01, f"{name} is empty")

    def test_whole_or_not_at_all(self):
        def full_disk(figure, path, **options):
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError(28, "No space left on device")

        for draw, names in [
            (self.curves, ["one"]),
            (self.pictures, ["one"]),
            (self.settings, ["one"]),
            (self.table, ["one.png", "one.pdf"]),
            (self.latents, ["one.png", "one.pdf"]),
        ]:
            for name in names:
                (self.folder / name).write_bytes(b"old")
            with mock.patch.object(Figure, "savefig", full_disk), self.assertRaises(OSError):
                draw(self.folder / "one")
            for name in names:
                self.assertEqual((self.folder / name).read_bytes(), b"old")

    def test_curves(self):
        (axes,) = self.drawn(self.curves)
        curves = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        self.assertEqual(curves.pop("train"), [[1, 0.3], [2, 0.2]])
        self.assertEqual(curves.pop("validation"), [[0, 1], [1, 0.4], [2, 0.25]])
        self.assertEqual({y for _, y in curves.pop("test: 0.2400")}, {0.24})
        self.assertEqual((axes.get_title(), axes.get_yscale()), ("MLP", "log"))

    def test_curves_of_other_data(self):
        """Some numbers are on the axis, whatever the bpd are, and a file's name is no formula."""
        for bpds in [(1.36, 1.31), (0.925, 0.921), (1.0, 0.004), (0.0031, 0.003), (40.0, 7.0), (1.0, 0.14)]:
            title = "MLP on a$_$.npz"
            (axes,) = self.drawn(figures.bpd_curves, {2: bpds[1]}, dict(enumerate(bpds)), bpds[1], title)
            axes.figure.draw_without_rendering()
            low, high = axes.get_ylim()
            ticks = axes.get_yticks()
            self.assertGreater(sum(low <= tick <= high for tick in ticks), 2, bpds)
            boxes = [label.get_window_extent() for label in axes.get_yticklabels() if label.get_text()]
            boxes = [box for box, tick in zip(boxes, ticks) if low <= tick <= high]
            self.assertTrue(all(above.y0 > below.y1 for below, above in zip(boxes, boxes[1:])), bpds)
            self.assertEqual((axes.get_title(), axes.title.get_parse_math()), (title, False))

    def test_side_by_side(self):
        self.assertEqual([axes.get_title() for axes in self.drawn(self.pictures)], ["before", "after"])
        (axes,) = self.drawn(figures.side_by_side, {"alone": self.folder / "a.png"})
        self.assertEqual(axes.get_images()[0].get_array().shape[:2], (8, 8))

    def test_by_setting(self):
        (axes,) = self.drawn(self.settings)
        self.assertEqual([label.get_text() for label in axes.get_yticklabels()], ["z_dim 2", "z_dim 20"])
        runs = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() == "o"]
        self.assertEqual(runs, [[[0.2, 0], [0.24, 0]], [[0.15, 1]]])
        marks = [line.get_xdata() for line in axes.get_lines() if line.get_marker() == "|"]
        deviation = np.sqrt(2) * 0.02  # of the first setting; the second has a single run
        np.testing.assert_allclose(sorted(np.concatenate(marks)), [0.15, 0.22 - deviation, 0.22, 0.22 + deviation])
        self.assertGreater(*axes.get_ylim())  # the first one on top

    def test_long_settings(self):
        """They are whole in the picture, a flag beside its value, whatever their text is."""
        names = ["dataset $a$.npz, " + ", ".join(f"flag_{number} 64 32" for number in range(9)), "b" * 99]
        (axes,) = self.drawn(figures.bpd_by_setting, dict.fromkeys(names, [0.2]))
        axes.figure.draw_without_rendering()
        labels = axes.get_yticklabels()
        upper, lower = (label.get_window_extent() for label in labels)
        self.assertTrue(upper.x0 > 0 and lower.x0 > 0 and axes.bbox.width > 200)
        self.assertTrue(axes.figure.bbox.height > upper.y1 > upper.y0 > lower.y1 > lower.y0 > 0)
        lines = [label.get_text().splitlines() for label in labels]
        self.assertEqual([" ".join(lines[0]), "".join(lines[1])], names)
        self.assertEqual(lines[0][:2], ["dataset $a$.npz, flag_0 64 32,", "flag_1 64 32, flag_2 64 32,"])
        self.assertFalse(labels[0].get_parse_math())

    def test_table(self):
        """Images in their rows and columns, with a grey gap between them."""
        (axes,) = self.drawn(self.table, gap=2)
        picture = axes.get_images()[0].get_array()
        self.assertEqual(axes.get_images()[0].get_clim(), (0, 1))  # black and white, whatever there is between them
        self.assertEqual(picture.shape, (2 * 4 + 2, 3 * 5 + 2 * 2))
        np.testing.assert_allclose(picture[::6, ::7], np.arange(6).reshape(2, 3) / 6)
        np.testing.assert_allclose(picture[3::6, 4::7], np.arange(6).reshape(2, 3) / 6)
        self.assertEqual({*picture[4:6].flat, *picture[:, 5:7].flat}, {0.5})
        self.assertEqual([label.get_text() for label in axes.get_xticklabels()], ["1", "2", "3"])
        self.assertEqual([label.get_text() for label in axes.get_yticklabels()], ["x", "y"])
        np.testing.assert_allclose(axes.get_xticks(), [2, 9, 16])  # the middles of the images
        (axes,) = self.drawn(self.table, gap=0)
        self.assertEqual(axes.get_images()[0].get_array().shape, (8, 15))

    def test_table_of_large_and_wide_images(self):
        """No pixel is left out beside labels, nor is most of the picture empty."""
        for size in [(200, 200), (300, 100), (40, 400)]:
            stripes = np.indices((4, 4, *size)).sum(axis=0) % 2
            figures.image_table(self.folder / "wide", stripes, rows=["input", "reconstruction"] * 2)
            picture = imread(self.folder / "wide.png")[..., 0]
            for axis in [0, 1]:
                changes = (np.diff((picture > 0.5).astype(int), axis=axis) != 0).sum(axis=axis).max()
                self.assertGreaterEqual(changes, 4 * (size[axis] - 1), size)
            self.assertGreater((picture < 1).mean(), 0.05, size)

    def test_table_of_huge_images(self):
        with mock.patch.object(figures, "save") as save:
            figures.image_table("name", np.zeros((2, 2, 3000, 3000)))
        self.assertLessEqual(max(save.call_args.args[0].get_size_inches()) * save.call_args.kwargs["dpi"], 4000)

    def test_latent_space(self):
        (axes,) = self.drawn(self.latents)
        points = {dots.get_label(): dots.get_offsets().tolist() for dots in axes.collections}
        expected = {"0": [[0, 1]], "1": [[2, 3], [4, 5]], "9": [[6, 7]]}
        self.assertEqual(points, expected)
        self.assertEqual((axes.get_xlabel(), axes.get_ylabel()), ("first", "second"))

    def test_many_labels(self):
        """They are beside the points, and where a legend would be too long, there is a scale."""
        for number in [12, 50, 51, 256]:
            points, labels = np.random.default_rng(0).random((number, 2)), np.arange(number)
            axes, *scale = self.drawn(figures.latent_space, points, labels, ["first", "second"], "Means")
            axes.figure.draw_without_rendering()
            self.assertGreater(axes.bbox.width, axes.figure.bbox.width / 2, number)
            self.assertEqual((len(scale), len(axes.figure.legends)), (1, 0) if number > 50 else (0, 1))
            if scale:
                self.assertEqual((scale[0].get_ylabel(), scale[0].get_ylim()), ("digit", (0, number - 1)))


class TestSettings(FiguresTest):
    """Figures are the same to the bit, whatever the user's settings are."""

    def pngs(self):
        """The bytes of figures of two kinds."""
        self.settings(self.folder / "settings.png")
        self.table(self.folder / "table")
        return [(self.folder / name).read_bytes() for name in ["settings.png", "table.png"]]

    def test_notebook(self):
        """Where the user draws in a style, it is in force again afterwards."""
        expected = self.pngs()
        with matplotlib.rc_context():
            style.use("dark_background")
            matplotlib.rcParams.update({"text.usetex": True, "savefig.transparent": True, "savefig.bbox": "tight"})
            matplotlib.rcParams.update({"font.family": "Comic Sans MS", "path.sketch": (1, 100, 2), "font.size": 20})
            before = dict(dict.items(matplotlib.rcParams))  # asked by itself, it would look for a backend
            pngs = self.pngs()
            self.assertEqual(dict(dict.items(matplotlib.rcParams)), before)
        self.assertTrue(pngs == expected)
