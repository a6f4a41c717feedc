"""enjoy.py on a real checkpoint: what it prints, records and refuses."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, train

import enjoy

KEYS = (
    "env_id algorithm global_step episodes deterministic return_mean return_std length_mean length_std returns lengths"
)


def run(*args, **env):
    """enjoy.py in a process of its own."""
    command = [sys.executable, ROOT / "enjoy.py", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env, timeout=120)


def play(*args):
    """What enjoy.py prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        enjoy.main(tyro.cli(enjoy.Args, args=[str(arg) for arg in args]))
    return output.getvalue()


def check_refusal(code, out, err, message):
    assert (code, out) == (2, "")
    assert re.fullmatch(r"enjoy: [^\n]+\.\n", err), err
    assert message in err


@pytest.fixture
def refuse(capfd):
    def refuse(message, *args):
        with pytest.raises(SystemExit) as end:
            enjoy.main(tyro.cli(enjoy.Args, args=[str(arg) for arg in args]))
        check_refusal(end.value.code, *capfd.readouterr(), message)

    capfd.readouterr()
    return refuse


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    size = ["--total-timesteps", 512, "--num-envs", 4, "--num-steps", 32, "--num-minibatches", 4]
    out = ["--output-dir", tmp_path_factory.mktemp("runs"), "--run-name", "tiny"]
    train("rat_continuous", "--env-id", "InvertedPendulum-v5", *size, *out)
    return out[1] / "tiny" / "checkpoint.pt"


@pytest.fixture(scope="module")
def result(checkpoint):
    return json.loads(play(checkpoint, "--episodes", 3, "--json"))


def test_json_is_consistent_and_repeats(checkpoint, result):
    assert list(result) == KEYS.split()
    assert (result["env_id"], result["algorithm"]) == ("InvertedPendulum-v5", "rat_continuous")
    assert (result["global_step"], result["episodes"], result["deterministic"]) == (512, 3, True)
    for name in ("return", "length"):
        values = result[f"{name}s"]
        assert len(values) == 3
        assert result[f"{name}_mean"] == pytest.approx(sum(values) / 3)
        assert result[f"{name}_std"] == pytest.approx((sum((v - sum(values) / 3) ** 2 for v in values) / 3) ** 0.5)
    assert len(set(result["returns"])) > 1  # one seed, but not one episode played three times
    assert json.loads(play(checkpoint, "--episodes", 3, "--json")) == result


def test_stochastic_differs_and_repeats(checkpoint, result):
    first, second = (json.loads(play(checkpoint, "--episodes", 3, "--json", "--stochastic")) for _ in range(2))
    assert first == second
    assert not first["deterministic"]
    assert first["returns"] != result["returns"]


def test_line(checkpoint, result):
    scores = [f"{name} {result[f'{name}_mean']:.1f} ± {result[f'{name}_std']:.1f}" for name in ("return", "length")]
    done = run(checkpoint, "--episodes", 3)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"InvertedPendulum-v5, 3 episodes: {', '.join(scores)}\n"


def test_returns_equal_a_loop_written_out(checkpoint, result):
    weights = torch.load(checkpoint, weights_only=True)["agent"]
    env = gym.make("InvertedPendulum-v5")
    low, high = (torch.from_numpy(bound) for bound in (env.action_space.low, env.action_space.high))
    returns, lengths = [], []
    for seed in (1, None, None):
        obs, rewards, done = env.reset(seed=seed)[0], [], False
        while not done:
            x = torch.from_numpy(obs).float() - weights["normalizer.mean"]
            x = (x / (weights["normalizer.var"] + 1e-5) ** 0.5).clip(-5, 5).float()
            for layer in (0, 2):
                x = (weights[f"actor.mean.{layer}.weight"] @ x + weights[f"actor.mean.{layer}.bias"]).relu()
            mean = weights["actor.mean.4.weight"] @ x + weights["actor.mean.4.bias"]
            action = low + (mean.tanh() + 1) / 2 * (high - low)
            obs, reward, terminated, truncated, _ = env.step(action.numpy())
            rewards.append(float(reward))
            done = terminated or truncated
        returns.append(sum(rewards))
        lengths.append(len(rewards))
    assert (result["returns"], result["lengths"]) == (pytest.approx(returns), lengths)


def test_video_holds_every_frame_and_leaves_the_play_as_it_was(checkpoint, result, tmp_path):
    video = tmp_path / "out.mp4"
    done = run(checkpoint, "--episodes", 3, "--json", "--video", video)
    assert (done.returncode, done.stderr, json.loads(done.stdout)) == (0, "", result)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    with imageio.get_reader(video) as reader:
        frames, fps = [*iter(reader)], reader.get_meta_data()["fps"]
    assert (len(frames), frames[0].shape, fps) == (sum(result["lengths"]) + 3, (480, 480, 3), 25)
    assert frames[0].std() > 5  # a picture
    last = result["lengths"][0]  # of the first episode; the pole has fallen over since frame 0
    assert np.abs(frames[last].astype(int) - frames[0]).max() > 40


def test_odd_frames_lose_a_row_and_a_column(tmp_path):
    class Env:
        metadata = {}  # noqa: RUF012

        def render(self):
            return np.full((33, 51, 3), 200, dtype=np.uint8)

    with enjoy.recorder(Env(), tmp_path / "odd.mp4") as record:
        record()
        record()
    assert [frame.shape for frame in imageio.get_reader(tmp_path / "odd.mp4")] == [(32, 50, 3)] * 2


def test_interrupted_video_leaves_nothing(tmp_path):
    class Env:
        metadata = {"render_fps": 20}  # noqa: RUF012

        def render(self):
            return np.zeros((32, 32, 3), dtype=np.uint8)

    with pytest.raises(KeyboardInterrupt), enjoy.recorder(Env(), tmp_path / "out.mp4") as record:
        record()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


ALTERED = {
    "none of ours": (lambda state: state.pop("algorithm"), "no checkpoint"),
    "a tensor": (lambda state: torch.zeros(3), "no checkpoint"),
    "no env_id": (lambda state: state["args"].pop("env_id"), "no checkpoint"),
    "unknown algorithm": (lambda state: state.update(algorithm="sac"), "'sac'"),
    "algorithm elsewhere": (lambda state: state.update(algorithm="tests/test_enjoy"), "'tests/test_enjoy'"),
    "algorithm without Agent": (lambda state: state.update(algorithm="enjoy"), "does not fit"),
    "unknown environment": (lambda state: state["args"].update(env_id="Nowhere-v0"), "Nowhere"),
    "other environment": (lambda state: state["args"].update(env_id="Hopper-v5"), "does not fit"),
    "other action space": (lambda state: state["args"].update(env_id="CartPole-v1"), "does not fit"),
    "missing weight": (lambda state: state["agent"].pop("actor.mean.0.bias"), "does not fit"),
}


@pytest.mark.parametrize("case", ALTERED)
def test_refuses_altered_checkpoint(checkpoint, tmp_path, refuse, case):
    state, (alter, message) = torch.load(checkpoint, weights_only=True), ALTERED[case]
    altered = alter(state)
    torch.save(altered if case == "a tensor" else state, tmp_path / "altered.pt")
    refuse(message, tmp_path / "altered.pt")


def test_refuses_missing_or_damaged_file(checkpoint, tmp_path, refuse):
    (tmp_path / "half.pt").write_bytes(checkpoint.read_bytes()[:100_000])
    (tmp_path / "text.pt").write_text("hello")
    refuse("missing", tmp_path / "none.pt")
    for name in ("half.pt", "text.pt", ""):
        refuse("damaged", tmp_path / name)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--episodes", 0), "--episodes 0"),
        (("--seed", -1), "--seed -1"),
        (("--seed", 2**63), f"--seed {2**63}"),
        (("--video", "out.gif"), "out.gif"),
    ],
)
def test_refuses_argument(checkpoint, tmp_path, monkeypatch, refuse, args, message):
    monkeypatch.chdir(tmp_path)
    refuse(message, checkpoint, *args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"), [("no/out.mp4", "No such file or directory"), ("folder.mp4", "directory")]
)
def test_refuses_unwritable_video(checkpoint, tmp_path, name, message):
    (tmp_path / "folder.mp4").mkdir()
    done = run(checkpoint, "--episodes", 1, "--video", tmp_path / name)
    check_refusal(done.returncode, done.stdout, done.stderr, message)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]


def test_says_what_to_install_when_rendering_fails(checkpoint, tmp_path):
    done = run(checkpoint, "--video", tmp_path / "out.mp4", MUJOCO_GL="nonsense")
    check_refusal(done.returncode, done.stdout, done.stderr, "libegl1")
    assert not list(tmp_path.iterdir())
