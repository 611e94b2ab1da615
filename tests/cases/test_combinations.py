"""Any combination of a command's options works, none of them having been ignored, or is one clear error."""

from __future__ import annotations

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apps.cli import app
from convert.__main__ import _parser
from tests.cases.combinations import COMMANDS, NEEDED, USUAL, Drawn, Places, run


def options(command: str) -> st.SearchStrategy[Drawn]:
    values = {
        option: st.sampled_from(given) if given else st.none() for option, given in COMMANDS[command].items()
    }
    needed = {option: st.just(USUAL.get(option)) | values.pop(option) for option in NEEDED[command]}
    return st.fixed_dictionaries(needed, optional=values)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tmp_path_factory.mktemp("places"))


@pytest.mark.parametrize("command", COMMANDS)
def test_it_works_or_is_one_clear_error(command: str, places: Places) -> None:
    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(options(command))
    def every(drawn: Drawn) -> None:
        run(command, drawn, places)

    every()


def test_a_command_that_ignores_an_option_is_found(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks can fail: here --max-tokens is ignored."""
    from apps import options as shared
    from redrafter_mlx.generation import Options

    monkeypatch.setattr(shared, "checked_options", lambda *given: Options(2, draft="off"))
    asked = {"--model": "{model}", "--json": None, "--max-tokens": "9", "": "hi"}
    with pytest.raises(AssertionError):
        run("generate", asked, places)


NOT_DRAWN = {"--help", "-h", "--push-to-hub"}
"""--push-to-hub uploads."""


def test_every_option_of_every_command_is_drawn() -> None:
    known: dict[str, list[list[str]]] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        known[name] = [
            [*each.opts, *each.secondary_opts] for each in command.params if each.opts[0][0] == "-"
        ]
    for action in _parser()._actions:
        for name, parser in (action.choices or {}).items() if isinstance(action.choices, dict) else ():
            known[f"convert {name}"] = [
                list(each.option_strings) for each in parser._actions if each.option_strings
            ]
    assert known.keys() == COMMANDS.keys()
    missing = {
        name: [names for names in options if not {*names} & (COMMANDS[name].keys() | NOT_DRAWN)]
        for name, options in known.items()
    }
    assert not any(missing.values()), missing
