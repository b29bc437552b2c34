"""Trains with 24 SIGKILLs on the way, and once without; prints what was hit and whether both runs are equal, as JSON.

A process of its own with one thread: it forks, which only a process that never had threads may do.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
import sys
import time
from pathlib import Path

import torch
from ppo_helpers import ROWS, ascii_share, make_trainer

from rl.logs import read_log

PHASES = ["start", "rollout", "score", "logprob", "update", "save"]
KILLS, UPDATES = 24, 10
SETTINGS = dict(
    max_steps=UPDATES,
    save_strategy="steps",
    save_steps=1,
    save_total_limit=2,
    eval_strategy="steps",
    eval_steps=4,
    lr_scheduler_type="linear",
    kl_target=0.01,
    kl_horizon=50,
    best_of_n=2,
)


def slow_reward(prompts, completions, **columns):
    time.sleep(0.05)  # long enough to be hit, also by a killer that had to wait for a core
    return ascii_share(prompts, completions)


def train(folder: Path, phase, entered) -> None:
    """One life: from the last whole checkpoint, if there is one, to the end."""
    torch.manual_seed(0)
    trainer = make_trainer(folder, slow_reward, eval_dataset=ROWS[:2], **SETTINGS)
    timed, save = trainer._timed, trainer._save_checkpoint

    def enter(name):
        phase.value = PHASES.index(name)
        entered[phase.value] += 1

    @contextlib.contextmanager
    def marked(name):
        enter(name)
        with timed(name):
            yield

    def marked_save(*args, **kwargs):
        enter("save")
        save(*args, **kwargs)

    trainer._timed, trainer._save_checkpoint = marked, marked_save
    trainer.train(resume_from_checkpoint="auto")
    torch.save(
        {
            "weights": {name: p.detach() for name, p in trainer.model.named_parameters()},
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "beta": trainer.beta,
        },
        folder / "end.pt",
    )


def live(folder: Path, wanted: str | None = None, times: int = 0, delay: float = 0.0) -> str | None:
    """A life that is ended ``delay`` seconds into the phase ``wanted``, entered for the ``times``-th time.

    Returns the phase it was killed in; None if it came to its end first.
    """
    fork = multiprocessing.get_context("fork")
    phase, entered = fork.Value("i", 0, lock=False), fork.Array("i", len(PHASES), lock=False)
    process = fork.Process(target=train, args=(folder, phase, entered))
    process.start()
    while wanted is not None and process.is_alive() and entered[PHASES.index(wanted)] < times:
        time.sleep(0.0002)
    if wanted is not None:
        time.sleep(delay)
        process.kill()
    process.join()
    if process.exitcode == 0:
        return None
    assert process.exitcode == -9, process.exitcode
    return PHASES[phase.value]


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def logged(folder: Path) -> list[dict]:
    drop = ("time/", "train_", "eval/time")
    return [{k: v for k, v in line.items() if not k.startswith(drop)} for line in read_log(folder / "log.jsonl")]


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    rng, hit = random.Random(seed), []
    live(folder / "whole")
    while len(hit) < KILLS:
        wanted = PHASES[1 + len(hit) % (len(PHASES) - 1)]
        found = live(folder / "cut", wanted, rng.randint(1, 2), rng.uniform(0, 0.02))
        if found is None:  # it got to the end: the next life starts again
            (folder / "cut").rename(folder / f"done-{len(hit)}")
            continue
        hit.append(found)
    live(folder / "cut")
    whole = torch.load(folder / "whole" / "end.pt")
    ends = [folder / "cut", *folder.glob("done-*")]
    same = [equal(torch.load(end / "end.pt"), whole) and logged(end) == logged(folder / "whole") for end in ends]
    print(json.dumps({"kills": len(hit), "hit": {name: hit.count(name) for name in PHASES}, "equal": same}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
