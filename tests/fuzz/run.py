"""Fuzz what comes in: `make fuzz`, or `python tests/fuzz/run.py --count 2000 --seed 0`.

Each input must end in a result, a named skip or one sentence, in 10 s of the processor and 1 GiB,
with no code run and no file written.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SECONDS, MEMORY = 10, 2**30
LONGEST = 1000  # characters of a sentence


class Watch:
    """What an input must not do: events of the interpreter while `active`."""

    WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    RUNNING = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "ctypes.dlopen")

    def __init__(self) -> None:
        self.active, self.seen = False, list[str]()
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: Any) -> None:
        if not self.active:
            return
        if event == "open":
            path, mode, flags = arguments
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & self.WRITING):
                self.seen.append(f"opened {path} for writing")
        elif event in self.RUNNING or event in ("os.remove", "os.rename", "os.mkdir", "shutil.rmtree"):
            self.seen.append(event)


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def read_images(path: Path, channels: int) -> str:
    from maefast.train.data.open import open_images

    data = open_images(path, channels=channels)
    for i in range(min(len(data), 8)):
        data.try_read(i, (8, 8))
        data.try_read(i)
    for error in data.skipped.values():
        check_sentence(str(error))
    return "skipped by name" if data.skipped else "read"


def load_checkpoint(path: Path, model: Any, state: dict[str, Any]) -> str:
    import torch

    from maefast import checkpoint

    model.load_state_dict(state)
    try:
        checkpoint.load(model, path)
    except Exception:
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()), "the model was changed"
        raise
    return "loaded"


def check_sentence(text: str) -> None:
    is_one = 0 < len(text) < LONGEST and "\n" not in text and " at 0x" not in text
    assert is_one, f"no clear sentence: {text[:LONGEST]!r}"


def work(seed: int, count: int, skip: int) -> None:
    """Print a line for each input: its number, its name as it starts, then what became of it."""
    import torch
    from fuzz.mutations import cases
    from fuzz.originals import originals, small_mae

    from maefast.checkpoint import MissingPackageError
    from maefast.train.errors import UserError

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sound, watch, model = originals(), Watch(), small_mae()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for original in sound.values():  # what is imported late is imported before anything is watched
        attempt(original, model, state, watch, (UserError,))
    watch.seen.clear()
    for number, (name, case) in enumerate(cases(sound, seed, count)):
        if number >= skip:
            print(f"start {number} {name}", flush=True)
            errors = (UserError,) if case.kind == "images" else (ValueError, OSError, MissingPackageError)
            print(f"end {number} {attempt(case, model, state, watch, errors)}", flush=True)


def attempt(case: Any, model: Any, state: dict[str, Any], watch: Watch, errors: tuple[type[Exception], ...]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, content in case.files.items():
            Path("data", name).parent.mkdir(parents=True, exist_ok=True)
            Path("data", name).write_bytes(content)
        before, path = sorted(Path().rglob("*")), Path("data", case.opened)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        held, started = status("VmRSS"), time.process_time()
        watch.active = True
        try:
            is_data = case.kind == "images"
            result = read_images(path, case.channels) if is_data else load_checkpoint(path, model, state)
        except errors as error:
            try:
                check_sentence(str(error))
                result = "one sentence"
            except AssertionError as unclear:
                result = f"FAULT {unclear}"
        except BaseException as error:
            result = f"FAULT {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        watch.active = False
        seconds, memory = time.process_time() - started, status("VmHWM") - held
        if watch.seen or sorted(Path().rglob("*")) != before:
            result = f"FAULT {watch.seen or 'a file was written'}"
        watch.seen.clear()
        if seconds > SECONDS or memory > MEMORY:
            result = f"FAULT {seconds:.1f} s, {memory / 2**20:.0f} MiB"
        os.chdir("/")
    return result


def run(seed: int, count: int) -> tuple[Counter[str], list[str]]:
    """Return outcomes and faults; a process that hangs or dies is a fault, and another follows."""
    outcomes, faults, done = Counter[str](), list[str](), 0
    while done < count:
        command = [sys.executable, __file__, "--worker", "--seed", str(seed), "--count", str(count), "--skip", str(done)]
        with (
            tempfile.TemporaryFile("w+") as errors,  # a pipe that nobody reads would fill up
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as worker,
        ):
            watchdog = subprocess.Popen([sys.executable, "-c", HANGING, str(worker.pid)], stdin=subprocess.PIPE, text=True)
            name, started = "", False
            assert worker.stdout is not None
            assert watchdog.stdin is not None
            for line in worker.stdout:
                word, number, text = line.rstrip("\n").split(" ", 2)
                started = word == "start"
                watchdog.stdin.write("x\n")
                watchdog.stdin.flush()
                if started:
                    name, done = text, int(number) + 1
                else:
                    outcomes[text.split(" ")[0] if text.startswith("FAULT") else text] += 1
                    faults += [f"{name}: {text}"] if text.startswith("FAULT") else []
            watchdog.stdin.close()
            watchdog.wait()
            worker.wait()
            errors.seek(0)
            said = errors.read().strip().splitlines()[-1:]
        if started:
            outcomes["FAULT"] += 1
            faults.append(f"{name}: FAULT the process ended with {worker.returncode}, {said}")
        elif worker.returncode:
            raise RuntimeError(f"the worker ended with {worker.returncode}: {said}")
    return outcomes, faults


HANGING = f"""
import os, select, signal, sys
left = {3 * SECONDS}
while left:  # by the second, so that a pause of all processes counts as one
    if select.select([sys.stdin], [], [], 1)[0]:
        left = {3 * SECONDS}
        if not os.read(0, 4096):
            sys.exit()
    left -= 1
os.kill(int(sys.argv[1]), signal.SIGKILL)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--worker", action="store_true", help="read the inputs here, instead of in a process of its own")
    given = parser.parse_args()
    if given.worker:
        work(given.seed, given.count, given.skip)
        return 0
    started = time.perf_counter()
    outcomes, faults = run(given.seed, given.count)
    print(*faults, sep="\n", end="\n" if faults else "")
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:5} {outcome}")
    print(f"{sum(outcomes.values())} inputs from seed {given.seed} in {time.perf_counter() - started:.0f} s")
    return len(faults) > 0


if __name__ == "__main__":
    sys.exit(main())
