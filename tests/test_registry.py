"""Names and dotted paths."""
import math
import sys

import pytest

from kl_reg.registry import Registry


@pytest.fixture
def colours():
    registry = Registry("paint.colour")
    registry.register("red", 1)
    registry.register("blue", 2)
    return registry


def test_a_name_gives_what_was_registered(colours):
    assert colours["red"] == 1 and colours["blue"] == 2
    assert colours.names() == ["blue", "red"]


def test_register_returns_its_item(colours):
    assert colours.register("green", math.sqrt) is math.sqrt


def test_an_unknown_name_lists_the_choices(colours):
    with pytest.raises(ValueError, match="paint.colour='green' is unknown; choose one of blue, red"):
        colours["green"]


def test_a_name_is_given_once(colours):
    with pytest.raises(ValueError, match="paint.colour='red' is registered twice"):
        colours.register("red", 3)
    assert colours["red"] == 1


def test_registries_are_apart(colours):
    assert Registry("paint.colour").names() == []


def test_a_dotted_path_works_like_a_name(colours):
    assert colours["math.sqrt"] is math.sqrt
    assert colours["kl_reg.registry.Registry"] is Registry


def test_a_name_with_a_dot_comes_before_a_path(colours):
    colours.register("math.sqrt", 4)
    assert colours["math.sqrt"] == 4


@pytest.mark.parametrize("path", ["math.pi", "kl_reg.models", "kl_reg.sampling.action._BLOCK"])
def test_what_is_no_function_is_refused(colours, path):
    with pytest.raises(ValueError, match=rf"paint.colour='{path}' is .*, no function; choose one of blue, red"):
        colours[path]


def test_an_object_of_another_type_is_refused():
    typed = Registry("paint.colour", of=int)
    assert typed["sys.maxsize"] == sys.maxsize
    with pytest.raises(ValueError, match=r"paint.colour='math.sqrt' is <.*>, no builtins.int"):
        typed["math.sqrt"]


def test_a_module_that_raises_is_named(colours, tmp_path, monkeypatch):
    (tmp_path / "raising.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="paint.colour='raising.red' cannot be imported: ZeroDivisionError"):
        colours["raising.red"]


@pytest.mark.parametrize(("path", "words"), [
    ("no_such_package.thing", "no_such_package"), ("math.no_such_name", "no_such_name"),
    ("kl_reg.no_such_module.thing", "no_such_module"), ("math.", "math."), (".red", ".red"), ("..red", "..red")])
def test_a_broken_dotted_path_says_what_is_missing(colours, path, words):
    with pytest.raises(ValueError, match="paint.colour=") as error:
        colours[path]
    assert words in str(error.value)


def test_facts_are_those_of_the_registration_or_the_ones_for_who_states_none():
    registry = Registry("paint.colour", warm=False, price=1.0)
    registry.register("red", 1, warm=True)
    registry.register("blue", 2)
    assert registry.facts("red") == {"warm": True, "price": 1.0}
    assert registry.facts("blue") == registry.facts("math.sqrt") == {"warm": False, "price": 1.0}
    with pytest.raises(ValueError, match="paint.colour='green' is unknown"):
        registry.facts("green")


def test_an_unknown_fact_is_refused(colours):
    with pytest.raises(ValueError, match="'green' states warm; a paint.colour can state nothing"):
        colours.register("green", 3, warm=True)
    assert colours.names() == ["blue", "red"]


def test_a_module_may_register_what_a_path_names(tmp_path, monkeypatch):
    """Its facts are found by the path, before and after the import."""
    (tmp_path / "paints.py").write_text("import registered\npink = 5\n"
                                        "registered.colours.register(f'{__name__}.pink', pink, warm=True)\n")
    (tmp_path / "registered.py").write_text("from kl_reg.registry import Registry\n"
                                            "colours = Registry('paint.colour', of=int, warm=False)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import registered
    assert registered.colours.facts("paints.pink") == {"warm": True} and registered.colours["paints.pink"] == 5
