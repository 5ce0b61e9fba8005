"""A sweep of runs that only pretend to train, in this process or in one of its own.

python -m tests.experiments.fake QUESTION WORKDIR JOBS
"""

import json
import pathlib
import shlex
import sys
from collections.abc import Sequence

from experiments import run
from experiments.running import planned
from experiments.running import together as running_together
from experiments.running.planned import Cost, Planned
from pretraining import config as config_lib
from pretraining.manifest import MANIFEST
from pretraining.yardstick import suite

STEPS = 8

QUESTION = """'''Does it run?'''
from experiments.question import Figure, Protocol, repeat
PROTOCOLS = {{
    "tiny": Protocol("nothing", ""),
    "other": Protocol("nothing", ""),
    "measured": Protocol("nothing"),
}}
BASELINE = "a"
FIGURES = (Figure("eval/loss", "Loss", "lower"),)
VARIANTS = {variants}
def runs(protocol):
    for name, overrides in VARIANTS.items():
        yield from repeat(name, "configs/masked_lm.py:tiny", overrides, 1)
"""

# Arguments: run folder, steps, behaviour: "trains", "fails", "waits" at step 4 for SIGTERM, "waits
# FILE" then for that file, too, or "leaves", which a population does without; the config. Every
# start leaves a line in <run folder>/starts.
TRAINING = f"""
import json, os, pathlib, signal, sys, time
folder, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
behaviour, _, release = sys.argv[3].partition(" ")
folder.mkdir(parents=True, exist_ok=True)
told = dict(data="d", cores=len(os.sched_getaffinity(0)))
(folder / "provenance.jsonl").write_text(json.dumps(told) + "\\n")
(folder / "config.json").write_text(sys.argv[4])
def save(number, frame):
    while release and not os.path.exists(release):
        time.sleep(0.05)
    (folder / "saved").write_text("")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
with open(folder / "starts", "a") as file:
    print(json.dumps(sorted(os.sched_getaffinity(0))), file=file)
for step in range(1, steps + 1):
    with open(folder / "metrics.jsonl", "a") as file:
        print(json.dumps(dict(step=step, **{{"eval/loss": 10 - step}})), file=file)
    if behaviour == "fails" and step == 3:
        sys.exit("\\n".join(f"line {{n}} of the log" for n in range(30)))
    while behaviour == "waits" and step == 4:
        time.sleep(0.05)
place = folder / "checkpoints" / str(steps)
place.mkdir(parents=True)
(place / "{MANIFEST}").write_text("")
"""

# Arguments: run folder, name of the file, folder of tasks and their digests. Every start leaves a
# line in <run folder>/measured.
EVALUATION = f"""
import json, pathlib, sys
folder, name, tasks = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
(folder / "evaluations").mkdir(exist_ok=True)
settings = dict(protocol={suite.PROTOCOL}, tasks=json.loads(sys.argv[4]))
stored = dict(settings=settings, figures=dict())
(folder / "evaluations" / name).write_text(json.dumps(stored))
with open(folder / "measured", "a") as file:
    print(tasks, file=file)
"""

# Arguments: behaviour: "" or "waits" for SIGTERM; folder, where every start leaves a line.
PREPARATION = """
import pathlib, sys, time
with open(pathlib.Path(sys.argv[2]) / "prepared", "a") as file:
    print(file=file)
while sys.argv[1] == "waits":
    time.sleep(0.05)
"""


def write_question(folder: pathlib.Path, **variants: dict) -> pathlib.Path:
    """A question with these variants, one run each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.py").write_text(QUESTION.format(variants=repr(variants)))
    return folder


def install(set_attribute, behaviours: pathlib.Path) -> None:
    """Replaces what trains, prepares and compiles.

    Args:
      set_attribute: `setattr`, or that of pytest's monkeypatch.
      behaviours: a folder; how the run <name> behaves stands in the file <name>, if there is one,
        and how the preparation does in the file "preparation".
    """

    def behaviour(name: str, default: str) -> str:
        path = behaviours / name
        return path.read_text() if path.exists() else default

    def commands(each: Planned, python: str = sys.executable) -> list[list[str]]:
        config = config_lib.to_json(config_lib.without_epochs(each.config))
        told = [str(each.folder), str(STEPS), behaviour(each.name, "trains"), config]
        train = [python, "-c", TRAINING, *told]
        name = f"{STEPS}-yardstick-{each.sample}.json"
        told = [str(each.folder), name, each.tasks, json.dumps(each.digests)]
        evaluate = [python, "-c", EVALUATION, *told]
        return [train, evaluate] if each.sample else [train]

    def together(group: Sequence[Planned], python: str = sys.executable) -> list[str]:
        """One after the other, without those that leave."""
        stay = [each for each in group if behaviour(each.name, "") != "leaves"]
        trainings = [shlex.join(each.commands(python)[0]) for each in stay]
        return ["sh", "-c", " && ".join(trainings)]

    def preparation(each: Planned) -> list[str]:
        told = [behaviour("preparation", ""), str(behaviours)]
        return [sys.executable, "-c", PREPARATION, *told]

    set_attribute(Planned, "commands", commands)
    set_attribute(Planned, "preparation", preparation)
    set_attribute(running_together, "command", together)
    costs = lambda runs, *_: [Cost(STEPS, 80, 8e12, 1e12)] * len(runs)
    set_attribute(planned, "_rehearse", costs)


if __name__ == "__main__":
    question, workdir, jobs = sys.argv[1:]
    install(setattr, pathlib.Path(question))
    sys.exit(run.main(question, {}, workdir, jobs=jobs))
