"""What looks wrong in a run, and what usually causes it.

    for finding in doctor.examine("runs/mlm"):
        print(finding.severity, finding.text)

Only the run folder is read, while the run goes on or afterwards. The command is `python -m
pretraining.doctor`, in `__main__.py`. Objectives are not known here: they say which term is a loss
of tokens (`token_term`), and what a figure must be compared with stands beside it in
`metrics.jsonl` (`unigram_loss`, `majority_accuracy`).
"""

from pretraining import lazy

__all__ = ["Finding", "Record", "diagnose", "examine", "read_record"]

__getattr__ = lazy.names(
    __name__,
    Finding="finding.Finding",
    Record="record.Record",
    diagnose="diagnosis.diagnose",
    examine="diagnosis.examine",
    read_record="record.read",
)
