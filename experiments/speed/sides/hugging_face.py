"""The peer's side of `experiments.speed.peers`: transformers on PyTorch, CPU, float32.

Imports neither the project nor JAX. Where there was a choice it is the faster one for this side:
rows without padding and without an attention mask; the special tokens known in advance; gelu in one
kernel; AdamW fused; attention by scaled_dot_product_attention where the class has it (BERT, GPT-2,
ELECTRA; XLNet's has one implementation); ELECTRA samples at masked positions alone; XLNet has its
query stream and its head on K positions alone, and no segments.
"""

import itertools
import os
import pathlib

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader

from experiments.speed.sides import worker
from experiments.speed.sides.worker import Side, Task

PAD, UNK, CLS, SEP, MASK = range(5)
GENERATOR_SIZE = 4  # times that the discriminator is wider
DETECTION_WEIGHT = 50.0
IGNORED = -100  # label of a position that is not predicted


def start(task: Task, alter=lambda model: model) -> Side:
    """Model, optimizer and batches of one objective; the model may be altered first."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model, collate, frame = BUILD[task.objective](task)
    model = alter(model)
    model.train()
    parameters = list(model.parameters())  # those that are shared once
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)
    batches = _endless(task, collate, frame)

    def update(batch) -> float:
        loss = model(**batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    facts = {"parameters": sum(parameter.numel() for parameter in parameters)}
    return Side(facts, lambda: next(batches), update)


# ------------------------------------------------------------------------------------------ batches


def _endless(task: Task, collate, frame):
    """Shuffled batches of the task's tokens: what stands before a row, the tokens, what follows."""
    before, after = frame
    inner = task.sequence_length - len(before) - len(after)
    tokens = np.load(pathlib.Path(task.folder) / "tokens.npy").astype(np.int64)
    rows = torch.from_numpy(tokens[: tokens.size // inner * inner].reshape(-1, inner))
    edges = [torch.tensor(edge, dtype=torch.int64).expand(len(rows), -1) for edge in frame]
    rows = torch.cat([edges[0], rows, edges[1]], 1)
    examples = [{"input_ids": row, "special_tokens_mask": (row <= MASK).long()} for row in rows]
    loader = DataLoader(examples, task.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _collator(task: Task, **options):
    """The library's own, with a tokenizer that only has to know ids."""
    words = {f"t{number}": number for number in range(task.vocabulary_size)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="t1")),
        **{f"{role}_token": f"t{n}" for n, role in enumerate(["pad", "unk", "cls", "sep", "mask"])},
    )
    mask = transformers.DataCollatorForLanguageModeling(tokenizer, **options)

    def collate(examples):
        batch = mask(examples)
        return {key: batch[key] for key in ("input_ids", "labels")}  # no attention mask of ones

    return collate


# -------------------------------------------------------------------------------------- the models


class WithLoss(torch.nn.Module):
    """A model of transformers that computes its own loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch).loss


def _masked_lm(task: Task):
    config = transformers.BertConfig(
        **_sizes(task), **_vocabulary(task), hidden_act="gelu_pytorch_tanh"
    )
    collate = _collator(task, mlm_probability=0.15)
    return WithLoss(transformers.BertForMaskedLM(config)), collate, ([CLS], [SEP])


def _causal_lm(task: Task):
    config = transformers.GPT2Config(
        vocab_size=task.vocabulary_size,
        n_positions=task.sequence_length,
        n_embd=task.width,
        n_layer=task.layers,
        n_head=task.heads,
        n_inner=task.mlp_width,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=task.dropout,
        embd_pdrop=task.dropout,
        attn_pdrop=task.dropout,
        use_cache=False,
        bos_token_id=CLS,
        eos_token_id=SEP,
    )

    def collate(examples):
        rows = torch.stack([example["input_ids"] for example in examples])
        return {"input_ids": rows, "labels": rows}

    return WithLoss(transformers.GPT2LMHeadModel(config)), collate, ([], [])


class Electra(torch.nn.Module):
    """ELECTRA's two networks, whose embeddings are one, and its loss (Clark et al. 2020)."""

    def __init__(self, small, large):
        super().__init__()
        self.generator = transformers.ElectraForMaskedLM(small)
        self.discriminator = transformers.ElectraForPreTraining(large)
        self.generator.electra.embeddings = self.discriminator.electra.embeddings
        self.generator.tie_weights()

    def forward(self, input_ids, labels):
        guess = self.generator(input_ids=input_ids, labels=labels)
        masked = labels != IGNORED
        with torch.no_grad():
            samples = torch.multinomial(guess.logits[masked].softmax(-1), 1)[:, 0]
        original = torch.where(masked, labels, input_ids)
        fake = original.masked_scatter(masked, samples)
        found = self.discriminator(input_ids=fake, labels=(fake != original).long())
        return guess.loss + DETECTION_WEIGHT * found.loss


def _replaced_token_detection(task: Task):
    small = task._replace(
        width=task.width // GENERATOR_SIZE,
        heads=task.heads // GENERATOR_SIZE,
        mlp_width=task.mlp_width // GENERATOR_SIZE,
    )
    configs = [
        transformers.ElectraConfig(
            **_sizes(each), **_vocabulary(task), embedding_size=task.width, hidden_act="gelu"
        )
        for each in (small, task)
    ]
    options = dict(mlm_probability=0.15, mask_replace_prob=0.85, random_replace_prob=0.0)
    return Electra(*configs), _collator(task, **options), ([CLS], [SEP])


def _permutation_lm(task: Task):
    config = transformers.XLNetConfig(
        vocab_size=task.vocabulary_size,
        d_model=task.width,
        n_layer=task.layers,
        n_head=task.heads,
        d_inner=task.mlp_width,
        ff_activation="gelu_pytorch_tanh",
        dropout=task.dropout,
        mem_len=None,
    )
    return WithLoss(transformers.XLNetLMHeadModel(config)), _permute, ([], [SEP, CLS])


def _permute(examples):
    """The batch of one permutation for each row, of which L / 6 tokens are predicted.

    The library's own collator has no K: it makes the query stream and the head run on all L
    positions, and it loops in Python.
    """
    rows = torch.stack([example["input_ids"] for example in examples])
    special = torch.stack([example["special_tokens_mask"] for example in examples])
    noise = torch.rand(rows.shape).masked_fill(special.bool(), 2.0)
    targets = noise.argsort(1)[:, : round((rows.shape[1] - 1) / 6)]  # in the order of prediction
    rank = torch.full(rows.shape, -1)
    rank.scatter_(1, targets, torch.arange(targets.shape[1]).expand_as(targets))
    hidden = (rank[:, None] >= 0) & (rank[:, None] >= rank[:, :, None])
    return {
        "input_ids": rows,
        "perm_mask": hidden.float(),
        "target_mapping": torch.nn.functional.one_hot(targets, rows.shape[1]).float(),
        "labels": rows.gather(1, targets),
    }


def _sizes(task: Task) -> dict:
    return dict(
        hidden_size=task.width,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        intermediate_size=task.mlp_width,
        hidden_dropout_prob=task.dropout,
        attention_probs_dropout_prob=task.dropout,
    )


def _vocabulary(task: Task) -> dict:
    return dict(vocab_size=task.vocabulary_size, max_position_embeddings=task.sequence_length)


BUILD = {
    "masked_lm": _masked_lm,
    "causal_lm": _causal_lm,
    "replaced_token_detection": _replaced_token_detection,
    "permutation_lm": _permutation_lm,
}

if __name__ == "__main__":
    worker.serve(start)
