"""Language models on texts of their own: what a rollout puts where, the buffers and schedules by hand, and the papers' claims."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny
from rows import ROWS, TEXT, as_text

import jkd
from jkd import console, data, losses, optim, targets
from jkd.config import Run
from jkd.errors import InputError
from jkd.losses.chunked.parts import ForwardKL, ReverseKL
from jkd.models.generate import generate
from jkd.prepare import make_prepare
from jkd.recipes import GKD, TAID, DistiLLM, Rollout, SeqKD
from jkd.recipes.bytoken import by_token
from jkd.recipes.onpolicy import sometimes
from jkd.recipes.rollouts import with_masks
from jkd.resolve import make_context
from jkd.schedules import Clock
from jkd.state import init_state
from jkd.types import Outputs


def run_of(recipe, **fields) -> Run:
    given = dict(student=small.student(kind=small.chain), teacher=small.teacher(kind=small.chain, width=6), augment=(as_text,))
    return tiny.run(**given | {"recipe": recipe} | fields)


def counting() -> small.Model:
    """After token n it says n + 1, up to the last."""
    model = small.chain(width=small.VOCAB, vocab=small.VOCAB)
    table = 50.0 * np.roll(np.eye(small.VOCAB), 1, axis=1)
    table[-1] = table[-2]
    return model.with_weights({"embed": {"kernel": 10 * np.eye(small.VOCAB)}, "head": {"kernel": table}}, {})


# --- rollouts ----------------------------------------------------------------------------------------------------------------


def test_responses_stand_behind_their_prompts():
    recipe = SeqKD(rollout=Rollout(prompt=4, length=3, end=5))
    rows = {
        "tokens": [
            [0, 1, 0, 0, 0, 0, 0, 0],
            [9, 1, 2, 0, 0, 0, 0, 0],
            [0, 0, 1, 1, 0, 0, 0, 0],
            [6, 6, 0, 1, 6, 6, 6, 6],
            [5, 4, 0, 1, 2, 3, 0, 0],
        ],
        "mask": [[1] * 8, [0] + [1] * 7, [1] * 5 + [0] * 3, [1] * 8, [1] * 8],
        "loss_mask": [[0, 0] + [1] * 6, [0, 0, 0] + [1] * 5, [0] * 5 + [1] * 3, [1] * 8, [0] * 6 + [1] * 2],
        "segment": [[3] * 8, [0] + [2] * 7, [1] * 5 + [0] * 3, [1, 1] + [2] * 6, [1] * 8],
    }
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in rows.items()}
    batch |= {"tokens": batch["tokens"] % small.VOCAB, "weight": jnp.ones(5), "index": jnp.arange(5)}
    ctx = make_context(
        tiny.run(recipe=recipe, student=counting(), teacher=counting(), batch_size=5), batch, devices=jax.devices()[:1]
    )
    prepare, ahead = make_prepare(ctx)
    assert ahead  # the teacher needs nothing of the student
    found = jax.device_get(prepare(*init_state(ctx, jax.random.key(0)), batch, 0))
    # prompts of 2, of 2 behind padding, of 4 (the most, and nothing is counted before), of the last document among the first 4, and
    # the end of a question of 6
    np.testing.assert_array_equal(
        found["tokens"],
        [
            [0, 1, 2, 3, 4, 0, 0, 0],
            [2, 1, 2, 3, 4, 5, 0, 0],
            [0, 0, 1, 1, 2, 3, 4, 0],
            [6, 6, 0, 1, 2, 3, 4, 0],
            [0, 1, 2, 3, 4, 5, 0, 0],
        ],
    )
    said = [[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0], *[[0, 0, 0, 0, 1, 1, 1, 0]] * 2, [0, 0, 0, 0, 1, 1, 0, 0]]
    said = np.array(said)
    prompt = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(found["loss_mask"], said)
    np.testing.assert_array_equal(found["mask"], said | np.pad(prompt, ((0, 0), (0, 4))))
    np.testing.assert_array_equal(found["segment"], found["mask"])
    np.testing.assert_array_equal(found["own"], np.ones(5))


def test_the_student_says_a_share_of_the_batches():
    batch = {"own": jnp.zeros(())}
    said = jax.vmap(lambda key, chance: sometimes(chance, key, lambda b: {"own": b["own"] + 1}, batch)["own"], (0, None))
    keys = jax.random.split(jax.random.key(0), 4000)
    for chance in (0.0, 0.3, 1.0):
        # a standard deviation is at most 0.008
        assert abs(float(said(keys, chance).mean()) - chance) < 0.03
    assert sometimes(0, keys[0], None, batch) is batch
    assert not make_prepare(
        make_context(run_of(GKD(rollout=Rollout(prompt=4, length=6))), tiny.batch(), devices=jax.devices()[:1])
    )[1]


def test_text_that_has_no_masks_may_be_said_anew():
    found = with_masks({"tokens": jnp.zeros((2, 5), jnp.int32)})
    assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in found.items() if name != "tokens"} == {
        "mask": ((2, 5), "uint8"),
        "loss_mask": ((2, 5), "uint8"),
        "own": ((2,), "float32"),
    }


# --- schedules and buffers ---------------------------------------------------------------------------------------------------


def test_taids_target_moves_as_the_paper_says():
    recipe = TAID(start=0.4)
    memory = recipe.init(None, None).memory

    @jax.jit
    def remember(memory, loss, step):
        return recipe.remember(memory, {}, {}, terms={"kd": loss}, clock=Clock(step, 100, 0.0), key=None)

    t, momentum, last, seen = 0.4, 0.0, None, []
    for step, loss in enumerate(2.0 * 0.97 ** np.arange(100)):
        memory = remember(memory, jnp.float32(loss), jnp.int32(step))
        if last is not None:
            momentum = 0.99 * momentum + 0.01 * (last - loss) / last
            t = t + 5e-4 / (1 + np.exp(-momentum)) * (1 - t)
        last, t = loss, min(1.0, max(0.4 + 0.6 * (step + 1) / 100, t))
        seen.append(float(memory["t"]))
        assert seen[-1] == pytest.approx(t, abs=1e-5)
    assert (np.diff(seen) > -1e-7).all()
    assert seen[-1] == 1


def test_taids_target_is_never_nearer_to_the_teacher_than_before():
    student, teacher = jax.random.normal(jax.random.key(0), (2, 50, 9)) * 3
    distance = [losses.forward_kl(student, targets.interpolate(student, teacher, t=t)) for t in np.linspace(0, 1, 6)]
    assert (np.diff(distance, axis=0) >= -1e-6).all()
    np.testing.assert_allclose(distance[0], 0, atol=1e-6)
    np.testing.assert_allclose(distance[-1], losses.forward_kl(student, teacher), rtol=1e-5)


def test_distillms_threshold_and_buffer():
    recipe = DistiLLM(capacity=5, look_every=2, rollout=Rollout(prompt=2, length=2))
    rows = {name: jnp.zeros((5, 3), jnp.int32) for name in ("tokens", "mask", "loss_mask")}
    look = {"sum": jnp.float32(0), "count": jnp.float32(0), "loss": jnp.float32(jnp.nan)}
    memory = {"rows": rows, "written": jnp.int32(0), "threshold": jnp.float32(0), "look": look}

    @jax.jit
    def remember(memory, batch, loss, step):
        return recipe.remember(memory, {}, batch, terms={"kd": loss}, clock=Clock(step, 99, 0.0), key=None)

    def step(number, loss, *, new, own):
        nonlocal memory
        batch = {name: jnp.full((4, 3), 10 * number + 1) + jnp.arange(4)[:, None] for name in rows}
        batch |= {"new": jnp.full(4, new), "own": jnp.full(4, own), "weight": jnp.array([1.0, 0, 1, 1])}
        memory = remember(memory, batch, jnp.float32(loss), jnp.int32(number))

    thresholds = []
    # means of two: 1.0 is what is known first; 1.05 is not worse enough; 1.2 is; then the bar is 1.2; own rows do not count
    for number, loss in enumerate([1.0, 1.0, 1.05, 1.05, 1.2, 1.2, 1.25, 1.25]):
        step(number, loss, new=0.0, own=0.0)
        thresholds.append(round(float(memory["threshold"]), 3))
    assert thresholds == [0, 0, 0, 0, 0, 0.1, 0.1, 0.1]
    assert memory["written"] == 0
    step(8, 9.0, new=1.0, own=1.0)
    np.testing.assert_array_equal(memory["rows"]["tokens"][:, 0], [81, 83, 84, 0, 0])  # the row without weight is left out
    step(9, 9.0, new=1.0, own=1.0)
    np.testing.assert_array_equal(memory["rows"]["tokens"][:, 0], [94, 83, 84, 91, 93])  # the oldest go first
    assert (memory["written"], float(memory["threshold"])) == (6, pytest.approx(0.1))
    with pytest.raises(InputError, match="DistiLLM.capacity = 8: must hold at least a batch"):
        make_context(run_of(DistiLLM(capacity=8, rollout=Rollout(prompt=4, length=6))), tiny.batch(), devices=jax.devices()[:1])


# --- what the papers claim ---------------------------------------------------------------------------------------------------


def test_reverse_kl_keeps_to_one_mode_and_forward_kl_covers_both():
    """A student that can only be one bump, a teacher of two: the student's entropy, and what the teacher thinks of its samples."""
    place = jnp.arange(24.0)
    teacher = jnp.logaddexp(-jnp.square(place - 6) / 4, -jnp.square(place - 17) / 4 - 0.2)

    def trained(divergence):
        def logits(params):
            return -jnp.square(place - params["middle"]) / 2 * jnp.exp(-2 * params["width"])

        def step(params, _):
            gradient = jax.grad(lambda p: divergence(logits(p)[None], teacher[None]).sum())(params)
            return jax.tree.map(lambda p, g: p - 0.02 * jnp.clip(g, -1, 1), params, gradient), None

        start = {"middle": jnp.float32(7), "width": jnp.float32(0.5)}
        log_q = jax.nn.log_softmax(logits(jax.lax.scan(step, start, None, length=1500)[0]))
        return -(jnp.exp(log_q) * log_q).sum(), (jnp.exp(log_q) * jax.nn.log_softmax(teacher)).sum()

    kinds = (losses.forward_kl, losses.reverse_kl, losses.skew_reverse_kl)
    (wide, unlikely), *others = jax.jit(lambda: [trained(kind) for kind in kinds])()
    for narrow, likely in others:  # 1.8 against 3.1 nats, and -2.4 against -4.7
        assert narrow < wide - 1
        assert likely > unlikely + 1.5


@pytest.mark.slow
def test_learning_on_its_own_text_mends_what_it_says_itself():
    """The data never leave tokens 0 to 3; the teacher does. KL(p || q) where the student's own text goes, after as many steps."""
    table = 6 * np.eye(small.VOCAB)[[4, 5, 6, 4, 5, 6, 0]] + np.random.default_rng(0).normal(size=(small.VOCAB, small.VOCAB))
    teacher = small.chain(width=small.VOCAB).with_weights(
        {"embed": {"kernel": 10 * np.eye(small.VOCAB, dtype=np.float32)}, "head": {"kernel": table.astype(np.float32)}}, {}
    )

    def narrow(batch, key):
        return {**batch, "tokens": batch["tokens"] % 4}

    def own_kl(share):
        recipe = GKD(share=share, divergence=ForwardKL(), rollout=Rollout(prompt=3, length=8))
        run = run_of(recipe, teacher=teacher, augment=(as_text, narrow), optimizer=optim.adamw(3e-2), steps=60)
        state = tiny.Engine(run).train(tiny.batches(60)).state
        model = small.student(kind=small.chain).with_weights(state.params["student"], {})
        said = generate(model, jnp.arange(256)[:, None] % 4, length=8, key=jax.random.key(1))
        both = [m.apply(m.params, {}, {"tokens": said.tokens})[0] for m in (model, teacher)]
        return float(by_token(ForwardKL(), *both).mean())

    written, own = own_kl(0.0), own_kl(1.0)
    assert own < 0.5 * written


# --- small things ------------------------------------------------------------------------------------------------------------


def test_by_token_takes_logits_too():
    student, teacher = (Outputs(jax.random.normal(jax.random.key(seed), (2, 3, 5))) for seed in (0, 1))
    found = by_token(ReverseKL(), student, teacher)
    np.testing.assert_allclose(found, losses.reverse_kl(student.logits, teacher.logits), rtol=1e-6)


MISTAKES = {
    "Rollout.prompt = 0": lambda: Rollout(prompt=0),
    "TAID.start = 2": lambda: TAID(start=2),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_recipe_that_cannot_be_is_refused(message):
    with pytest.raises(InputError, match=message):
        MISTAKES[message]()


def test_every_language_recipe_runs_on_text():
    wanted = {"AKL", "ABKD", "TAID", "SeqKD", "GKD", "DistiLLM", "MiniLLM"}
    assert wanted <= {name for name, row in ROWS.items() if row.run == TEXT["run"]}


def test_a_run_on_text_says_bits_per_byte_and_how_it_goes_on(tmp_path):
    texts = ["def f(x):\n    return x\n", "import os\n"] * 8
    text = data.documents(texts, eval=texts[:2], length=16, layout="pad")
    recipe = GKD(rollout=Rollout(prompt=4, length=8, end=text.tokenizer.end), share=1.0)
    model = tiny.weights(small.chain(vocab=text.tokenizer.size))
    shared = dict(data=text, student=small.chain(vocab=text.tokenizer.size), batch_size=8, optimizer=optim.adamw(1e-2))
    heard = []

    class Ear(jkd.loop.Listener):
        def run_finished(self, name, summary):
            heard.append(sorted(json.loads((tmp_path / name / "result.json").read_text())))

        def said(self, name, sample):
            heard.append((name, sample.prompt))

    found = jkd.train(Run(recipe=recipe, teacher=model, steps=2, **shared), tmp_path, listener=Ear())
    summary = found.summary["student"]
    predicted = [len(text.encode()) for text in texts[:2]]
    predicted[0] = 15  # cut to the row: 15 of its 16 tokens are predicted
    # a document of n bytes has n + 1 tokens, which share them evenly
    size = 15 * 23 / 24 + 10 * 10 / 11
    assert summary["bits_per_byte"] == pytest.approx(summary["nll"] * sum(predicted) / size / np.log(2), rel=1e-5)
    assert heard == [["details", "metrics", "summary"], ("student", texts[0][:8])]  # the run is done before it says a word
    result = json.loads((tmp_path / "student" / "result.json").read_text())
    assert result["sample"]["prompt"] == texts[0][:8]
    assert result["sample"].keys() == {"prompt", "text", "teacher"}
    assert isinstance(result["sample"]["teacher"], str)
    file = io.StringIO()
    console.table(found.summary, file=file)
    assert "bits/byte" in file.getvalue()
