"""Copy functions and classes of one script into all scripts that have one of the same name.

Run: python tests/sync_copies.py gae rat_continuous.py    one name, or several
     python tests/sync_copies.py rat_continuous.py        all its names

The scripts never import each other: what they share is repeated word for word, and
tests/test_house.py holds that. A script's own versions, listed here, are left alone.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN = {"Args", "main", "ALGORITHM"}  # of every script
# Names whose source is a script's own, and why; scripts with the same reason share the source.
PROCESSES = "averages over torchrun's processes"
DIFFERS = {
    "acktr": {
        "Actor": "with --shared it has a value head on its trunk",
        "Agent": "with --shared its critic is on the actor's trunk",
    },
    "npg_cg": {},
    "npg_rank1": {},
    "rat_continuous": {
        "gather_samples": PROCESSES,
        "fit_critic": PROCESSES,
    },
    "rat_procgen": {
        "Actor": "IMPALA's network and discrete actions",
        "Agent": "as Actor, and its observations are not normalised",
        "Rollout": "images; no step only resets",
        "collect": "as Rollout",
        "Samples": "images, not normalised",
        "gather_samples": "as Rollout and Samples",
        "fit_critic": PROCESSES,
        "LayerScores": "of one parameter, since a convolution's bias has another input",
        "product": "as LayerScores",
        "transposed_product": "as LayerScores",
        "tape_scores": "a chunk of samples at a time, of convolutions too",
        "check_tape": "takes convolutions",
        "block_scores": "there is no --jacobian vmap",
        "RULES": "PPO's step too",
    },
    "rat_shared": {
        "Agent": "one trunk for policy and value, Discrete actions too",
        "check_spaces": "Discrete actions too",
        "check_tape": "there is no --jacobian vmap to point to",
        "RULES": "the published KL bounds are others with one trunk",
    },
    "sophia_ppo": {
        "Actor": "with --shared it has a value head on its trunk",
        "Agent": "with --shared its critic is on the actor's trunk",
    },
}
SCRIPTS = sorted(DIFFERS)  # a fork beside them is left alone


def spans(source):
    """Top-level functions, classes and assigned names: name to (first line, last line), from 1."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = (first, node.end_lineno)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = (node.lineno, node.end_lineno)
    return found


def definitions(script):
    """The same names with their source text."""
    source = (ROOT / f"{script}.py").read_text()
    lines = source.splitlines()
    return {name: "\n".join(lines[a - 1 : b]) for name, (a, b) in spans(source).items()}


def shared_by(name, script):
    """The scripts whose definition of name must be that of this one."""
    if name in OWN:
        return [script]
    return [other for other in SCRIPTS if DIFFERS[other].get(name) == DIFFERS[script].get(name)]


def sync(name, script):
    """Write the script's definition of name into the others; the scripts that changed."""
    text = definitions(script)[name]
    changed = []
    for other in shared_by(name, script):
        path = ROOT / f"{other}.py"
        source = path.read_text()
        span = spans(source).get(name)
        if span is None:
            continue
        lines = source.splitlines()
        lines[span[0] - 1 : span[1]] = text.splitlines()
        new = "\n".join(lines) + "\n"
        if new != source:
            path.write_text(new)
            changed.append(other)
    return changed


def main(arguments):
    """Copy the names given, or all, of the script given last."""
    script = Path(arguments[-1] if arguments else "").stem
    if script not in SCRIPTS:
        raise SystemExit("usage: python tests/sync_copies.py [NAME ...] SCRIPT.py")
    here = definitions(script)
    for name in arguments[:-1] or here:
        if name not in here or len(shared_by(name, script)) == 1:
            if arguments[:-1]:
                raise SystemExit(f"{name} is no shared name of {script}.py")
            continue
        changed = sync(name, script)
        if changed:
            print(f"{name}: {', '.join(changed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
