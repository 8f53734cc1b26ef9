from abc import ABC, abstractmethod

import pytest

from kd_common.registry import Registry, UnknownNameError, subclasses


@pytest.fixture
def models():
    registry = Registry("model")
    for name in ("resnet20", "resnet32", "ShuffleV1"):
        registry.register(name)(name.upper())
    return registry


def test_decorator_returns_its_argument_and_get_finds_it():
    registry = Registry("method")

    @registry.register("kd")
    class KD:
        pass

    assert registry.get("kd") is KD
    assert KD.__name__ == "KD"


def test_names_keep_registration_order(models):
    assert models.names() == ("resnet20", "resnet32", "ShuffleV1")


def test_duplicate_is_an_error_and_keeps_the_first(models):
    with pytest.raises(ValueError, match="model 'resnet20' is already registered"):
        models.register("resnet20")
    assert models.get("resnet20") == "RESNET20"


@pytest.mark.parametrize("name", ["resnet", "resnet2", "shufflev1", "RESNET20", ""])
def test_keys_match_exactly(models, name):
    with pytest.raises(UnknownNameError):
        models.get(name)


def test_unknown_key_names_kind_key_close_matches_and_all(models):
    with pytest.raises(UnknownNameError) as caught:
        models.get("shufflev2")
    assert str(caught.value) == (
        "unknown model 'shufflev2'; did you mean ShuffleV1? (known: resnet20, resnet32, ShuffleV1)"
    )


def test_no_suggestion_when_nothing_is_close(models):
    with pytest.raises(ValueError, match=r"^unknown model 'zzz' \(known: "):
        models.get("zzz")


def test_subclasses_are_found_by_name_without_abstract_and_private_ones():
    class Base(ABC):
        @abstractmethod
        def step(self): ...

    class Second(Base):
        def step(self): ...

    class First(Second): ...

    class _Helper(Base):
        def step(self): ...

    assert list(subclasses(Base).items()) == [("First", First), ("Second", Second)]
