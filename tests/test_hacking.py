"""The teacher-hacking monitor: when it speaks, and a run whose student goes past the oracle on its way to the teacher."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import tiny
from etils import epath

import jkd
from jkd import data, describe, models, optim, plan, replay, schedules, trees
from jkd.bench import measure
from jkd.config import Experiment, Run, dependencies
from jkd.errors import InputError
from jkd.hacking import Watch
from jkd.loop import Listener
from jkd.recipes import KD, Supervised
from jkd.resolve import make_context

CLASSES, MAIN, OWN = 4, 6, 6


def test_it_speaks_once_where_the_one_falls_and_the_other_rises():
    watch = Watch()
    seen = [(1.0, 1.0), (0.5, 0.4), (0.4, 0.41), (0.3, 0.5), (0.2, 0.9)]
    told = [watch.see(step, {"kl": kl, "oracle_kl": oracle}) for step, (kl, oracle) in enumerate(seen)]
    assert [one is not None for one in told] == [False, False, False, True, False]  # 0.41 is within the noise
    assert "since step 1 " in told[3]
    assert "(KL 0.4 to 0.5)" in told[3]
    for restart in range(5):  # from a checkpoint it goes on as if nothing had been
        watch, again = Watch(), []
        for step, (kl, oracle) in enumerate(seen):
            if step == restart:
                watch = Watch(json.loads(json.dumps(watch.state)))
            again.append(watch.see(step, {"kl": kl, "oracle_kl": oracle}))
        assert again == told
    both_rise = Watch()  # the student forgets: that is no hacking
    assert not any(both_rise.see(i, {"kl": 1.0 + i, "oracle_kl": 1.0 + i}) for i in range(4))
    assert Watch().see(0, {"kl": 1.0}) is None


def linear(kernel: np.ndarray, name: str) -> jkd.Model:
    config = models.mlp.Config(features=len(kernel), hidden=(), classes=CLASSES)
    model = config.build()
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), model.params)
    (path,) = [path for path, leaf in trees.flatten(params).items() if leaf.ndim == 2]
    return model.with_weights(trees.unflatten(trees.flatten(params) | {path: kernel.astype(np.float32)}), {})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The teacher knows what the oracle knows, of the large features, and has mistakes of its own in the small ones, which are
    learned later."""
    rng = np.random.default_rng(0)
    kernel = np.zeros((MAIN + OWN, CLASSES))
    kernel[:MAIN] = rng.normal(size=(MAIN, CLASSES))
    mistaken = kernel.copy()
    mistaken[MAIN:] = 6 * rng.normal(size=(OWN, CLASSES))
    scale = np.array([1.0] * MAIN + [0.2] * OWN)
    image = (rng.normal(size=(512, MAIN + OWN)) * scale).astype(np.float32).reshape(-1, 1, 1, MAIN + OWN)
    label = rng.integers(0, CLASSES, 512).astype(np.int32)
    run = Run(
        student=linear(0 * kernel, "student"),
        teacher=linear(mistaken, "teacher"),
        oracle=linear(kernel, "oracle"),
        recipe=KD(temperature=1.0, weight=1.0, task_weight=0.0),
        data=data.arrays(image=image[:384], label=label[:384], eval=dict(image=image[384:], label=label[384:])),
        optimizer=optim.sgd(1.0, momentum=0.0),
        batch_size=64,
        steps=300,
        evaluate_every=20,
    )
    heard: dict[str, list] = {"evaluated": [], "message": []}

    class Ear(Listener):
        def evaluated(self, name, step, values):
            heard["evaluated"].append((values["kl"], values["oracle_kl"], values["oracle_agreement"]))

        def message(self, text):
            heard["message"].append(text)

    folder = tmp_path_factory.mktemp("hacking")
    found = jkd.train(run, folder, listener=Ear())
    return found, np.array(heard["evaluated"]), heard["message"], folder


def test_proxy_falls_while_golden_rises_and_the_run_says_so(trained):
    found, heard, messages, folder = trained
    proxy, golden = heard[:, 0], heard[:, 1]
    assert (np.diff(proxy) < 1e-4).all()
    lowest = golden.argmin()
    assert 0 <= lowest < len(golden) // 2
    assert golden[-1] > 1.2 * golden[lowest]
    (message,) = [one for one in messages if "teacher hacking" in one]
    assert message.startswith(f"student: teacher hacking: since step {20 * (lowest + 1)} ")
    assert found.summary["student"]["oracle_kl"] == pytest.approx(golden[-1])
    result = json.loads((folder / "student" / "result.json").read_text())
    assert result["metrics"]["oracle_kl"] == pytest.approx(golden[-1])
    assert 0 <= result["metrics"]["oracle_agreement"] <= 1


def function(answer, name: str) -> jkd.Model:
    """A network of a prompt's main features that has nothing to learn."""
    return models.from_function(
        lambda _, image: answer(image.reshape(len(image), -1)[:, :MAIN]), {"none": np.zeros(1)}, name=name
    )


@pytest.mark.parametrize("offline", [True, False])
def test_few_prompts_are_learned_by_heart_with_the_teachers_mistakes_and_new_ones_are_not(offline):
    """The paper's finding in small: the teacher errs at each prompt in its own way, which nobody can foresee at another one, but a
    student of more features than prompts can remember. As many steps on 64 prompts or on new ones, both looked at on those 64."""
    prompts, own, steps = 64, 200, 300
    rng = np.random.default_rng(0)
    kernel, wild = rng.normal(size=(2, MAIN, CLASSES)).astype(np.float32)
    scale = np.array([1.0] * MAIN + [0.2] * own, np.float32)
    image = rng.normal(size=(prompts * steps, 1, 1, MAIN + own)).astype(np.float32) * scale
    run = Run(
        student=linear(np.zeros((MAIN + own, CLASSES)), "student"),
        teacher=function(lambda x: x @ kernel + 3 * jax.numpy.cos(40 * x @ wild), "teacher"),
        oracle=function(lambda x: x @ kernel, "oracle"),
        recipe=KD(temperature=1.0, weight=1.0, task_weight=0.0),
        data=data.arrays(image=image[:prompts] if offline else image, eval=dict(image=image[:prompts])),
        optimizer=optim.sgd(schedules.WarmupCosine(0.3), momentum=0.0),
        batch_size=prompts,
        steps=steps,
        evaluate_every=100,
    )
    seen, messages = [], []

    class Ear(Listener):
        def evaluated(self, name, step, values):
            seen.append((values["kl"], values["oracle_kl"]))

        def message(self, text):
            messages.append(text)

    jkd.train(run, listener=Ear())
    proxy, golden = np.array(seen).T
    if offline:
        assert proxy[-1] < 0.8 * proxy[0]
        assert golden[-1] > 1.2 * golden.min()
    else:
        assert golden[-1] < 1.05 * golden.min() < golden[0]
    assert any("teacher hacking" in message for message in messages) == offline


def test_an_oracle_is_named_like_a_teacher_and_must_hold_weights():
    config = models.mlp.Config(features=64, classes=10)
    shared = dict(student=config, recipe=KD(), optimizer=optim.sgd(0.1), steps=1, data=data.digits())
    node = Run(teacher="teacher", oracle="oracle", **shared)
    assert dependencies(node) == ("teacher", "oracle")
    with pytest.raises(InputError, match="no earlier node is called 'oracle'"):
        Experiment(teacher=Run(**shared), student=node)
    with pytest.raises(InputError, match="oracle .* holds no weights"):
        jkd.train(Run(teacher=tiny.weights(config.build()), oracle=config, **shared))


def test_an_oracle_by_name_is_found_wherever_a_run_is_resolved(tmp_path):
    """Training looks names up; so must whatever looks at a run before it is trained, or at what it left."""
    config = models.mlp.Config(features=64, hidden=(4,), classes=10)
    shared = dict(student=config, optimizer=optim.sgd(0.1), steps=2, data=data.digits(), batch_size=32)
    experiment = Experiment(
        oracle=Run(recipe=Supervised(), **shared),
        teacher=Run(recipe=Supervised(), **shared | dict(seed=1)),
        student=Run(teacher="teacher", oracle="oracle", recipe=KD(), **shared | dict(seed=2)),
    )
    make_context(plan.pick(experiment, "student")[1])
    assert set(measure.runs_of(experiment)) == {"oracle", "teacher", "student"}
    make_context(measure.runs_of(experiment, "student")["student"])
    assert "params oracle (frozen)" in describe.describe(experiment)
    trained = jkd.train(experiment, tmp_path).summary["student"]
    again = replay.evaluate(experiment, epath.Path(tmp_path), pytest.fail)["student"]
    assert again["oracle_kl"] == pytest.approx(trained["oracle_kl"], rel=1e-5)
