"""`convnext` with a fault: `python faulty.py FAULT@rRANK:sSTEP[,...] COMMAND ...`.

| fault | what happens to that rank at that step |
|---|---|
| `nan` | its loss is not a number, once in the life of the run |
| `nans` | from that step on, always |
| `stop` | it is stopped, as by SIGSTOP |
| `sleep` | its forward pass sleeps for ever, in Python |
| `term`, `usr1`, `int` | it sends itself that signal at the start of the step |
| `valterm` | the same in the validation after that step |
| `kill` | it is killed at the start of the step |
| `worker` | it kills its loader processes at the start of the step |
| `evalworker` | it kills them in that step of `evaluate` |
| `flip` | the tenth bit of one of its weights is flipped: rounding may swallow the lowest |
| `slow` | from that step on, each step takes 50 ms longer |
| `slowcopy` | copies to `checkpoint.copy_to` take 10 s each; whatever rank and step |
| `late` | all ranks learn two steps later what was left out, as on a GPU; whatever rank and step |
"""

import os
import signal
import sys
import time
from pathlib import Path

import psutil

FAULTS = {"term": signal.SIGTERM, "usr1": signal.SIGUSR1, "int": signal.SIGINT,
          "kill": signal.SIGKILL, "stop": signal.SIGSTOP}  # fmt: skip


def parse(text: str) -> list[tuple[str, int, int]]:
    found = []
    for part in text.split(","):
        fault, place = part.split("@r")
        rank, step = place.split(":s")
        found.append((fault, int(rank), int(step)))
    return found


def inject(faults: list[tuple[str, int, int]]) -> None:
    import torch

    from convnext_cli.runs.copies import RemoteFolder
    from convnext_cli.training import later
    from convnext_cli.training.evaluation import Evaluator
    from convnext_cli.training.task import Classifier

    if any(fault == "late" for fault, _, _ in faults):
        real_init = later.Later.__init__

        def init(self, value):
            real_init(self, value)
            self.lag_steps = later.LAG_STEPS

        later.Later.__init__ = init

    if any(fault == "slowcopy" for fault, _, _ in faults):
        real_push = RemoteFolder.push

        def push(folder, run):
            time.sleep(10)
            real_push(folder, run)

        RemoteFolder.push = push

    real_step, real_validation = Classifier.training_step, Classifier.validation_step
    real_test = Evaluator.test_step
    done: set[str] = set()

    def once(task: Classifier, fault: str) -> bool:
        """Whether a fault has not happened yet in this process or an earlier one."""
        marker = Path(os.environ["FAULT_MARKERS"]) / f"{fault}-{task.global_rank}"
        if fault in done or marker.exists():
            return False
        done.add(fault)
        marker.touch()
        return True

    def training_step(task: Classifier, batch, batch_idx):
        loss = real_step(task, batch, batch_idx)
        for fault, rank, step in faults:
            now = task.step + 1
            if rank != task.global_rank or now < step:
                continue
            if fault == "nans" or (fault == "nan" and now == step and once(task, fault)):
                loss = loss * float("nan")
            elif fault == "slow":
                time.sleep(0.05)
            elif now == step and fault == "flip":
                weight = next(task.model.parameters()).data.view(torch.int32).view(-1)
                weight[0] ^= 1 << 9
            elif now == step and fault == "sleep" and once(task, fault):
                time.sleep(1000)
            elif now == step and fault == "worker" and once(task, fault):
                kill_loaders()
            elif now == step and fault in FAULTS and once(task, fault):
                os.kill(os.getpid(), FAULTS[fault])
        return loss

    def validation_step(task: Classifier, batch, batch_idx):
        for fault, rank, step in faults:
            here = fault == "valterm" and (rank, step) == (task.global_rank, task.step)
            if here and once(task, fault):
                os.kill(os.getpid(), signal.SIGTERM)
        return real_validation(task, batch, batch_idx)

    def test_step(task: Evaluator, batch, batch_idx):
        if ("evalworker", task.global_rank, batch_idx + 1) in faults:
            kill_loaders()
        return real_test(task, batch, batch_idx)

    Classifier.training_step = training_step
    Classifier.validation_step = validation_step
    Evaluator.test_step = test_step


def kill_loaders() -> None:
    for process in psutil.Process().children():
        process.kill()
    time.sleep(1)


if __name__ == "__main__":
    plan = sys.argv.pop(1)
    if plan != "none":
        inject(parse(plan))
    from convnext_cli.__main__ import main

    main()
