"""BERT of transformers with its head at the labels alone: what our masked_lm computes.

`BertForMaskedLM`, which people use, makes logits of all L positions and throws away those that have
no label. Here the same parameters, on the same batches, make those of the labels: what is left
between the two sides is the implementation, not the algorithm.
"""

import torch

from experiments.speed.sides import hugging_face, worker


class AtLabels(torch.nn.Module):
    """The loss of a BertForMaskedLM whose head sees the vectors of predicted tokens alone."""

    def __init__(self, whole: hugging_face.WithLoss):
        super().__init__()
        self.model = whole.model

    def forward(self, input_ids, labels):
        hidden = self.model.bert(input_ids=input_ids).last_hidden_state
        predicted = labels != hugging_face.IGNORED
        logits = self.model.cls(hidden[predicted])
        return torch.nn.functional.cross_entropy(logits, labels[predicted])


if __name__ == "__main__":
    worker.serve(lambda task: hugging_face.start(task, AtLabels))
