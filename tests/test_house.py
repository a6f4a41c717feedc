"""The rules that keep the scripts readable: self-contained, the same where they say the same."""

import ast
import importlib
import inspect
import io
import re
import tokenize

import pytest
from conftest import ROOT
from sync_copies import DIFFERS, SCRIPTS, definitions, shared_by, sync

# The function or class that holds the algorithm
CORES = {
    "acktr": "KFAC",
    "npg_cg": "natural_gradient",
    "npg_rank1": "rank1_direction",
    "rat_continuous": "rat_direction",
    "rat_procgen": "kaczmarz_direction",
    "rat_shared": "joint_step",
    "sophia_ppo": "Sophia",
}
MOST_TOKENS = dict.fromkeys(SCRIPTS, 5500) | {"rat_procgen": 6000}
SECTIONS = ["Environments", "Networks", "What every script has", "The algorithm's core", "Training"]
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
OURS = [ROOT / f"{name}.py" for name in [*SCRIPTS, "enjoy", "rat_gaussian"]]
OURS += [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmark/*.py")]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
every_script = pytest.mark.parametrize("script", SCRIPTS)


def read(script):
    return (ROOT / f"{script}.py").read_text()


def functions(script):
    """All functions and methods."""
    return [node for node in ast.walk(ast.parse(read(script))) if isinstance(node, ast.FunctionDef)]


def docstring_lines(tree):
    """The lines that docstrings take."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_tokens(source):
    """Number of tokens without comments, docstrings and newlines: joining lines does not help.

    An f-string is one token, as in Python 3.11; 3.12 takes it apart."""
    documentation = docstring_lines(ast.parse(source))
    count = 0
    depth = 0  # of nested f-strings
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        is_docstring = kind == "STRING" and token.start[0] in documentation
        if kind == "FSTRING_START":
            depth += 1
        elif kind == "FSTRING_END":
            depth -= 1
        if depth == 0 and token.type not in NO_CODE and not is_docstring:
            count += 1
    return count


def test_code_tokens_counts_code():
    source = '"""A module."""\n\nx = f"{y[0]:.1f} {f(z)}"  # why\n\n\ndef g():\n    """Said."""\n'
    assert code_tokens(source) == 3 + 5


def test_same_name_same_source():
    everywhere = {script: definitions(script) for script in SCRIPTS}
    for script, here in everywhere.items():
        for name, source in here.items():
            for other in shared_by(name, script):
                mend = f"python tests/sync_copies.py {name} {script}.py"
                text = everywhere[other].get(name, source)
                assert source == text, f"{name} differs in {other}.py, mend it: {mend}"


@every_script
def test_exceptions_are_exceptions(script):
    """A name listed as a script's own is there and differs from another script's."""
    here = definitions(script)
    for name in DIFFERS[script]:
        others = [definitions(other).get(name) for other in SCRIPTS if other != script]
        assert name in here, f"{script}.py has no {name}"
        assert any(text not in (None, here[name]) for text in others), name


def test_sync_copies_mends_a_drifted_copy(tmp_path, monkeypatch):
    import sync_copies

    for script in SCRIPTS:
        (tmp_path / f"{script}.py").write_text(read(script))
    monkeypatch.setattr(sync_copies, "ROOT", tmp_path)
    path = tmp_path / "rat_shared.py"
    changed = read("rat_shared").replace("def gae(rollout, values, gamma, lam):", "def gae(*all):")
    path.write_text(changed)
    assert changed != read("rat_shared")
    assert sync("gae", "npg_cg") == ["rat_shared"]
    assert path.read_text() == read("rat_shared")
    decorated = read("npg_cg").replace(
        "@torch.no_grad()\ndef rollout_metrics", "def rollout_metrics"
    )
    (tmp_path / "npg_cg.py").write_text(decorated)
    assert sync("rollout_metrics", "rat_shared") == ["npg_cg"]
    assert (tmp_path / "npg_cg.py").read_text() == read("npg_cg")


@pytest.mark.parametrize("script", [*SCRIPTS, "rat_gaussian"])
def test_scripts_are_self_contained(script):
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", read(script), re.MULTILINE))
    assert not imported & {path.stem for path in OURS}


@every_script
def test_scripts_are_short_in_tokens(script):
    assert code_tokens(read(script)) <= MOST_TOKENS[script]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_one_idea_a_line(path):
    source = path.read_text()
    assert max(map(len, source.splitlines())) <= 100
    assert "fmt: " + "skip" not in source
    for node in ast.walk(ast.parse(source)):
        assert not isinstance(node, ast.NamedExpr), f"line {node.lineno}: a walrus"
        if isinstance(node, ast.IfExp):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.IfExp)]
            assert len(inner) == 1, f"line {node.lineno}: a nested conditional expression"
        if isinstance(node, ast.Expr):
            built = isinstance(node.value, ast.ListComp | ast.SetComp | ast.DictComp)
            assert not built, f"line {node.lineno}: a list built for a side effect"


@every_script
def test_functions_fit_on_a_screen(script):
    for node in functions(script):
        most = 110 if node.name == "main" else 40
        assert node.end_lineno - node.lineno < most, node.name


@every_script
def test_sections_stand_in_order(script):
    source = read(script)
    places = [source.index("class Args")]
    places += [source.index(f"\n# ---- {title}") for title in SECTIONS]
    assert places == sorted(places)
    assert CORES[script] in definitions(script)
    core = source.index("\n# ---- The algorithm's core")
    assert re.search(rf"^(def|class) {CORES[script]}\b", source[core:], re.MULTILINE)


@every_script
def test_docstring_is_the_loop_as_pseudocode(script):
    """Six to twelve indented lines, each but the loops' heads with the name that does it."""
    docstring = ast.get_docstring(ast.parse(read(script)))
    lines = [line for line in docstring.splitlines() if line.startswith("    ")]
    assert 6 <= len(lines) <= 12
    names = definitions(script).keys()
    for line in lines:
        if not line.rstrip().endswith(":") or "  " in line.strip():
            named = re.split(r"\s{2,}", line.strip())[-1]
            assert set(re.findall(r"[A-Za-z_0-9]+", named)) & names, line


@every_script
def test_every_argument_is_read_and_explained(script):
    source = read(script)
    pattern = r"^    (\w+): .*? = .*?(?:  # (.*))?$"
    fields = re.findall(pattern, definitions(script)["Args"], re.MULTILINE)
    assert len(fields) > 10
    for name, comment in fields:
        assert comment, f"{name} has no help text"
        assert re.search(rf"\bargs\.{name}\b", source), f"nothing reads {name}"


@pytest.mark.parametrize("script", [*SCRIPTS, "rat_gaussian"])
def test_functions_and_classes_say_what_they_do(script):
    module = importlib.import_module(script)
    for name in definitions(script):
        value = getattr(module, name)
        if inspect.isfunction(value) or (inspect.isclass(value) and name != "Args"):
            assert value.__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("script", [*SCRIPTS, "rat_gaussian", "enjoy"])
def test_inline_metadata_pins_what_requirements_pin(script):
    """PEP 723: `uv run script.py` installs what `pip install -r requirements.txt` does."""
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", read(script)).group(1)
    pinned = re.findall(r'"([^"]+[=<>]=[^"]*)"', block.split("dependencies")[1])
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").open()]
    assert len(pinned) >= 4
    assert set(pinned) <= {line.replace('"', "'") for line in lines}


def test_every_metric_is_explained():
    """docs/metrics.md has each tag that a script writes, and no other."""
    tags = set()
    for script in SCRIPTS:
        tags |= set(re.findall(r'"((?:charts|losses|rat|npg|kfac|ppo)/\w+)"', read(script)))
    explained = re.findall(r"`(\w+/\w+)`", (ROOT / "docs" / "metrics.md").read_text())
    assert tags == set(explained)


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1300
