"""Tests of pictures/figures.py: `python -m unittest tests/unit/test_figures.py`."""

from unittest import mock

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.image import imread, imsave

from pictures import figures
from tests.helpers import SeededTest

TABLE = np.arange(6).reshape(2, 3, 1, 1) / 6 * np.ones((2, 3, 4, 5))


class TestFigures(SeededTest):
    """Tests that each function writes readable files and plots its arguments."""

    def curves(self, path):
        figures.bpd_curves(path, {1: 0.3, 2: 0.2}, {0: 1.0, 1: 0.4, 2: 0.25}, 0.24, "MLP")

    def samples(self, path, epochs=(0, 5, 10, 15)):
        for epoch in epochs:
            imsave(self.folder / f"epoch_{epoch}_samples.png", np.full((8, 8, 3), epoch / 100))
        figures.samples_over_training(path)

    def settings(self, path):
        figures.bpd_by_setting(path, {"z_dim 2": [0.2, 0.24], "z_dim 20": [0.15]})

    def table(self, name, **options):
        figures.image_table(name, TABLE, rows=["x", "y"], columns=["1", "2", "3"], title="T", **options)

    def latents(self, name):
        labels = np.array([0, 1, 1, 9])
        figures.latent_space(name, np.arange(8.0).reshape(4, 2), labels, ["first", "second"], "Means")

    def axes_of(self, plot, *args, **options):
        """Returns the axes of the figure that a function would save."""
        with mock.patch.object(figures, "save") as save:
            plot(self.folder / "name", *args, **options)
        return save.call_args.args[0].axes

    def test_files_are_readable(self):
        for plot, name in [(self.curves, "one.png"), (self.samples, "two.png"), (self.settings, "three.png")]:
            with self.subTest(name):
                plot(str(self.folder / name))
                picture = imread(self.folder / name, format="png")
                self.assertGreater(min(picture.shape[:2]), 150)
                self.assertGreater(picture[..., :3].std(), 0.01, "the picture is blank")

    def test_the_curves_show_training_validation_and_test(self):
        (axes,) = self.axes_of(self.curves)
        curves = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        self.assertEqual(curves.pop("train"), [[1, 0.3], [2, 0.2]])
        self.assertEqual(curves.pop("validation"), [[0, 1], [1, 0.4], [2, 0.25]])
        self.assertEqual({y for _, y in curves.pop("test: 0.2400")}, {0.24})
        self.assertEqual((axes.get_title(), axes.get_yscale()), ("MLP", "log"))

    def test_the_tick_labels_of_the_bpd_axis_do_not_overlap(self):
        """This is tested for several ranges. A $ in the title (the name of a file) does not begin a formula."""
        for bpds in [(1.36, 1.31), (1.0, 0.004), (0.0031, 0.003), (1.0, 0.14)]:
            with self.subTest(bpds):
                title = "MLP on a$_$.npz"
                (axes,) = self.axes_of(figures.bpd_curves, {2: bpds[1]}, dict(enumerate(bpds)), bpds[1], title)
                axes.figure.draw_without_rendering()
                (low, high), ticks = axes.get_ylim(), axes.get_yticks()
                self.assertGreater(sum(low <= tick <= high for tick in ticks), 2)
                boxes = [label.get_window_extent() for label in axes.get_yticklabels() if label.get_text()]
                boxes = [box for box, tick in zip(boxes, ticks) if low <= tick <= high]
                self.assertTrue(all(above.y0 > below.y1 for below, above in zip(boxes, boxes[1:])))
                self.assertEqual((axes.get_title(), axes.title.get_parse_math()), (title, False))

    def test_the_samples_are_from_before_training_epoch_10_and_the_last_epoch(self):
        for epochs, expected in [
            ([0], ["before training"]),
            ([0, 5, 10, 15, 80], ["before training", "epoch 10", "epoch 80"]),
            ([0, 4, 8, 12], ["before training", "epoch 8", "epoch 12"]),
        ]:
            with self.subTest(epochs):
                for path in self.folder.iterdir():
                    path.unlink()
                axes = self.axes_of(self.samples, epochs)
                self.assertEqual([part.get_title() for part in axes], expected)
                shown = [part.get_images()[0].get_array()[..., :3].mean() * 100 for part in axes]
                numbers = [int(title.split()[1]) if "epoch" in title else 0 for title in expected]
                np.testing.assert_allclose(shown, numbers, atol=0.3)

    def test_each_setting_is_a_row_with_its_runs(self):
        (axes,) = self.axes_of(self.settings)
        self.assertEqual([label.get_text() for label in axes.get_yticklabels()], ["z_dim 2", "z_dim 20"])
        runs = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() == "o"]
        self.assertEqual(runs, [[[0.2, 0], [0.24, 0]], [[0.15, 1]]])
        marks = [line.get_xdata() for line in axes.get_lines() if line.get_marker() == "|"]
        deviation = np.sqrt(2) * 0.02  # of the first setting; the second has a single run
        np.testing.assert_allclose(sorted(np.concatenate(marks)), [0.15, 0.22 - deviation, 0.22, 0.22 + deviation])
        self.assertGreater(*axes.get_ylim())  # the first setting is at the top

    def test_long_settings_are_not_cut_off(self):
        """They are broken into lines, but never between a flag and its value. A $ does not begin a formula."""
        names = ["dataset $a$.npz, " + ", ".join(f"flag_{number} 64 32" for number in range(9)), "b" * 99]
        (axes,) = self.axes_of(figures.bpd_by_setting, dict.fromkeys(names, [0.2]))
        axes.figure.draw_without_rendering()
        labels = axes.get_yticklabels()
        upper, lower = (label.get_window_extent() for label in labels)
        self.assertGreater(min(upper.x0, lower.x0, axes.bbox.width - 200), 0)
        self.assertTrue(axes.figure.bbox.height > upper.y1 > upper.y0 > lower.y1 > lower.y0 > 0)
        lines = [label.get_text().splitlines() for label in labels]
        self.assertEqual([" ".join(lines[0]), "".join(lines[1])], names)
        self.assertEqual(lines[0][:2], ["dataset $a$.npz, flag_0 64 32,", "flag_1 64 32, flag_2 64 32,"])
        self.assertFalse(labels[0].get_parse_math())

    def test_the_images_of_a_table_are_in_their_rows_and_columns(self):
        """There is a grey gap between images, but not if the axes have names."""
        (axes,) = self.axes_of(self.table)
        picture = axes.get_images()[0].get_array()
        self.assertEqual(axes.get_images()[0].get_clim(), (0, 1))  # the same shades for all images
        self.assertEqual(picture.shape, (2 * 4 + 2, 3 * 5 + 2 * 2))
        for corner in [picture[::6, ::7], picture[3::6, 4::7]]:
            np.testing.assert_allclose(corner, TABLE[..., 0, 0])
        self.assertEqual({*picture[4:6].flat, *picture[:, 5:7].flat}, {0.5})
        self.assertEqual([label.get_text() for label in axes.get_xticklabels()], ["1", "2", "3"])
        self.assertEqual([label.get_text() for label in axes.get_yticklabels()], ["x", "y"])
        np.testing.assert_allclose(axes.get_xticks(), [2, 9, 16])  # the middles of the images
        (axes,) = self.axes_of(self.table, axis_names=("a", "b"))
        self.assertEqual(axes.get_images()[0].get_array().shape, (8, 15))
        self.assertEqual((axes.get_xlabel(), axes.get_ylabel()), ("a", "b"))

    def test_a_table_of_large_or_wide_images_shows_every_pixel(self):
        """Every pixel is shown even with long labels. The images take at least a twentieth of the picture."""
        for size in [(100, 100), (150, 50), (20, 200)]:
            with self.subTest(size):
                stripes = np.indices((4, 4, *size)).sum(axis=0) % 2
                figures.image_table(self.folder / "wide", stripes, rows=["input", "reconstruction"] * 2)
                picture = imread(self.folder / "wide.png")[..., 0]
                for axis in [0, 1]:
                    changes = (np.diff((picture > 0.5).astype(int), axis=axis) != 0).sum(axis=axis).max()
                    self.assertGreaterEqual(changes, 4 * (size[axis] - 1))
                self.assertGreater((picture < 1).mean(), 0.05)

    def test_a_table_of_huge_images_has_a_limited_size(self):
        with mock.patch.object(figures, "save") as save, mock.patch.object(figures, "MAX_PIXELS", 1000):
            figures.image_table("name", np.zeros((2, 2, 400, 400)))
        self.assertLessEqual(max(save.call_args.args[0].get_size_inches()) * save.call_args.kwargs["dpi"], 1000)

    def test_the_latent_space_has_a_group_of_points_per_label(self):
        (axes,) = self.axes_of(self.latents)
        points = {dots.get_label(): dots.get_offsets().tolist() for dots in axes.collections}
        self.assertEqual(points, {"0": [[0, 1]], "1": [[2, 3], [4, 5]], "9": [[6, 7]]})
        self.assertEqual((axes.get_xlabel(), axes.get_ylabel()), ("first", "second"))

    def test_the_legend_of_many_labels_is_next_to_the_points(self):
        """If a legend would be too long, a colour scale replaces it."""
        for number, num_scales in [(50, 0), (51, 1)]:
            points, labels = np.random.default_rng(0).random((number, 2)), np.arange(number)
            axes, *scales = self.axes_of(figures.latent_space, points, labels, ["first", "second"], "Means")
            axes.figure.draw_without_rendering()
            self.assertGreater(axes.bbox.width, axes.figure.bbox.width / 2)
            self.assertEqual((len(scales), len(axes.figure.legends)), (num_scales, 1 - num_scales))
        self.assertEqual((scales[0].get_ylabel(), scales[0].get_ylim()), ("digit", (0, 50)))

    def test_figures_do_not_depend_on_the_users_settings(self):
        """The files are bit-identical, and the settings are restored afterwards."""

        def pngs():
            self.settings(self.folder / "settings.png")
            self.table(self.folder / "table")
            return [path.read_bytes() for path in self.folder.glob("*.png")]

        expected = pngs()
        with matplotlib.rc_context():
            style.use("dark_background")
            matplotlib.rcParams.update({"text.usetex": True, "savefig.transparent": True, "savefig.bbox": "tight"})
            matplotlib.rcParams.update({"font.family": "Comic Sans MS", "path.sketch": (1, 100, 2), "font.size": 20})
            before = dict(dict.items(matplotlib.rcParams))  # rcParams["backend"] would look for a backend
            self.assertTrue(pngs() == expected)
            self.assertEqual(dict(dict.items(matplotlib.rcParams)), before)
