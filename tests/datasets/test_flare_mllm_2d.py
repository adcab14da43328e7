"""FLARE-MLLM-2D: task families, several images, splits by folder, the hidden set."""

import re

import pytest
from twins import made, picture, write

from vilam3_jax.datasets.flare_mllm_2d import FlareMllm2d
from vilam3_jax.errors import UserError


def row(task, image, question, answer, **more):
    return {
        "TaskType": task,
        "Modality": "x",
        "ImageName": image,
        "Question": question,
        "Answer": answer,
    } | more


@pytest.fixture
def flare(tmp_path):
    return write(
        tmp_path,
        {
            "training/Xray/dental/dental_questions_train.json": [
                row("Multi-label Classification", "imagesTr/1.png", "Which labels?", ["caries", "crown"]),
                row(
                    "classification",
                    "1.png",
                    "Which class?",
                    "B",
                    Options=["one", "two", "three"],
                    Split="train",
                ),
                row("multi_label_classification", "1.png", "Which labels?", []),
            ],
            "training/Xray/dental/imagesTr/1.png": picture(1, kind="PNG"),
            "training/Xray/chestdr/chestdr_questions_train.json": [
                {
                    "tasktype": "Report Generation",
                    "imagename": "a/b/2.png",
                    "question": "Report?",
                    "Report": "Clear.",
                }
            ],
            "training/Xray/chestdr/imagesTr/2.png": picture(2, kind="PNG"),
            "validation_public/Clinical/neojaundice/neojaundice_questions_val.json": [
                row("Regression", ["v1.jpg", "v2.jpg", "v3.jpg"], "Bilirubin?", 12.5, ID="case7")
            ],
            **{
                f"validation_public/Clinical/neojaundice/imagesVal/v{n}.jpg": picture(10 + n)
                for n in (1, 2, 3)
            },
            "validation-hidden/Microscopy/chromosome/chromosome_questions_val.json": [
                row("Detection", "4.png", "Where?", "")
            ],
            "validation-hidden/Microscopy/chromosome/chromosome_questions_val_withGT.json": [
                row("Detection", "4.png", "Where?", {"1": [[1, 2, 3, 4]]})
            ],
            "validation-hidden/Microscopy/chromosome/imagesVal/4.png": picture(4, kind="PNG"),
            "testing/Microscopy/bone_marrow/bone_marrow_questions_test.json": [
                row("Cell Counting", "5.png", "How many?", 17)
            ],
            "testing/Microscopy/bone_marrow/imagesTs/5.png": picture(5, kind="PNG"),
        },
    )


def test_families_images_and_splits(flare):
    examples, skipped = made(FlareMllm2d, flare)
    assert not any(skipped.values())
    said = {
        name: [(one.id, one.turns[-1].text, one.meta["qa"][0]["type"], one.meta["modality"]) for one in found]
        for name, found in examples.items()
    }
    options = said["train"].pop(2)
    assert said == {
        "train": [
            ("train/chestdr/row-1", "Clear.", "report_generation", "CXR"),
            ("train/dental/row-1", "caries; crown", "multi_label_classification", "XR"),
            ("train/dental/row-3", "none", "multi_label_classification", "XR"),
        ],
        "validation": [("validation/neojaundice/case7", "12.5", "regression", "PHOTO")],
        "validation_hidden": [
            ("validation_hidden/chromosome/row-1", '{"1": [[1, 2, 3, 4]]}', "detection", "MICROSCOPY")
        ],
        "test": [("test/bone_marrow/row-1", "17", "cell_counting", "MICROSCOPY")],
    }
    assert options[0] == "train/dental/row-2" and options[1].endswith(". two")
    three = examples["validation"][0]
    assert [image.data for image in three.images] == [picture(11), picture(12), picture(13)]
    assert three.turns[0].text == "<image>\n<image>\n<image>\nBilirubin?"
    assert examples["train"][0].images[0].data == picture(2, kind="PNG")
    groups = {name: {one.meta["group"] for one in found} for name, found in examples.items()}
    assert len(set.union(*groups.values())) == sum(map(len, groups.values()))


def test_images_are_where_their_paths_say(flare):
    folder = "training/Xray/dental"
    places = ("sub/1.png", "imagesTr/sub/1.png", f"{folder}/imagesTr/sub/1.png", "1.png")
    asked = [row("classification", place, "Which class?", "one") for place in places]
    write(flare, {f"{folder}/dental_questions_train.json": asked})
    write(flare, {f"{folder}/imagesTr/sub/1.png": picture(7, kind="PNG")})
    examples, _ = made(FlareMllm2d, flare)
    found = [one.images[0].data for one in examples["train"] if "dental" in one.id]
    assert found == [picture(7, kind="PNG")] * 3 + [picture(1, kind="PNG")]


def test_answers_replace_questions_of_their_own_file_only(flare):
    folder = "validation-hidden/Microscopy/chromosome"
    boxes = [row("Detection", "4.png", "Where?", [[1, 2, 3, 4]], ID="boxes")]
    write(flare, {f"{folder}/chromosome-det_questions_val.json": boxes})
    examples, _ = made(FlareMllm2d, flare)
    assert [one.id.rpartition("/")[2] for one in examples["validation_hidden"]] == ["boxes", "row-1"]


def test_flags_of_labels_may_be_text(flare):
    flags = {"caries": "0", "crown": "1", "cyst": "No", "implant": True, "root": 0.0, "pulp": "yes"}
    asked = row("multilabel", "1.png", "Which labels?", flags)
    write(flare, {"training/Xray/dental/dental_questions_train.json": [asked]})
    examples, _ = made(FlareMllm2d, flare)
    assert examples["train"][1].turns[1].text == "crown; implant; pulp"


@pytest.mark.parametrize(
    "options, answer",
    [
        ({"A": "one", "C": "two"}, "C"),
        (["A. one", "B. two"], "B"),
        (["(A) one", "(B) two"], "(B) two"),
        (["A) one", "B) two"], "two"),
    ],
)
def test_options_by_letter_and_with_their_letters(flare, options, answer):
    asked = row("classification", "1.png", "Which class?", answer, Options=options)
    write(flare, {"training/Xray/dental/dental_questions_train.json": [asked]})
    examples, _ = made(FlareMllm2d, flare)
    (qa,) = examples["train"][1].meta["qa"]
    assert sorted(qa["options"]) == ["one", "two"] and qa["answer"] == "two"


def test_the_hidden_set_without_answers_is_skipped(flare):
    (flare / "validation-hidden/Microscopy/chromosome/chromosome_questions_val_withGT.json").unlink()
    examples, skipped = made(FlareMllm2d, flare)
    assert not examples["validation_hidden"]
    assert [one.reason for one in skipped["validation_hidden"]] == ["the answer is empty"]


def test_options_are_shuffled_in_training_only(flare):
    asked = row("classification", "1.png", "Which class?", "two", Choices=["one", "two", "three"])
    write(flare, {"training/Xray/dental/dental_questions_train.json": [asked] * 30})
    write(
        flare,
        {"testing/Microscopy/bone_marrow/bone_marrow_questions_test.json": [asked | {"ImageName": "5.png"}]},
    )
    examples, _ = made(FlareMllm2d, flare)
    replies = {one.turns[1].text for one in examples["train"] if "dental" in one.id}
    assert replies == {"A. two", "B. two", "C. two"}
    assert examples["test"][0].turns[1].text == "B. two"
    assert examples["test"][0].meta["qa"][0]["options"] == ["one", "two", "three"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"ImageName": []}, "names no images"),
        ({"ImageName": None}, "image name is missing"),
        ({"ImageName": [7]}, "is missing"),
        ({"ImageName": ["1.png", "gone.png"]}, "gone.png is missing"),
        ({"ImageName": "../../dental/dental_questions_train.json"}, "leaves the data root"),
        ({"Question": None}, "question is missing"),
        ({"Answer": None}, "answer is missing"),
        ({"Answer": True}, "answer is a bool"),
        ({"Answer": ["x"]}, "answer is a list"),
        ({"TaskType": "multilabel", "Answer": [None]}, "label is missing"),
        ({"TaskType": "detection", "Answer": [float("nan")]}, "ValueError"),
        ({"Options": ["one", "two"]}, "none of the options"),
        ({"Options": "A) one B) two"}, "options are a str"),
        ({"Options": ["one", ["two"]]}, "option B is a list"),
        ({"Options": [str(n) for n in range(30)]}, "more options than letters"),
    ],
)
def test_rows_that_cannot_be_used(flare, change, reason):
    good = row("classification", "1.png", "Which class?", "caries")
    write(flare, {"training/Xray/dental/dental_questions_train.json": ["text", good | change, good]})
    examples, skipped = made(FlareMllm2d, flare)
    assert [one.id for one in examples["train"]][1:] == ["train/dental/row-3"]
    assert [one.record.rpartition(" ")[2] for one in skipped["train"]] == ["1", "2"]
    assert re.search(reason, skipped["train"][1].reason), skipped["train"][1]


def test_what_is_missing_is_named(flare, tmp_path_factory):
    dental = flare / "training/Xray/dental"
    (dental / "imagesTr").rename(dental / "elsewhere")
    with pytest.raises(UserError, match=r"training/Xray/dental/imagesTr missing$"):
        made(FlareMllm2d, flare)
    (dental / "imagesTr.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"imagesTr missing \(unpack its \.zip\)"):
        made(FlareMllm2d, flare)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match=r"training or .* missing\. Request access"):
        made(FlareMllm2d, empty)
    (empty / "testing").mkdir()
    with pytest.raises(UserError, match=r"testing: no CATEGORY/DATASET/\*_questions_test\.json"):
        made(FlareMllm2d, empty)
