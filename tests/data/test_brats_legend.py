"""The legend of a BraTS overlay, in the reference's wording and in the correct one."""

import pytest

from vilam3_jax.data.experts.overlays import brats_legend, reference_brats_legend

# Colours in the order of the labels on the slice, as in the overlay.
ALL = {1: "red", 2: "blue", 4: "yellow"}
CASES = {
    (): ("", ""),
    (1, 2, 4): (
        "yellow and red: tumor core, only yellow: enhancing tumor, all colors: whole tumor",
        "red and yellow: tumor core, yellow: enhancing tumor, red and blue and yellow: whole tumor",
    ),
}


@pytest.mark.parametrize("present", CASES)
def test_both_wordings(present):
    colours = {label: ALL[label] for label in present}
    assert (reference_brats_legend(colours), brats_legend(colours)) == CASES[present]


def test_colours_are_those_of_the_slice():
    # Without the core, edema is red and the enhancing tumor blue.
    colours = {2: "red", 4: "blue"}
    assert reference_brats_legend(colours) == "only blue: enhancing tumor, all colors: whole tumor"
    expected = "blue: tumor core, blue: enhancing tumor, red and blue: whole tumor"
    assert brats_legend(colours) == expected
    assert reference_brats_legend({2: "red"}) == "all colors: whole tumor"
    assert brats_legend({2: "red"}) == "red: whole tumor"
