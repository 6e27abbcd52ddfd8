"""Kills every command many times, and prints a table: `python tests/reliability/kill_at_random.py --times 50`.

A death in five is inside a write, two are at a change of the file system, two at any time; every third trial has the
command killed again when it is started again. `--commands train push` takes a part, `--seed 1` other moments.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]


def main() -> None:
    from kill_trial import COMMANDS, TWO_RANKS, Arena

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failed = []
    print("| command | trials | killed | survived | seconds to the first step again (median, largest) | minutes |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="kill-") as folder, Arena(Path(folder)) as arena:
        for command in args.commands:
            chance = random.Random(f"{args.seed} {command}")
            began = time.monotonic()
            arena.know(command)
            trials = []
            while sum(trial.killed for trial in trials) < args.times:
                deaths = [arena.death(command, chance) for _ in range(1 + (chance.random() < 1 / 3))]
                victim = chance.randrange(2) if command in TWO_RANKS else 0
                trials.append(arena.trial(command, deaths, victim))
                if trials[-1].trouble:
                    print(trials[-1].trouble, deaths, victim, file=sys.stderr)
                    print(trials[-1].log.read_text(errors="replace")[-2000:], file=sys.stderr, flush=True)
            failed += [trial for trial in trials if trial.trouble]
            killed = sum(trial.killed for trial in trials)
            survived = sum(trial.killed for trial in trials if not trial.trouble)
            steps = [trial.to_step for trial in trials if trial.to_step is not None]
            step = f"{statistics.median(steps):.2f}, {max(steps):.2f}" if steps else ""
            minutes = (time.monotonic() - began) / 60
            print(f"| {command} | {len(trials)} | {killed} | {survived} | {step} | {minutes:.1f} |", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
