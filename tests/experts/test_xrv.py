"""The chest X-ray ensemble compared with torchxrayvision, with generated weights."""

import dataclasses
import io

import numpy as np
import pytest
import safetensors.torch
import torch
import xrv_reference
from scipy import ndimage
from vilam3_experts import descriptors
from vilam3_experts.base import ExpertFailure
from vilam3_experts.weights import Weights
from vilam3_experts.xrv import expert, networks
from vilam3_experts.xrv.expert import centre_square, resize
from vilam3_experts.xrv.members import Table, load_table

from vilam3_jax.errors import UserError

TABLE = load_table()
BY_NAME = {member.name: member for member in TABLE.members}
ALL, CHEX, NIH = (BY_NAME[f"densenet121-res224-{name}"] for name in ("all", "chex", "nih"))
RESNET = BY_NAME["resnet50-res512-all"]


def stored(network):
    return safetensors.torch.save({k: v.contiguous() for k, v in network.state_dict().items()})


def film(seed, height, width):
    """A smooth image with noise and different channels."""
    rng = np.random.default_rng(seed)
    picture = ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (9, 9, 0)) * 900 + 128
    return np.clip(picture + rng.normal(0, 9, picture.shape), 0, 255).astype(np.uint8)


def test_table_is_torchxrayvisions():
    urls = xrv_reference.torchxrayvision().models.model_urls
    assert len(TABLE.members) == 8
    for member in TABLE.members:
        theirs = urls[member.name]
        assert member.url == theirs["weights_url"]
        assert member.resolution == theirs["input_resolution"]
        np.testing.assert_array_equal(member.thresholds, theirs["op_threshs"])
        if member is not RESNET:  # torchxrayvision lists targets for two untrained classes
            known = [bool(label) for label in theirs["labels"]]
            np.testing.assert_array_equal(~np.isnan(member.thresholds), known)
    assert TABLE.classes == tuple(urls[ALL.name]["labels"])
    assert {name for names in TABLE.reference_sets.values() for name in names} <= BY_NAME.keys()


@pytest.mark.parametrize("shape", [(300, 411, 3), (513, 224, 3), (224, 224, 1), (31, 30, 3)])
def test_square_is_torchxrayvisions(shape):
    xrv = xrv_reference.torchxrayvision()
    image = film(0, *shape[:2])[:, :, : shape[2]]
    ours = centre_square(image).numpy()
    theirs = xrv.datasets.XRayCenterCrop()(xrv.datasets.normalize(image, 255, reshape=True))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("side", "wanted"), [(300, 224), (100, 224), (1025, 512), (224, 224)])
def test_resize_takes_two_pixels_each_way(side, wanted):
    square = torch.rand(1, side, side, dtype=torch.float32)
    at = np.clip((np.arange(wanted) + 0.5) * side / wanted - 0.5, 0, side - 1)
    expected = ndimage.map_coordinates(square[0].numpy(), np.meshgrid(at, at, indexing="ij"), order=1)
    np.testing.assert_allclose(resize(square, wanted)[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("member", "make"),
    [
        (CHEX, xrv_reference.densenet),
        pytest.param(RESNET, xrv_reference.resnet, marks=pytest.mark.slow),
    ],
)
def test_network_is_torchxrayvisions(member, make):
    reference = make(3)
    network, thresholds = networks.load(member, stored(reference))
    films = torch.rand(2, 1, member.resolution, member.resolution) * 2048 - 1024
    with torch.inference_mode():
        ours = torch.sigmoid(network(films))
    known = ~thresholds.isnan()
    ours = networks.normalise(ours, thresholds)
    theirs = xrv_reference.answer(reference, films, thresholds)
    assert bool(ours[:, ~known].isnan().all()) and bool((theirs[:, ~known] == 0.5).all())
    np.testing.assert_allclose(ours[:, known], theirs[:, known], atol=1e-5)
    assert float(ours[:, known].std()) > 0.01


def test_operating_point_is_a_half():
    thresholds = torch.tensor(ALL.thresholds)
    p = torch.cat([thresholds[None], torch.rand(50, 18), torch.zeros(1, 18), torch.ones(1, 18)])
    ours = networks.normalise(p, thresholds)
    np.testing.assert_allclose(ours[0], 0.5, atol=1e-6)
    np.testing.assert_array_equal(ours, xrv_reference.torchxrayvision().models.op_norm(p, thresholds))


@pytest.fixture(scope="module")
def trio():
    """Three members, their reference networks and their weights."""
    table = Table(TABLE.classes, (CHEX, NIH, RESNET), TABLE.reference_sets)
    made = {
        CHEX.name: xrv_reference.densenet(1),
        NIH.name: xrv_reference.densenet(2),
        RESNET.name: xrv_reference.resnet(3),
    }
    return table, made, Weights({name: stored(network) for name, network in made.items()})


def reference_answers(table, made, image):
    """Answers of the reference networks for one film, [members][classes]."""
    square = centre_square(image)[None]
    return [
        xrv_reference.answer(
            made[member.name],
            torch.nn.functional.interpolate(square, (member.resolution,) * 2, mode="bilinear"),
            torch.tensor(member.thresholds),
        )[0].tolist()
        for member in table.members
    ]


def mean(table, answers, *, unknown):
    """The mean of each class over the members; `unknown` counts 0.5 for untrained classes."""
    sums = {finding: [] for finding in table.classes}
    for member, probabilities in zip(table.members, answers, strict=True):
        for finding, p, t in zip(table.classes, probabilities, member.thresholds, strict=True):
            if table.includes(member.name, finding) and (unknown or not np.isnan(t)):
                sums[finding].append(p)
    return {finding: float(np.mean(values)) for finding, values in sums.items() if values}


@pytest.mark.slow
def test_ensemble_is_the_mean_of_its_members(trio):
    table, made, weights = trio
    films = [film(1, 300, 411), np.zeros((9, 9), np.uint8), film(3, 520, 224)]
    ensemble, parity = (kind(weights, table=table) for kind in (expert.Ensemble, expert.ParityEnsemble))
    answers, halves = ensemble.run_batch(films, ""), parity.run_batch(films, "")
    assert isinstance(answers[1], ExpertFailure)
    for n in (0, 2):
        members = reference_answers(table, made, films[n])
        assert answers[n].probabilities == pytest.approx(mean(table, members, unknown=False), abs=1e-5)
        assert halves[n].probabilities == pytest.approx(mean(table, members, unknown=True), abs=1e-5)
    alone = ensemble.run(films[0], "").probabilities
    assert alone == pytest.approx(answers[0].probabilities, abs=1e-6)  # kernels depend on the batch size
    with pytest.raises(ExpertFailure, match="8 bits"):
        ensemble.run(films[1], "")


def test_what_no_member_knows_is_absent_and_half_in_parity():
    table = Table(TABLE.classes, (NIH,), TABLE.reference_sets)
    weights = Weights({NIH.name: stored(xrv_reference.densenet(2))})
    image = film(1, 224, 224)
    ours = expert.Ensemble(weights, table=table).run(image, "").probabilities
    # Four classes without NIH labels, and one for which VILA-M3 does not use this member.
    absent = {"Lung Lesion", "Lung Opacity", "Enlarged Cardiomediastinum", "Fracture", "Pneumothorax"}
    assert not ours.keys() & absent and "Effusion" not in ours  # only from four other members
    parity = expert.ParityEnsemble(weights, table=table).run(image, "").probabilities
    assert {parity[name] for name in ("Lung Lesion", "Lung Opacity", "Fracture")} == {0.5}
    assert "Pneumothorax" not in parity
    assert ours.items() <= parity.items()


def test_parity_is_another_version_of_the_expert():
    parity = descriptors.CXR.with_parity()
    assert parity.version == f"{descriptors.CXR.version}-parity" and parity.card == descriptors.CXR.card
    module, _, name = parity.factory.partition(":")
    assert module == expert.__name__ and getattr(expert, name) is expert.ParityEnsemble
    with pytest.raises(UserError, match="BRAINSEG has no parity variant"):
        descriptors.BRAINSEG.with_parity()


def test_a_files_own_thresholds_count():
    own = torch.full((18,), 0.25)
    own[3] = torch.nan
    content = stored(xrv_reference.densenet(1, own))
    _, thresholds = networks.load(CHEX, content)
    np.testing.assert_array_equal(thresholds, own)
    wrong = safetensors.torch.load(content) | {"op_threshs": torch.full((18,), 1.5)}
    with pytest.raises(UserError, match="between 0 and 1"):
        networks.load(CHEX, safetensors.torch.save(wrong))


def _without(state):
    del state["classifier.bias"]


def _extra(state):
    state["head.weight"] = torch.zeros(3)


def _shape(state):
    state["classifier.weight"] = state["classifier.weight"][:14].clone()


def _nan(state):
    state["features.norm5.bias"] = torch.full_like(state["features.norm5.bias"], torch.nan)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_without, r"1 missing \(class_layers.out.bias\)"),
        (_extra, r"1 unexpected \(head.weight\)"),
        (_shape, r"1 of another shape .*: \[14, 1024\], expected \[18, 1024\]"),
        (_nan, "1 not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(spoil, told):
    state = dict(xrv_reference.densenet(1).state_dict())
    spoil(state)
    with pytest.raises(UserError, match=f"densenet121-res224-chex.safetensors: .*{told}"):
        networks.load(CHEX, safetensors.torch.save(state))


def test_what_is_no_safetensors_file_is_refused():
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    for content in (b"", b"<html>", buffer.getvalue()):
        with pytest.raises(UserError, match="not a safetensors file"):
            networks.load(CHEX, content)
    with pytest.raises(UserError, match=r"lacks densenet121-res224-all\.safetensors.*--fetch --expert CXR"):
        expert.Ensemble(Weights())


def test_a_network_without_a_finite_answer_declines(trio):
    table, made, _ = trio
    state = {k: v.clone() for k, v in made[NIH.name].state_dict().items()}
    state["classifier.weight"] *= 3e38  # finite, unlike its products
    broken = Weights({NIH.name: safetensors.torch.save(state)})
    single = dataclasses.replace(table, members=(NIH,))
    with pytest.raises(ExpertFailure, match="no finite number"):
        expert.Ensemble(broken, table=single).run(film(1, 224, 224), "")
