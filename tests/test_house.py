"""The rules that keep the scripts readable: self-contained, the same where they say the same, short."""

import ast
import inspect
import re

import pytest
from conftest import ROOT

PROGRAMS = {"enjoy", "rat_gaussian"}  # these do not train
SCRIPTS = sorted({path.stem for path in ROOT.glob("*.py")} - PROGRAMS)
# The function or class that holds the algorithm
CORES = {
    "acktr": "KFAC",
    "rat_continuous": "rat_direction",
    "rat_shared": "rat_targets",
    "npg_cg": "natural_gradient",
    "npg_rank1": "rank1_direction",
    "sophia_ppo": "Sophia",
    "rat_procgen": "rat_direction",
}
LONGER_CORES = {"acktr": 110}  # lines: statistics, eigenbases and step of two methods, for two kinds of layers
# Names whose source is a script's own: everywhere, or in one script for the reason given.
OWN = {"Args", "main", "ALGORITHM"}
DIFFERS = {
    "acktr": {"Actor": "may hold the value head", "Agent": "actor and critic may share a trunk"},
    "rat_shared": {"make_envs": "takes Discrete actions too", "Agent": "actor and critic share a trunk"},
    "sophia_ppo": {"Agent": "actor and critic may share a trunk"},
    "rat_procgen": {
        "check_args": "level numbers may be 0, channels are three numbers",
        "Actor": "convolutions and a Categorical",
        "Agent": "convolutions, no observation statistics",
        "tape_scores": "takes convolutions, in chunks",
        "rat_direction": "passes --kernel-memory on",
        "load_checkpoint": "--kernel-memory may change",
        "Collector": "bytes, resets within the step, scaled rewards",
    },
}


def definitions(script):
    """Top-level functions, classes and constants with their source."""
    source = (ROOT / f"{script}.py").read_text()
    found = {}
    for node in ast.parse(source).body:
        text = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = text
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = text
    return found


def test_same_name_same_source():
    seen = {}
    for script in SCRIPTS:
        for name, source in definitions(script).items():
            if name not in OWN | DIFFERS.get(script, {}).keys():
                first, text = seen.setdefault(name, (script, source))
                assert source == text, f"{name} differs between {first}.py and {script}.py"
    for script, names in DIFFERS.items():
        for name in names:
            assert definitions(script)[name] != seen[name][1], f"{name} of {script}.py is no exception"


@pytest.mark.parametrize("script", [*SCRIPTS, "rat_gaussian"])
def test_scripts_are_self_contained_and_short(script):
    source = (ROOT / f"{script}.py").read_text()
    assert len(source.splitlines()) <= 500
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", source, re.MULTILINE))
    assert not imported & {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_core_is_one_short_function(script):
    assert len(definitions(script)[CORES[script]].splitlines()) <= LONGER_CORES.get(script, 60)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_argument_is_read_and_explained(script):
    source = (ROOT / f"{script}.py").read_text()
    fields = re.findall(r"^    (\w+): .*? = (?:\(.*?\)|\S+)(.*)$", definitions(script)["Args"], re.MULTILINE)
    assert len(fields) > 10
    for name, comment in fields:
        assert comment.startswith("  # "), f"{name} has no help text"
        assert re.search(rf"\bargs\.{name}\b", source), f"nothing reads {name}"


@pytest.mark.parametrize("script", [*SCRIPTS, "rat_gaussian"])
def test_functions_and_classes_say_what_they_do(script):
    import importlib

    module = importlib.import_module(script)
    for name in definitions(script):
        if inspect.isfunction(value := getattr(module, name)) or (inspect.isclass(value) and name != "Args"):
            assert value.__doc__, f"{name} has no docstring"
