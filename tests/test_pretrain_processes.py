"""`maefast pretrain` in several processes: forked, with gloo and torchrun's variables."""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # imported here once, not by an optimizer in each process
import torch.distributed.fsdp
from pretraining import ArrayImages, flags, options, pictures, records, weights
from support import assert_equal, threads

from maefast import cli
from maefast.train import checkpoints, launch
from maefast.train.errors import UserError
from maefast.train.pretrain import trainer
from maefast.train.pretrain.trainer import pretrain

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


class Processes:
    """`count` processes run `task(rank)` with torchrun's variables, one thread, prints in files."""

    def __init__(self, folder: Path, task: Callable[[int], object], count: int = 2):
        folder.mkdir(parents=True)
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}

        def run(rank: int) -> None:
            os.environ |= variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            torch.set_num_threads(1)
            with (folder / f"{rank}.txt").open("w") as stream, redirect_stdout(stream), redirect_stderr(stream):
                code = task(rank)
            os._exit(code if isinstance(code, int) else 0)

        self.each = [get_context("fork").Process(target=run, args=(rank,)) for rank in range(count)]
        for process in self.each:
            process.start()

    def codes(self) -> list[int | None]:
        for process in self.each:
            process.join(60)
        return [process.exitcode for process in self.each]

    def printed(self, rank: int) -> str:
        return (self.folder / f"{rank}.txt").read_text()


CHANGES = {"epochs": 3, "blr": 1e-1, "warmup_epochs": 1, "clip_grad": 1.0, "save_steps": 1, "keep": 99, "augment": "rrc"}


def run(output: Path, data: ArrayImages | None = None, **changes: object) -> dict[str, object]:
    return pretrain(options(output, **(CHANGES | changes)), data or ArrayImages(pictures()))


class SlowImages(ArrayImages):
    def read(self, index, size, box):
        time.sleep(0.01)
        return super().read(index, size, box)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of one process, of sixteen images each."""
    output = tmp_path_factory.mktemp("one") / "run"
    with threads(1):
        assert run(output, batch_size=8, accum_iter=2)["finished"]
    return output


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("two")
    processes = Processes(output / "printed", lambda rank: run(output / "run", batch_size=4, accum_iter=2))
    assert processes.codes() == [0, 0], processes.printed(1)
    assert "in each of 2 processes" in processes.printed(0)
    assert processes.printed(1) == ""
    return output / "run"


def same_to_rounding(got: Path, truth: Path) -> None:
    losses, wanted = (torch.tensor([record["train_loss"] for record in records(folder)]) for folder in (got, truth))
    assert len(set(wanted.tolist())) == 3
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=0)
    assert [record["train_lr"] for record in records(got)] == [record["train_lr"] for record in records(truth)]
    (a, b) = (checkpoints.read(checkpoints.find(folder)[-1]) for folder in (got, truth))
    assert torch.equal(a["run"]["masks"], b["run"]["masks"])
    assert a["model"].keys() == b["model"].keys()
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()


def identical(got: Path, truth: Path) -> None:
    assert [r["train_loss"] for r in records(got)] == [r["train_loss"] for r in records(truth)]
    assert_equal(weights(got), weights(truth))


def test_two_processes_are_one_with_the_joint_batch(one: Path, two: Path) -> None:
    same_to_rounding(two, one)


def test_shards_are_one_process_and_their_checkpoints_are_whole(tmp_path: Path, one: Path, two: Path) -> None:
    """What two processes without shards have begun, sharded ones go on with."""
    begun = str(two / "checkpoint-0-1.pth")
    changes = {"batch_size": 4, "accum_iter": 2, "fsdp": True, "resume": begun, "pictures": 2}
    sharded = Processes(tmp_path / "printed", lambda rank: run(tmp_path / "run", **changes))
    assert sharded.codes() == [0, 0], sharded.printed(0)
    same_to_rounding(tmp_path / "run", one)
    got, wanted = (checkpoints.read(folder / "checkpoint-2.pth")["optimizer"]["state"] for folder in (tmp_path / "run", one))
    for index, moments in wanted.items():
        assert got[index]["exp_avg"].shape == moments["exp_avg"].shape


def test_a_killed_group_goes_on(tmp_path: Path, one: Path, two: Path) -> None:
    """Bit for bit with as many processes; in the same order with one and the same joint batch."""
    output = tmp_path / "run"
    killed = Processes(tmp_path / "killed", lambda rank: run(output, SlowImages(pictures()), batch_size=4, accum_iter=2))
    while len(checkpoints.find(output)) < 3:
        assert killed.each[0].is_alive()
        time.sleep(0.001)
    for process in killed.each:
        os.kill(process.pid, signal.SIGKILL)
    assert killed.codes() == [-signal.SIGKILL] * 2
    newest = str(checkpoints.find(output)[-1])
    with threads(1):
        assert run(tmp_path / "alone", batch_size=16, resume=newest)["finished"]
    assert records(tmp_path / "alone")[-1]["train_loss"] == pytest.approx(records(one)[-1]["train_loss"], rel=1e-4)
    again = Processes(tmp_path / "again", lambda rank: run(output, batch_size=4, accum_iter=2, resume="auto"))
    assert again.codes() == [0, 0]
    identical(output, two)


def test_a_signal_to_any_process_saves_once_and_ends_all(tmp_path: Path, two: Path) -> None:
    output = tmp_path / "run"
    changes = {"batch_size": 4, "accum_iter": 2, "save_steps": 0}
    stopped = Processes(tmp_path / "stopped", lambda rank: run(output, SlowImages(pictures()), **changes))
    while not (output / "log.txt").exists():
        assert stopped.each[0].is_alive()
        time.sleep(0.001)
    os.kill(stopped.each[1].pid, signal.SIGTERM)
    assert stopped.codes() == [0, 0]
    assert stopped.printed(0).count("stopped by SIGTERM") == 1
    assert stopped.printed(1) == ""
    again = Processes(tmp_path / "again", lambda rank: run(output, batch_size=4, accum_iter=2, resume="auto"))
    assert again.codes() == [0, 0]
    identical(output, two)


def test_what_is_wrong_is_said_once_and_ends_all(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", pictures())
    bad = flags(tmp_path / "images.npy", tmp_path / "out", batch_size=17)
    refused = Processes(tmp_path / "refused", lambda rank: cli.main(bad))
    assert refused.codes() == [2, 2]
    message = "must hold at least --batch_size x --accum_iter x processes = 34 images"
    assert (refused.printed(0).count(message), refused.printed(0).count("\n"), refused.printed(1)) == (1, 1, "")
    assert not (tmp_path / "out").exists()

    def fail(rank: int) -> None:
        data = ArrayImages(pictures(), broken=tuple(range(33)) if rank else ())
        with pytest.raises(UserError, match=r"process 1 of 2: --data_path must hold images that can be read"):
            run(tmp_path / "unreadable", data)
        if rank:
            build = trainer.build_model

            def broken(*args: object) -> torch.nn.Module:
                model = build(*args)
                model.register_forward_hook(lambda _, inputs, out: out._replace(loss=out.loss * torch.nan))
                return model

            trainer.build_model = broken
        with pytest.raises(UserError, match=r"the loss is nan at step 0 of epoch 0, with a learning rate of"):
            run(tmp_path / "nan")
        assert not checkpoints.find(tmp_path / "nan")

    failed = Processes(tmp_path / "failed", fail)
    assert failed.codes() == [0, 0], failed.printed(0) + failed.printed(1)


LAUNCHERS = {
    "torchrun": ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, {}, (3, 8, 1, "env://")),
    "launch": ({"RANK": "3", "WORLD_SIZE": "8"}, {"local_rank": 2, "world_size": 8}, (3, 8, 2, "env://")),
    "mpirun": (
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
        | {"MASTER_ADDR": "a", "MASTER_PORT": "7"},
        {"dist_on_itp": True},
        (3, 4, 1, "tcp://a:7"),
    ),
    "srun": (
        {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
        | {"SLURM_STEP_NODELIST": "gpu[07-09,12],cpu1", "SLURM_JOB_ID": "123456"},
        {},
        (5, 8, 1, "tcp://gpu07:13456"),
    ),
    "sbatch": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {}, None),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    variables, given, wanted = LAUNCHERS[launcher]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch.find_launch(**given) == (wanted and launch.Launch(*wanted))
    with pytest.raises(UserError, match=r"--world_size must be the number of processes that were started, \d; it is 3"):
        launch.find_launch(**(given | {"world_size": 3}))


def test_first_host() -> None:
    lists = {"n1": "n1", "n1,n2": "n1", "gpu[3,5]": "gpu3", "r[0-1]n[02-3]x,y": "r0n02x"}
    assert {nodes: launch.first_host(nodes) for nodes in lists} == lists


def test_submit(tmp_path: Path) -> None:
    """One command starts the run and resumes it, in job_dir."""
    pytest.importorskip("submitit")
    np.save(tmp_path / "images.npy", pictures())
    given = [*flags(tmp_path / "images.npy", tmp_path / "run")[1:], f"--job_dir={tmp_path / 'run'}", "--epochs=1"]
    assert cli.main(["submit", *given, "--cluster=debug", "--nodes=1", "--ngpus=0"]) == 0
    assert [record["epoch"] for record in records(tmp_path / "run")] == [0]
