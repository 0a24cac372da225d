"""Kills a training again and again, at random moments, and in other ways; nothing may be lost. python tests/soak.py --kills 20

Every process is real, trains `tests/programs/pod.py` and dies of SIGKILL, stops at SIGTERM, or finds a checkpoint damaged or the
disk full. After each, it must go on from the newest whole checkpoint; each time a training ends, its parameters, its average and
its count of the examples that it saw must have the bits of the training that nobody touched. It goes on until there were as many
kills as were asked for and three of each other fault. Prints a table; ``--write`` puts it into docs/pods.md. ``--seconds`` bounds it.

Processes are forked from one that has imported everything and touched no device: a start takes a second, not ten.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ |= {"JAX_PLATFORMS": "cpu", "PAUSE": "0.0002"}
KILLED, TERM, FULL = "SIGKILL", "SIGTERM", "disk full in every save of a process"
FLIPPED, CUT = "a bit of the newest checkpoint flipped", "a file of the newest checkpoint cut short"
OTHERS, EACH = (TERM, FLIPPED, CUT, FULL), 3
PAGE = HERE.parent / "docs" / "pods.md"


def train(workdir: Path, full: bool = False) -> None:
    """One process; leaves by `os._exit` with the command line's codes."""
    import jax
    import launch

    import jkd
    from jkd import configfile
    from jkd.loop import Stopped

    said = (workdir.parent / "said").open("a", buffering=1)

    class Say(jkd.Listener):
        def run_started(self, name, ctx, start):
            print("start", start, file=said)
            if full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))

        def message(self, text):
            with contextlib.suppress(OSError):  # full for these lines too
                print("message", text, file=said)

    try:
        left = jkd.train(configfile.load(launch.CONFIG)(), workdir, listener=Say())
        state = jax.device_get(left.state)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)  # there is room for what is said at the end
        digest = jkd.trees.sha256({"params": state.params, "ema": state.ema, "seen": state.memory.rows})
        print("digest", digest, file=said)
        os._exit(0)
    except Stopped:
        os._exit(75)
    except BaseException as error:
        with contextlib.suppress(OSError):
            print("error", type(error).__name__, error, file=said)
        os._exit(1)


class Soak:
    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng = folder, rng
        self.workdir, self.said, self.began = folder / "run", folder / "said", folder / "began"
        self.counts: collections.Counter = collections.Counter()
        self.untouched()  # compiles
        self.whole, self.whole_seconds = self.untouched()

    def fork(self, **options) -> int:
        self.said.unlink(missing_ok=True)
        time.sleep(0.02)  # a tick of the file system's clock, so that what was there before is older
        self.began.touch()
        pid = os.fork()
        if pid == 0:
            try:
                train(self.workdir, **options)
            finally:  # nothing of the parent's is this process's to clean up
                os._exit(1)
        return pid

    def end(self, pid: int, seconds: float = 240) -> int:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        raise SystemExit(f"soak: a process hung: {self.told()}")

    def told(self, word: str = "") -> list[str]:
        lines = self.said.read_text().splitlines() if self.said.exists() else []
        return [line.removeprefix(word).strip() for line in lines if line.startswith(word)]

    def untouched(self) -> tuple[str, float]:
        start = time.monotonic()
        self.check(self.end(self.fork()) == 0, "the untouched training failed")
        (digest,) = self.told("digest")
        shutil.rmtree(self.workdir)
        took = time.monotonic() - start
        print(f"soak: a training takes {took:.1f} s", file=sys.stderr, flush=True)
        return digest, took

    def check(self, good: bool, what: str) -> None:
        if not good:
            raise SystemExit(f"soak: LOST: {what}: {self.told()}")

    def fault(self, kind: str) -> None:
        """One process that goes on from what is there, and what happens to it."""
        good = self.good()
        there = sorted(good)
        damaged = kind in (FLIPPED, CUT) and len(there) > 1
        if damaged:
            self.damage(good[there[-1]], kind)
        pid, moment = self.fork(full=kind == FULL), self.rng.uniform(0.02, 0.6) * self.whole_seconds
        if kind in (KILLED, TERM):
            if kind == TERM or self.rng.random() < 0.8:  # else while it starts, perhaps
                while not self.told("start") and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    time.sleep(0.005)
            time.sleep(moment)
            os.kill(pid, {KILLED: signal.SIGKILL, TERM: signal.SIGTERM}[kind])
        code = self.end(pid)
        started = [int(step) for step in self.told("start")]
        if started:
            wanted = (there[-2] if damaged else there[-1]) if there else 0
            self.check(started[0] == wanted, f"{kind}: began at {started[0]}, not at {wanted}")
        if damaged:
            self.check(any("checksum" in line or "bytes" in line for line in self.told("message")), "the damage was not told")
        self.name(kind, code, damaged)
        digests = self.told("digest")
        if digests:
            self.check(digests == [self.whole], f"{kind}: other bits at the end")
            self.counts["trainings that ended with the same bits"] += 1
            shutil.rmtree(self.workdir)

    def name(self, kind: str, code: int, damaged: bool) -> None:
        if kind == KILLED and code == -signal.SIGKILL:
            began = self.began.stat().st_mtime_ns  # an older folder may be what an earlier kill left unfinished
            folders = (self.workdir / "student" / "checkpoints").glob("*")
            saving = any(path.stat().st_ctime_ns >= began and not list(path.glob("manifest-*")) for path in folders)
            when = "during a save" if saving else "while training" if self.told("start") else "while starting"
            self.counts[f"SIGKILL {when}"] += 1
        elif kind == TERM and code in (75, -signal.SIGTERM):
            self.counts[TERM if code == 75 else f"{TERM} before the training began"] += 1
        elif code != 0 and kind != FULL:  # which cannot write its result either
            self.check(False, f"{kind}: exit code {code}")
        elif damaged or any("could not be written" in line for line in self.told("message")):
            self.counts[kind] += 1

    def kills(self) -> int:
        return sum(count for name, count in self.counts.items() if name.startswith(KILLED))

    def draw(self, kills: int) -> str:
        """What comes next: kinds that have not come often enough yet, and kills, which leave checkpoints behind."""
        lacking = [kind for kind in OTHERS if self.counts[kind] < EACH]
        kind = self.rng.choice(lacking or OTHERS) if self.rng.random() < (0.35 if self.kills() < kills else 0.7) else KILLED
        return KILLED if kind in (FLIPPED, CUT) and len(self.good()) < 2 else kind

    def good(self) -> dict[int, Path]:
        """Finished checkpoints that were not damaged here; the last attempt of each step."""
        found = {}
        for place in sorted((self.workdir / "student" / "checkpoints").glob("*"), key=lambda place: float(place.name)):
            if (place / "manifest-0-of-1.json").exists() and not (place / "damaged").exists():
                found[int(place.name.partition(".")[0])] = place
        return found

    def damage(self, place: Path, kind: str) -> None:
        path = self.rng.choice([path for path in sorted(place.rglob("*")) if path.is_file() and path.stat().st_size])
        (place / "damaged").touch()  # for `good`; no manifest lists it
        content = bytearray(path.read_bytes())
        if kind == FLIPPED:
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        else:
            del content[self.rng.randrange(len(content)) :]
        path.write_bytes(content)


def soak(kills: int, seconds: float, seed: int) -> collections.Counter:
    """``{fault: times}``; ends with an error where something is lost."""
    folder, until = Path(tempfile.mkdtemp(prefix="soak-")), time.monotonic() + seconds
    # programs are compiled by the first process alone; jax reads this when it is imported
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    import jkd.evaluate
    import jkd.loop  # noqa: F401  (before the first fork)
    from jkd import data, models, optim, recipes  # noqa: F401

    try:
        made = Soak(folder, random.Random(seed))
        while made.kills() < kills or min(made.counts[kind] for kind in OTHERS) < EACH:
            if time.monotonic() > until:
                raise SystemExit(f"soak: {dict(made.counts)} in {seconds:.0f} s: too slow a machine for {kills} kills")
            made.fault(made.draw(kills))
            print(f"soak: {until - time.monotonic():.0f} s left, {dict(made.counts)}", file=sys.stderr, flush=True)
        os.environ["PAUSE"] = "0"
        for _ in range(3):  # the last training too must end well
            if made.workdir.exists():
                made.fault("end")
        return made.counts
    finally:
        shutil.rmtree(folder)


def table(counts: collections.Counter) -> str:
    rows = "\n".join(f"| {name} | {count} | 0 |" for name, count in sorted(counts.items()) if not name.startswith("trainings"))
    ended = counts["trainings that ended with the same bits"]
    text = f"{ended} trainings went through these; all ended with the bits of one that nobody touched."
    return f"| fault | times | lost |\n|---|---|---|\n{rows}\n\n{text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--write", action="store_true", help="put the table into docs/pods.md")
    given = parser.parse_args()
    print(f"soak: seed {given.seed}", flush=True)
    made = table(soak(given.kills, given.seconds, given.seed))
    print(made)
    if given.write:
        before, rest = PAGE.read_text(encoding="utf-8").split("<!-- soak -->\n")
        after = rest.partition("<!-- /soak -->\n")[2]
        PAGE.write_text(f"{before}<!-- soak -->\n{made}\n<!-- /soak -->\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
