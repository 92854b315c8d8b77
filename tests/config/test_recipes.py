"""Recipes for pictures and sounds, as they are written on the command line."""

from __future__ import annotations

import re
from typing import Any, get_type_hints

import pytest
from pydantic import ValidationError

from eptq_onnx import ConfigError, Data
from eptq_onnx.config import Option, Reading
from eptq_onnx.config.files import read_options
from eptq_onnx.config.reading import ReadingOptions
from eptq_onnx.config.recipes import IMAGE_RECIPES, AudioRecipe, Fit, ImageRecipe, Units


def image(text: str) -> ImageRecipe:
    return ImageRecipe.model_validate(text)


def test_every_option_has_a_type_for_users_and_help():
    assert list(get_type_hints(ReadingOptions)) == list(Reading.model_fields)
    for field in Reading.model_fields.values():
        assert [m.section for m in field.metadata if isinstance(m, Option)] == ["data"]
        assert field.description


def test_a_recipe_says_everything():
    found = image(
        "size=224,resize=256,crop=center,mean=imagenet,std=imagenet,layout=nchw,color=rgb,resample=bicubic"
    )
    assert (found.size, found.resize, found.fit) == ((224, 224), 256, Fit.CROP)
    mean, std, units = found.in_pixels() or ((), (), None)
    assert mean == pytest.approx((123.675, 116.28, 103.53))
    assert std == pytest.approx((58.395, 57.12, 57.375))
    assert units is Units.FRACTIONS


@pytest.mark.parametrize(
    ("text", "mean", "std"),
    [
        ("mean=0.5,std=0.5", 127.5, 127.5),
        ("mean=127.5,std=127.5", 127.5, 127.5),
        ("mean=0,std=1", 0, 255),
        ("mean=0,std=255", 0, 255),
        ("mean=0,std=1,units=pixels", 0, 1),
        ("mean=104,117,124,std=1", 104, 1),
        ("mean=2,std=1", 510, 255),
        ("mean=2.001,std=1", 2.001, 1),
        ("mean=0.5,std=128", 0.5, 128),
        ("mean=300,std=2,units=fractions", 76500, 510),
        ("raw", 0, 1),
        ("raw,mean=0.5,std=0.5", 127.5, 127.5),
        ("unit", 0, 255),
    ],
)
def test_numbers_up_to_2_are_fractions_and_larger_ones_pixels(text, mean, std):
    found = image(text).in_pixels()
    assert found is not None
    assert (found[0][0], found[1][0]) == pytest.approx((mean, std))


@pytest.mark.parametrize("name", IMAGE_RECIPES)
def test_a_name_leaves_no_units_open_and_help_lists_it(name):
    assert image(name).units is not None
    assert re.search(
        rf"a name \([^)]*\b{name}\b", " ".join((Reading.model_fields["image"].description or "").split())
    )
    assert image(f"{name},mean=0.5,std=0.5").units is None


def test_a_picture_may_stay_unscaled_before_the_crop():
    assert image("tf,resize=none").resize == "none"
    assert image(str(image("tf,resize=none"))) == image("tf,resize=none")


def test_words_follow_the_order_of_colours_and_numbers_do_not():
    turned = image("mean=imagenet,std=imagenet,color=bgr")
    assert turned.mean == (0.406, 0.456, 0.485)
    assert image("mean=0.1,0.2,0.3,std=1,color=bgr").mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("name", IMAGE_RECIPES)
def test_a_named_recipe_may_be_changed_and_written_again(name):
    found = image(f"{name},size=320x224")
    assert found.size == (320, 224)
    assert found.model_copy(update={"size": None}) == image(name)
    assert image(str(found)) == found
    assert ImageRecipe.model_validate(found.model_dump(mode="json")) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no recipe: give one of imagenet, "),
        ("imagnet", "'imagnet' is no recipe: give one of imagenet, "),
        ("imagenet,unit", "'unit' is no recipe"),
        ("size=224,size=256", "size is given twice"),
        ("size=0", "greater than or equal to 1"),
        ("size=224x224x3", "height and width such as"),
        ("size=big", "give a side such as"),
        ("size=1e9", "give a side such as"),
        ("size=99999", "less than or equal to 16384"),
        ("size=224,resize=200,crop=center", "resize=200 is smaller than size=224"),
        ("resize=256,fit=stretch", "leave it out with fit=stretch"),
        ("resize=none,fit=letterbox", "leave it out with fit=letterbox"),
        ("resize=0", "greater than or equal to 1"),
        ("resize=half", "valid integer"),
        ("crop=left", "crop is center or none"),
        ("crop=center,fit=crop", "crop is center or none"),
        ("mean=0.5", "mean and std go together"),
        ("mean=1,2,std=1", "one for each of three channels"),
        ("mean=0,std=0", "greater than 0"),
        ("mean=nan,std=1", "finite"),
        ("mean=0,std=inf", "finite"),
        ("mean=imagnet,std=1", "valid number"),
        ("colour=rgb", "[Ee]xtra"),
        ("color=rgbx", "'rgb', 'bgr' or 'gray'"),
        ("layout=chwn", "'nchw', 'nhwc' or 'nhw'"),
        ("fill=256,fit=letterbox", "less than or equal to 255"),
    ],
)
def test_what_is_no_recipe_is_told(text, message):
    with pytest.raises(ValidationError, match=message):
        image(text)
    with pytest.raises(ConfigError, match=r"^option image(\.\w+)?(=| is )") as e:
        Data("photos", image=text)
    assert "\n" not in str(e.value)


def test_sounds_have_a_recipe_too():
    found = AudioRecipe.model_validate("rate=16000,seconds=0.5,channels=mono")
    assert (found.rate, found.seconds) == (16000, 0.5)
    assert AudioRecipe.model_validate(str(found)) == found
    for text in ("rate=0", "seconds=-1", "channels=5", "16000", "rate"):
        with pytest.raises(ConfigError, match="option audio"):
            Data("sounds", audio=text)


@pytest.mark.parametrize("options", [{"samples": 0}, {"samples": -3}, {"sample": 3}, {"image": 3}])
def test_a_wrong_option_is_named(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=f"option {next(iter(options))}"):
        Data("photos", **options)


def test_a_file_of_options_may_hold_them(tmp_path):
    (tmp_path / "run.toml").write_text('seed = 3\n[data]\nimage = "unit,size=64"\nsamples = 20\n')
    options = read_options(tmp_path / "run.toml")
    assert options.pop("seed") == 3
    assert Reading(**options) == Data("photos", image="unit,size=64", samples=20).reading
