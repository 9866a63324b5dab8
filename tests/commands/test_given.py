"""Configs given together: who wins, and where a name comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_cka.commands.given import GivenConfigs

OPTIONS = ["trainer.max_epochs", "trainer.callbacks", "model", "seed", "title"]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(*contents: str) -> list[str]:
    """What is said of the last of several configs: 0.yaml, 1.yaml, ..."""
    given = GivenConfigs()
    said: list[str] = []
    for number, content in enumerate(contents):
        Path(f"{number}.yaml").write_text(content)
        said = given.add(f"{number}.yaml", OPTIONS)
    return said


def test_only_differences_are_said() -> None:
    assert lines("seed: 1\ntitle: a") == []
    assert lines("seed: 1\ntitle: a", "seed: 1") == []
    assert lines("seed: 1", "title: a") == []
    expected = "`seed`: 1.yaml wins over 0.yaml, since it comes later."
    assert lines("seed: 1\ntitle: a", "seed: 2\ntitle: a") == [expected]


def test_groups_and_arguments_of_classes_are_compared_one_by_one() -> None:
    first = "trainer: {max_epochs: 1, callbacks: []}\nmodel: {class_path: A, init_args: {x: 1, kwargs: {a: 1, b: 2}}}"
    second = "trainer: {max_epochs: 2}\nmodel: {init_args: {y: 1, x: 1, kwargs: {a: 1}}}"
    # A mapping that is an argument's value is replaced as a whole, so that `b` is lost.
    (line,) = lines(first, second)
    assert line.startswith("`trainer.max_epochs`, `model.init_args.kwargs`: 1.yaml wins")
    (line,) = lines(first, "model: {class_path: B, init_args: {x: 1, kwargs: {a: 1, b: 2}}}")
    assert line.startswith("`model.class_path`: 1.yaml wins")


def test_each_earlier_config_has_a_line_and_long_ones_are_cut() -> None:
    said = lines("seed: 1\ntitle: a", "seed: 2", "seed: 3\ntitle: b")
    assert said == [
        "`seed`: 2.yaml wins over 1.yaml, since it comes later.",
        "`title`: 2.yaml wins over 0.yaml, since it comes later.",
    ]
    many = "\n".join(f"x{index}: {{value}}" for index in range(5))
    (line,) = lines(many.format(value=1), many.format(value=2))
    assert line.startswith("`x0`, `x1`, `x2` and 2 more: 1.yaml wins over 0.yaml")


def test_where_a_name_comes_from() -> None:
    given = GivenConfigs()
    Path("a.yaml").write_text("trainer: {callbacks: [{class_path: A, init_args: {debias: true}}]}\nmodell: {x: 1}")
    Path("b.yaml").write_text("modell: 1")
    for name in ("a.yaml", "b.yaml"):
        given.add(name, OPTIONS)
    assert given.sources("debias") == ["a.yaml"]
    assert given.sources("trainer.callbacks") == ["a.yaml"]
    assert given.sources("modell") == ["a.yaml", "b.yaml"]
    assert given.sources("odell") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1\nb: 2\n", r"Expected '0\.yaml' to be YAML, but in line 2: "),
        ("- a\n- b\n", r"Expected '0\.yaml' to hold options, as `name: value`, but got .*\['a', 'b'\]"),
        ("", r"to hold options, as `name: value`, but got 'None'"),
        ("a: \x00", "to be YAML, but it is no text"),
    ],
)
def test_what_is_no_config(content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lines(content)


def test_addresses_are_not_looked_into() -> None:
    assert GivenConfigs().add("s3://bucket/a.yaml", OPTIONS) == []
    assert GivenConfigs().add("{seed: 1}", OPTIONS) == []
