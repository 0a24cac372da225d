"""The persistent compilation cache of the command line: a second process finds what the first compiled; a library sets nothing."""

import os
import subprocess
import sys

SCRIPT = """
import sys
from jkd import programcache
import jkd, jax
assert jax.config.jax_compilation_cache_dir == sys.argv[1] or sys.argv[1] == "None", "the library sets nothing"
folder = programcache.start()
from jkd.bench.compiling import listening
with listening() as heard:
    jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))).block_until_ready()
kept = jax.config.jax_persistent_cache_min_compile_time_secs
print(folder, jax.config.jax_compilation_cache_max_size, heard.hits > 0, kept)
"""


def run(tmp_path, **environment):
    names = {"JAX_ENABLE_COMPILATION_CACHE": "true"}
    inherited = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XDG_CACHE_HOME": str(tmp_path / "home")}
    expected = environment.get("JAX_COMPILATION_CACHE_DIR", "None")
    command = [sys.executable, "-c", SCRIPT, expected]
    done = subprocess.run(command, env=inherited | names | environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_second_process_reads_what_the_first_compiled(tmp_path):
    folder = tmp_path / "home" / "jkd" / "xla"
    everything = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert run(tmp_path, **everything) == [str(folder), str(2 * 2**30), "False", "0.0"]
    assert any(folder.iterdir())
    assert run(tmp_path, **everything) == [str(folder), str(2 * 2**30), "True", "0.0"]


def test_a_folder_of_the_users_own_is_left_as_it_is_and_off_is_off(tmp_path):
    own = str(tmp_path / "own")
    # no bound, which would drop others' programs; but what is worth keeping is ours to say
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=own) == ["None", "-1", "False", "0.1"]
    assert run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")[::2] == ["None", "False"]
    assert not (tmp_path / "home").exists()
