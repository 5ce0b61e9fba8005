"""A sweep of runs that only pretend to train, in this process or in one of its own.

python -m tests.experiments.fake QUESTION WORKDIR JOBS
"""

import pathlib
import sys

from experiments import planned, run
from experiments.planned import Cost, Planned
from pretraining.manifest import MANIFEST

STEPS = 8

QUESTION = """'''Does it run?'''
from experiments.question import Figure, Protocol, repeat
PROTOCOLS = {{"tiny": Protocol("nothing", ""), "other": Protocol("nothing", "")}}
BASELINE = "a"
FIGURES = (Figure("eval/loss", "Loss", "lower"),)
VARIANTS = {variants}
def runs(protocol):
    for name, overrides in VARIANTS.items():
        yield from repeat(name, "configs/masked_lm.py:tiny", overrides, 1)
"""

# Arguments: run folder, steps, behaviour: "trains", "fails", "waits" at step 4 for SIGTERM, and
# "waits FILE" then for that file, too. Every start leaves a line in <run folder>/starts.
TRAINING = f"""
import json, os, pathlib, signal, sys, time
folder, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
behaviour, _, release = sys.argv[3].partition(" ")
folder.mkdir(parents=True, exist_ok=True)
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


def write_question(folder: pathlib.Path, **variants: dict) -> pathlib.Path:
    """A question with these variants, one run each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.py").write_text(QUESTION.format(variants=repr(variants)))
    return folder


def install(set_attribute, behaviours: pathlib.Path) -> None:
    """Replaces what trains, prepares and compiles.

    Args:
      set_attribute: `setattr`, or that of pytest's monkeypatch.
      behaviours: a folder; how the run <name> behaves stands in the file <name>, if there is one.
    """

    def commands(each: Planned, python: str = sys.executable) -> list[list[str]]:
        path = behaviours / each.name
        behaviour = path.read_text() if path.exists() else "trains"
        return [[python, "-c", TRAINING, str(each.folder), str(STEPS), behaviour]]

    set_attribute(Planned, "commands", commands)
    set_attribute(planned, "_rehearse", lambda runs, _: [Cost(STEPS, 80, 8e12, 1e12)] * len(runs))
    set_attribute(run, "_prepare", lambda *_: None)


if __name__ == "__main__":
    question, workdir, jobs = sys.argv[1:]
    install(setattr, pathlib.Path(question))
    sys.exit(run.main(question, {}, workdir, jobs=jobs))
