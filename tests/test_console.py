"""What a person sees: the bar on a terminal alone, tables, and what ran out of memory."""

import io
import re

import jax
import pytest
import tiny

from jkd import commands, console, devices
from jkd.resolve import make_context


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_step_loss_rate_and_time_left_on_a_terminal_alone(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    ctx = make_context(tiny.run(steps=10), tiny.batch())
    written = []
    for file in (Terminal(), io.StringIO()):
        watch = console.Watch(file)
        watch.run_started("student", ctx, 0)
        watch.stepped("student", 5, 10, {"loss": 0.5}, 1234.0)
        watch.stepped("student", 10, 10, {"loss": 0.25}, 1234.0)
        watch.message("a [bracket] stays")
        watch.close()
        written.append(file.getvalue())
    bar, quiet = written
    for text in ("student", "10/10", "loss 0.2500", "1,234 examples/s", "0:00:00", "a [bracket] stays"):
        assert text in bar, text
    assert quiet == "a [bracket] stays\n"


def test_the_table_has_a_dash_for_what_there_is_not():
    file = io.StringIO()
    summary = dict(parameters=12345, accuracy=0.98765, nll=1.0, ece=None, agreement=None, examples_per_s=None)
    console.table({"teacher": summary}, file=file)
    assert re.search(r"teacher +12,345 +0\.9877 +1\.0000 +- +- +-", file.getvalue())


def test_statistics_leave_out_what_has_no_number_everywhere():
    runs = [{"a": {"x": 1.0, "y": None, "sha": "z"}}, {"a": {"x": 3.0, "y": 1.0, "sha": "z"}}]
    assert console.statistics(runs) == {"a": {"x": {"mean": 2.0, "std": pytest.approx(2**0.5)}}}
    assert console.statistics(runs[:1]) == {"a": {"x": {"mean": 1.0, "std": 0.0}}}


def test_out_of_memory_names_the_largest_parts_and_what_to_try():
    watch = console.Watch(io.StringIO())
    watch.run_started("student", make_context(tiny.run(), tiny.batch()), 0)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.numpy.zeros(2**60)
    assert devices.out_of_memory(error.value)
    line = commands._out_of_memory(error.value, watch)
    assert line.startswith("out of device memory in student (4611686018427387904 bytes more were wanted); largest parts")
    assert re.search(
        r"on each device: \w.* MiB, .* MiB, .* MiB; largest buffers of a step: f32\[\d[\d, ]*\] [\d.]+ MiB of \S+", line
    )
    assert line.endswith(
        "try batch_size below 32, microbatches above 1, remat, mesh=MeshShape(fsdp=…), teacher_dtype='bfloat16'"
    )
    assert not devices.out_of_memory(ValueError("RESOURCE_EXHAUSTED"))
